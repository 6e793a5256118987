"""Make Triton's CPU interpreter fit for tests.

    install_bf16   bfloat16 arithmetic as on the GPU (the interpreter alone computes on bit
                   patterns); maxima and minima that lose NaN, as the GPU's do unless told otherwise
    sanitize       finds accesses outside the tensors, and races between programs
    ghost          stubs every launch; GhostReplay lists the tests that pass all the same

All of it patches private parts of Triton (3.6 to 3.9), so it belongs to tests only, and to
processes with TRITON_INTERPRET=1, where nothing is compiled.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.runtime.jit import KernelInterface

from cgkernels.testing import poisoned_empty


def _require_interpreter() -> None:
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before Triton is imported")


# 1. bfloat16 --------------------------------------------------------------------------------------
# The interpreter keeps bfloat16 as uint16 and computes + * - max, comparisons, reductions, scans
# and dots on those integers without an error; its cast from float32 truncates. Here operands are
# widened to float32, and results rounded to nearest even. Not modeled: tl.sum and tl.cumsum of
# bfloat16 add in bfloat16 on the GPU (cast to float32 first in the kernel); bfloat16 atomics raise;
# casts to float8; TF32.

# Empty stubs in the interpreter; rint rounds halves to even as torch.round does.
_LIBDEVICE: dict[str, Callable] = {
    "tanh": torch.tanh,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "tan": torch.tan,
    "atan2": torch.atan2,
    "erf": torch.erf,
    "erfinv": torch.erfinv,
    "expm1": torch.expm1,
    "log1p": torch.log1p,
    "pow": torch.pow,
    "rsqrt": torch.rsqrt,
    "lgamma": torch.lgamma,
    "trunc": torch.trunc,
    "rint": torch.round,
}

_installed = False


def install_bf16() -> None:
    """Give the interpreter of this process bfloat16 and libdevice; a second call does nothing."""
    global _installed
    _require_interpreter()
    if _installed:
        return
    _installed = True
    if not hasattr(interpreter._interpreter, "fma_fp32"):  # 3.6 rounds the product, too
        InterpreterBuilder.create_fma = _fma
    for name, function in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):  # 3.6: NaN
        setattr(InterpreterBuilder, name, _binary(function))
    for name in ("binary_op", "unary_op", "create_fma", "create_clampf", "create_dot"):
        setattr(InterpreterBuilder, name, _in_float32(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = _fp_to_fp(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.get_bf16 = lambda self, value: _narrow(self.get_fp32(value))  # not in 3.6
    for ops in (interpreter.ReduceOps, interpreter.ScanOps):
        ops.apply_impl = _reduce_in_float32(ops.apply_impl)
    for name, function in _LIBDEVICE.items():
        setattr(libdevice, name, _on_arrays(function))


def _fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """x y + z, rounded once but for a rare double rounding; the product is exact in float64."""
    wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)


def _binary(function: Callable) -> Callable:
    return lambda self, x, y: self.binary_op(x, y, function)


def _is_bf16(value: Any) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _widen(value: Any) -> Any:
    if not _is_bf16(value):
        return value
    return TensorHandle((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(_round_to_nearest_even(handle.data), tl.bfloat16)


def _round_to_nearest_even(x: np.ndarray) -> np.ndarray:
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def _in_float32(method: Callable) -> Callable:
    """A builder method whose result has the dtype of its last operand (tl.dot: the accumulator)."""

    def wrapped(self, *args):
        handles = [a for a in args if isinstance(a, TensorHandle)]
        out = method(self, *map(_widen, args))
        if not _is_bf16(handles[-1]):
            return out
        return TensorHandle(out.data, tl.int1) if out.data.dtype == np.bool_ else _narrow(out)

    return wrapped


def _cast(method: Callable) -> Callable:
    def wrapped(self, src, dst_type):
        to_bf16 = dst_type.scalar == tl.bfloat16
        if to_bf16 and not _is_bf16(src):
            return _narrow(method(self, src, tl.float32))
        return method(self, src if to_bf16 else _widen(src), dst_type)

    return wrapped


def _fp_to_fp(method: Callable) -> Callable:
    """Casts with a rounding mode, and to and from float8; truncation (rtz) is already right."""

    def wrapped(self, src, dst_type, rounding_mode):
        to_bf16 = dst_type.scalar == tl.bfloat16
        if to_bf16 and rounding_mode != interpreter._ir.ROUNDING_MODE.RTZ:
            wide = src if src.dtype.scalar == tl.float32 else method(self, src, tl.float32, None)
            return _narrow(wide)
        return method(self, src if to_bf16 else _widen(src), dst_type, rounding_mode)

    return wrapped


def _reduce_in_float32(method: Callable) -> Callable:
    def wrapped(self, inputs):
        was_bf16 = [_is_bf16(t.handle) for t in inputs]
        wide = tuple(
            self.to_tensor(_widen(t.handle).data, tl.float32) if bf16 else t
            for t, bf16 in zip(inputs, was_bf16, strict=True)
        )
        out = method(self, wide)
        outs = out if isinstance(out, list | tuple) else (out,)
        return [  # argmax of one tensor gives a value and an index
            self.to_tensor(_round_to_nearest_even(t.handle.data), tl.bfloat16) if bf16 else t
            for t, bf16 in zip(outs, [*was_bf16, False], strict=False)
        ]

    return wrapped


def _on_arrays(function: Callable) -> Callable:
    def wrapped(*args, **_):
        first = next(a for a in args if isinstance(a, tl.core.tensor))
        if first.dtype not in (tl.float32, tl.float64):
            raise TypeError(f"libdevice takes float32 or float64, got {first.dtype}")
        dtype = first.handle.data.dtype
        data = [a.handle.data if isinstance(a, tl.core.tensor) else a for a in args]
        out = function(*(torch.from_numpy(np.array(x, dtype)) for x in data)).numpy()
        return tl.core.tensor(TensorHandle(out, first.dtype), first.type)

    return wrapped


# 2. Sanitizer -------------------------------------------------------------------------------------
class SanitizerError(AssertionError):
    """A kernel touched memory that it must not touch, or two of its programs raced."""


@contextlib.contextmanager
def sanitize(*, order_seed: int | None = None, reads: bool = True) -> Iterator[None]:
    """Check every interpreted launch in this block; a finding raises SanitizerError.

    bounds   each active lane of each load, store and atomic lies inside one of the tensor
             arguments, between its first and its last element;
    writes   no two programs store different bits to one address;
    reads    no program loads an address that another program stores, unless it stored the same
             there itself, or the store came before an acquire-release atomic of the other program
             whose address its own atomic found afterwards (as where the last program merges).

    Args:
        order_seed: run the programs of each launch in a shuffled order; the result must not change.
        reads: False for kernels whose programs read what others stored, in any order.

    Not seen: an access that lands inside another argument, or in the gaps of a strided one
    (`cgkernels.testing.guarded` finds those that write or spoil a value); races inside one program,
    between accesses of different width, or with atomics.
    """
    _require_interpreter()
    watch = _Watch(reads, order_seed)
    try:
        with contextlib.ExitStack() as stack:
            for owner, name, wrapper in watch.wrappers():
                original = getattr(owner, name)
                stack.enter_context(mock.patch.object(owner, name, wrapper(original)))
            yield
    except InterpreterError as error:
        cause: BaseException = error
        while isinstance(cause, InterpreterError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, SanitizerError):
            raise cause from None
        raise


class _Watch:
    """What the launch in progress may touch, and what its programs have touched."""

    def __init__(self, reads: bool, order_seed: int | None) -> None:
        self.reads, self.order_seed = reads, order_seed
        self.order: np.ndarray | None = None
        self.grid, self.program = (1, 1, 1), (0, 0, 0)
        self._forget()

    def _forget(self):
        """Start a launch. A program's stretch between two of its atomics is a phase."""
        self.loads: list = []
        self.stores: list = []
        self.phase = 0  # the present one, numbered through the launch
        self.known: set[int] = set()  # phases whose stores the program may read
        self.may_read = [self.known]  # of each phase
        self.released: dict[int, set[int]] = {}  # phases that an atomic on an address ended

    def wrappers(self) -> Iterator[tuple[type, str, Callable]]:
        yield GridExecutor, "__call__", self._wrap_launch
        yield InterpreterBuilder, "set_grid_dim", self._wrap_set_grid_dim
        yield InterpreterBuilder, "set_grid_idx", self._wrap_set_grid_idx
        yield InterpreterBuilder, "create_masked_load", self._wrap_load
        yield InterpreterBuilder, "create_masked_store", self._wrap_store
        yield InterpreterBuilder, "create_atomic_rmw", self._wrap_atomic_rmw
        yield InterpreterBuilder, "create_atomic_cas", self._wrap_atomic_cas

    def _wrap_launch(self, original):
        def launch(executor, *args, **kwargs):
            self.kernel = executor.fn.__name__
            self._set_spans([*zip(executor.arg_names, args, strict=False), *kwargs.items()])
            self._forget()
            original(executor, *args, **kwargs)
            self._check_races()

        return launch

    def _wrap_set_grid_dim(self, original):
        def set_grid_dim(builder, *grid):
            self.grid = grid
            if self.order_seed is not None:
                self.order = np.random.default_rng(self.order_seed).permutation(np.prod(grid))
            return original(builder, *grid)

        return set_grid_dim

    def _wrap_set_grid_idx(self, original):
        def set_grid_idx(builder, *program):
            if self.order is not None:
                shuffled = self.order[np.ravel_multi_index(program, self.grid)]
                program = tuple(int(i) for i in np.unravel_index(shuffled, self.grid))
            self.program = program
            self.known = set()
            self._next_phase()
            return original(builder, *program)

        return set_grid_idx

    def _wrap_load(self, original):
        def load(builder, pointers, mask, *args, **kwargs):
            addresses = self._check_bounds(pointers, mask.data, "load")
            if self.reads:
                phase = np.full(addresses.size, self.phase)
                self.loads.append((addresses, self._program_of(addresses), phase))
            return original(builder, pointers, mask, *args, **kwargs)

        return load

    def _wrap_store(self, original):
        def store(builder, pointers, value, mask, *args, **kwargs):
            addresses = self._check_bounds(pointers, mask.data, "store")
            stored = _active(value.data, mask.data, pointers.data.shape)
            bits = stored.view(f"u{stored.itemsize}").astype(np.uint64)
            phase = np.full(addresses.size, self.phase)
            self.stores.append((addresses, self._program_of(addresses), phase, bits))
            return original(builder, pointers, value, mask, *args, **kwargs)

        return store

    def _wrap_atomic_rmw(self, original):
        def atomic_rmw(builder, operation, pointers, value, mask, *args):
            addresses = self._check_bounds(pointers, mask.data, "atomic")
            if interpreter._ir.MEM_SEMANTIC.ACQUIRE_RELEASE in args:
                self._synchronize(addresses)
            return original(builder, operation, pointers, value, mask, *args)

        return atomic_rmw

    def _wrap_atomic_cas(self, original):
        def atomic_cas(builder, pointers, *args):
            self._check_bounds(pointers, np.True_, "atomic")
            return original(builder, pointers, *args)

        return atomic_cas

    def _synchronize(self, addresses):
        """Learn what was released at these addresses, and release what is known there."""
        places = [self.released.setdefault(int(a), set()) for a in addresses]
        self.known.update(*places)
        self.known.add(self.phase)
        for place in places:
            place |= self.known
        self._next_phase()

    def _next_phase(self):
        self.phase += 1
        self.known = set(self.known)
        self.may_read.append(self.known)

    def _set_spans(self, arguments):
        """Sort the byte ranges of the arguments, and join those that overlap."""
        starts, ends, names = [0], [0], ["(nothing)"]  # so that every address has a span below it
        for start, end, name in sorted(s for arg in arguments for s in _spans(*arg)):
            if start < ends[-1]:
                ends[-1] = max(end, ends[-1])
                names[-1] += f"/{name}"
            else:
                starts.append(start)
                ends.append(end)
                names.append(name)
        self.starts, self.ends = np.array(starts, np.uint64), np.array(ends, np.uint64)
        self.names = names

    def _check_bounds(self, pointers, mask, what):
        """Return the addresses of the active lanes."""
        addresses = _active(pointers.data, mask, pointers.data.shape)
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        below = np.searchsorted(self.starts, addresses, side="right") - 1
        outside = addresses + size > self.ends[below]
        if outside.any():
            first = int(np.argmax(outside))
            span = below[first]
            raise SanitizerError(
                f"{self.kernel}: out-of-bounds {what}, {int(outside.sum())} of {addresses.size} "
                f"lanes, program {self.program}: first at "
                f"{int(addresses[first]) - int(self.ends[span])} bytes past the end of "
                f"{self.names[span]}"
            )
        return addresses

    def _program_of(self, addresses):
        return np.full(addresses.size, np.ravel_multi_index(self.program, self.grid))

    def _check_races(self):
        if not self.stores:
            return
        address, program, phase, bits = (np.concatenate(c) for c in zip(*self.stores, strict=True))
        order = np.lexsort((program, address))
        address, program, phase, bits = (c[order] for c in (address, program, phase, bits))
        clash = (np.diff(address) == 0) & (np.diff(program) != 0) & (bits[1:] != bits[:-1])
        if clash.any():
            i = int(np.argmax(clash))
            raise SanitizerError(
                f"{self.kernel}: write-write race, programs {program[i]} and {program[i + 1]} "
                f"store different values to one address ({int(clash.sum())} conflicts)"
            )
        if not self.loads:
            return
        read, reader, when = (np.concatenate(c) for c in zip(*self.loads, strict=True))
        lowest = np.searchsorted(address, read, side="left")  # of the programs that store there
        highest = np.searchsorted(address, read, side="right") - 1
        own = np.isin(_pairs(read, reader), _pairs(address, program))
        for at in (np.minimum(lowest, address.size - 1), np.maximum(highest, 0)):
            clash = (address[at] == read) & (program[at] != reader) & ~own
            clash[clash] = [
                stored not in self.may_read[now]
                for stored, now in zip(phase[at][clash], when[clash], strict=True)
            ]
            if clash.any():
                i = int(np.argmax(clash))
                raise SanitizerError(
                    f"{self.kernel}: read-write race, program {reader[i]} loads what program "
                    f"{program[at[i]]} stores ({int(clash.sum())} lanes)"
                )


