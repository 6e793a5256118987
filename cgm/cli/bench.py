"""`cgm bench`: samples per second of the shipped models."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cgm.cli.arguments import find_device
from cgm.cli.options import Device, flags_of, naming_flags, parse


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
    # Folder for bench.csv and bench.png, made if need be.
    out: Path = Path(".")
    # cpu, cuda or cuda:N.
    device: Device = None


def run(argv: Sequence[str]) -> None:
    options = parse(BenchOptions, prog="cgm bench", args=argv)
    from cgm.studies.throughput import bench

    with naming_flags(flags_of(options)):
        bench(
            options.out,
            device=find_device(options.device),
            models=options.models,
            ways=options.ways,
            rows=options.rows,
            seconds=options.seconds,
        )
