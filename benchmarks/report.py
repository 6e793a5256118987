"""Writes docs/measured.md and its plots from the files of results.

    python -m benchmarks.report              docs/measured.md and docs/measured/*.png
    python -m benchmarks.report --check      exit status 1 unless docs say what the results say

For each device a case is shown from the newest run that has it; a run that newer ones replace is
only named. A row is stale if the code that it measured has changed since. A damaged file ends the
command with status 2, and nothing is written.
"""

import argparse
import csv
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from difflib import unified_diff
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.harness.ceilings import ROOT, verdict
from benchmarks.harness.growth import TOLERANCE, Fit, fits
from benchmarks.harness.history import Measured, Run, load, newest
from benchmarks.harness.plots import Quantiles, bars, growth
from benchmarks.harness.records import OK, OURS, Row, version_of
from benchmarks.ops import LAUNCHES, source_of
from cgm.checkpoints import replacing

_NOISY = 0.05  # spread of the samples that is marked
_NOT_HERE = ("not installed", "needs CUDA")
_ARCH = "90"  # of the table of instructions
_COLUMNS = (
    "case", "provider", "time", "ours = 1", "host", "graph", "syncs", "peak", "of floor", "run",
)  # fmt: skip

_INTRODUCTION = """\
# What was measured

<!-- Written by `python -m benchmarks.report` from benchmarks/results: edits here are lost. -->

Every figure in this project names device, versions, commit, date and command."""
_NO_GPU = " **No kernel of this version has been run on a GPU yet**"
_KNOWN = """\
What is known without a GPU:

- **Values**: each kernel in Triton's interpreter against float64
  (`TRITON_INTERPRET=1 pytest -m kernel`).
- **Code**: each launch compiled for sm_80, sm_90, sm_100 and sm_120
  (`python -m benchmarks.offline`): no spills, 128-bit loads and stores wherever rows are dense.
"""
_NO_FILE = """\
There is no file of results yet; `python -m benchmarks.run --out benchmarks/results` writes one.
"""
_LEGEND = """\
**Columns.** Times are microseconds of one call. time: the median, in brackets its 20 % and 80 %
quantiles; noise is their distance as a share of the median, where above 5 %. ours = 1: the time as
a multiple of ours on the same case, bold where less beyond the spread of the rounds. host: until
the call returns (on a CPU: outside of operators). graph: one call in a CUDA graph. syncs: waits for
the device in a call (on a CPU: operators that would wait). peak: allocated beyond the inputs. of
floor: share of the time that bytes, operations and a launch must take at the ceilings of the run,
and which of them sets it. **stale**: the code has changed since.

A speed-up is the time of the strongest baseline over ours: below 1 something else is faster. Stale
and impossible times are left out of it.
"""


Plots = dict[str, Callable[[], Figure]]


def render(results: Path) -> tuple[str, Plots]:
    """The text, and what draws each plot that it shows, by file name."""
    by_device: dict[str, list[Run]] = defaultdict(list)
    for run in load(results):
        by_device[run.environment["device"]].append(run)
    devices = sorted(by_device.values(), key=lambda of: (of[0].cuda, of[0].age), reverse=True)
    on_gpu = [m for runs in devices if runs[0].cuda for m in newest(runs)]
    introduction = _INTRODUCTION
    if not on_gpu:
        introduction += f"{_NO_GPU}, so there is no GPU figure here."
    elif all(m.stale for m in on_gpu):
        introduction += f"{_NO_GPU}: the GPU figures here are of older versions."
    parts, plots = [introduction, _KNOWN, _LEGEND if devices else _NO_FILE], Plots()
    for runs in devices:
        parts += _device(runs, plots)
    parts += _static(results / "offline")
    parts += [file.read_text(encoding="utf-8") for file in sorted(results.glob("*.md"))]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts), plots


