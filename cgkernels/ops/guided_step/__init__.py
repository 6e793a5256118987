"""One sampler step with guidance, as one affine form, in one pass over memory.

    e  = u + s (c - u)                                   c, u: conditional, unconditional output
    x0 = clamp(a0 x + a1 e, clip_min, clip_max)
    x' = b0 x + b1 x0 + b2 h1 + b3 h2 + b4 e + b5 std z
    std = 1, or exp((lo + (v + 1) / 2 (hi - lo)) / 2)    v: learned variance, lo, hi log-variances

DDPM, DDIM, Euler, Euler ancestral, DPM-Solver++ and others are rows of coefficients of this form.

Shapes   x, c, u, v, h1, h2, x', x0: (B, *event); table (S, 12); step, s: (B,).
Dtypes   each float32, float16 or bfloat16 (float64 on CPU), mixed as they come; float32 inside;
         x' and x0 have x's dtype.
Backward in x, c, u, h1, h2: once by kernel, twice by differentiating guided_step_bwd_ref.
Source   DDPM arXiv:2006.11239, DDIM arXiv:2010.02502, learned variance arXiv:2102.09672,
         classifier-free guidance arXiv:2207.12598, DPM-Solver++ arXiv:2211.01095.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cgkernels import random
from cgkernels._triton import tl, triton
from cgkernels.checks import (
    as_index,
    as_row_values,
    as_seed,
    as_step,
    check_float,
    check_no_grad,
    check_noise_size,
    check_rows,
    check_same_device,
    check_shape,
    check_table,
    readable,
)
from cgkernels.device import block_of_row, element_of, normal_of, row_offset
from cgkernels.library import (
    define_op,
    needs_function,
    refuse_forward_mode,
    using_reference,
)
from cgkernels.rows import (
    empty_rows,
    in_strides_of,
    row_launch,
    row_strides,
    with_row_strides,
    with_strides,
)

TABLE_COLUMNS = (
    "a0", "a1", "b0", "b1", "b2", "b3", "b4", "b5",
    "clip_min", "clip_max", "log_var_min", "log_var_max",
)  # fmt: skip


# 1. Reference -------------------------------------------------------------------------------------
def guided_step_ref(
    x, cond, uncond, table, step, scale, log_variance=None, h1=None, h2=None, seed=None, index=None
):
    wide, columns, scale = _wide_ref(x, table, step, scale)
    b0, b1, b2, b3, b4, b5 = columns[2:8]
    clip_min, clip_max, log_var_min, log_var_max = columns[8:]
    e, x0 = _prediction_ref(wide, x, cond, uncond, columns, scale)
    x0 = torch.minimum(torch.maximum(x0, clip_min), clip_max)
    out = b0 * wide(x) + b1 * x0 + b4 * e
    if h1 is not None:
        out = out + b2 * wide(h1)
    if h2 is not None:
        out = out + b3 * wide(h2)
    if seed is not None:
        z = random.normal(
            tuple(x.shape), seed=seed, index=index, step=step, stream=random.STREAM_SAMPLER,
            dtype=out.dtype,
        )  # fmt: skip
        if log_variance is not None:
            fraction = (wide(log_variance) + 1) / 2
            z = z * (0.5 * (log_var_min + fraction * (log_var_max - log_var_min))).exp()
        out = out + b5 * z
    return out.to(x.dtype), x0.to(x.dtype)


def guided_step_bwd_ref(dout, dx0, x, cond, uncond, table, step, scale, h1=None, h2=None):
    """Gradients with respect to x, cond, uncond, h1, h2; dx0 is None where x0 was not returned."""
    wide, columns, scale = _wide_ref(x, table, step, scale)
    a0, a1, b0, b1, b2, b3, b4 = columns[:7]
    clip_min, clip_max = columns[8:10]
    dout = wide(dout)
    _, x0 = _prediction_ref(wide, x, cond, uncond, columns, scale)
    inside = (x0 >= clip_min) & (x0 <= clip_max)
    dx0 = b1 * dout if dx0 is None else b1 * dout + wide(dx0)
    dx0 = torch.where(inside, dx0, torch.zeros_like(dx0))
    de = b4 * dout + a1 * dx0
    return (
        (b0 * dout + a0 * dx0).to(x.dtype),
        (de if uncond is None else scale * de).to(cond.dtype),
        None if uncond is None else ((1 - scale) * de).to(uncond.dtype),
        None if h1 is None else (b2 * dout).to(h1.dtype),
        None if h2 is None else (b3 * dout).to(h2.dtype),
    )


def _wide_ref(x, table, step, scale):
    """The cast to the dtype of the computation, the columns of each row's step, and the scale."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    per_row = (-1,) + (1,) * (x.dim() - 1)
    columns = [column.view(per_row) for column in table[step].to(dtype).unbind(1)]
    return (lambda t: t.to(dtype)), columns, scale.to(dtype).view(per_row)


