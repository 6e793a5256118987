"""What `cgm compare` asks of the families on each task: who takes part, and how it is scored.

An entry says how a family is made, trained and drawn from where its defaults do not fit the task.
`cgm.studies.compare` trains and scores them; `preset_for` is what `cgm train` writes into the
checkpoint of a model of the same task.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from cgm.data import DATA_FIELDS, PINK, TEAL, Batch, Dataset, epoch_order, load_task, synthetic
from cgm.evaluation.classifier import class_accuracy
from cgm.evaluation.features import ClassifierFeatures
from cgm.evaluation.ground_truth import (
    Scores,
    ball_scores,
    color_scores,
    gaussian_scores,
    moon_scores,
)
from cgm.evaluation.metrics import Moments, best_of_n, frechet_distance
from cgm.evaluation.out_of_distribution import anomaly_scores, has_density
from cgm.model import Model, config_class, family_class


@dataclass(frozen=True)
class Entry:
    """A family, and how it is made, trained and drawn from where its defaults do not fit a task."""

    family: str
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    solver: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Contest:
    """What a task asks of a family: so many draws for each of so many held-out conditions."""

    rows: int
    draws: int
    score: Callable[[Tensor, Batch], Scores]  # of samples (draws, rows, *event)
    entries: tuple[Entry, ...]
    # Of the model itself, where it has what this needs.
    judge: Callable[[Model, Batch], Scores] | None = None


def entry_config(entry: Entry, dataset: Dataset) -> Any:
    """The config of the family's model on these data."""
    cls = config_class(family_class(entry.family))
    names = {field.name for field in dataclasses.fields(cls)}
    given = {name: getattr(dataset, name) for name in DATA_FIELDS if name in names}
    return cls(**(given | dict(entry.model)))


# Scores -------------------------------------------------------------------------------------------
def _colors(samples: Tensor, held_out: Batch) -> Scores:
    assert held_out["cond"] is not None
    return color_scores(samples, held_out["cond"])


def _gaussians(samples: Tensor, held_out: Batch) -> Scores:
    return gaussian_scores(samples.flatten(0, 1), held_out["y"])


def _moons(samples: Tensor, held_out: Batch) -> Scores:
    cond = held_out["cond"]
    assert cond is not None
    return moon_scores(samples.flatten(0, 1), cond.repeat(len(samples)), held_out["y"], cond)


def _balls(samples: Tensor, held_out: Batch) -> Scores:
    """Of the balls that meet no wall."""
    balls = synthetic.balls("test")
    free = (~balls.bounced[: samples.shape[1]]).nonzero()[:, 0]
    return ball_scores(samples[:, free], balls.before[free], balls.position[free])


def _clothes(samples: Tensor, held_out: Batch) -> Scores:
    """Share in the asked class; Frechet distance to the held-out images, not comparable to FID.

    The distance depends on the number of samples: of so many real ones it is the floor.
    """
    cond = held_out["cond"]
    assert cond is not None
    real, features = load_task("class_to_image", "test"), ClassifierFeatures()
    n = samples.shape[0] * samples.shape[1]
    order = epoch_order(len(real), 0, 0)

    def moments(y: Tensor) -> Moments:
        found = Moments()
        found.add(features(y).double())
        return found

    rest = moments(real.batch(order[n:])["y"])
    drawn = samples.flatten(0, 1)
    return {
        "in the class": class_accuracy(drawn, cond.repeat(len(samples))),
        "FD-classifier": frechet_distance(moments(drawn), rest),
        "its floor": frechet_distance(moments(real.batch(order[:n])["y"]), rest),
    }


def _anomalies(model: Model, held_out: Batch) -> Scores:
    """AUROC of the held-out clothes, if the model has a density, a bound or an energy."""
    if not has_density(model):
        return {}
    found = anomaly_scores(model, held_out["y"])
    return {f"AUROC, {name}": value for name, value in found.items()}