# A device -----------------------------------------------------------------------------------------
def _device(runs: Sequence[Run], plots: Plots) -> list[str]:
    measured = newest(runs)
    used = [run for run in runs if any(m.run is run for m in measured)]
    replaced = [f"`{run.name}`" for run in runs if run not in used]
    numbers = {run.name: str(i) if len(used) > 1 else "" for i, run in enumerate(used, 1)}
    timed = [m.stale for m in measured for row in m.rows if row.status == OK]
    of = runs[0].environment
    stale = f"{sum(timed)} of {len(timed)} rows stale"
    parts = [f"## {of['device']}, {of['date']}, commit {of['commit']}: {stale}"]
    parts.append("\n".join(f"{i}. {_provenance(run)}" for i, run in enumerate(used, 1)))
    if replaced:
        parts.append(f"Older runs, replaced by these: {', '.join(replaced)}.")
    slug = re.sub(r"[^A-Za-z0-9.+-]+", "-", of["device"]).strip("-")
    for suite in ("ops", "models"):
        cases = [m for m in measured if m.first.suite == suite]
        if not cases:
            continue
        by_name: dict[str, list[Measured]] = defaultdict(list)
        for m in cases:
            by_name[m.first.case].append(m)
        parts.append(f"### {suite.capitalize()}\n\n{_summary(by_name)}")
        if main := _main(cases):
            name = f"{slug}_{suite}.png"
            plots[name] = lambda main=main: _bars(main)  # type: ignore[misc]
            parts.append(f"![Time of each provider, ours = 1](measured/{name})")
        for name, of_name in by_name.items():
            head = f"<details><summary><code>{name}</code>: every time</summary>"
            parts.append(f"{head}\n\n{_cases(of_name, numbers)}\n</details>")
        sizes = dict.fromkeys(f"`{m.first.size}` is {m.first.label}" for m in cases)
        parts.append(f"Sizes: {'; '.join(sizes)}.")
    sweeps = [m for m in measured if m.first.suite == "growth"]
    found = [(m, fit) for m in sweeps for fit in fits(m.rows)]
    if sweeps:
        parts.append(f"### Growth\n\n{_growth(sweeps, found, numbers)}")
    if found:
        name = f"{slug}_growth.png"
        plots[name] = lambda: growth(of["device"], [fit for _, fit in found])
        parts.append(f"![Time over size, both logarithmic](measured/{name})")
    return parts


def _provenance(run: Run) -> str:
    of = run.environment
    parts = [f"{name} {of[name]}" for name in ("torch", "triton", "python", "cuda") if name in of]
    parts += [f"{of['threads']} threads"] if "threads" in of and not run.cuda else []
    text = f"`{run.name}`: {of['date']}, commit {of['commit']}, {', '.join(parts)}"
    text += f"; `{of['command']}`" if "command" in of else ""
    return text + "".join(f"; {name}: {of[name]}" for name in ("ceilings", "clocks") if name in of)


def _summary(by_name: dict[str, list[Measured]]) -> str:
    lines = []
    for name, cases in by_name.items():
        known = [(*m.speed_up, m.title) for m in cases if m.speed_up is not None]
        mean = worst = "none"
        if known:
            mean = _number(statistics.geometric_mean(ratio for ratio, *_ in known))
            ratio, strongest, title = min(known)
            worst = f"{_number(ratio)}: {title}, against {strongest}"
        lines.append([f"`{name}`", mean, worst, f"{len(known)} of {len(cases)}"])
    return _table(["", "speed-up, geometric mean", "worst case", "cases"], lines)


def _cases(cases: Sequence[Measured], numbers: dict[str, str]) -> str:
    lines = []
    for m in cases:
        title = m.title
        for row in m.rows:
            if row.status not in _NOT_HERE:
                lines.append([title, row.provider, *_cells(m, row), numbers[m.run.name]])
                title = ""
    rows = [(m, row) for m in cases for row in m.rows]
    missing = ((row.provider, row.status) for _, row in rows if row.status in _NOT_HERE)
    uncaptured = ((r.provider, r.graph_error) for m, r in rows if m.run.cuda and r.graph_error)
    text = _table(_COLUMNS, lines) + _folded("Not run", missing)
    return text + _folded("Not captured in a graph", uncaptured)


