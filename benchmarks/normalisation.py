"""Cases of the ops of image-to-image networks: norms between the convolutions of pix2pix, CycleGAN.

Samples are channels_last, as convolutions on tensor cores like them. Bytes are those of one read of
each input and one write of each output: what a cache makes of the second read is a gain.
"""

from functools import partial

import torch
import torch.nn.functional as F

import cgkernels
from benchmarks.opcase import Inputs, OpCase, Size, normal, passes
from cgm.networks.layers import join_channels, norm_leaky_relu_and_relu_, norm_relu_

_NORM = torch.nn.InstanceNorm2d(1)  # which knows no number of channels

_SIZES = {
    "d70_l2_b1": Size((1, 128, 64, 64), "70 x 70 discriminator on 256", cpu=True),
    "d70_l2_b16": Size((16, 128, 64, 64), "70 x 70 discriminator on 256", first=True),
    "d70_l4_b16": Size((16, 512, 31, 31), "70 x 70 discriminator on 256"),
    "resnet_first_b1": Size((1, 64, 256, 256), "ResNet generator on 256"),
    "resnet_block_b1": Size((1, 256, 64, 64), "ResNet generator on 256", cpu=True),
    "resnet_block_b16": Size((16, 256, 64, 64), "ResNet generator on 256", first=True),
    "unet_b16": Size((16, 512, 16, 16), "U-Net on 256"),
}


def _norm_inputs(
    shape, dtype, generator, device, *, affine=False, residual=False, backward=False, **options
):  # fmt: skip
    def last(t):
        return t.contiguous(memory_format=torch.channels_last)

    x = last(normal(shape, dtype, generator, device))
    made: Inputs = {"x": x.requires_grad_(backward), **options}
    if affine:
        made["weight"] = 1 + normal((shape[1],), torch.float32, generator, device) / 4
        made["bias"] = normal((shape[1],), torch.float32, generator, device) / 4
    if residual:
        made["residual"] = last(normal(shape, dtype, generator, device))
    return made


def _plain_norm(
    x, weight=None, bias=None, *, activation=None, residual=None, pad=0, over_batch=False
):  # fmt: skip
    """The modules one after another."""
    if over_batch:
        y = F.batch_norm(x, None, None, weight, bias, training=True)
    else:
        y = F.instance_norm(x, weight=weight, bias=bias)
    if activation is not None:
        y = F.relu(y) if activation == "relu" else F.leaky_relu(y, 0.2)
    y = y if residual is None else y + residual
    return F.pad(y, (pad,) * 4, mode="reflect") if pad else y


def _gradient(y, inputs):
    dy = y.detach().flip(0)  # of no symmetry that would leave nothing but rounding
    return y.detach(), *torch.autograd.grad(y, inputs["x"], dy)


def _norm(variant: str, cost, finish=None, **options) -> OpCase:
    return OpCase(
        variant, partial(_norm_inputs, **options), cgkernels.instance_norm_act, _plain_norm, cost,
        sizes=_SIZES, **({} if finish is None else {"finish": finish}),
    )  # fmt: skip


def _skip_inputs(shape, dtype, generator, device, *, backward=False):
    made = (_norm_inputs(shape, dtype, generator, device, backward=backward) for _ in range(2))
    return dict(zip(("x", "up"), (inputs["x"] for inputs in made), strict=True))


def _skip(x, up):
    """What goes down and what goes up, of a level of a U-Net."""
    n, c, h, w = x.shape
    both = torch.empty(
        (n, 2 * c, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    left, right = both.chunk(2, dim=1)
    down, skip = norm_leaky_relu_and_relu_(left, x, _NORM)
    return down, join_channels(both, skip, norm_relu_(right, up, _NORM))


def _plain_skip(x, up):
    h = F.instance_norm(x)
    return F.leaky_relu(h, 0.2), torch.cat([F.relu(h), F.relu(F.instance_norm(up))], dim=1)


def _skip_gradients(outputs, inputs):
    dys = [y.detach().flip(0) for y in outputs]
    return *(y.detach() for y in outputs), *torch.autograd.grad(outputs, list(inputs.values()), dys)


_BACKWARD = {"finish": _gradient, "backward": True}

CASES: dict[str, list[OpCase]] = {
    "instance_norm_act": [
        _norm("leaky_relu", passes(2, 8), activation="leaky_relu"),
        _norm("leaky_relu, forward and backward", passes(5, 26), activation="leaky_relu",
              **_BACKWARD),
        _norm("relu, padded by 1", passes(2, 8), activation="relu", pad=1),
        _norm("residual, padded by 1", passes(3, 9), residual=True, pad=1),
        _norm("batch, leaky_relu", passes(2, 10), activation="leaky_relu", affine=True,
              over_batch=True),
        OpCase("a skip without cat", _skip_inputs, _skip, _plain_skip, passes(5, 16),
               sizes=_SIZES),
        OpCase("a skip without cat, forward and backward", partial(_skip_inputs, backward=True),
               _skip, _plain_skip, passes(12, 52), finish=_skip_gradients, sizes=_SIZES),
    ],
}  # fmt: skip
