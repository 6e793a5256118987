"""What every model family offers, and the families by name."""

import dataclasses
import pkgutil
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from cgkernels.checks import check_shape, readable

_Options = TypeVar("_Options")

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
    "quantized_classifier": "cgm.families.regression:QuantizedClassifier",
    "vae": "cgm.families.vae:ConditionalVAE",
}


@dataclass(frozen=True)
class PictureConfig:
    """What models of pictures share: what is generated from what."""

    # Shape (C, H, W) of what is generated; a point of the plane is (2, 1, 1).
    event_shape: tuple[int, int, int] = (1, 28, 28)
    # Kind of condition.
    cond_kind: Literal["none", "class", "image"] = "none"
    # Number of classes.
    num_classes: int = 0
    # Shape of one condition: (C, H, W) of a picture with the sides of event_shape, else ().
    cond_shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.event_shape) != 3 or min(self.event_shape) < 1:
            raise ValueError(f"event_shape must be (C, H, W), got {self.event_shape}")
        kinds = ("none", "class", "image")
        if self.cond_kind not in kinds:
            raise ValueError(f"cond_kind must be one of {', '.join(kinds)}, got {self.cond_kind!r}")
        if (self.cond_kind == "class") != (self.num_classes > 0):
            raise ValueError(
                "num_classes must be positive for class conditions, and 0 for others, "
                f"got {self.num_classes} for {self.cond_kind}"
            )
        if self.cond_kind == "image":
            if len(self.cond_shape) != 3 or self.cond_shape[1:] != self.event_shape[1:]:
                raise ValueError(
                    f"cond_shape must be (C, H, W) with the sides of event_shape "
                    f"{self.event_shape}, got {self.cond_shape}"
                )
        elif self.cond_shape:
            raise ValueError(
                f"cond_shape must be () without a picture as condition, got {self.cond_shape}"
            )

    @property
    def cond_dropout(self) -> float:
        """Share of conditions dropped in training: none."""
        return 0.0


