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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cgkernels.checks import (
    check_choice,
    check_flag,
    check_float,
    check_int,
    check_no_grad,
    check_number,
    check_same_device,
    check_shape,
    check_writable,
)
from cgkernels.library import define_op, needs_function, using_reference
from cgkernels.ops.instance_norm_act.cpu import _cpu_bwd, _cpu_fwd, _cpu_inplace
from cgkernels.ops.instance_norm_act.launch import _launch_bwd, _launch_fwd, _launch_inplace
from cgkernels.ops.instance_norm_act.reference import (
    ACTIVATIONS,
    _empty_gradients,
    _empty_padded,
    _empty_statistics,
    _makes_dresidual,
    instance_norm_act_bwd_ref,
    instance_norm_act_ref,
)

__all__ = ["instance_norm_act", "instance_norm_act_"]


# Registration -------------------------------------------------------------------------------------
def _fake_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    slopes: list[float],
    pad: int,
    over_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_padded(x, pad), *_empty_statistics(x, over_batch)


def _fake_inplace(
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
    return _empty_statistics(x, over_batch)


def _fake_bwd(
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
    return _empty_gradients(second_dy, x, mean, residual_dtype, pad, over_batch)


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


# Public functions ---------------------------------------------------------------------------------
class _InstanceNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor | None, second: Tensor | None, *args: Any
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
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
    def backward(
        ctx: Any, dy: Tensor, second_dy: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, var = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:6]
        if torch.is_grad_enabled():  # create_graph=True
            gradients = instance_norm_act_bwd_ref(dy, second_dy, x, weight, bias, *ctx.options)
        else:
            dtype = ctx.dtypes[3] if wanted[3] else None
            dx, sums, made = _bwd(dy, second_dy, x, mean, var, weight, bias, dtype, *ctx.options)
            dbias, dweight = sums.sum(1)
            dresidual = made if _makes_dresidual(second_dy, ctx.options[2]) else dy
            gradients = dx, dweight, dbias, dresidual
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
    slope: float | None = None,
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
        slope: of "leaky_relu" alone, 0.2 where it is None.
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
    check_flag(return_stats=return_stats)
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
    slope: float | None = None,
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
        check_no_grad("it is written: what stood there has no gradient", **{name: tensor})
    read = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    check_writable({"out": out, "second": second}, read)
    if using_reference():
        *ys, mean, var = instance_norm_act_ref(*args)
        for tensor, y in zip(written, ys, strict=True):
            tensor.copy_(y.detach())
        return *ys, mean.detach(), var.detach()
    if needs_function(*given):
        out, _, mean, var = results = _InstanceNormAct.apply(out, second, *args)
        return (out, mean, var) if second is None else results
    return *written, *_inplace(out, second, *args)


def _options(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activations: Sequence[str | None],
    slope: float | None,
    pad: int,
    over_batch: bool,
) -> tuple[float, list[float], int, bool]:
    """Numbers of the op, activations as their slopes; raises where an argument does not fit."""
    for name, activation in zip(("activation", "second_activation"), activations, strict=False):
        check_choice(name, activation, ACTIVATIONS)
    check_number("eps", eps, 0)
    if slope is None:
        slope = 0.2
    elif "leaky_relu" not in activations:
        raise ValueError(f"slope must be None unless activation is 'leaky_relu', got {slope!r}")
    check_number("slope", slope)
    check_flag(over_batch=over_batch)
    check_float(x=x)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must have shape (N, C, H, W), got {tuple(x.shape)}")
    n, c, h, w = x.shape
    check_int("pad", pad, 0, min(h, w) - 1)
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
    return float(eps), [slopes[a] for a in activations], pad, over_batch
