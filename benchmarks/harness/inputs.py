"""Inputs that several ops share: random ones to be timed, and meta tensors to be compiled."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.case import Size
from cgkernels.samplers import make_schedule


# Random inputs ------------------------------------------------------------------------------------
def normal(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Drawn on the CPU, so that a seed gives the same inputs everywhere."""
    return torch.randn(shape, generator=generator).to(device, dtype)


def numbers(generator: torch.Generator, device: torch.device, rows: int) -> dict[str, Tensor]:
    """The seed and the indices of a call that draws noise."""
    seed = torch.randint(2**62, (1,), generator=generator).to(device)
    return {"seed": seed, "index": torch.arange(rows, device=device)}


def training_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> dict[str, Any]:
    """What is trained on: samples, a schedule, times, and the numbers of their noise."""
    rows = shape[0]
    return {
        "x0": normal(shape, dtype, generator, device),
        "table": make_schedule("linear").training_table().to(device),
        "t": torch.randint(1000, (rows,), generator=generator).to(device),
        "target": "v",
        **numbers(generator, device, rows),
    }


def discriminator_batches(channels: int, side: int) -> dict[str, Size]:
    """Batches of what a layer of the 70 x 70 discriminator takes, on images of 256 x 256."""
    model = "pix2pix, 70 x 70 patches of 256 x 256"
    return {
        f"b{rows}": Size((rows, channels, side, side), model, cpu=rows == 1, first=rows >= 16)
        for rows in (1, 4, 16, 64)
    }


# Meta tensors -------------------------------------------------------------------------------------
def meta_samples() -> Iterator[tuple[str, Tensor, int]]:
    """Meta tensors (16, 4, 64, 64) of each dtype and layout that makes a difference to a kernel.

    Yields (name, tensor, width in bits that its loads and stores must reach).
    """
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.empty(16, 4, 64, 64, dtype=dtype, device="meta")
        wide = torch.empty(16, 7, 64, 64, dtype=dtype, device="meta")
        last = torch.channels_last
        yield f"contiguous {dtype}", x, 128
        yield f"channels_last {dtype}", x.contiguous(memory_format=last), 128
        yield f"strided {dtype}", wide.contiguous(memory_format=last)[:, :4], 0
