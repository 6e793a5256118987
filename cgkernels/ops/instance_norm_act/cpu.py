"""`instance_norm_act` on a CPU: the reference in place, for as much at a time as a core caches."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cgkernels.moments import pixel_mean
from cgkernels.ops.instance_norm_act.reference import (
    _empty_gradients,
    _empty_padded,
    _empty_statistics,
    _epilogue_bwd_ref,
    _epilogue_ref,
    _gain_ref,
    _leaky_relu_backward,
    _makes_dresidual,
    _per_channel,
)
from cgkernels.rows import compute_dtype, memory_format

_CHUNK = 2**17  # elements taken at a time: half a megabyte in float32


def _cpu_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    slopes: list[float],
    pad: int,
    over_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y = _empty_padded(x, pad)
    return y, *_cpu_inplace(y, None, x, weight, bias, residual, eps, slopes, pad, over_batch)


def _cpu_inplace(
    out: Tensor,
    second: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    slopes: list[float],
    pad: int,
    over_batch: bool,
) -> tuple[Tensor, Tensor]:
    mean, var = _empty_statistics(x, over_batch)
    shaped = [t.view(-1, x.shape[1], 1, 1) for t in (mean, var)]
    for at, (y, work, _) in _chunks(x, over_batch):
        w, b = (None if t is None else t[at[1]] for t in (weight, bias))
        chunk_residual = None if residual is None else residual[at]
        into, chunk = out[at], _converted(x[at], y)
        writable = into.dtype == y.dtype and into.is_contiguous(memory_format=memory_format(x))
        y = into if writable and not pad else y
        chunk_mean = pixel_mean(chunk, over_batch)
        torch.sub(chunk, chunk_mean, out=y)
        chunk_var = pixel_mean(torch.mul(y, y, out=work), over_batch)
        y.mul_(_gain_ref(chunk_var, w, eps))
        if b is not None:
            y.add_(_per_channel(b, y))
        if second is not None:
            second[at].copy_(_epilogue_ref(y, chunk_residual, slopes[1], pad))
        if slopes[0] != 1:
            _ = F.leaky_relu_(y, slopes[0]) if slopes[0] else F.relu_(y)
        if chunk_residual is not None:
            y.add_(chunk_residual)
        if y is not into:
            into.copy_(F.pad(y, (pad,) * 4, mode="reflect") if pad else y)
        for statistic, value in zip(shaped, (chunk_mean, chunk_var), strict=True):
            statistic[at] = value
    return mean, var


def _cpu_bwd(
    dy: Tensor,
    second_dy: Tensor | None,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual_dtype: torch.dtype | None,
    eps: float,
    slopes: list[float],
    pad: int,
    over_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """With the statistics at hand."""
    dx, sums, dresidual = _empty_gradients(second_dy, x, mean, residual_dtype, pad, over_batch)
    if x.numel() == 0:
        return dx, sums.zero_(), dresidual
    mean, var = (t.view(-1, x.shape[1], 1, 1) for t in (mean, var))
    pixels = x.shape[2] * x.shape[3] * (x.shape[0] if over_batch else 1)
    for at, (centered, work, wide) in _chunks(x, over_batch):
        w, b = (None if t is None else t[at[1]] for t in (weight, bias))
        gain, rstd = _gain_ref(var[at], w, eps), torch.rsqrt(var[at] + eps)
        torch.sub(_converted(x[at], centered), mean[at], out=centered)
        z = centered  # which alone has the sign of what follows a norm
        if any(slope != 1 for slope in slopes) and not (w is b is None):
            z = torch.mul(centered, gain, out=work)
            if b is not None:
                z.add_(_per_channel(b, z))
        if _makes_dresidual(second_dy, pad):
            chunk_second = None if second_dy is None else second_dy[at]
            chunk_dresidual, dz = _epilogue_bwd_ref(dy[at], chunk_second, z, slopes, pad)
            if dresidual.numel():
                dresidual[at] = chunk_dresidual
        else:
            dz = _converted(dy[at], wide)
            if slopes[0] != 1:
                _leaky_relu_backward.grad_input(dz, z, slopes[0], False, grad_input=wide)
                dz = wide
        dz_mean = pixel_mean(dz, over_batch)
        projection = pixel_mean(torch.mul(dz, centered, out=work), over_batch)
        centered.mul_(projection * rstd.square())
        into = dx[at] if dx.dtype == work.dtype else work
        torch.mul(torch.sub(dz, dz_mean, out=work).sub_(centered), gain, out=into)
        if into is work:
            dx[at] = work
        sums[(0, *at)] = (dz_mean * pixels).flatten(1)
        sums[(1, *at)] = (projection * rstd * pixels).flatten(1)
    return dx, sums, dresidual


def _chunks(x: Tensor, over_batch: bool) -> Iterator[tuple[tuple[slice, slice], list[Tensor]]]:
    """Samples and channels of chunks that have means of their own.

    With them come three tensors to work in, the same ones again where they fit: memory that is
    new costs more than what is done in it.
    """
    (rows, channels), everything, format = x.shape[:2], slice(None), memory_format(x)
    sample = max(1, x[:1].numel())
    if over_batch:
        slices = [(everything, everything)]
    elif sample > _CHUNK and format == torch.contiguous_format:
        step = max(1, _CHUNK * channels // sample)
        parts = [slice(i, i + step) for i in range(0, channels, step)]
        slices = [(slice(i, i + 1), part) for i in range(rows) for part in parts]
    else:
        step = max(1, _CHUNK // sample)
        slices = [(slice(i, i + step), everything) for i in range(0, rows, step)]
    work: list[Tensor] = []
    for at in slices:
        if not work or work[0].shape != x[at].shape:
            new = partial(torch.empty_like, x[at], dtype=compute_dtype(x), memory_format=format)
            work = [new() for _ in range(3)]
        yield at, work


def _converted(chunk: Tensor, work: Tensor) -> Tensor:
    """The chunk in dtype and memory format of work: itself, or copied into work."""
    contiguous = chunk.is_contiguous(memory_format=memory_format(work))
    return chunk if contiguous and chunk.dtype == work.dtype else work.copy_(chunk)
