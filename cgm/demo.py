"""`cgm demo`: pictures of clothes from the shipped model, and how fast and how good they come.

Every picture that is timed is also judged: the draws are made in batches, each numbered on from the
one before; the first batches are drawn twice, in plain PyTorch and by this library.
"""

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import cgkernels
from cgm.checkpoints import load_model, shipped
from cgm.data import load_task, to_float
from cgm.data.fashion import CLASS_NAMES
from cgm.evaluation import class_accuracy, held_out_accuracy
from cgm.plots import picture_grid

CHECKPOINT = "class_to_image_diffusion"
SOLVER: dict[str, Any] = {"sampler": "dpmpp_2m", "steps": 12, "guidance": 2.0}
PLAIN, LIBRARY = "plain PyTorch", "this library"
_SEED = 0
_DRAWS = 2  # of each class in a batch
_SHOWN = 8  # of each class in the picture
# Half a level of a picture with 256 of them: what is below cannot be seen or saved.
_VISIBLE = 1 / 255


@dataclass(frozen=True)
class Measured:
    """Samples (draws, classes, C, H, W) in [-1, 1], and what drawing them showed."""

    samples: Tensor
    rates: dict[str, list[float]]  # samples per second, of each batch in each way
    difference: float  # largest between the two ways
    threads: int  # of PyTorch on the CPU


def demo(
    out: Path,
    *,
    device: torch.device | str = "cpu",
    seconds: float = 40.0,
    samples: int = 500,
    timed: int = 6,
    console: Console | None = None,
) -> Measured:
    """Writes out/demo.png and prints the table.

    seconds: time for drawing; no batch is begun that might not end in it, except for those that
    the picture needs, of which two are drawn in both ways. samples: to draw and judge, at most.
    timed: batches to draw in both ways.

    Raises RuntimeError if the two ways draw visibly different pictures.
    """
    console = console or Console()
    file = out / "demo.png"
    if not out.is_dir():
        raise ValueError(f"out must be a folder, got {out}")
    model = load_model(shipped(CHECKPOINT), device, expected_family="diffusion")
    threads = torch.get_num_threads()
    try:
        with console.status("drawing") as status:
            measured = _measure(model, seconds, samples, timed, status.update)
    finally:
        torch.set_num_threads(threads)
    if measured.difference > _VISIBLE:
        raise RuntimeError(f"{PLAIN} and {LIBRARY} differ by {measured.difference:.3g} of [-1, 1]")
    real = load_task("class_to_image", "test")
    assert real.cond is not None
    first = torch.stack([real.y[real.cond == label][0] for label in range(len(CLASS_NAMES))])
    options = ", ".join(f"{name} {value}" for name, value in SOLVER.items())
    picture_grid(
        file,
        [
            (f"drawn: {options}", measured.samples[:_SHOWN]),
            ("real, held out", to_float(first)[None]),
        ],
        row_labels=CLASS_NAMES,
    )
    _print(console, measured, torch.device(device))
    console.print(
        f"{file}: pictures that the model drew, and a column of real ones, which it never saw.",
        highlight=False,
        soft_wrap=True,
    )
    return measured


def _measure(
    model: Any, seconds: float, samples: int, timed: int, say: Callable[[str], None]
) -> Measured:
    """Batches in the order plain, library, library, plain, ...; then the library's alone."""
    cond = torch.arange(len(CLASS_NAMES), device=next(model.parameters()).device)

    def draw(way: str, batch: int, **changed: Any) -> tuple[Tensor, float]:
        index = cond + batch * _DRAWS * 2**32  # the batch continues the numbers of the draws
        with cgkernels.reference() if way == PLAIN else contextlib.nullcontext():
            start = time.perf_counter()
            drawn = model.sample(
                _DRAWS, cond=cond, seed=_SEED, index=index, **{**SOLVER, **changed}
            )
            drawn = drawn.cpu()  # waits for the device
        return drawn, len(drawn) * len(cond) / (time.perf_counter() - start)

    for way in (PLAIN, LIBRARY):
        draw(way, 0, steps=2)  # warm-up: memory, threads, kernels
    # One thread or PyTorch's own number, whichever is faster here: threads that share their cores
    # with other work wait for one another most of the time.
    threads = {}
    for count in {1, torch.get_num_threads()}:
        torch.set_num_threads(count)
        threads[draw(LIBRARY, 0, steps=2)[1]] = count
    torch.set_num_threads(threads[max(threads)])
    begin = last = time.perf_counter()
    longest = 0.0
    parts: list[Tensor] = []
    rates: dict[str, list[float]] = {PLAIN: [], LIBRARY: []}
    difference = 0.0
    total = -(-samples // (_DRAWS * len(cond)))
    while len(parts) < total:
        number = len(parts)
        late = last + longest - begin > seconds
        if late and number * _DRAWS >= _SHOWN:
            break
        say(f"drawing, {number * _DRAWS * len(cond)} of {samples} pictures")
        ways = (PLAIN, LIBRARY) if number % 2 == 0 else (LIBRARY, PLAIN)
        drawn = {}
        for way in ways if number < (2 if late else timed) else (LIBRARY,):
            drawn[way], rate = draw(way, number)
            rates[way].append(rate)
        if PLAIN in drawn:
            differs = (drawn[PLAIN] - drawn[LIBRARY]).abs().max().item()
            difference = max(difference, differs)
        parts.append(drawn[LIBRARY])
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return Measured(torch.cat(parts), rates, difference, torch.get_num_threads())


def _print(console: Console, measured: Measured, device: torch.device) -> None:
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"the CPU (threads: {measured.threads})"
    )
    table = Table(title=f"Samples per second on {where}")
    for column in ("", "median", "lowest", "highest", f"batches of {_DRAWS * len(CLASS_NAMES)}"):
        table.add_column(column, justify="right" if column else "left")
    compared = len(measured.rates[PLAIN])
    for way in (PLAIN, LIBRARY):
        rates = measured.rates[way][:compared]
        cells = (statistics.median(rates), min(rates), max(rates))
        table.add_row(way, *(f"{rate:.3g}" for rate in cells), str(len(rates)))
    console.print(table)
    pairs = zip(measured.rates[LIBRARY], measured.rates[PLAIN], strict=False)
    ratio = statistics.median(mine / plain for mine, plain in pairs)
    why = (
        "on a CPU both run the same plain PyTorch operations, so it is about 1"
        if device.type == "cpu"
        else "the network is the same, and what differs are the ops around it"
    )
    n, classes = measured.samples.shape[:2]
    labels = torch.arange(classes).repeat(n)
    drawn = class_accuracy(measured.samples.flatten(0, 1), labels)
    lines = (
        f"This library to plain PyTorch, batch by batch: {ratio:.2f}; {why}.",
        f"Same weights, seed and numbers: largest difference {measured.difference:.1e} of [-1, 1].",
        f"The shipped classifier puts {drawn:.1%} of {len(labels)} drawn pictures in the asked "
        f"class, and {held_out_accuracy():.1%} of 1000 real ones.",
    )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
