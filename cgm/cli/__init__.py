"""The command `cgm`.

A subcommand is a function of its arguments, listed in COMMANDS. Its options are a dataclass, of
which tyro makes the flags; the comment of a field is its help. What needs torch is imported by the
function, so that `cgm --help` answers at once.
"""

import dataclasses
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

import tyro

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from torch import Tensor

    from cgm.data import Dataset
    from cgm.evaluation.likelihood import Measure
    from cgm.viz.sample_page import Shown

# Fields of a model's config that follow from the data; they are no flags.
DATA_FIELDS = ("event_shape", "cond_kind", "cond_shape", "num_classes")

_ROWS_AT_ONCE = 256  # samples are drawn in batches of about this many
_SHOWN = 32  # most rows and draws of the picture that `cgm sample` writes
_Model = TypeVar("_Model")
_Training = TypeVar("_Training")
_Solver = TypeVar("_Solver")


# cgm train ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TrainOptions(Generic[_Model, _Training]):
    """Trains a model on one of the tasks, or on a folder of your own pictures.

    Ctrl-C saves and stops; the same command with --resume continues with the same bits.
    """

    model: _Model
    training: _Training
    # What to learn: class_to_image, complete, colorize or edges_to_image on the shipped pictures;
    # bouncing_ball, two_moons or eight_gaussians on data that are drawn.
    task: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    # A folder of your own pictures, instead of a task.
    data: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    # What is in that folder: pairs (A and B side by side in each picture), two_folders (A and B
    # with equal names), unpaired (A and B, unrelated) or classes (one folder for each).
    layout: str = "pairs"
    # Side to which its pictures are resized, pixels.
    size: int = 64
    # Side of the square that training takes out of them, somewhere else in each epoch; 0 for all.
    crop: int = 0
    # Mirror half of them left to right, others in each epoch.
    flip: tyro.conf.FlagCreatePairsOff[bool] = False
    # 3 to read its pictures in colour, 1 in grey.
    channels: int = 3
    # AtoB makes B from A, BtoA makes A from B.
    direction: str = "AtoB"
    # Folder of the run.
    out: Annotated[
        Path | None,
        tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: runs/FAMILY-DATA)"),
    ] = None
    # Continue the run in that folder.
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    # cpu, cuda or cuda:N.
    device: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: cuda if present)")
    ] = None


def _train(argv: Sequence[str]) -> None:
    from cgm.model import FAMILIES, config_class, family_class, make_model
    from cgm.training import TrainingConfig, TrainingInterrupted, train

    families = [name for name in FAMILIES if name != "classifier"]  # that one is no model of y
    family, rest = _first(
        argv,
        "cgm train FAMILY [OPTIONS]\n\n"
        f"FAMILY is one of {', '.join(families)}.\ncgm train FAMILY --help lists its options.",
    )
    if family not in families:
        raise ValueError(f"FAMILY must be one of {', '.join(families)}, got {family!r}")
    model_class = family_class(family)
    model_config = config_class(model_class)
    defaults = _with_defaults(TrainingConfig, model_class.training_defaults)
    configs = _without_data_fields(model_config), defaults
    options = _parse(TrainOptions, *configs, prog=f"cgm train {family}", args=rest)
    device = find_device(options.device)
    dataset = _load_data(options)
    if not dataset.paired and not model_class.unpaired:
        raise ValueError(f"--layout must be another one: {family} learns from pairs, got unpaired")
    chosen = {
        f.name: getattr(dataset if f.name in DATA_FIELDS else options.model, f.name)
        for f in dataclasses.fields(model_config)
    }
    model = make_model(model_class, model_config(**chosen), seed=options.training.seed)
    out = options.out or Path("runs") / f"{family}-{dataset.name}"
    try:
        train(
            model,
            dataset,
            options.training,
            out,
            device=device,
            resume=options.resume,
            shown=_shown(options),
        )
    except TrainingInterrupted as stop:
        raise KeyboardInterrupt(str(stop)) from None
    if options.training.sheet_every:
        print(f"What it drew while it learned is in {out / 'index.html'}.")
    if model_class.sampling_config is None:
        print(f"The model is in {out}.")
        return
    print(f"The model is in {out}. To draw from it:")
    cond = " --cond PICTURE" if options.data and dataset.cond_kind == "image" else ""
    print(f"  cgm sample {shlex.quote(str(out))}{cond}")


