"""How samples of a model compare with real images: the second half of `cgm evaluate`.

inception_score    how sure a classifier is of each sample, and how many classes it sees
fd                 Frechet distance to the training images: FD-classifier, FD-pixels; FID
kid                kernel distance to them
precision_recall   precision, recall, density, coverage, beside as many training images
memorization       are samples copies of training images? In pixels and in features
birthday           how many different samples there are, from the duplicates among them
conditions         how different the samples for one condition are; the best of several

Beside each stands the same measure of images that the model never saw, as many as there are
samples or as are kept: what a perfect model would have at that number. Samples are drawn and
measured in parts: memory does not grow with their number. `cgm.evaluation.metrics` has the formulas
and their traps, `cgm.evaluation.features` what images are compared by.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cgkernels.checks import check_choice
from cgm.data import Dataset
from cgm.evaluation.distances import nearest
from cgm.evaluation.features import Extractor, Pixels
from cgm.evaluation.likelihood import Measure, mean_measure
from cgm.evaluation.metrics import (
    Birthday,
    InceptionScore,
    Kept,
    Memorization,
    Moments,
    PrecisionRecall,
    best_of_n,
    choose,
    diversity,
    frechet_distance,
    kernel_distance,
    standardize,
)
from cgm.model import Model
from cgm.training.progress import time_left
from cgm.viz.plots import as_images, image_grid

LEAST = 20  # fewest samples
_AT_ONCE = 200  # images drawn and measured at a time
_HELD = 10_000  # samples that are kept for the measures of pairs, at most
_SUBSETS, _SUBSET = 20, 1000  # of the kernel distance: how many, and rows in each
_BATCH = 1000  # samples among which duplicates are looked for
_CLASSED = 1000  # samples whose diversity within a class is measured
_CONDITIONS, _DRAWS = 16, 4  # images as conditions, and samples drawn for each
_SHOWN = 8  # rows of the image of nearest neighbors


@dataclass(frozen=True, eq=False)
class Neighbors:
    """Samples (k, *event) beside the training images nearest to them, by pixels."""

    samples: Tensor
    conditions: Tensor  # (k,) rows of the held-out images whose conditions they were drawn for
    nearest: Tensor  # (k,) rows of the training images


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `against_real` found."""

    measures: list[Measure]
    samples: Tensor  # the first ones, at most one for each held-out image
    first: Neighbors | None  # the first samples, and the closest of all, if memorization
    closest: Neighbors | None


class _Part(NamedTuple):
    """Some images: rows of the held-out data whose conditions they have, y, features."""

    rows: Tensor
    y: Tensor
    features: Tensor
    probabilities: Tensor | None


class _Meter(Protocol):
    def add(self, part: _Part) -> None: ...

    def result(self) -> list[Measure]: ...


@dataclass(frozen=True, eq=False)
class _Real:
    """What the samples are compared with."""

    training: Dataset
    held_out: Dataset
    extractor: Extractor
    features: Tensor  # of the training images, (N, d) float64
    moments: Moments  # of these
    samples: int  # how many will come
    seed: int

    def named(self, measure: str) -> str:
        return f"{measure}-{self.extractor.name}"


