"""Definition of `instance_norm_act` and of its gradients, in plain PyTorch; tensors of results."""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from cgkernels.moments import centered_moments, pixel_mean
from cgkernels.rows import compute_dtype, memory_format

ACTIVATIONS = (None, "relu", "leaky_relu")

_leaky_relu_backward = torch.ops.aten.leaky_relu_backward


def instance_norm_act_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    slopes: Sequence[float],
    pad: int,
    over_batch: bool,
) -> tuple[Tensor, ...]:
    """y of each activation, mean, var; an activation is z where z > 0, else slope z."""
    centered, mean, var = centered_moments(x, over_batch)
    gain = _gain_ref(_defined(var, x), weight, eps)
    z = _scale_and_bias_ref(centered, gain, bias)
    ys = (_epilogue_ref(z, residual, slope, pad).to(x.dtype) for slope in slopes)
    shape = x.shape[1:2] if over_batch else x.shape[:2]
    return *ys, mean.view(shape), var.view(shape)


def instance_norm_act_bwd_ref(
    dy: Tensor,
    second_dy: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    slopes: Sequence[float],
    pad: int,
    over_batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and residual, whether these are there or not.

    The statistics are taken again: second derivatives go through them.
    """
    centered, _, var = centered_moments(x, over_batch)
    var = _defined(var, x)
    gain, rstd = _gain_ref(var, weight, eps), torch.rsqrt(var + eps)
    z = _scale_and_bias_ref(centered, gain, bias)
    dy, dz = _epilogue_bwd_ref(dy, second_dy, z, slopes, pad)
    dz_mean, projection = (_defined(pixel_mean(t, over_batch), x) for t in (dz, dz * centered))
    dx = ((dz - dz_mean) - centered * (projection * rstd.square())) * gain
    pixels = x.numel() // max(1, dz_mean.numel())
    dbias, dweight = ((t * pixels).flatten(1).sum(0) for t in (dz_mean, projection * rstd))
    return dx, dweight, dbias, dy


def _defined(mean: Tensor, x: Tensor) -> Tensor:
    """A mean over x; 0 where x is empty, whose mean is NaN, and whose gradients are 0."""
    return mean if x.numel() else mean.nan_to_num(0.0)


def _gain_ref(var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    rstd = torch.rsqrt(var + eps)
    return rstd if weight is None else rstd * _per_channel(weight, rstd)


def _scale_and_bias_ref(centered: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    z = centered * gain
    return z if bias is None else z + _per_channel(bias, z)


def _epilogue_ref(z: Tensor, residual: Tensor | None, slope: float, pad: int) -> Tensor:
    """What follows the norm: activation, residual, padding."""
    y = z if slope == 1 else F.leaky_relu(z, slope) if slope else F.relu(z)
    y = y if residual is None else y + residual.to(y.dtype)
    return F.pad(y, (pad,) * 4, mode="reflect") if pad else y


def _epilogue_bwd_ref(
    dy: Tensor, second_dy: Tensor | None, z: Tensor, slopes: Sequence[float], pad: int
) -> tuple[Tensor, Tensor]:
    """Gradients of what was added to the activations, and of z, in the memory format of z."""
    dys, dzs = [], []
    for part, slope in zip((dy, second_dy), slopes, strict=False):
        assert part is not None
        part = part.to(z.dtype)
        if pad:
            part = torch.ops.aten.reflection_pad2d_backward(part, z, (pad,) * 4)
        part = part.contiguous(memory_format=memory_format(z))
        dys.append(part)
        dzs.append(part if slope == 1 else _leaky_relu_backward(part, z, slope, False))
    return reduce(torch.add, dys), reduce(torch.add, dzs)


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like.dtype).view(1, -1, 1, 1)


# Results ------------------------------------------------------------------------------------------
def _empty_padded(x: Tensor, pad: int) -> Tensor:
    n, c, h, w = x.shape
    shape = (n, c, h + 2 * pad, w + 2 * pad)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _empty_statistics(x: Tensor, over_batch: bool) -> tuple[Tensor, Tensor]:
    shape = x.shape[1:2] if over_batch else x.shape[:2]
    return x.new_empty(shape, dtype=compute_dtype(x)), x.new_empty(shape, dtype=compute_dtype(x))


def _empty_gradients(
    second_dy: Tensor | None,
    x: Tensor,
    mean: Tensor,
    residual_dtype: torch.dtype | None,
    pad: int,
    over_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx; sums over the pixels of dz and of dz (x - mean) rstd; dresidual, empty if not made."""
    sums = mean.new_empty(2, 1 if over_batch else x.shape[0], x.shape[1])
    if residual_dtype is None or not _makes_dresidual(second_dy, pad):
        return _empty_padded(x, 0), sums, x.new_empty(0)
    return _empty_padded(x, 0), sums, _empty_padded(x, 0).to(residual_dtype)


def _makes_dresidual(second_dy: Tensor | None, pad: int) -> bool:
    """Whether the gradient of the residual has to be made: it is not dy as it came."""
    return pad > 0 or second_dy is not None
