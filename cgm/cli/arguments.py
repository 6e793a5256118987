"""What arguments need before any flag is parsed, and without tyro."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def first_argument(argv: Sequence[str], usage: str) -> tuple[str, Sequence[str]]:
    """The first argument, which decides what options there are, and the rest."""
    helped = bool(argv) and argv[0] in ("-h", "--help")
    if not argv or helped:
        print(f"usage: {usage}", file=sys.stdout if helped else sys.stderr)
        raise SystemExit(0 if helped else 2)
    if argv[0].startswith("-"):
        line = usage.splitlines()[0]
        first = next(word for word in line.split() if word.isupper())
        raise ValueError(
            f"{first} must come before the options, which depend on it, got {argv[0]} first: {line}"
        )
    return argv[0], argv[1:]


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
