"""Which launch configuration is fastest on this GPU, for each shape that the function tells apart.

    python -m benchmarks.tune guided_step               one op
    python -m benchmarks.tune guided_step add_noise     ops that share a function, judged together

Ops take block size and warps from a pure function of sizes (`benchmarks.ops.TUNABLES`). On each
case of the benchmarks every candidate stands in for what that function returns; candidates take
turns in one measurement. One that spills registers is dropped, and so is a winner that fails the
float64 gate. A win is claimed where a case is FASTER and none is SLOWER
(`cgkernels.timing.verdict`), else what is there is kept. The last lines are ready to be pasted into
the function.
"""

import argparse
import dataclasses
import inspect
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any
from unittest import mock

import torch

from benchmarks.harness.case import Case
from benchmarks.harness.ceilings import Call, measure, verdict
from benchmarks.harness.records import OURS
from benchmarks.harness.tuning import Tunable
from benchmarks.ops import TUNABLES
from benchmarks.suites import select

_SECONDS = 0.05  # of timing for each candidate on each case


# Sweeps -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sweep:
    """One case under every candidate; configurations are keys as JSON.

    arguments: what the function was asked. present: its answer. times: (p50, low, high) of
    `cgkernels.timing.Timing`. dropped: why the other candidates were not timed.
    """

    op: str
    case: str
    arguments: dict[str, Any]
    itemsize: int
    present: str
    times: dict[str, tuple[float, float, float]]
    dropped: dict[str, str]

    def ratio(self, config: str) -> float:
        """How many times faster than the present one."""
        return self.times[self.present][0] / self.times[config][0]

    def verdict(self, config: str) -> str:
        return verdict(self.times[self.present], self.times[config])


def sweep(case: Case, device: torch.device, *, seconds: float = _SECONDS) -> Sweep:
    """Times a case under every candidate."""
    tunable = TUNABLES[case.name]
    calls = case.providers[OURS].build(case.sets(device))
    with tunable.switched() as switch:
        calls[0]()
        asked = [a for n, a in enumerate(switch.asked) if a not in switch.asked[:n]]
        if len(asked) != 1:
            raise ValueError(f"{case} must ask {tunable.name} for one shape, asked for {asked}")
        arguments, present = asked[0], switch(**asked[0])
    ways: dict[str, list[Call]] = {}
    dropped: dict[str, str] = {}
    with tunable.switched() as switch:
        for config in [present, *tunable.candidates(**arguments)]:
            key = json.dumps(config)
            try:
                spills = _spills(partial(switch.call, config, calls[0]))
            except Exception as error:  # of the compiler, of resources
                dropped[key] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            if spills and config != present:
                dropped[key] = f"spills {spills} registers"
                continue
            ways[key] = [partial(switch.call, config, call) for call in calls]
        timings = measure(ways, device, seconds=seconds)
    times = {key: (t.p50, t.low, t.high) for key, t in timings.items()}
    return Sweep(
        case.name, str(case), arguments, case.dtype.itemsize, json.dumps(present), times, dropped
    )


def _spills(call: Call) -> int:
    """The most registers that a kernel of this call spills, in words of local memory a thread."""
    from triton.runtime.jit import JITFunction

    launched = []
    run = JITFunction.run

    def recorded(*args: Any, **kwargs: Any) -> Any:
        launched.append(run(*args, **kwargs))
        return launched[-1]

    with mock.patch.object(JITFunction, "run", recorded):
        call()
    return max((kernel.n_spills for kernel in launched), default=0)


def passes(case: Case, device: torch.device, config: str) -> bool:
    """Whether ours is right under this configuration."""
    with TUNABLES[case.name].switched() as switch:
        switch.config = json.loads(config)
        try:
            case.gate([case.inputs(0, device)])
        except AssertionError:
            return False
    return True


# Winners ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Choice:
    """The configuration for one shape class, and how much faster it is on each of its cases."""

    size: int
    kind: tuple[tuple[str, Any], ...]  # the other arguments
    itemsize: int | None  # None: of any
    config: str
    ratios: tuple[float, ...]
    kept: bool


