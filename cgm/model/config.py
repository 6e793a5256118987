"""Configs: what is generated from what, their checks, and their way from JSON and keywords."""

import dataclasses
import functools
import math
import reprlib
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from cgkernels.checks import did_you_mean

_Options = TypeVar("_Options")


# Checks -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Interval:
    """Where a number must lie, as part of its annotation: Annotated[int, Interval(2, 256)].

    As text, what the number must be.
    """

    low: float = -math.inf
    high: float = math.inf
    # A bracket belongs to the interval, a parenthesis does not. An infinite end in a bracket lets
    # infinity pass; NaN never does.
    ends: str = "[]"

    def __contains__(self, value: float) -> bool:
        above = self.low <= value if self.ends[0] == "[" else self.low < value
        return above and (value <= self.high if self.ends[1] == "]" else value < self.high)

    def __str__(self) -> str:
        low, high, closed = self.low, self.high, self.ends[0] == "["
        if high == math.inf:
            positive = (low, closed) in ((0, False), (1, True))
            least = "not be negative" if low == 0 else f"be at least {low}"
            return "be finite" if low == -math.inf else "be positive" if positive else least
        if not closed:
            return f"be above {low} and at most {high}"
        if self.ends[1] == "]" and low == 1:
            return f"be positive and at most {high}"
        if self.ends[1] == "]" and high > 1:
            return f"be from {low} to {high}"
        return f"be in [{low}, {high}{self.ends[1]}"


_FINITE = Interval(ends="()")
# What the fields of configs are annotated with, beside bool, Literal, plain (finite) numbers.
Count = Annotated[int, Interval(1, ends="[)")]
Depth = Annotated[int, Interval(1, 62)]  # resolutions: no side can be halved more often
Natural = Annotated[int, Interval(0, ends="[)")]
Positive = Annotated[float, Interval(0, ends="()")]
NotNegative = Annotated[float, Interval(0, ends="[)")]
Share = Annotated[float, Interval(0, 1, "[)")]


@dataclass(frozen=True)
class Config:
    """Base of all configs: the annotation of a field says which values fit, and is checked.

    Raises TypeError or ValueError, which names the field, what it got and what fits.
    """

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for name, hint in _hints(cls).items():
            value = getattr(self, name)
            if (misfit := _misfit(hint, value)) is not None:
                error, must = misfit
                choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
                meant = did_you_mean(value, choices)
                raise error(f"{name} must {must}, got {reprlib.repr(value)}{meant}")


@functools.cache  # a call of `sample` makes a config
def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _misfit(
    hint: Any, value: Any, interval: Interval = _FINITE
) -> tuple[type[Exception], str] | None:
    """None for a value that fits an annotation, else an error and what the value must be."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _misfit(parts[0], value, next(p for p in parts if isinstance(p, Interval)))
    if origin is Literal:
        same = [choice for choice in parts if type(choice) is type(value)]  # True is not 1
        return None if value in same else (ValueError, f"be {_kind(hint)}")
    if origin is tuple:
        if not isinstance(value, tuple):
            return TypeError, f"be {_kind(hint)}"
        kinds = parts[:1] * len(value) if parts[-1] is ... else parts
        if len(kinds) != len(value):
            return ValueError, f"be {_kind(hint)}"
        for kind, part in zip(kinds, value, strict=True):
            if (found := _misfit(kind, part)) is not None:
                error, must = found
                return error, f"be {_kind(hint)}" if must == f"be {_kind(kind)}" else must
        return None
    kind = (int, float) if hint is float else hint
    if not isinstance(value, kind) or (isinstance(value, bool) and hint is not bool):
        return TypeError, f"be {_kind(hint)}"
    if hint not in (int, float):
        return None
    try:
        number = hint(value)
    except OverflowError:  # an int that no float holds
        number = math.inf
    if number in interval:
        return None
    endless = number in (-math.inf, math.inf) and interval != _FINITE
    return ValueError, f"{interval}{' and finite' if endless else ''}"


def _kind(hint: Any, many: bool = False) -> str:
    """The values of an annotation, in words."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _kind(parts[0], many)
    if origin is Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(map(str, parts))
    if origin is tuple:
        count = "" if parts[-1] is ... else f"{len(parts)} "
        return f"{'tuples' if many else 'a tuple'} of {count}{_kind(parts[0], True)}"
    if hint is bool:
        return "True or False"
    kind = {int: "whole number", float: "number"}.get(hint, hint.__name__)
    return f"{kind}s" if many else f"a {kind}"


# What is generated from what ----------------------------------------------------------------------
@dataclass(frozen=True)
class ImageConfig(Config):
    """What models of images share: what is generated from what."""

    # Shape (C, H, W) of what is generated; a point of the plane is (2, 1, 1).
    event_shape: tuple[Count, Count, Count] = (1, 28, 28)
    # Kind of condition.
    cond_kind: Literal["none", "class", "image"] = "none"
    # Number of classes.
    num_classes: Natural = 0
    # Shape of one condition: (C, H, W) of an image with the sides of event_shape, else ().
    cond_shape: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        kind: str = self.cond_kind  # "tokens" too, of the families that take them
        if (kind in ("class", "tokens")) != (self.num_classes > 0):
            raise ValueError(
                "num_classes must be positive for conditions of classes or tokens, and 0 for "
                f"others, got {self.num_classes} for {kind}"
            )
        shape = self.cond_shape
        if kind == "image":
            self._check_image_cond()
        elif kind == "tokens" and len(shape) != 1:
            raise ValueError(f"cond_shape must be (M,) for tokens, got {shape}")
        elif kind in ("none", "class") and shape:
            raise ValueError(f"cond_shape must be () without an image as condition, got {shape}")

    def _check_image_cond(self) -> None:
        shape = self.cond_shape
        if len(shape) != 3 or shape[1:] != self.event_shape[1:]:
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
    num_classes: Natural = 0
    # Shape of one condition: (C, H, W) of an image, (M,) of tokens, else ().
    cond_shape: tuple[Count, ...] = ()
    # Share of training examples whose condition is dropped, so that guidance has its other half.
    cond_dropout: Share = 0.1


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
