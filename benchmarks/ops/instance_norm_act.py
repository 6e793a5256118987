"""`instance_norm_act`: what it is measured on, what it launches, how it is tuned.

It stands between the convolutions of pix2pix and CycleGAN. Samples are channels_last, as
convolutions on tensor cores like them. Bytes are those of one read of each input and one write of
each output: what a cache makes of the second read is a gain.
"""

import math
from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F

import cgkernels
from benchmarks.harness.case import Inputs, OpCase, Size, passes
from benchmarks.harness.inputs import normal
from benchmarks.harness.tuning import Config, tuned
from cgkernels.ops.instance_norm_act.launch import _launch_bwd, _launch_fwd, _launch_inplace
from cgkernels.ops.instance_norm_act.reference import _empty_padded, _empty_statistics
from cgkernels.testing import Launch
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


CASES = [
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
]  # fmt: skip


# Launches -----------------------------------------------------------------------------------------
def launches() -> Iterator[Launch]:
    for name, args, bits in meta_inputs():
        yield Launch(name, partial(_launch_fwd, *args), bits)


def inplace_launches() -> Iterator[Launch]:
    for name, x, out, slopes in meta_skips():
        second = None if len(slopes) == 1 else _empty_padded(x, 0)
        args = (out, second, x, None, None, None, 1e-5, slopes, 0, False)
        yield Launch(name, partial(_launch_inplace, *args), 128)


def bwd_launches() -> Iterator[Launch]:
    for name, (x, weight, bias, residual, *options), bits in meta_inputs():
        dy, statistics = _empty_padded(x, options[-2]), _empty_statistics(x, options[-1])
        dtype = None if residual is None else residual.dtype
        args = (dy, None, x, *statistics, weight, bias, dtype, *options)
        yield Launch(name, partial(_launch_bwd, *args), bits)
    for name, x, second, slopes in meta_skips():
        if len(slopes) == 2:
            given = (_empty_padded(x, 0), second, x, *_empty_statistics(x, False))
            args = (*given, None, None, None, 1e-5, slopes, 0, False)
            yield Launch(name, partial(_launch_bwd, *args), 128)


def meta_skips():
    """x, half a tensor of twice the channels, and slopes of what is made of x."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for name, size in (("large", (4, 64, 128, 128)), ("few pixels", (16, 256, 16, 16))):
            x, both = (_meta(size[0], n * size[1], *size[2:], dtype=dtype) for n in (1, 2))
            yield f"skip, {name} {dtype}", x, both.chunk(2, 1)[1], [0.2, 0.0]
        yield f"slice {dtype}", x, both.chunk(2, 1)[1], [0.0]


def meta_inputs():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        large, small = _meta(4, 64, 128, 128, dtype=dtype), _meta(16, 256, 16, 16, dtype=dtype)
        wide = _meta(4, 192, 128, 128, dtype=dtype)[:, 64:128]
        first, few = large.contiguous(), small.contiguous()
        affine = [large.new_empty(64, dtype=torch.float32) for _ in range(2)]
        plain, relu, batch = (1e-5, [0.2], 0, False), (1e-5, [0.0], 1, False), (1e-5, [0.2])
        for name, args, bits in (
            ("instance", (large, None, None, None, *plain), 128),
            ("few pixels", (small, None, None, None, *plain), 128),
            ("batch", (large, *affine, None, *batch, 0, True), 128),
            ("padded", (large, *affine, large, *relu), 128),
            ("few pixels, padded", (small, None, None, small, *relu), 128),
            ("slices", (wide, None, None, wide, *plain), 128),
            ("contiguous", (first, None, None, None, *plain), 128),
            ("contiguous, few pixels", (few, None, None, None, *plain), 128),
            ("contiguous, batch, padded", (first, *affine, first, *batch, 3, True), 0),
        ):
            yield f"{name} {dtype}", args, bits
    odd = _meta(4, 35, 33, 35, dtype=torch.bfloat16)
    yield "odd", (odd, None, None, odd.float(), 1e-5, [0.2], 1, True), 0
    huge = _meta(1, 1, 2**16, 2**16, dtype=torch.bfloat16)  # positions of 64 bits
    yield "2^32 pixels", (huge, None, None, None, 1e-5, [0.2], 0, False), 0


def _meta(*shape, dtype):
    """In channels_last."""
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


LAUNCHES = {
    "instance_norm_act_fwd": launches,
    "instance_norm_act_bwd": bwd_launches,
    "instance_norm_act_": inplace_launches,
}


# Tuning -------------------------------------------------------------------------------------------
def _norm_tiles(pixels: int, channels: int, channels_last: bool) -> Iterator[Config]:
    """Tiles of 1024 to 4096 elements; few pixels whole, and all in 256 parts or a quarter of them.

    In channels_last a tile is 8 to 64 channels wide, else one.
    """
    widths = [c for c in (8, 16, 32, 64) if c == 8 or c < 2 * channels] if channels_last else [1]
    for tile, block_c, warps in product((1024, 2048, 4096), widths, (2, 4, 8)):
        block_p = tile // block_c
        least = max(256, math.ceil(pixels / 256))
        splits = {block_p * math.ceil(min(n, pixels) / block_p) for n in (least, 4 * least)}
        for split, whole in product(sorted(splits), (True, False)):
            fits = split >= pixels or pixels <= 4096 if whole else split < pixels
            if fits and 4 <= tile // (32 * warps) <= 16 and not (whole and split < max(splits)):
                yield {
                    "WHOLE": whole, "split": split, "BLOCK_P": block_p, "BLOCK_C": block_c,
                    "num_warps": warps,
                }  # fmt: skip


TUNABLE = tuned(_launch_fwd, _norm_tiles)
