"""Cases of the other ops of a token step: embeddings, norms with their matrices, and sampling.

Shapes are (rows, N, K) for a linear layer of N channels and K features, (rows, V) for logits of V
tokens, and (rows, V, W) for embeddings of V tokens in W numbers. The calls of FlashInfer follow
its documentation, and have not run yet.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import cgkernels
from benchmarks.opcase import Inputs, OpCase, Provider, Size, Sweep, normal, numbers
from benchmarks.timing import Call

# Embeddings ---------------------------------------------------------------------------------------
_COLUMNS = 1024  # tokens of a row

_EMBEDDINGS = {
    f"b{rows}_{vocabulary}x{width}": Size((rows, vocabulary, width), model, cpu, first=rows == 64)
    for vocabulary, width, model, cpu in (
        (50257, 768, "GPT-2 small", False),
        (1024, 384, "six layers of 384", True),
    )
    for rows in (1, 8, 64)
}


def _embedding_inputs(shape, dtype, generator, device, *, learned):
    rows, vocabulary, width = shape
    tokens = torch.randint(vocabulary, (rows, _COLUMNS), generator=generator)
    made: Inputs = {
        "tokens": tokens.to(device),
        "position": torch.full((rows,), 500, device=device),
        "embedding": normal((vocabulary, width), dtype, generator, device),
    }
    if learned:
        made["places"] = normal((_COLUMNS, width), dtype, generator, device)
    return made


def _plain_embedding(tokens, position, embedding, places=None):
    x = F.embedding(tokens.gather(1, position[:, None])[:, 0], embedding)
    return x if places is None else x + F.embedding(position, places)


def _embedding_cost(shape, size, *, learned):
    rows, _, width = shape
    return rows * ((3 if learned else 2) * width * size + 16), rows * width * learned


def _embedding(variant: str, *, learned: bool) -> OpCase:
    return OpCase(
        variant, partial(_embedding_inputs, learned=learned), cgkernels.embed_tokens,
        _plain_embedding, partial(_embedding_cost, learned=learned), sizes=_EMBEDDINGS,
        sweep=Sweep("rows", tuple((n, 1024, 768) for n in (64, 128, 256, 512, 1024)), 16),
    )  # fmt: skip


# A norm, a linear layer and what follows it -------------------------------------------------------
def _layers(model: str, channels: int, features: int, cpu: bool = False) -> dict[str, Size]:
    """A layer for the rows that one launch takes; on a CPU for a few."""
    return {
        f"b{rows}_{channels}x{features}": Size(
            (rows, channels, features), model, cpu=cpu and rows in (1, 8), first=rows == 8
        )
        for rows in (1, 8, 16, 64)
    }


_SMALL, _LARGE, _OURS = "GPT-2 small", "Llama-2 7B", "six layers of 384"
_HEAD = "GPT-2 small with LlamaGen's codebook"


def _linear_inputs(
    shape, dtype, generator, device, *, norm=None, activation=None, bias=False, residual=False,
    int8=False,
):  # fmt: skip
    rows, channels, features = shape
    lines = 2 * channels if activation == "swiglu" else channels
    vector = partial(normal, dtype=dtype, generator=generator, device=device)
    weight = normal((lines, features), torch.float32, generator, device) / features**0.5
    made: Inputs = {
        "x": vector((rows, features)), "norm": norm, "activation": activation,
        "norm_weight": None if norm is None else 1 + vector((features,)) / 4,
        "norm_bias": vector((features,)) if norm == "layer" else None,
        "bias": vector((lines,)) if bias else None,
        "residual": vector((rows, channels)) if residual else None,
    }  # fmt: skip
    if not int8:
        return {**made, "weight": weight.to(dtype), "scales": None}
    scales = weight.abs().amax(1) / 127
    return {**made, "weight": (weight / scales[:, None]).round().to(torch.int8), "scales": scales}


def _plain_linear(
    x, weight, scales, norm, norm_weight, norm_bias, bias, activation, residual, eps=1e-5
):
    """The modules one after another; weights of 8 bits as gpt-fast multiplies them."""
    if norm == "rms":
        x = F.rms_norm(x, x.shape[-1:], norm_weight, eps)
    elif norm == "layer":
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    if scales is None:
        y = F.linear(x, weight, bias)
    else:
        y = F.linear(x, weight.to(x.dtype)) * scales.to(x.dtype)
    if activation == "swiglu":
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    elif activation is not None:
        y = F.gelu(y)
    return y if residual is None else y + residual


def _linear_cost(
    shape, size, *, norm=None, activation=None, bias=False, residual=False, int8=False
):
    rows, channels, features = shape
    lines = 2 * channels if activation == "swiglu" else channels
    vectors = {None: 0, "rms": 1, "layer": 2}[norm] * features + (lines if bias else 0)
    states = rows * (features + (2 if residual else 1) * channels)
    weight = lines * (features + 4) if int8 else lines * features * size
    return weight + size * (vectors + states), 2 * rows * lines * features


def _linear(variant: str, sizes: Mapping[str, Size], **options: Any) -> OpCase:
    return OpCase(
        variant, partial(_linear_inputs, **options), cgkernels.norm_linear, _plain_linear,
        partial(_linear_cost, **options), sizes=sizes,
        sweep=Sweep("channels", tuple((8, n, 768) for n in (512, 1024, 2048, 4096, 8192)), 4, 1),
    )  # fmt: skip


# Sampling -----------------------------------------------------------------------------------------
_TOP_K, _TOP_P = 50, 0.9
_GUIDANCE, _GUIDED_TOP_K = 4.0, 2000  # what LlamaGen draws with

_LOGITS = {
    f"b{rows}_v{vocabulary}": Size((rows, vocabulary), model, cpu, first)
    for rows, vocabulary, model, cpu, first in (
        (1, 16, "16 levels", True, False),
        (64, 16, "16 levels", True, False),
        (1, 256, "pixels", False, False),
        (8, 256, "pixels", False, False),
        (64, 256, "pixels", False, False),
        (1, 1024, "VQGAN's codebook", True, False),
        (64, 1024, "VQGAN's codebook", True, False),
        (1, 16384, "LlamaGen's codebook", True, False),
        (8, 16384, "LlamaGen's codebook", False, False),
        (64, 16384, "LlamaGen's codebook", True, True),
        (1, 262144, "Gemma 3", False, False),
        (8, 262144, "Gemma 3", False, True),
        (64, 262144, "Gemma 3", False, False),
    )
}


def _logits(shape, dtype, generator, device, *, guided=False, **filters):
    """Logits, and the numbers of a sampler as tensors, which a graph of a token step can change."""
    like = {int: torch.int64, float: torch.float32}
    made: Inputs = {
        "logits": normal(shape, torch.float32, generator, device).mul_(3).to(dtype),
        "temperature": torch.ones((), device=device),
        "position": torch.zeros((), dtype=torch.int64, device=device),
        **numbers(generator, device, shape[0]),
    }
    for name, value in filters.items():
        made[name] = torch.tensor(value, dtype=like[type(value)], device=device)
    if guided:
        made["uncond"] = normal(shape, torch.float32, generator, device).mul_(3).to(dtype)
        made["scale"] = torch.tensor(_GUIDANCE, device=device)
    return made


def _exact_draw(logits, uncond=None, scale=None, **options):
    """The same tokens, and their log-probabilities in float64 over the same kept set.

    Masses computed in float64 would round to other whole numbers, and now and then keep others.
    """
    single = logits.float().requires_grad_()
    base = None if uncond is None else uncond.float()
    token, log_prob = cgkernels.sample_logits(single, base, scale=scale, **options)
    (gradient,) = torch.autograd.grad(log_prob.sum(), single)
    kept = (gradient != 0).scatter(1, token[:, None], True)
    mixed = logits if uncond is None else uncond + scale * (logits - uncond)
    log_prob = mixed.masked_fill(~kept, -torch.inf).log_softmax(-1)
    return token, log_prob.gather(1, token[:, None])[:, 0]


def _plain_draw(logits, *, top_k=None, top_p=None):
    """Sort, cut, draw: with top-k alone by the least of the largest k."""
    logits = logits.float()
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        if top_k is not None:
            rank = torch.arange(probability.shape[1], device=logits.device)
            probability = probability.masked_fill(rank >= top_k, 0)
            probability = probability / probability.sum(-1, keepdim=True)
        before = probability.cumsum(-1) - probability
        probability = probability.masked_fill(before >= top_p, 0)
        at = probability.multinomial(1)
        share = probability.gather(1, at) / probability.sum(-1, keepdim=True)
        return order.gather(1, at)[:, 0], share.log()[:, 0]
    if top_k is not None and top_k < logits.shape[1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probability = logits.softmax(-1)
    token = probability.multinomial(1)
    return token[:, 0], probability.gather(1, token).log()[:, 0]


def _plain_sample(logits, uncond=None, *, filters, scale=None, **rest):
    if uncond is not None:
        logits = uncond + scale.to(logits.dtype) * (logits - uncond)
    return _plain_draw(logits, **filters)


def _sample_cost(shape, size, *, streams=1):
    """Logits read once, a token and its log-probability written; some 60 operations for noise."""
    rows, vocabulary = shape
    return rows * (streams * vocabulary * size + 12), 60 * rows * vocabulary


def _processors(filters: Mapping[str, Any], sets: Sequence[Inputs]) -> list[Call]:
    """What `generate` of transformers does with the logits of a step."""
    from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList(
        [TopKLogitsWarper(filters["top_k"]), TopPLogitsWarper(filters["top_p"])]
    )

    def draw(logits):
        scores = warpers(None, logits.float())
        return scores.softmax(-1).multinomial(1)[:, 0]

    return [partial(draw, inputs["logits"]) for inputs in sets]


def _flashinfer(filters: Mapping[str, Any], sets: Sequence[Inputs]) -> list[Call]:
    from flashinfer import sampling

    def draw(logits):
        if filters:
            return sampling.top_k_top_p_sampling_from_logits(logits.float(), **filters)
        return sampling.sampling_from_logits(logits.float())

    return [partial(draw, inputs["logits"]) for inputs in sets]


def _samplers(filters: Mapping[str, Any]) -> dict[str, Provider]:
    found = {"flashinfer": Provider(partial(_flashinfer, filters), needs="flashinfer", cuda=True)}
    if filters:
        found["transformers"] = Provider(partial(_processors, filters), needs="transformers")
    return found


def _sampling(
    variant: str, sweep: Sweep, *, guided: bool = False, peers: Callable | None = None,
    **filters: Any,
) -> OpCase:  # fmt: skip
    return OpCase(
        variant, partial(_logits, guided=guided, **filters), cgkernels.sample_logits,
        partial(_plain_sample, filters=filters), partial(_sample_cost, streams=2 if guided else 1),
        peers=dict if peers is None else partial(peers, filters), sizes=_LOGITS, sweep=sweep,
        exact=_exact_draw, values=64,
    )  # fmt: skip


_VOCABULARY = Sweep("vocabulary", tuple((16, v) for v in (1024, 2048, 4096, 8192, 16384)), 16, 1)
_ROWS = Sweep("rows", tuple((rows, 4096) for rows in (4, 8, 16, 32, 64)), 64)

CASES: dict[str, list[OpCase]] = {
    "embed_tokens": [
        _embedding("", learned=False), _embedding("learned positions", learned=True),
    ],
    "norm_linear": [
        _linear("rms", _layers(_SMALL, 2304, 768) | _layers(_HEAD, 16384, 768)
                | _layers(_OURS, 1536, 384, cpu=True), norm="rms"),
        _linear("rms, int8", _layers(_SMALL, 2304, 768) | _layers(_HEAD, 16384, 768)
                | _layers(_OURS, 1536, 384, cpu=True), norm="rms", int8=True),
        _linear("layer, bias, gelu", _layers(_SMALL, 3072, 768)
                | _layers(_OURS, 1536, 384, cpu=True), norm="layer", bias=True, activation="gelu"),
        _linear("rms, swiglu", _layers(_LARGE, 11008, 4096) | _layers(_OURS, 1024, 384, cpu=True),
                norm="rms", activation="swiglu"),
        _linear("residual", _layers(_SMALL, 768, 768) | _layers(_SMALL, 768, 3072)
                | _layers(_OURS, 384, 1536, cpu=True), residual=True),
    ],
    "sample_logits": [
        _sampling("", _VOCABULARY, peers=_samplers),
        _sampling("top-k, top-p", _ROWS, peers=_samplers, top_k=_TOP_K, top_p=_TOP_P),
        _sampling("guided, top-k", _VOCABULARY, guided=True, top_k=_GUIDED_TOP_K),
    ],
}  # fmt: skip