def _prediction_ref(wide, x, cond, uncond, columns, scale):
    """e, and x0 before it is clipped."""
    e = wide(cond) if uncond is None else wide(uncond) + scale * (wide(cond) - wide(uncond))
    return e, columns[0] * wide(x) + columns[1] * e


# 2. Kernels ---------------------------------------------------------------------------------------
@triton.jit
def _column(table_ptr, step, steps, COLUMN: tl.constexpr):
    """A coefficient; NaN for a step outside the table, which must not look like a result."""
    inside = (step >= 0) & (step < steps)
    return tl.load(table_ptr + step * 12 + COLUMN, mask=inside, other=float("nan"))


@triton.jit
def _load(ptr, strides, row, position, element, pixels, mask, DENSE: tl.constexpr):
    offset = row_offset(strides, row, position, element, pixels, DENSE)
    return tl.load(ptr + offset, mask=mask).to(tl.float32)


@triton.jit
def _store(ptr, strides, value, row, position, element, pixels, mask, DENSE: tl.constexpr):
    offset = row_offset(strides, row, position, element, pixels, DENSE)
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask=mask)


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

    x = _load(x_ptr, x_strides, row, position, element, pixels, mask, DENSE)
    e = _load(cond_ptr, cond_strides, row, position, element, pixels, mask, DENSE)
    if uncond_ptr is not None:
        u = _load(uncond_ptr, uncond_strides, row, position, element, pixels, mask, DENSE)
        e = u + tl.load(scale_ptr + row * scale_stride) * (e - u)
    x0 = _column(table_ptr, step, steps, 0) * x + _column(table_ptr, step, steps, 1) * e
    clip_min = _column(table_ptr, step, steps, 8)
    clip_max = _column(table_ptr, step, steps, 9)
    x0 = tl.where(x0 < clip_min, clip_min, x0)  # unlike clamp, this keeps NaN
    x0 = tl.where(x0 > clip_max, clip_max, x0)
    out = _column(table_ptr, step, steps, 2) * x + _column(table_ptr, step, steps, 3) * x0
    out += _column(table_ptr, step, steps, 6) * e
    if h1_ptr is not None:
        h1 = _load(h1_ptr, h1_strides, row, position, element, pixels, mask, DENSE)
        out += _column(table_ptr, step, steps, 4) * h1
    if h2_ptr is not None:
        h2 = _load(h2_ptr, h2_strides, row, position, element, pixels, mask, DENSE)
        out += _column(table_ptr, step, steps, 5) * h2
    if seed_ptr is not None:
        seed, index = tl.load(seed_ptr), tl.load(index_ptr + row)
        z = normal_of(seed, index, step, first, element, 1, CHANNELS_LAST, BLOCK)
        if log_variance_ptr is not None:
            v = _load(
                log_variance_ptr, log_variance_strides, row, position, element, pixels, mask, DENSE
            )
            lo, hi = _column(table_ptr, step, steps, 10), _column(table_ptr, step, steps, 11)
            z *= tl.exp(0.5 * (lo + (v + 1) * 0.5 * (hi - lo)))
        out += _column(table_ptr, step, steps, 7) * z

    if SHIFT:
        # x0 goes where h1 was read: no thread may write there before all have read.
        tl.debug_barrier()
        if h2_ptr is not None:
            _store(h2_ptr, h2_strides, h1, row, position, element, pixels, mask, DENSE)
    _store(out_ptr, out_strides, out, row, position, element, pixels, mask, DENSE)
    if twin_ptr is not None:
        _store(twin_ptr, twin_strides, out, row, position, element, pixels, mask, DENSE)
    if x0_ptr is not None:
        _store(x0_ptr, x0_strides, x0, row, position, element, pixels, mask, DENSE)


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
    a0, a1 = _column(table_ptr, step, steps, 0), _column(table_ptr, step, steps, 1)

    x = _load(x_ptr, x_strides, row, position, element, pixels, mask, DENSE)
    e = _load(cond_ptr, cond_strides, row, position, element, pixels, mask, DENSE)
    if uncond_ptr is not None:
        scale = tl.load(scale_ptr + row * scale_stride)
        u = _load(uncond_ptr, uncond_strides, row, position, element, pixels, mask, DENSE)
        e = u + scale * (e - u)
    x0 = a0 * x + a1 * e
    dout = _load(dout_ptr, dout_strides, row, position, element, pixels, mask, DENSE)
    dx0 = _column(table_ptr, step, steps, 3) * dout
    if dx0_ptr is not None:
        dx0 += _load(dx0_ptr, dx0_strides, row, position, element, pixels, mask, DENSE)
    clip_min = _column(table_ptr, step, steps, 8)
    clip_max = _column(table_ptr, step, steps, 9)
    dx0 = tl.where((x0 >= clip_min) & (x0 <= clip_max), dx0, 0.0)
    dx = _column(table_ptr, step, steps, 2) * dout + a0 * dx0
    de = _column(table_ptr, step, steps, 6) * dout + a1 * dx0

    _store(dx_ptr, dx_strides, dx, row, position, element, pixels, mask, DENSE)
    if uncond_ptr is not None:
        du = (1 - scale) * de
        _store(duncond_ptr, duncond_strides, du, row, position, element, pixels, mask, DENSE)
        de = scale * de
    _store(dcond_ptr, dcond_strides, de, row, position, element, pixels, mask, DENSE)
    if dh1_ptr is not None:
        dh1 = _column(table_ptr, step, steps, 4) * dout
        _store(dh1_ptr, dh1_strides, dh1, row, position, element, pixels, mask, DENSE)
    if dh2_ptr is not None:
        dh2 = _column(table_ptr, step, steps, 5) * dout
        _store(dh2_ptr, dh2_strides, dh2, row, position, element, pixels, mask, DENSE)


