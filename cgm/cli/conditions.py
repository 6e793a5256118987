"""What `cgm sample` draws from: the classes, rows or images that its options ask for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cgm.cli.checkpoint import task_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Conditions:
    """What to draw from: a row each, and what the image says of it."""

    cond: "Tensor | None"
    labels: tuple[str, ...]
    real: "Tensor | None" = None  # the true y, where it is known


def find_conditions(config: Any, data: dict[str, Any], options: Any) -> Conditions:
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
        return Conditions(None, ())
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
        raise ValueError(f"rows must be in [0, {len(held_out) - 1}], got {rows}")
    batch = held_out.batch(torch.tensor(rows))
    return Conditions(batch["cond"], tuple(f"row {row}" for row in rows), batch["y"])


def _class_conditions(num_classes: int, names: Sequence[str], asked: Sequence[str]) -> Conditions:
    import torch

    from cgkernels.checks import did_you_mean

    names = list(names) or [str(i) for i in range(num_classes)]
    ids = [] if asked else list(range(min(10, num_classes)))
    for name in asked:
        if name in names:
            ids.append(names.index(name))
        elif name.isdecimal() and int(name) < num_classes:
            ids.append(int(name))
        else:
            raise ValueError(
                f"classes must be numbers below {num_classes} or of {', '.join(names)}, "
                f"got {name!r}{did_you_mean(name, names)}"
            )
    return Conditions(torch.tensor(ids), tuple(names[i] for i in ids))


def _image_conditions(path: Path, shape: Sequence[int]) -> Conditions:
    """Images as (C, H, W) of this shape; of other sizes they are resized as training does."""
    import numpy as np
    import torch
    from PIL import Image

    from cgm.cli.signals import tell
    from cgm.data import to_float
    from cgm.data.folders import image_files, read_image

    if not path.exists():
        raise ValueError(f"cond must be an image or a folder of images, got {path}: no such file")
    files = image_files(path) if path.is_dir() else [path]
    channels, height, width = shape
    if channels not in (1, 3):
        raise ValueError(f"cond must not be given: no image has {channels} channels")
    images, resized = [], []
    for file in files:
        image = read_image(file, channels)
        if image.size != (width, height):
            resized.append(f"{file} from {image.width} x {image.height}")
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).reshape(height, width, channels)
        images.append(to_float(pixels).movedim(2, 0))
    if resized:
        others = f" and {len(resized) - 1} more" if len(resized) > 1 else ""
        tell(f"resized to {width} x {height} pixels, as in training: {resized[0]}{others}")
    stems = [file.stem for file in files]
    labels = (file.stem if stems.count(file.stem) == 1 else file.name for file in files)
    return Conditions(torch.stack(images), tuple(labels))