def _shown(options: Any) -> "Shown | None":
    """What the sheets show: of a task pictures kept from training, of other data the first rows."""
    if not options.training.sheet_every or options.task is None:
        return None
    from cgm.data import load_task
    from cgm.viz.sample_page import first_rows

    return first_rows(load_task(options.task, "test"), stacked=options.task == "complete")


def _without_data_fields(model_config: type) -> type:
    """The config as flags, not checked: that waits for the data, whose fields are no flags."""
    hints = typing.get_type_hints(model_config)

    class Options(model_config):  # type: ignore[valid-type, misc]
        __doc__ = model_config.__doc__
        __annotations__ = {
            name: tyro.conf.Suppress[hint]  # type: ignore[misc, valid-type]
            for name, hint in hints.items()
            if name in DATA_FIELDS
        }

        def __post_init__(self) -> None:
            pass

    return dataclass(frozen=True)(Options)


def _with_defaults(config: type, defaults: dict[str, Any]) -> type:
    """The config with other defaults."""
    hints = typing.get_type_hints(config)

    # A class statement: of a class without source tyro finds no comments, its parents' neither.
    class Options(config):  # type: ignore[valid-type, misc]
        __doc__ = config.__doc__
        __annotations__ = {name: hints[name] for name in defaults}

    for name, value in defaults.items():
        setattr(Options, name, value)
    return dataclass(frozen=True)(Options)


def _load_data(options: TrainOptions) -> "Dataset":
    from cgm.data import TASKS, load_folder, load_task

    if (options.task is None) == (options.data is None):
        raise ValueError(
            f"one of --task and --data must be given; --task is one of {', '.join(TASKS)}"
        )
    of_folder = ("layout", "size", "crop", "flip", "channels", "direction")
    values = {name: getattr(options, name) for name in of_folder}
    if options.data is not None:
        return load_folder(options.data, **values)
    for name, value in values.items():
        if value != getattr(TrainOptions, name):
            raise ValueError(f"--{name} belongs to --data; a task has its own pictures")
    assert options.task is not None
    return load_task(options.task)


# cgm sample ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SampleOptions(Generic[_Solver]):
    """Draws from a trained model and writes one labelled picture.

    A sample depends on the seed, on the number of its condition and of its draw, and on nothing
    else: fewer draws are the first of more.
    """

    solver: Annotated[_Solver, tyro.conf.arg(name="")]
    # The picture to write, a PNG.
    out: Path = Path("samples.png")
    # Draws for each condition.
    n: int = 8
    # Classes to draw, by name or number.
    classes: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="CLASS ...", help_behavior_hint="(default: the first ten)"),
    ] = ()
    # Conditions, for a model trained on a task with pictures as conditions: rows of the pictures
    # kept from training.
    rows: Annotated[
        tuple[int, ...],
        tyro.conf.arg(metavar="ROW ...", help_behavior_hint="(default: the first eight)"),
    ] = ()
    # Conditions of your own: a picture, or a folder of them, of the size the model was trained on.
    cond: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    # Seed of the noise.
    seed: int = 0
    # Number of the first condition; the others count on from it.
    index: int = 0
    # Also write the samples as they are, (draws, conditions, C, H, W), to this safetensors file.
    save_array: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    # cpu, cuda or cuda:N.
    device: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: cuda if present)")
    ] = None


@dataclass(frozen=True)
class _Conditions:
    """What to draw from: a row each, and what the picture says of it."""

    cond: "Tensor | None"
    labels: tuple[str, ...]
    real: "Tensor | None" = None  # the true y, where it is known


