"""`cgm compare`: the families on one task, under one budget of training, by the same scores.

Each family is trained for the same number of seconds: the first steps are timed, and as many follow
as fit, so that the learning rate of each runs its course. Then each draws for the same conditions,
none of which it saw. A family runs in a process of its own, so that its memory is its own.

A folder that holds a comparison of the same budget is not trained again, but drawn from.
"""

import csv
import dataclasses
import json
import math
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cgm.checkpoints import load_model, read_tensors, replacing, write_tensors
from cgm.data import PINK, TEAL, Batch, Dataset, epoch_order, load_task, synthetic
from cgm.evaluation import ground_truth as truth
from cgm.evaluation.features import ClassifierFeatures
from cgm.evaluation.likelihood import class_accuracy
from cgm.evaluation.metrics import Moments, best_of_n, frechet_distance
from cgm.evaluation.out_of_distribution import anomaly_scores, has_density
from cgm.model import config_class, family_class, make_model
from cgm.training import TrainingConfig, train
from cgm.viz.plots import POINT, as_pictures, picture_grid, point_map

_TIMED, _WARM = 6, 2  # steps that are timed, and those before
_SEED = 0
_SHOWN, _SHOWN_DRAWS = 6, 3  # conditions in the picture, and draws of each
RESULT_FILE, SAMPLES_FILE = "result.json", "samples.safetensors"


# Who takes part ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Entry:
    """A family, and how it is made, trained and drawn from where its defaults do not fit a task."""

    family: str
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    solver: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Contest:
    """What a task asks of a family: so many draws for each of so many held-out conditions."""

    rows: int
    draws: int
    score: Callable[[Tensor, Batch], truth.Scores]  # of samples (draws, rows, *event)
    entries: tuple[Entry, ...]
    # Of the model itself, where it has what this needs.
    judge: Callable[[Any, Batch], truth.Scores] | None = None


def _colours(samples: Tensor, held_out: Batch) -> truth.Scores:
    assert held_out["cond"] is not None
    return truth.colour_scores(samples, held_out["cond"])


def _gaussians(samples: Tensor, held_out: Batch) -> truth.Scores:
    return truth.gaussian_scores(samples.flatten(0, 1), held_out["y"])


def _moons(samples: Tensor, held_out: Batch) -> truth.Scores:
    cond = held_out["cond"]
    assert cond is not None
    return truth.moon_scores(samples.flatten(0, 1), cond.repeat(len(samples)), held_out["y"], cond)


def _balls(samples: Tensor, held_out: Batch) -> truth.Scores:
    """Of the balls that meet no wall."""
    balls = synthetic.balls("test")
    free = (~balls.bounced[: samples.shape[1]]).nonzero()[:, 0]
    return truth.ball_scores(samples[:, free], balls.before[free], balls.position[free])


def _clothes(samples: Tensor, held_out: Batch) -> truth.Scores:
    """Share in the asked class; Frechet distance to the held-out pictures, not comparable to FID.

    The distance depends on the number of samples: of so many real ones it is the floor.
    """
    cond = held_out["cond"]
    assert cond is not None
    real, features = load_task("class_to_image", "test"), ClassifierFeatures()
    n = samples.shape[0] * samples.shape[1]
    order = epoch_order(len(real), 0, 0)

    def moments(y: Tensor) -> Moments:
        found = Moments()
        found.add(features(y).double())
        return found

    rest = moments(real.batch(order[n:])["y"])
    drawn = samples.flatten(0, 1)
    return {
        "in the class": class_accuracy(drawn, cond.repeat(len(samples))),
        "FD-classifier": frechet_distance(moments(drawn), rest),
        "its floor": frechet_distance(moments(real.batch(order[:n])["y"]), rest),
    }


def _anomalies(model: Any, held_out: Batch) -> truth.Scores:
    """AUROC of the held-out clothes, if the model has a density, a bound or an energy."""
    if not has_density(model):
        return {}
    found = anomaly_scores(model, held_out["y"])
    return {f"AUROC, {name}": value for name, value in found.items()}


