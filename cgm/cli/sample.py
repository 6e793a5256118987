"""`cgm sample`: draws of a model, as one labeled image."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

import tyro

from cgm.cli.arguments import find_device
from cgm.cli.checkpoint import checkpoint_options, task_of
from cgm.cli.options import Device

if TYPE_CHECKING:
    from torch import Tensor

    from cgm.model import Model

_ROWS_AT_ONCE = 256  # samples are drawn in batches of about this many
_SHOWN = 32  # most rows and draws of the image that is written
_Solver = TypeVar("_Solver")


@dataclass(frozen=True)
class SampleOptions(Generic[_Solver]):
    """Draws from a trained model and writes one labeled image.

    A sample depends on the seed, on the number of its condition and of its draw, and on nothing
    else: fewer draws are the first of more.
    """

    solver: Annotated[_Solver, tyro.conf.arg(name="")]
    # The image to write, a PNG.
    out: Path = Path("samples.png")
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
    # Conditions of your own: an image, or a folder of them, of the size the model was trained on.
    cond: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    # Seed of the noise.
    seed: int = 0
    # Number of the first condition; the others count on from it.
    index: int = 0
    # Also write the samples as they are, (draws, conditions, C, H, W), to this safetensors file.
    save_array: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    # cpu, cuda or cuda:N.
    device: Device = None


@dataclass(frozen=True)
class _Conditions:
    """What to draw from: a row each, and what the image says of it."""

    cond: "Tensor | None"
    labels: tuple[str, ...]
    real: "Tensor | None" = None  # the true y, where it is known


def run(argv: Sequence[str]) -> None:
    path, data, options = checkpoint_options("sample", argv, SampleOptions)
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
    _write_image(options.out, samples, given, stacked=task_of(data) == "complete")
    shown = samples.shape[1:2] if samples.shape[2:] == POINT else samples.shape[:2]
    cut = f"; the image has the first {_SHOWN}" if max(shown) > _SHOWN else ""
    print(f"{options.out}: {samples.shape[0]} draws for each of {samples.shape[1]}{cut}")


def _write_image(file: Path, samples: "Tensor", given: _Conditions, *, stacked: bool) -> None:
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


def _draw(model: "Model", cond: "Tensor | None", options: Any, solver: dict[str, Any]) -> "Tensor":
    """Samples (n, rows, *event) on the CPU, in batches of draws."""
    import torch
    from rich.console import Console

    rows = 1 if cond is None else len(cond)
    if not 0 <= options.index <= 2**32 - rows:
        raise ValueError(f"--index must be in [0, 2^32 - {rows}], got {options.index}")
    device = model.device
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
        raise ValueError(f"CHECKPOINT must have no condition, classes or images, has {kind}")
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
        return _image_conditions(options.cond, config.cond_shape)
    task = task_of(data)
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


def _image_conditions(path: Path, shape: Sequence[int]) -> _Conditions:
    """Images of exactly this shape (C, H, W)."""
    import numpy as np
    import torch

    from cgm.data import to_float
    from cgm.data.folders import image_files, read_image

    files = image_files(path) if path.is_dir() else [path]
    channels, height, width = shape
    if channels not in (1, 3):
        raise ValueError(f"--cond must not be given: no image has {channels} channels")
    images = []
    for file in files:
        image = read_image(file, channels)
        if image.size != (width, height):
            raise ValueError(
                f"{file}: must be {width} x {height} pixels, got {image.width} x {image.height}"
            )
        pixels = torch.from_numpy(np.array(image)).reshape(height, width, channels)
        images.append(to_float(pixels).movedim(2, 0))
    return _Conditions(torch.stack(images), tuple(file.stem for file in files))


def _check_target(flag: str, file: Path, suffix: str) -> None:
    """Whether the file can be written, asked before the work is done."""
    if file.suffix.lower() != suffix or file.is_dir():
        raise ValueError(f"{flag} must be a file {suffix}, got {file}")
    if not file.parent.is_dir():
        raise ValueError(f"{flag} must be in a folder that exists, got {file}")