# 3. Launchers -------------------------------------------------------------------------------------
def _launch_fwd(
    x, cond, uncond, table, step, scale, log_variance, h1, h2, seed, index, return_x0
):  # fmt: skip
    out, x0 = _fake_fwd(
        x, cond, uncond, table, step, scale, log_variance, h1, h2, seed, index, return_x0
    )
    _launch_step(
        out, None, x0 if return_x0 else None, x, cond, uncond, table, step, scale, log_variance,
        h1, h2, seed, index,
    )  # fmt: skip
    return out, x0


def _launch_inplace(
    x, cond, uncond, table, step, scale, log_variance, h1, h2, seed, index, twin
):  # fmt: skip
    written = [t for t in (x, h1, h2, twin) if t is not None]
    if any(row_strides(t) is None for t in written):  # a kernel cannot address these: copy back
        copies = [None if t is None else t.contiguous() for t in (x, h1, h2, twin)]
        new_x, new_h1, new_h2, new_twin = copies
        _launch_inplace(
            new_x, cond, uncond, table, step, scale, log_variance, new_h1, new_h2, seed, index,
            new_twin,
        )  # fmt: skip
        for tensor, copy in zip((x, h1, h2, twin), copies, strict=True):
            if tensor is not None:
                tensor.copy_(copy)
        return
    _launch_step(
        x, twin, h1, x, cond, uncond, table, step, scale, log_variance, h1, h2, seed, index,
        shift=True,
    )  # fmt: skip