def _sample(argv: Sequence[str]) -> None:
    path, data, options = _checkpoint_options("sample", argv, SampleOptions)
    from cgm.checkpoints import load_model, write_tensors
    from cgm.viz.plots import POINT

    if options.n < 1:
        raise ValueError(f"--n must be at least 1, got {options.n}")
    _check_target("--out", options.out, ".png")
    if options.save_array is not None:
        _check_target("--save-array", options.save_array, ".safetensors")
    model = load_model(path, find_device(options.device))
    given = _conditions(model.config, data, options)
    solver = dataclasses.asdict(options.solver)
    samples = _draw(model, given.cond, options, solver)
    if options.save_array is not None:
        tensors = {"samples": samples} | ({} if given.cond is None else {"cond": given.cond})
        what = {"checkpoint": argv[0], "seed": options.seed, "index": options.index, **solver}
        write_tensors(options.save_array, tensors, what)
        print(f"{options.save_array}: samples {tuple(samples.shape)}")
    _write_picture(options.out, samples, given, stacked=_task_of(data) == "complete")
    shown = samples.shape[1:2] if samples.shape[2:] == POINT else samples.shape[:2]
    cut = f"; the picture has the first {_SHOWN}" if max(shown) > _SHOWN else ""
    print(f"{options.out}: {samples.shape[0]} draws for each of {samples.shape[1]}{cut}")


def _checkpoint_options(
    command: str, argv: Sequence[str], options: Any
) -> tuple[Path, dict[str, Any], Any]:
    """The checkpoint that a command is given, the data it was trained on, and the options."""
    from cgm.checkpoints import drawable_names, read_config
    from cgm.model import family_class

    checkpoint, rest = _first(
        argv,
        f"cgm {command} CHECKPOINT [OPTIONS]\n\n"
        "CHECKPOINT is the folder of a run, or the name of a shipped checkpoint: "
        f"{', '.join(drawable_names())}.\ncgm {command} CHECKPOINT --help lists its options.",
    )
    path = _find_checkpoint(checkpoint)
    info = read_config(path)
    model_class = family_class(info["family"])
    if model_class.sampling_config is None:
        raise ValueError(f"{path}: is a model of the family {info['family']}, which draws nothing")
    prog = f"cgm {command} {shlex.quote(checkpoint)}"
    parsed = _parse(options, model_class.sampling_config, prog=prog, args=rest)
    return path, info.get("data", {}), parsed


def _write_picture(file: Path, samples: "Tensor", given: _Conditions, *, stacked: bool) -> None:
    from cgm.viz.plots import POINT, sample_grid

    cond = None if given.cond is None or given.cond.dim() != 4 else given.cond[:_SHOWN]
    sample_grid(
        file,
        samples[: None if samples.shape[2:] == POINT else _SHOWN, :_SHOWN],
        cond=cond,
        real=None if given.real is None else given.real[:_SHOWN],
        labels=given.labels[:_SHOWN],
        stacked=stacked,
    )


