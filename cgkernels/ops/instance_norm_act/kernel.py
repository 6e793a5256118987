"""The kernels of `instance_norm_act`.

A group is what has one mean: the pixels of an image, or with BATCH those of all images. Parts of
a group are taken by programs of their own. Blocks are [BLOCK_C, BLOCK_P]: channels, positions.
"""

from cgkernels._triton import tl, triton
from cgkernels.device import merged_moments


@triton.jit
def _group_part_channel(channels, parts, BLOCK_C: tl.constexpr):
    """Group, part of it and channels of this program."""
    program, blocks = tl.program_id(0), (channels + BLOCK_C - 1) // BLOCK_C
    channel = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return program // blocks // parts, program // blocks % parts, channel


@triton.jit
def _image_and_pixel(position, group, pixels, BATCH: tl.constexpr):
    """Image, and pixel in it, of a position in a group."""
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


# Statistics ---------------------------------------------------------------------------------------
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
        image, pixel = _image_and_pixel(position, group, pixels, BATCH)
        x = _load(x_ptr, x_strides, image, pixel, channel, mask) - origin[:, None]
        step += 1.0
        off = tl.where(mask, x - mean, 0.0)
        mean += off * (1.0 / step)
        m2 += off * (x - mean)
    count = tl.maximum(last - first - lane + BLOCK_P - 1, 0) // BLOCK_P
    count = count.to(tl.float32)[None, :]
    mean, rest, m2 = merged_moments(mean, tl.zeros_like(mean), m2, count, last - first)
    return origin, mean, rest, m2


