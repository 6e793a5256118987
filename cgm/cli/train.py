"""`cgm train`: a model learns a task, or a folder of images."""

import dataclasses
import shlex
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

import tyro

from cgm.cli.arguments import find_device, first_argument
from cgm.cli.options import Device, parse, with_defaults

if TYPE_CHECKING:
    from cgm.data import Dataset
    from cgm.viz.sample_page import Shown

_Model = TypeVar("_Model")
_Training = TypeVar("_Training")


@dataclass(frozen=True)
class TrainOptions(Generic[_Model, _Training]):
    """Trains a model on one of the tasks, or on a folder of your own images.

    Ctrl-C saves and stops; the same command with --resume continues with the same bits.
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
    device: Device = None


def run(argv: Sequence[str]) -> None:
    from cgm.data import DATA_FIELDS
    from cgm.model import FAMILIES, config_class, family_class, make_model
    from cgm.training import TrainingConfig, TrainingInterrupted, train

    families = [name for name in FAMILIES if name != "classifier"]  # that one is no model of y
    family, rest = first_argument(
        argv,
        "cgm train FAMILY [OPTIONS]\n\n"
        f"FAMILY is one of {', '.join(families)}.\ncgm train FAMILY --help lists its options.",
    )
    if family not in families:
        raise ValueError(f"FAMILY must be one of {', '.join(families)}, got {family!r}")
    model_class = family_class(family)
    model_config = config_class(model_class)
    defaults = with_defaults(TrainingConfig, model_class.training_defaults)
    configs = _without_data_fields(model_config), defaults
    options = parse(TrainOptions, *configs, prog=f"cgm train {family}", args=rest)
    device = find_device(options.device)
    dataset = _load_data(options)
    if not dataset.paired and not model_class.unpaired:
        raise ValueError(f"--layout must be another one: {family} learns from pairs, got unpaired")
    chosen = {
        f.name: getattr(dataset if f.name in DATA_FIELDS else options.model, f.name)
        for f in dataclasses.fields(model_config)
    }
    model = make_model(model_class, model_config(**chosen), seed=options.training.seed)
    from cgm.studies.contests import preset_for

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
            sampling=preset_for(options.task, model) if options.task else {},
        )
    except TrainingInterrupted as stop:
        raise KeyboardInterrupt(str(stop)) from None
    if options.training.sheet_every:
        print(f"What it drew while it learned is in {out / 'index.html'}.")
    if model_class.sampling_config is None:
        print(f"The model is in {out}.")
        return
    print(f"The model is in {out}. To draw from it:")
    cond = " --cond IMAGE" if options.data and dataset.cond_kind == "image" else ""
    print(f"  cgm sample {shlex.quote(str(out))}{cond}")


def _shown(options: Any) -> "Shown | None":
    """What the sheets show: of a task images kept from training, of other data the first rows."""
    if not options.training.sheet_every or options.task is None:
        return None
    from cgm.data import load_task
    from cgm.viz.sample_page import first_rows

    return first_rows(load_task(options.task, "test"), stacked=options.task == "complete")


def _without_data_fields(model_config: type) -> type:
    """The config as flags, not checked: that waits for the data, whose fields are no flags."""
    from cgm.data import DATA_FIELDS

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
            raise ValueError(f"--{name} belongs to --data; a task has its own images")
    assert options.task is not None
    return load_task(options.task)