def _draw(model: Any, cond: "Tensor | None", options: Any, solver: dict[str, Any]) -> "Tensor":
    """Samples (n, rows, *event) on the CPU, in batches of draws."""
    import torch
    from rich.console import Console

    rows = 1 if cond is None else len(cond)
    if not 0 <= options.index <= 2**32 - rows:
        raise ValueError(f"--index must be in [0, 2^32 - {rows}], got {options.index}")
    device = next(model.parameters()).device
    at_once = max(1, _ROWS_AT_ONCE // rows)
    parts = []
    with Console().status("") as status:
        for first in range(0, options.n, at_once):
            status.update(f"drawing, {first} of {options.n} for each of {rows}")
            count = min(at_once, options.n - first)
            if cond is None:
                index = options.index + torch.arange(first, first + count) * 2**32
                part = model.sample(count, seed=options.seed, index=index, **solver)[:, None]
            else:
                index = options.index + torch.arange(rows) + first * 2**32
                part = model.sample(
                    count, cond=cond.to(device), seed=options.seed, index=index, **solver
                )
            parts.append(part.cpu())
    return torch.cat(parts)


def _conditions(config: Any, data: dict[str, Any], options: Any) -> _Conditions:
    """The conditions that the options ask for, or the first ones."""
    import torch

    kind = config.cond_kind
    asked = {"--classes": options.classes, "--rows": options.rows, "--cond": options.cond}
    fitting = {"none": (), "class": ("--classes",), "image": ("--rows", "--cond")}
    if kind not in fitting:
        raise ValueError(f"CHECKPOINT must have no condition, classes or pictures, has {kind}")
    given = [name for name, value in asked.items() if value]
    for name in given:
        if name not in fitting[kind]:
            raise ValueError(f"{name} does not fit this model, whose condition is: {kind}")
    if kind == "none":
        return _Conditions(None, ())
    if kind == "class":
        return _class_conditions(config.num_classes, data.get("class_names", ()), options.classes)
    if len(given) > 1:
        raise ValueError("one of --rows and --cond can be given, not both")
    if options.cond is not None:
        return _picture_conditions(options.cond, config.cond_shape)
    task = _task_of(data)
    if task is None:
        raise ValueError("--cond must be given: this model was not trained on a shipped task")
    from cgm.data import load_task

    held_out = load_task(task, "test")
    rows = options.rows or tuple(range(8))
    if not 0 <= min(rows) <= max(rows) < len(held_out):
        raise ValueError(f"--rows must be in [0, {len(held_out) - 1}], got {rows}")
    batch = held_out.batch(torch.tensor(rows))
    return _Conditions(batch["cond"], tuple(f"row {row}" for row in rows), batch["y"])


def _class_conditions(num_classes: int, names: Sequence[str], asked: Sequence[str]) -> _Conditions:
    import torch

    names = list(names) or [str(i) for i in range(num_classes)]
    ids = [] if asked else list(range(min(10, num_classes)))
    for name in asked:
        if name in names:
            ids.append(names.index(name))
        elif name.isdecimal() and int(name) < num_classes:
            ids.append(int(name))
        else:
            raise ValueError(
                f"--classes must be numbers below {num_classes} or of {', '.join(names)}, "
                f"got {name!r}"
            )
    return _Conditions(torch.tensor(ids), tuple(names[i] for i in ids))


def _picture_conditions(path: Path, shape: Sequence[int]) -> _Conditions:
    """Pictures of exactly this shape (C, H, W)."""
    import numpy as np
    import torch

    from cgm.data import to_float
    from cgm.data.folders import picture_files, read_picture

    files = picture_files(path) if path.is_dir() else [path]
    channels, height, width = shape
    if channels not in (1, 3):
        raise ValueError(f"--cond must not be given: no picture has {channels} channels")
    pictures = []
    for file in files:
        picture = read_picture(file, channels)
        if picture.size != (width, height):
            raise ValueError(
                f"{file}: must be {width} x {height} pixels, got {picture.width} x {picture.height}"
            )
        pixels = torch.from_numpy(np.array(picture)).reshape(height, width, channels)
        pictures.append(to_float(pixels).movedim(2, 0))
    return _Conditions(torch.stack(pictures), tuple(file.stem for file in files))


def _task_of(data: dict[str, Any]) -> str | None:
    """The shipped task that the data of a checkpoint are; a user's folder may have its name."""
    from cgm.data import TASKS, load_task
    from cgm.training import describe_data

    name = data.get("name")
    same = name in TASKS and describe_data(load_task(name))["crc32"] == data.get("crc32")
    return name if same else None


def _find_checkpoint(name: str) -> Path:
    from cgm.checkpoints import drawable_names, shipped

    if Path(name).is_dir():
        return Path(name)
    if name in drawable_names():
        return shipped(name)
    raise ValueError(
        f"CHECKPOINT must be a folder, or one of {', '.join(drawable_names())}; got {name!r}"
    )


def _check_target(flag: str, file: Path, suffix: str) -> None:
    """Whether the file can be written, asked before the work is done."""
    if file.suffix.lower() != suffix or file.is_dir():
        raise ValueError(f"{flag} must be a file {suffix}, got {file}")
    if not file.parent.is_dir():
        raise ValueError(f"{flag} must be in a folder that exists, got {file}")


# cgm evaluate -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class EvaluateOptions(Generic[_Solver]):
    """Measures a model that was trained on a task, on pictures kept from its training.

    Bits per dimension of a model with likelihoods, and how much its condition tells it; of a model
    of the ten classes the share of samples in the class that was asked for. Then how its samples
    compare with real pictures, and whether they are copies of the training pictures.
    """

    solver: Annotated[_Solver, tyro.conf.arg(name="")]
    # What to measure: task (what the model was trained for), inception_score, fd, kid,
    # precision_recall, birthday, memorisation, conditions.
    measures: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: all that fit)"),
    ] = ()
    # What pictures are compared by: classifier (the shipped one), pixels or inception (by
    # torchmetrics, which downloads it).
    features: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="NAME", help_behavior_hint="(default: classifier if it fits, else pixels)"
        ),
    ] = None
    # Samples to compare with real pictures; any number of them.
    samples: int = 200
    # Held-out pictures of the task, the first ones; a sample is drawn for each.
    rows: int = 200
    # Folder for evaluation.json and nearest.png, samples beside the training pictures nearest to
    # them.
    out: Annotated[
        Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: none)")
    ] = None
    # Seed of the samples.
    seed: int = 0
    # cpu, cuda or cuda:N.
    device: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: cuda if present)")
    ] = None