def _cells(m: Measured, row: Row) -> list[str]:
    if row.status != OK or row.p50 is None:
        return [row.status, *[""] * 6]
    time = _number(row.p50)
    if row.p20 is not None and row.p80 is not None:
        noise = (row.p80 - row.p20) / row.p50
        time += f" ({_number(row.p20)} to {_number(row.p80)})"
        time += f", noise {100 * noise:.0f} %" if noise > _NOISY else ""
    ours = next((other for other in m.rows if other.provider == OURS and other.p50), None)
    against = _number(row.p50 / m.times[OURS]) if ours else ""
    if ours and verdict(_of_rounds(ours), _of_rounds(row)) == "FASTER":
        against = f"**{against}**"
    floor = "" if row.of_floor is None else f"{100 * row.of_floor:.2g} % ({row.bound})"
    return [
        time,
        against,
        _number(row.host) + ", launch-bound" * bool(row.launch_bound),
        _number(row.graph),
        "" if row.syncs is None else str(row.syncs),
        "" if row.peak is None else f"{row.peak / 2**20:.3g} MiB",
        floor + ", **impossible: check**" * m.impossible(row),
    ]


def _of_rounds(row: Row) -> tuple[float, float, float]:
    assert row.p50 is not None
    return row.p50, row.low or row.p50, row.high or row.p50


def _growth(
    sweeps: Sequence[Measured], found: Sequence[tuple[Measured, Fit]], numbers: dict[str, str]
) -> str:
    def name(m: Measured) -> str:
        parts = (f"`{m.first.case}`", m.first.variant, f"over {m.first.extent}", m.first.dtype)
        return ", ".join(part for part in parts if part) + ", **stale**" * m.stale

    lines = []
    for m, fit in found:
        limit = f"{fit.limit:.2f}" + ", **exceeded**" * fit.too_fast
        sizes = f"{fit.sizes[0]:,} to {fit.sizes[-1]:,}"
        lines.append([name(m), sizes, f"{fit.exponent:.2f}", limit, numbers[m.run.name]])
    fitted = [id(m) for m, _ in found]
    short = [name(m) for m in sweeps if id(m) not in fitted]
    text = f"Time grows as size^exponent; {TOLERANCE} above the limit is too fast.\n\n"
    text += _table(["sweep", "sizes", "exponent", "at most", "run"], lines)
    return text + (f"\nFewer than three sizes: {'; '.join(short)}.\n" if short else "")


def _main(cases: Sequence[Measured]) -> list[Measured]:
    """The cases of the size and dtype that most have been compared in."""
    compared = [m for m in cases if OURS in m.times and len(m.times) > 1]
    kinds = Counter((m.first.size, m.first.dtype) for m in compared).most_common(1)
    return [m for m in compared if kinds[0][0] == (m.first.size, m.first.dtype)]


def _bars(cases: Sequence[Measured]) -> Figure:
    relative: dict[str, dict[str, Quantiles]] = {}
    for m in cases:
        ours = m.times[OURS]
        label = f"{m.first.case} {m.first.variant}".strip()
        relative[f"{label}\nours {_number(ours)} µs" + ", stale" * m.stale] = {
            row.provider: ((row.p20 or row.p50) / ours, row.p50 / ours, (row.p80 or row.p50) / ours)
            for row in m.rows
            if row.p50 and row.provider != OURS
        }
    row = cases[0].first
    return bars(f"{cases[0].run.environment['device']}: {row.label}, {row.dtype}", relative)


