"""Affine coupling layer of a flow, and the logarithm of its determinant: y' = s y + t.

    log s = limit tanh(raw / limit),   (raw, t) = params          additive: s = 1, params = t
    forward: y' = s y + t,   logdet = sum of log s      inverse: y' = (y - t) / s,   logdet = -sum

Only the elements of a mask are transformed; the others are copied in the same pass. first and last:
the channels before C // 2, and those from there on. even and odd: the squares of a checkerboard,
where h + w is even or odd, in all channels. Whether an element is in the mask is computed from its
position; nothing is gathered.

Shapes   y, y': (B, C, *spatial), for even and odd (B, C, H, W); params (B, 2 N, *spatial), of the N
         channels that the mask touches first all raw, then all t (additive: (B, N, *spatial));
         values of params outside a checkerboard's mask are ignored; logdet (B,).
Dtypes   float32, float16, bfloat16 (float64 on CPU), y and params mixed as they come; float32
         inside; y' has y's dtype, logdet is float32. The order of its sum depends on the event's
         size and memory format alone.
Backward in y, params: once by kernel, twice by differentiating affine_coupling_bwd_ref.
Source   coupling: NICE arXiv:1410.8516 (additive), RealNVP arXiv:1605.08803 (affine, both kinds of
         masks, a bounded log s by tanh).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cgkernels._triton import tl, triton
from cgkernels.checks import (
    SMALLEST,
    check_choice,
    check_flag,
    check_float,
    check_number,
    check_same_device,
    check_shape,
)
from cgkernels.device import (
    block_of_row,
    element_of,
    exp_of,
    is_last_program,
    load_parts,
    load_row,
    row_offset,
    store_row,
    tanh,
)
from cgkernels.library import define_op, needs_function, using_reference, without_autocast
from cgkernels.rows import (
    Layout,
    compute_dtype,
    empty_rows,
    in_strides_of,
    row_block,
    row_launch,
    row_layout,
    with_row_strides,
    with_strides,
)

MASKS = ("first", "last", "even", "odd")


# 1. Reference -------------------------------------------------------------------------------------
@without_autocast
def affine_coupling_ref(
    y: Tensor, params: Tensor, mask: str, limit: float, additive: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(y, params)
    inner = _masked_channels(y, mask).to(dtype)
    log_scale, shift = _log_scale_and_shift(params.to(dtype), limit, additive)
    if log_scale is None:
        out = inner - shift if inverse else inner + shift
        logdet = y.new_zeros(y.shape[0], dtype=dtype)
    else:
        log_scale = _zero_outside(log_scale, mask)
        out = (inner - shift) * (-log_scale).exp() if inverse else inner * log_scale.exp() + shift
        logdet = log_scale.flatten(1).sum(1)
    return _merge_outside(out.to(y.dtype), y, mask), -logdet if inverse else logdet


@without_autocast
def affine_coupling_bwd_ref(
    dout: Tensor, dlogdet: Tensor, y: Tensor, params: Tensor,
    mask: str, limit: float, additive: bool, inverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = compute_dtype(y, params)
    dinner = _zero_outside(_masked_channels(dout, mask).to(dtype), mask)
    log_scale, shift = _log_scale_and_shift(params.to(dtype), limit, additive)
    if log_scale is None:
        dy, dparams = dinner, -dinner if inverse else dinner
    else:
        per_row = (-1,) + (1,) * (y.dim() - 1)
        log_scale, inner = _zero_outside(log_scale, mask), _masked_channels(y, mask).to(dtype)
        if inverse:
            dy = dinner * (-log_scale).exp()
            dshift = -dy
            dlog_scale = dy * (shift - inner) - dlogdet.view(per_row)
        else:
            dy, dshift = dinner * log_scale.exp(), dinner
            dlog_scale = dy * inner + dlogdet.view(per_row)
        draw = _zero_outside(dlog_scale * (1 - (log_scale / limit).square()), mask)
        dparams = torch.cat([draw, dshift], 1)
    return _merge_outside(dy.to(y.dtype), dout.to(y.dtype), mask), dparams.to(params.dtype)


def _channel_range(channels: int, mask: str) -> tuple[int, int]:
    """The channels that a mask touches, as (start, stop)."""
    half = channels // 2
    return {"first": (0, half), "last": (half, channels)}.get(mask, (0, channels))


def _masked_channels(y: Tensor, mask: str) -> Tensor:
    """The channels that a mask touches."""
    start, stop = _channel_range(y.shape[1], mask)
    return y[:, start:stop]


def _log_scale_and_shift(
    params: Tensor, limit: float, additive: bool
) -> tuple[Tensor | None, Tensor]:
    if additive:
        return None, params
    raw, shift = params.chunk(2, 1)
    return limit * (raw / limit).tanh(), shift


def _checkerboard(like: Tensor, mask: str) -> Tensor:
    """(H, W) bool: where a checkerboard is transformed."""
    height, width = like.shape[2:]
    rows, columns = (torch.arange(n, device=like.device) for n in (height, width))
    return (rows[:, None] + columns) % 2 == MASKS.index(mask) - 2


def _zero_outside(values: Tensor, mask: str) -> Tensor:
    """Values of the channels that a mask touches, 0 where it does not."""
    if mask in ("first", "last"):
        return values
    return torch.where(_checkerboard(values, mask), values, 0)


def _merge_outside(inner: Tensor, others: Tensor, mask: str) -> Tensor:
    """The transformed values where the mask is, and the others' elsewhere."""
    start, stop = _channel_range(others.shape[1], mask)
    if mask == "first":
        return torch.cat([inner, others[:, stop:]], 1)
    if mask == "last":
        return torch.cat([others[:, :start], inner], 1)
    return torch.where(_checkerboard(others, mask), inner, others)


