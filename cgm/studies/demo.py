"""`cgm demo`: images of clothes from the shipped models, and how fast and how good they come.

Diffusion draws clothes of each class. Every image that is timed is also judged: the draws are
made in batches, each numbered on from the one before; the first batches are drawn twice, in plain
PyTorch and by this library. Then an autoregressive model completes upper halves in several ways,
and a GAN makes images of edges. A second sheet has every family on one question with two right
answers: is this garment teal or pink?
"""

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import cgkernels
from cgm.checkpoints import drawable_names, load_model, sampling_preset, shipped
from cgm.data import load_task, to_float
from cgm.data.fashion import CLASS_NAMES
from cgm.data.tasks import edge_map
from cgm.evaluation.classifier import class_accuracy, held_out_accuracy
from cgm.evaluation.ground_truth import color_scores
from cgm.model import Model
from cgm.studies.contests import CONTESTS
from cgm.studies.targets import make_folder, replaced
from cgm.training.progress import Status, result_console
from cgm.viz.plots import as_images, image_grid

CHECKPOINT, COMPLETING = "class_to_image_diffusion", "complete_autoregressive"
TRANSLATING = "edges_to_image_pix2pix"
PLAIN, LIBRARY = "plain PyTorch", "this library"
_SEED = 0
_DRAWS = 2  # of each class in a batch
_SHOWN = 8  # of each class in the image
_WAYS_ON = 4  # completions of each upper half
_OF_EDGES = 2  # images of each edge map
COLORING = "colorize_"  # what the names of the models of the second sheet begin with
_GARMENTS, _COLORED = 6, 4  # of that sheet, and draws of each garment
# Half a level of an image with 256 of them: what is below cannot be seen or saved.
_VISIBLE = 1 / 255


@dataclass(frozen=True)
class _Shipped:
    """A shipped model, and the options of `sample` that its checkpoint says it is drawn with."""

    model: Model
    preset: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return self.model.device

    def draw(self, n: int, *, cond: Tensor, **changed: Any) -> Tensor:
        """(n, B, *event) of cond (B, ...)."""
        return self.model.sample(n, cond=cond, seed=_SEED, **{**self.preset, **changed})


def _load(name: str, family: str, device: torch.device | str) -> _Shipped:
    path = shipped(name)
    return _Shipped(load_model(path, device, expected_family=family), sampling_preset(path))


@dataclass(frozen=True)
class Measured:
    """Samples (draws, classes, C, H, W) in [-1, 1], and what drawing them showed."""

    samples: Tensor
    rates: dict[str, list[float]]  # samples per second, of each batch in each way
    difference: float  # largest between the two ways
    completed: Tensor  # (draws, classes, C, H, W) in [-1, 1]
    completions: float  # a second
    translated: Tensor  # (draws, classes, C, H, W) in [-1, 1], made of edges
    colored: dict[str, Tensor]  # of each family, (draws, garments, 2, H, W)
    threads: int  # of PyTorch on the CPU


