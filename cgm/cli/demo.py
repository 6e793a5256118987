"""`cgm demo`: images of clothes, how fast and how good they come."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cgm.cli.arguments import find_device
from cgm.cli.options import Device, flags_of, naming_flags, parse


@dataclass(frozen=True)
class DemoOptions:
    """Draws all ten classes of clothes and completes upper halves, under a minute on two cores.

    Writes demo.png and families.png; prints samples per second, in plain PyTorch and by this
    library, and how many of the images a classifier puts in the class that was asked for.
    """

    # Folder for demo.png and families.png, made if need be.
    out: Path = Path(".")
    # cpu, cuda or cuda:N.
    device: Device = None


def run(argv: Sequence[str]) -> None:
    options = parse(DemoOptions, prog="cgm demo", args=argv)
    from cgm.studies.demo import demo

    with naming_flags(flags_of(options)):
        demo(options.out, device=find_device(options.device))
