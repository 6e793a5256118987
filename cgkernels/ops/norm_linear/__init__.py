"""A linear layer with the norm before it and what follows it, made for few rows.

    out = act(norm(x) W^T + bias) + residual,   act = identity, GELU, or silu(gate) * up (SwiGLU)

Shapes   x: (..., K); weight: (N, K), bias: (N,), with SwiGLU (2N, K) and (2N,), the gates first;
         norm_weight, norm_bias: (K,); residual, out: (..., N).
Dtypes   x and out float32, float16 or bfloat16 (float64 on CPU), the weight as x, or int8 with a
         float32 scale for each of its rows; float32 inside. In half types norm(x) is rounded to the
         dtype, which is what tensor cores multiply. Up to 64 rows, a row has the same bits alone or
         in any batch.
Backward in all but int8 weights and scales, in plain PyTorch, as often as one likes.
Source   RMSNorm: arXiv:1910.07467; LayerNorm: arXiv:1607.06450; GELU: arXiv:1606.08415; SwiGLU:
         arXiv:2002.05202. Derivatives from the formulas.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cgkernels.checks import (
    check_choice,
    check_counters,
    check_float,
    check_no_grad,
    check_number,
    check_same_device,
    check_shape,
    check_tensor,
    check_writable,
)
from cgkernels.library import (
    define_op,
    needs_function,
    refuse_forward_mode,
    using_reference,
)
from cgkernels.ops.norm_linear.cpu import _by_packed, _eager, pack_weight
from cgkernels.ops.norm_linear.launch import _launch, _least_counters
from cgkernels.ops.norm_linear.reference import (
    ACTIVATIONS,
    NORMS,
    _empty_output,
    norm_linear_bwd_ref,
    norm_linear_ref,
)

__all__ = ["norm_linear", "pack_weight"]


# Registration -------------------------------------------------------------------------------------
def _fake(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: str | None,
    activation: str | None,
    eps: float,
    counters: Tensor | None = None,
) -> Tensor:
    return _empty_output(x, weight, activation)


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? scales, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? bias, Tensor? residual, str? norm, str? activation, float eps"
)

_fwd = define_op(
    "norm_linear",
    f"({_ARGUMENTS}) -> Tensor",
    cuda=_launch,
    cpu=_eager,
    fake=_fake,
)

_counted = define_op(
    "norm_linear_counted",
    f"({_ARGUMENTS}, Tensor(a!) counters) -> Tensor",
    cuda=_launch,
    cpu=_eager,
    fake=_fake,
)


# Public function ----------------------------------------------------------------------------------
class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scales: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        norm: str | None,
        activation: str | None,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, scales, norm_weight, norm_bias, bias)
        ctx.options = norm, activation, eps
        ctx.residual_dtype = None if residual is None else residual.dtype
        return _fwd(
            x, weight, scales, norm_weight, norm_bias, bias, residual, norm, activation, eps
        )

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _, norm_weight, norm_bias, bias, residual, *_ = ctx.needs_input_grad
        wanted = x, weight, norm_weight, norm_bias, bias
        dx, dweight, *others = norm_linear_bwd_ref(wanted, dout, *ctx.saved_tensors, *ctx.options)
        dresidual = dout.to(ctx.residual_dtype) if residual else None
        return dx, dweight, None, *others, dresidual, None, None, None


def norm_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """Linear layer with the norm before it and what follows it: act(norm(x) W^T + bias) + residual.

        rms:   norm(x) = x / sqrt(mean(x^2) + eps) * norm_weight
        layer: norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * norm_weight + norm_bias

    One launch for up to 64 rows, in which the weight is read from memory once; a row has the same
    bits alone or in any batch of at most 64 rows. More rows go to PyTorch (cuBLAS): the same
    formula, other bits. To keep a row's bits there, call it for 64 rows at a time.

    Args:
        x: (..., K) float32, float16 or bfloat16 (float64 on the CPU); any strides.
        weight: (N, K) as `torch.nn.Linear` keeps it, of x's dtype or int8, or packed by
            `pack_weight`, then without gradients. With "swiglu" (2N, K), the gates first.
        norm: None, "rms" or "layer"; norm_weight and norm_bias: (K,), the latter for "layer" only.
        eps: added to the mean square.
        bias: (N,), with "swiglu" (2N,).
        activation: None, "gelu", "gelu_tanh" (its approximation) or "swiglu": silu(gate) * up.
        residual: (..., N), added last.
        scales: float32, one for each row of an int8 weight: W = scales[:, None] * weight.
        counters: int32 zeros, at least ceil(rows / 16) * ceil(len(weight) / 16), in which the
            programs of a launch count themselves; zero again when it is done. Calls that share
            them must come one after another, as on one stream. None: of its own, which a second,
            small launch puts to zero.

    Returns:
        (..., N) in x's dtype, contiguous. norm(x) is rounded to x's dtype, and so is the result;
        all between is float32. Differentiable, but not in scales and int8 weights.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.

    Example:
        >>> x, weight = torch.tensor([[3.0, 4.0]]), torch.eye(2)
        >>> norm_linear(x, weight, residual=x)
        tensor([[6., 8.]])
    """
    check_choice("norm", norm, NORMS)
    check_choice("activation", activation, ACTIVATIONS)
    check_number("eps", eps, 0)
    check_float(x=x)
    packed = isinstance(weight, Tensor) and weight.is_mkldnn
    if not packed:
        check_tensor("weight", weight)
    if weight.dtype not in (x.dtype, torch.int8):
        raise TypeError(f"weight must be {x.dtype} as x is, or int8, got {weight.dtype}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must have shape (N, K), not empty, got {tuple(weight.shape)}")
    weight_rows, features = weight.shape
    if activation == "swiglu" and weight_rows % 2:
        raise ValueError(f"weight must have shape (2N, K) for swiglu, got {tuple(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(f"x must have shape (..., {features}), got {tuple(x.shape)}")
    if (scales is None) == (weight.dtype == torch.int8):
        has = "one for each row of an int8 weight" if scales is None else "None for a float weight"
        raise ValueError(f"scales must be {has}")
    if norm is None and norm_weight is not None:
        raise ValueError("norm_weight must be None without a norm")
    if norm != "layer" and norm_bias is not None:
        raise ValueError("norm_bias must be None unless norm is 'layer'")
    channels = weight_rows // 2 if activation == "swiglu" else weight_rows
    for name, tensor, shape in (
        ("norm_weight", norm_weight, (features,)), ("norm_bias", norm_bias, (features,)),
        ("bias", bias, (weight_rows,)), ("scales", scales, (weight_rows,)),
        ("residual", residual, (*x.shape[:-1], channels)),
    ):  # fmt: skip
        if tensor is not None:
            check_float(**{name: tensor})
            if tensor.shape != shape or tensor.device != x.device:
                check_shape(name, tensor, shape)
                check_same_device(x=x, **{name: tensor})
    check_same_device(x=x, weight=weight)
    if counters is not None:
        rows = x.numel() // features
        check_counters(counters, _least_counters(rows, weight_rows), x.device)
        read = {"x": x, "norm_weight": norm_weight, "norm_bias": norm_bias, "bias": bias}
        read |= {"weight": None if packed else weight, "scales": scales, "residual": residual}
        check_writable({"counters": counters}, read)
    if scales is not None and scales.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"scales must be float32, got {scales.dtype}")
    if packed:
        if using_reference():
            weight = weight.to_dense()
        else:
            floats = {"x": x, "norm_weight": norm_weight, "norm_bias": norm_bias, "bias": bias}
            check_no_grad("a packed weight has no backward", **floats, residual=residual)
            return _by_packed(
                x, weight, norm_weight, norm_bias, bias, residual, norm, activation, eps
            )
    check_no_grad("norm_linear has no gradient for it; use reference()", scales=scales)
    args = (
        x, weight, scales, norm_weight, norm_bias, bias, residual, norm, activation, float(eps),
    )  # fmt: skip
    if using_reference():
        return norm_linear_ref(*args)
    if counters is not None:
        refuse_forward_mode()
        floats = {"x": x, "weight": weight, "norm_weight": norm_weight, "norm_bias": norm_bias}
        check_no_grad("norm_linear has no gradients with counters", **floats, bias=bias,
                      residual=residual)  # fmt: skip
        return _counted(*args, counters)
    differentiable = (x, weight, norm_weight, norm_bias, bias, residual)
    run: Callable[..., Tensor] = _NormLinear.apply if needs_function(*differentiable) else _fwd
    return run(*args)
