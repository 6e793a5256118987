"""Whether kernels are right on a GPU: every launch of an op, alone and in a CUDA graph; the models.

What is judged is `benchmarks.ops.LAUNCHES`, whose meta arguments are made real. Functions raise
AssertionError where something is wrong, `Skipped` where it cannot be told here, and return what is
worth knowing in words. Those of the ops run on any device.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import cgkernels
from cgkernels import random
from cgkernels.testing import (
    assert_within_budget,
    float32_normals,
    guarded,
    plain_and_modeled,
    poisoned_empty,
)
from cgkernels.timing import cuda_syncs

_LEAST_VALUES = 256  # what the error budget needs to be a judgment
_REPEATS = 20  # of a call that must give the same bits
_LARGE = 2**26  # elements; beyond, float64 on the CPU takes too long
_SLICE = 2**16  # elements of a large result that are compared all the same
_ROWS = 4  # samples of a model

Op = torch._ops.OpOverload
Run = Callable[..., Any]


class Skipped(Exception):
    """A check that cannot be made here, and why."""


# Ops ----------------------------------------------------------------------------------------------
def materialize(
    args: Sequence[Any], seed: int, device: torch.device, zero: Sequence[int] = ()
) -> list[Any]:
    """The arguments with random values in place of meta tensors, laid out in memory as they are.

    Floats are normal; integers are in [0, 16), which is a row of every table, but zero at the
    places that are named, as counters are for an op that counts. Columns of tables
    have signs by turns, so that a lower limit is below the upper one that follows it. Numbers of
    rows are positive, as temperatures are.
    """
    generator = torch.Generator(device if is_large(args) else "cpu").manual_seed(seed)

    def filled(meta: Tensor) -> Tensor:
        count = meta.untyped_storage().nbytes() // meta.element_size()
        kind: dict[str, Any] = {
            "dtype": meta.dtype, "generator": generator, "device": generator.device
        }  # fmt: skip
        if meta.is_floating_point():
            memory = torch.randn(count, **kind)
            memory = memory.abs() if meta.dim() == 1 else memory
        else:
            memory = torch.randint(16, (count,), **kind)
        made = memory.to(device).as_strided(meta.shape, meta.stride(), meta.storage_offset())
        if made.is_floating_point() and made.dim() == 2:
            made.abs_()[:, ::2].neg_()
        return made

    made = [filled(a) if isinstance(a, Tensor) else a for a in args]
    for place in zero:
        if not made[place].is_floating_point():
            made[place].zero_()
    return made


def is_large(args: Sequence[Any]) -> bool:
    """Whether these are too many elements for a reference on the CPU."""
    return any(t.numel() > _LARGE for t in _tensors(args))


def written(op: Op, args: Sequence[Any]) -> list[int]:
    """Places of the arguments that the op writes to."""
    infos = [argument.alias_info for argument in op._schema.arguments]
    return [i for i, a in enumerate(infos) if a and a.is_write and args[i] is not None]


def results(op: Op, run: Run, args: Sequence[Any]) -> list[Tensor]:
    """What a call returns and writes; without empty tensors, which stand for what is not asked."""
    returned = run(*args)
    returned = returned if isinstance(returned, tuple) else (returned,)
    found = [*returned, *(args[i] for i in written(op, args))]
    return [t for t in found if t is not None and t.numel()]


def references(op: Op, args: Sequence[Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The results of the op on the CPU: in the dtypes of the arguments, in float64, as modeled."""

    def moved(value: Any, wide: bool) -> Any:
        if isinstance(value, torch.dtype):
            return torch.float64 if wide else value
        if not isinstance(value, Tensor):
            return value
        wide = wide and value.is_floating_point()
        return value.to("cpu", torch.float64 if wide else value.dtype, copy=True)

    with float32_normals():
        same, modeled = plain_and_modeled(lambda: results(op, op, [moved(a, False) for a in args]))
    return same, results(op, op, [moved(a, True) for a in args]), modeled


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal, NaN and signs of zero included."""

    def raw(piece: Tensor) -> Tensor:
        return piece.clone(memory_format=torch.contiguous_format).view(torch.uint8)

    pieces = (t.flatten().split(_LARGE) for t in (left, right))
    return left.shape == right.shape and all(
        torch.equal(raw(a), raw(b)) for a, b in zip(*pieces, strict=True)
    )


def judge(op: Op, args: Sequence[Any], run: Run, device: torch.device) -> str:
    """Asserts that run, on meta arguments made real, does what the op does on the CPU.

    In guarded memory, with NaN in all that is not written, and with equal bits when repeated.
    """
    if is_large(args):
        return _judge_large(op, args, run, device)
    found: list[tuple[list[Tensor], ...]] = []
    with poisoned_empty():
        while not found or min(len(found) * t.numel() for t in found[0][0]) < _LEAST_VALUES:
            given = materialize(args, len(found), device, written(op, args))
            places = [i for i, a in enumerate(given) if isinstance(a, Tensor)]
            with guarded(*(given[i] for i in places)) as copies:
                actual = list(given)
                for i, tensor in zip(places, copies, strict=True):
                    actual[i] = tensor
                found.append((results(op, run, actual), *references(op, given)))
                for i in set(places) - set(written(op, args)):
                    assert same_bits(actual[i], given[i]), f"argument {i} was written"
            if len(found) == 1:
                _assert_repeats(op, given, run, found[0][0])
    for i in range(len(found[0][0])):
        ours, same, exact, modeled = ([of_seed[part][i] for of_seed in found] for part in range(4))
        if not ours[0].is_floating_point():  # tokens: whole numbers have no budget
            wrong = sum(int((a.cpu() != b).sum()) for a, b in zip(ours, same, strict=True))
            assert not wrong, f"result {i}: {wrong} whole numbers are not those of the CPU"
            continue
        try:
            assert_within_budget(ours, same, exact, modeled)
        except AssertionError as error:
            raise AssertionError(f"result {i}: {error}") from error
    return ""


def _assert_repeats(op: Op, given: list[Any], run: Run, expected: list[Tensor]) -> None:
    places = written(op, given)
    for number in range(_REPEATS):
        fresh = [copy.deepcopy(a) if i in places else a for i, a in enumerate(given)]
        for i, pair in enumerate(zip(results(op, run, fresh), expected, strict=True)):
            assert same_bits(*pair), f"result {i}: run {number + 2} gives other bits than the first"


def _judge_large(op: Op, args: Sequence[Any], run: Run, device: torch.device) -> str:
    """No NaN is left, the same bits when repeated, and slices compared with float64."""
    sizes = [sum(t.nbytes for t in ts) for ts in (_tensors(args), results(op, op, args))]
    needed = sizes[0] + 3 * sizes[1] + 2**31  # of results three are alive at once
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        if needed > free:
            wants = f"needs {needed / 2**30:.0f} GiB of GPU memory"
            raise Skipped(f"{wants}, {free / 2**30:.0f} GiB are free")
    given = materialize(args, 0, device, written(op, args))
    with poisoned_empty():
        found = results(op, run, given)
        for i, result in enumerate(found):
            finite = all(bool(part.isfinite().all()) for part in result.flatten().split(_LARGE))
            assert finite, f"result {i} has NaN or infinity: not all of it was written"
        _assert_repeats(op, given, run, found)
    shape, numel = found[0].shape, found[0][0].numel()
    for start in (0, numel // 2 - _SLICE // 2, numel - _SLICE):
        part = slice(start, start + _SLICE)
        some = [
            a.flatten(1)[:, part] if isinstance(a, Tensor) and a.shape == shape else a
            for a in given
        ]
        with _numbered_from(start // 4):
            same, exact, modeled = references(op, some)
        actual = [result.flatten(1)[:, part] for result in found]
        for got, plain, true, model in zip(actual, same, exact, modeled, strict=True):
            assert_within_budget(got, plain, true, model)
    return f"three slices of {_SLICE} of {numel} elements compared"


def _numbered_from(quad: int) -> Any:
    """Inside, references draw the noise of the elements from 4 quad on."""
    plain = random.philox4x32

    def shifted(counter: random.Words, key: tuple[Tensor, Tensor]) -> random.Words:
        return plain((counter[0] + quad, *counter[1:]), key)

    return mock.patch.object(random, "philox4x32", shifted)


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]


# Graphs -------------------------------------------------------------------------------------------
def judge_graph(op: Op, args: Sequence[Any], run: Run, device: torch.device) -> str:
    """Asserts that a captured call, replayed on values and on others, does what eager calls do."""
    values = [materialize(args, seed, device, written(op, args)) for seed in (0, 1)]
    expected = [results(op, run, copy.deepcopy(given)) for given in values]
    still = copy.deepcopy(values[0])
    found, replay = _capture(lambda: results(op, run, still))
    for number, (given, eager) in enumerate(zip(values, expected, strict=True)):
        for place, value in zip(_tensors(still), _tensors(given), strict=True):
            _memory(place).copy_(_memory(value))
        replay()
        for i, pair in enumerate(zip(found, eager, strict=True)):
            assert same_bits(*pair), f"result {i}: replay {number + 1} differs from the eager call"
    return ""


def _memory(tensor: Tensor) -> Tensor:
    """All that lies in a tensor's memory, around a view too."""
    return tensor.new_empty(0).set_(tensor.untyped_storage())