def _images(samples: Tensor, held_out: Batch) -> Scores:
    """Mean |y - y'| of the draws, of the best of them, and between two of them."""
    errors = (samples - held_out["y"]).abs().flatten(2).mean(2)
    pairs = [(a - b).abs().mean() for a, b in combinations(samples, 2)]
    return {
        "error": errors.mean().item(),
        "best of n": best_of_n(errors)[-1].item(),
        "between draws": torch.stack(pairs).mean().item(),
    }


# Entries ------------------------------------------------------------------------------------------
_SMALL: dict[str, Any] = {"width": 16}
_BATCH: dict[str, Any] = {"batch_size": 32, "learning_rate": 2e-3, "warmup": 50, "ema_decay": 0.99}
# With the usual base of 10,000 most wavelengths are longer than these images.
_TRANSFORMER: dict[str, Any] = {
    "depth": 1, "width": 64, "heads": 4, "hidden": 256, "rope_base": 100.0
}  # fmt: skip
# Many steps of few images: each is some hundred values to predict.
_SEQUENCES: dict[str, Any] = {**_BATCH, "batch_size": 4, "learning_rate": 3e-3}
_COLORS = (TEAL, PINK, (0.0, 0.0))
_FLAT: dict[str, Any] = {"batch_size": 256, "warmup": 50}
_POINT_REGRESSION: dict[str, Any] = {"width": 16, "depth": 1}
_POINT_TRANSFORMER: dict[str, Any] = {
    "levels": 64, "depth": 2, "width": 32, "heads": 2, "hidden": 64, "positions": "learned",
    "cond_dropout": 0.0,
}  # fmt: skip
_POINT_VAE: dict[str, Any] = {"depth": 1, "width": 64, "latents": 2, "learn_scale": True}
_POINT_UNET: dict[str, Any] = {
    "width": 64, "width_multipliers": (1,), "blocks": 1, "attention_depth": 0, "patch": 1,
    "cond_dropout": 0.0,
}  # fmt: skip
_POINT_FLOW: dict[str, Any] = {"steps": (8,), "depth": 1, "levels": 0, "noise": 0.02}
# The data are finer than the noise on images, and f of two numbers can be as large as -log p.
_POINT_ENERGY: dict[str, Any] = {
    "patch": 1, "depth": 1, "width": 64, "hidden": 256, "temperature": 0.2, "step_size": 0.002,
    "data_noise": 0.0, "chains": 4096, "chain_steps": 5, "square_weight": 1e-4,
}  # fmt: skip
_POINT_GAN: dict[str, Any] = {
    "patch": 1, "depth": 1, "latents": 4, "width": 64, "discriminator_width": 64, "r1_weight": 0.1
}  # fmt: skip
# Without a condition what is said of it, and of the regressions' network, is of no effect.
_OF_POINTS = (
    Entry("gaussian_regression", _POINT_REGRESSION, _FLAT),
    Entry("mixture_density", _POINT_REGRESSION, _FLAT),
    Entry("quantized_classifier", {**_POINT_REGRESSION, "levels": 64}, _FLAT),
    Entry("vae", _POINT_VAE, _FLAT, {"noise": True}),
    Entry("autoregressive", _POINT_TRANSFORMER, _FLAT),
    Entry("flow", _POINT_FLOW, _FLAT),
    Entry(
        "diffusion",
        _POINT_UNET,
        {**_FLAT, "learning_rate": 3e-3, "ema_decay": 0.99},
        {"clip": False},
    ),
    Entry("gan", _POINT_GAN, {"batch_size": 128, "learning_rate": 1e-3, "ema_decay": 0.995}),
    # As many steps as a chain of the training lives: in longer ones the weights of the Gaussians
    # drift, on which chains that begin anew have no say.
    Entry("energy", _POINT_ENERGY, {"batch_size": 256, "learning_rate": 2e-3}, {"steps": 100}),
)
_OF_IMAGES = (
    *(
        Entry(family, _SMALL, _BATCH)
        for family in (
            "least_squares", "gaussian_regression", "mixture_density", "quantized_classifier"
        )
    ),
    # A finer scale than the decoder can be right to is paid for in z: the prior draws other ones.
    Entry("vae", {**_SMALL, "scale": 0.3}, _BATCH),
)  # fmt: skip
CONTESTS = {
    "colorize": Contest(
        rows=50,
        draws=8,
        score=_colors,
        entries=(
            Entry("least_squares", _SMALL, _BATCH),
            Entry("gaussian_regression", _SMALL, _BATCH),
            Entry("mixture_density", _SMALL, _BATCH),
            Entry("quantized_classifier", {**_SMALL, "palette": _COLORS}, _BATCH),
            Entry(
                "vae",
                {**_SMALL, "depth": 2, "latents": 1, "pooled": True, "scale": 0.3},
                _BATCH,
            ),
            Entry(
                "autoregressive",
                # All levels of the luminance: what is garment begins within one of 16.
                {**_TRANSFORMER, "palette": _COLORS, "levels": 256, "cond_dropout": 0.0},
                _SEQUENCES,
            ),
            Entry("flow", {"steps": (1, 4), "width": 24, "levels": 0, "noise": 0.05}, _BATCH),
            Entry("diffusion", {"cond_dropout": 0.0}, _BATCH, {"steps": 20}),
            Entry("gan", {**_SMALL, "latents": 8}, {"batch_size": 32, "learning_rate": 5e-4}),
            Entry(
                "energy",
                {"patch": 1, "data_noise": 0.05, "start_std": 0.15},
                {},
                {"temperature": 0.1},
            ),
        ),
    ),
    "class_to_image": Contest(
        rows=100,
        draws=2,
        score=_clothes,
        judge=_anomalies,
        entries=(
            *_OF_IMAGES,
            Entry("autoregressive", _TRANSFORMER, _SEQUENCES),
            Entry("flow", {"steps": (2, 4), "width": 16}, _BATCH),
            Entry("diffusion", {}, _BATCH, {"sampler": "dpmpp_2m", "steps": 12, "guidance": 2.0}),
            Entry("gan", {}, {}),
            Entry("energy", {}, {}, {"temperature": 0.1}),
        ),
    ),
    **{
        task: Contest(
            rows=50,
            draws=4,
            score=_images,
            entries=(
                *_OF_IMAGES,
                Entry("autoregressive", {**_TRANSFORMER, "cond_dropout": 0.0}, _SEQUENCES),
                Entry("flow", {"steps": (2, 4), "width": 16}, _BATCH),
                Entry("diffusion", {"cond_dropout": 0.0}, _BATCH, {"steps": 20}),
                Entry("gan", {**_SMALL, "latents": 8}, {"batch_size": 32}),
                Entry("energy", {}, {}, {"temperature": 0.1}),
            ),
        )
        for task in ("complete", "edges_to_image")
    },
    "eight_gaussians": Contest(
        rows=500,
        draws=1,
        score=_gaussians,
        entries=_OF_POINTS,
    ),
    "two_moons": Contest(
        rows=500,
        draws=1,
        score=_moons,
        entries=_OF_POINTS,
    ),
    "bouncing_ball": Contest(
        rows=100,
        draws=8,
        score=_balls,
        entries=(
            Entry("least_squares", _SMALL, _BATCH),
            Entry(
                "vae",
                {
                    "width": 32,
                    "depth": 1,
                    "blocks": 2,
                    "latents": 2,
                    "pooled": True,
                    "scale": 0.1,
                    "free_bits": 2.0,
                },
                {"batch_size": 64, "learning_rate": 3e-3, "warmup": 100, "ema_decay": 0.99},
            ),
            Entry("diffusion", {"cond_dropout": 0.0}, _BATCH, {"steps": 20}),
        ),
    ),
}


def preset_for(task: str, model: Model) -> dict[str, Any]:
    """Options of `sample` that suit a model of this task: what its family has in the contest.

    Without guidance for a model that never dropped its condition: it has no p(y) to be guided from.
    """
    entries = CONTESTS[task].entries if task in CONTESTS else ()
    solver = {entry.family: dict(entry.solver) for entry in entries}.get(model.family, {})
    if "guidance" in solver and model.config.cond_dropout == 0:
        del solver["guidance"]
    return solver
