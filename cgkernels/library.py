"""Registration: the one file that touches torch.library.

An op is defined once, with three implementations: a launcher of kernels for CUDA, plain PyTorch for
CPU, and a fake that states shapes, dtypes and strides.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

OPS: dict[str, torch._ops.OpOverload] = {}
"""Every op, by name, for the tests that run over all of them."""


def define_op(
    name: str,
    schema: str,
    *,
    cuda: Callable,
    cpu: Callable,
    fake: Callable,
) -> torch._ops.OpOverload:
    """Register cgkernels::<name>; schema like "(Tensor x, float eps) -> (Tensor, Tensor)"."""

    def cuda_on_its_device(*args: Any) -> Any:
        # A Python implementation gets no device guard from the dispatcher, and Triton launches on
        # the current device.
        with torch.cuda.device_of(next(a for a in args if isinstance(a, Tensor))):
            return cuda(*args)

    def cpu_as_written(*args: Any) -> Any:
        # Autocast reaches into a Python implementation: products that are to be in float32 would
        # lose digits, and results have another dtype than `fake` says.
        if not torch.is_autocast_enabled("cpu"):
            return cpu(*args)
        with torch.autocast("cpu", enabled=False):
            return cpu(*args)

    qualname = f"cgkernels::{name}"
    torch.library.define(qualname, schema)
    torch.library.impl(qualname, "CUDA", cuda_on_its_device)
    torch.library.impl(qualname, "CPU", cpu_as_written)
    torch.library.register_fake(qualname, fake)
    OPS[name] = getattr(torch.ops.cgkernels, name).default
    return OPS[name]


_use_reference = False


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """Run every op as plain PyTorch, on any device: how fused and plain are compared.

    One flag for the whole process. torch.compile guards on it, so that a function compiled under
    both gets two graphs.
    """
    global _use_reference
    before, _use_reference = _use_reference, True
    try:
        yield
    finally:
        _use_reference = before


def using_reference() -> bool:
    """Whether public functions must run their reference; read beside only where graphs are kept."""
    return _use_reference


def needs_function(*tensors: Tensor | None) -> bool:
    """Whether a call must go through its autograd.Function: where a gradient is recorded."""
    refuse_forward_mode()
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse_forward_mode() -> None:
    """Raise inside any level of forward-mode differentiation.

    A bare op would return a tangent of zero there without a word.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        raise NotImplementedError(
            "the ops of cgkernels have no forward-mode derivative (torch.func.jvp, dual tensors): "
            "make the call inside cgkernels.reference()"
        )
