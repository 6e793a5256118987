"""What the tests of the ops share: samples of calls, the op calls they make, comparisons.

Every `tests/ops/test_<op>.py` defines `samples(dtype, device)`, which yields `Sample`s, and
`LAUNCHERS`, the launcher of each op that it registers; `test_all_ops.py` does the rest.
"""

import copy
import dataclasses
import importlib
import inspect
import pkgutil
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import tests.ops
from cgkernels import random
from cgkernels.library import OPS
from cgkernels.testing import assert_within_budget, guarded

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)

KERNEL_DEVICES = [
    pytest.param("cpu", marks=pytest.mark.kernel),
    pytest.param("cuda", marks=pytest.mark.cuda),
]
"""Where kernels run: on CPU tensors by their launchers, interpreted; on a GPU as users run them."""


# Samples ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sample:
    """A call of a public function, fn(**inputs), and what it promises.

    differentiable: names of the inputs that have gradients. per_row: names of those with one entry
    for each sample of the batch, or two (a doubled batch). mutates: names of those written.
    """

    label: str
    fn: Callable
    inputs: dict[str, Any]
    differentiable: tuple[str, ...] = ()
    per_row: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.inputs.items() if isinstance(value, Tensor)}

    @property
    def batch(self) -> int:
        value = self.inputs[self.per_row[0]]
        return value.shape[0] if isinstance(value, Tensor) else value[0]

    def replace(self, **inputs: Any) -> "Sample":
        return dataclasses.replace(self, inputs={**self.inputs, **inputs})

    def run(self) -> tuple[Tensor, ...]:
        """What is returned and what is written; self.inputs stay as they are."""
        return self.call(copy.deepcopy(self.inputs))

    def call(self, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        returned = self.fn(**inputs)
        returned = returned if isinstance(returned, tuple) else (returned,)
        return *returned, *(inputs[name] for name in self.mutates)

    def take(self, rows: Sequence[int]) -> "Sample":
        """The same call for some samples of the batch, in any order; each keeps its number."""
        taken = {name: self.inputs[name] for name in self.per_row}
        if "index" in inspect.signature(self.fn).parameters and "index" not in taken:
            device = next((t.device for t in self.tensors.values()), "cpu")
            taken["index"] = torch.arange(self.batch, device=device)
        for name, value in taken.items():
            if isinstance(value, Tensor):
                parts = value.split(self.batch) if self.batch else [value]
                taken[name] = torch.cat([part[list(rows)] for part in parts])
            else:  # a shape
                taken[name] = (len(rows), *value[1:])
        return self.replace(**taken)


def op_modules() -> list[types.ModuleType]:
    """The test modules of the ops."""
    names = [m.name for m in pkgutil.iter_modules(tests.ops.__path__)]
    return [importlib.import_module(f"tests.ops.{n}") for n in names if n.startswith("test_")]


def every_sample(**only: Any) -> list[Any]:
    """Parameters (module, label) for pytest: all samples of all ops, or those with a property."""
    return [
        pytest.param(module, sample.label, id=f"{module.__name__[15:]}: {sample.label}")
        for module in op_modules()
        for sample in module.samples(torch.float32, "cpu")
        if all(bool(getattr(sample, name)) == value for name, value in only.items())
    ]


def sample_of(module, label, dtype=torch.float32, device="cpu") -> Sample:
    return next(s for s in module.samples(dtype, torch.device(device)) if s.label == label)


def normals(*shape: int, dtype=torch.float32, device="cpu", seed=0) -> Tensor:
    """Test data; equal on every device, and equal before rounding in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


# Op calls -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class OpCall:
    """A call of a registered op, as a public function or its backward made it."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]

    @property
    def name(self) -> str:
        return self.op._schema.name.removeprefix("cgkernels::")

    def run(self, implementation: Callable | None = None) -> tuple[Tensor, ...]:
        """What the op, or an implementation of it, returns and writes; self.args stay."""
        args = copy.deepcopy(self.args)
        returned = (implementation or self.op)(*args)
        returned = () if returned is None else returned
        returned = returned if isinstance(returned, tuple | list) else (returned,)
        return *returned, *(args[i] for i in self.written)

    @property
    def written(self) -> list[int]:
        """Places of the arguments that the schema declares as written, where they are given."""
        infos = [argument.alias_info for argument in self.op._schema.arguments]
        return [
            i for i, info in enumerate(infos)
            if info is not None and info.is_write and self.args[i] is not None
        ]  # fmt: skip

    def map(self, function: Callable[[Tensor], Tensor]) -> "OpCall":
        """The call with every tensor replaced."""
        return dataclasses.replace(self, args=tree_map_only(Tensor, function, self.args))

    def wide(self) -> "OpCall":
        """The call in float64, on the same values."""
        def widen(value):
            return torch.float64 if isinstance(value, torch.dtype) else value

        call = self.map(lambda t: t.double() if t.is_floating_point() else t)
        return dataclasses.replace(call, args=tuple(map(widen, call.args)))


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[OpCall] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in OPS.values():
            full = [
                args[i] if i < len(args) else argument.default_value
                for i, argument in enumerate(func._schema.arguments)
            ]
            detached = tree_map_only(Tensor, Tensor.detach, tuple(full))
            self.calls.append(OpCall(func, copy.deepcopy(detached)))
        return func(*args, **(kwargs or {}))


def op_calls(sample: Sample) -> list[OpCall]:
    """The op calls of a sample and of its backward, for dense and for expanded gradients."""
    inputs = copy.deepcopy(sample.inputs)
    wanted = [inputs[name].requires_grad_() for name in sample.differentiable]
    with _Recorder() as recorder:
        outputs = sample.call(inputs)
        if wanted:
            outputs = [out for out in outputs if out.requires_grad]
            for make in (
                lambda i, out: normals(*out.shape, dtype=out.dtype, device=out.device, seed=i),
                lambda i, out: torch.ones((), dtype=out.dtype, device=out.device).expand_as(out),
            ):
                gradients = [make(i, out) for i, out in enumerate(outputs)]
                torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)
    return recorder.calls


# Kernels ------------------------------------------------------------------------------------------
def launchers() -> dict[str, Callable]:
    return {name: run for module in op_modules() for name, run in module.LAUNCHERS.items()}


def kernel_results(call: OpCall, *, order_seed: int = 0) -> tuple[Tensor, ...]:
    """What the kernels return and write, in guarded memory; other arguments must stay as they are.

    CPU tensors go to the launcher, in the interpreter and sanitized; CUDA tensors to the op.
    """
    places = [i for i, a in enumerate(call.args) if isinstance(a, Tensor)]
    if call.args[places[0]].is_cuda:
        run, watch = call.op, contextlib_null()
    else:
        from tests.interpreter import sanitize  # needs Triton

        run, watch = launchers()[call.name], sanitize(order_seed=order_seed)
    with guarded(*(call.args[i] for i in places)) as copies:
        args = list(call.args)
        for i, tensor in zip(places, copies, strict=True):
            args[i] = tensor
        with watch:
            returned = run(*args)
        for i in places:
            if i not in call.written:
                assert_equal(args[i], call.args[i])
        returned = () if returned is None else returned
        returned = returned if isinstance(returned, tuple | list) else (returned,)
        return *returned, *(args[i].clone() for i in call.written)
