"""`cgm train`: a model learns a task, or a folder of images."""

import contextlib
import dataclasses
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

import tyro

from cgm.cli.arguments import find_device, first_argument
from cgm.cli.options import Device, as_flags, checked, flags_of, naming_flags, parse
from cgm.cli.signals import SIGPIPE, discard_stdout, tell
from cgm.cli.start import Start, find_start

if TYPE_CHECKING:
    from cgm.data import Dataset
    from cgm.viz.sample_page import Shown

_Model = TypeVar("_Model")
_Training = TypeVar("_Training")


@dataclass(frozen=True)
class TrainOptions(Generic[_Model, _Training]):
    """Trains a model on one of the tasks, or on a folder of your own images.

    Ctrl-C, SIGTERM, SIGHUP and a closed output save and stop; the same command with --resume
    continues with the same bits.
    """

    model: _Model
    training: _Training
    # What to learn: class_to_image, complete, colorize or edges_to_image on the shipped images;
    # bouncing_ball, two_moons or eight_gaussians on data that are drawn.
    task: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    # A folder of your own images, instead of a task.
    data: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    # What is in that folder: pairs (A and B side by side in each image), two_folders (A and B
    # with equal names), unpaired (A and B, unrelated) or classes (one folder for each).
    layout: str = "pairs"
    # Side to which its images are resized, pixels.
    size: int = 64
    # Side of the square that training takes out of them, somewhere else in each epoch; 0 for all.
    crop: int = 0
    # Mirror half of them left to right, others in each epoch.
    flip: tyro.conf.FlagCreatePairsOff[bool] = False
    # 3 to read its images in color, 1 in gray.
    channels: int = 3
    # The same of the images that are conditions, if they are others.
    cond_channels: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: as --channels)")
    ] = None
    # AtoB makes B from A, BtoA makes A from B.
    direction: str = "AtoB"
    # Folder of the run.
    out: Annotated[
        Path | None,
        tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: runs/FAMILY-DATA)"),
    ] = None
    # Begin with the weights of a trained, converted or shipped model, whose config is then the
    # default of the flags: fine-tuning. The optimizer begins anew.
    init: Annotated[str | None, tyro.conf.arg(metavar="CHECKPOINT")] = None
    # Continue the run in that folder. Steps, learning rate, warmup, decay and what is written how
    # often may be others than before.
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    # cpu, cuda or cuda:N.
    device: Device = None


def run(argv: Sequence[str]) -> None:
    from cgkernels.checks import check_choice
    from cgm.data import DATA_FIELDS
    from cgm.model import FAMILIES, config_class, family_class
    from cgm.training import TrainingConfig

    families = [name for name in FAMILIES if name != "classifier"]  # that one is no model of y
    family, rest = first_argument(
        argv,
        "cgm train FAMILY [OPTIONS]\n\n"
        f"FAMILY is one of {', '.join(families)}.\ncgm train FAMILY --help lists its options.",
    )
    check_choice("FAMILY", family, families)
    model_class = family_class(family)
    model_config = config_class(model_class)
    start = find_start(rest, family)
    configs = (
        as_flags(model_config, {} if start is None else start.config, hidden=DATA_FIELDS),
        as_flags(TrainingConfig, model_class.training_defaults),
    )
    options = parse(TrainOptions, *configs, prog=f"cgm train {family}", args=rest)
    training = checked(TrainingConfig, options.training, "training.")
    flags = flags_of(options)
    with naming_flags(flags):
        _train(family, dataclasses.replace(options, training=training), start, flags)


