"""`cgm evaluate`: measures of a model on images kept from its training."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

import tyro

from cgm.cli.arguments import find_device
from cgm.cli.checkpoint import checkpoint_options, task_of
from cgm.cli.options import Device, flags_of, naming_flags

if TYPE_CHECKING:
    from rich.table import Table

    from cgm.evaluation.likelihood import Measure

_Solver = TypeVar("_Solver")


@dataclass(frozen=True)
class EvaluateOptions(Generic[_Solver]):
    """Measures a model that was trained on a task, on images kept from its training.

    Bits per dimension of a model with likelihoods, and how much its condition tells it; of a model
    of the ten classes the share of samples in the class that was asked for. Then how its samples
    compare with real images, and whether they are copies of the training images.
    """

    solver: Annotated[_Solver, tyro.conf.arg(name="")]
    # What to measure: task (what the model was trained for), inception_score, fd, kid,
    # precision_recall, birthday, memorization, conditions.
    measures: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: all that fit)"),
    ] = ()
    # What images are compared by: classifier (the shipped one), pixels or inception (by
    # torchmetrics, which downloads it).
    features: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="NAME", help_behavior_hint="(default: classifier if it fits, else pixels)"
        ),
    ] = None
    # Samples to compare with real images; any number of them.
    samples: int = 200
    # Held-out images of the task, the first ones; a sample is drawn for each.
    rows: int = 200
    # Folder, made if need be, for evaluation.json and nearest.png, samples beside the training
    # images nearest to them.
    out: Annotated[
        Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: none)")
    ] = None
    # Seed of the samples.
    seed: int = 0
    # cpu, cuda or cuda:N.
    device: Device = None


def run(argv: Sequence[str]) -> None:
    path, data, options = checkpoint_options("evaluate", argv, EvaluateOptions)
    with naming_flags(flags_of(options)):
        _evaluate(path, data, options, argv[0])


def _evaluate(path: Path, data: dict[str, Any], options: Any, checkpoint: str) -> None:

    from cgkernels.checks import check_choice
    from cgm.checkpoints import load_model
    from cgm.data import load_task
    from cgm.evaluation.features import load_features
    from cgm.evaluation.likelihood import check_rows, evaluate
    from cgm.evaluation.sample_quality import MEASURES, against_real, check_measures, write_nearest
    from cgm.studies.targets import make_folder, replaced
    from cgm.training.progress import Status, result_console

    task = task_of(data)
    if task is None:
        raise ValueError(f"{path}: was not trained on a shipped task, so nothing is held out")
    device, console = find_device(options.device), result_console()
    training, held_out = load_task(task), load_task(task, "test")
    check_rows(options.rows, held_out)
    settings: dict[str, Any] = {"seed": options.seed, **dataclasses.asdict(options.solver)}
    for name in options.measures:
        check_choice("measures", name, ("task", *MEASURES))
    asked = tuple(name for name in options.measures if name != "task")
    extractor, tables = None, []
    if asked or not options.measures:
        extractor = load_features(options.features, held_out.event_shape, device)
        asked = check_measures(asked or None, held_out, extractor)
    model = load_model(path, device)
    if options.out is not None:
        make_folder("out", options.out)
    with Status() as status:
        samples, comparison = None, None
        if extractor is not None:
            comparison = against_real(
                model,
                training,
                held_out,
                extractor,
                samples=options.samples,
                measures=asked,
                say=status.update,
                **settings,
            )
            samples = comparison.samples[: options.rows]
            tables.append(("Samples beside real images", comparison.measures))
        if "task" in options.measures or not options.measures:
            if samples is not None and len(samples) < options.rows:
                samples = None
            found = evaluate(
                model,
                held_out,
                rows=options.rows,
                say=status.update,
                samples=samples,
                **settings,
            )
            tables.insert(0, (f"{path.name} on images of {task} that it never saw", found))
    for title, measures in tables:
        compared = comparison is not None and measures is comparison.measures
        console.print(_table_of(title, measures, compared=compared))
    if extractor is not None:
        note = _WHAT_IT_SAYS.format(name=extractor.name, fingerprint=extractor.fingerprint)
        console.print(note, soft_wrap=True)
    if options.out is None:
        return
    if comparison is not None and comparison.first is not None:
        file = options.out / "nearest.png"
        note = replaced([file])
        write_nearest(file, comparison, training, held_out, stacked=task == "complete")
        print(f"{file}{note}: samples, and the training images nearest to them")
    what = {"checkpoint": checkpoint, "task": task, "samples": options.samples, **settings}
    if extractor is not None:
        what["features"] = {"name": extractor.name, "fingerprint": extractor.fingerprint}
    file = options.out / "evaluation.json"
    note = replaced([file])
    _write_measures(file, what, [m for _, part in tables for m in part])
    print(f"{file}{note}: the figures")


# What the second table cannot say in its columns.
_WHAT_IT_SAYS = (
    "held out: the same of real images that the model never saw, as many as the last column "
    "says. Features of {name}, fingerprint {fingerprint}: only figures of Inception can be "
    "compared with published ones. memorization z far below 0: closer to the training images "
    "than unseen ones are, as copies are, and images smoother than real ones."
)


def _table_of(title: str, measures: "list[Measure]", *, compared: bool) -> "Table":
    """compared: real images stand beside the samples, which have no standard errors."""
    from rich.table import Table

    table = Table(title=title)
    columns = ["mean", "standard error", "images"]
    if compared:
        columns = ["value", "samples", "training", "held out", "of"]
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for m in measures:
        cells: list[str | None] = [m.name, f"{m.value:.4f}", _figure(m.error, ".4f"), f"{m.rows}"]
        if compared:
            beside = _figure(m.reference), _figure(m.floor), _figure(m.floor_rows)
            cells = [m.name, _figure(m.value), f"{m.rows}", *beside]
        table.add_row(*cells)
    return table


def _figure(value: float | None, form: str = ".5g") -> str | None:
    return None if value is None else f"{value:{form}}"


def _write_measures(file: Path, what: dict[str, Any], measures: "list[Measure]") -> None:
    import json

    from cgm.checkpoints import replacing

    found, of = [], ""
    for measure in measures:
        name = measure.name
        if name.startswith("... "):  # what it is of stands in a line above
            name = f"{of}, {name[4:]}"
        else:
            of = name
        found.append({**dataclasses.asdict(measure), "name": name})
    with replacing(file) as temporary:
        text = json.dumps({**what, "measures": found}, indent=2)
        temporary.write_text(text + "\n", encoding="utf-8")
