"""What every model family offers, and the families by name."""

import dataclasses
import pkgutil
import typing
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

# Resolved on use: reading one checkpoint imports one family.
FAMILIES = {
    "classifier": "cgm.networks.classifier:Classifier",
    "diffusion": "cgm.diffusion:ConditionalDiffusion",
}


class Model(nn.Module):
    """Base of all families; constructed as `Model(config)`, which draws the initial weights.

    A model owns no optimizer, device or log; `cgm.training.train` trains any of them.
    """

    family: ClassVar[str]  # its name in FAMILIES
    phases: ClassVar[tuple[str, ...]] = ("model",)  # of one training step, in this order
    config: Any  # frozen dataclass; also the annotation of the constructor's argument `config`
    sampling_config: ClassVar[type[Any]]  # frozen dataclass: the solver options of `sample`

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        """The parameters that a phase updates; no parameter is in two phases."""
        return list(self.parameters())

    def loss(
        self,
        y: Tensor,
        *,
        cond: Tensor | None = None,
        phase: str = "model",
        seed: int | Tensor,
        index: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """{"total": (B,), parts: (B,)} of y (B, *event); random only through (seed, index)."""
        raise NotImplementedError


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
