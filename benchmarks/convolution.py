"""Cases of convolutions that come with the statistics of their result, at layers of known models.

Shapes are (N, C, O, side): images, their channels and those of the result, and the side of a square
image. Plain PyTorch runs in channels_last too, which is what cuDNN is fastest in.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import cgkernels
from benchmarks.opcase import Inputs, OpCase, Size, Sweep, normal

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


CASES: dict[str, list[OpCase]] = {
    "conv2d_stats": [
        _convolution("4x4, stride 2", _layers(_PATCHES, (64, 128, 128))
                     | _layers(_PATCHES, (128, 256, 64), cpu=True), kernel=4, stride=2, padding=1),
        _convolution("4x4", _layers(_PATCHES, (256, 512, 32)), kernel=4, stride=1, padding=1),
        _convolution("3x3", _layers(_GENERATOR, (256, 256, 64)), kernel=3, stride=1, padding=1),
    ],
}  # fmt: skip