def _evaluate(argv: Sequence[str]) -> None:
    path, data, options = _checkpoint_options("evaluate", argv, EvaluateOptions)
    from rich.console import Console

    from cgm.checkpoints import load_model
    from cgm.data import load_task
    from cgm.evaluation.features import load_features
    from cgm.evaluation.likelihood import check_rows, evaluate
    from cgm.evaluation.sample_quality import against_real, check_measures, write_nearest

    task = _task_of(data)
    if task is None:
        raise ValueError(f"{path}: was not trained on a shipped task, so nothing is held out")
    if options.out is not None and not options.out.is_dir():
        raise ValueError(f"--out must be a folder, got {options.out}")
    device, console = find_device(options.device), Console()
    training, held_out = load_task(task), load_task(task, "test")
    check_rows(options.rows, held_out)
    settings: dict[str, Any] = {"seed": options.seed, **dataclasses.asdict(options.solver)}
    asked = tuple(name for name in options.measures if name != "task")
    extractor, tables = None, []
    if asked or not options.measures:
        extractor = load_features(options.features, held_out.event_shape, device)
        asked = check_measures(asked or None, held_out, extractor)
    with console.status("") as status:
        model, samples, comparison = load_model(path, device), None, None
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
            tables.append(("Samples beside real pictures", comparison.measures))
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
            tables.insert(0, (f"{path.name} on pictures of {task} that it never saw", found))
    for title, measures in tables:
        compared = comparison is not None and measures is comparison.measures
        console.print(_table_of(title, measures, compared=compared))
    if extractor is not None:
        console.print(_WHAT_IT_SAYS.format(name=extractor.name, fingerprint=extractor.fingerprint))
    if options.out is None:
        return
    if comparison is not None and comparison.first is not None:
        file = options.out / "nearest.png"
        write_nearest(file, comparison, training, held_out, stacked=task == "complete")
        print(f"{file}: samples, and the training pictures nearest to them")
    what = {"checkpoint": argv[0], "task": task, "samples": options.samples, **settings}
    if extractor is not None:
        what["features"] = {"name": extractor.name, "fingerprint": extractor.fingerprint}
    _write_measures(options.out / "evaluation.json", what, [m for _, part in tables for m in part])


# What the second table cannot say in its columns.
_WHAT_IT_SAYS = (
    "held out: the same of real pictures that the model never saw, as many as the last column "
    "says. Features of {name}, fingerprint {fingerprint}: only figures of Inception can be "
    "compared with published ones. memorisation z far below 0: closer to the training pictures "
    "than unseen ones are, as copies are, and pictures smoother than real ones."
)


def _table_of(title: str, measures: "list[Measure]", *, compared: bool) -> "Table":
    """compared: real pictures stand beside the samples, which have no standard errors."""
    from rich.table import Table

    table = Table(title=title)
    columns = ["mean", "standard error", "pictures"]
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
    print(f"{file}: the figures")


# cgm convert --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ConvertOptions:
    """Makes a checkpoint of ours from a published file of pix2pix or CycleGAN.

    Of a CycleGAN give the file that ends in net_G_A.pth, with the one of net_G_B.pth beside it.
    Discriminators (net_D.pth; net_D_A.pth, net_D_B.pth) are taken from beside it if they are there.
    """

    # The file of a generator, such as latest_net_G.pth.
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    # Folder of the checkpoint to write.
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    # Side of the pictures, pixels; the file does not tell.
    size: int = 256
    # Whether a U-Net of pix2pix has dropout; the file does not tell.
    dropout: bool = True


