"""`pair_conv2d`: what it is measured on, what it launches, how it is tuned."""

import math
from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F

import cgkernels
from benchmarks.harness.case import OpCase
from benchmarks.harness.inputs import discriminator_batches, normal
from benchmarks.harness.tuning import Config, tuned
from cgkernels.ops.pair_conv2d import _launch
from cgkernels.testing import Launch

_SIZES = discriminator_batches(3, 256)


def _inputs(shape, dtype, generator, device, *, backward=False):
    """A condition and an image; gradients are asked of the image and the weights."""
    weight = normal((64, 2 * shape[1], 4, 4), torch.float32, generator, device)
    made = {
        "y": normal(shape, dtype, generator, device),
        "weight": (weight / math.sqrt(32 * shape[1])).to(dtype),
        "bias": normal((64,), dtype, generator, device),
    }
    made = {name: t.requires_grad_(backward) for name, t in made.items()}
    return made | {"x": normal(shape, dtype, generator, device)}


def _plain(x, y, weight, bias):
    return F.leaky_relu_(F.conv2d(torch.cat([x, y], 1), weight, bias, 2, 1), 0.2)


def _gradients(out, inputs):
    wanted = [inputs[name] for name in ("y", "weight", "bias")]
    return out.detach(), *torch.autograd.grad(out, wanted, torch.ones_like(out))[:2]


def _cost(passes, shape, size):
    """Passes over both images and the output, of as many convolutions."""
    n, c, h, w = shape
    pixels = n * (h // 2) * (w // 2)
    return passes * size * (2 * math.prod(shape) + 64 * pixels), passes * pixels * 64 * 64 * c


CASES = [
    OpCase("", _inputs, cgkernels.pair_conv2d, _plain, partial(_cost, 1),
           sizes=_SIZES),
    OpCase("forward and backward", partial(_inputs, backward=True),
           cgkernels.pair_conv2d, _plain, partial(_cost, 3),
           finish=_gradients, sizes=_SIZES),
]  # fmt: skip


# Launches -----------------------------------------------------------------------------------------
def launches() -> Iterator[Launch]:
    def launch(label, dtype, x=3, y=3, outputs=64, size=256, kernel=4, stride=2, last=False):
        def image(channels):
            made = torch.empty(16, channels, size, size, dtype=dtype, device="meta")
            return made.contiguous(memory_format=torch.channels_last) if last else made

        first, second = image(x), image(y) if y else None
        weight, bias = first.new_empty(outputs, x + y, kernel, kernel), first.new_empty(outputs)
        args = (first, second, weight, bias, stride, 0 if kernel == 1 else 1, 0.2)
        return Launch(f"{label} {dtype}", partial(_launch, *args), dot=dtype != torch.float32)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield launch("pair", dtype)
        yield launch("channels_last", dtype, last=True)
        yield launch("one image", dtype, y=0)
        yield launch("labels", dtype, x=36)
        yield launch("3 x 3", dtype, kernel=3)
        yield launch("1 x 1", dtype, kernel=1, stride=1)
    yield launch("odd", torch.bfloat16, x=1, y=2, outputs=77, size=129, stride=1)


LAUNCHES = {
    "pair_conv2d": launches,
}


# Tuning -------------------------------------------------------------------------------------------
def _window_tiles(features: int, outputs: int, dtype: torch.dtype) -> Iterator[Config]:
    """Tiles of 2048 to 8192 numbers; never more than four warps (see the function)."""
    sizes = product((32, 64, 128), (16, 32, 64), (16, 32), (1, 2, 3), (2, 4))
    for block_m, block_n, block_k, stages, warps in sizes:
        few = block_n > 16 and block_n >= 2 * outputs
        if few or not 2048 <= block_m * block_n <= 8192 or block_k >= 2 * max(16, features):
            continue
        yield {
            "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_stages": stages,
            "num_warps": warps,
        }  # fmt: skip


TUNABLE = tuned(_launch, _window_tiles)