def _capture(call: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    return found, graph.replay


class ModelChecks:
    """What a shipped model must hold to on a GPU."""

    def __init__(self, name: str, device: torch.device) -> None:
        from cgm.checkpoints import load_model, sampling_preset, shipped
        from cgm.evaluation.execution import conditions

        self.model = load_model(shipped(name), device)
        self.solver = sampling_preset(shipped(name))
        self.options = set(self.model.sampling_options())
        self.cond = conditions(self.model, _ROWS)
        self.index = torch.arange(_ROWS, device=device) * (2**32 if self.cond is None else 1)

    def draw(self, rows: slice = slice(None), **options: Any) -> Tensor:
        index = self.index[rows]
        cond = None if self.cond is None else self.cond[rows]
        n = len(index) if cond is None else None
        return self.model.sample(n, cond=cond, index=index, **{**self.solver, **options})

    def graph_is_eager(self) -> str:
        if "graph" not in self.options:
            raise Skipped("its sampler has no option graph")
        graph, eager = self.draw(graph=True), self.draw(graph=False)
        difference = (graph - eager).abs().max().item()
        assert same_bits(graph, eager), f"graph and eager samples differ by up to {difference:.3g}"
        return ""

    def alone_is_batch(self) -> str:
        """Equal to the bit, or as near to float64 as plain PyTorch is in a batch of the same size.

        (Its convolutions of one image err otherwise than those of several.)
        """
        from cgm.evaluation.execution import model_call

        def one_by_one(**options: Any) -> Tensor:
            return torch.cat([self.draw(slice(i, i + 1), **options) for i in range(_ROWS)])

        alone, batch = one_by_one(), self.draw()
        if same_bits(alone, batch):
            return "equal to the bit"
        wide = copy.deepcopy(self.model).cpu().double()
        cond = None if self.cond is None else self.cond.cpu()
        cond = cond.double() if cond is not None and cond.is_floating_point() else cond
        exact = model_call(wide, "plain", cond, rows=_ROWS, **self.solver)()
        eager: dict[str, Any] = {"graph": False} if "graph" in self.options else {}
        with cgkernels.reference():
            plain_alone = plain_and_modeled(lambda: one_by_one(**eager))
            plain_batch = plain_and_modeled(lambda: self.draw(**eager))
        for samples, (plain, modeled) in ((alone, plain_alone), (batch, plain_batch)):
            assert_within_budget(samples.cpu(), plain.cpu(), exact, modeled.cpu())
        return f"within the error budget, differ by up to {(alone - batch).abs().max().item():.3g}"

    def never_waits(self) -> str:
        """Runs of different length wait equally often."""
        runs: list[dict[str, Any]]
        if "steps" in self.options:
            runs = [{"steps": n} for n in (4, 8)]
        elif self.model.discrete:  # with fewer rows given there are more values to draw
            channels, height, width = self.model.config.event_shape
            shape = (_ROWS if self.cond is not None else 1, channels, height - 1, width)
            given = torch.zeros(shape, device=self.index.device)
            runs = [{"given": given[:, :, :n]} for n in (height - 1, height - 2)]
        else:
            raise Skipped("its sampler has neither steps nor values to be given")
        counts = [cuda_syncs(partial(self.draw, graph=False, **run)) for run in runs]
        assert counts[0] == counts[1], f"waits for the device {counts} times in runs of two lengths"
        return f"waits {counts[0]} times, whatever the length of the run"
