"""Instance or batch norm, activation, residual and reflection padding in one.

    y = pad(act((x - mean) / sqrt(var + eps) * weight + bias) + residual)

and, where a skip connection asks for it, the same with a second activation in the same pass.

Shapes   x, residual: (N, C, H, W); weight, bias: (C,); y: (N, C, H + 2 pad, W + 2 pad); mean and
         var (biased): (N, C) over the pixels of a sample, or (C,) over those of the batch.
Dtypes   float32, float16, bfloat16 (float64 on CPU), each tensor its own; float32 inside; y has x's
         dtype and memory format, mean and var are float32. Parts of the pixels give (mean, M2) and
         are merged in their order: a mean of 1000 standard deviations costs the variance nothing,
         and a sample has the same bits in any batch, unless the statistics are the batch's.
Backward in x, weight, bias, residual: once by kernel, from x and its statistics alone; twice by
         differentiating instance_norm_act_bwd_ref.
Source   instance norm: arXiv:1607.08022; batch norm: arXiv:1502.03167; merging of variances: Chan,
         Golub, LeVeque, Stanford STAN-CS-79-773. Derivatives from the formula.
"""

import math
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from cgkernels._triton import tl, triton
from cgkernels.checks import (
    check_float,
    check_no_grad,
    check_same_device,
    check_shape,
    check_writable,
)
from cgkernels.library import (
    define_op,
    needs_function,
    using_reference,
)
from cgkernels.rows import row_strides, with_strides

ACTIVATIONS = (None, "relu", "leaky_relu")

# What one program merges at most, and its shape: parts of the pixels, channels.
_MERGED = {"PARTS": 256, "BLOCK_C": 16, "enable_fp_fusion": True}

_leaky_relu_backward = torch.ops.aten.leaky_relu_backward

_PIECE = 2**17  # elements that a CPU takes at a time


# 1. Reference -------------------------------------------------------------------------------------
def instance_norm_act_ref(x, weight, bias, residual, eps, slopes, pad, over_batch):
    """y of each activation, mean, var; an activation is z where z > 0, else slope z."""
    centered, mean, var = _centered_ref(x, over_batch)
    z = _affine_ref(centered, _gain_ref(var, weight, eps), bias)
    ys = (_finished_ref(z, residual, slope, pad).to(x.dtype) for slope in slopes)
    shape = x.shape[1:2] if over_batch else x.shape[:2]
    return *ys, mean.view(shape), var.view(shape)


def instance_norm_act_bwd_ref(dy, second_dy, x, weight, bias, eps, slopes, pad, over_batch):
    """Gradients of x, weight, bias and residual, whether these are there or not.

    The statistics are taken again: second derivatives go through them.
    """
    centered, _, var = _centered_ref(x, over_batch)
    gain, rstd = _gain_ref(var, weight, eps), torch.rsqrt(var + eps)
    z = _affine_ref(centered, gain, bias)
    dy, dz = _activation_bwd_ref(dy, second_dy, z, slopes, pad)
    mean, along = _mean_ref(dz, over_batch), _mean_ref(dz * centered, over_batch)
    dx = ((dz - mean) - centered * (along * rstd.square())) * gain
    pixels = x.numel() // max(1, mean.numel())
    dbias, dweight = ((t * pixels).flatten(1).sum(0) for t in (mean, along * rstd))
    return dx, dweight, dbias, dy


def _centered_ref(x, over_batch):
    """x - mean, mean and var in at least float32, in two passes."""
    x = x.to(_wide_dtype(x)).contiguous(memory_format=_format(x))
    mean = _mean_ref(x, over_batch)
    centered = x - mean
    return centered, mean, _mean_ref(centered.square(), over_batch)


def _mean_ref(x, over_batch):
    """Over the pixels, in the same bits in any batch: to a single sum threads would all add."""
    if over_batch:
        return x.mean((0, 2, 3), keepdim=True)
    if x.shape[:2] == (1, 1):
        return x.expand(2, -1, -1, -1).mean((2, 3), keepdim=True)[:1]
    return x.mean((2, 3), keepdim=True)


def _gain_ref(var, weight, eps):
    rstd = torch.rsqrt(var + eps)
    return rstd if weight is None else rstd * _per_channel(weight, rstd)


def _affine_ref(centered, gain, bias):
    z = centered * gain
    return z if bias is None else z + _per_channel(bias, z)


def _finished_ref(z, residual, slope, pad):
    """What follows the norm."""
    y = z if slope == 1 else F.leaky_relu(z, slope) if slope else F.relu(z)
    y = y if residual is None else y + residual.to(y.dtype)
    return F.pad(y, (pad,) * 4, mode="reflect") if pad else y


def _activation_bwd_ref(dy, second_dy, z, slopes, pad):
    """Gradients of what was added to the activations, and of z, in the memory format of z."""
    dys, dzs = [], []
    for part, slope in zip((dy, second_dy), slopes, strict=False):
        part = part.to(z.dtype)
        if pad:
            part = torch.ops.aten.reflection_pad2d_backward(part, z, (pad,) * 4)
        part = part.contiguous(memory_format=_format(z))
        dys.append(part)
        dzs.append(part if slope == 1 else _leaky_relu_backward(part, z, slope, False))
    return reduce(torch.add, dys), reduce(torch.add, dzs)


