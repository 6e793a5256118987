"""`cgm compare`: the families on one task."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cgm.cli.arguments import find_device
from cgm.cli.options import Device, flags_of, naming_flags, parse
from cgm.cli.signals import tell


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
    device: Device = None


def run(argv: Sequence[str]) -> None:
    options = parse(CompareOptions, prog="cgm compare", args=argv)
    from cgm.studies.compare import compare

    out = options.out or Path("runs") / f"compare-{options.task}"
    with naming_flags(flags_of(options)):
        try:
            compare(
                options.task,
                out,
                families=options.families,
                seconds=options.seconds,
                device=find_device(options.device),
            )
        except (KeyboardInterrupt, SystemExit):
            tell(f"what is done stays in {out}; the same command goes on with the other families")
            raise
