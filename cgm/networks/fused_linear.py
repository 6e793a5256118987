"""Linear layers with what stands around them in a transformer, fused for a token step.

    act(linear(norm(x))) + residual

A fused launch reads the tensors of modules and does not call them. Where a call would do something
else, as with an adapter, a hook or a quantized layer, `alterations` says so, and `called_linear`
stands in.
"""

from collections.abc import Collection, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

import cgkernels

MOST_ROWS = 64  # of one launch of norm_linear


# Modules ------------------------------------------------------------------------------------------
class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, in float32."""

    def __init__(self, kind: Literal["rms", "layer"], width: int, eps: float) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., W) normalized."""
        if self.kind == "layer":
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Int8Linear(nn.Module):
    """A linear layer with weights of 8 bits: W = scales[:, None] * weight, rounded to nearest."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        wide = linear.weight.detach().float()
        scales = wide.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        self.weight = nn.Buffer((wide / scales[:, None]).round().to(torch.int8))
        self.scales = nn.Buffer(scales)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) times the weight, plus the bias."""
        return F.linear(x, (self.weight * self.scales[:, None]).to(x.dtype), self.bias)


class PackedLinear(nn.Module):
    """A linear layer for `fused_linear` alone, its weight packed by `cgkernels.pack_weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = cgkernels.pack_weight(linear.weight), linear.bias

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, of which a packed weight knows neither: as it was before."""
        state = dict(vars(self))
        if self.weight.is_mkldnn:
            state["weight"] = self.weight.to_dense()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.weight = cgkernels.pack_weight(self.weight)


def activate(h: Tensor, activation: str | None) -> Tensor:
    """swiglu, whose first half is the gate, gelu, gelu_tanh or nothing."""
    if activation is None:
        return h
    if activation == "swiglu":
        gate, value = h.chunk(2, dim=-1)
        return F.silu(gate) * value
    return F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")


# Fused, or called ---------------------------------------------------------------------------------
def fused_linear(
    x: Tensor,
    linear: nn.Linear | Int8Linear | PackedLinear,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """act(linear(norm(x))) + residual of rows (B, K), each with the same bits in any batch.

    That holds for the rows of one `cgkernels.norm_linear`, at most 64: more go through it in turn.
    """
    scales = linear.scales if isinstance(linear, Int8Linear) else None
    options: dict[str, Any] = {
        "bias": linear.bias, "scales": scales, "activation": activation, "counters": counters,
    }  # fmt: skip
    if norm is not None:
        options |= {
            "norm": norm.kind, "norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps,
        }  # fmt: skip
    if len(x) <= MOST_ROWS:
        return cgkernels.norm_linear(x, linear.weight, residual=residual, **options)
    residuals = [None] * len(x) if residual is None else residual.split(MOST_ROWS)
    parts = zip(x.split(MOST_ROWS), residuals, strict=False)
    return torch.cat(
        [cgkernels.norm_linear(x, linear.weight, residual=r, **options) for x, r in parts]
    )


def called_linear(
    x: Tensor,
    linear: nn.Module,
    norm: nn.Module | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """`fused_linear` by calling the modules, whatever they are; bits of a row may differ."""
    x = activate(linear(x if norm is None else norm(x)), activation)
    return x if residual is None else residual + x


def alterations(root: nn.Module, plain: Collection[type]) -> Iterator[tuple[str, str]]:
    """(name, why) of each module of `root` that may do more than its class does with its tensors.

    plain: the classes that are as they should be; a subclass is not.
    """
    for name, module in root.named_modules():
        kinds = [type(p) for p in module._parameters.values() if p is not None]
        others = [k for k in kinds if k not in (nn.Parameter, Tensor, FakeTensor)]
        if type(module) not in plain:
            yield name, f"is a {type(module).__module__}.{type(module).__name__}"
        elif module._forward_hooks or module._forward_pre_hooks:
            yield name, "has a forward hook"
        elif "forward" in vars(module):
            yield name, "has a forward of its own"
        elif others:
            yield name, f"has a {others[0].__name__} as parameter"


def hooks_of_all_modules() -> bool:
    """Whether `torch.nn.modules.module.register_module_forward_hook` or its pre-hook has some."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
