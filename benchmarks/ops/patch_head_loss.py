"""`patch_head_loss`: what it is measured on, what it launches, how it is tuned."""

import math
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

import cgkernels
from benchmarks.harness.case import OpCase, Sweep
from benchmarks.harness.inputs import discriminator_batches, normal
from benchmarks.harness.tuning import Config, tuned
from cgkernels.ops.patch_head_loss import _launch
from cgkernels.testing import Launch


def _inputs(shape, dtype, generator, device, *, target, backward=False):
    """What the norm before it leaves, with logits of about 1."""
    weight = normal((1, shape[1], 4, 4), torch.float32, generator, device)
    made = {
        "x": normal(shape, dtype, generator, device).contiguous(memory_format=torch.channels_last),
        "weight": (weight / math.sqrt(16 * shape[1])).to(dtype),
        "bias": normal((1,), dtype, generator, device),
    }
    made = {name: t.requires_grad_(backward) for name, t in made.items()}
    return made | {"loss": "vanilla", "target": target}


def _plain(x, weight, bias, loss, target):
    logits = F.conv2d(x, weight, bias, padding=1)
    return F.softplus(logits if target == "fake" else -logits).float().mean((1, 2, 3))


def _exact(x, weight, bias, loss, target):
    """By a matrix product: convolutions in float64 to one channel take a second an image."""
    logits = weight.flatten(1) @ F.unfold(x, 4, padding=1) + bias
    return F.softplus(logits if target == "fake" else -logits).mean((1, 2))


def _gradients(loss, inputs):
    dx, dweight, _ = torch.autograd.grad(loss.sum(), [inputs[n] for n in ("x", "weight", "bias")])
    return loss.detach(), dx, dweight


def _cost(passes, shape, size):
    """Passes over x (of as many products), and over weights and patches, which are small."""
    n, c, h, w = shape
    return passes * math.prod(shape) * size, passes * n * (h - 1) * (w - 1) * 2 * 16 * c


# A loss an image: fewer values than the budget likes, lest the gate take minutes on a CPU.
_FEW: dict[str, Any] = {
    "exact": _exact, "sizes": discriminator_batches(512, 31), "values": 32,
    "sweep": Sweep("batch", tuple((rows, 64, 31, 31) for rows in (4, 8, 16, 32, 64)), 16),
}  # fmt: skip

CASES = [
    OpCase("vanilla", partial(_inputs, target="fake"), cgkernels.patch_head_loss,
           _plain, partial(_cost, 1), **_FEW),
    OpCase("vanilla, forward and backward",
           partial(_inputs, target="generator", backward=True),
           cgkernels.patch_head_loss, _plain, partial(_cost, 3),
           finish=_gradients, **_FEW),
]  # fmt: skip


# Launches -----------------------------------------------------------------------------------------
def launches() -> Iterator[Launch]:
    def launch(label, dtype, loss, target, *, n=16, c=512, size=31, kernel=4, last=True, bits=128):
        x = torch.empty(n, c, size, size, dtype=dtype, device="meta")
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        weight, bias = x.new_empty(1, c, kernel, kernel), x.new_empty(1)
        args = (x, weight, bias, loss, target, 0 if kernel == 1 else 1)
        half = dtype != torch.float32
        return Launch(f"{label} {dtype}", partial(_launch, *args), bits, dot=half)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for loss, target in (("lsgan", "real"), ("vanilla", "fake"), ("hinge", "real"),
                             ("wgan", "generator"), (None, None)):  # fmt: skip
            yield launch(f"{loss} {target}", dtype, loss, target)
        yield launch("3 x 3", dtype, "hinge", "fake", kernel=3, bits=0)
        yield launch("1 x 1", dtype, "hinge", "fake", kernel=1, c=128, size=256, bits=0)
        yield launch("contiguous", dtype, "hinge", "fake", last=False, bits=0)
    yield launch("odd", torch.bfloat16, "vanilla", "real", n=1, c=77, size=17, bits=0)


LAUNCHES = {
    "patch_head_loss": launches,
}


# Tuning -------------------------------------------------------------------------------------------
def _pixel_tiles(pixels: int, dtype: torch.dtype) -> Iterator[Config]:
    """Tiles of 16 to 128 pixels, and parts of 32 to 128 channels of at most 256 bytes a pixel."""
    for block_m, block_c, stages in product((16, 32, 64, 128), (32, 64, 128), (3, 4, 6)):
        if block_c * dtype.itemsize <= 256:
            warps = 4 if block_m >= 64 else 1
            yield {"BLOCK_M": block_m, "BLOCK_C": block_c, "STAGES": stages, "num_warps": warps}


TUNABLE = tuned(_launch, _pixel_tiles)