# 2. Kernels ---------------------------------------------------------------------------------------
@triton.jit
def _mask_of(  # type: ignore[no-untyped-def]
    element, first, lane, inside, start, stop, height, width,
    MASK: tl.constexpr, EVEN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """What of a block is transformed, and which of its params are read.

    Params of a checkerboard are read whole, so that accesses are wide. EVEN: so is the height, and
    the parity of a pixel row is that of its number among the rows of all channels.
    """
    if MASK >= 2:
        pixel_row = element // width
        column = element - pixel_row * width
        if not EVEN:
            pixel_row = pixel_row % height
        transformed = inside & ((pixel_row + column) % 2 == MASK - 2)
        read = inside
    elif CHANNELS_LAST:
        transformed = inside & (element >= start) & (element < stop)
        read = transformed
    else:  # compared with the lane, so that the compiler sees whole vectors in or out
        transformed = inside & (lane >= start - first) & (lane < stop - first)
        read = transformed
    return transformed, read


@triton.jit
def _shifts(params_ptr, strides, half):  # type: ignore[no-untyped-def]
    """Where t begins in params."""
    return params_ptr + tl.full((), half, tl.int64) * strides[1]


@triton.jit
def _exp(x, y_ptr):  # type: ignore[no-untyped-def]
    """e^x for y: what is rounded to a half type needs no more than the GPU's own."""
    if y_ptr.dtype.element_ty == tl.float32:
        return exp_of(x)
    else:
        return tl.exp(x)


@triton.jit
def _fwd_kernel(  # type: ignore[no-untyped-def]
    out_ptr, out_strides, y_ptr, y_strides, params_ptr, params_strides, logdet_ptr, partial_ptr,
    count_ptr, limit, start, stop, half, height, width, numel, channels, pixels, blocks, extent,
    MASK: tl.constexpr, EVEN: tl.constexpr, ADDITIVE: tl.constexpr, INVERSE: tl.constexpr,
    PARAMS_DENSE: tl.constexpr, CHANNELS_LAST: tl.constexpr, DENSE: tl.constexpr,
    SPLIT: tl.constexpr, MERGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per SPLIT elements of one row; the last of a row adds up the sums in order."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    begin = (program % blocks + extent * 0) * SPLIT  # 64 bits only where positions need them
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(begin, tl.minimum(begin + SPLIT, numel), BLOCK):
        position, inside = first + lane, lane < numel - first
        element = element_of(position, channels, pixels, CHANNELS_LAST)
        out = load_row(y_ptr, y_strides, row, position, element, pixels, inside, DENSE)
        # A block of channels that stay needs no arithmetic.
        if MASK >= 2 or CHANNELS_LAST or ((first < stop) & (first + BLOCK > start)):
            transformed, read = _mask_of(
                element, first, lane, inside, start, stop, height, width, MASK, EVEN,
                CHANNELS_LAST,
            )  # fmt: skip
            inner = element - start
            offset = row_offset(params_strides, row, inner, inner, pixels, PARAMS_DENSE)
            shift_ptr = _shifts(params_ptr, params_strides, half)
            shift = tl.load(shift_ptr + offset, mask=read, other=0.0).to(tl.float32)
            if ADDITIVE:
                moved = out - shift if INVERSE else out + shift
            else:
                raw = tl.load(params_ptr + offset, mask=read, other=0.0).to(tl.float32)
                log_scale = limit * tanh(raw * (1.0 / limit), EXACT=True)
                total += tl.where(transformed, log_scale, 0.0)
                if INVERSE:
                    moved = (out - shift) * _exp(-log_scale, y_ptr)
                else:
                    moved = out * _exp(log_scale, y_ptr) + shift
            out = tl.where(transformed, moved, out)
        store_row(out_ptr, out_strides, out, row, position, element, pixels, inside, DENSE)

    logdet = tl.sum(total, 0)
    if INVERSE:
        logdet = -logdet
    if count_ptr is None:
        tl.store(logdet_ptr + row, logdet, mask=program % blocks == 0)
    else:
        tl.store(partial_ptr + program, logdet)
        if is_last_program(count_ptr + row, blocks):
            sums = load_parts(partial_ptr + row * blocks, tl.arange(0, MERGE), blocks)
            tl.store(logdet_ptr + row, tl.sum(sums, 0))


@triton.jit
def _bwd_kernel(  # type: ignore[no-untyped-def]
    dy_ptr, dy_strides, dout_ptr, dout_strides, y_ptr, y_strides,
    dparams_ptr, dparams_strides, params_ptr, params_strides, dlogdet_ptr,
    limit, start, stop, half, height, width, numel, channels, pixels, blocks,
    MASK: tl.constexpr, EVEN: tl.constexpr, ADDITIVE: tl.constexpr, INVERSE: tl.constexpr,
    PARAMS_DENSE: tl.constexpr, CHANNELS_LAST: tl.constexpr, DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK elements of one row."""
    row, first, position, inside = block_of_row(blocks, numel, BLOCK)
    element = element_of(position, channels, pixels, CHANNELS_LAST)
    dout = load_row(dout_ptr, dout_strides, row, position, element, pixels, inside, DENSE)
    dy = dout
    if MASK >= 2 or CHANNELS_LAST or ((first < stop) & (first + BLOCK > start)):
        transformed, read = _mask_of(
            element, first, tl.arange(0, BLOCK), inside, start, stop, height, width, MASK,
            EVEN, CHANNELS_LAST,
        )  # fmt: skip
        inner = element - start
        dshift = tl.where(transformed, -dout if INVERSE and ADDITIVE else dout, 0.0)
        doffset = row_offset(dparams_strides, row, inner, inner, pixels, PARAMS_DENSE)
        if not ADDITIVE:
            offset = row_offset(params_strides, row, inner, inner, pixels, PARAMS_DENSE)
            raw = tl.load(params_ptr + offset, mask=read, other=0.0).to(tl.float32)
            bounded = tanh(raw * (1.0 / limit), EXACT=True)
            y = load_row(y_ptr, y_strides, row, position, element, pixels, inside, DENSE)
            dlogdet = tl.load(dlogdet_ptr + row).to(tl.float32)
            if INVERSE:
                shift_ptr = _shifts(params_ptr, params_strides, half)
                shift = tl.load(shift_ptr + offset, mask=read, other=0.0).to(tl.float32)
                dmoved = dout * _exp(-limit * bounded, y_ptr)
                dshift = tl.where(transformed, -dmoved, 0.0)
                dlog_scale = dmoved * (shift - y) - dlogdet
            else:
                dmoved = dout * _exp(limit * bounded, y_ptr)
                dlog_scale = dmoved * y + dlogdet
            dy = tl.where(transformed, dmoved, dout)
            draw = tl.where(transformed, dlog_scale * (1.0 - bounded * bounded), 0.0)
            tl.store(dparams_ptr + doffset, draw.to(dparams_ptr.dtype.element_ty), mask=read)
        dshift_ptr = _shifts(dparams_ptr, dparams_strides, half)
        tl.store(dshift_ptr + doffset, dshift.to(dparams_ptr.dtype.element_ty), mask=read)
    store_row(dy_ptr, dy_strides, dy, row, position, element, pixels, inside, DENSE)


# 3. Launchers -------------------------------------------------------------------------------------
def _launch_config(numel: int, dense: bool) -> dict[str, Any]:
    """Four blocks or more a program: each ends in an atomic that waits for its stores.

    Rows of one program need neither partial sums nor a count that is zeroed first; of long rows at
    most 1024 programs, so that one load merges them.
    """
    config = row_block(numel, dense)
    blocks = max(4, triton.cdiv(numel, 1024 * config["BLOCK"]))
    return {"SPLIT": blocks * config["BLOCK"], **config}


def _launch_fwd(
    y: Tensor, params: Tensor, mask: str, limit: float, additive: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    out, logdet = _fake_fwd(y, params, mask, limit, additive, inverse)
    if out.numel() == 0:
        return out, logdet.zero_()
    tensors, params = (out, with_row_strides(y)), with_row_strides(params)
    layout = row_layout(*tensors)
    params_dense = _params_dense(layout, params)
    config = _launch_config(layout.numel, layout.dense and params_dense)
    blocks = triton.cdiv(layout.numel, config["SPLIT"])
    rows, partial, count = y.shape[0], None, None
    if blocks > 1 and not additive:
        partial = torch.empty(rows * blocks, dtype=torch.float32, device=y.device)
        count = torch.zeros(rows, dtype=torch.int32, device=y.device)
    numbers, switches = _mask_arguments(y, mask, limit, additive)
    _fwd_kernel[(rows * blocks,)](
        *with_strides(*tensors, params), logdet, partial, count,
        *numbers, layout.numel, layout.channels, layout.pixels, blocks, blocks * config["SPLIT"],
        **switches, INVERSE=inverse, CHANNELS_LAST=layout.channels_last, DENSE=layout.dense,
        PARAMS_DENSE=params_dense, MERGE=triton.next_power_of_2(blocks),
        enable_fp_fusion=True, **config,
    )  # fmt: skip
    return out, logdet


def _launch_bwd(
    dout: Tensor, dlogdet: Tensor, y: Tensor, params: Tensor,
    mask: str, limit: float, additive: bool, inverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dy, dparams = _fake_bwd(dout, dlogdet, y, params, mask, limit, additive, inverse)
    if dy.numel() == 0:
        return dy, dparams
    tensors = (dy, with_row_strides(dout), with_row_strides(y))
    grid, arguments = row_launch(*tensors)
    params = with_row_strides(params)
    layout = row_layout(*tensors)
    numbers, switches = _mask_arguments(y, mask, limit, additive)
    _bwd_kernel[grid](
        *with_strides(*tensors, dparams, params), dlogdet.contiguous(),
        *numbers, **switches, INVERSE=inverse,
        PARAMS_DENSE=_params_dense(layout, dparams, params), **arguments,
    )  # fmt: skip
    return dy, dparams


def _mask_arguments(
    y: Tensor, mask: str, limit: float, additive: bool
) -> tuple[tuple[float, ...], dict[str, Any]]:
    """What kernels are told of a mask: numbers, and switches."""
    start, stop = _channel_range(y.shape[1], mask)
    pixels = math.prod(y.shape[2:])
    half = 0 if additive else stop - start  # channels of params before t
    height, width = y.shape[2:] if mask in ("even", "odd") else (1, 1)
    numbers = limit, start * pixels, stop * pixels, half, height, width
    return numbers, {"MASK": MASKS.index(mask), "EVEN": height % 2 == 0, "ADDITIVE": additive}


def _params_dense(layout: Layout, *params: Tensor) -> bool:
    """Whether params can be addressed by the position in y, without channel and pixel."""
    return not layout.channels_last and all(
        found.dense and not found.channels_last for found in map(row_layout, params)
    )


# 4. Registration ----------------------------------------------------------------------------------
def _fake_fwd(
    y: Tensor, params: Tensor, mask: str, limit: float, additive: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    return empty_rows(y), y.new_empty(y.shape[0], dtype=compute_dtype(y, params))


def _cpu_fwd(
    y: Tensor, params: Tensor, mask: str, limit: float, additive: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    out, logdet = affine_coupling_ref(y, params, mask, limit, additive, inverse)
    return in_strides_of(y, out), logdet


def _fake_bwd(
    dout: Tensor, dlogdet: Tensor, y: Tensor, params: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    return empty_rows(y), empty_rows(params)


def _cpu_bwd(
    dout: Tensor, dlogdet: Tensor, y: Tensor, params: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    dy, dparams = affine_coupling_bwd_ref(dout, dlogdet, y, params, *options)
    return in_strides_of(y, dy), in_strides_of(params, dparams)


_fwd = define_op(
    "affine_coupling_fwd",
    "(Tensor y, Tensor params, str mask, float limit, bool additive, bool inverse) "
    "-> (Tensor, Tensor)",
    cuda=_launch_fwd,
    cpu=_cpu_fwd,
    fake=_fake_fwd,
)

_bwd = define_op(
    "affine_coupling_bwd",
    "(Tensor dout, Tensor dlogdet, Tensor y, Tensor params, str mask, float limit, bool additive, "
    "bool inverse) -> (Tensor, Tensor)",
    cuda=_launch_bwd,
    cpu=_cpu_bwd,
    fake=_fake_bwd,
)


# 5. Public function -------------------------------------------------------------------------------
class _AffineCoupling(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        y, params, *ctx.options = inputs
        ctx.save_for_backward(y, params)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlogdet: Tensor) -> tuple[Tensor | None, ...]:
        # Grad mode in a backward means create_graph=True.
        run: Callable[..., tuple] = affine_coupling_bwd_ref if torch.is_grad_enabled() else _bwd
        return *run(dout, dlogdet, *ctx.saved_tensors, *ctx.options), None, None, None, None


def affine_coupling(
    y: Tensor,
    params: Tensor,
    *,
    mask: str,
    limit: float = 2.0,
    additive: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One affine coupling y' = s y + t where the mask is, and log |det dy'/dy| of each sample.

    log s = limit tanh(raw / limit). The network that made params must not have seen what the mask
    touches; then the same call with inverse=True, on y' and the same params, gives y back.

    Args:
        y: (B, C, *spatial), any strides.
        params: (B, 2 N, *spatial), any strides: raw of the N channels that the mask touches, then t
            of them; additive (B, N, *spatial), t alone.
        mask: what is transformed. "first": channels 0 .. C // 2 - 1; "last": the others, C at least
            2; "even", "odd": pixels with h + w even or odd, all C channels, y (B, C, H, W).
        limit: bound of |log s|, at most 80.
        additive: s = 1.
        inverse: y' = (y - t) / s.

    Returns:
        (y', logdet): y' like y; logdet (B,) float32 (float64 for float64 inputs), of the map that
        was applied, so that of the inverse is the negative. Differentiable in y and params.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.

    Example:
        >>> y, params = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 5.0]])
        >>> affine_coupling(y, params, mask="last")
        (tensor([[1., 8.]]), tensor([0.]))
    """
    check_choice("mask", mask, MASKS)
    check_number("limit", limit, SMALLEST, 80)  # e^80 is a float32
    check_flag(additive=additive, inverse=inverse)
    check_float(y=y, params=params)
    if mask in ("first", "last"):
        if y.dim() < 2 or y.shape[1] < 2:
            raise ValueError(
                f"y must have shape (B, C, ...) with C of at least 2 for mask {mask!r}, "
                f"got {tuple(y.shape)}"
            )
    elif y.dim() != 4:
        raise ValueError(f"y must have shape (B, C, H, W) for {mask!r}, got {tuple(y.shape)}")
    start, stop = _channel_range(y.shape[1], mask)
    count = (stop - start) * (1 if additive else 2)
    check_shape("params", params, (y.shape[0], count, *y.shape[2:]))
    check_same_device(y=y, params=params)
    args = (y, params, mask, float(limit), additive, inverse)
    if using_reference():
        return affine_coupling_ref(*args)
    run: Callable[..., tuple[Tensor, Tensor]]
    run = _AffineCoupling.apply if needs_function(y, params) else _fwd
    return run(*args)