class Model(nn.Module):
    """Base of all families; constructed as `Model(config)`, which draws the initial weights.

    A model owns no optimizer, device or log; `cgm.training.train` trains any of them.
    """

    family: ClassVar[str]  # its name in FAMILIES
    phases: ClassVar[tuple[str, ...]] = ("model",)  # of one training step, in this order
    config: Any  # frozen dataclass; also the annotation of the constructor's argument `config`
    sampling_config: ClassVar[type[Any]]  # frozen dataclass: the solver options of `sample`
    # Samples are values drawn one after another: round-off changes nothing, or, if it tips one
    # over, all that follow.
    discrete: ClassVar[bool] = False
    # Rows of y and cond need not belong together.
    unpaired: ClassVar[bool] = False
    # Fields of `cgm.training.TrainingConfig` that `cgm train` sets otherwise for this family.
    training_defaults: ClassVar[dict[str, Any]] = {}

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        """The parameters that a phase updates; no parameter is in two phases."""
        return list(self.parameters())

    def compile_networks(self, mode: str) -> None:
        """Puts what `sample` runs of the networks under torch.compile, in one of its modes."""
        for network in self.children():
            network.compile(mode=mode, dynamic=False)

    def loss(
        self,
        y: Tensor,
        *,
        cond: Tensor | None = None,
        phase: str = "model",
        seed: int | Tensor,
        index: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """{"total": (B,), parts: (B,)} of y (B, *event); random only through (seed, index).

        A family of several phases also takes `shared`, a dict for what the phases of one step have
        in common: the same object for each of them, empty at first.
        """
        raise NotImplementedError

    def log_prob(self, y: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """Exact log p(y | cond) in nats, (B,); NotImplementedError of families that have none."""
        raise NotImplementedError(f"{type(self).__name__} has no exact log_prob; it has a loss")

    # What every loss and sample is given ----------------------------------------------------------
    def check_phase(self, phase: str) -> None:
        """ValueError for a phase that this model has not."""
        if phase not in self.phases:
            raise ValueError(f"phase must be one of {self.phases}, got {phase!r}")

    def check_y(self, y: Tensor) -> None:
        """ValueError or TypeError unless y is (B, *event), floating and finite."""
        check_shape("y", y, (y.shape[0], *self.config.event_shape))
        if not y.is_floating_point():
            raise TypeError(f"y must be floating, got {y.dtype}")
        if readable(y) and not y.isfinite().all():
            raise ValueError("y must be finite, got values that are not")

    def check_cond(self, cond: Tensor | None, rows: int, highest: int) -> None:
        """ValueError or TypeError unless cond is a condition of this model for so many rows.

        highest: the largest id of a class or token.
        """
        config = self.config
        if config.cond_kind == "none":
            if cond is not None:
                raise TypeError("cond must be None: this model has no condition")
            return
        if cond is None:
            if config.cond_dropout == 0:
                raise ValueError(f"cond must be given: {config.cond_kind}")
            return
        check_shape("cond", cond, (rows, *config.cond_shape))
        if config.cond_kind == "image":
            if not cond.is_floating_point():
                raise TypeError(f"cond must be floating, got {cond.dtype}")
            return
        if cond.dtype != torch.int64:
            raise TypeError(f"cond must be int64 ids, got {cond.dtype}")
        if readable(cond) and cond.numel() and not 0 <= cond.min() <= cond.max() <= highest:
            raise ValueError(
                f"cond must be in [0, {highest}], got {int(cond.min())} to {int(cond.max())}"
            )

    def check_sampling(self, cond: Tensor | None, rows: int, highest: int, guidance: float) -> None:
        """As `check_cond`, for samples: a model draws without cond, or guided, if it learned to."""
        config = self.config
        if cond is None:
            if config.cond_kind != "none" and config.cond_dropout == 0:
                raise ValueError("cond must be given: this model was trained without dropping it")
            if guidance != 1:
                raise ValueError(f"guidance must be 1 without cond, got {guidance}")
            return
        self.check_cond(cond, rows, highest)
        if guidance != 1 and config.cond_dropout == 0:
            raise ValueError(
                "guidance must be 1: this model was trained without dropping its condition"
            )


def family_class(family: str) -> type[Model]:
    """The class of a family; ValueError for a name that is not in FAMILIES."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    return pkgutil.resolve_name(FAMILIES[family])


def config_class(model_class: type[Model]) -> type[Any]:
    """The dataclass of a family's config."""
    return typing.get_type_hints(model_class.__init__)["config"]


def make_model(model_class: type[Model], config: Any, *, seed: int = 0) -> Model:
    """A model with initial weights of this seed; PyTorch's global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config)


def config_from_dict(cls: type[Any], values: dict[str, Any]) -> Any:
    """A config dataclass, nested ones included, of what `dataclasses.asdict` and JSON made of it.

    A field that is absent takes its default, so that a config can grow; an unknown one is a
    ValueError.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _from_json(hints[name], value) for name, value in values.items()})


def _from_json(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return config_from_dict(typing.cast(type, hint), value)
    # JSON has lists only; a frozen config has tuples only.
    return _tuples(value) if isinstance(value, list) else value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


# What every `sample` does with its arguments ------------------------------------------------------
def solver_options(cls: type[_Options], solver: dict[str, Any]) -> _Options:
    """The solver options of `sample` as their dataclass; TypeError for one that it has not."""
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in solver:
        if name not in known:
            raise TypeError(f"{name} is no option of sample; it has {', '.join(known)}")
    return cls(**solver)


def numbered(
    n: int | None, cond: Tensor | None, index: Tensor | None, device: torch.device
) -> tuple[int, list[int], Tensor]:
    """Rows of conditions, leading shape of the result, and the number of each sample, (samples,).

    Sample (draw, row) has the number of its condition + 2^32 draw; without cond draws alone are
    numbered. Samples of one draw stand together.
    """
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 0):
        raise ValueError(f"n must be None or an int of at least 0, got {n!r}")
    if cond is None:
        if n is None:
            raise ValueError("n must be given without cond")
        rows, shape = n, [n]
    else:
        rows = cond.shape[0]
        shape = [rows] if n is None else [n, rows]
    if index is None:
        index = torch.arange(rows, device=device)
        index = index * 2**32 if cond is None else index
    elif not isinstance(index, Tensor) or index.dtype != torch.int64:
        raise TypeError(f"index must be an int64 tensor, got {index!r}")
    else:
        check_shape("index", index, (rows,))
    index = index.to(device)
    if cond is not None and n is not None:
        draws = torch.arange(n, device=device)[:, None] * 2**32
        index = (draws + index).flatten()
    return rows, shape, index
