"""The definition of `guided_step` in plain PyTorch, its gradient, and what it writes in place."""

from collections.abc import Callable

import torch
from torch import Tensor

from cgkernels import random
from cgkernels.rows import compute_dtype


def guided_step_ref(
    x: Tensor, cond: Tensor, uncond: Tensor | None, table: Tensor, step: Tensor, scale: Tensor,
    log_variance: Tensor | None = None, h1: Tensor | None = None, h2: Tensor | None = None,
    seed: Tensor | None = None, index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x' and x0, both (B, *event)."""
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


def guided_step_inplace_ref(
    x: Tensor, cond: Tensor, uncond: Tensor | None, table: Tensor, step: Tensor, scale: Tensor,
    log_variance: Tensor | None, h1: Tensor | None, h2: Tensor | None, seed: Tensor | None,
    index: Tensor | None, twin: Tensor | None,
) -> None:  # fmt: skip
    """x' written to x and twin, x0 to h1, and what h1 was to h2."""
    out, x0 = guided_step_ref(
        x, cond, uncond, table, step, scale, log_variance, h1, h2, seed, index
    )
    if h1 is not None and h2 is not None:
        h2.copy_(h1)
    for tensor, value in ((h1, x0), (x, out), (twin, out)):
        if tensor is not None:
            tensor.copy_(value)


def guided_step_bwd_ref(
    dout: Tensor, dx0: Tensor | None, x: Tensor, cond: Tensor, uncond: Tensor | None,
    table: Tensor, step: Tensor, scale: Tensor, h1: Tensor | None = None, h2: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients with respect to x, cond, uncond, h1, h2; dx0 is None where x0 was not returned."""
    wide, columns, scale = _wide_ref(x, table, step, scale)
    a0, a1, b0, b1, b2, b3, b4 = columns[:7]
    clip_min, clip_max = columns[8:10]
    dout = wide(dout)
    _, x0 = _prediction_ref(wide, x, cond, uncond, columns, scale)
    clipped = (x0 < clip_min) | (x0 > clip_max)
    dx0 = b1 * dout if dx0 is None else b1 * dout + wide(dx0)
    dx0 = dx0.masked_fill(clipped, 0)
    de = b4 * dout + a1 * dx0
    return (
        (b0 * dout + a0 * dx0).to(x.dtype),
        (de if uncond is None else scale * de).to(cond.dtype),
        None if uncond is None else ((1 - scale) * de).to(uncond.dtype),
        None if h1 is None else (b2 * dout).to(h1.dtype),
        None if h2 is None else (b3 * dout).to(h2.dtype),
    )


def _wide_ref(
    x: Tensor, table: Tensor, step: Tensor, scale: Tensor
) -> tuple[Callable[[Tensor], Tensor], list[Tensor], Tensor]:
    """The cast to the dtype of the computation, the columns of each row's step, and the scale."""
    dtype = compute_dtype(x)
    per_row = (-1,) + (1,) * (x.dim() - 1)
    columns = [c.view(per_row) for c in table[step].to(dtype).unbind(1)]  # 12 of (B, 1, ...)
    return (lambda t: t.to(dtype)), columns, scale.to(dtype).view(per_row)


def _prediction_ref(
    wide: Callable[[Tensor], Tensor], x: Tensor, cond: Tensor, uncond: Tensor | None,
    columns: list[Tensor], scale: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """e, and x0 before it is clipped."""
    e = wide(cond) if uncond is None else wide(uncond) + scale * (wide(cond) - wide(uncond))
    return e, columns[0] * wide(x) + columns[1] * e
