"""GPT-2 and Llama of transformers: the same weights give the same logits."""

import pytest
import torch

from cgm.networks.transformer import from_transformers
from cgm.sampling.decoding import generate
from tests.support import Peer

pytestmark = pytest.mark.peers("transformers")

transformers = Peer("transformers")

SIZES = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}


def gpt2(**changes):
    config = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, **SIZES, **changes}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))


def llama(**changes):
    config = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 32, **SIZES, **changes,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


both = pytest.mark.parametrize(
    "make, changes",
    [
        (gpt2, {}),
        (gpt2, {"activation_function": "gelu"}),
        (gpt2, {"n_inner": 40}),
        (llama, {}),
        (llama, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
        (llama, {"num_key_value_heads": 1, "rms_norm_eps": 1e-2}),
    ],
)


@torch.no_grad()
def with_large_weights(theirs):
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return theirs.eval(), torch.randint(50, (3, 20), generator=generator)


@both
@torch.no_grad()
def test_logits(make, changes):
    theirs, tokens = with_large_weights(make(**changes))
    expected = theirs(tokens).logits
    logits = from_transformers(theirs)(tokens)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert expected.std() > 0.1


@both
def test_greedy_continuations(make, changes):
    theirs, tokens = with_large_weights(make(**changes))
    prompt = tokens[:, :9]
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    ours = generate(from_transformers(theirs), prompt, 20, temperature=0)
    assert torch.equal(ours, expected[:, 9:])
    assert len(ours.unique()) > 2


@pytest.mark.parametrize(
    "make, changes, words",
    [
        (gpt2, {"activation_function": "relu"}, "activation_function must be a GELU"),
        (gpt2, {"scale_attn_by_inverse_layer_idx": True}, "attention must be scaled"),
        (llama, {"hidden_act": "gelu"}, "hidden_act must be silu"),
        (llama, {"attention_bias": True}, "hidden_act must be silu"),
        (llama, {"head_dim": 16}, "heads must fill hidden_size"),
    ],
)
def test_variants_that_the_network_does_not_have(make, changes, words):
    with pytest.raises(ValueError, match=words):
        from_transformers(make(**changes))


def test_other_architectures():
    config = transformers.OPTConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8,
        word_embed_proj_dim=8, max_position_embeddings=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match="source must be a gpt2 or a llama"):
        from_transformers(transformers.OPTForCausalLM(config))