def _launch_step(
    out, twin, x0, x, cond, uncond, table, step, scale, log_variance, h1, h2, seed, index,
    shift=False,
):  # fmt: skip
    if x.numel() == 0:
        return
    x, cond, uncond, log_variance, h1, h2 = map(
        with_row_strides, (x, cond, uncond, log_variance, h1, h2)
    )
    tensors = (out, twin, x0, x, cond, uncond, log_variance, h1, h2)
    grid, arguments = row_launch(*tensors)
    _fwd_kernel[grid](
        *with_strides(*tensors),
        table.contiguous(), step, step.stride(0), scale, scale.stride(0), seed,
        None if index is None else index.contiguous(), table.shape[0], SHIFT=shift, **arguments,
    )  # fmt: skip


def _launch_bwd(dout, dx0, x, cond, uncond, table, step, scale, h1, h2):
    gradients = _fake_bwd(dout, dx0, x, cond, uncond, table, step, scale, h1, h2)
    if x.numel() == 0:
        return gradients
    wanted = (True, True, uncond is not None, h1 is not None, h2 is not None)
    inputs = map(with_row_strides, (dout, dx0, x, cond, uncond))
    tensors = (*(g if w else None for g, w in zip(gradients, wanted, strict=True)), *inputs)
    grid, arguments = row_launch(*tensors)
    _bwd_kernel[grid](
        *with_strides(*tensors),
        table.contiguous(), step, step.stride(0), scale, scale.stride(0), table.shape[0],
        **arguments,
    )  # fmt: skip
    return gradients


# 4. Registration ----------------------------------------------------------------------------------
def _fake_fwd(
    x, cond, uncond, table, step, scale, log_variance, h1, h2, seed, index, return_x0
):  # fmt: skip
    return empty_rows(x), empty_rows(x) if return_x0 else x.new_empty(0)


def _cpu_fwd(
    x, cond, uncond, table, step, scale, log_variance, h1, h2, seed, index, return_x0
):  # fmt: skip
    out, x0 = guided_step_ref(
        x, cond, uncond, table, step, scale, log_variance, h1, h2, seed, index
    )
    return in_strides_of(x, out), in_strides_of(x, x0) if return_x0 else x.new_empty(0)


def _cpu_inplace(x, cond, uncond, table, step, scale, log_variance, h1, h2, seed, index, twin):
    out, x0 = guided_step_ref(
        x, cond, uncond, table, step, scale, log_variance, h1, h2, seed, index
    )
    if h2 is not None:
        h2.copy_(h1)
    for tensor, value in ((h1, x0), (x, out), (twin, out)):
        if tensor is not None:
            tensor.copy_(value)


def _fake_bwd(dout, dx0, x, cond, uncond, table, step, scale, h1, h2):
    return tuple(x.new_empty(0) if t is None else empty_rows(t) for t in (x, cond, uncond, h1, h2))


def _cpu_bwd(dout, dx0, x, cond, uncond, table, step, scale, h1, h2):
    gradients = guided_step_bwd_ref(dout, dx0, x, cond, uncond, table, step, scale, h1, h2)
    return tuple(
        x.new_empty(0) if t is None else in_strides_of(t, g)
        for t, g in zip((x, cond, uncond, h1, h2), gradients, strict=True)
    )


_fwd = define_op(
    "guided_step_fwd",
    "(Tensor x, Tensor cond, Tensor? uncond, Tensor table, Tensor step, Tensor scale, "
    "Tensor? log_variance, Tensor? h1, Tensor? h2, Tensor? seed, Tensor? index, bool return_x0) "
    "-> (Tensor, Tensor)",
    cuda=_launch_fwd,
    cpu=_cpu_fwd,
    fake=_fake_fwd,
)

_bwd = define_op(
    "guided_step_bwd",
    "(Tensor dout, Tensor? dx0, Tensor x, Tensor cond, Tensor? uncond, Tensor table, Tensor step, "
    "Tensor scale, Tensor? h1, Tensor? h2) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cuda=_launch_bwd,
    cpu=_cpu_bwd,
    fake=_fake_bwd,
)

