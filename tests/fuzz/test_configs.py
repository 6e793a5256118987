"""Every field of every config: right values pass, wrong ones are refused by the field's name."""

import dataclasses
import importlib
import inspect
import math
import pkgutil
import typing
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cgm
from cgm.model import Config, Interval

# What a config needs that has no default.
NEEDED: dict[str, dict[str, Any]] = {"TransformerConfig": {"vocabulary": 8, "length": 8}}


def configs() -> list[type[Config]]:
    """Those of all modules: of models, networks, sampling and training."""
    found = []
    for module in pkgutil.walk_packages(cgm.__path__, "cgm."):
        if module.name != "cgm.__main__":
            classes = inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
            here = [value for _, value in classes if value.__module__ == module.name]
            found += [value for value in here if issubclass(value, Config) and value is not Config]
    return found


CONFIGS = configs()
FIELDS = [(cls, f.name) for cls in CONFIGS for f in dataclasses.fields(cls)]


def hint_of(cls: type[Config], name: str) -> Any:
    return typing.get_type_hints(cls, include_extras=True)[name]


def wrong(hint: Any) -> st.SearchStrategy:
    """Values that an annotation refuses, whatever the other fields are."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    anything = st.sampled_from([None, "x", b"1", [], {}, object(), 1j, math, "1", "nan", [1]])
    if origin is Annotated:
        kind, interval = parts
        assert isinstance(interval, Interval)
        ends = (interval.low, interval.high)
        near = [v for end in ends if math.isfinite(end) for v in (end, end - 1, end + 1)]
        numbers = [*near, -(2**63), 2**70, -1e308, 1e308, math.inf, -math.inf, math.nan]
        numbers = [kind(v) if math.isfinite(v) else v for v in numbers]
        outside = [v for v in numbers if v not in interval]
        return st.one_of(wrong(kind), st.sampled_from(outside))
    if origin is Literal:
        values = st.sampled_from(["", "None", 0, True, 1.0, math.nan])
        refused = values.filter(lambda v: all(v != p or type(v) is not type(p) for p in parts))
        return anything | refused
    if origin is tuple:
        lists = st.just([1]) | st.sampled_from([1, 1.5, True, math.nan])
        inside = st.tuples(*[wrong(part) for part in parts if part is not ...])
        size = [] if parts[-1] is ... else [st.just(()), st.just((1,) * (len(parts) + 1))]
        return st.one_of(anything, lists, inside, *size)
    if hint is bool:
        return anything | st.sampled_from([0, 1, 0.0, math.nan])
    if hint is int:
        return anything | st.sampled_from([True, False, 1.0, 1.5, math.nan, math.inf])
    assert hint is float, hint
    return anything | st.sampled_from([True, math.nan, math.inf, -math.inf, 10**400]).filter(
        lambda v: v != math.inf
    )


def right(hint: Any) -> st.SearchStrategy:
    """Values that an annotation takes; other fields may not."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        low, high = parts[1].low, parts[1].high
        numbers = (
            st.integers(int(max(low, 0)), int(min(high, 2**70)))
            if parts[0] is int
            else st.floats(max(low, 0.0), min(high, 1e30)) | st.integers(0, 2)
        )
        return numbers.filter(lambda v: v in parts[1])
    if origin is Literal:
        return st.sampled_from(parts)
    if origin is tuple:
        if parts[-1] is ...:
            return st.lists(right(parts[0]), max_size=4).map(tuple)
        return st.tuples(*map(right, parts))
    return {bool: st.booleans(), int: st.integers(), float: st.floats(-1e30, 1e30)}[hint]


def test_every_config_of_a_model_is_found():
    names = {cls.__name__ for cls in CONFIGS}
    assert {"TrainingConfig", "DiffusionConfig", "TransformerConfig", "SamplingConfig"} <= names
    assert len(CONFIGS) > 25


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
def test_defaults_pass(cls):
    cls(**NEEDED.get(cls.__name__, {}))


def test_a_wrong_value_is_refused_by_the_name_of_its_field(fuzz):
    @given(st.sampled_from(FIELDS), st.data())
    def check(field, data):
        cls, name = field
        value = data.draw(wrong(hint_of(cls, name)))
        with pytest.raises((TypeError, ValueError), match=rf"^{name} must "):
            cls(**(NEEDED.get(cls.__name__, {}) | {name: value}))

    fuzz(check)


def test_right_values_pass_or_another_rule_names_a_field(fuzz):
    @given(st.sampled_from(CONFIGS), st.data())
    def check(cls, data):
        needed = NEEDED.get(cls.__name__, {})
        names = [f.name for f in dataclasses.fields(cls)]
        chosen = data.draw(st.lists(st.sampled_from(names), max_size=4, unique=True))
        given = {name: data.draw(right(hint_of(cls, name)), name) for name in chosen}
        try:
            config = cls(**(needed | given))
        except ValueError as error:
            assert any(str(error).startswith(name) for name in names), error
        else:
            assert dataclasses.replace(config) == config and hash(config) == hash(config)

    fuzz(check)


def test_one_right_value_alone_passes_its_own_check(fuzz):
    """The annotation of a field never refuses what it takes: only rules of several fields do."""

    @given(st.sampled_from(FIELDS), st.data())
    def check(field, data):
        cls, name = field
        value = data.draw(right(hint_of(cls, name)))
        config = object.__new__(cls)
        for other in dataclasses.fields(cls):
            default = NEEDED.get(cls.__name__, {}).get(other.name, other.default)
            object.__setattr__(config, other.name, value if other.name == name else default)
        Config.__post_init__(config)

    fuzz(check)
