"""Definition of `norm_linear` and of its gradients, in plain PyTorch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cgkernels.library import without_autocast
from cgkernels.rows import compute_dtype

NORMS = (None, "rms", "layer")
ACTIVATIONS = (None, "gelu", "gelu_tanh", "swiglu")


@without_autocast
def norm_linear_ref(
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
    dtype = compute_dtype(x)
    h = _norm_ref(x, norm_weight, norm_bias, norm, eps)  # (..., K)
    y = _scale_and_bias_ref(F.linear(h.to(dtype), weight.to(dtype)), scales, bias)
    y = _activation_ref(y, activation)  # (..., N)
    return (y if residual is None else y + residual.to(dtype)).to(x.dtype)


def norm_linear_bwd_ref(
    wanted: tuple[bool, bool, bool, bool, bool],
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    bias: Tensor | None,
    norm: str | None,
    activation: str | None,
    eps: float,
) -> list[Tensor | None]:
    """Gradients of x, weight, norm_weight, norm_bias, bias where wanted, None elsewhere.

    As in PyTorch, the two matrix products take the gradients rounded to x's dtype.
    """
    dtype, shape = compute_dtype(x), x.shape
    x, dout = (t.reshape(shape[:-1].numel(), t.shape[-1]) for t in (x, dout))  # (rows, K or N)
    h = _norm_ref(x, norm_weight, norm_bias, norm, eps)
    weight = weight.to(x.dtype)
    dy = dout.to(dtype)
    if activation is not None:
        y = _scale_and_bias_ref(F.linear(h, weight).to(dtype), scales, bias)
        dy = _activation_bwd_ref(dy, y, activation)  # (rows, N or 2N)
    gradients: list[Tensor | None] = [None] * 5
    if wanted[4]:
        assert bias is not None
        gradients[4] = dy.sum(0).to(bias.dtype)
    dy = (dy if scales is None else dy * scales).to(x.dtype)
    if wanted[1]:
        gradients[1] = dy.t() @ h
    dh = (dy @ weight).to(dtype)  # (rows, K)
    if norm is None:
        gradients[0] = dh.view(shape)
        return gradients
    standardized, rstd = _standardize_ref(x, norm, eps)
    if wanted[2]:
        assert norm_weight is not None
        gradients[2] = (dh * standardized).sum(0).to(norm_weight.dtype)
    if wanted[3]:
        assert norm_bias is not None
        gradients[3] = dh.sum(0).to(norm_bias.dtype)
    if wanted[0]:
        dx = dh if norm_weight is None else dh * norm_weight
        projection = (dx * standardized).mean(-1, keepdim=True)
        mean = dx.mean(-1, keepdim=True) if norm == "layer" else 0
        dx = rstd * (dx - mean - projection * standardized)
        gradients[0] = dx.to(x.dtype).view(shape)
    return gradients


def _empty_output(x: Tensor, weight: Tensor, activation: str | None) -> Tensor:
    channels = weight.shape[0] // 2 if activation == "swiglu" else weight.shape[0]
    return x.new_empty(*x.shape[:-1], channels)


def _standardize_ref(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """x with a mean square (of the distance from the mean) of 1, and the factor that made it so."""
    x = x.to(compute_dtype(x))
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd, rstd


def _norm_ref(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm: str | None,
    eps: float,
) -> Tensor:
    if norm is None:
        return x
    h, _ = _standardize_ref(x, norm, eps)
    h = h if norm_weight is None else h * norm_weight
    h = h if norm_bias is None else h + norm_bias
    return h.to(x.dtype)


def _scale_and_bias_ref(y: Tensor, scales: Tensor | None, bias: Tensor | None) -> Tensor:
    """Scale and bias of a product that is at least float32."""
    y = y if scales is None else y * scales.to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def _activation_ref(y: Tensor, activation: str | None) -> Tensor:
    if activation == "swiglu":
        gate, up = y.chunk(2, -1)
        return F.silu(gate) * up
    if activation is None:
        return y
    return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activation_bwd_ref(dout: Tensor, y: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate, up = y.chunk(2, -1)
        s = gate.sigmoid()
        return torch.cat([dout * up * s * (1 + gate * (1 - s)), dout * gate * s], -1)
    if activation == "gelu":
        density = torch.exp(-0.5 * y.square()) / math.sqrt(2 * math.pi)
        return dout * (0.5 * (1 + torch.erf(y / math.sqrt(2))) + y * density)
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (y + 0.044715 * y**3))
    slope = c * (1 + 3 * 0.044715 * y.square())
    return dout * 0.5 * (1 + t + y * (1 - t.square()) * slope)
