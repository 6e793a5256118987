"""`cgm sample`: draws of a model, as one labeled image."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

import tyro

from cgm.cli.arguments import find_device
from cgm.cli.checkpoint import checkpoint_options, task_of
from cgm.cli.conditions import Conditions, find_conditions
from cgm.cli.options import Device, flags_of, naming_flags

if TYPE_CHECKING:
    from torch import Tensor

    from cgm.model import Model

_ROWS_AT_ONCE = 256  # samples are drawn in batches of about this many
_SHOWN = 32  # most rows and draws of the image that is written
_Solver = TypeVar("_Solver")


@dataclass(frozen=True)
class SampleOptions(Generic[_Solver]):
    """Draws from a trained model and writes one labeled image, or one for each image of a folder.

    A sample depends on the seed, on the number of its condition and of its draw, and on nothing
    else: fewer draws are the first of more.
    """

    solver: Annotated[_Solver, tyro.conf.arg(name="")]
    # The image to write, a PNG; for a folder of conditions a folder of images, one for each, with
    # its draws side by side and no labels. Folders are made if need be.
    out: Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="PATH", help_behavior_hint="(default: samples.png, or the next free samples-2)"
        ),
    ] = None
    # Draws for each condition.
    n: int = 8
    # Classes to draw, by name or number.
    classes: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="CLASS ...", help_behavior_hint="(default: the first ten)"),
    ] = ()
    # Conditions, for a model trained on a task with images as conditions: rows of the images
    # kept from training.
    rows: Annotated[
        tuple[int, ...],
        tyro.conf.arg(metavar="ROW ...", help_behavior_hint="(default: the first eight)"),
    ] = ()
    # Conditions of your own: an image, or a folder of them, resized as in training if need be.
    cond: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    # Seed of the noise.
    seed: int = 0
    # Number of the first condition; the others count on from it.
    index: int = 0
    # Also write the samples as they are, (draws, conditions, C, H, W), to this safetensors file.
    save_array: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    # cpu, cuda or cuda:N.
    device: Device = None


def run(argv: Sequence[str]) -> None:
    path, data, options = checkpoint_options("sample", argv, SampleOptions)
    with naming_flags(flags_of(options)):
        _sample(path, data, options, argv[0])


def _sample(path: Path, data: dict[str, Any], options: Any, checkpoint: str) -> None:
    from cgm.checkpoints import load_model, write_tensors
    from cgm.studies.targets import make_folder, replaced

    if not 1 <= options.n < 2**31:  # the number of a draw is the upper half of a sample's
        raise ValueError(f"n must be at least 1 and less than 2^31, got {options.n}")
    out, apart = _target(options)
    if options.save_array is not None:
        _check_file("save_array", options.save_array, ".safetensors")
    model = load_model(path, find_device(options.device))
    given = find_conditions(model.config, data, options)
    rows = len(given.labels) or 1
    if not 0 <= options.index <= 2**32 - rows:
        raise ValueError(f"index must be in [0, 2^32 - {rows}], got {options.index}")
    make_folder("out", out if apart else out.parent, "a folder" if apart else "in a folder")
    if options.save_array is not None:
        make_folder("save_array", options.save_array.parent, "in a folder")
    solver = dataclasses.asdict(options.solver)
    samples = _draw(model, given.cond, options, solver)
    if options.save_array is not None:
        note = replaced([options.save_array])
        tensors = {"samples": samples} | ({} if given.cond is None else {"cond": given.cond})
        what = {"checkpoint": checkpoint, "seed": options.seed, "index": options.index, **solver}
        write_tensors(options.save_array, tensors, what)
        print(f"{options.save_array}{note}: samples {tuple(samples.shape)}")
    stacked = task_of(data) == "complete"
    if apart:
        _write_apart(out, samples, given, stacked=stacked)
    else:
        _write_image(out, samples, given, stacked=stacked)


def _target(options: Any) -> tuple[Path, bool]:
    """The file to write, or the folder for one of each condition and True."""
    from cgm.studies.targets import free_name

    given, folder = options.out, options.cond is not None and options.cond.is_dir()
    if given is None:
        return free_name(Path("samples" if folder else "samples.png")), folder
    if folder and given.suffix.lower() != ".png":
        if given.exists() and not given.is_dir():
            raise ValueError(f"out must be a folder, or a file .png for all of them, got {given}")
        return given, True
    _check_file("out", given, ".png")
    return given, False


def _check_file(name: str, file: Path, suffix: str) -> None:
    if file.suffix.lower() != suffix or file.is_dir():
        raise ValueError(f"{name} must be a file {suffix}, got {file}")


def _write_image(file: Path, samples: "Tensor", given: Conditions, *, stacked: bool) -> None:
    from cgm.studies.targets import replaced
    from cgm.viz.plots import POINT, sample_grid

    note, points = replaced([file]), samples.shape[2:] == POINT
    cond = None if given.cond is None or given.cond.dim() != 4 else given.cond[:_SHOWN]
    sample_grid(
        file,
        samples[: None if points else _SHOWN, :_SHOWN],
        cond=cond,
        real=None if given.real is None else given.real[:_SHOWN],
        labels=given.labels[:_SHOWN],
        stacked=stacked,
    )
    shown = samples.shape[1:2] if points else samples.shape[:2]
    cut = f"; the image has the first {_SHOWN}" if max(shown) > _SHOWN else ""
    print(f"{file}{note}: {samples.shape[0]} draws for each of {samples.shape[1]}{cut}")


def _write_apart(folder: Path, samples: "Tensor", given: Conditions, *, stacked: bool) -> None:
    """An image of each condition, its draws side by side."""
    from cgm.studies.targets import replaced
    from cgm.viz.plots import as_images, write_image

    files = [folder / f"{label}.png" for label in given.labels]
    note = replaced(files)
    shown = as_images(samples, given.cond, stacked=stacked)
    for row, file in enumerate(files):
        write_image(file, shown[:, row].movedim(0, 2).flatten(2, 3))
    print(f"{folder}{note}: {len(files)} images of {samples.shape[0]} draws each")


def _draw(model: "Model", cond: "Tensor | None", options: Any, solver: dict[str, Any]) -> "Tensor":
    """Samples (n, rows, *event) on the CPU, in batches of draws."""
    import torch

    from cgm.training.progress import Status, time_left

    rows = 1 if cond is None else len(cond)
    device = model.device
    at_once = max(1, _ROWS_AT_ONCE // rows)
    parts = []
    what = f"drawing {options.n} for each of {rows}"
    with Status() as status:
        since = time.perf_counter()
        for first in range(0, options.n, at_once):
            status.update(f"{what}, {first} done{time_left(since, first, options.n)}")
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