# Without a device ---------------------------------------------------------------------------------
def _static(folder: Path) -> list[str]:
    """Instructions and registers of the newest offline table, DATE_COMMIT_triton-VERSION.csv."""
    files = sorted(folder.glob("*.csv"))
    if not files:
        return []
    file, kernels = files[-1], defaultdict[tuple[str, ...], dict[str, str]](dict)
    columns = ("float32", "float16", "bfloat16", "as named")
    try:
        date, commit, triton = file.stem.split("_")
        with file.open(newline="", encoding="utf-8") as opened:
            for row in csv.DictReader(opened):
                if row["arch"] != _ARCH:
                    continue
                op = row["op"]
                fresh = op in LAUNCHES and row["version"] == version_of(source_of(op))
                label, _, rest = row["launch"].partition("torch.")
                dtype, _, rest = rest.partition(" ")
                label = f"{label.strip()} {rest}".strip()
                cell = f"{int(row['instructions'])} / {int(row['registers'])}"
                key = f"`{row['op']}`", label, row["kernel"], "" if fresh else "stale"
                kernels[key][dtype or columns[-1]] = cell
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: is no table of benchmarks.offline: {error!r}") from error
    lines = [[*key, *(cells.get(name, "") for name in columns)] for key, cells in kernels.items()]
    stale = f"{sum('stale' in key for key in kernels)} of {len(kernels)} rows stale"
    triton = triton.replace("triton-", "Triton ")
    head = f"## Static instruction counts, sm_{_ARCH}, {triton}: {stale}"
    text = f"""\
Instructions and registers of a thread, for the whole kernel. They say nothing about time by
themselves. `python -m benchmarks.offline --csv FILE`, {date}, commit {commit}."""
    return [head, text, _table(["op", "launch", "kernel", "", *columns], lines)]


# Markdown -----------------------------------------------------------------------------------------
def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _plain(text: str) -> str:
    """Text that may hold what Markdown reads otherwise, such as that of an error."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Without the columns that are empty."""
    shown = [i for i, _ in enumerate(header) if i == 0 or any(line[i] for line in lines)]
    rows = [[header[i] for i in shown], ["---"] * len(shown)]
    rows += [[_plain(line[i]) for i in shown] for line in lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _folded(title: str, pairs: Iterable[tuple[str, str]]) -> str:
    """One line for all (provider, reason)."""
    providers: dict[str, dict[str, None]] = defaultdict(dict)
    for provider, reason in pairs:
        providers[reason][f"`{provider}`"] = None
    said = [f"{', '.join(names)} ({_plain(reason)})" for reason, names in providers.items()]
    return f"\n{title}: {'; '.join(said)}.\n" if said else ""


# Command ------------------------------------------------------------------------------------------
def differences(text: str, plots: Plots, docs: Path) -> list[str]:
    """What in docs is not what would be written, in words. Of plots only their presence counts."""
    file = docs / "measured.md"
    written = file.read_text(encoding="utf-8") if file.exists() else ""
    changed = [*unified_diff(written.splitlines(), text.splitlines(), lineterm="", n=0)][3:8]
    found = [f"{file} is out of date:", *changed] if written != text else []
    images = [docs / "measured" / name for name in plots]
    return found + [f"{image} is missing" for image in images if not image.exists()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Write docs/measured.md and its plots from the files of results.",
    )
    add, results = parser.add_argument, ROOT / "benchmarks" / "results"
    add("--check", action="store_true", help="write nothing; exit with 1 if docs are out of date")
    add("--results", type=Path, default=results, metavar="FOLDER", help="with files of results")
    add("--docs", type=Path, default=ROOT / "docs", metavar="FOLDER", help="for measured.md")
    options = parser.parse_args(arguments)
    try:
        for name, folder in (("results", options.results), ("docs", options.docs)):
            if not folder.is_dir():
                raise ValueError(f"--{name} must be a folder, got {folder}")
        text, plots = render(options.results)
    except ValueError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    if options.check:
        wrong = differences(text, plots, options.docs)
        for words in wrong + ["`python -m benchmarks.report` writes them anew"] * bool(wrong):
            print(words, file=sys.stderr)
        return 1 if wrong else 0
    images = options.docs / "measured"
    if plots:
        images.mkdir(exist_ok=True)
    drawn = {name: draw() for name, draw in plots.items()}
    for name, figure in drawn.items():
        with replacing(images / name) as temporary, temporary.open("wb") as opened:
            FigureCanvasAgg(figure).print_png(opened, metadata={"Software": None})
    with replacing(options.docs / "measured.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(options.docs / "measured.md", *(images / name for name in plots), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
