"""The launches that a function makes, recorded without a GPU and without a value.

Inside `recording()` all runs on meta tensors: every call of an op of `cgkernels` is written down
with its arguments, and turned into what a GPU would be asked to launch.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ops import LAUNCHES
from cgkernels.library import OPS
from cgkernels.rows import memory_format
from cgkernels.testing import Launch

_NAMES = {op: name for name, op in OPS.items()}

Key = tuple[Any, ...]
Calls = dict[Key, tuple[Any, ...]]
"""Arguments of calls by what tells them apart: the op, and all that a launcher sees of each."""

# A loop that has asked for nothing new in so many calls of ops asks for nothing new.
_REPEATS = 1000
_ALIGNED = 16  # bytes


class _Repeats(Exception):
    """The function goes on with what is known."""


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = {}
        self.repeats = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _NAMES:
            key = (_NAMES[func], *map(_seen, args))
            self.repeats = self.repeats + 1 if key in self.calls else 0
            if self.repeats > _REPEATS:
                raise _Repeats
            self.calls.setdefault(key, tuple(map(_detached, args)))
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            # As cuDNN lays it out; on meta tensors, which have no backend, it is contiguous.
            return result.contiguous(memory_format=_format_of_convolution(*args[:2]))
        return result


def _format_of_convolution(x: Tensor, weight: Tensor) -> torch.memory_format:
    last = any(t.dim() == 4 and memory_format(t) == torch.channels_last for t in (x, weight))
    return torch.channels_last if last else torch.contiguous_format


def _seen(value: Any) -> Any:
    if isinstance(value, Tensor):
        offset = value.storage_offset() * value.element_size() % _ALIGNED
        return value.shape, value.stride(), value.dtype, offset
    return tuple(value) if isinstance(value, list) else value


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


@contextlib.contextmanager
def recording() -> Iterator[Calls]:
    """Yields the different calls so far; a loop that only repeats them is left."""
    autocast, enabled, recorder = torch.autocast, torch.is_autocast_enabled, _Recorder()

    # There is none for meta tensors, not even to be switched off or asked for.
    def of_meta(device: str, *args: Any, **options: Any) -> Any:
        return contextlib.nullcontext() if device == "meta" else autocast(device, *args, **options)

    def enabled_of_meta(device: str) -> bool:
        return device != "meta" and enabled(device)

    with (
        mock.patch.object(torch, "autocast", of_meta),
        mock.patch.object(torch, "is_autocast_enabled", enabled_of_meta),
        contextlib.suppress(_Repeats),
        recorder,
    ):
        yield recorder.calls


def launch_of(key: Key, args: tuple[Any, ...], label: str) -> tuple[str, Launch]:
    """The op of a recorded call, and what it launches; accesses of no width are promised."""
    op = key[0]
    launcher: Callable[..., object] = next(LAUNCHES[op]()).run.func
    first = next(a for a in args if isinstance(a, Tensor))
    shape = "x".join(map(str, first.shape))
    return op, Launch(f"{label} {shape} {first.dtype}", partial(launcher, *args))
