"""Conditional generators over cgkernels: models, training, sampling and measurement.

The names below are imported when they are first used: `import cgm` alone loads neither PyTorch nor
any model. Everything else is imported from the module that has it, such as `cgm.families.flow`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cgkernels import __version__
    from cgm.checkpoints import load_model, sampling_preset, save_model, shipped, shipped_names
    from cgm.data import load_folder, load_task
    from cgm.families.autoregressive import ConditionalTransformer
    from cgm.families.cyclegan import CycleGAN
    from cgm.families.diffusion import ConditionalDiffusion
    from cgm.families.energy import ConditionalEBM
    from cgm.families.flow import ConditionalFlow
    from cgm.families.gan import ConditionalGAN, Pix2Pix
    from cgm.families.quantized_classifier import QuantizedClassifier
    from cgm.families.regression import GaussianRegression, LeastSquares, MixtureDensity
    from cgm.families.vae import Autoencoder, ConditionalVAE
    from cgm.model import make_model
    from cgm.training import TrainingConfig, train

__all__ = [
    "Autoencoder",
    "ConditionalDiffusion",
    "ConditionalEBM",
    "ConditionalFlow",
    "ConditionalGAN",
    "ConditionalTransformer",
    "ConditionalVAE",
    "CycleGAN",
    "GaussianRegression",
    "LeastSquares",
    "MixtureDensity",
    "Pix2Pix",
    "QuantizedClassifier",
    "TrainingConfig",
    "__version__",
    "load_folder",
    "load_model",
    "load_task",
    "make_model",
    "sampling_preset",
    "save_model",
    "shipped",
    "shipped_names",
    "train",
]

_NAMES = {
    "cgkernels": ("__version__",),
    "cgm.checkpoints": ("load_model", "sampling_preset", "save_model", "shipped", "shipped_names"),
    "cgm.data": ("load_folder", "load_task"),
    "cgm.families.autoregressive": ("ConditionalTransformer",),
    "cgm.families.cyclegan": ("CycleGAN",),
    "cgm.families.diffusion": ("ConditionalDiffusion",),
    "cgm.families.energy": ("ConditionalEBM",),
    "cgm.families.flow": ("ConditionalFlow",),
    "cgm.families.gan": ("ConditionalGAN", "Pix2Pix"),
    "cgm.families.quantized_classifier": ("QuantizedClassifier",),
    "cgm.families.regression": ("GaussianRegression", "LeastSquares", "MixtureDensity"),
    "cgm.families.vae": ("Autoencoder", "ConditionalVAE"),
    "cgm.model": ("make_model",),
    "cgm.training": ("TrainingConfig", "train"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