def _convert(argv: Sequence[str]) -> None:
    options = _parse(ConvertOptions, prog="cgm convert", args=argv)
    from cgm.checkpoints import save_model
    from cgm.families.convert import convert_published

    out = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"OUT must be an empty folder, or a new one, got {out}")
    model, sources = convert_published(options.file, size=options.size, dropout=options.dropout)
    save_model(out, model, {"converted": sources})
    for network, source in sources.items():
        print(f"{network}: {source}")
    print(f"The model is in {out}. To draw from it:")
    print(f"  cgm sample {shlex.quote(str(out))} --cond PICTURE")


# cgm info -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class InfoOptions:
    """Prints versions, the GPU, how each op runs here, and the shipped checkpoints."""


def _info(argv: Sequence[str]) -> None:
    _parse(InfoOptions, prog="cgm info", args=argv)
    import platform
    from importlib import metadata

    import torch
    from rich.console import Console
    from rich.table import Table

    import cgkernels  # noqa: F401  (registers the ops)
    from cgkernels._triton import HAS_TRITON, triton
    from cgkernels.library import OPS
    from cgm.checkpoints import shipped_names

    cuda = torch.cuda.is_available()
    table = Table(show_header=False, box=None)
    table.add_row("cgkernels", metadata.version("cgkernels"))
    table.add_row("python", f"{platform.python_version()}, {platform.platform()}")
    table.add_row("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    table.add_row("triton", triton.__version__ if HAS_TRITON else "not installed")
    interpreting = HAS_TRITON and triton.knobs.runtime.interpret
    if HAS_TRITON:
        table.add_row("interpreter", "on (TRITON_INTERPRET)" if interpreting else "off")
    if not cuda:
        table.add_row("GPU", "none that CUDA can use")
    for number in range(torch.cuda.device_count() if cuda else 0):
        major, minor = torch.cuda.get_device_capability(number)
        name = torch.cuda.get_device_name(number)
        table.add_row(f"GPU {number}", f"{name}, compute capability {major}.{minor}")
    table.add_row("checkpoints", ", ".join(shipped_names()) or "none")
    console = Console()
    console.print(table)

    ops = Table(title="How the ops run here")
    for column in ("op", "on the CPU", "on CUDA"):
        ops.add_column(column)
    if not cuda:
        fused = "no GPU"
    elif not HAS_TRITON:
        fused = "not at all: no Triton"
    else:
        fused = "Triton kernel, interpreted" if interpreting else "fused Triton kernel"
    for name in sorted(OPS):
        ops.add_row(name, "plain PyTorch", fused)
    console.print(ops)


# cgm demo -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class DemoOptions:
    """Draws all ten classes of clothes and completes upper halves, under a minute on two cores.

    Writes demo.png; prints samples per second, in plain PyTorch and by this library, and how many
    of the pictures a classifier puts in the class that was asked for.
    """

    # Folder for demo.png.
    out: Path = Path(".")
    # cpu, cuda or cuda:N.
    device: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: cuda if present)")
    ] = None


def _demo(argv: Sequence[str]) -> None:
    options = _parse(DemoOptions, prog="cgm demo", args=argv)
    from cgm.studies.demo import demo

    demo(options.out, device=find_device(options.device))


# cgm compare --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class CompareOptions:
    """Trains the families on one task, each for the same time, and scores what they draw.

    Prints the scores and what they cost; writes compare.csv and compare.png beside the models. What
    is there already, of the same budget, is not trained again.
    """

    # The task: colorize, class_to_image, complete, edges_to_image, bouncing_ball, two_moons or
    # eight_gaussians.
    task: Annotated[str, tyro.conf.arg(metavar="NAME")] = "colorize"
    # Families to compare, by name.
    families: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: all)")
    ] = ()
    # Seconds of training for each.
    seconds: float = 60.0
    # Folder of the comparison.
    out: Annotated[
        Path | None,
        tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: runs/compare-TASK)"),
    ] = None
    # cpu, cuda or cuda:N.
    device: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: cuda if present)")
    ] = None


