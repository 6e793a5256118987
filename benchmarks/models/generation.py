"""Cases of whole decoding: tokens that continue a prompt, greedy, against transformers' generate.

The weights are random ones of GPT-2's layout; how fast they are read does not depend on them.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import cgkernels
from benchmarks.harness.case import COMPILED, Case, Inputs, Provider
from benchmarks.harness.ceilings import Call
from benchmarks.harness.records import OURS
from cgm.networks.transformer import Transformer, TransformerConfig
from cgm.networks.transformers_weights import GPT2
from cgm.sampling.decoding import generate


@dataclass(frozen=True)
class Decode:
    """A network, rows that are continued at once, tokens of their prompts and tokens to draw."""

    name: str
    config: TransformerConfig
    rows: int
    prompt: int
    length: int
    cpu: bool = False


def _gpt2(layers: int, width: int, head_size: int, vocabulary: int) -> TransformerConfig:
    return TransformerConfig(
        vocabulary=vocabulary, length=2048, layers=layers, width=width, heads=width // head_size,
        hidden=4 * width, norm="layer", activation="gelu_tanh", positions="learned", bias=True,
        tied=True,
    )  # fmt: skip


_JUDGED = 8  # tokens
_SMALL, _IMAGES = _gpt2(6, 384, 64, 1024), _gpt2(12, 768, 64, 16384)
DECODES = [
    Decode("gpt2_6x384", _SMALL, 1, 64, 128, cpu=True),
    Decode("gpt2_6x384", _SMALL, 8, 64, 128, cpu=True),
    Decode("gpt2_12x768", _IMAGES, 1, 256, 64),
    Decode("gpt2_12x768", _IMAGES, 8, 1024, 64),
    Decode("gpt2_12x768", _IMAGES, 64, 1024, 64),
]


def generation_cases(device: torch.device) -> Iterator[Case]:
    """Those that a device is large enough for."""
    cuda = device.type == "cuda"
    for rank, of in enumerate(DECODES):
        if of.cpu or cuda:
            yield _case(of, torch.bfloat16 if cuda else torch.float32, rank)


@cache
def _network(config: TransformerConfig, dtype: torch.dtype, device: torch.device) -> Transformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Transformer(config)
    # Larger than for training, so that tokens differ.
    for parameter in network.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    return network.to(device, dtype).eval()


def _case(of: Decode, dtype: torch.dtype, rank: int) -> Case:
    config = of.config

    def inputs(seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        shape = (of.rows, of.prompt)
        return {
            "network": _network(config, dtype, device),
            "prompt": torch.randint(config.vocabulary, shape, generator=generator).to(device),
        }

    def ours(sets: Sequence[Inputs]) -> list[Call]:
        return [partial(generate, **i, length=of.length, temperature=0) for i in sets]

    def eager(sets: Sequence[Inputs]) -> list[Call]:
        return [partial(_plainly, **i, length=of.length) for i in sets]

    def compiled(mode: str, sets: Sequence[Inputs]) -> list[Call]:
        twin = copy.deepcopy(sets[0]["network"])
        twin.step = torch.compile(twin.step, mode=mode, dynamic=False)
        return eager([{**i, "network": twin} for i in sets])

    def transformers(cache_kind: str | None, sets: Sequence[Inputs]) -> list[Call]:
        theirs = _to_gpt2(sets[0]["network"])
        return [
            partial(
                theirs.generate, i["prompt"], attention_mask=torch.ones_like(i["prompt"]),
                max_new_tokens=of.length, do_sample=False, eos_token_id=None, pad_token_id=0,
                cache_implementation=cache_kind,
            )
            for i in sets
        ]  # fmt: skip

    providers = {OURS: Provider(ours), "eager": Provider(eager)}
    for mode, name in COMPILED.items():
        providers[name] = Provider(partial(compiled, mode), cuda=mode != "default")
    providers["transformers"] = Provider(partial(transformers, None), needs="transformers")
    providers["transformers-static"] = Provider(
        partial(transformers, "static"), needs="transformers", cuda=True
    )
    nbytes, flops = decoding_cost(config, of.rows, of.prompt, of.length, dtype.itemsize)
    return Case(
        "models", of.name, "greedy", f"b{of.rows}", f"{of.rows} x {of.prompt} + {of.length} tokens",
        dtype, inputs, partial(_gate, of), providers, nbytes=nbytes, flops=flops,
        items=of.rows * of.length, source="cgm.sampling.decoding", rank=rank, rotate=False,
    )  # fmt: skip


def decoding_cost(
    config: TransformerConfig, rows: int, prefix: int, length: int, size: int
) -> tuple[int, int]:
    """Bytes that must be moved and operations that must be done for so many tokens of some rows.

    The weights are read once a token, and by then each row's keys and values.
    """
    c = config
    matrices = c.layers * c.width * ((c.heads + 2 * c.key_heads) * c.head_size + c.width)
    matrices += c.layers * c.width * c.hidden * (3 if c.activation == "swiglu" else 2)
    matrices += c.width * (c.outputs or c.vocabulary)
    seen = rows * sum(range(prefix, prefix + length))  # tokens, by all that are drawn
    cached = 2 * c.layers * c.key_heads * c.head_size  # numbers of a token
    attention = 4 * c.layers * c.heads * c.head_size * (seen + rows * prefix * (prefix + 1) // 2)
    flops = 2 * rows * (prefix + length) * matrices + attention
    return (length * matrices + seen * cached) * size, flops


def _plainly(network: Transformer, prompt: Tensor, length: int) -> Tensor:
    with cgkernels.reference():
        return generate(network, prompt, length, temperature=0, graph=False)


def _gate(of: Decode, sets: Sequence[Inputs]) -> None:
    """The first tokens are those in float64; in half types, where logits tie, the very first."""
    half = sets[0]["network"].embedding.weight.dtype != torch.float32
    length = 1 if half else _JUDGED
    for given in sets:
        ours = generate(**given, length=length, temperature=0).cpu()
        wide = copy.deepcopy(given["network"]).cpu().double()
        exact = _plainly(wide, given["prompt"].cpu(), length)
        share = (ours == exact).all(1).double().mean().item()
        assert share >= 0.75, f"{share:.0%} of the rows are those in float64"


def _to_gpt2(network: Transformer) -> Any:
    """The same weights in transformers' own GPT-2."""
    import transformers

    c, weight = network.config, network.embedding.weight
    config = transformers.GPT2Config(
        vocab_size=c.vocabulary, n_positions=c.length, n_embd=c.width, n_layer=c.layers,
        n_head=c.heads, n_inner=c.hidden, layer_norm_epsilon=c.eps, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config)
    state = network.state_dict()
    names = {ours: of_gpt2 for of_gpt2, ours in GPT2.items()}
    tensors = {
        "transformer.wte.weight": state["embedding.weight"], "lm_head.weight": state["head.weight"],
        "transformer.wpe.weight": state["positions.weight"],
        "transformer.ln_f.weight": state["norm.weight"],
        "transformer.ln_f.bias": state["norm.bias"],
    }  # fmt: skip
    for name, value in state.items():
        if name.startswith("blocks."):
            _, layer, part, kind = name.split(".")
            value = value.mT if value.dim() == 2 else value
            tensors[f"transformer.h.{layer}.{names[part]}.{kind}"] = value
    theirs.load_state_dict(tensors)
    return theirs.to(weight.device, weight.dtype).eval()
