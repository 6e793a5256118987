"""Language models of transformers: the same weights give the same logits and tokens, or a refusal.

With transformers 4.57 and 5: which fields a config has differs between them.
"""

import copy
import warnings

import pytest
import torch

from cgm.networks.transformer import from_transformers
from cgm.sampling.decoding import generate
from tests.support import Peer

pytestmark = pytest.mark.peers("transformers")

transformers = Peer("transformers")

TOKENS = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 32, "head_dim": 8, **TOKENS,
}  # fmt: skip
GPT2_SIZES = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, **TOKENS}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TRAINED = {"original_max_position_embeddings": 8}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}


def rope(kind, **options):
    """Where this version of transformers has it."""
    if transformers.__version__.startswith("4."):
        return {"rope_scaling": {"rope_type": kind, **options}}
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **options}}


def make(name, rope_type=None, large=True, **changes):
    """A model with weights large enough that everything matters to the result."""
    sizes = dict(GPT2_SIZES if name == "GPT2" else SIZES)
    if name == "Qwen2":
        del sizes["head_dim"]  # a field that it does not have
    if rope_type is not None:
        changes = {**rope(rope_type, **changes.pop("rope")), **changes}
    config = getattr(transformers, name + "Config")(**{**sizes, **changes})
    kind = name + ("LMHeadModel" if name == "GPT2" else "ForCausalLM")
    theirs = getattr(transformers, kind)(config)
    return with_large_weights(theirs) if large else theirs.eval()


@torch.no_grad()
def with_large_weights(theirs):
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        draw = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(draw + (parameter.dim() == 1))
    return theirs.eval()


def tokens(length, rows=3):
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(length))


