"""The kernels of `guided_step`: the step, also in place, and its gradient."""

from cgkernels._triton import tl, triton
from cgkernels.device import (
    STREAM_SAMPLER,
    block_of_row,
    element_of,
    load_row,
    normal_of,
    store_row,
)

# The columns of the table, in the order of `TABLE_COLUMNS`.
A0, A1, B0, B1, B2, B3, B4, B5, CLIP_MIN, CLIP_MAX, LOG_VAR_MIN, LOG_VAR_MAX = map(
    tl.constexpr, range(12)
)


@triton.jit
def _column(table_ptr, step, steps, COLUMN: tl.constexpr):
    """A coefficient; NaN for a step outside the table, which must not look like a result."""
    inside = (step >= 0) & (step < steps)
    return tl.load(table_ptr + step * 12 + COLUMN, mask=inside, other=float("nan"))


@triton.jit
def _fwd_kernel(
    out_ptr, out_strides, twin_ptr, twin_strides, x0_ptr, x0_strides,
    x_ptr, x_strides, cond_ptr, cond_strides, uncond_ptr, uncond_strides,
    log_variance_ptr, log_variance_strides, h1_ptr, h1_strides, h2_ptr, h2_strides,
    table_ptr, step_ptr, step_stride, scale_ptr, scale_stride, seed_ptr, index_ptr,
    steps, numel, channels, pixels, blocks,
    SHIFT: tl.constexpr, CHANNELS_LAST: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK elements of one row: everything read once, then written."""
    row, first, position, mask = block_of_row(blocks, numel, BLOCK)
    element = element_of(position, channels, pixels, CHANNELS_LAST)
    step = tl.load(step_ptr + row * step_stride)

    x = load_row(x_ptr, x_strides, row, position, element, pixels, mask, DENSE)
    e = load_row(cond_ptr, cond_strides, row, position, element, pixels, mask, DENSE)
    if uncond_ptr is not None:
        u = load_row(uncond_ptr, uncond_strides, row, position, element, pixels, mask, DENSE)
        e = u + tl.load(scale_ptr + row * scale_stride) * (e - u)
    x0 = _column(table_ptr, step, steps, A0) * x + _column(table_ptr, step, steps, A1) * e
    clip_min = _column(table_ptr, step, steps, CLIP_MIN)
    clip_max = _column(table_ptr, step, steps, CLIP_MAX)
    x0 = tl.maximum(x0, clip_min, propagate_nan=tl.PropagateNan.ALL)
    x0 = tl.minimum(x0, clip_max, propagate_nan=tl.PropagateNan.ALL)
    out = _column(table_ptr, step, steps, B0) * x + _column(table_ptr, step, steps, B1) * x0
    out += _column(table_ptr, step, steps, B4) * e
    if h1_ptr is not None:
        h1 = load_row(h1_ptr, h1_strides, row, position, element, pixels, mask, DENSE)
        out += _column(table_ptr, step, steps, B2) * h1
    if h2_ptr is not None:
        h2 = load_row(h2_ptr, h2_strides, row, position, element, pixels, mask, DENSE)
        out += _column(table_ptr, step, steps, B3) * h2
    if seed_ptr is not None:
        seed, index = tl.load(seed_ptr), tl.load(index_ptr + row)
        z = normal_of(seed, index, step, first, element, STREAM_SAMPLER, CHANNELS_LAST, BLOCK)
        if log_variance_ptr is not None:
            v = load_row(
                log_variance_ptr, log_variance_strides, row, position, element, pixels, mask, DENSE
            )
            lo = _column(table_ptr, step, steps, LOG_VAR_MIN)
            hi = _column(table_ptr, step, steps, LOG_VAR_MAX)
            z *= tl.exp(0.5 * (lo + (v + 1) * 0.5 * (hi - lo)))
        out += _column(table_ptr, step, steps, B5) * z

    if SHIFT:
        # x0 goes where h1 was read: no thread may write there before all have read.
        tl.debug_barrier()
        if h2_ptr is not None:
            store_row(h2_ptr, h2_strides, h1, row, position, element, pixels, mask, DENSE)
    store_row(out_ptr, out_strides, out, row, position, element, pixels, mask, DENSE)
    if twin_ptr is not None:
        store_row(twin_ptr, twin_strides, out, row, position, element, pixels, mask, DENSE)
    if x0_ptr is not None:
        store_row(x0_ptr, x0_strides, x0, row, position, element, pixels, mask, DENSE)


@triton.jit
def _bwd_kernel(
    dx_ptr, dx_strides, dcond_ptr, dcond_strides, duncond_ptr, duncond_strides,
    dh1_ptr, dh1_strides, dh2_ptr, dh2_strides, dout_ptr, dout_strides, dx0_ptr, dx0_strides,
    x_ptr, x_strides, cond_ptr, cond_strides, uncond_ptr, uncond_strides,
    table_ptr, step_ptr, step_stride, scale_ptr, scale_stride,
    steps, numel, channels, pixels, blocks,
    CHANNELS_LAST: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK elements of one row; x0 again, to know where it was clipped."""
    row, _, position, mask = block_of_row(blocks, numel, BLOCK)
    element = element_of(position, channels, pixels, CHANNELS_LAST)
    step = tl.load(step_ptr + row * step_stride)
    a0, a1 = _column(table_ptr, step, steps, A0), _column(table_ptr, step, steps, A1)

    x = load_row(x_ptr, x_strides, row, position, element, pixels, mask, DENSE)
    e = load_row(cond_ptr, cond_strides, row, position, element, pixels, mask, DENSE)
    if uncond_ptr is not None:
        scale = tl.load(scale_ptr + row * scale_stride)
        u = load_row(uncond_ptr, uncond_strides, row, position, element, pixels, mask, DENSE)
        e = u + scale * (e - u)
    x0 = a0 * x + a1 * e
    dout = load_row(dout_ptr, dout_strides, row, position, element, pixels, mask, DENSE)
    dx0 = _column(table_ptr, step, steps, B1) * dout
    if dx0_ptr is not None:
        dx0 += load_row(dx0_ptr, dx0_strides, row, position, element, pixels, mask, DENSE)
    clip_min = _column(table_ptr, step, steps, CLIP_MIN)
    clip_max = _column(table_ptr, step, steps, CLIP_MAX)
    dx0 = tl.where((x0 < clip_min) | (x0 > clip_max), 0.0, dx0)  # where x0 is NaN, all of it
    dx = _column(table_ptr, step, steps, B0) * dout + a0 * dx0
    de = _column(table_ptr, step, steps, B4) * dout + a1 * dx0

    store_row(dx_ptr, dx_strides, dx, row, position, element, pixels, mask, DENSE)
    if uncond_ptr is not None:
        du = (1 - scale) * de
        store_row(duncond_ptr, duncond_strides, du, row, position, element, pixels, mask, DENSE)
        de = scale * de
    store_row(dcond_ptr, dcond_strides, de, row, position, element, pixels, mask, DENSE)
    if dh1_ptr is not None:
        dh1 = _column(table_ptr, step, steps, B2) * dout
        store_row(dh1_ptr, dh1_strides, dh1, row, position, element, pixels, mask, DENSE)
    if dh2_ptr is not None:
        dh2 = _column(table_ptr, step, steps, B3) * dout
        store_row(dh2_ptr, dh2_strides, dh2, row, position, element, pixels, mask, DENSE)