def _pictures(samples: Tensor, held_out: Batch) -> truth.Scores:
    """Mean |y - y'| of the draws, of the best of them, and between two of them."""
    errors = (samples - held_out["y"]).abs().flatten(2).mean(2)
    pairs = [(a - b).abs().mean() for a, b in combinations(samples, 2)]
    return {
        "error": errors.mean().item(),
        "best of n": best_of_n(errors)[-1].item(),
        "between draws": torch.stack(pairs).mean().item(),
    }


_SMALL: dict[str, Any] = {"width": 16}
_BATCH: dict[str, Any] = {"batch_size": 32, "learning_rate": 2e-3, "warmup": 50, "ema_decay": 0.99}
# With the usual base of 10,000 most wavelengths are longer than these pictures.
_TRANSFORMER: dict[str, Any] = {
    "depth": 1, "width": 64, "heads": 4, "hidden": 256, "rope_base": 100.0
}  # fmt: skip
# Many steps of few pictures: each is some hundred values to predict.
_SEQUENCES: dict[str, Any] = {**_BATCH, "batch_size": 4, "learning_rate": 3e-3}
_COLOURS = (TEAL, PINK, (0.0, 0.0))
_FLAT: dict[str, Any] = {"batch_size": 256, "warmup": 50}
_POINT_REGRESSION: dict[str, Any] = {"width": 16, "depth": 1}
_POINT_TRANSFORMER: dict[str, Any] = {
    "levels": 64, "depth": 2, "width": 32, "heads": 2, "hidden": 64, "positions": "learned",
    "cond_dropout": 0.0,
}  # fmt: skip
_POINT_VAE: dict[str, Any] = {"depth": 1, "width": 64, "latents": 2, "learn_scale": True}
_POINT_UNET: dict[str, Any] = {
    "width": 64, "width_multipliers": (1,), "blocks": 1, "attention_depth": 0, "patch": 1,
    "cond_dropout": 0.0,
}  # fmt: skip
_POINT_FLOW: dict[str, Any] = {"steps": (8,), "depth": 1, "levels": 0, "noise": 0.02}
# The data are finer than the noise on pictures, and f of two numbers can be as large as -log p.
_POINT_ENERGY: dict[str, Any] = {
    "patch": 1, "depth": 1, "width": 64, "hidden": 256, "temperature": 0.2, "step_size": 0.002,
    "data_noise": 0.0, "chains": 4096, "chain_steps": 5, "square_weight": 1e-4,
}  # fmt: skip
_POINT_GAN: dict[str, Any] = {
    "patch": 1, "depth": 1, "latents": 4, "width": 64, "discriminator_width": 64, "r1_weight": 0.1
}  # fmt: skip
# Without a condition what is said of it, and of the regressions' network, is of no effect.
_OF_POINTS = (
    Entry("gaussian_regression", _POINT_REGRESSION, _FLAT),
    Entry("mixture_density", _POINT_REGRESSION, _FLAT),
    Entry("quantized_classifier", {**_POINT_REGRESSION, "levels": 64}, _FLAT),
    Entry("vae", _POINT_VAE, _FLAT, {"noise": True}),
    Entry("autoregressive", _POINT_TRANSFORMER, _FLAT),
    Entry("flow", _POINT_FLOW, _FLAT),
    Entry(
        "diffusion",
        _POINT_UNET,
        {**_FLAT, "learning_rate": 3e-3, "ema_decay": 0.99},
        {"clip": False},
    ),
    Entry("gan", _POINT_GAN, {"batch_size": 128, "learning_rate": 1e-3, "ema_decay": 0.995}),
    # As many steps as a chain of the training lives: in longer ones the weights of the Gaussians
    # drift, on which chains that begin anew have no say.
    Entry("energy", _POINT_ENERGY, {"batch_size": 256, "learning_rate": 2e-3}, {"steps": 100}),
)
_OF_PICTURES = (
    *(
        Entry(family, _SMALL, _BATCH)
        for family in (
            "least_squares", "gaussian_regression", "mixture_density", "quantized_classifier"
        )
    ),
    # A finer scale than the decoder can be right to is paid for in z: the prior draws other ones.
    Entry("vae", {**_SMALL, "scale": 0.3}, _BATCH),
)  # fmt: skip
CONTESTS = {
    "colorize": Contest(
        rows=50,
        draws=8,
        score=_colours,
        entries=(
            Entry("least_squares", _SMALL, _BATCH),
            Entry("gaussian_regression", _SMALL, _BATCH),
            Entry("mixture_density", _SMALL, _BATCH),
            Entry("quantized_classifier", {**_SMALL, "palette": _COLOURS}, _BATCH),
            Entry(
                "vae",
                {**_SMALL, "depth": 2, "latents": 1, "pooled": True, "scale": 0.3},
                _BATCH,
            ),
            Entry(
                "autoregressive",
                # All levels of the luminance: what is garment begins within one of 16.
                {**_TRANSFORMER, "palette": _COLOURS, "levels": 256, "cond_dropout": 0.0},
                _SEQUENCES,
            ),
            Entry("flow", {"steps": (1, 4), "width": 24, "levels": 0, "noise": 0.05}, _BATCH),
            Entry("diffusion", {"cond_dropout": 0.0}, _BATCH, {"steps": 20}),
            Entry("gan", {**_SMALL, "latents": 8}, {"batch_size": 32, "learning_rate": 5e-4}),
            Entry(
                "energy",
                {"patch": 1, "data_noise": 0.05, "start_std": 0.15},
                {},
                {"temperature": 0.1},
            ),
        ),
    ),
    "class_to_image": Contest(
        rows=100,
        draws=2,
        score=_clothes,
        judge=_anomalies,
        entries=(
            *_OF_PICTURES,
            Entry("autoregressive", _TRANSFORMER, _SEQUENCES),
            Entry("flow", {"steps": (2, 4), "width": 16}, _BATCH),
            Entry("diffusion", {}, _BATCH, {"steps": 12, "sampler": "dpmpp_2m", "guidance": 2.0}),
            Entry("gan", {}, {}),
            Entry("energy", {}, {}, {"temperature": 0.1}),
        ),
    ),
    **{
        task: Contest(
            rows=50,
            draws=4,
            score=_pictures,
            entries=(
                *_OF_PICTURES,
                Entry("autoregressive", {**_TRANSFORMER, "cond_dropout": 0.0}, _SEQUENCES),
                Entry("flow", {"steps": (2, 4), "width": 16}, _BATCH),
                Entry("diffusion", {"cond_dropout": 0.0}, _BATCH, {"steps": 20}),
                Entry("gan", {**_SMALL, "latents": 8}, {"batch_size": 32}),
                Entry("energy", {}, {}, {"temperature": 0.1}),
            ),
        )
        for task in ("complete", "edges_to_image")
    },
    "eight_gaussians": Contest(
        rows=500,
        draws=1,
        score=_gaussians,
        entries=_OF_POINTS,
    ),
    "two_moons": Contest(
        rows=500,
        draws=1,
        score=_moons,
        entries=_OF_POINTS,
    ),
    "bouncing_ball": Contest(
        rows=100,
        draws=8,
        score=_balls,
        entries=(
            Entry("least_squares", _SMALL, _BATCH),
            Entry(
                "vae",
                {
                    "width": 32,
                    "depth": 1,
                    "blocks": 2,
                    "latents": 2,
                    "pooled": True,
                    "scale": 0.1,
                    "free_bits": 2.0,
                },
                {"batch_size": 64, "learning_rate": 3e-3, "warmup": 100, "ema_decay": 0.99},
            ),
            Entry("diffusion", {"cond_dropout": 0.0}, _BATCH, {"steps": 20}),
        ),
    ),
}