def _pairs(address, program):
    """One number for each pair, different but by chance."""
    return address.astype(np.uint64) * np.uint64(1_000_003) + program.astype(np.uint64)


def _active(data, mask, shape):
    shape = np.broadcast_shapes(shape, np.shape(mask))
    return np.broadcast_to(data, shape)[np.broadcast_to(mask, shape).astype(bool)].ravel()


def _spans(name: str, value: Any) -> Iterator[tuple[int, int, str]]:
    """(first byte, one past the last byte, name) of every tensor in an argument."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from _spans(name, item)
    elif hasattr(value, "block_shape"):  # TensorDescriptor
        yield from _spans(name, value.base)
    elif isinstance(value, torch.Tensor) and value.numel():
        last = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
        start = value.data_ptr()
        yield start, start + (last + 1) * value.element_size(), name


# 3. Ghost replay ----------------------------------------------------------------------------------
@contextlib.contextmanager
def ghost() -> Iterator[list[str]]:
    """Launch nothing in this block; yields the names of the kernels asked for, in order."""
    launched: list[str] = []

    def stub(kernel, grid):
        return lambda *args, **kwargs: launched.append(kernel.__name__)

    with mock.patch.object(KernelInterface, "__getitem__", stub), poisoned_empty():
        yield launched


class GhostReplay:
    """Pytest plugin (--ghost): run the tests with every kernel stubbed.

    A test that launches a kernel and passes without it is a survivor: its assertion is too weak, or
    the result comes from elsewhere. The exit status is 0 if nothing survives and something failed
    for want of its kernel. Failures are what one wants to see.
    """

    def __init__(self) -> None:
        self.outcomes: dict[str, list[str]] = {"killed": [], "survived": [], "no kernel": []}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        with ghost() as launched:
            item.user_properties.append(("launched", launched))  # travels with the report
            return (yield)

    def pytest_runtest_logreport(self, report):
        if report.when != "call" or report.skipped:
            return
        launched = sorted(set(dict(report.user_properties)["launched"]))
        outcome = "survived" if report.passed else "killed"
        line = f"{report.nodeid}: {', '.join(launched) or 'launches nothing'}"
        self.outcomes[outcome if launched else "no kernel"].append(line)

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("ghost replay")
        for line in self.outcomes["survived"]:
            terminalreporter.write_line(f"SURVIVED {line}")
        counts = ", ".join(f"{len(tests)} {name}" for name, tests in self.outcomes.items())
        terminalreporter.write_line(counts)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            good = self.outcomes["killed"] and not self.outcomes["survived"]
            session.exitstatus = pytest.ExitCode.OK if good else pytest.ExitCode.TESTS_FAILED
