"""`cgm bench`: samples per second of the reference models: fused, in plain PyTorch, and compiled.

The ways to run them are those of `cgm.evaluation.execution`. That all three draw the same samples
is checked before anything is timed.
"""

import csv
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cgkernels.checks import check_choice
from cgkernels.timing import Timing, measure
from cgm.checkpoints import drawable_names, load_model, replacing, sampling_preset, shipped
from cgm.evaluation.execution import WAYS, compiled_copy, conditions, difference_of, model_call
from cgm.model import Model
from cgm.studies.targets import make_folder, replaced
from cgm.training.progress import Status, duration, result_console

_VISIBLE = 1 / 255  # half a level of an image with 256 of them


@dataclass(frozen=True)
class Result:
    """Samples a second of one model in one way; status says why there are none.

    p20, p50, p80: quantiles. ratio: to plain PyTorch. first_call_s: seconds of the first call.
    difference: from the samples in plain PyTorch, by `difference_of`.
    """

    model: str
    way: str
    rows: int
    status: str
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    ratio: float | None = None
    first_call_s: float | None = None
    difference: float | None = None


def bench(
    out: Path,
    *,
    device: torch.device | str = "cpu",
    models: Sequence[str] = (),
    ways: Sequence[str] = WAYS,
    rows: int = 16,
    seconds: float = 2.0,
    console: Console | None = None,
) -> list[Result]:
    """Times the models in these ways, prints a table, and writes out/bench.csv and out/bench.png.

    Args:
        out: folder for the files.
        models: of `cgm.checkpoints.drawable_names()`; default all.
        ways: of `WAYS`.
        rows: samples of one call.
        seconds: of timing for each way, beside its first call.

    Raises:
        ValueError: an argument that does not fit, by name.
        RuntimeError: a way draws visibly other samples than plain PyTorch.
    """
    known = drawable_names()
    for argument, given, fitting in (("models", models, known), ("ways", ways, WAYS)):
        for name in given:
            check_choice(argument, name, fitting)
    if not ways:
        raise ValueError(f"ways must be of {', '.join(WAYS)}, got none")
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be positive, got {seconds}")
    make_folder("out", out)
    console = console or result_console()
    results: list[Result] = []
    chosen = models or known
    note = replaced([out / "bench.csv", out / "bench.png"])
    with Status(
        f"{len(chosen)} models, {seconds:g} s of timing for each of {', '.join(ways)}, about "
        f"{duration(len(chosen) * len(ways) * seconds)} beside first calls, which take minutes "
        "where they compile"
    ) as status:
        for number, name in enumerate(chosen, 1):

            def say(text: str, number: int = number) -> None:
                status.update(f"{number} of {len(chosen)}: {text}")

            say(f"{name}: loading")
            model = load_model(shipped(name), device)
            results += _bench_model(name, model, ways, rows, seconds, say)
            _write_csv(out / "bench.csv", results)  # what is done survives an interruption
    device = torch.device(device)
    cuda = device.type == "cuda"
    where = (
        torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    )
    _print(console, results, where)
    _plot(out / "bench.png", results, where)
    files = f"{out / 'bench.csv'}, {out / 'bench.png'}{note}"
    console.print(files, highlight=False, markup=False, soft_wrap=True)
    return results


def _bench_model(
    name: str, model: Model, ways: Sequence[str], rows: int, seconds: float, say: Callable
) -> list[Result]:
    cond, solver = conditions(model, rows), sampling_preset(shipped(name))
    expected = model_call(model, "plain", cond, rows=rows, **solver)()
    calls: dict[str, Callable[[], Tensor]] = {}
    first: dict[str, tuple[float, float]] = {}
    results = {}
    for way in ways:
        say(f"{name}: first call, {way}")
        start = time.perf_counter()
        try:
            twin = compiled_copy(model) if way == "compiled" else model
            call = model_call(twin, way, cond, rows=rows, **solver)
            difference = difference_of(model, call(), expected)
        except Exception as error:  # of a compiler that is not there, of memory that is full
            reason = str(error).strip().splitlines() or [""]
            results[way] = Result(name, way, rows, f"failed: {type(error).__name__}: {reason[0]}")
            continue
        first[way] = (time.perf_counter() - start, difference)
        if not difference <= _VISIBLE:
            raise RuntimeError(f"{name}, {way}: differs from plain by {difference:.3g} of [-1, 1]")
        calls[way] = call
    say(f"{name}: timing {', '.join(calls)}")
    device = expected.device
    timings = measure({way: [call] for way, call in calls.items()}, device, seconds=seconds)
    for way, timing in timings.items():
        results[way] = _result(name, way, rows, timing, timings.get("plain"), *first[way])
    return [results[way] for way in ways]


def _result(
    name: str,
    way: str,
    rows: int,
    timing: Timing,
    plain: Timing | None,
    took: float,
    differs: float,
) -> Result:
    p20, p50, p80 = (rows / time_us * 1e6 for time_us in (timing.p80, timing.p50, timing.p20))
    ratio = None if plain is None else plain.p50 / timing.p50
    return Result(name, way, rows, "ok", p20, p50, p80, ratio, took, differs)


# Output -------------------------------------------------------------------------------------------
def _write_csv(file: Path, results: Sequence[Result]) -> None:
    names = [field.name for field in dataclasses.fields(Result)]
    with replacing(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, names)
        writer.writeheader()
        writer.writerows(dataclasses.asdict(result) for result in results)


def _print(console: Console, results: Sequence[Result], where: str) -> None:
    table = Table(title=f"Samples per second on {where}")
    for column in ("model", "", "median", "20 %", "80 %", "to plain", "first call, s"):
        left = column in ("model", "")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for result in results:
        if result.status != "ok":
            table.add_row(result.model, result.way, result.status)
            continue
        cells = (result.p50, result.p20, result.p80, result.ratio, result.first_call_s)
        shown = ("-" if cell is None else f"{cell:.3g}" for cell in cells)
        table.add_row(result.model, result.way, *shown)
    console.print(table)


def _plot(file: Path, results: Sequence[Result], where: str) -> None:
    """A bar for each model and way, with the quantiles as whiskers."""
    done = [result for result in results if result.status == "ok"]
    figure = Figure(figsize=(7, 1.2 + 0.45 * len(results)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{result.model}\n{result.way}" for result in done]
    rates = [result.p50 or 0.0 for result in done]
    spread = [
        [rate - (result.p20 or 0.0) for rate, result in zip(rates, done, strict=True)],
        [(result.p80 or 0.0) - rate for rate, result in zip(rates, done, strict=True)],
    ]
    colors = [f"C{WAYS.index(result.way)}" for result in done]
    axes.barh(labels, rates, xerr=spread, color=colors, capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel("samples per second, median with 20 % and 80 % quantiles")
    axes.set_title(where, fontsize="medium")
    with replacing(file) as temporary, temporary.open("wb") as opened:
        FigureCanvasAgg(figure).print_png(opened)