def _per_channel(vector, like):
    return vector.to(like.dtype).view(1, -1, 1, 1)


def _wide_dtype(x):
    return torch.promote_types(x.dtype, torch.float32)


def _format(x):
    """The memory format that is nearest to x's strides."""
    pixel = x.stride(3) if x.shape[3] > 1 else x.stride(2)
    last = x.shape[1] > 1 and x.shape[2] * x.shape[3] > 1 and 0 < x.stride(1) < pixel
    return torch.channels_last if last else torch.contiguous_format


# 2. Kernels ---------------------------------------------------------------------------------------
@triton.jit
def _place(channels, parts, BLOCK_C: tl.constexpr):
    """Group of images with one mean, part of its pixels, and channels of this program."""
    program, blocks = tl.program_id(0), (channels + BLOCK_C - 1) // BLOCK_C
    channel = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return program // blocks // parts, program // blocks % parts, channel


@triton.jit
def _image_of(position, group, pixels, BATCH: tl.constexpr):
    """Image, and pixel in it, of a position in a group: one image, or with BATCH all of them."""
    if BATCH:
        return (position // pixels).to(tl.int64), position % pixels
    else:
        return group.to(tl.int64), position


@triton.jit
def _offset(strides, image, pixel, channel):
    row = image * strides[0] + pixel.to(tl.int64) * strides[2]
    return row[None, :] + channel.to(tl.int64)[:, None] * strides[1]


@triton.jit
def _load(ptr, strides, image, pixel, channel, mask):
    offset = _offset(strides, image, pixel, channel)
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, strides, image, pixel, channel, mask, value):
    offset = _offset(strides, image, pixel, channel)
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _merged(mean, rest, m2, count, total):
    """Mean in two summands, and M2, of all columns: Chan's formula for many parts.

    Each column has a count, and a mean in two summands, too. A rough mean is taken off first, of
    few digits so that this rounds as little as can be; what is left is averaged.
    """
    rough = (tl.sum(mean * count, 1) / total).to(tl.bfloat16).to(tl.float32)
    off = tl.where(count > 0, (mean - rough[:, None]) + rest, 0.0)
    rest = tl.sum(off * count, 1) / total
    off = tl.where(count > 0, off - rest[:, None], 0.0)
    return rough, rest, tl.sum(m2 + count * off * off, 1)