def demo(
    out: Path,
    *,
    device: torch.device | str = "cpu",
    seconds: float = 30.0,
    samples: int = 500,
    timed: int = 6,
    console: Console | None = None,
) -> Measured:
    """Writes out/demo.png and out/families.png, and prints what they show as numbers.

    seconds: time for drawing; no batch is begun that might not end in it, except for those that
    the image needs, of which two are drawn in both ways. samples: to draw and judge, at most.
    timed: batches to draw in both ways.

    Raises RuntimeError if the two ways draw visibly different images.
    """
    console = console or result_console()
    file, sheet = out / "demo.png", out / "families.png"
    make_folder("out", out)
    note = replaced([file, sheet])
    diffusion = _load(CHECKPOINT, "diffusion", device)
    completing = _load(COMPLETING, "autoregressive", device)
    translating = _load(TRANSLATING, "pix2pix", device)
    held_out = load_task("class_to_image", "test")
    assert held_out.cond is not None
    classes = range(len(CLASS_NAMES))
    pixels = torch.stack([held_out.y[held_out.cond == label][0] for label in classes])
    real, edges = to_float(pixels), to_float(edge_map(pixels))
    threads = torch.get_num_threads()
    try:
        with Status(
            f"drawing for at most {seconds:g} s; all of it takes about twice as long"
        ) as status:
            drawn, rates, difference = _draw(diffusion, seconds, samples, timed, status.update)
            status.update("completing upper halves")
            completed, completions = _complete(completing, real)
            translated = translating.draw(_OF_EDGES, cond=edges.to(device)).cpu()
            garments = load_task("colorize", "test").batch(torch.arange(_GARMENTS))
            assert garments["cond"] is not None
            colored = _color(garments["cond"], device, status.update)
        measured = Measured(
            drawn, rates, difference, completed, completions, translated, colored,
            torch.get_num_threads(),
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    if measured.difference > _VISIBLE:
        raise RuntimeError(f"{PLAIN} and {LIBRARY} differ by {measured.difference:.3g} of [-1, 1]")
    options = ", ".join(f"{name} {value}" for name, value in diffusion.preset.items())
    upper = real.clone()
    upper[:, :, upper.shape[2] // 2 :] = 1  # white
    image_grid(
        file,
        [
            (f"diffusion: {options}", measured.samples[:_SHOWN]),
            ("given", upper[None]),
            ("autoregressive: completed", measured.completed),
            ("edges", edges[None]),
            ("pix2pix", measured.translated),
            ("real", real[None]),
        ],
        row_labels=CLASS_NAMES,
    )
    luminance = garments["cond"]
    image_grid(
        sheet,
        [
            ("given", luminance[None]),
            *((name, as_images(ab, luminance)) for name, ab in colored.items()),
        ],
    )
    _print(console, measured, torch.device(device))
    _print_colors(console, colored, luminance)
    console.print(
        f"{file}{note}: clothes that diffusion drew; upper halves of images that no model ever "
        f"saw, each completed in {_WAYS_ON} ways; edges of the same, and what a GAN makes of them; "
        "the real ones.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    console.print(
        f"{sheet}: garments colored {_COLORED} times by each family; each is teal or pink, as "
        "likely the one as the other.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return measured


def _color(
    luminance: Tensor, device: torch.device | str, say: Callable[[str], None]
) -> dict[str, Tensor]:
    """Colors of garments (garments, 1, H, W) by the shipped model of each family."""
    colored, known = {}, drawable_names()
    for entry in CONTESTS["colorize"].entries:
        if (name := COLORING + entry.family) not in known:
            continue
        say(f"coloring garments: {entry.family}")
        model = _load(name, entry.family, device)
        with warnings.catch_warnings():  # that all draws of least squares are equal is to be seen
            warnings.simplefilter("ignore", UserWarning)
            drawn = model.draw(_COLORED, cond=luminance.to(device))
        colored[entry.family] = drawn.cpu()
    return colored


def _print_colors(console: Console, colored: dict[str, Tensor], luminance: Tensor) -> None:
    table = Table(
        "family",
        title=f"{len(luminance)} garments, {_COLORED} draws each: teal or pink, not both",
    )
    shown = ("chroma", "consistency", "teal", "pink", "background")
    for name in shown:
        table.add_column(name, justify="right")
    for family, ab in colored.items():
        scores = color_scores(ab, luminance)
        table.add_row(family, *(f"{scores[name]:.2f}" for name in shown))
    console.print(table)


def _complete(model: _Shipped, real: Tensor) -> tuple[Tensor, float]:
    """Upper halves of real (classes, C, H, W) with lower halves drawn, and how many a second."""
    upper = real[:, :, : real.shape[2] // 2].to(model.device)
    start = time.perf_counter()
    lower = model.draw(_WAYS_ON, cond=upper).cpu()  # waits for the device
    rate = lower.shape[0] * lower.shape[1] / (time.perf_counter() - start)
    return as_images(lower, upper.cpu(), stacked=True), rate


def _draw(
    model: _Shipped, seconds: float, samples: int, timed: int, say: Callable[[str], None]
) -> tuple[Tensor, dict[str, list[float]], float]:
    """Samples, samples a second of each batch in each way, and the difference of the ways.

    Batches in the order plain, library, library, plain, ...; then the library's alone.
    """
    cond = torch.arange(len(CLASS_NAMES), device=model.device)

    def draw(way: str, batch: int, **changed: Any) -> tuple[Tensor, float]:
        index = cond + batch * _DRAWS * 2**32  # the batch continues the numbers of the draws
        with cgkernels.reference() if way == PLAIN else contextlib.nullcontext():
            start = time.perf_counter()
            drawn = model.draw(_DRAWS, cond=cond, index=index, **changed).cpu()  # waits
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
        say(f"drawing, {number * _DRAWS * len(cond)} of {samples} images")
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
    return torch.cat(parts), rates, difference


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
    shares, counts = [], []
    for images in (measured.samples, measured.completed, measured.translated):
        labels = torch.arange(images.shape[1]).repeat(len(images))
        shares.append(class_accuracy(images.flatten(0, 1), labels))
        counts.append(len(labels))
    lines = (
        f"This library to plain PyTorch, batch by batch: {ratio:.2f}; {why}.",
        f"Same weights, seed and numbers: largest difference {measured.difference:.1e} of [-1, 1].",
        f"The shipped classifier puts {shares[0]:.1%} of {counts[0]} drawn images in the asked "
        f"class, {shares[1]:.1%} of {counts[1]} completed ones in that of their upper half, "
        f"{shares[2]:.1%} of {counts[2]} made of edges in theirs, and {held_out_accuracy():.1%} of "
        "1000 real ones.",
        f"{counts[1]} upper halves completed, {measured.completions:.3g} a second.",
    )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
