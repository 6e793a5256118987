"""`prefill_attention`: what it is measured on. It runs PyTorch's kernels and launches none of ours.

Shapes are (B, T, Hkv, D), with all tokens new.
"""

from functools import partial
from typing import Any

import torch

import cgkernels
from benchmarks.harness.case import Inputs, OpCase, Size, Sweep
from benchmarks.harness.inputs import normal
from benchmarks.harness.plain import sdpa

_BIDIRECTIONAL = 256  # tokens of a condition that all see one another

_SEQUENCES = {
    "b2_t320": Size((2, 320, 4, 64), "four heads of 64", cpu=True),
    "b1_t1024": Size((1, 1024, 12, 64), "GPT-2 small"),
    "b8_t1024": Size((8, 1024, 12, 64), "GPT-2 small", first=True),
    "b64_t1024": Size((64, 1024, 12, 64), "GPT-2 small"),
    "large_b1_t4096": Size((1, 4096, 32, 128), "Llama-2 7B", first=True),
    "large_b8_t1024": Size((8, 1024, 32, 128), "Llama-2 7B"),
}

# Work grows with the square of the length, so rows are swept.
_ROWS = Sweep("rows", tuple((rows, 256, 4, 64) for rows in (1, 2, 4, 8, 16)), 4)


def _prefill_inputs(shape, dtype, generator, device, *, group=1, bidirectional=0):
    rows, length, heads, size = shape
    made: Inputs = {
        name: normal((rows, length, n, size), dtype, generator, device)
        for name, n in (("q", heads * group), ("k", heads), ("v", heads))
    }
    return made | {"bidirectional": bidirectional}


def _plain_prefill(q, k, v, bidirectional):
    """With a mask where tokens see later ones, as one would write it."""
    how: dict[str, Any] = {"is_causal": True}
    if bidirectional:
        at = torch.arange(q.shape[1], device=q.device)
        mask = (at <= at[:, None]) | (torch.maximum(at, at[:, None]) < bidirectional)
        how = {"attn_mask": mask}
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return sdpa(q, k, v, **how).transpose(1, 2)


def _prefill_cost(shape, size, *, group=1, bidirectional=0):
    """Of the pairs that see one another."""
    rows, length, heads, head_size = shape
    pairs = (length * (length + 1) + bidirectional * max(0, bidirectional - 1)) // 2
    stored = 2 * rows * length * heads * (1 + group) * head_size
    return stored * size, 4 * rows * heads * group * pairs * head_size


def _prefill(variant: str, **options: Any) -> OpCase:
    return OpCase(
        variant, partial(_prefill_inputs, **options), cgkernels.prefill_attention, _plain_prefill,
        partial(_prefill_cost, **options), sizes=_SEQUENCES, sweep=_ROWS,
    )  # fmt: skip


CASES = [
    _prefill(""), _prefill("groups of 4", group=4),
    _prefill(f"{_BIDIRECTIONAL} tokens bidirectional", bidirectional=_BIDIRECTIONAL),
]  # fmt: skip