def greedy(theirs, prompt, length, **options):
    options = {"eos_token_id": None, "attention_mask": torch.ones_like(prompt), **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = theirs.generate(
            prompt, max_new_tokens=length, do_sample=False, pad_token_id=0, **options
        )
    return out[:, prompt.shape[1] :]


SERVED = {
    "GPT2": [
        {}, {"tie_word_embeddings": False}, {"n_inner": 40}, {"layer_norm_epsilon": 0.1},
        {"activation_function": "gelu"}, {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "gelu_fast"}, {"activation_function": "gelu_accurate"},
        {"reorder_and_upcast_attn": True, "attn_pdrop": 0.5}, {"n_head": 1}, {"n_layer": 1},
    ],
    "Llama": [
        {}, {"num_key_value_heads": 2, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "rms_norm_eps": 1e-2, "hidden_act": "swish"},
        {"head_dim": 16}, {"head_dim": 4, "attention_dropout": 0.5}, {"attention_bias": True},
        {"mlp_bias": True}, {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
        {"rope_type": "linear", "rope": {"factor": 2.0}},
        {"rope_type": "yarn", "rope": {"factor": 4.0, **TRAINED}},
        {"rope_type": "yarn", "rope": {"factor": 4.0, "attention_factor": 0.7, **TRAINED}},
        {"rope_type": "yarn", "rope": {"factor": 4.0, "beta_fast": 4.0, **TRAINED}},
        {"rope_type": "yarn", "rope": {"factor": 2.0, "truncate": False, **TRAINED}},
        {"rope_type": "llama3", "rope": {**LLAMA3, **TRAINED}, "head_dim": 16},
    ],
    "Mistral": [{"sliding_window": None}, {"sliding_window": 5}, {"sliding_window": 1},
                {"sliding_window": 64, "num_key_value_heads": 2, "head_dim": 16}],
    "Qwen2": [{}, {**WINDOW, "max_window_layers": 1}, {**WINDOW, "max_window_layers": 0},
              {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
              {"sliding_window": 5, "tie_word_embeddings": True},
              {"rope_type": "yarn", "rope": {"factor": 4.0, **TRAINED}}],
    "Qwen3": [{}, {"head_dim": 16, "num_key_value_heads": 2}, {"attention_bias": True},
              {**WINDOW, "max_window_layers": 1, "rms_norm_eps": 1e-2}],
}  # fmt: skip
served = pytest.mark.parametrize(
    "name, changes", [(name, changes) for name, each in SERVED.items() for changes in each]
)


@served
@torch.no_grad()
def test_logits(name, changes):
    """Over all positions, past the trained length and the window."""
    theirs = make(name, **changes)
    expected = theirs(tokens(30)).logits
    logits = from_transformers(theirs)(tokens(30))
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert expected.std() > 0.1


@served
def test_greedy_continuations(name, changes):
    """Their cache of a window of one token keeps all of them, so they go without a cache."""
    theirs, prompt = make(name, **changes), tokens(9)
    ours = generate(from_transformers(theirs), prompt, 20, temperature=0)
    assert torch.equal(ours, greedy(theirs, prompt, 20, use_cache=False))


@pytest.mark.parametrize("prompt_length", [9, 31, 32, 40])
@torch.no_grad()
def test_dynamic_rope(prompt_length):
    """Past the trained length of 32, up to factor times that; keys stay rotated as they were."""
    theirs = make("Llama", rope_type="dynamic", rope={"factor": 2.0})
    ours = from_transformers(theirs)
    for length in (20, 32, 33, 50, 64):
        expected = copy.deepcopy(theirs)(tokens(length)).logits  # a fresh one: they remember
        assert (ours(tokens(length)) - expected).abs().max() < 1e-5 * expected.abs().max()
    prompt, count = tokens(prompt_length), 64 - prompt_length
    expected = greedy(copy.deepcopy(theirs), prompt, count)
    assert torch.equal(generate(ours, prompt, count, temperature=0), expected)
    theirs(tokens(60))  # what a source has seen is not in its weights
    again = from_transformers(theirs)
    assert torch.equal(again(tokens(20)), ours(tokens(20)))


@pytest.mark.parametrize("name", SERVED)
def test_padded_prompts(name):
    """As their tokenizers make them, with padding on the left, and with their stop tokens."""
    theirs, prompt = make(name), tokens(9)
    mask = torch.tensor([[0] * (9 - size) + [1] * size for size in (9, 3, 6)])
    network = from_transformers(theirs)
    expected = greedy(theirs, prompt, 12, attention_mask=mask)
    ours = generate(network, prompt, 12, temperature=0, attention_mask=mask)
    assert torch.equal(ours, expected)
    stops = expected[0, [1, 5]].tolist()
    expected = greedy(theirs, prompt, 12, attention_mask=mask, eos_token_id=stops)
    ours = generate(
        network, prompt, 12, temperature=0, attention_mask=mask, eos_token_id=stops, pad_token_id=0
    )
    assert torch.equal(ours[:, : expected.shape[1]], expected)


# State of a source --------------------------------------------------------------------------------
@torch.no_grad()
def agree(theirs, high=50):
    x = tokens(20) % high
    expected = theirs(x).logits
    logits = from_transformers(theirs)(x)
    return bool((logits - expected).abs().max() < 1e-5 * expected.abs().max())


@pytest.mark.parametrize("name", SERVED)
def test_heads_that_were_changed_after_loading(name):
    theirs = make(name, tie_word_embeddings=name != "Qwen3")
    assert agree(theirs)
    theirs.lm_head = torch.nn.Linear(32, 50)
    torch.nn.init.normal_(theirs.lm_head.bias, std=3)
    network = from_transformers(theirs)
    assert network.head.bias is not None and not network.config.tied
    assert agree(theirs)
    expected = greedy(theirs, tokens(4), 12)
    assert torch.equal(generate(network, tokens(4), 12, temperature=0), expected)
    theirs.lm_head = torch.nn.Linear(32, 7, bias=False)
    assert agree(theirs)
    with pytest.raises(ValueError, match="network must put out its 50 tokens, got 7"):
        generate(from_transformers(theirs), tokens(4), 3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_vocabularies_that_were_resized(name, tied):
    theirs = make(name, tie_word_embeddings=tied)
    for size in (64, 40):
        theirs.resize_token_embeddings(size, mean_resizing=False)
        network = from_transformers(theirs)
        assert network.config.vocabulary == size and network.config.tied == tied
        assert agree(theirs, high=min(size, 50))


def test_what_was_set_after_the_model_was_made():
    theirs = make("Llama")
    for module in theirs.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.5
    theirs.model.rotary_emb.inv_freq *= 0.5
    del theirs.model.layers[1]
    assert agree(theirs)
    theirs.model.norm.variance_epsilon = 0.1
    with pytest.raises(ValueError, match="one rms_norm_eps in all layers"):
        from_transformers(theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_the_dtype_is_that_of_the_source(name, dtype):
    theirs = make(name, num_hidden_layers=1).to(dtype)
    network = from_transformers(theirs)
    assert {p.dtype for p in network.parameters()} == {dtype}
    expected, logits = theirs(tokens(12)).logits, network(tokens(12))
    allowed = max(1e-5, 8 * torch.finfo(dtype).eps)  # of some roundings in a row
    assert (logits - expected).abs().max() < allowed * expected.abs().max()
    for parameter in network.parameters():
        parameter.zero_()
    assert torch.equal(theirs(tokens(12)).logits, expected)  # copies


def wrap(theirs):
    wrapper = torch.nn.Module()
    wrapper.model, wrapper.config = theirs, theirs.config
    return wrapper


def lora(theirs):
    class Adapter(torch.nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer, self.lora_A = base_layer, torch.nn.Linear(32, 2)

    theirs.model.layers[0].self_attn.q_proj = Adapter(theirs.model.layers[0].self_attn.q_proj)


def quantize(theirs):
    torch.ao.quantization.quantize_dynamic(theirs, {torch.nn.Linear}, inplace=True)


def parametrized(theirs):
    torch.nn.utils.parametrizations.weight_norm(theirs.model.layers[1].mlp.up_proj)


def subclass(theirs):
    class Mine(type(theirs)):
        pass

    theirs.__class__ = Mine


def mixed(theirs):
    theirs.lm_head.half()


def value_head(theirs):
    theirs.value_head = torch.nn.Linear(32, 1)


def other_activation(theirs):
    theirs.model.layers[1].mlp.act_fn = torch.nn.ReLU()


def own_forward(theirs):
    theirs.model.forward = lambda *args, **kwargs: None


def more_layers(theirs):
    theirs.config.num_hidden_layers = 1


def renormalizing(theirs):
    theirs.model.embed_tokens.max_norm = 0.1


def not_causal(theirs):
    theirs.model.layers[1].self_attn.is_causal = False


REFUSED = {
    "max_norm": (renormalizing, "model.embed_tokens has max_norm 0.1"),
    "not causal": (not_causal, "model.layers.1.self_attn is not causal"),
    "compiled": (torch.compile, "got torch._dynamo.eval_frame.OptimizedModule"),
    "wrapped": (wrap, "with nothing around it, got torch.nn.modules.module.Module"),
    "base": (lambda m: m.model, "got transformers.models.llama.modeling_llama.LlamaModel"),
    "adapter": (lora, "model.layers.0.self_attn.q_proj is a .*Adapter"),
    "quantized": (quantize, "is a torch.ao.nn.quantized.dynamic.modules.linear.Linear"),
    "parametrized": (parametrized, "model.layers.1.mlp.up_proj is a .*ParametrizedLinear"),
    "subclass": (subclass, "source must be one of"),
    "hook": (lambda m: m.model.layers[0].register_forward_hook(print) and None, "a forward hook"),
    "mixed": (mixed, "one dtype for all weights, got torch.float16, torch.float32"),
    "value head": (value_head, "no weights but those of its class, got value_head.weight, value_h"),
    "activation": (other_activation, "hidden_act must be one of silu, swish, got ReLU, swiglu"),
    "forward": (own_forward, "model has a forward of its own"),
    "layers": (more_layers, "no weights but those of its class, got model.layers.1.self_attn"),
    "meta": (lambda m: m.to("meta"), "source must have its weights as numbers"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", REFUSED)
def test_altered_sources_are_refused_by_name(how):
    alter, words = REFUSED[how]
    theirs = make("Llama", large=False)
    source = alter(theirs)
    with pytest.raises(ValueError, match=words):
        from_transformers(theirs if source is None else source)


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("GPT2", {"activation_function": "relu"}, "activation_function must be one of gelu, "),
        ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("GPT2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("GPT2", {"add_cross_attention": True}, "add_cross_attention"),
        ("Llama", {"num_hidden_layers": 0}, "source must have at least one layer"),
        ("GPT2", {"n_layer": 0}, "source must have at least one layer"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act must be one of silu, swish"),
        ("Llama", {"hidden_act": "relu"}, "hidden_act must be one of silu, swish"),
        ("Llama", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ("Llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("Llama", {"sliding_window": 5, "layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ("Llama", {"rope_type": "longrope", "rope": {
            "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, **TRAINED}},
         "rope_type must be one of default, linear, dynamic, yarn, llama3, got 'longrope'"),
    ],
)  # fmt: skip
def test_variants_that_the_network_does_not_have(name, changes, words):
    with pytest.raises(ValueError, match=words):
        from_transformers(make(name, large=False, **changes))


def test_a_norm_without_weights():
    theirs = make("GPT2", large=False)
    theirs.transformer.h[0].ln_1 = torch.nn.LayerNorm(32, elementwise_affine=False)
    with pytest.raises(ValueError, match=r"transformer.h.0.ln_1 has no weight or no bias"):
        from_transformers(theirs)


def test_other_architectures():
    config = transformers.OPTConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8,
        word_embed_proj_dim=8, max_position_embeddings=8,
    )  # fmt: skip
    sequences = transformers.GPT2Config(**GPT2_SIZES, num_labels=3, pad_token_id=0)
    for source in (
        transformers.OPTForCausalLM(config),
        transformers.GPT2ForSequenceClassification(sequences),
        transformers.GPT2DoubleHeadsModel(sequences),
        transformers.GPT2Model(sequences),
    ):
        with pytest.raises(ValueError, match=f"GPT2LMHeadModel.*got .*{type(source).__name__}"):
            from_transformers(source)
    for source in (None, "gpt2", config, {}):
        with pytest.raises(TypeError, match="source must be a model of transformers"):
            from_transformers(source)