def _train(family: str, options: Any, start: Start | None, flags: dict[str, str]) -> None:
    from cgm.model import family_class, make_model
    from cgm.studies.contests import preset_for
    from cgm.training import TrainingInterrupted, train

    model_class = family_class(family)
    device = find_device(options.device)
    dataset = _load_data(options)
    if not dataset.paired and not model_class.unpaired:
        raise ValueError(f"layout must be another one: {family} learns from pairs, got unpaired")
    config = _model_config(family, options, dataset)
    out = options.out or Path("runs") / f"{family}-{dataset.name}"
    with (
        naming_flags({name: flags[f"model.{name}"] for name in vars(options.model)}),
        warnings.catch_warnings(record=True, action="always") as notes,
    ):
        model = make_model(model_class, config, seed=options.training.seed)

    def say_notes(*_: object) -> None:
        """After the first step: of a training that is refused only the reason is said."""
        while notes:
            tell(str(notes.pop(0).message))

    if start is not None:
        start.load_into(model)
    try:
        train(
            model,
            dataset,
            options.training,
            out,
            device=device,
            resume=options.resume,
            on_step=say_notes,
            shown=_shown(options),
            sampling=preset_for(options.task, model) if options.task else {},
        )
    except TrainingInterrupted as stop:
        tell(str(stop))
        if stop.signal == SIGPIPE:
            discard_stdout()
        raise SystemExit(128 + stop.signal) from None
    if options.training.sheet_every:
        print(f"What it drew while it learned is in {out / 'index.html'}.")
    if model_class.sampling_config is None:
        print(f"The model is in {out}.")
        return
    print(f"The model is in {out}. To draw from it:")
    cond = " --cond IMAGE" if options.data and dataset.cond_kind == "image" else ""
    print(f"  cgm sample {shlex.quote(str(out))}{cond}")


def _model_config(family: str, options: Any, dataset: "Dataset") -> Any:
    """The config of the model on these data; what does not fit is said of the data's flags."""
    from cgm.data import DATA_FIELDS, TASKS, load_task
    from cgm.model import config_class, family_class

    config = config_class(family_class(family))

    def on(data: "Dataset") -> Any:
        names = [f.name for f in dataclasses.fields(config) if f.name in DATA_FIELDS]
        given = {name: getattr(data, name) for name in names}
        return checked(config, options.model, "model.", **given)

    try:
        return on(dataset)
    except ValueError as error:
        text = str(error)
        if not text.startswith(("--model.event-shape", "--model.cond-", "--model.num-classes")):
            raise
    fitting = []
    for task in TASKS if options.task else ():
        with contextlib.suppress(ValueError):
            on(load_task(task))
            fitting.append(task)
    sides = f"--crop {options.crop}" if options.crop else f"--size {options.size}"
    if options.task:
        sides = f"--task {options.task}"
    kind = f"--task {options.task}" if options.task else f"--layout {options.layout}"
    for name, words in (
        ("event-shape", f"{sides}: the images"),
        ("cond-shape", f"{sides}: the conditions"),
        ("cond-kind", f"{kind}: the kind of condition"),
        ("num-classes", f"{kind}: the number of classes"),
    ):
        text = text.replace(f"--model.{name}", words)
    fits = f"; {family} can learn {', '.join(fitting)}" if fitting else ""
    raise ValueError(text + fits)


def _shown(options: Any) -> "Shown | None":
    """What the sheets show: of a task images kept from training, of other data the first rows."""
    if not options.training.sheet_every or options.task is None:
        return None
    from cgm.data import load_task
    from cgm.viz.sample_page import first_rows

    return first_rows(load_task(options.task, "test"), stacked=options.task == "complete")


def _load_data(options: TrainOptions) -> "Dataset":
    from cgkernels.checks import check_choice
    from cgm.data import TASKS, load_folder, load_task

    if (options.task is None) == (options.data is None):
        raise ValueError(
            f"one of --task and --data must be given; --task is one of {', '.join(TASKS)}"
        )
    if options.task is not None:
        check_choice("task", options.task, TASKS)
    of_folder = ("layout", "size", "crop", "flip", "channels", "cond_channels", "direction")
    values = {name: getattr(options, name) for name in of_folder}
    if options.data is not None:
        return load_folder(options.data, **values)
    for name, value in values.items():
        if value != getattr(TrainOptions, name):
            raise ValueError(f"{name} belongs to --data; a task has its own images")
    assert options.task is not None
    return load_task(options.task)
