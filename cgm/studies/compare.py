"""`cgm compare`: the families on one task, under one budget of training, by the same scores.

Each family is trained for the same number of seconds: the first steps are timed, and as many follow
as fit, so that the learning rate of each runs its course. Then each draws for the same conditions,
none of which it saw. A family runs in a process of its own, so that its memory is its own.

A folder that holds a comparison of the same budget is not trained again, but drawn from.
"""

import csv
import json
import math
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cgkernels.checks import check_choice
from cgm.checkpoints import load_model, read_tensors, replacing, sampling_preset, write_tensors
from cgm.data import Batch, Dataset, load_task
from cgm.evaluation.ground_truth import Scores
from cgm.model import Model, family_class, make_model
from cgm.studies.contests import CONTESTS, Contest, Entry, entry_config
from cgm.studies.targets import make_folder, replaced
from cgm.training import TrainingConfig, train
from cgm.training.progress import Status, duration, result_console, stderr_console
from cgm.viz.plots import POINT, as_images, image_grid, point_map

_TIMED, _WARM = 6, 2  # steps that are timed, and those before
_SEED = 0
_SHOWN, _SHOWN_DRAWS = 6, 3  # conditions in the image, and draws of each
RESULT_FILE, SAMPLES_FILE = "result.json", "samples.safetensors"


# The comparison -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Result:
    """What one family came to."""

    family: str
    scores: Scores
    parameters: int
    steps: int  # of training
    training_seconds: float
    samples_per_second: float
    # Of the process while it trained, or of the GPU; None where it cannot be told.
    peak_megabytes: float | None


