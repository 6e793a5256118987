"""`sample_logits`: what it is measured on, what it launches, how it is tuned.

Shapes are (rows, V), for logits of V tokens. The call of FlashInfer follows its documentation, and
has not run yet.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

import cgkernels
from benchmarks.harness.case import Inputs, OpCase, Provider, Size, Sweep
from benchmarks.harness.ceilings import Call
from benchmarks.harness.inputs import normal, numbers
from benchmarks.harness.tuning import Config, tuned
from cgkernels.ops.sample_logits.launch import _launch_bwd, _launch_fwd, _launch_inplace
from cgkernels.testing import Launch

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


CASES = [
    _sampling("", _VOCABULARY, peers=_samplers),
    _sampling("top-k, top-p", _ROWS, peers=_samplers, top_k=_TOP_K, top_p=_TOP_P),
    _sampling("guided, top-k", _VOCABULARY, guided=True, top_k=_GUIDED_TOP_K),
]  # fmt: skip


# Launches -----------------------------------------------------------------------------------------
def launches() -> Iterator[Launch]:
    for name, logits, uncond, scale, filters, bits in meta_inputs():
        seed = torch.empty((), dtype=torch.int64, device="meta")
        index = torch.empty(logits.shape[0], dtype=torch.int64, device="meta")
        args = (logits, uncond, scale, *filters, seed, index, index)
        yield Launch(name, partial(_launch_fwd, *args), bits)


def inplace_launches() -> Iterator[Launch]:
    """Both extremes: it is the same kernel with another end."""
    for name, logits, uncond, scale, filters, bits in meta_inputs():
        if name.startswith(("guided, all filters 16384", "all filters 256", "top-p of hf")):
            number = filters[0]
            seed = torch.empty((), dtype=torch.int64, device="meta")
            tokens = seed.new_empty(logits.shape[0], 256)
            log_probs = number.new_empty(tokens.shape)
            counts = seed.new_empty(3, logits.shape[0]).t()
            args = (tokens, log_probs, counts, logits, uncond, scale, *filters, seed, counts[:, 0])
            yield Launch(name, partial(_launch_inplace, *args), bits)


def bwd_launches() -> Iterator[Launch]:
    for name, logits, uncond, scale, filters, bits in meta_inputs():
        token = torch.empty(logits.shape[0], dtype=torch.int64, device="meta")
        args = (filters[0], token, logits, uncond, scale, *filters)
        yield Launch(name, partial(_launch_bwd, *args), bits)


def meta_inputs():
    rows = 64
    number = torch.empty(rows, device="meta")
    k = torch.empty(rows, dtype=torch.int64, device="meta")
    plain = (number, None, None, None, "mass_before")
    every = (number, k, number, number, "mass_before")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        every_size = (256, 2048, 8192, 16384, 32000)
        for vocabulary in every_size if dtype == torch.float32 else (16384, 32000):
            x = torch.empty(rows, vocabulary, dtype=dtype, device="meta")
            # Shorter rows do not give a 128-bit access to each thread.
            bits = 128 if vocabulary >= 2048 else 0
            yield f"all filters {vocabulary} {dtype}", x, None, None, every, bits
            if vocabulary in (16384, 32000):
                yield f"no filter {vocabulary} {dtype}", x, None, None, plain, bits
                yield f"guided, all filters {vocabulary} {dtype}", x, x, number, every, bits
        top_k = (number, k, None, None, "mass_before")
        yield f"guided, top-k 16384 {dtype}", *((x[:, :16384],) * 2), number, top_k, 128
    hf = (number, None, number, None, "hf")
    odd = torch.empty(rows, 10007, device="meta")
    yield "top-p of hf, odd size", odd, None, None, hf, 0
    yield "all filters, short odd rows", odd[:, :99], None, None, every, 0


LAUNCHES = {
    "sample_logits_fwd": launches,
    "sample_logits_": inplace_launches,
    "sample_logits_bwd": bwd_launches,
}


# Tuning -------------------------------------------------------------------------------------------
def _vocabulary_walks(vocabulary: int) -> Iterator[Config]:
    """A row in registers where 32 of each thread's hold it; pieces of 4 to 16 tokens a thread."""
    whole = max(128, 2 ** (vocabulary - 1).bit_length())
    for warps, tokens in product((1, 2, 4, 8, 16, 32), (4, 8, 16)):
        piece = 32 * warps * tokens
        if piece > whole:
            continue
        for held in (True, False) if whole <= min(16384, 32 * 32 * warps) else (False,):
            yield {
                "HELD": held, "BLOCK": whole if held else piece, "PIECE": piece,
                "num_warps": warps, "maxnreg": min(255, 65536 // (32 * warps)),
            }  # fmt: skip


TUNABLE = tuned(_launch_fwd, _vocabulary_walks)