# The comparison -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Result:
    """What one family came to."""

    family: str
    scores: truth.Scores
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
    if task not in CONTESTS:
        raise ValueError(f"task must be one of {', '.join(CONTESTS)}, got {task!r}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be positive, got {seconds}")
    contest = CONTESTS[task]
    entries = {entry.family: entry for entry in contest.entries}
    for name in families:
        if name not in entries:
            raise ValueError(f"families must be of {', '.join(entries)}, got {name!r}")
    chosen = [entry for name, entry in entries.items() if not families or name in families]
    for entry in chosen:
        _check_folder(out / entry.family, seconds)
    console = console or Console()
    out.mkdir(parents=True, exist_ok=True)
    results, pictures = [], {}
    spawned = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, spawned, max_tasks_per_child=1) as pool,
        console.status("") as status,
    ):
        for entry in chosen:
            status.update(f"{task}: {entry.family}")
            job = pool.submit(
                run_entry, task, contest, entry, out / entry.family, seconds, str(device)
            )
            results.append(job.result())
            pictures[entry.family] = read_tensors(out / entry.family / SAMPLES_FILE)[0]["samples"]
            _write_csv(out / "compare.csv", results)  # what is done survives an interruption
    _print(console, f"{task}, {contest.draws} draws for each of {contest.rows}", results)
    held_out = load_task(task, "test").batch(torch.arange(contest.rows))
    _draw(out / "compare.png", pictures, held_out, stacked=task == "complete")
    console.print(f"{out / 'compare.csv'}, {out / 'compare.png'}", highlight=False, soft_wrap=True)
    return results