@triton.jit
def _statistics(
    x_ptr, x_strides, group, channel, channels, first, last, pixels,
    BATCH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean in three summands, and M2, of positions first .. last - 1, by Welford in each lane.

    The first summand is the first value of the group, by channel: where means are large, what is
    taken off all values leaves them as they are told apart.
    """
    at = group.to(tl.int64) * x_strides[0] + channel.to(tl.int64) * x_strides[1]
    origin = tl.load(x_ptr + at, mask=channel < channels, other=0.0).to(tl.float32)
    mean = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    m2 = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    lane = tl.arange(0, BLOCK_P)
    step = 0.0
    for start in range(first, last, BLOCK_P):
        position = start + lane
        mask = (position < last)[None, :] & (channel < channels)[:, None]
        image, pixel = _image_of(position, group, pixels, BATCH)
        x = _load(x_ptr, x_strides, image, pixel, channel, mask) - origin[:, None]
        step += 1.0
        off = tl.where(mask, x - mean, 0.0)
        mean += off * (1.0 / step)
        m2 += off * (x - mean)
    count = tl.maximum(last - first - lane + BLOCK_P - 1, 0) // BLOCK_P
    count = count.to(tl.float32)[None, :]
    mean, rest, m2 = _merged(mean, tl.zeros_like(mean), m2, count, last - first)
    return origin, mean, rest, m2


@triton.jit
def _affine(mean, var, weight_ptr, bias_ptr, channel, channels, eps):
    """rstd, gain and bias of some channels: z = (x - mean) gain + bias."""
    rstd = 1.0 / tl.sqrt_rn(var + eps)
    gain = rstd
    bias = tl.zeros_like(rstd)
    if weight_ptr is not None:
        gain *= tl.load(weight_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    return rstd, gain, bias


@triton.jit
def _part_kernel(
    mean_ptr, rest_ptr, m2_ptr, origin_ptr, x_ptr, x_strides, channels, pixels, total, split, parts,
    BATCH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per part of a group and BLOCK_C channels: mean and M2 of x - origin, origin."""
    group, part, channel = _place(channels, parts, BLOCK_C)
    first = part * split + total * 0  # 64 bits only where the positions need them
    last = tl.minimum(first + split, total)
    origin, mean, rest, m2 = _statistics(
        x_ptr, x_strides, group, channel, channels, first, last, pixels, BATCH, BLOCK_P, BLOCK_C
    )
    at = (group * parts + part).to(tl.int64) * channels + channel
    tl.store(mean_ptr + at, mean, mask=channel < channels)
    tl.store(rest_ptr + at, rest, mask=channel < channels)
    tl.store(m2_ptr + at, m2, mask=channel < channels)
    tl.store(origin_ptr + at, origin, mask=channel < channels)


@triton.jit
def _places_of_parts(channels, parts, PARTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Parts of this group, their places and mask; place and mask of the group; first part."""
    group, _, channel = _place(channels, 1, BLOCK_C)
    part = tl.arange(0, PARTS)
    first = group.to(tl.int64) * parts * channels + channel
    at = first[:, None] + part[None, :] * channels
    inside = channel < channels
    mask = (part < parts)[None, :] & inside[:, None]
    return part, at, mask, group.to(tl.int64) * channels + channel, inside, first


@triton.jit
def _merge_kernel(
    mean_ptr, var_ptr, part_mean_ptr, part_rest_ptr, part_m2_ptr, origin_ptr,
    channels, total, split, parts, PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per group and BLOCK_C channels: mean and variance of all of its parts."""
    part, at, mask, group_at, inside, first = _places_of_parts(channels, parts, PARTS, BLOCK_C)
    mean = tl.load(part_mean_ptr + at, mask=mask, other=0.0)
    rest = tl.load(part_rest_ptr + at, mask=mask, other=0.0)
    m2 = tl.load(part_m2_ptr + at, mask=mask, other=0.0)
    origin = tl.load(origin_ptr + first, mask=inside, other=0.0)  # which all parts have
    count = tl.minimum(tl.maximum(total - part.to(tl.int64) * split, 0), split)
    mean, rest, m2 = _merged(mean, rest, m2, count.to(tl.float32)[None, :], total)
    tl.store(mean_ptr + group_at, (origin + mean) + rest, mask=inside)
    tl.store(var_ptr + group_at, m2 / total, mask=inside)


@triton.jit
def _bwd_merge_kernel(
    plain_ptr, along_ptr, part_plain_ptr, part_along_ptr, channels, parts,
    PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per group and BLOCK_C channels: the sums over all of its parts."""
    _, at, mask, group_at, inside, _ = _places_of_parts(channels, parts, PARTS, BLOCK_C)
    plain = tl.sum(tl.load(part_plain_ptr + at, mask=mask, other=0.0), 1)
    along = tl.sum(tl.load(part_along_ptr + at, mask=mask, other=0.0), 1)
    tl.store(plain_ptr + group_at, plain, mask=inside)
    tl.store(along_ptr + group_at, along, mask=inside)


@triton.jit
def _fwd_kernel(
    y_ptr, y_strides, second_ptr, second_strides, mean_ptr, var_ptr,
    x_ptr, x_strides, residual_ptr, residual_strides, weight_ptr, bias_ptr,
    eps, slopes, sizes, out_total, split, parts,
    WHOLE: tl.constexpr, BATCH: tl.constexpr, PAD: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per part of a group's pixels of y and BLOCK_C channels.

    WHOLE: the part is the group, and the statistics are taken here, too.
    """
    channels, height, width, pad, total = sizes
    group, part, channel = _place(channels, parts, BLOCK_C)
    inside = channel < channels
    at = group.to(tl.int64) * channels + channel
    if WHOLE:
        origin, mean, rest, m2 = _statistics(
            x_ptr, x_strides, group, channel, channels, 0, total, height * width,
            BATCH, BLOCK_P, BLOCK_C,
        )  # fmt: skip
        mean = (origin + mean) + rest
        var = m2 / total
        tl.store(mean_ptr + at, mean, mask=inside)
        tl.store(var_ptr + at, var, mask=inside)
    else:
        mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
        var = tl.load(var_ptr + at, mask=inside, other=0.0)
    _, gain, bias = _affine(mean, var, weight_ptr, bias_ptr, channel, channels, eps)

    first = part * split + out_total * 0
    for start in range(first, tl.minimum(first + split, out_total), BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)
        mask = (position < out_total)[None, :] & inside[:, None]
        out_width = width + 2 * pad
        image, out = _image_of(position, group, (height + 2 * pad) * out_width, BATCH)
        pixel = out
        if PAD:  # |i| mirrors at the first row or column, last - |last - i| at the last
            row = height - 1 - tl.abs(height - 1 - tl.abs(out // out_width - pad))
            column = width - 1 - tl.abs(width - 1 - tl.abs(out % out_width - pad))
            pixel = row * width + column
        x = _load(x_ptr, x_strides, image, pixel, channel, mask)
        z = (x - mean[:, None]) * gain[:, None] + bias[:, None]
        residual = 0.0  # a sum with 0 is never -0, which relu would be
        if residual_ptr is not None:
            residual = _load(residual_ptr, residual_strides, image, pixel, channel, mask)
        y = tl.where(z > 0, z, slopes[0] * z) + residual
        _store(y_ptr, y_strides, image, out, channel, mask, y)
        if second_ptr is not None:
            y = tl.where(z > 0, z, slopes[1] * z) + residual
            _store(second_ptr, second_strides, image, out, channel, mask, y)


@triton.jit
def _mirrored(i, size, pad, place):
    """Where in a padded line element i stands, of three places, and whether it stands there."""
    first, last = pad - i, pad + 2 * (size - 1) - i
    at = tl.where(place == 0, i + pad, tl.where(place == 1, first, last))
    # Its own image in the mirror at the line's end is the element itself, which counts once.
    there = (place == 0) | (at != i + pad)
    return at, there & (at >= 0) & (at < size + 2 * pad)


@triton.jit
def _unpadded(dy_ptr, dy_strides, image, pixel, channel, mask, sizes, PAD: tl.constexpr):
    """Gradient of what was padded: the sum of up to nine places, always in the same order.

    A loop, lest the compiler keeps the addresses of all places in registers.
    """
    _, height, width, pad, _ = sizes
    if PAD:
        row, column = pixel // width, pixel % width
        dy = tl.zeros(mask.shape, tl.float32)
        for place in range(9):
            y, in_y = _mirrored(row, height, pad, place // 3)
            x, in_x = _mirrored(column, width, pad, place % 3)
            there = mask & (in_y & in_x)[None, :]
            at = y * (width + 2 * pad) + x
            dy += _load(dy_ptr, dy_strides, image, at, channel, there)
        return dy
    else:
        return _load(dy_ptr, dy_strides, image, pixel, channel, mask)


@triton.jit
def _gradient(
    dy_ptr, dy_strides, second_ptr, second_strides, x_ptr, x_strides, mean, gain, bias, slopes,
    group, channel, position, sizes, BATCH: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """dz, x - mean, dy, image, pixel and mask of a block; dz and dy are 0 beyond it."""
    channels, height, width, _, total = sizes
    mask = (position < total)[None, :] & (channel < channels)[:, None]
    image, pixel = _image_of(position, group, height * width, BATCH)
    centered = _load(x_ptr, x_strides, image, pixel, channel, mask) - mean[:, None]
    z = centered * gain[:, None] + bias[:, None]
    dy = _unpadded(dy_ptr, dy_strides, image, pixel, channel, mask, sizes, PAD)
    dz = tl.where(z > 0, dy, slopes[0] * dy)
    if second_ptr is not None:
        second = _unpadded(second_ptr, second_strides, image, pixel, channel, mask, sizes, PAD)
        dy += second
        dz += tl.where(z > 0, second, slopes[1] * second)
    return dz, centered, dy, image, pixel, mask


@triton.jit
def _bwd_kernel(
    dx_ptr, dx_strides, dresidual_ptr, dresidual_strides, plain_ptr, along_ptr,
    dy_ptr, dy_strides, second_ptr, second_strides, x_ptr, x_strides, mean_ptr, var_ptr,
    weight_ptr, bias_ptr, eps, slopes, sizes, split, parts, SUMS: tl.constexpr,
    BATCH: tl.constexpr, PAD: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per part of a group and BLOCK_C channels.

    SUMS: those over the part, of dz and of dz (x - mean) rstd, are taken and written, not read.
    dx_ptr: then dx is made of them, of which a group has one each.
    """
    channels, total = sizes[0], sizes[4]
    group, part, channel = _place(channels, parts, BLOCK_C)
    inside = channel < channels
    at = group.to(tl.int64) * channels + channel
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
    var = tl.load(var_ptr + at, mask=inside, other=0.0)
    rstd, gain, bias = _affine(mean, var, weight_ptr, bias_ptr, channel, channels, eps)
    first = part * split + total * 0
    last = tl.minimum(first + split, total)
    if SUMS:
        plain = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        along = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        for start in range(first, last, BLOCK_P):
            dz, centered, _, _, _, _ = _gradient(
                dy_ptr, dy_strides, second_ptr, second_strides, x_ptr, x_strides, mean, gain, bias,
                slopes, group, channel, start + tl.arange(0, BLOCK_P), sizes, BATCH, PAD,
            )  # fmt: skip
            plain += dz
            along += dz * centered
        plain, along = tl.sum(plain, 1), tl.sum(along, 1) * rstd
        at = (group * parts + part).to(tl.int64) * channels + channel
        tl.store(plain_ptr + at, plain, mask=inside)
        tl.store(along_ptr + at, along, mask=inside)
    else:
        plain = tl.load(plain_ptr + at, mask=inside, other=0.0)
        along = tl.load(along_ptr + at, mask=inside, other=0.0)
    if dx_ptr is not None:
        plain = plain / total
        along = along * rstd / total
        for start in range(first, last, BLOCK_P):
            dz, centered, dy, image, pixel, mask = _gradient(
                dy_ptr, dy_strides, second_ptr, second_strides, x_ptr, x_strides, mean, gain, bias,
                slopes, group, channel, start + tl.arange(0, BLOCK_P), sizes, BATCH, PAD,
            )  # fmt: skip
            dx = (dz - plain[:, None] - centered * along[:, None]) * gain[:, None]
            _store(dx_ptr, dx_strides, image, pixel, channel, mask, dx)
            if dresidual_ptr is not None:
                _store(dresidual_ptr, dresidual_strides, image, pixel, channel, mask, dy)


# 3. Launchers -------------------------------------------------------------------------------------
def _launch_config(pixels, channels, channels_last):
    """Tiles and parts for so many pixels a mean; of the batch only where the mean is, too.

    Eight elements a thread leave registers for the offsets and sums of the backward. In
    channels_last tiles are 32 channels wide, whole sectors of memory in any dtype, and yet enough
    programs for one picture; else one channel wide, and sixteen elements a thread. Of channels
    that are no multiple of 8 each element has an address of its own: four a thread.
    Up to 1024 pixels one program takes them all, from the cache the second time; beyond that parts
    of 256 pixels or more let all multiprocessors at one picture.
    """
    if channels_last:
        tile = 1024 if channels % 8 else 2048
        block_c = min(32, triton.next_power_of_2(channels))
        block_p, warps = tile // block_c, 8
    else:
        block_c = 1
        block_p = min(2048, max(32, triton.next_power_of_2(pixels)))
        warps = max(1, block_p // 512)
    whole = pixels <= 1024
    least = pixels if whole else max(256, triton.cdiv(pixels, _MERGED["PARTS"]))
    split = block_p * triton.cdiv(least, block_p)
    return {
        "WHOLE": whole, "split": split, "BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": warps,
    }  # fmt: skip


def _launch_fwd(x, *args):
    y = _empty_padded(x, args[-2])
    return y, *_launch_inplace(y, None, x, *args)


def _launch_inplace(out, second, x, weight, bias, residual, eps, slopes, pad, over_batch):
    mean, var = _empty_statistics(x, over_batch)
    if x.numel() == 0:
        return mean.fill_(math.nan), var.fill_(math.nan)  # the mean of nothing, as in PyTorch
    x, residual = _addressable(x), _addressable(residual)
    y, twin = (t if _addressable(t) is t else _empty_padded(x, pad) for t in (out, second))
    groups, sizes, switches, config, (whole, split) = _grouped(x, pad, over_batch)
    channels, height, width, _, total = sizes
    out_total = total // (height * width) * (height + 2 * pad) * (width + 2 * pad)
    blocks = groups * triton.cdiv(channels, config["BLOCK_C"])
    if not whole:
        parts = triton.cdiv(total, split)
        part = mean.new_empty(4, groups, parts, channels)
        _part_kernel[(blocks * parts,)](
            *part, *with_strides(x), channels, height * width, total, split, parts,
            BATCH=switches["BATCH"], **config,
        )  # fmt: skip
        _merge_kernel[_merge_grid(groups, channels)](
            mean, var, *part, channels, total, split, parts, **_MERGED
        )
    split = out_total if whole else split
    parts = triton.cdiv(out_total, split)
    _fwd_kernel[(blocks * parts,)](
        *with_strides(y, twin), mean, var, *with_strides(x, residual), _dense(weight), _dense(bias),
        eps, (slopes[0], slopes[-1]), sizes, out_total, split, parts,
        WHOLE=whole, **switches, **config,
    )  # fmt: skip
    for given, written in ((out, y), (second, twin)):
        if written is not given:
            given.copy_(written)
    return mean, var


def _launch_bwd(dy, second_dy, x, mean, var, weight, bias, residual_dtype, *options):
    dx, sums, dresidual = _fake_bwd(
        dy, second_dy, x, mean, var, weight, bias, residual_dtype, *options
    )
    if x.numel() == 0:
        return dx, sums.zero_(), dresidual
    (eps, slopes, pad, over_batch), x = options, _addressable(x)
    groups, sizes, switches, config, (whole, split) = _grouped(x, pad, over_batch)
    channels, total = sizes[0], sizes[4]
    split = total if whole else split
    parts = triton.cdiv(total, split)
    grid = (groups * triton.cdiv(channels, config["BLOCK_C"]) * parts,)
    inputs = (
        *with_strides(_addressable(dy), _addressable(second_dy), x), mean, var,
        _dense(weight), _dense(bias), eps, (slopes[0], slopes[-1]), sizes, split, parts,
    )  # fmt: skip
    if not whole:
        part = sums.new_empty(2, groups, parts, channels)
        _bwd_kernel[grid](
            *with_strides(None, None), *part, *inputs, SUMS=True, **switches, **config
        )
        _bwd_merge_kernel[_merge_grid(groups, channels)](*sums, *part, channels, parts, **_MERGED)
    given = with_strides(dx, dresidual if dresidual.numel() else None)
    _bwd_kernel[grid](*given, *sums, *inputs, SUMS=whole, **switches, **config)
    return dx, sums, dresidual


def _grouped(x, pad, over_batch):
    """Groups of images with one mean; sizes, switches, configuration of their kernels; parts."""
    images, channels, height, width = x.shape
    groups, images = (1, images) if over_batch else (images, 1)
    total = images * height * width
    config = _launch_config(total, channels, _format(x) == torch.channels_last)
    parts = config.pop("WHOLE"), config.pop("split")
    switches = {"BATCH": images > 1, "PAD": pad > 0}
    config["enable_fp_fusion"] = True
    return groups, (channels, height, width, pad, total), switches, config, parts


def _merge_grid(groups, channels):
    return (groups * triton.cdiv(channels, _MERGED["BLOCK_C"]),)


def _addressable(t):
    """t itself where a kernel can address its pixels by one stride, else a copy."""
    if t is None or row_strides(t) is not None:
        return t
    return t.contiguous(memory_format=_format(t))


def _dense(vector):
    return None if vector is None else vector.contiguous()


# 4. Registration ----------------------------------------------------------------------------------
def _empty_padded(x, pad):
    n, c, h, w = x.shape
    shape = (n, c, h + 2 * pad, w + 2 * pad)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_format(x))


def _empty_statistics(x, over_batch):
    shape = x.shape[1:2] if over_batch else x.shape[:2]
    return tuple(x.new_empty(shape, dtype=_wide_dtype(x)) for _ in range(2))


def _fake_fwd(x, *args):
    return _empty_padded(x, args[-2]), *_empty_statistics(x, args[-1])


def _fake_inplace(out, second, x, *args):
    return _empty_statistics(x, args[-1])


def _cpu_fwd(x, *args):
    y = _empty_padded(x, args[-2])
    return y, *_cpu_inplace(y, None, x, *args)


def _cpu_inplace(out, second, x, weight, bias, residual, eps, slopes, pad, over_batch):
    """The reference in place, for as much at a time as stays in a core's cache."""
    mean, var = _empty_statistics(x, over_batch)
    shaped = [t.view(-1, x.shape[1], 1, 1) for t in (mean, var)]
    for at, (y, work, _) in _pieces(x, over_batch):
        w, b = (None if t is None else t[at[1]] for t in (weight, bias))
        added = None if residual is None else residual[at]
        into, part = out[at], _put(y, x[at])
        alike = into.dtype == y.dtype and into.is_contiguous(memory_format=_format(x))
        y = into if alike and not pad else y
        part_mean = _mean_ref(part, over_batch)
        torch.sub(part, part_mean, out=y)
        part_var = _mean_ref(torch.mul(y, y, out=work), over_batch)
        y.mul_(_gain_ref(part_var, w, eps))
        if b is not None:
            y.add_(_per_channel(b, y))
        if second is not None:
            second[at].copy_(_finished_ref(y, added, slopes[1], pad))
        if slopes[0] != 1:
            _ = F.leaky_relu_(y, slopes[0]) if slopes[0] else F.relu_(y)
        if added is not None:
            y.add_(added)
        if y is not into:
            into.copy_(F.pad(y, (pad,) * 4, mode="reflect") if pad else y)
        for statistic, value in zip(shaped, (part_mean, part_var), strict=True):
            statistic[at] = value
    return mean, var


def _pieces(x, over_batch):
    """Samples and channels of pieces of about half a megabyte, which have means of their own.

    With them come three tensors to work in, the same ones again where they fit: memory that is
    new costs more than what is done in it.
    """
    (rows, channels), everything, format = x.shape[:2], slice(None), _format(x)
    sample = max(1, x[:1].numel())
    if over_batch:
        places = [(everything, everything)]
    elif sample > _PIECE and format == torch.contiguous_format:
        step = max(1, _PIECE * channels // sample)
        parts = [slice(i, i + step) for i in range(0, channels, step)]
        places = [(slice(i, i + 1), part) for i in range(rows) for part in parts]
    else:
        step = max(1, _PIECE // sample)
        places = [(slice(i, i + step), everything) for i in range(0, rows, step)]
    work: list[Tensor] = []
    for at in places:
        if not work or work[0].shape != x[at].shape:
            new = partial(torch.empty_like, x[at], dtype=_wide_dtype(x), memory_format=format)
            work = [new() for _ in range(3)]
        yield at, work


def _put(work, part):
    """part as work is: itself where it is, else in work."""
    format = _format(work)
    alike = part.dtype == work.dtype and part.is_contiguous(memory_format=format)
    return part if alike else work.copy_(part)


def _fake_bwd(dy, second_dy, x, mean, var, weight, bias, residual_dtype, *options):
    pad, over_batch = options[-2:]
    sums = mean.new_empty(2, 1 if over_batch else x.shape[0], x.shape[1])
    made = residual_dtype is not None and _is_made(second_dy, pad)
    dresidual = _empty_padded(x, 0).to(residual_dtype) if made else x.new_empty(0)
    return _empty_padded(x, 0), sums, dresidual


def _is_made(second_dy, pad):
    """Whether the gradient of the residual has to be made: it is not dy as it came."""
    return pad > 0 or second_dy is not None


def _cpu_bwd(dy, second_dy, x, mean, var, weight, bias, residual_dtype, *options):
    """The reference in place, for a few samples at a time, and with the statistics at hand."""
    dx, sums, dresidual = _fake_bwd(
        dy, second_dy, x, mean, var, weight, bias, residual_dtype, *options
    )
    eps, slopes, pad, over_batch = options
    mean, var = (t.view(-1, x.shape[1], 1, 1) for t in (mean, var))
    pixels = x.shape[2] * x.shape[3] * (x.shape[0] if over_batch else 1)
    for at, (centered, work, wide) in _pieces(x, over_batch):
        w, b = (None if t is None else t[at[1]] for t in (weight, bias))
        gain, rstd = _gain_ref(var[at], w, eps), torch.rsqrt(var[at] + eps)
        torch.sub(_put(centered, x[at]), mean[at], out=centered)
        z = centered  # which alone has the sign of what follows a norm
        if any(slope != 1 for slope in slopes) and not (w is b is None):
            z = torch.mul(centered, gain, out=work)
            if b is not None:
                z.add_(_per_channel(b, z))
        if _is_made(second_dy, pad):
            second = None if second_dy is None else second_dy[at]
            part_dy, dz = _activation_bwd_ref(dy[at], second, z, slopes, pad)
        else:
            dz = _put(wide, dy[at])
            if slopes[0] != 1:
                _leaky_relu_backward.grad_input(dz, z, slopes[0], False, grad_input=wide)
                dz = wide
        plain = _mean_ref(dz, over_batch)
        along = _mean_ref(torch.mul(dz, centered, out=work), over_batch)
        centered.mul_(along * rstd.square())
        into = dx[at] if dx.dtype == work.dtype else work
        torch.mul(torch.sub(dz, plain, out=work).sub_(centered), gain, out=into)
        if into is work:
            dx[at] = work
        sums[(0, *at)] = (plain * pixels).flatten(1)
        sums[(1, *at)] = (along * rstd * pixels).flatten(1)
        if dresidual.numel():
            dresidual[at] = part_dy
    return dx, sums, dresidual


_fwd = define_op(
    "instance_norm_act_fwd",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, float[] slopes, "
    "int pad, bool over_batch) -> (Tensor, Tensor, Tensor)",
    cuda=_launch_fwd,
    cpu=_cpu_fwd,
    fake=_fake_fwd,
)

_bwd = define_op(
    "instance_norm_act_bwd",
    "(Tensor dy, Tensor? second_dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, "
    "Tensor? bias, ScalarType? residual_dtype, float eps, float[] slopes, int pad, "
    "bool over_batch) "
    "-> (Tensor, Tensor, Tensor)",
    cuda=_launch_bwd,
    cpu=_cpu_bwd,
    fake=_fake_bwd,
)

_inplace = define_op(
    "instance_norm_act_",
    "(Tensor(a!) out, Tensor(b!)? second, Tensor x, Tensor? weight, Tensor? bias, "
    "Tensor? residual, float eps, float[] slopes, int pad, bool over_batch) -> (Tensor, Tensor)",
    cuda=_launch_inplace,
    cpu=_cpu_inplace,
    fake=_fake_inplace,
)


# 5. Public functions ------------------------------------------------------------------------------
class _InstanceNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, second, *args):
        if out is None:
            out, mean, var = _fwd(*args)
        else:  # To autograd they are new: views of a tensor must not be written one after another.
            mean, var = _inplace(out, second, *args)
            out, second = out.detach(), None if second is None else second.detach()
        x, weight, bias, residual, *ctx.options = args
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias, residual)]
        ctx.mark_non_differentiable(mean, var)
        return out, second, mean, var

    @staticmethod
    def backward(ctx, dy, second_dy, *_):
        x, weight, bias, mean, var = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:6]
        if torch.is_grad_enabled():  # create_graph=True
            gradients = instance_norm_act_bwd_ref(dy, second_dy, x, weight, bias, *ctx.options)
        else:
            dtype = ctx.dtypes[3] if wanted[3] else None
            dx, sums, made = _bwd(
                dy, second_dy, x, mean, var, weight, bias, dtype, *ctx.options
            )  # fmt: skip
            dbias, dweight = sums.sum(1)
            gradients = dx, dweight, dbias, made if _is_made(second_dy, ctx.options[2]) else dy
        cast = (
            gradient.to(dtype) if needed else None
            for gradient, dtype, needed in zip(gradients, ctx.dtypes, wanted, strict=True)
        )
        return None, None, *cast, *(None for _ in ctx.options)


def instance_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    slope: float = 0.2,
    residual: Tensor | None = None,
    pad: int = 0,
    over_batch: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Instance norm or the batch norm of training, activation, residual, reflection padding.

        y = pad(act((x - mean) / sqrt(var + eps) * weight + bias) + residual)

    What is usual between two convolutions of an image network, in one read and one write after the
    statistics, in the memory format that convolutions like best.

    Args:
        x: (N, C, H, W); N may be 0.
        weight, bias: (C,) or None.
        eps: added to the variance.
        activation: None, "relu" or "leaky_relu": z where z > 0, else slope z.
        slope: of "leaky_relu".
        residual: like x, added after the activation.
        pad: so many rows and columns on each side repeat y mirrored, as
            `torch.nn.functional.pad(mode="reflect")` does; less than H and W. A convolution with
            reflection padding then needs no pass of its own for it.
        over_batch: mean and variance over (N, H, W), as batch norm in training takes them, not over
            (H, W). In evaluation batch norm is affine, and best made part of the convolution.
        return_stats: return (y, mean, var) instead of y.

    Returns:
        y (N, C, H + 2 pad, W + 2 pad) in x's dtype, channels_last where x is, else contiguous.
        Differentiable in x, weight, bias and residual. mean, var: (N, C), or (C,) over the batch,
        float32 (float64 for float64 x), without gradients. var is biased; the running variance of
        `torch.nn.BatchNorm2d` takes var * n / (n - 1) with n = N H W.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name; a mean over one value.

    Example:
        >>> x = torch.tensor([[[[1.0, 3.0]]]])
        >>> instance_norm_act(x, eps=0.0, activation="leaky_relu")
        tensor([[[[-0.2000,  1.0000]]]])
    """
    given = (x, weight, bias, residual)
    args = *given, *_options(*given, eps, (activation,), slope, pad, over_batch)
    if using_reference():
        y, mean, var = instance_norm_act_ref(*args)
        mean, var = mean.detach(), var.detach()
    elif needs_function(*given):
        y, _, mean, var = _InstanceNormAct.apply(None, None, *args)
    else:
        y, mean, var = _fwd(*args)
    return (y, mean, var) if return_stats else y


def instance_norm_act_(
    out: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    slope: float = 0.2,
    second: Tensor | None = None,
    second_activation: str | None = None,
    residual: Tensor | None = None,
    pad: int = 0,
    over_batch: bool = False,
) -> tuple[Tensor, ...]:
    """`instance_norm_act` written into given tensors, as a rule some channels of larger ones.

    Two tensors that a skip connection joins are made in the halves of one buffer: no `torch.cat`.
    What goes both through the skip and on, each with an activation of its own, is made in one pass.

    Args:
        out: (N, C, H + 2 pad, W + 2 pad) in x's dtype, any strides.
        second: None, or like out: where the same with second_activation is written.
        others: as in `instance_norm_act`.

    None of out and second may share memory with another argument.

    Returns:
        (out, mean, var), or (out, second, mean, var): what was written, differentiable in x,
        weight, bias and residual; the tensors that were given stay without a gradient. mean, var:
        as `instance_norm_act` returns them with return_stats.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name; nothing is written then.

    Example:
        >>> x, skip = torch.randn(1, 2, 4, 4), torch.empty(1, 6, 4, 4)
        >>> y, mean, var = instance_norm_act_(skip[:, 2:4], x, activation="relu")
        >>> bool((skip[:, 2:4] == instance_norm_act(x, activation="relu")).all())
        True
    """
    activations = (activation,) if second is None else (activation, second_activation)
    given, written = (x, weight, bias, residual), (out,) if second is None else (out, second)
    if second is None and second_activation is not None:
        raise ValueError(f"second must be given with a second_activation, {second_activation!r}")
    args = *given, *_options(*given, eps, activations, slope, pad, over_batch)
    n, c, h, w = x.shape
    for name, tensor in zip(("out", "second"), written, strict=False):
        check_float(**{name: tensor})
        check_shape(name, tensor, (n, c, h + 2 * pad, w + 2 * pad))
        check_same_device(x=x, **{name: tensor})
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype} as x is, got {tensor.dtype}")
        check_writable(**{name: tensor})
        check_no_grad("it is written: what stood there has no gradient", **{name: tensor})
    if second is out:
        raise ValueError("second must not be the same tensor as out: both are written")
    if using_reference():
        *ys, mean, var = instance_norm_act_ref(*args)
        for tensor, y in zip(written, ys, strict=True):
            tensor.copy_(y.detach())
        return *ys, mean.detach(), var.detach()
    if needs_function(*given):
        out, _, mean, var = results = _InstanceNormAct.apply(out, second, *args)
        return (out, mean, var) if second is None else results
    return *written, *_inplace(out, second, *args)


def _options(x, weight, bias, residual, eps, activations, slope, pad, over_batch):
    """Numbers of the op, activations as their slopes; raises where an argument does not fit."""
    for name, activation in zip(("activation", "second_activation"), activations, strict=False):
        if activation not in ACTIVATIONS:
            names = "None, 'relu' or 'leaky_relu'"
            raise ValueError(f"{name} must be {names}, got {activation!r}")
    for name, value, least in (("eps", eps, 0), ("slope", slope, -math.inf)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not least <= value < math.inf or value == -math.inf:
            words = "that is not negative" if least == 0 else "that is finite"
            raise ValueError(f"{name} must be a number {words}, got {value!r}")
    check_float(x=x)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must have shape (N, C, H, W), got {tuple(x.shape)}")
    n, c, h, w = x.shape
    if isinstance(pad, bool) or not isinstance(pad, int) or pad < 0 or pad >= h or pad >= w:
        raise ValueError(f"pad must be an int from 0 to less than H = {h} and W = {w}, got {pad!r}")
    if h * w * (n if over_batch else 1) == 1:
        raise ValueError(f"x must have more than one value for each mean, got {tuple(x.shape)}")
    for name, tensor, shape in (
        ("weight", weight, (c,)), ("bias", bias, (c,)), ("residual", residual, tuple(x.shape)),
    ):  # fmt: skip
        if tensor is not None:
            check_float(**{name: tensor})
            check_shape(name, tensor, shape)
            check_same_device(x=x, **{name: tensor})
    slopes = {None: 1.0, "relu": 0.0, "leaky_relu": float(slope)}
    return float(eps), [slopes[a] for a in activations], pad, bool(over_batch)
