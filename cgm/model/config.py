"""Configs: what is generated from what, their checks, and their way from JSON and keywords."""

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

_Options = TypeVar("_Options")


@dataclass(frozen=True)
class ImageConfig:
    """What models of images share: what is generated from what."""

    # Shape (C, H, W) of what is generated; a point of the plane is (2, 1, 1).
    event_shape: tuple[int, int, int] = (1, 28, 28)
    # Kind of condition.
    cond_kind: Literal["none", "class", "image"] = "none"
    # Number of classes.
    num_classes: int = 0
    # Shape of one condition: (C, H, W) of an image with the sides of event_shape, else ().
    cond_shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_choices(self)
        if len(self.event_shape) != 3 or min(self.event_shape) < 1:
            raise ValueError(f"event_shape must be (C, H, W), got {self.event_shape}")
        kind: str = self.cond_kind  # "tokens" too, of the families that take them
        if (kind in ("class", "tokens")) != (self.num_classes > 0):
            raise ValueError(
                "num_classes must be positive for conditions of classes or tokens, and 0 for "
                f"others, got {self.num_classes} for {kind}"
            )
        shape = self.cond_shape
        if kind == "image":
            self._check_image_cond()
        elif kind == "tokens" and (len(shape) != 1 or shape[0] < 1):
            raise ValueError(f"cond_shape must be (M,) for tokens, got {shape}")
        elif kind in ("none", "class") and shape:
            raise ValueError(f"cond_shape must be () without an image as condition, got {shape}")
        if not 0 <= self.cond_dropout < 1:
            raise ValueError(f"cond_dropout must be in [0, 1), got {self.cond_dropout}")

    def _check_image_cond(self) -> None:
        shape = self.cond_shape
        if len(shape) != 3 or min(shape) < 1 or shape[1:] != self.event_shape[1:]:
            raise ValueError(
                f"cond_shape must have the sides of event_shape {self.event_shape} as (C, H, W), "
                f"got {shape}"
            )

    @property
    def cond_dropout(self) -> float:
        """Share of conditions dropped in training: none."""
        return 0.0


@dataclass(frozen=True)
class GuidedConfig(ImageConfig):
    """Of models that take tokens too, and learn p(y) beside p(y | cond) for guidance."""

    # Kind of condition.
    cond_kind: Literal["none", "class", "image", "tokens"] = "none"  # type: ignore[assignment]
    # Number of classes, or of different tokens.
    num_classes: int = 0
    # Shape of one condition: (C, H, W) of an image, (M,) of tokens, else ().
    cond_shape: tuple[int, ...] = ()
    # Share of training examples whose condition is dropped, so that guidance has its other half.
    cond_dropout: float = 0.1


# Checks -------------------------------------------------------------------------------------------
def check_positive(config: object, *names: str) -> None:
    """ValueError unless these fields of a config are positive and finite."""
    for name in names:
        if not 0 < (value := getattr(config, name)) < math.inf:
            raise ValueError(f"{name} must be positive, got {value}")


def check_not_negative(config: object, *names: str) -> None:
    """ValueError unless these fields of a config are finite and not negative."""
    for name in names:
        if not 0 <= (value := getattr(config, name)) < math.inf:
            raise ValueError(f"{name} must not be negative, got {value}")


def check_choices(config: object) -> None:
    """ValueError unless each field of a config that is a Literal has one of its values."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is not Literal:
            continue
        choices, value = typing.get_args(hint), getattr(config, name)
        if value not in choices:
            one_of = "one of " if len(choices) > 1 else ""
            raise ValueError(
                f"{name} must be {one_of}{', '.join(map(str, choices))}, got {value!r}"
            )


# From JSON and keywords ---------------------------------------------------------------------------
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


def solver_options(
    cls: type[_Options], solver: dict[str, Any], function: str = "sample"
) -> _Options:
    """The solver options of a function as their dataclass; TypeError for one that it has not."""
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in solver:
        if name not in known:
            raise TypeError(f"{name} is no option of {function}; it has {', '.join(known)}")
    return cls(**solver)
