"""`conv2d_stats`: what it is measured on, what it launches, how it is tuned.

Shapes are (N, C, O, side): images, their channels and those of the result, and the side of a square
image. Plain PyTorch runs in channels_last too, which is what cuDNN is fastest in.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

import cgkernels
from benchmarks.harness.case import Inputs, OpCase, Size, Sweep
from benchmarks.harness.inputs import normal
from benchmarks.harness.tuning import Config, tuned
from cgkernels.ops.conv2d_stats import _channels_last, _launch
from cgkernels.testing import Launch

_PATCHES, _GENERATOR = "70x70 discriminator", "ResNet generator of CycleGAN"


def _layers(model: str, *layers: tuple[int, int, int], cpu: bool = False) -> dict[str, Size]:
    """Layers (C, O, side) for batches of 1, as these models are trained, and of 16."""
    return {
        f"b{images}_{features}-{channels}": Size(
            (images, features, channels, side), model, cpu=cpu and images == 1, first=images == 16
        )
        for features, channels, side in layers
        for images in (1, 16)
    }


def _inputs(shape, dtype, generator, device, *, kernel, stride, padding):
    images, features, channels, side = shape
    x = normal((images, features, side, side), dtype, generator, device)
    weight = normal((channels, features, kernel, kernel), torch.float32, generator, device)
    weight = (weight / kernel / features**0.5).to(dtype)
    made: Inputs = {
        name: t.contiguous(memory_format=torch.channels_last)
        for name, t in (("x", x), ("weight", weight))
    }
    return {**made, "stride": stride, "padding": padding}


def _plain(x, weight, stride, padding):
    y = F.conv2d(x, weight, None, stride, padding)
    var, mean = torch.var_mean(y.float(), (2, 3), correction=0)
    return y, mean, var


def _cost(shape, size, *, kernel, stride, padding):
    images, features, channels, side = shape
    out = images * channels * ((side + 2 * padding - kernel) // stride + 1) ** 2
    x, weight = images * features * side**2, channels * features * kernel**2
    nbytes = size * (x + weight + out) + 8 * images * channels
    return nbytes, 2 * out * features * kernel**2


def _convolution(variant: str, sizes: Mapping[str, Size], **options: Any) -> OpCase:
    return OpCase(
        variant, partial(_inputs, **options), cgkernels.conv2d_stats, _plain,
        partial(_cost, **options), sizes=sizes,
        sweep=Sweep("batch", tuple((n, 32, 64, 16) for n in (4, 8, 16, 32, 64)), 4),
    )  # fmt: skip


CASES = [
    _convolution("4x4, stride 2", _layers(_PATCHES, (64, 128, 128))
                 | _layers(_PATCHES, (128, 256, 64), cpu=True), kernel=4, stride=2, padding=1),
    _convolution("4x4", _layers(_PATCHES, (256, 512, 32)), kernel=4, stride=1, padding=1),
    _convolution("3x3", _layers(_GENERATOR, (256, 256, 64)), kernel=3, stride=1, padding=1),
]  # fmt: skip


# Launches -----------------------------------------------------------------------------------------
def launches() -> Iterator[Launch]:
    def launch(dtype, features, channels, side, kernel, stride, *, padding=1, last=True, bits=128):
        x = torch.empty(16, features, side, side, dtype=dtype, device="meta")
        weight = x.new_empty(channels, features, kernel, kernel)
        if last:
            x, weight = _channels_last(x), _channels_last(weight)
        label = f"{kernel}x{kernel} {features}-{channels} stride {stride} at {side} {dtype}"
        return Launch(
            label, partial(_launch, x, weight, stride, padding), bits, dot=dtype != torch.float32
        )

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield launch(dtype, 64, 128, 128, 4, 2)
        yield launch(dtype, 128, 256, 64, 4, 2)
        yield launch(dtype, 256, 512, 32, 4, 1)
        yield launch(dtype, 256, 256, 64, 3, 1)
        yield launch(dtype, 64, 128, 64, 1, 1, padding=0)
        yield launch(dtype, 35, 70, 33, 4, 2, padding=2, last=False, bits=0)
        yield launch(dtype, 3, 16, 32, 3, 1, bits=0)


LAUNCHES = {
    "conv2d_stats": launches,
}


# Tuning -------------------------------------------------------------------------------------------
def _convolution_tiles(
    pixels: int, channels: int, features: int, dtype: torch.dtype
) -> Iterator[Config]:
    """Up to 64 sums a thread of four warps: eight are wrong (triton#1254), and more sums spill."""
    widest = min(128, max(16, 2 ** (channels - 1).bit_length()))
    deepest = max(16, 2 ** (features - 1).bit_length())
    for block_m, block_n, block_k, stages in product(
        (64, 128), (16, 32, 64, 128), (16, 32, 64), (2, 3, 4)
    ):
        fits = widest <= 4 * block_n <= 4 * widest and block_m * block_n <= 8192
        shared = (block_m + block_n) * block_k * stages * dtype.itemsize
        if fits and block_k <= deepest and shared <= 100 << 10:  # so that two fit a multiprocessor
            yield {
                "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "STAGES": stages,
                "num_warps": 4,
                "maxnreg": 192 if dtype.itemsize == 4 and features % 16 == 0 else None,
            }  # fmt: skip


TUNABLE = tuned(_launch, _convolution_tiles)
