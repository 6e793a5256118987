"""What the tests of the ops share: samples of calls, the op calls they make, comparisons.

Every `tests/ops/test_<op>.py` defines `samples(dtype, device)`, which yields `Sample`s, and
`LAUNCHERS`, the launcher of each op that it registers; `test_all_ops.py` does the rest.
"""

import contextlib
import copy
import dataclasses
import importlib
import inspect
import itertools
import math
import os
import pkgutil
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import tests.ops
from cgkernels import random
from cgkernels.library import OPS
from cgkernels.testing import (
    Launch,
    assert_within_budget,
    float32_normals,
    guarded,
    plain_and_modeled,
)

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)

KERNEL_DEVICES = [
    pytest.param("cpu", marks=pytest.mark.kernel),
    pytest.param("cuda", marks=pytest.mark.cuda),
]
"""Where kernels run: on CPU tensors by their launchers, interpreted; on a GPU as users run them."""


# Other libraries ----------------------------------------------------------------------------------
class Peer:
    """A module of another library (`pytest.mark.peers`), imported when first used.

    So its tests can be collected, and counted, where it is not installed.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


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

    def map(self, function: Callable[[Tensor], Tensor]) -> "Sample":
        """The same call with every tensor replaced."""
        return self.replace(**{name: function(t) for name, t in self.tensors.items()})

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


def every_sample(*, costly: bool = False, **only: Any) -> list[Any]:
    """Parameters (module, label) for pytest: all samples of all ops, or those with a property.

    costly: of each function all but the few samples with most kinds of arguments are slow.
    """
    parameters = []
    for module in op_modules():
        samples = list(module.samples(torch.float32, torch.device("cpu")))
        needed = diverse(samples) if costly else {sample.label for sample in samples}
        for sample in samples:
            if all(bool(getattr(sample, name)) == value for name, value in only.items()):
                marks = [] if sample.label in needed else [pytest.mark.slow]
                name = f"{module.__name__.removeprefix('tests.ops.test_')}: {sample.label}"
                parameters.append(pytest.param(module, sample.label, id=name, marks=marks))
    return parameters


def diverse(samples: list[Sample], most: int = 3) -> set[str]:
    """Labels of a few samples of each function, in which most arguments of all are, in kind.

    Which code a call takes is decided by the dtypes and ranks of its tensors, by what is given at
    all, and by what is no number; the rest is values, sizes and strides.
    """

    def kind(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype, value.dim()
        if isinstance(value, tuple | list):
            return len(value)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return type(value) if is_number else value

    chosen = set()
    for fn in {sample.fn: None for sample in samples}:
        of_fn = [sample for sample in samples if sample.fn is fn]
        names = {name for sample in of_fn for name in sample.inputs}
        kinds = {
            sample.label: {(name, kind(sample.inputs.get(name, "absent"))) for name in names}
            for sample in of_fn
        }
        missing = set().union(*kinds.values())
        for _ in range(most):
            best = max(kinds, key=lambda label: len(kinds[label] & missing))
            if kinds[best] & missing:
                chosen.add(best)
            missing -= kinds[best]
    return chosen


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

    def run(self) -> tuple[Tensor, ...]:
        """What the op returns and writes; self.args stay as they are."""
        return self.results(self.op, copy.deepcopy(self.args))

    def results(self, run: Callable, args: Sequence[Any]) -> tuple[Tensor, ...]:
        returned = run(*args)
        if returned is None:
            returned = ()
        elif isinstance(returned, Tensor):
            returned = (returned,)
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

        call = self.map(_wide)
        return dataclasses.replace(call, args=tuple(map(widen, call.args)))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[OpCall] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in OPS.values():
            detached = tree_map_only(Tensor, Tensor.detach, args)
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


# What is not finite -------------------------------------------------------------------------------
def spoiled(tensors: dict[Any, Tensor]) -> Iterator[tuple[str, Any, Tensor]]:
    """(words, key, the tensor with one value that is not finite), of each floating tensor.

    NaN, inf and -inf, of which each tensor has another first, another in the middle and at the end.
    """
    for turn, (key, tensor) in enumerate(tensors.items()):
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        places = {"first": 0, "middle": tensor.numel() // 2, "last": tensor.numel() - 1}
        for i, (place, number) in enumerate(places.items()):
            value = (math.nan, math.inf, -math.inf)[(turn + i) % 3]
            changed = copy.deepcopy(tensor.detach())
            changed[torch.unravel_index(torch.tensor(number), tensor.shape)] = value
            yield f"{key}: {value} {place}", key, changed


def assert_nothing_hidden(
    actual: Sequence[Tensor],
    expected: Sequence[Tensor],
    words: str,
    *,
    exact: bool = True,
    eps: float | None = None,
) -> None:
    """Not finite where expected is not; exact: nowhere else, and elsewhere near it."""
    for i, (got, true) in enumerate(zip(actual, expected, strict=True)):
        got, true = got.detach().cpu(), true.detach().cpu()
        finite = true.isfinite()
        differ = got.isfinite() != finite if exact else got.isfinite() & ~finite
        where = f"{words}, result {i}"
        assert not differ.any(), f"{where}: {got[differ][:3]} for {true[differ][:3]}"
        if exact:
            near = 100 * torch.finfo(got.dtype).eps if got.is_floating_point() else 0
            near = near if eps is None else eps
            torch.testing.assert_close(
                got[finite], true[finite], rtol=near, atol=near, msg=lambda m, w=where: f"{w}: {m}"
            )


# Kernels ------------------------------------------------------------------------------------------
def launchers() -> dict[str, Callable]:
    return {name: run for module in op_modules() for name, run in module.LAUNCHERS.items()}


def module_of(launcher: Callable) -> str:
    """The module that defines the op of a launcher; of an op that is a folder, the package."""
    return ".".join(launcher.__module__.split(".")[:3])


@contextlib.contextmanager
def kernels(device: str, *, order_seed: int = 0) -> Iterator[None]:
    """Within, public functions run their kernels on tensors of this device.

    CPU tensors otherwise go to the plain implementations; here they go to the launchers, in the
    interpreter and sanitized.
    """
    if device == "cuda":
        yield
        return
    from tests.interpreter import sanitize  # needs Triton

    with launching(), sanitize(order_seed=order_seed):
        yield


@contextlib.contextmanager
def launching() -> Iterator[None]:
    """Within, public functions call launchers where they would call ops, on any device."""
    with contextlib.ExitStack() as stack:
        for name, launcher in launchers().items():
            op_module = sys.modules[module_of(launcher)]
            place = next(n for n, value in vars(op_module).items() if value is OPS[name])
            stack.enter_context(mock.patch.object(op_module, place, launcher))
        yield


def kernel_results(call: OpCall, *, order_seed: int = 0) -> tuple[Tensor, ...]:
    """What the kernels return and write, in guarded memory; other arguments must stay as they are.

    CPU tensors go to the launcher, in the interpreter and sanitized; CUDA tensors to the op.
    """
    places = [i for i, a in enumerate(call.args) if isinstance(a, Tensor)]
    run, watch = call.op, contextlib.nullcontext()
    if not call.args[places[0]].is_cuda:
        from tests.interpreter import sanitize  # needs Triton

        run, watch = launchers()[call.name], sanitize(order_seed=order_seed)
    with guarded(*(call.args[i] for i in places)) as copies:
        args = list(call.args)
        for i, tensor in zip(places, copies, strict=True):
            args[i] = tensor
        with watch:
            results = call.results(run, args)
        for i in set(places) - set(call.written):
            assert_equal(args[i], call.args[i], equal_nan=True)
        return results


def assert_kernels_agree(call: OpCall, actual: Sequence[Tensor]) -> None:
    """Strides as the fake states them, values within the error budget."""
    for result, fake in zip(actual, fake_results(call), strict=True):
        assert result.stride() == fake.stride() or result.numel() == 0
    on_cpu = call.map(Tensor.cpu)
    with float32_normals():
        plain, modeled = plain_and_modeled(on_cpu.run)
    assert_accurate(actual, plain, on_cpu.wide().run(), modeled)


def assert_kernels_are_accurate(sample: Sample, device: str) -> None:
    """A whole public function with its kernels against plain PyTorch, within the error budget."""
    with kernels(device):
        actual = sample.run()
    on_cpu = sample.map(Tensor.cpu)
    with float32_normals():
        plain, modeled = plain_and_modeled(on_cpu.run)
    assert_accurate(actual, plain, on_cpu.map(_wide).run(), modeled)


def assert_accurate(
    actual: Sequence[Tensor],
    plain: Sequence[Tensor],
    exact: Sequence[Tensor],
    modeled: Sequence[Tensor],
) -> None:
    """The error budget, for each result; of any size.

    Values too few to have a root mean square are held to the maximum alone, whole numbers must be
    equal. Half types must be rounded once, from float32: all but a few values then are those of
    plain PyTorch, to the bit.
    """
    for got, same, true, model in zip(actual, plain, exact, modeled, strict=True):
        if not true.is_floating_point():
            assert_equal((got.cpu(), same), (true, true))
            continue
        if true.numel() >= 256:
            assert_within_budget(got, same, true, model)
            if got.dtype in HALVES:
                assert (got.cpu() != same).float().mean() < 0.01
            continue
        assert got.shape == same.shape == true.shape and got.dtype == same.dtype
        if true.numel():
            band = 2 * torch.finfo(got.dtype).eps * true.abs().max()
            error, *budgets = ((t.cpu().double() - true).abs().max() for t in (got, same, model))
            assert error <= 2 * max(budgets) + band


def fake_results(call: OpCall) -> tuple[Tensor, ...]:
    mode = FakeTensorMode()
    args = list(call.map(mode.from_tensor).args)
    with mode:
        return call.results(call.op, args)


def normal_of(element: Tensor, *, seed: int, index: int, step: int, stream: int) -> Tensor:
    """The float64 normals of any elements of one sample, straight from the contract."""
    counter = (element // 4, index & 0xFFFFFFFF, (index >> 32) & 0xFFFFFFFF, stream * 2**24 + step)
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    words = [torch.as_tensor(word).expand_as(element) for word in (*counter, *key)]
    w0, w1, w2, w3 = random.philox4x32(tuple(words[:4]), tuple(words[4:]))
    four = torch.stack([*random._box_muller(w0, w1), *random._box_muller(w2, w3)], -1)
    return four.gather(-1, (element % 4)[..., None])[..., 0]


# Comparisons --------------------------------------------------------------------------------------
def in_ulp(actual: Tensor, exact: Tensor) -> Tensor:
    """|actual - exact| in units of the last place of the float32 nearest to exact (float64)."""
    ulp = torch.ldexp(torch.ones_like(exact), torch.frexp(exact.float())[1] - 24)
    return (actual.cpu().double() - exact).abs() / ulp


def assert_equal(actual: Any, expected: Any, *, equal_nan: bool = False) -> None:
    """Equal in every bit (0.0 and -0.0 apart), with shapes and dtypes; strides may differ."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=equal_nan)


