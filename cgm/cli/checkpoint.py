"""The argument CHECKPOINT of `cgm sample` and `cgm evaluate`."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cgm.cli.arguments import first_argument
from cgm.cli.options import as_flags, checked, parse


def checkpoint_options(
    command: str, argv: Sequence[str], options: Any
) -> tuple[Path, dict[str, Any], Any]:
    """The checkpoint that a command is given, the data it was trained on, and the options."""
    from cgm.checkpoints import drawable_names, read_config, sampling_preset
    from cgm.model import family_class

    checkpoint, rest = first_argument(
        argv,
        f"cgm {command} CHECKPOINT [OPTIONS]\n\n"
        "CHECKPOINT is the folder of a run, or the name of a shipped checkpoint: "
        f"{', '.join(drawable_names())}.\ncgm {command} CHECKPOINT --help lists its options.",
    )
    path = find_checkpoint(checkpoint)
    info = read_config(path)
    model_class = family_class(info["family"])
    if model_class.sampling_config is None:
        raise ValueError(f"{path}: is a model of the family {info['family']}, which draws nothing")
    prog = f"cgm {command} {shlex.quote(checkpoint)}"
    solver = as_flags(model_class.sampling_config, sampling_preset(path))
    parsed = parse(options, solver, prog=prog, args=rest)
    chosen = checked(model_class.sampling_config, parsed.solver)
    return path, info.get("data", {}), dataclasses.replace(parsed, solver=chosen)


def task_of(data: dict[str, Any]) -> str | None:
    """The shipped task that the data of a checkpoint are; a user's folder may have its name."""
    from cgm.data import TASKS, load_task
    from cgm.training import describe_data

    name = data.get("name")
    same = name in TASKS and describe_data(load_task(name))["crc32"] == data.get("crc32")
    return name if same else None


def find_checkpoint(name: str) -> Path:
    """The folder of a run, or of the shipped checkpoint of this name."""
    from cgkernels.checks import did_you_mean
    from cgm.checkpoints import drawable_names, shipped

    known = drawable_names()
    if name and Path(name).is_dir():
        return Path(name)
    if name in known:
        return shipped(name)
    runs = [str(path) for path in Path("runs").glob("*") if path.is_dir()]
    raise ValueError(
        f"CHECKPOINT must be a folder, or one of {', '.join(known)}; got {name!r}"
        f"{did_you_mean(name, [*known, *runs])}"
    )
