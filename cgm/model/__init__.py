"""What every model family offers, and the families by name."""

import pkgutil
import typing
from typing import Any

import torch

from cgkernels.checks import check_choice
from cgm.model.base import Density, Draws, Model, PreciseBuffers, Step, number_samples
from cgm.model.config import (
    Config,
    Count,
    Depth,
    GuidedConfig,
    ImageConfig,
    Interval,
    Natural,
    NotNegative,
    Positive,
    Share,
    config_from_dict,
    solver_options,
)

__all__ = [
    "FAMILIES",
    "Config",
    "Count",
    "Density",
    "Depth",
    "Draws",
    "GuidedConfig",
    "ImageConfig",
    "Interval",
    "Model",
    "Natural",
    "NotNegative",
    "Positive",
    "PreciseBuffers",
    "Share",
    "Step",
    "config_class",
    "config_from_dict",
    "family_class",
    "make_model",
    "number_samples",
    "solver_options",
]

# Resolved on use: reading one checkpoint imports one family.
FAMILIES = {
    "autoencoder": "cgm.families.vae:Autoencoder",
    "autoregressive": "cgm.families.autoregressive:ConditionalTransformer",
    "classifier": "cgm.evaluation.classifier:Classifier",
    "cyclegan": "cgm.families.cyclegan:CycleGAN",
    "diffusion": "cgm.families.diffusion:ConditionalDiffusion",
    "energy": "cgm.families.energy:ConditionalEBM",
    "flow": "cgm.families.flow:ConditionalFlow",
    "gan": "cgm.families.gan:ConditionalGAN",
    "gaussian_regression": "cgm.families.regression:GaussianRegression",
    "least_squares": "cgm.families.regression:LeastSquares",
    "mixture_density": "cgm.families.regression:MixtureDensity",
    "pix2pix": "cgm.families.gan:Pix2Pix",
    "quantized_classifier": "cgm.families.quantized_classifier:QuantizedClassifier",
    "vae": "cgm.families.vae:ConditionalVAE",
}


def family_class(family: str) -> type[Model]:
    """The class of a family; ValueError for a name that is not in FAMILIES."""
    check_choice("family", family, FAMILIES)
    return pkgutil.resolve_name(FAMILIES[family])


def config_class(model_class: type[Model]) -> type[Any]:
    """The dataclass of a family's config."""
    return typing.get_type_hints(model_class.__init__)["config"]


def make_model(model_class: type[Model], config: Any, *, seed: int = 0) -> Model:
    """A model with initial weights of this seed; PyTorch's global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config)