@triton.jit
def _part_kernel(
    mean_ptr, rest_ptr, m2_ptr, origin_ptr, x_ptr, x_strides, channels, pixels, total, split, parts,
    extent, BATCH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per part of a group and BLOCK_C channels: mean and M2 of x - origin, origin."""
    group, part, channel = _group_part_channel(channels, parts, BLOCK_C)
    first = (part + extent * 0) * split  # 64 bits only where the positions need them
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
def _rstd_gain_bias(mean, var, weight_ptr, bias_ptr, channel, channels, eps):
    """Of some channels: z = (x - mean) gain + bias."""
    rstd = 1.0 / tl.sqrt_rn(var + eps)
    gain = rstd
    bias = tl.zeros_like(rstd)
    if weight_ptr is not None:
        gain *= tl.load(weight_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    return rstd, gain, bias


# Forward ------------------------------------------------------------------------------------------
@triton.jit
def _fwd_kernel(
    y_ptr, y_strides, second_ptr, second_strides, mean_ptr, var_ptr,
    x_ptr, x_strides, residual_ptr, residual_strides, weight_ptr, bias_ptr,
    eps, slopes, sizes, out_total, split, parts, extent,
    WHOLE: tl.constexpr, BATCH: tl.constexpr, PAD: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per part of a group's pixels of y and BLOCK_C channels.

    WHOLE: the part is the group, and the statistics are taken here, too.
    """
    channels, height, width, pad, total = sizes
    group, part, channel = _group_part_channel(channels, parts, BLOCK_C)
    channel_mask = channel < channels
    at = group.to(tl.int64) * channels + channel
    if WHOLE:
        origin, mean, rest, m2 = _statistics(
            x_ptr, x_strides, group, channel, channels, 0, total, height * width,
            BATCH, BLOCK_P, BLOCK_C,
        )  # fmt: skip
        mean = (origin + mean) + rest
        var = m2 / total
        tl.store(mean_ptr + at, mean, mask=channel_mask)
        tl.store(var_ptr + at, var, mask=channel_mask)
    else:
        mean = tl.load(mean_ptr + at, mask=channel_mask, other=0.0)
        var = tl.load(var_ptr + at, mask=channel_mask, other=0.0)
    _, gain, bias = _rstd_gain_bias(mean, var, weight_ptr, bias_ptr, channel, channels, eps)

    first = (part + extent * 0) * split
    for start in range(first, tl.minimum(first + split, out_total), BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)
        mask = (position < out_total)[None, :] & channel_mask[:, None]
        out_width = width + 2 * pad
        image, out = _image_and_pixel(position, group, (height + 2 * pad) * out_width, BATCH)
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


# Backward -----------------------------------------------------------------------------------------
@triton.jit
def _padded_position(i, size, pad, copy):
    """Where copy 0, 1 or 2 of element i is in a padded row or column, and whether there is one.

    0 is the element itself, 1 and 2 what it is at the mirrors of the first and the last element.
    """
    first, last = pad - i, pad + 2 * (size - 1) - i
    at = tl.where(copy == 0, i + pad, tl.where(copy == 1, first, last))
    # Its own image in the mirror at the end is the element itself, which counts once.
    exists = (copy == 0) | (at != i + pad)
    return at, exists & (at >= 0) & (at < size + 2 * pad)


@triton.jit
def _padding_bwd(dy_ptr, dy_strides, image, pixel, channel, mask, sizes, PAD: tl.constexpr):
    """Gradient of what was padded: the sum over up to nine copies, always in the same order.

    A loop, lest the compiler keeps the addresses of all copies in registers.
    """
    _, height, width, pad, _ = sizes
    if PAD:
        row, column = pixel // width, pixel % width
        dy = tl.zeros(mask.shape, tl.float32)
        for copy in range(9):
            y, y_exists = _padded_position(row, height, pad, copy // 3)
            x, x_exists = _padded_position(column, width, pad, copy % 3)
            copy_mask = mask & (y_exists & x_exists)[None, :]
            at = y * (width + 2 * pad) + x
            dy += _load(dy_ptr, dy_strides, image, at, channel, copy_mask)
        return dy
    else:
        return _load(dy_ptr, dy_strides, image, pixel, channel, mask)


@triton.jit
def _dz_of_block(
    dy_ptr, dy_strides, second_ptr, second_strides, x_ptr, x_strides, mean, gain, bias, slopes,
    group, channel, position, sizes, BATCH: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """dz, x - mean, dy, image, pixel and mask of a block; dz and dy are 0 beyond it."""
    channels, height, width, _, total = sizes
    mask = (position < total)[None, :] & (channel < channels)[:, None]
    image, pixel = _image_and_pixel(position, group, height * width, BATCH)
    centered = _load(x_ptr, x_strides, image, pixel, channel, mask) - mean[:, None]
    z = centered * gain[:, None] + bias[:, None]
    dy = _padding_bwd(dy_ptr, dy_strides, image, pixel, channel, mask, sizes, PAD)
    dz = tl.where(z > 0, dy, slopes[0] * dy)
    if second_ptr is not None:
        second = _padding_bwd(second_ptr, second_strides, image, pixel, channel, mask, sizes, PAD)
        dy += second
        dz += tl.where(z > 0, second, slopes[1] * second)
    return dz, centered, dy, image, pixel, mask


@triton.jit
def _bwd_kernel(
    dx_ptr, dx_strides, dresidual_ptr, dresidual_strides, dz_sum_ptr, projection_ptr,
    dy_ptr, dy_strides, second_ptr, second_strides, x_ptr, x_strides, mean_ptr, var_ptr,
    weight_ptr, bias_ptr, eps, slopes, sizes, split, parts, extent, SUMS: tl.constexpr,
    BATCH: tl.constexpr, PAD: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per part of a group and BLOCK_C channels.

    SUMS: those over the part, of dz and of dz (x - mean) rstd, are taken and written, not read.
    dx_ptr: then dx is made of them, of which a group has one each.
    """
    channels, total = sizes[0], sizes[4]
    group, part, channel = _group_part_channel(channels, parts, BLOCK_C)
    channel_mask = channel < channels
    at = group.to(tl.int64) * channels + channel
    mean = tl.load(mean_ptr + at, mask=channel_mask, other=0.0)
    var = tl.load(var_ptr + at, mask=channel_mask, other=0.0)
    rstd, gain, bias = _rstd_gain_bias(mean, var, weight_ptr, bias_ptr, channel, channels, eps)
    first = (part + extent * 0) * split
    last = tl.minimum(first + split, total)
    if SUMS:
        dz_sum = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        projection = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        for start in range(first, last, BLOCK_P):
            dz, centered, _, _, _, _ = _dz_of_block(
                dy_ptr, dy_strides, second_ptr, second_strides, x_ptr, x_strides, mean, gain, bias,
                slopes, group, channel, start + tl.arange(0, BLOCK_P), sizes, BATCH, PAD,
            )  # fmt: skip
            dz_sum += dz
            projection += dz * centered
        dz_sum, projection = tl.sum(dz_sum, 1), tl.sum(projection, 1) * rstd
        at = (group * parts + part).to(tl.int64) * channels + channel
        tl.store(dz_sum_ptr + at, dz_sum, mask=channel_mask)
        tl.store(projection_ptr + at, projection, mask=channel_mask)
    else:
        dz_sum = tl.load(dz_sum_ptr + at, mask=channel_mask, other=0.0)
        projection = tl.load(projection_ptr + at, mask=channel_mask, other=0.0)
    if dx_ptr is not None:
        dz_mean = dz_sum / total
        projection = projection * rstd / total
        for start in range(first, last, BLOCK_P):
            dz, centered, dy, image, pixel, mask = _dz_of_block(
                dy_ptr, dy_strides, second_ptr, second_strides, x_ptr, x_strides, mean, gain, bias,
                slopes, group, channel, start + tl.arange(0, BLOCK_P), sizes, BATCH, PAD,
            )  # fmt: skip
            dx = (dz - dz_mean[:, None] - centered * projection[:, None]) * gain[:, None]
            _store(dx_ptr, dx_strides, image, pixel, channel, mask, dx)
            if dresidual_ptr is not None:
                _store(dresidual_ptr, dresidual_strides, image, pixel, channel, mask, dy)


@triton.jit
def _bwd_merge_kernel(
    dz_sum_ptr, projection_ptr, part_dz_sum_ptr, part_projection_ptr, channels, parts,
    PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per group and BLOCK_C channels: the sums over all of its parts."""
    group, _, channel = _group_part_channel(channels, 1, BLOCK_C)
    group = group.to(tl.int64)
    part = tl.arange(0, PARTS)
    at = (group * parts * channels + channel)[:, None] + part[None, :] * channels
    channel_mask = channel < channels
    mask = (part < parts)[None, :] & channel_mask[:, None]
    dz_sum = tl.sum(tl.load(part_dz_sum_ptr + at, mask=mask, other=0.0), 1)
    projection = tl.sum(tl.load(part_projection_ptr + at, mask=mask, other=0.0), 1)
    at = group * channels + channel
    tl.store(dz_sum_ptr + at, dz_sum, mask=channel_mask)
    tl.store(projection_ptr + at, projection, mask=channel_mask)
