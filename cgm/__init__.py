"""Conditional generators over cgkernels: models, training, sampling and measurement.

The names below are imported when they are first used: `import cgm` alone loads neither PyTorch nor
any model; `__init__.pyi` has them for type checkers. Everything else is imported from the module
that has it, such as `cgm.families.flow`.
"""

import importlib
from typing import Any

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
