"""The benchmark table.

    python -m benchmarks.run                                  ops and models, three minutes
    python -m benchmarks.run --suite growth --minutes 5       sweeps, with their exponents
    python -m benchmarks.run --names guided_step --sizes cifar10 --dtypes float32
    python -m benchmarks.run --compare OTHER.csv              marks changes beyond the spread

Before a case is timed, ours is compared with float64 on the very inputs of the timing; a case that
fails writes no row, and the exit status is 1. A wrong call exits with 2. The most important cases
run first; those that the minutes do not suffice for are named. Rows are on the disk as they come.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness.case import Case
from benchmarks.harness.ceilings import (
    Call,
    Ceilings,
    Timing,
    environment,
    measure,
    measure_ceilings,
    name_of,
    verdict,
)
from benchmarks.harness.growth import TOLERANCE, fits
from benchmarks.harness.records import OK, OURS, Row, Writer, read
from benchmarks.suites import SUITES, select

_SECONDS = 0.3  # of timing for each provider of a case


class GateError(AssertionError):
    """Ours is wrong on the inputs of a case."""


@dataclass
class Deadline:
    """When a run must end, and how long cases and first calls of compiled code took so far."""

    end: float
    case: dict[str, float] = field(default_factory=lambda: {"ops": 3.0, "models": 15.0})
    compile: dict[str, float] = field(default_factory=lambda: {"ops": 8.0, "models": 60.0})

    def fits(self, seconds: float) -> bool:
        """Whether something that takes so long still ends in time."""
        return time.monotonic() + seconds < self.end


def run_case(
    case: Case,
    device: torch.device,
    ceilings: Ceilings,
    deadline: Deadline,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Judges and times one case; a row for each provider.

    Raises:
        GateError: ours is wrong on these inputs; nothing was timed.
    """
    started = time.monotonic()
    sets = case.sets(device)
    say(f"{case}: comparing with float64")
    try:
        case.gate(sets)
    except AssertionError as error:
        raise GateError(str(error)) from error
    torch.compiler.reset()  # each case compiles for its own shape
    kind = "models" if case.source.startswith("cgm.") else "ops"
    calls: dict[str, list[Call]] = {}
    status: dict[str, str] = {}
    compile_s: dict[str, float] = {}
    for name, provider in case.providers.items():
        status[name] = provider.missing(device)
        compiles = name.startswith("compile")
        if not status[name] and compiles and not deadline.fits(deadline.compile[kind]):
            status[name] = "out of time"
        if status[name]:
            continue
        say(f"{case}: first call of {name}")
        start = time.monotonic()
        try:
            built = provider.build(sets)
            built[0]()
        except Exception as error:  # of a compiler, of full memory, of another library
            reason = (str(error).strip().splitlines() or [""])[0]
            status[name] = f"failed: {type(error).__name__}: {reason}"
            continue
        calls[name] = built
        if compiles:
            compile_s[name] = time.monotonic() - start
            deadline.compile[kind] = max(deadline.compile[kind], compile_s[name])
    say(f"{case}: timing {', '.join(calls)}")
    timings = measure(calls, device, seconds=_SECONDS)
    took = time.monotonic() - started - sum(compile_s.values())
    deadline.case[kind] = max(deadline.case[kind], took)
    return [
        _row(case, name, status[name], timings.get(name), ceilings, len(sets), compile_s.get(name))
        for name in case.providers
    ]


def _row(
    case: Case, provider: str, status: str, timing: Timing | None, ceilings: Ceilings, sets: int,
    compile_s: float | None,
) -> Row:  # fmt: skip
    dtype = name_of(case.dtype)
    floor, bound = ceilings.floor(case.nbytes, case.flops, dtype)
    times: dict[str, Any] = (
        {} if timing is None else vars(timing) | {"of_floor": floor / timing.p50, "sets": sets}
    )
    extent: dict[str, Any] = {}
    if case.extent is not None:
        name, value, limit = case.extent.name, case.extent.value, case.extent.limit
        extent = {"extent": name, "extent_value": value, "extent_limit": limit}
    return Row(
        case.suite, case.name, case.variant, case.size, case.label, dtype, provider, status or OK,
        **times, **extent, compile_s=compile_s, floor=floor, bound=bound, items=case.items,
        bytes=case.nbytes, flops=case.flops, source=case.source,
        version=case.version,
    )  # fmt: skip


def run(
    chosen: Sequence[Case],
    device: torch.device,
    *,
    minutes: float,
    out: Path,
    console: Console,
) -> tuple[list[Row], list[str], Path]:
    """Measures the ceilings, then the cases in their order, and writes a file of rows.

    Returns the rows, what went wrong in words, and the file, which exists if there are rows.
    """
    deadline = Deadline(time.monotonic() + 60 * minutes)
    rows: list[Row] = []
    wrong: list[str] = []
    left: list[Case] = []
    with console.status("ceilings of the device") as status:
        dtypes = dict.fromkeys(case.dtype for case in chosen)
        ceilings = measure_ceilings(device, dtypes)
        writer = Writer(out, environment(device) | {"ceilings": ceilings.text()})
        console.print(ceilings.text(), highlight=False)
        for case in chosen:
            kind = "models" if case.source.startswith("cgm.") else "ops"
            if not deadline.fits(deadline.case[kind]):
                left.append(case)
                continue
            try:
                found = run_case(case, device, ceilings, deadline, status.update)
            except GateError as error:
                wrong.append(f"{case}: ours is wrong, and was not timed: {error}")
                continue
            for row in found:
                writer.write(row)
            rows += found
    if left:
        names = ", ".join(map(str, left))
        console.print(
            f"Out of time for {len(left)} of {len(chosen)} cases: {names}", highlight=False
        )
    return rows, wrong, writer.file


