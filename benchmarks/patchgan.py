"""Cases of the ops of patch discriminators, at the shapes of the 70 x 70 one on pictures of 256."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import cgkernels
from benchmarks.opcase import OpCase, Size, Sweep, normal

_DISCRIMINATOR = "pix2pix, 70 x 70 patches of 256 x 256"

_PAIRS = {
    "b1": Size((1, 3, 256, 256), _DISCRIMINATOR, cpu=True),
    "b4": Size((4, 3, 256, 256), _DISCRIMINATOR),
    "b16": Size((16, 3, 256, 256), _DISCRIMINATOR, first=True),
    "b64": Size((64, 3, 256, 256), _DISCRIMINATOR, first=True),
}

_HEADS = {
    "b1": Size((1, 512, 31, 31), _DISCRIMINATOR, cpu=True),
    "b4": Size((4, 512, 31, 31), _DISCRIMINATOR),
    "b16": Size((16, 512, 31, 31), _DISCRIMINATOR, first=True),
    "b64": Size((64, 512, 31, 31), _DISCRIMINATOR, first=True),
}

_BATCH = Sweep("batch", tuple((rows, 64, 31, 31) for rows in (4, 8, 16, 32, 64)), 16)


# The first layer ----------------------------------------------------------------------------------
def _pair_inputs(shape, dtype, generator, device, *, backward=False):
    """A condition and a picture; gradients are asked of the picture and the weights."""
    weight = normal((64, 2 * shape[1], 4, 4), torch.float32, generator, device)
    made = {
        "y": normal(shape, dtype, generator, device),
        "weight": (weight / math.sqrt(32 * shape[1])).to(dtype),
        "bias": normal((64,), dtype, generator, device),
    }
    made = {name: t.requires_grad_(backward) for name, t in made.items()}
    return made | {"x": normal(shape, dtype, generator, device)}


def _plain_pair(x, y, weight, bias):
    return F.leaky_relu_(F.conv2d(torch.cat([x, y], 1), weight, bias, 2, 1), 0.2)


def _pair_gradients(out, inputs):
    wanted = [inputs[name] for name in ("y", "weight", "bias")]
    return out.detach(), *torch.autograd.grad(out, wanted, torch.ones_like(out))[:2]


def _pair_cost(passes, shape, size):
    """Passes over both pictures and the output, of as many convolutions."""
    n, c, h, w = shape
    pixels = n * (h // 2) * (w // 2)
    return passes * size * (2 * math.prod(shape) + 64 * pixels), passes * pixels * 64 * 64 * c


# The last layer -----------------------------------------------------------------------------------
def _head_inputs(shape, dtype, generator, device, *, target, backward=False):
    """What the norm before it leaves, with logits of about 1."""
    weight = normal((1, shape[1], 4, 4), torch.float32, generator, device)
    made = {
        "x": normal(shape, dtype, generator, device).contiguous(memory_format=torch.channels_last),
        "weight": (weight / math.sqrt(16 * shape[1])).to(dtype),
        "bias": normal((1,), dtype, generator, device),
    }
    made = {name: t.requires_grad_(backward) for name, t in made.items()}
    return made | {"loss": "vanilla", "target": target}


def _plain_head(x, weight, bias, loss, target):
    logits = F.conv2d(x, weight, bias, padding=1)
    return F.softplus(logits if target == "fake" else -logits).float().mean((1, 2, 3))


def _exact_head(x, weight, bias, loss, target):
    """By a matrix product: convolutions in float64 to one channel take a second an image."""
    logits = weight.flatten(1) @ F.unfold(x, 4, padding=1) + bias
    return F.softplus(logits if target == "fake" else -logits).mean((1, 2))


def _head_gradients(loss, inputs):
    dx, dweight, _ = torch.autograd.grad(loss.sum(), [inputs[n] for n in ("x", "weight", "bias")])
    return loss.detach(), dx, dweight


def _head_cost(passes, shape, size):
    """Passes over x (of as many products), and over weights and patches, which are small."""
    n, c, h, w = shape
    return passes * math.prod(shape) * size, passes * n * (h - 1) * (w - 1) * 2 * 16 * c


# A loss an image: fewer values than the budget likes, lest the gate take minutes on a CPU.
_HEAD: dict[str, Any] = {"exact": _exact_head, "sizes": _HEADS, "sweep": _BATCH, "values": 32}

CASES: dict[str, list[OpCase]] = {
    "pair_conv2d": [
        OpCase("", _pair_inputs, cgkernels.pair_conv2d, _plain_pair, partial(_pair_cost, 1),
               sizes=_PAIRS),
        OpCase("forward and backward", partial(_pair_inputs, backward=True),
               cgkernels.pair_conv2d, _plain_pair, partial(_pair_cost, 3),
               finish=_pair_gradients, sizes=_PAIRS),
    ],
    "patch_head_loss": [
        OpCase("vanilla", partial(_head_inputs, target="fake"), cgkernels.patch_head_loss,
               _plain_head, partial(_head_cost, 1), **_HEAD),
        OpCase("vanilla, forward and backward",
               partial(_head_inputs, target="generator", backward=True),
               cgkernels.patch_head_loss, _plain_head, partial(_head_cost, 3),
               finish=_head_gradients, **_HEAD),
    ],
}  # fmt: skip
