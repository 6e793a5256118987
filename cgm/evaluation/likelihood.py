"""Measures of models and of generated images: the first part of what `cgm evaluate` prints.

bits_per_dimension   -log2 p(y | cond) of an image, divided by the number of its values
class accuracy       share of images that `cgm.evaluation.classifier` puts in the asked class

`cgm.evaluation.sample_quality` has the second part, how samples compare with real images.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cgkernels.checks import check_shape
from cgm.data import Dataset
from cgm.evaluation.classifier import class_accuracy, held_out_accuracy
from cgm.model import Model

_ROWS_AT_ONCE = 50


@dataclass(frozen=True)
class Measure:
    """A number that says something of a model: the mean of `rows` values, and its standard error.

    The error is None where the number is no such mean.
    """

    name: str
    value: float
    error: float | None
    rows: int
    reference: int | None = None  # real images of training that it compares with
    floor: float | None = None  # the same of real images that training never saw
    floor_rows: int | None = None  # how many these were


def bits_per_dimension(model: Model, y: Tensor, cond: Tensor | None) -> Tensor:
    """(B,) float64 on the CPU of images y (B, *event) in [-1, 1] with their conditions."""
    device = model.device
    parts = []
    for rows in torch.arange(len(y)).split(_ROWS_AT_ONCE):
        some, images = None if cond is None else cond[rows].to(device), y[rows].to(device)
        bits = model.bits_per_dimension(images, cond=some, index=rows.to(device))
        parts.append(bits.cpu().double())
    return torch.cat(parts)


def check_rows(rows: int, held_out: Dataset) -> None:
    """ValueError unless there are so many held-out images, and at least 2 asked for."""
    if not 2 <= rows <= len(held_out):
        raise ValueError(f"rows must be from 2 to {len(held_out)}, got {rows}")


def evaluate(
    model: Model,
    held_out: Dataset,
    *,
    rows: int = 200,
    seed: int = 0,
    say: Callable[[str], None] = lambda what: None,
    samples: Tensor | None = None,
    **solver: Any,
) -> list[Measure]:
    """What can be measured of a model on the first `rows` held-out images, and on its samples.

    Of a model with likelihoods: bits per dimension of the real images; the same given the
    condition of another image, which must be more if the condition is used; of samples of the
    model with these conditions, and of samples that were drawn with another's; and with weights
    of 8 bits, where it has them. Of a model of the shipped classes: class accuracy. Of one without
    likelihoods that makes images of images: how far they are from the real ones, |y - y'| with
    values in [-1, 1], and those made of another image's condition.

    solver: options of `sample`. say: is told what is being done. samples: of this model for these
    images' conditions, (rows, *event), if they were drawn before.

    Raises:
        ValueError: rows does not fit, or nothing here can be measured of this model.
    """
    check_rows(rows, held_out)
    if samples is not None:
        check_shape("samples", samples, (rows, *held_out.event_shape))
    batch = held_out.batch(torch.arange(rows))
    y, cond = batch["y"], batch["cond"]
    device = model.device

    def draw(cond: Tensor | None) -> Tensor:
        n = rows if cond is None else None
        cond = None if cond is None else cond.to(device)
        return model.sample(n, cond=cond, seed=seed, **solver).cpu()

    @functools.cache
    def own() -> Tensor:
        return draw(cond) if samples is None else samples

    found = []
    say("likelihoods of real images")
    with contextlib.suppress(NotImplementedError):  # of a family that has no exact log_prob
        found += _likelihoods(model, y, cond, own, draw, say)
    if held_out.cond_kind == "class" and held_out.name == "class_to_image":
        say("classes of samples")
        assert cond is not None
        accuracy = class_accuracy(own(), cond)
        found.append(Measure("share of samples in the asked class", accuracy, None, rows))
        found.append(Measure("... of real images", held_out_accuracy(), None, len(held_out)))
    if not found and held_out.cond_kind == "image" and held_out.paired:
        say("distances of samples")
        assert cond is not None
        other = draw(cond.roll(1, 0))
        for name, drawn in (("mean absolute error", own()), ("... of another's", other)):
            found.append(mean_measure(name, (drawn - y).abs().flatten(1).mean(1)))
    if not found:
        raise ValueError(
            "model must have likelihoods, make images of images, or draw the classes of "
            "class_to_image"
        )
    return found


def _likelihoods(
    model: Model,
    y: Tensor,
    cond: Tensor | None,
    own: Callable[[], Tensor],
    draw: Callable[[Tensor | None], Tensor],
    say: Callable[[str], None],
) -> list[Measure]:
    real = bits_per_dimension(model, y, cond)
    found = [mean_measure("bits per dimension, held out", real)]
    if cond is not None:
        other = cond.roll(1, 0)  # no image keeps its own
        swapped = bits_per_dimension(model, y, other)
        found.append(mean_measure("... given another's condition", swapped))
    if model.has_int8:
        say("likelihoods with weights of 8 bits")
        rounded = bits_per_dimension(model.int8(), y, cond)
        found.append(mean_measure("... with weights of 8 bits", rounded))
        found.append(mean_measure("... of 8 bits, what is lost", rounded - real))
    if cond is not None:
        say("likelihoods of samples")
        mine, others = (bits_per_dimension(model, drawn, cond) for drawn in (own(), draw(other)))
        found.append(mean_measure("bits per dimension, samples", mine))
        found.append(mean_measure("... drawn given another's condition", others))
    return found


def mean_measure(name: str, values: Tensor) -> Measure:
    """Mean of values (N,) and, of more than one, its standard error."""
    error = (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else None
    return Measure(name, values.mean().item(), error, len(values))
