"""A first look at a GPU: all that no CPU can tell, in one command that may be cut off.

    python -m benchmarks.gpu --minutes 25 --out DIR

In this order, until the minutes are over: every op on every launch configuration against float64;
the same in CUDA graphs, and the shipped models; `pytest -m cuda`; the benchmark tables; sweeps of
launch configurations. What is found is on the disk at once: DIR/checks.jsonl has a line for each
check, beside it are the tables (CSV) and the sweeps. The same command again goes on where this one
stopped: what passed with the same code, GPU and versions stays, what failed is run again, last.

Exit status: 0, 1 if anything failed, 2 for a wrong call. Correctness needs torch, triton and numpy;
what needs more and does not find it is skipped, and says so.
"""

import argparse
import dataclasses
import functools
import gc
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import cgkernels  # noqa: F401  (fills OPS)
from benchmarks.harness.ceilings import ROOT, environment, measure_ceilings
from benchmarks.harness.correctness import ModelChecks, Skipped, is_large, judge, judge_graph
from benchmarks.harness.records import OK, OURS, Writer, version_of
from benchmarks.ops import LAUNCHES, source_of
from cgkernels._triton import HAS_TRITON, triton
from cgkernels.library import OPS

FAILED, SKIPPED, STARTED = "failed", "skipped", "started"


# Stages -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Check:
    """run returns what it found; it raises Skipped, or anything else where it failed.

    A check without a version is quick, and made every time.
    """

    key: str
    version: str
    run: Callable[[], str]


@dataclass(frozen=True)
class Look:
    """What the stages share; end is when the time is over."""

    device: torch.device
    out: Path
    environment: dict[str, Any]
    end: float

    @property
    def where(self) -> str:
        """What a result of the same code depends on."""
        return ", ".join(f"{n} {self.environment[n]}" for n in ("device", "torch", "triton"))


def correctness(look: Look) -> Iterator[Check]:
    for name, op in OPS.items():
        version = version_of(source_of(name))
        for launch in LAUNCHES[name]():
            run = partial(judge, op, launch.run.args, op, look.device)
            yield Check(f"{name}: {launch.label}", version, run)


def graphs(look: Look) -> Iterator[Check]:
    for name, op in OPS.items():
        version = version_of(source_of(name))
        for launch in LAUNCHES[name]():
            if not is_large(launch.run.args):
                run = partial(judge_graph, op, launch.run.args, op, look.device)
                yield Check(f"graph of {name}: {launch.label}", version, run)
    from cgm.checkpoints import drawable_names

    for name in drawable_names():
        checks = ModelChecks(name, look.device)
        version = version_of(type(checks.model).__module__)
        yield Check(f"{name}: graph and eager", version, checks.graph_is_eager)
        yield Check(f"{name}: alone and in a batch", version, checks.alone_is_batch)
        yield Check(f"{name}: waits in the loop", version, checks.never_waits)


