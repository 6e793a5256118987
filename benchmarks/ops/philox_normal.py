"""`philox_normal`: what it is measured on, what it launches, how it is tuned."""

from collections.abc import Iterator
from functools import partial

import torch

import cgkernels
from benchmarks.harness.case import OpCase, passes
from benchmarks.harness.inputs import numbers
from benchmarks.harness.tuning import ROWS
from cgkernels.ops.philox_normal import _launch_fwd
from cgkernels.testing import Launch


def _inputs(shape, dtype, generator, device):
    return {"like": torch.empty(shape, dtype=dtype, device=device)} | numbers(
        generator, device, shape[0]
    )


def _noise(like, seed, index):
    return cgkernels.philox_normal(
        tuple(like.shape), seed=seed, index=index, step=0, dtype=like.dtype
    )


CASES = [
    OpCase("", _inputs, _noise, lambda like, **_: torch.randn_like(like),
           passes(1, 6)),
]  # fmt: skip


# Launches -----------------------------------------------------------------------------------------
def launches() -> Iterator[Launch]:
    seed = torch.empty((), dtype=torch.int64, device="meta")
    index = torch.empty(16, dtype=torch.int64, device="meta")
    for shape in ((16, 3, 256, 256), (16, 10)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for channels_last in (False, True)[: len(shape) // 2]:
                name = "channels_last" if channels_last else "contiguous"
                yield Launch(
                    f"{name} {dtype} {shape}",
                    partial(_launch_fwd, seed, index, index, shape, 0, dtype, channels_last),
                    vector_bits=128 if shape[1] == 3 else 0,
                )


LAUNCHES = {
    "philox_normal": launches,
}


# Tuning -------------------------------------------------------------------------------------------
TUNABLE = ROWS