def against_real(
    model: Model,
    training: Dataset,
    held_out: Dataset,
    extractor: Extractor,
    *,
    samples: int = 200,
    measures: tuple[str, ...] | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda what: None,
    **solver: Any,
) -> Comparison:
    """Draws samples for the conditions of the held-out images, and measures them.

    Sample i is for the condition of held-out image i mod M, M of them, and is its draw i // M:
    the sample that `model.sample` gives for the index i mod M + 2^32 (i // M).

    Args:
        measures: of MEASURES; None for all that fit the model and the features.
        solver: options of `sample`. say: is told what is being done.

    Raises:
        ValueError: measures do not fit, samples are fewer than LEAST or not finite.
    """
    if samples < LEAST:
        raise ValueError(f"samples must be at least {LEAST}, got {samples}")
    measures = check_measures(measures, held_out, extractor)
    drawn = _drawn(model, held_out, samples, seed, solver, say)
    first = next(drawn)  # what is wrong with the solver's options is said before the long work
    say("features of real images")
    real = _real(training, held_out, extractor, samples, seed)
    makers = [_METERS[name] for name in measures if name in _METERS]
    if "conditions" in measures and held_out.cond_kind == "class":
        makers.append(_WithinClasses)
    meters, unseen = ([make(real) for make in makers] for _ in range(2))
    copying = _Copies(real) if "memorization" in measures else None
    for rows in torch.arange(min(samples, len(held_out))).split(_AT_ONCE):
        part = _part(rows, held_out.batch(rows)["y"], extractor)
        for meter in unseen:
            meter.add(part)
    kept: list[Tensor] = []
    for rows, y in itertools.chain([first], drawn):
        part = _part(rows, y, extractor)
        for meter in meters:
            meter.add(part)
        if copying:
            copying.add(part)
        if sum(len(some) for some in kept) < len(held_out):
            kept.append(y)
    say("comparing them")
    found = []
    for ours, theirs in zip(meters, unseen, strict=True):
        for measure, floor in zip(ours.result(), theirs.result(), strict=True):
            if measure.name == floor.name:  # a bound stands beside no estimate
                measure = dataclasses.replace(measure, floor=floor.value, floor_rows=floor.rows)
            found.append(measure)
    found += copying.result() if copying else []
    if "conditions" in measures and held_out.cond_kind == "image":
        say("several samples for each condition")
        found += _several(model, held_out, extractor, seed, solver)
    beside = (copying.first, copying.closest) if copying else (None, None)
    return Comparison(found, torch.cat(kept)[: len(held_out)], *beside)


def check_measures(
    measures: tuple[str, ...] | None, held_out: Dataset, extractor: Extractor
) -> tuple[str, ...]:
    """The measures asked for, or all that fit; ValueError for one that does not."""
    needs = {}
    if extractor.probabilities(extractor(held_out.batch(torch.arange(1))["y"])) is None:
        needs["inception_score"] = f"class probabilities, which {extractor.name} have not"
    if held_out.cond_kind not in ("class", "image") or not held_out.paired:
        needs["conditions"] = "classes or pairs of images"
    if measures is None:
        return tuple(name for name in MEASURES if name not in needs)
    for name in measures:
        check_choice("measures", name, MEASURES)
        if name in needs:
            raise ValueError(f"measures must not have {name}: it needs {needs[name]}")
    return measures


def _real(
    training: Dataset, held_out: Dataset, extractor: Extractor, samples: int, seed: int
) -> _Real:
    parts, moments = [], Moments()
    for rows in torch.arange(len(training)).split(_AT_ONCE):
        parts.append(extractor(training.batch(rows)["y"]).to("cpu", torch.float64))
        moments.add(parts[-1])
    return _Real(training, held_out, extractor, torch.cat(parts), moments, samples, seed)


def _part(rows: Tensor, y: Tensor, extractor: Extractor) -> _Part:
    features = extractor(y)
    return _Part(rows, y, features, extractor.probabilities(features))