def tests(look: Look) -> Iterator[Check]:
    for package in ("pytest", "hypothesis"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(name=package)
    digest = hashlib.sha256()
    for folder in ("cgkernels", "cgm", "benchmarks", "tests"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    yield Check("pytest -m cuda", digest.hexdigest()[:12], partial(_pytest, look))


def _pytest(look: Look) -> str:
    # A package that is not here spoils the files that need it, not the others.
    options = ["-q", "--maxfail=50", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", "-m", "cuda", *options]
    limit, file = (look.end - time.monotonic()) / 2, look.out / "pytest.txt"
    try:
        with file.open("w") as output:
            code = subprocess.run(
                command, cwd=ROOT, stdout=output, stderr=output, timeout=limit
            ).returncode
    except subprocess.TimeoutExpired:
        raise Skipped(f"out of time after {limit:.0f} s") from None
    *tail, last = file.read_text().splitlines()[-20:] or [""]
    assert code == 0, "\n".join([f"exit status {code}: {last}", *tail])
    return last


def tables(look: Look) -> Iterator[Check]:
    from benchmarks.run import Deadline, run_case
    from benchmarks.suites import cases

    chosen = [*cases("all", look.device), *cases("growth", look.device)]
    deadline = Deadline(look.end)

    @functools.cache
    def opened() -> tuple[Any, Writer]:
        ceilings = measure_ceilings(look.device, dict.fromkeys(case.dtype for case in chosen))
        print(ceilings.text(), flush=True)
        return ceilings, Writer(look.out, look.environment | {"ceilings": ceilings.text()})

    def time_case(case: Any) -> str:
        ceilings, writer = opened()
        rows = run_case(case, look.device, ceilings, deadline)
        for row in rows:
            writer.write(row)
        late = [row.provider for row in rows if row.status == "out of time"]
        if late:
            raise Skipped(f"out of time for {', '.join(late)}")
        ours = next(row for row in rows if row.provider == OURS)
        return f"{ours.p50 or 0:.4g} us, {ours.of_floor or 0:.0%} of the floor"

    for case in chosen:
        key = " ".join(("time", case.suite, str(case)))
        yield Check(key, case.version, partial(time_case, case))


def tuning(look: Look) -> Iterator[Check]:
    from benchmarks import tune

    cases = tune.chosen(look.device)
    versions = {str(case): case.version for case in cases}
    journal = Journal(look.out / "tuning.jsonl")

    def sweep(case: Any) -> str:
        found = tune.sweep(case, look.device)
        journal.write({"version": case.version, "where": look.where, **dataclasses.asdict(found)})
        return f"{len(found.times)} timed, {len(found.dropped)} dropped"

    def winners() -> str:
        sweeps = {}
        for line in map(dict, journal.lines):
            version, where = line.pop("version"), line.pop("where")
            if (version, where) == (versions.get(line["case"]), look.where):
                sweeps[line["case"]] = tune.Sweep(**line)
        lines = list(tune.winners(list(sweeps.values()), cases, look.device))
        (look.out / "launch_configurations.txt").write_text("\n".join([look.where, *lines, ""]))
        print(*lines, sep="\n")
        return f"of {len(sweeps)} of {len(cases)} cases"

    for case in cases:
        yield Check(f"tune {case}", case.version, partial(sweep, case))
    yield Check("winners", "", winners)


# Name, checks, and the share of the time left at its start that a stage may take.
STAGES: list[tuple[str, Callable[[Look], Iterator[Check]], float]] = [
    ("correctness", correctness, 1.0),
    ("graphs", graphs, 1.0),
    ("tests", tests, 1.0),
    ("tables", tables, 0.7),
    ("tuning", tuning, 1.0),
]


# Running ------------------------------------------------------------------------------------------
def drop_torn_line(file: Path) -> None:
    """Cuts off a last line that was not finished."""
    if file.exists() and not (data := file.read_bytes()).endswith(b"\n"):
        os.truncate(file, data.rfind(b"\n") + 1)


class Journal:
    """Lines of JSON in a file, on the disk as they come."""

    def __init__(self, file: Path) -> None:
        drop_torn_line(file)
        self.file = file
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def write(self, line: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(line) + "\n")
            opened.flush()
            os.fsync(opened.fileno())
        self.lines.append(line)


class Lost(Exception):
    """The GPU no longer answers in this process."""


class Runner:
    """Makes the checks that are not in the journal yet, as long as there is time."""

    def __init__(self, look: Look, lost: Callable[[], bool]) -> None:
        self.look, self.lost = look, lost
        self.journal = Journal(look.out / "checks.jsonl")
        self.last = {line["key"]: line for line in self.journal.lines}
        self.counts: dict[str, Counter[str]] = {}
        self.failed: list[str] = []
        self.longest: dict[str, float] = defaultdict(float)

    def run(self, stages: Sequence[tuple[str, Callable[[Look], Iterator[Check]], float]]) -> None:
        """The stages in their order; then what did not fit, and last what failed before."""
        left: list[tuple[str, Check]] = []
        suspects: list[tuple[str, Check]] = []  # of failure, or of having hung
        for stage, checks, share in stages:
            now = time.monotonic()
            end = now + share * (self.look.end - now)
            self.counts[stage] = Counter()
            for check in self._listed(stage, checks):
                before = self._before(check)
                if before == OK:
                    self.counts[stage][OK] += 1
                elif before in (FAILED, STARTED):
                    suspects.append((stage, check))
                elif self._fits(stage, check, end):
                    self._make(stage, check)
                else:
                    left.append((stage, check))
        for stage, check in [*left, *suspects]:
            if self._fits(stage, check, self.look.end):
                self._make(stage, check)
            elif self._before(check) == FAILED:
                self._count(stage, check.key, FAILED, self.last[check.key]["reason"])
            else:
                self.counts[stage]["left"] += 1

    def _listed(self, stage: str, checks: Callable[[Look], Iterator[Check]]) -> Iterator[Check]:
        """The checks of a stage; one that says why, where the rest cannot be set up."""

        def raise_(error: Exception) -> str:
            raise error

        try:
            yield from checks(self.look)
        except ModuleNotFoundError as error:
            yield Check(f"rest of {stage}", "", partial(raise_, Skipped(f"needs {error.name}")))
        except Exception as error:
            yield Check(f"rest of {stage}", "", partial(raise_, error))

    def _before(self, check: Check) -> str:
        line = self.last.get(check.key, {})
        same = (line.get("version"), line.get("where")) == (check.version, self.look.where)
        return line["status"] if same and check.version else ""

    def _fits(self, stage: str, check: Check, end: float) -> bool:
        return not check.version or time.monotonic() + self.longest[stage] < end

    def _make(self, stage: str, check: Check) -> None:
        line = {"key": check.key, "version": check.version, "where": self.look.where}
        self.journal.write(line | {"status": STARTED})
        start = time.monotonic()
        try:
            status, reason = OK, check.run()
        except Skipped as error:
            status, reason = SKIPPED, str(error)
        except Exception as error:
            status, reason = FAILED, f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - start
        self.longest[stage] = max(self.longest[stage], seconds)
        self.last[check.key] = line | {"status": status, "reason": reason, "seconds": seconds}
        self.journal.write(self.last[check.key])
        self._count(stage, check.key, status, reason)
        print(f"{status:7} {seconds:6.1f} s  {check.key}  {reason.split(chr(10))[0]}", flush=True)
        if status != OK:
            gc.collect()  # what a traceback still held
        if status == FAILED and self.lost():
            raise Lost

    def _count(self, stage: str, key: str, status: str, reason: str) -> None:
        self.counts[stage][status] += 1
        if status == FAILED:
            self.failed.append(f"{key}: {reason.splitlines()[0]}")

    def summary(self) -> str:
        lines = []
        for stage, counts in self.counts.items():
            found = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
            lines.append(f"{stage + ':':13}{found or 'nothing'}")
        return "\n".join([*lines, *(f"FAILED {text}" for text in self.failed), str(self.look.out)])


def _lost() -> bool:
    """Whether an error has ended this process's use of the GPU, as a bad address does."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return True
    return False


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Correctness, graphs, tests, tables and tuning on this GPU.",
    )
    add = parser.add_argument
    add("--minutes", type=float, required=True, help="when to stop")
    add("--out", type=Path, required=True, metavar="DIR", help="results, of earlier runs too")
    add("--commit", default="unknown", metavar="NAME", help="of this code, if git cannot tell")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive, got {options.minutes}")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU, found none")
    if not HAS_TRITON or triton.knobs.runtime.interpret:
        parser.error("needs Triton, and no TRITON_INTERPRET")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out must be a folder, got {options.out}: {error.strerror}")
    device = torch.device("cuda", torch.cuda.current_device())
    end = time.monotonic() + 60 * options.minutes
    look = Look(device, options.out, environment(device, options.commit), end)
    Journal(look.out / "environment.jsonl").write(look.environment)
    for file in look.out.glob("*.csv"):
        drop_torn_line(file)
    runner = Runner(look, _lost)
    try:
        runner.run(STAGES)
    except Lost:
        print("The GPU no longer answers in this process: run the same command again to go on.")
    print(runner.summary())
    return 1 if runner.failed else 0


if __name__ == "__main__":
    sys.exit(main())