_inplace = define_op(
    "guided_step_",
    "(Tensor(a!) x, Tensor cond, Tensor? uncond, Tensor table, Tensor step, Tensor scale, "
    "Tensor? log_variance, Tensor(b!)? h1, Tensor(c!)? h2, Tensor? seed, Tensor? index, "
    "Tensor(d!)? twin) -> ()",
    cuda=_launch_inplace,
    cpu=_cpu_inplace,
    fake=lambda *args: None,
)


# 5. Public functions ------------------------------------------------------------------------------
class _GuidedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cond, uncond, table, step, scale, log_variance, h1, h2, *rest):
        out, x0 = _fwd(x, cond, uncond, table, step, scale, log_variance, h1, h2, *rest)
        ctx.save_for_backward(x, cond, uncond, table, step, scale, h1, h2)
        ctx.return_x0 = rest[-1]
        if not ctx.return_x0:
            ctx.mark_non_differentiable(x0)
        return out, x0

    @staticmethod
    def backward(ctx, dout, dx0):
        x, cond, uncond, table, step, scale, h1, h2 = ctx.saved_tensors
        args = (dout, dx0 if ctx.return_x0 else None, x, cond, uncond, table, step, scale, h1, h2)
        if torch.is_grad_enabled():  # create_graph=True
            dx, dcond, duncond, dh1, dh2 = guided_step_bwd_ref(*args)
        else:
            inputs = (x, cond, uncond, h1, h2)
            dx, dcond, duncond, dh1, dh2 = (
                None if t is None else g for t, g in zip(inputs, _bwd(*args), strict=True)
            )
        return dx, dcond, duncond, None, None, None, None, dh1, dh2, None, None, None