def run_entry(
    task: str, contest: Contest, entry: Entry, folder: Path, seconds: float, device: str
) -> Result:
    """The result of one family; its samples (draws, rows, *event) are written into its folder."""
    file = folder / RESULT_FILE
    if not file.exists():
        # Under its own name only when it is finished; another's folder is never touched.
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        steps, took = _train(entry, load_task(task), partial, seconds, device)
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
    samples, rate = _samples(model, held_out, contest, dict(entry.solver))
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


def entry_config(entry: Entry, dataset: Dataset) -> Any:
    """The config of the family's model on these data."""
    cls = config_class(family_class(entry.family))
    of_data = ("event_shape", "cond_kind", "cond_shape", "num_classes")
    names = {field.name for field in dataclasses.fields(cls)}
    given = {name: getattr(dataset, name) for name in of_data if name in names}
    return cls(**(given | dict(entry.model)))


def _train(
    entry: Entry, dataset: Dataset, folder: Path, seconds: float, device: str
) -> tuple[int, float]:
    """Steps and seconds of a training that lasts about so long."""
    model_class = family_class(entry.family)
    config = entry_config(entry, dataset)
    chosen = model_class.training_defaults | dict(entry.training)

    def run(steps: int, out: Path) -> list[float]:
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
            console=Console(quiet=True),
        )  # fmt: skip
        return times

    with tempfile.TemporaryDirectory() as scratch:
        times = run(_WARM + _TIMED, Path(scratch))
    each = statistics.median(after - before for before, after in pairwise(times[_WARM:]))
    steps = max(1, round(seconds / each))
    times = run(steps, folder)
    return steps, times[-1] - times[0]


def _samples(
    model: Any, held_out: Batch, contest: Contest, solver: dict[str, Any]
) -> tuple[Tensor, float]:
    """Samples (draws, rows, *event) on the CPU, and how many a second, warmed up."""
    device = next(model.parameters()).device
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


def _draw(file: Path, pictures: Mapping[str, Tensor], held_out: Batch, *, stacked: bool) -> None:
    """A column of draws for each family, beside the conditions and what is true."""
    y, cond = held_out["y"], held_out["cond"]
    if y.shape[1:] == POINT:
        classes = torch.zeros(len(y), dtype=torch.int64) if cond is None else cond
        kinds = classes.unique()

        def mapped(points: Tensor) -> Tensor:
            of_draws = classes.repeat(len(points))
            parts = [points.flatten(0, 1)[of_draws == kind][:, None] for kind in kinds]
            return torch.stack([point_map(part)[0] for part in parts])[None]

        groups = [(name, mapped(points)) for name, points in pictures.items()]
        picture_grid(file, [*groups, ("true", mapped(y[None]))])
        return
    shown = None if cond is None or cond.dim() != 4 else cond[:_SHOWN]
    groups = [
        (name, as_pictures(drawn[:_SHOWN_DRAWS, :_SHOWN], shown, stacked=stacked))
        for name, drawn in pictures.items()
    ]
    if shown is not None:
        groups.insert(0, ("given", as_pictures(shown)[None]))
    groups.append(("true", as_pictures(y[:_SHOWN], shown, stacked=stacked)[None]))
    picture_grid(file, groups)