def _compare(argv: Sequence[str]) -> None:
    options = _parse(CompareOptions, prog="cgm compare", args=argv)
    from cgm.studies.compare import compare

    compare(
        options.task,
        options.out or Path("runs") / f"compare-{options.task}",
        families=options.families,
        seconds=options.seconds,
        device=find_device(options.device),
    )


# cgm bench ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class BenchOptions:
    """Samples per second of the shipped models: fused, in plain PyTorch, and compiled.

    Prints a table; writes bench.csv and bench.png. The ways take turns, and must draw the same
    samples before they are timed. torch.compile takes up to minutes for its first call.
    """

    # Models to time, by name.
    models: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: all)")
    ] = ()
    # Ways to run them: fused, plain, compiled.
    ways: Annotated[tuple[str, ...], tyro.conf.arg(metavar="WAY ...")] = (
        "fused",
        "plain",
        "compiled",
    )
    # Samples drawn by one call.
    rows: int = 16
    # Seconds of timing for each way.
    seconds: float = 2.0
    # Folder for bench.csv and bench.png.
    out: Path = Path(".")
    # cpu, cuda or cuda:N.
    device: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: cuda if present)")
    ] = None


def _bench(argv: Sequence[str]) -> None:
    options = _parse(BenchOptions, prog="cgm bench", args=argv)
    from cgm.studies.throughput import bench

    bench(
        options.out,
        device=find_device(options.device),
        models=options.models,
        ways=options.ways,
        rows=options.rows,
        seconds=options.seconds,
    )


# cgm ----------------------------------------------------------------------------------------------
def _first(argv: Sequence[str], usage: str) -> tuple[str, Sequence[str]]:
    """The first argument, which decides what options there are, and the rest."""
    if not argv or argv[0].startswith("-"):
        helped = bool(argv) and argv[0] in ("-h", "--help")
        print(f"usage: {usage}", file=sys.stdout if helped else sys.stderr)
        raise SystemExit(0 if helped else 2)
    return argv[0], argv[1:]


def _parse(options: Any, *configs: type, prog: str, args: Sequence[str]) -> Any:
    """The options, with these configs for the parameters of their class."""
    return tyro.cli(options[configs] if configs else options, prog=prog, args=args)


def find_device(name: str | None) -> "torch.device":
    """The device of a flag --device; ValueError if it is not here."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"--device must be one that is here, got {name!r} with {gpus} GPUs")
    return device


@dataclass(frozen=True)
class Command:
    """A subcommand: what it does with its arguments; the one before the options; a line of help."""

    run: Callable[[Sequence[str]], None]
    argument: str
    help: str


COMMANDS = {
    "train": Command(_train, "FAMILY", "train a model on a task or on your own pictures"),
    "sample": Command(_sample, "CHECKPOINT", "draw from a trained model, or from a shipped one"),
    "evaluate": Command(_evaluate, "CHECKPOINT", "measure a model on pictures that it never saw"),
    "convert": Command(_convert, "FILE OUT", "use a published checkpoint of pix2pix or CycleGAN"),
    "demo": Command(_demo, "", "draw clothes; how fast and how good they come, in a minute"),
    "compare": Command(_compare, "", "all families on one task, under one budget"),
    "bench": Command(_bench, "", "samples per second: fused, plain and compiled"),
    "info": Command(_info, "", "versions, GPU, how each op runs here, shipped checkpoints"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns its exit code.

    0: done. 2: something that the user gave does not fit; stderr says what. 130: Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in COMMANDS:
            COMMANDS[argv[0]].run(argv[1:])
            return 0
        _first(argv, _usage())
        raise ValueError(f"COMMAND must be one of {', '.join(COMMANDS)}, got {argv[0]!r}")
    except SystemExit as stop:  # after help, or what tyro says of a flag
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        print(f"cgm: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"cgm: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _usage() -> str:
    lines = [
        f"  cgm {name + ' ' + command.argument:<20} {command.help}"
        for name, command in COMMANDS.items()
    ]
    return "\n".join(["cgm COMMAND ...", "", *lines, "", "With --help, each lists its options."])