# Tables -------------------------------------------------------------------------------------------
def print_table(console: Console, rows: Sequence[Row], others: dict[tuple[str, ...], Row]) -> None:
    """The rows; with others by key, how each changed."""
    table = Table(title="Microseconds of one call")
    columns = [
        "case",
        "provider",
        "p50",
        "p20 to p80",
        "host",
        "graph",
        "syncs",
        "of floor",
        "ours",
    ]
    for column in columns + ["change"] * bool(others):
        left = column in ("case", "provider")
        side: Literal["left", "right"] = "left" if left else "right"
        table.add_column(column, justify=side, no_wrap=column == "provider", overflow="fold")
    before = None
    for row in rows:
        name = " ".join(p for p in (row.case, row.variant, row.size, row.dtype) if p)
        if before not in (None, name):
            table.add_section()
        shown, before = "" if name == before else name, name
        if row.status != OK:
            table.add_row(shown, row.provider, row.status)
            continue
        assert row.p50 is not None and row.host is not None and row.of_floor is not None
        host = f"{row.host:.3g}" + " launch-bound" * bool(row.launch_bound)
        graph = "-" if row.graph is None else f"{row.graph:.4g}"
        cells = [
            f"{row.p50:.4g}", f"{row.p20:.4g} to {row.p80:.4g}", host, graph, str(row.syncs),
            f"{row.of_floor:.1%} ({row.bound})", _against(row, rows),
        ]  # fmt: skip
        if others:
            cells.append(_change(row, others.get(row.key)))
        table.add_row(shown, row.provider, *cells)
    console.print(table)


def _against(row: Row, rows: Sequence[Row]) -> str:
    """How many times faster ours is than this provider on the same case."""
    ours = [r for r in rows if r.key[:-1] == row.key[:-1] and r.provider == OURS and r.p50]
    if row.provider == OURS or not ours or row.p50 is None or ours[0].p50 is None:
        return ""
    return f"{row.p50 / ours[0].p50:.2f}x as fast"


def _change(row: Row, other: Row | None) -> str:
    if other is None or other.p50 is None or other.low is None or other.high is None:
        return "new"
    assert row.p50 is not None and row.low is not None and row.high is not None
    said = verdict((other.p50, other.low, other.high), (row.p50, row.low, row.high))
    return f"{said} {row.p50 / other.p50 - 1:+.0%}"


def print_growth(console: Console, rows: Sequence[Row]) -> list[str]:
    """The exponents of sweeps; returns those that are too large, in words."""
    found = fits(rows)
    if not found:
        return []
    table = Table(title="Growth: time ~ extent^exponent")
    for column in ("case", "extent", "from", "to", "exponent", "at most"):
        table.add_column(column, justify="left" if column in ("case", "extent") else "right")
    for fit in found:
        limit = f"{fit.limit:.2f}" + " exceeded" * fit.too_fast
        cells = (str(fit.sizes[0]), str(fit.sizes[-1]), f"{fit.exponent:.2f}", limit)
        table.add_row(f"{fit.case} {fit.variant}".strip(), fit.extent, *cells)
    console.print(table)
    return [
        f"{fit.case} {fit.variant}: time grows with {fit.extent}^{fit.exponent:.2f}, at most "
        f"{fit.limit:.2f} (and {TOLERANCE} for noise and caches) allowed"
        for fit in found
        if fit.too_fast
    ]


# Command ------------------------------------------------------------------------------------------
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Compare with float64, time, and print the table.",
    )
    add = parser.add_argument
    add("--suite", default="all", metavar="NAME", help=f"{', '.join(SUITES)}, or all: ops, models")
    add("--minutes", type=float, default=3.0, help="when to stop (default: 3)")
    add("--out", type=Path, default=Path("runs/benchmarks"), help="folder for the file of results")
    add("--compare", type=Path, metavar="CSV", help="an earlier file; changes are marked")
    for name in ("names", "sizes", "dtypes", "providers"):
        add(f"--{name}", nargs="+", default=(), metavar="NAME", help="only these")
    add("--device", help="cpu or cuda (default: cuda if present)")
    options = parser.parse_args(arguments)
    from cgm.cli.arguments import find_device

    try:
        device = find_device(options.device)
        if not options.minutes > 0:
            raise ValueError(f"--minutes must be positive, got {options.minutes}")
        chosen = select(
            options.suite, device, names=options.names, sizes=options.sizes,
            dtypes=options.dtypes, providers=options.providers,
        )  # fmt: skip
        theirs, others = read(options.compare) if options.compare else ({}, [])
        console = Console(width=None if sys.stdout.isatty() else 180)
        rows, wrong, file = run(
            chosen, device, minutes=options.minutes, out=options.out, console=console
        )
    except ValueError as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return 2
    print_table(console, rows, {row.key: row for row in others if row.status == OK})
    if theirs:
        same = theirs.get("device") == environment(device)["device"]
        note = "" if same else f", measured on another device, {theirs.get('device')}"
        console.print(f"Changes are against {options.compare}{note}", highlight=False)
    wrong += print_growth(console, rows)
    if rows:
        console.print(str(file), highlight=False, soft_wrap=True)
    for text in wrong:
        print(f"PROBLEM {text}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