def compare(
    task: str,
    out: Path,
    *,
    families: Sequence[str] = (),
    seconds: float = 60.0,
    device: torch.device | str = "cpu",
    console: Console | None = None,
) -> list[Result]:
    """Trains, or loads, and scores families on a task; writes out/compare.csv and out/compare.png.

    Args:
        task: one of CONTESTS.
        out: folder; that of a model is out/FAMILY.
        families: of the task's entries; default all.
        seconds: of training each. A folder of another budget is refused.

    Raises:
        ValueError: an argument that does not fit, by name.
    """
    check_choice("task", task, CONTESTS)
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be positive, got {seconds}")
    contest = CONTESTS[task]
    entries = {entry.family: entry for entry in contest.entries}
    for name in families:
        check_choice("families", name, entries)
    chosen = [entry for name, entry in entries.items() if not families or name in families]
    for entry in chosen:
        _check_folder(out / entry.family, seconds)
    console, progress = console or result_console(), stderr_console()
    make_folder("out", out)
    note = replaced([out / "compare.csv", out / "compare.png"])
    new = sum(not (out / entry.family / RESULT_FILE).exists() for entry in chosen)
    progress.print(
        f"{task}: {len(chosen)} families, {new} of them to be trained for {seconds:g} s each; "
        f"about {duration(new * seconds)}, and the drawing",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    results, images = [], {}
    for number, entry in enumerate(chosen, 1):
        title = f"{number} of {len(chosen)}: {entry.family}"
        job = task, contest, entry, out / entry.family, seconds, str(device), title
        results.append(_in_a_process(run_entry, job))
        images[entry.family] = read_tensors(out / entry.family / SAMPLES_FILE)[0]["samples"]
        _write_csv(out / "compare.csv", results)  # what is done survives an interruption
    _print(console, f"{task}, {contest.draws} draws for each of {contest.rows}", results)
    held_out = load_task(task, "test").batch(torch.arange(contest.rows))
    _draw(out / "compare.png", images, held_out, stacked=task == "complete")
    files = f"{out / 'compare.csv'}, {out / 'compare.png'}{note}"
    console.print(files, highlight=False, markup=False, soft_wrap=True)
    return results


def _in_a_process(function: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
    """function(*arguments) in a process of its own, which ends with this one."""
    spawned = multiprocessing.get_context("spawn")
    receiving, sending = spawned.Pipe(duplex=False)
    process = spawned.Process(target=_send, args=(sending, function, arguments), daemon=True)
    process.start()
    sending.close()
    try:
        found = receiving.recv()
    except EOFError:
        process.join()
        raise ChildProcessError(
            f"the process of {arguments[-1]} ended with code {process.exitcode}"
        ) from None
    except BaseException:  # a signal: nobody waits for the result any more
        process.kill()
        raise
    finally:
        process.join()
    if isinstance(found, BaseException):
        raise found
    return found


def _send(sending: Any, function: Callable[..., Result], arguments: tuple[Any, ...]) -> None:
    try:
        sending.send(function(*arguments))
    except Exception as error:
        sending.send(error)


def run_entry(
    task: str,
    contest: Contest,
    entry: Entry,
    folder: Path,
    seconds: float,
    device: str,
    title: str = "",
) -> Result:
    """The result of one family; its samples (draws, rows, *event) are written into its folder.

    title: what progress, on stderr, is headed with; without it there is none.
    """
    progress = stderr_console() if title else Console(quiet=True)
    file = folder / RESULT_FILE
    if not file.exists():
        # Under its own name only when it is finished; another's folder is never touched.
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        steps, took = _train(entry, load_task(task), partial, seconds, device, progress, title)
        trained = {
            "seconds": seconds,
            "steps": steps,
            "training_seconds": took,
            "peak_megabytes": _peak_megabytes(torch.device(device)),
        }
        text = json.dumps(trained) + "\n"
        (partial / RESULT_FILE).write_text(text, encoding="utf-8")
        partial.rename(folder)
    trained = json.loads(file.read_text(encoding="utf-8"))
    model = load_model(folder, device, expected_family=entry.family)
    held_out = load_task(task, "test").batch(torch.arange(contest.rows))
    with Status(f"{title}: drawing {contest.draws} for each of {contest.rows}", progress):
        samples, rate = _samples(model, held_out, contest, sampling_preset(folder))
        judged = {} if contest.judge is None else contest.judge(model, held_out)
    write_tensors(folder / SAMPLES_FILE, {"samples": samples}, {"task": task})
    return Result(
        entry.family,
        contest.score(samples, held_out) | judged,
        sum(p.numel() for p in model.parameters()),
        trained["steps"],
        trained["training_seconds"],
        rate,
        trained["peak_megabytes"],
    )


def _train(
    entry: Entry,
    dataset: Dataset,
    folder: Path,
    seconds: float,
    device: str,
    progress: Console,
    title: str,
) -> tuple[int, float]:
    """Steps and seconds of a training that lasts about so long."""
    model_class = family_class(entry.family)
    config = entry_config(entry, dataset)
    chosen = model_class.training_defaults | dict(entry.training)

    def run(steps: int, out: Path, console: Console) -> list[float]:
        lines: dict[str, Any] = {
            "steps": steps,
            "save_every": steps,
            "log_every": max(1, steps // 50),
        }
        training = TrainingConfig(**lines, **chosen)
        model = make_model(model_class, config, seed=training.seed)
        times = [time.perf_counter()]
        train(
            model, dataset, training, out, device=device,
            on_step=lambda step, model: times.append(time.perf_counter()),
            console=console, sampling=entry.solver,
        )  # fmt: skip
        return times

    with (
        Status(f"{title}: timing {_WARM + _TIMED} steps", progress),
        tempfile.TemporaryDirectory() as scratch,
    ):
        times = run(_WARM + _TIMED, Path(scratch), Console(quiet=True))
    each = statistics.median(after - before for before, after in pairwise(times[_WARM:]))
    steps = max(1, round(seconds / each))
    progress.print(f"{title}: {steps} steps", highlight=False, markup=False)
    times = run(steps, folder, progress)
    return steps, times[-1] - times[0]


def _samples(
    model: Model, held_out: Batch, contest: Contest, solver: dict[str, Any]
) -> tuple[Tensor, float]:
    """Samples (draws, rows, *event) on the CPU, and how many a second, warmed up."""
    device = model.device
    cond = None if held_out["cond"] is None else held_out["cond"].to(device)

    def draw() -> Tensor:
        if cond is None:
            drawn = model.sample(contest.draws * contest.rows, seed=_SEED, **solver)
            return drawn.unflatten(0, (contest.draws, contest.rows)).cpu()
        return model.sample(contest.draws, cond=cond, seed=_SEED, **solver).cpu()

    model.sample(1, cond=None if cond is None else cond[:1], seed=_SEED, **solver)  # warm-up
    start = time.perf_counter()
    samples = draw()
    return samples, contest.draws * contest.rows / (time.perf_counter() - start)


def _peak_megabytes(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return None
    import resource  # of Unix alone

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes there, kilobytes elsewhere


def _check_folder(folder: Path, seconds: float) -> None:
    file = folder / RESULT_FILE
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))["seconds"]
        if before != seconds:
            raise ValueError(
                f"out must be a folder of the same budget: {folder} was trained for {before:g} "
                f"seconds, not {seconds:g}"
            )
    elif folder.exists():
        raise ValueError(f"out must be empty, or hold a comparison; {folder} is something else")


# Output -------------------------------------------------------------------------------------------
def _tables(results: Sequence[Result]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Scores and costs of each family, in words."""
    scores, costs = [], []
    names = list(dict.fromkeys(name for result in results for name in result.scores))
    for result in results:
        peak, of = result.peak_megabytes, result.scores
        scores.append({name: f"{of[name]:.3f}" if name in of else "-" for name in names})
        costs.append(
            {
                "samples/s": f"{result.samples_per_second:.3g}",
                "training, s": f"{result.training_seconds:.0f}",
                "steps": str(result.steps),
                "parameters": str(result.parameters),
                "memory, MB": "-" if peak is None else f"{peak:.0f}",
            }
        )
    return scores, costs


def _write_csv(file: Path, results: Sequence[Result]) -> None:
    rows = [
        {"family": result.family, **scores, **costs}
        for result, scores, costs in zip(results, *_tables(results), strict=True)
    ]
    with replacing(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _print(console: Console, title: str, results: Sequence[Result]) -> None:
    for rows in _tables(results):
        table = Table(title=title)
        table.add_column("family", no_wrap=True)
        for name in rows[0]:
            table.add_column(name, justify="right")
        for result, row in zip(results, rows, strict=True):
            table.add_row(result.family, *row.values())
        console.print(table)


def _draw(file: Path, images: Mapping[str, Tensor], held_out: Batch, *, stacked: bool) -> None:
    """A column of draws for each family, beside the conditions and what is true."""
    y, cond = held_out["y"], held_out["cond"]
    if y.shape[1:] == POINT:
        classes = torch.zeros(len(y), dtype=torch.int64) if cond is None else cond
        kinds = classes.unique()

        def mapped(points: Tensor) -> Tensor:
            of_draws = classes.repeat(len(points))
            parts = [points.flatten(0, 1)[of_draws == kind][:, None] for kind in kinds]
            return torch.stack([point_map(part)[0] for part in parts])[None]

        groups = [(name, mapped(points)) for name, points in images.items()]
        image_grid(file, [*groups, ("true", mapped(y[None]))])
        return
    shown = None if cond is None or cond.dim() != 4 else cond[:_SHOWN]
    groups = [
        (name, as_images(drawn[:_SHOWN_DRAWS, :_SHOWN], shown, stacked=stacked))
        for name, drawn in images.items()
    ]
    if shown is not None:
        groups.insert(0, ("given", as_images(shown)[None]))
    groups.append(("true", as_images(y[:_SHOWN], shown, stacked=stacked)[None]))
    image_grid(file, groups)
