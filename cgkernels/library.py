"""Registration: the one file that touches torch.library.

An op is defined once, with three implementations: a launcher of kernels for CUDA, plain PyTorch for
CPU, and a fake that states shapes, dtypes and strides.
"""

import contextlib
import contextvars
import functools
import threading
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

    qualname = f"cgkernels::{name}"
    torch.library.define(qualname, schema)
    torch.library.impl(qualname, "CUDA", on_its_device(cuda))
    torch.library.impl(qualname, "CPU", without_autocast(cpu))
    torch.library.register_fake(qualname, fake)
    OPS[name] = getattr(torch.ops.cgkernels, name).default
    return OPS[name]


def without_autocast(function: Callable) -> Callable:
    """The function in the dtypes of its tensors, on the device of the first.

    Autocast reaches into what is written in Python: products that are to be in float32 would lose
    digits, and results have another dtype than `fake` says.
    """

    @functools.wraps(function)
    def as_written(*args: Any) -> Any:
        device = next(a for a in args if isinstance(a, Tensor)).device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return as_written


def on_its_device(launch: Callable) -> Callable:
    """The launcher on the device of its tensors, which is one: public functions refuse others.

    A Python implementation gets no device guard from the dispatcher, and Triton launches on the
    current device.
    """

    def launch_there(*args: Any) -> Any:
        with torch.cuda.device_of(next(a for a in args if isinstance(a, Tensor))):
            return launch(*args)

    return launch_there


class _Thread(threading.local):
    """How many `reference()` this thread is in: what torch.compile reads, and guards on."""

    def __init__(self) -> None:
        self.depth = 0


_thread = _Thread()
# The same of this thread and context (as of a task of asyncio); None: it was never in one.
_context: contextvars.ContextVar[bool | None] = contextvars.ContextVar("reference", default=None)
_STASH = "cgkernels.reference"  # where PyTorch takes it along to the threads of a backward


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """Run every op as plain PyTorch, on any device: how fused and plain are compared.

    It holds in this thread and context, and in a backward that is begun there (where a checkpoint
    computes again); a thread that is started inside does not inherit it. torch.compile guards on
    it, so that a function compiled under both gets two graphs.
    """
    if torch.compiler.is_compiling():
        _thread.depth += 1
        try:
            yield
        finally:
            _thread.depth -= 1
        return
    token = _context.set(True)
    _thread.depth += 1
    torch._C._stash_obj_in_tls(_STASH, True)
    try:
        yield
    finally:
        _context.reset(token)
        _thread.depth -= 1
        torch._C._stash_obj_in_tls(_STASH, _thread.depth > 0)


def using_reference() -> bool:
    """Whether public functions must run their reference; read beside only where graphs are kept."""
    if torch.compiler.is_compiling():
        return _thread.depth > 0
    inside = _context.get()
    if inside is None and torch._C._current_graph_task_id() != -1:  # in a thread of autograd's
        inside = torch._C._is_key_in_tls(_STASH) and torch._C._get_obj_in_tls(_STASH)
    return bool(inside)


def needs_function(*tensors: Tensor | None) -> bool:
    """Whether a call must go through its autograd.Function: where a gradient is recorded.

    Inside transforms of torch.func tensors do not tell; the Function does right by all of them.
    """
    refuse_forward_mode()
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return True
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
