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
from typing import Any

import torch
from torch import Tensor

from cgkernels.checks import (
    as_index,
    as_row_values,
    as_seed,
    as_step,
    check_flag,
    check_float,
    check_no_grad,
    check_noise_size,
    check_rows,
    check_same_device,
    check_shape,
    check_table,
    check_writable,
    readable,
)
from cgkernels.library import (
    define_op,
    needs_function,
    refuse_forward_mode,
    using_reference,
)
from cgkernels.ops.guided_step.cpu import _cpu_bwd, _cpu_fwd
from cgkernels.ops.guided_step.launch import (
    _launch_bwd,
    _launch_fwd,
    _launch_inplace,
    empty_gradients,
    empty_outputs,
)
from cgkernels.ops.guided_step.reference import (
    guided_step_bwd_ref,
    guided_step_inplace_ref,
    guided_step_ref,
)

TABLE_COLUMNS = (
    "a0", "a1", "b0", "b1", "b2", "b3", "b4", "b5",
    "clip_min", "clip_max", "log_var_min", "log_var_max",
)  # fmt: skip


# Registration -------------------------------------------------------------------------------------
def _fake_fwd(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(x, return_x0=others[-1])


def _fake_bwd(
    dout: Tensor, dx0: Tensor | None, x: Tensor, cond: Tensor, uncond: Tensor | None,
    table: Tensor, step: Tensor, scale: Tensor, h1: Tensor | None, h2: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return empty_gradients(x, cond, uncond, h1, h2)


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
    cpu=guided_step_inplace_ref,
    fake=lambda *args: None,
)


# Public functions ---------------------------------------------------------------------------------
class _GuidedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cond: Tensor, uncond: Tensor | None, table: Tensor, step: Tensor,
        scale: Tensor, log_variance: Tensor | None, h1: Tensor | None, h2: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, x0 = _fwd(x, cond, uncond, table, step, scale, log_variance, h1, h2, *rest)
        ctx.save_for_backward(x, cond, uncond, table, step, scale, h1, h2)
        ctx.return_x0 = rest[-1]
        if not ctx.return_x0:
            ctx.mark_non_differentiable(x0)
        return out, x0

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dx0: Tensor) -> tuple[Tensor | None, ...]:
        x, cond, uncond, table, step, scale, h1, h2 = ctx.saved_tensors
        args = (dout, dx0 if ctx.return_x0 else None, x, cond, uncond, table, step, scale, h1, h2)
        inputs = (x, cond, uncond, h1, h2)
        run: Callable[..., tuple[Tensor | None, ...]]
        # Grad mode is on where this gradient is to be differentiated, too (create_graph=True).
        run = guided_step_bwd_ref if torch.is_grad_enabled() else _bwd
        dx, dcond, duncond, dh1, dh2 = (
            None if t is None else g for t, g in zip(inputs, run(*args), strict=True)
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
    check_flag(return_x0=return_x0)
    args = _check_arguments(x, cond, uncond, table, step, scale, log_variance, h1, h2, seed, index)
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
    h1 <- x0. Arguments as in `guided_step`; returns x. Not differentiable. None of the tensors that
    are written may share memory with another argument.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name; nothing is written then.
    """
    given = {
        "cond": cond, "uncond": uncond, "table": table, "step": step, "scale": scale,
        "log_variance": log_variance, "seed": seed, "index": index,
    }  # fmt: skip
    args = _check_arguments(x, cond, uncond, table, step, scale, log_variance, h1, h2, seed, index)
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
    check_writable({"x": x, "h1": h1, "h2": h2, "twin": twin}, given)
    run: Callable[..., None] = guided_step_inplace_ref
    if not using_reference():
        refuse_forward_mode()
        run = _inplace
    run(*args, twin)
    return x


def _check_arguments(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    table: Tensor,
    step: int | Tensor,
    scale: float | Tensor,
    log_variance: Tensor | None,
    h1: Tensor | None,
    h2: Tensor | None,
    seed: int | Tensor | None,
    index: Tensor | None,
) -> tuple[Any, ...]:
    """The arguments of the op: cond and uncond apart, numbers as tensors (B,)."""
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