def _drawn(
    model: Model,
    held_out: Dataset,
    samples: int,
    seed: int,
    solver: dict[str, Any],
    say: Callable[[str], None],
) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows of the conditions, samples on the CPU), part by part."""
    device, since = model.device, time.perf_counter()
    for numbers in torch.arange(samples).split(_AT_ONCE):
        done = int(numbers[0])
        say(f"drawing, {done} of {samples}{time_left(since, done, samples)}")
        rows, draws = numbers % len(held_out), numbers // len(held_out)
        cond = held_out.batch(rows)["cond"]
        if cond is None:
            y = model.sample(len(rows), seed=seed, index=numbers * 2**32, **solver)
        else:
            index = rows + draws * 2**32
            y = model.sample(cond=cond.to(device), seed=seed, index=index, **solver)
        yield rows, y.cpu()


# Distributions ------------------------------------------------------------------------------------
class _InceptionScore:
    def __init__(self, real: _Real) -> None:
        self._real, self._score = real, InceptionScore(seed=real.seed)

    def add(self, part: _Part) -> None:
        assert part.probabilities is not None
        self._score.add(part.probabilities)

    def result(self) -> list[Measure]:
        mean, deviation = self._score.result()
        n = self._score.n
        return [
            Measure(self._real.named("IS"), mean, None, n),
            Measure(f"... sd over {self._score.splits} splits", deviation, None, n),
        ]


class _Frechet:
    def __init__(self, real: _Real) -> None:
        self._real, self._moments = real, Moments()

    def add(self, part: _Part) -> None:
        self._moments.add(part.features)

    def result(self) -> list[Measure]:
        real = self._real
        # Only of Inception is it what others call FID.
        name = "FID" if real.extractor.name == "inception" else real.named("FD")
        value = frechet_distance(real.moments, self._moments)
        return [Measure(name, value, None, self._moments.n, len(real.features))]


class _Kernel:
    def __init__(self, real: _Real) -> None:
        self._real, self._kept = real, Kept(_HELD, real.seed)

    def add(self, part: _Part) -> None:
        self._kept.add(part.features)

    def result(self) -> list[Measure]:
        real, generated = self._real, self._kept
        pair, name = [real.features, generated.rows], "KID"
        if real.extractor.name != "inception":  # as published, at Inception's own scale
            pair, name = [standardize(rows, real.moments) for rows in pair], real.named("KID")
        size = min(_SUBSET, generated.n, len(real.features))
        mean, deviation = kernel_distance(*pair, subsets=_SUBSETS, size=size, seed=real.seed)
        n, against = generated.n, len(real.features)
        return [
            Measure(name, mean, None, n, against),
            Measure(f"... sd over {_SUBSETS} subsets", deviation, None, n, against),
        ]


class _PrecisionRecall:
    def __init__(self, real: _Real) -> None:
        rows = choose(len(real.features), min(real.samples, _HELD), real.seed)
        self._against, self._n = len(rows), 0
        self._meter = PrecisionRecall(real.features[rows], held=_HELD, seed=real.seed)

    def add(self, part: _Part) -> None:
        self._meter.add(part.features)
        self._n += len(part.features)

    def result(self) -> list[Measure]:
        found = self._meter.result()._asdict()
        return [Measure(k, value, None, self._n, self._against) for k, value in found.items()]


class _Duplicates:
    """Duplicates are nearer than 1 % of training images are to their nearest neighbor."""

    def __init__(self, real: _Real) -> None:
        some = real.features[choose(len(real.features), _BATCH, real.seed)]
        half = len(some) // 2
        # Of two halves: an image is no neighbor of its own.
        threshold = nearest(some[:half], some[half:])[0].quantile(0.01).item()
        # Of equal training images; a difference that no image shows.
        threshold = max(threshold, 1e-6)
        self._meter = Birthday(min(_BATCH, real.samples, len(real.held_out)), threshold)

    def add(self, part: _Part) -> None:
        self._meter.add(part.features)

    def result(self) -> list[Measure]:
        found = self._meter.result()
        n = found.pairs * 2 // (self._meter.size - 1)
        share = Measure("duplicate pairs, share", found.duplicates / found.pairs, None, n)
        if found.estimate is None:
            return [share, Measure("... support, at least", found.at_least, None, n)]
        return [share, Measure("... support, 1 / sum p^2", found.estimate, None, n)]


# Memorization -------------------------------------------------------------------------------------
class _Copies:
    """Memorization in pixels and, if they are others, in features; and who is nearest to whom."""

    def __init__(self, real: _Real) -> None:
        self._real, self._n = real, 0
        training, unseen = (
            data.batch(torch.arange(len(data)))["y"].flatten(1)
            for data in (real.training, real.held_out)
        )
        self._pixels = Memorization(training, unseen)
        self._features = None
        if not isinstance(real.extractor, Pixels):
            parts = torch.arange(len(unseen)).split(_AT_ONCE)
            held_out = [real.extractor(real.held_out.batch(rows)["y"]) for rows in parts]
            self._features = Memorization(real.features, torch.cat(held_out))
        self._distance = torch.zeros(0, dtype=torch.float64)
        self.first: Neighbors | None = None
        self.closest: Neighbors | None = None

    def add(self, part: _Part) -> None:
        distance, row = self._pixels.add(part.y.flatten(1))
        if self._features:
            self._features.add(part.features)
        self._n += len(row)
        new = Neighbors(part.y, part.rows, row)
        if self.first is None or self.closest is None:
            self.first = _take(new, torch.arange(min(_SHOWN, len(row))))
        else:
            distance = torch.cat([self._distance, distance])
            new = _join(self.closest, new)
        order = distance.argsort(stable=True)[:_SHOWN]
        self._distance, self.closest = distance[order], _take(new, order)

    def result(self) -> list[Measure]:
        real, found = self._real, []
        n, m = self._n, len(real.held_out)
        meters = {"pixels": self._pixels}
        if self._features:
            meters[real.extractor.name] = self._features
        for name, meter in meters.items():
            copying = meter.result()
            rows = [
                (f"memorization z, {name}", copying.z, 0.0),
                ("... below 1 % quantile", copying.close, 0.01),
            ]
            if real.held_out.cond_kind != "image":  # samples are near the y of their condition
                rows.append(("... nearer to training", copying.nearer_training, copying.expected))
            found += [Measure(k, v, None, n, len(real.features), f, m) for k, v, f in rows]
        return found


def _take(neighbors: Neighbors, rows: Tensor) -> Neighbors:
    return Neighbors(neighbors.samples[rows], neighbors.conditions[rows], neighbors.nearest[rows])


def _join(one: Neighbors, other: Neighbors) -> Neighbors:
    return Neighbors(
        torch.cat([one.samples, other.samples]),
        torch.cat([one.conditions, other.conditions]),
        torch.cat([one.nearest, other.nearest]),
    )


def write_nearest(
    file: Path,
    comparison: Comparison,
    training: Dataset,
    held_out: Dataset,
    *,
    stacked: bool = False,
) -> None:
    """An image of the first samples, and of those closest to training, each beside its nearest.

    stacked: y is the part of an image below its condition.
    """

    def shown(y: Tensor, data: Dataset, rows: Tensor) -> Tensor:
        cond = data.batch(rows)["cond"] if data.cond_kind == "image" else None
        return as_images(y, cond, stacked=stacked)

    groups = []
    for header, found in (
        ("first samples, nearest training", comparison.first),
        ("closest samples, nearest training", comparison.closest),
    ):
        assert found is not None
        samples = shown(found.samples, held_out, found.conditions)
        real = shown(training.batch(found.nearest)["y"], training, found.nearest)
        groups.append((header, torch.stack([samples, real])))
    image_grid(file, groups)


# For each condition -------------------------------------------------------------------------------
class _WithinClasses:
    """Diversity of the samples of a class, divided by that of its training images."""

    def __init__(self, real: _Real) -> None:
        self._real = real
        self._features: list[Tensor] = []
        self._rows: list[Tensor] = []

    def add(self, part: _Part) -> None:
        if sum(len(some) for some in self._rows) < _CLASSED:
            self._features.append(part.features)
            self._rows.append(part.rows)

    def result(self) -> list[Measure]:
        real, rows = self._real, torch.cat(self._rows)
        features, cond = torch.cat(self._features), real.held_out.batch(rows)["cond"]
        labels = real.training.cond
        assert cond is not None and labels is not None
        ratios = []
        for label in cond.unique():
            ours, theirs = features[cond == label], real.features[labels == label][:_CLASSED]
            if len(ours) > 1 and len(theirs) > 1:
                ratios.append(diversity(ours) / diversity(theirs))
        if not ratios:
            return []
        found = mean_measure("diversity in a class", torch.tensor(ratios))
        return [dataclasses.replace(found, rows=len(rows), reference=len(real.features))]


def _several(
    model: Model, held_out: Dataset, extractor: Extractor, seed: int, solver: dict[str, Any]
) -> list[Measure]:
    """Distances of features: of some draws to the real y of their condition, and to each other."""
    rows = torch.arange(min(_CONDITIONS, len(held_out)))
    batch = held_out.batch(rows)
    assert batch["cond"] is not None
    cond = batch["cond"].to(model.device)
    draws = model.sample(_DRAWS, cond=cond, seed=seed, **solver).cpu()
    real = extractor(batch["y"]).double().cpu()
    features = extractor(draws.flatten(0, 1)).double().cpu().unflatten(0, (_DRAWS, -1))
    distances = (features - real).square().sum(2).sqrt()
    best = best_of_n(distances)
    apart = torch.tensor([diversity(features[:, i]) for i in rows.tolist()])
    n = len(rows) * _DRAWS
    return [
        Measure("distance to the real y", best[0].item(), None, len(rows)),
        Measure(f"... best of {_DRAWS} samples", best[-1].item(), None, n),
        Measure("distance of two samples", apart.mean().item(), None, n),
        Measure("... of two real ones", diversity(real), None, len(rows)),
    ]


_METERS: dict[str, Callable[[_Real], _Meter]] = {
    "inception_score": _InceptionScore,
    "fd": _Frechet,
    "kid": _Kernel,
    "precision_recall": _PrecisionRecall,
    "birthday": _Duplicates,
}
MEASURES = (*_METERS, "memorization", "conditions")