def assert_refused(sample: Sample, error: type[Exception], argument: str, *words: str) -> None:
    """The call raises this error, its message is about the argument, and nothing is written."""
    inputs = copy.deepcopy(sample.inputs)
    with pytest.raises(error) as raised:
        sample.call(inputs)
    assert type(raised.value) is error
    message = str(raised.value)
    assert message.startswith(f"{argument} ") and all(word in message for word in words), message
    for name, tensor in sample.tensors.items():
        if tensor.device.type != "meta":
            assert_equal(memory_of(inputs[name]), memory_of(tensor), equal_nan=True)


def memory_of(tensor: Tensor) -> Tensor:
    """All that lies in the tensor's memory, around a view too."""
    return tensor.detach().new_empty(0).set_(tensor.untyped_storage())


# torch.compile ------------------------------------------------------------------------------------
def compiled(sample: Sample) -> tuple[dict[str, int], Callable]:
    """sample.call compiled, and the number of graphs it was compiled to so far."""
    counts = {"forward": 0, "backward": 0}

    def counting(which):
        def compiler(graph, _):
            counts[which] += 1
            return make_boxed_func(graph.forward)

        return compiler

    forward = counting("forward")
    backend = aot_autograd(
        fw_compiler=forward, inference_compiler=forward, bw_compiler=counting("backward")
    )
    torch._dynamo.reset()
    return counts, torch.compile(sample.call, fullgraph=True, dynamic=True, backend=backend)


def one_of_each_dtype(launches: Iterable[Launch]) -> list[Launch]:
    """The first launch of each dtype that the labels name."""
    first: dict[str, Launch] = {}
    for launch in launches:
        if named := re.search(r"torch\.\w+", launch.label):
            first.setdefault(named[0], launch)
    assert len(first) > 1
    return list(first.values())


# Kills --------------------------------------------------------------------------------------------
class Killed(BaseException):
    """What stands for the end of a process."""


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Whether `work` was killed at this one of its writes, half done; nothing is written after."""
    writes = itertools.count()
    dead = False

    def killing(owner, name):
        original = getattr(owner, name)

        def write(*arguments, **options):
            nonlocal dead
            if dead:
                return None
            if next(writes) == number:
                dead = True
                if name == "write_bytes":
                    file, data = arguments
                    original(file, data[: len(data) // 2])
                raise Killed
            return original(*arguments, **options)

        return mock.patch.object(owner, name, write)

    with contextlib.ExitStack() as stack:
        for owner, names in ((os, ("replace", "fsync")), (Path, ("write_bytes", "unlink"))):
            for name in names:
                stack.enter_context(killing(owner, name))
        try:
            work()
        except Killed:
            return True
    return False