def guided_step(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None = None,
    *,
    table: Tensor,
    step: int | Tensor,
    scale: float | Tensor = 1.0,
    log_variance: Tensor | None = None,
    h1: Tensor | None = None,
    h2: Tensor | None = None,
    seed: int | Tensor | None = None,
    index: Tensor | None = None,
    return_x0: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Guidance, prediction of x0, clipping, and one sampler step with its noise, in one pass.

        e  = uncond + scale (cond - uncond)                    e = cond without uncond
        x0 = clamp(a0 x + a1 e, clip_min, clip_max)
        x' = b0 x + b1 x0 + b2 h1 + b3 h2 + b4 e + b5 std z

    Everything is read once, computed in float32 and rounded once. `cgkernels.samplers.make_table`
    makes the coefficients of the usual samplers.

    Args:
        x: (B, *event), the state; any strides.
        cond: the network's output, like x; or (2B, *event), the unconditional half first and the
            conditional half second, as one doubled batch gives it.
        uncond: the unconditional output, like x, or None.
        table: (S, 12) float32 on x's device (float64 with float64 x), columns `TABLE_COLUMNS`;
            -inf and inf as clip range mean no clipping.
        step: row of the table, int or integer tensor () or (B,). On a GPU tensor it is not checked:
            rows with a step outside the table come out as NaN.
        scale: guidance scale, number or floating tensor () or (B,).
        log_variance: learned variance v in [-1, 1], like x: std is then between the two standard
            deviations whose log-variances the table holds; else std = 1.
        h1, h2: history that the table refers to, like x: as a rule the two last x0.
        seed: draws z (stream 1, step number = row of the table); None: no noise.
        index: (B,) int64, the number of each sample; default 0 .. B - 1.
        return_x0: return (x', x0) instead of x'.

    Differentiable in x, cond, uncond, h1 and h2.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.

    Example, one Euler step of length -0.1 with guidance 3:
        >>> table = torch.zeros(1, 12)
        >>> table[0, [2, 6, 8, 9]] = torch.tensor([1.0, -0.1, -torch.inf, torch.inf])
        >>> x, outputs = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 8, 8)
        >>> guided_step(x, outputs, table=table, step=0, scale=3.0).shape
        torch.Size([2, 3, 8, 8])
    """
    args = _checked(x, cond, uncond, table, step, scale, log_variance, h1, h2, seed, index)
    if using_reference():
        out, x0 = guided_step_ref(*args)
        return (out, x0) if return_x0 else out
    run: Callable[..., tuple[Tensor, Tensor]]
    run = _GuidedStep.apply if needs_function(x, cond, uncond, h1, h2) else _fwd
    out, x0 = run(*args, return_x0)
    return (out, x0) if return_x0 else out


def guided_step_(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None = None,
    *,
    table: Tensor,
    step: int | Tensor,
    scale: float | Tensor = 1.0,
    log_variance: Tensor | None = None,
    h1: Tensor | None = None,
    h2: Tensor | None = None,
    seed: int | Tensor | None = None,
    index: Tensor | None = None,
    twin: Tensor | None = None,
) -> Tensor:
    """`guided_step` in place, for a loop whose tensors stay where they are.

    x <- x', and twin <- x' too: x and twin may be the channel slices of the two guidance halves of
    one persistent network input, whose condition channels stay. The history moves on: h2 <- h1 and
    h1 <- x0. Arguments as in `guided_step`; returns x. Not differentiable.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name; nothing is written then.
    """
    args = _checked(x, cond, uncond, table, step, scale, log_variance, h1, h2, seed, index)
    x, cond, uncond = args[:3]
    if h2 is not None and h1 is None:
        raise ValueError("h1 must be given where h2 is: the history moves from h1 to h2")
    if twin is not None:
        check_float(twin=twin)
        check_shape("twin", twin, tuple(x.shape))
        check_same_device(x=x, twin=twin)
    check_no_grad(
        "guided_step_ writes in place; use guided_step",
        x=x, cond=cond, uncond=uncond, h1=h1, h2=h2, twin=twin,
    )  # fmt: skip
    written = [
        (name, tensor)
        for name, tensor in (("x", x), ("h1", h1), ("h2", h2), ("twin", twin))
        if tensor is not None
    ]
    for number, (name, tensor) in enumerate(written):
        if _overlaps_itself(tensor):
            raise ValueError(f"{name} is written to: it must not be expanded, call .clone() first")
        for other, earlier in written[:number]:
            if tensor is earlier:
                raise ValueError(f"{name} must not be the same tensor as {other}: both are written")
    run: Callable[..., None] = _cpu_inplace
    if not using_reference():
        refuse_forward_mode()
        run = _inplace
    run(*args, twin)
    return x


def _checked(x, cond, uncond, table, step, scale, log_variance, h1, h2, seed, index):
    optional = {"uncond": uncond, "log_variance": log_variance, "h1": h1, "h2": h2}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    check_float(x=x, cond=cond, table=table, **given)
    check_rows("x", x)
    shape, rows = tuple(x.shape), x.shape[0]
    if uncond is None and rows and tuple(cond.shape) == (2 * rows, *shape[1:]):
        uncond, cond = cond.chunk(2)
    elif tuple(cond.shape) != shape:
        raise ValueError(
            f"cond must have x's shape {shape}, or twice its batch without uncond, "
            f"got {tuple(cond.shape)}"
        )
    for name, tensor in given.items():
        check_shape(name, tensor, shape)
    check_same_device(x=x, cond=cond, table=table, **given)
    check_table(table, len(TABLE_COLUMNS))
    check_no_grad(
        "guided_step has no gradient for it; use reference()",
        table=table, log_variance=log_variance, scale=scale,
    )  # fmt: skip
    step = as_step("step", step, rows, x.device, table.shape[0])
    scale = as_row_values("scale", scale, rows, x)
    if seed is not None:
        check_noise_size("x", shape)
        seed, _ = as_seed(seed, x.device)
        index = as_index(index, rows, x.device)
    elif readable(table) and bool((table[:, 7] != 0).any()):
        raise ValueError("seed must be given: the table adds noise (column b5 is not zero)")
    else:
        index = None
    return x, cond, uncond, table, step, scale, log_variance, h1, h2, seed, index


def _overlaps_itself(tensor):
    return any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))
