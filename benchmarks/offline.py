"""Compile every launch of every op for NVIDIA GPUs, on a machine without one, and judge the code.

    python -m benchmarks.offline                            all, for sm_80, sm_90, sm_100, sm_120
    python -m benchmarks.offline guided_step_fwd --arch 90 --csv offline.csv
    python -m benchmarks.offline gpt2_12x768                what a model launches, for all four

What ops list (`benchmarks.ops`), and what models are recorded to launch (`benchmarks.models`).

One line per kernel; the exit status is 1 if anything must not land, 2 for a wrong call. Registers
differ between Triton versions: compare within one. Compiled kernels stay in Triton's cache.
"""

import argparse
import csv
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from benchmarks.harness.records import version_of
from benchmarks.models.launches import RUNS, recorded_launches
from benchmarks.ops import LAUNCHES, source_of
from cgkernels._triton import HAS_TRITON, triton
from cgkernels.testing import KernelReport, Launch, compile_launch, problems

ARCHITECTURES = (80, 90, 100, 120)

_LINE = "{:18} {:48} {:20} {:>4} {:>5} {:>5} {:>6} {:>6} {:>16} {:>5} {:>5} {:8} {:>6}"
_HEAD = "op|launch|kernel|arch|warps|regs|stack|spills|shared / limit|load|store|matrix|instr."


def compile_all(
    launches: Iterable[tuple[str, Launch]], architectures: Sequence[int]
) -> Iterator[tuple[str, str, int, list[KernelReport], list[str]]]:
    """(op, label of the launch, architecture, reports, problems) of each launch (op, launch)."""
    for op, launch in launches:
        for arch in architectures:
            try:
                reports = compile_launch(launch, arch)
            except Exception as error:  # of the compiler: the next launch may be sound
                found = [f"does not compile: {type(error).__name__}: {error}"]
                yield op, launch.label, arch, [], found
            else:
                yield op, launch.label, arch, reports, problems(reports, launch)


def listed(ops: Iterable[str], every: int = 1) -> Iterator[tuple[str, Launch]]:
    """(op, launch) of what ops list, each or every n-th."""
    for op in ops:
        for launch in list(LAUNCHES[op]())[::every]:
            yield op, launch


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offline",
        description="Compile the launches of the ops without a GPU, and judge the code.",
    )
    known = f"of {', '.join(sorted(LAUNCHES))}, or a model: {', '.join(RUNS)}"
    parser.add_argument("names", nargs="*", metavar="OP", help=f"{known} (default: all)")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--csv", metavar="FILE", help="write the table there too")
    options = parser.parse_args(arguments)
    if not HAS_TRITON:
        parser.error("Triton is not installed")
    if triton.knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    for name in options.names:
        if name not in LAUNCHES and name not in RUNS:
            parser.error(f"no op {name!r}; there are {known.removeprefix('of ')}")
    ops = [name for name in options.names or LAUNCHES if name in LAUNCHES]
    models = [name for name in options.names or RUNS if name in RUNS]

    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    print(_LINE.format(*_HEAD.split("|")))
    launches = chain(listed(ops), recorded_launches(models) if models else ())
    for op, label, arch, reports, found in compile_all(launches, options.arch):
        for r in reports:
            rows.append(
                {
                    "triton": triton.__version__,
                    "op": op,
                    "version": version_of(source_of(op)),
                    "launch": label,
                    **dataclasses.asdict(r),
                }
            )
            shared = f"{r.shared} / {r.shared_limit}"
            print(
                _LINE.format(
                    op, label, r.kernel, arch, r.warps, r.registers, r.stack, r.spills, shared,
                    r.load_bits or "-", r.store_bits or "-", r.matrix or "-", r.instructions,
                ),
                flush=True,
            )  # fmt: skip
        failures += [f"{op}, {label}, sm_{arch}: {problem}" for problem in found]
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            of_kernel = [field.name for field in dataclasses.fields(KernelReport)]
            writer = csv.DictWriter(file, ["triton", "op", "version", "launch", *of_kernel])
            writer.writeheader()
            writer.writerows(rows)
    print(f"\n{len(rows)} kernels, Triton {triton.__version__}, problems: {len(failures)}")
    for failure in failures:
        print("PROBLEM", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