def choose(sweeps: Iterable[Sweep], right: Callable[[str, str], bool]) -> list[Choice]:
    """The winner of each class: cases whose arguments and size of dtype are equal.

    right(case, config) says whether a case passes its gate; asked for likely winners only.
    """
    classes: dict[tuple[Any, ...], list[Sweep]] = defaultdict(list)
    for found in sweeps:
        classes[(*found.arguments.items(), found.itemsize)].append(found)
    choices = []
    for ((_, size), *kind, itemsize), group in classes.items():
        present = group[0].present
        timed = [key for key in group[0].times if all(key in s.times for s in group)]
        said = {key: {s.verdict(key) for s in group} for key in timed}
        likely = [key for key in timed if "FASTER" in said[key] and "SLOWER" not in said[key]]
        likely.sort(key=lambda key: -_mean([s.ratio(key) for s in group]))
        winner = next((k for k in likely if all(right(s.case, k) for s in group)), present)
        ratios = tuple(s.ratio(winner) for s in group)
        choices.append(Choice(size, tuple(kind), itemsize, winner, ratios, winner == present))
    return sorted(choices, key=lambda choice: choice.size)


def lines(tunable: Tunable, choices: Sequence[Choice]) -> list[str]:
    """The winners as code: for each kind of launches the largest size of each configuration."""
    size, *_ = inspect.signature(tunable.function).parameters
    found = []
    for kind in dict.fromkeys(choice.kind for choice in choices):
        of_kind = [choice for choice in choices if choice.kind == kind]
        answers: dict[int, set[str]] = defaultdict(set)
        for choice in of_kind:
            answers[choice.size].add(choice.config)
        if all(len(configs) == 1 for configs in answers.values()):
            of_kind = [dataclasses.replace(choice, itemsize=None) for choice in of_kind]
        for itemsize in dict.fromkeys(choice.itemsize for choice in of_kind):
            alike = [choice for choice in of_kind if choice.itemsize == itemsize]
            for _, run in groupby(alike, key=lambda choice: (choice.config, choice.kept)):
                found.append(_line(size, list(run)))
    return found


def _line(size: str, run: list[Choice]) -> str:
    last = run[-1]
    conditions = [f"{size} <= {last.size}"]
    for name, value in last.kind:
        whether = {True: name, False: f"not {name}"}
        conditions.append(whether[value] if isinstance(value, bool) else f"{name} == {value!r}")
    if last.itemsize is not None:
        conditions.append(f"itemsize == {last.itemsize}")
    ratios = [ratio for choice in run for ratio in choice.ratios]
    gain, worst = (f"{r - 1:+.1%}" for r in (_mean(ratios), min(ratios)))
    why = "kept" if last.kept else f"speed {gain}, worst case {worst}"
    return f"if {' and '.join(conditions)}: return {last.config}  # {why}, cases: {len(ratios)}"


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


# Command ------------------------------------------------------------------------------------------
def chosen(device: torch.device, ops: Sequence[str] = ()) -> list[Case]:
    """The cases of these ops (default: all), the most important first; one dtype of each size."""
    found = select("ops", device, names=ops or list(TUNABLES), providers=[OURS])
    dtypes = {case.dtype.itemsize: case.dtype for case in reversed(found)}
    return [case for case in found if case.dtype == dtypes[case.dtype.itemsize]]


def winners(sweeps: Sequence[Sweep], cases: Sequence[Case], device: torch.device) -> Iterator[str]:
    """Lines of text: for each function that was swept, its ops and its winners."""
    by_name = {str(case): case for case in cases}
    for tunable in dict.fromkeys(TUNABLES[s.op] for s in sweeps):
        of_it = [s for s in sweeps if TUNABLES[s.op] == tunable]
        choices = choose(of_it, lambda case, config: passes(by_name[case], device, config))
        ops = ", ".join(dict.fromkeys(s.op for s in of_it))
        yield f"{tunable.module.__name__}.{tunable.name}, measured with {ops}:"
        yield from (f"    {line}" for line in lines(tunable, choices))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description="Sweep launch configurations on this GPU, and print the winners.",
    )
    parser.add_argument("ops", nargs="+", metavar="OP", help=f"of {', '.join(TUNABLES)}")
    parser.add_argument("--minutes", type=float, default=10.0, help="when to stop (default: 10)")
    options = parser.parse_args(arguments)
    for op in options.ops:
        if op not in TUNABLES:
            parser.error(f"OP must be of {', '.join(TUNABLES)}, got {op!r}")
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive, got {options.minutes}")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU, found none")
    device = torch.device("cuda")
    end, longest = time.monotonic() + 60 * options.minutes, 0.0
    cases = chosen(device, options.ops)
    sweeps: list[Sweep] = []
    for case in cases:
        start = time.monotonic()
        if start + longest > end:
            print(f"Out of time for {len(cases) - len(sweeps)} of {len(cases)} cases")
            break
        sweeps.append(sweep(case, device))
        longest = max(longest, time.monotonic() - start)
        print(f"{case}: {len(sweeps[-1].times)} timed, {len(sweeps[-1].dropped)} dropped")
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    for line in winners(sweeps, cases, device):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
