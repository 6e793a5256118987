"""Made-up calls of every family's `loss`, `sample` and likelihoods.

Each gives finite numbers of the right shape and dtype, those of the plain model, and those of a row
alone; or a refusal that names the argument.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cgkernels
from cgkernels.samplers import SAMPLERS
from cgm.model import FAMILIES, Model
from tests.families.test_protocol import STEPS, kinds_of, made
from tests.fuzz import call

LIKELIHOODS = ("log_prob", "elbo", "energy", "bits_per_dimension")
NAMES = ("y", "cond", "seed", "index", "phase", "n", "guidance", "steps", "shared")
PAIRS = [(family, kind) for family in FAMILIES for kind in kinds_of(family)]

cached = functools.cache(made)


class Value(NamedTuple):
    """What an argument is, and whether it is one that must be refused."""

    value: Any
    wrong: bool = False


# What is wrong with an image (rows, C, H, W), C = 1, H = W = 8.
WRONG_IMAGES: tuple[Callable[[Tensor], Any], ...] = (
    lambda y: 3,
    lambda y: "image",
    lambda y: y.tolist(),
    lambda y: y.numpy(),
    lambda y: y.double(),
    lambda y: y.half(),
    lambda y: y.to(torch.int64),
    lambda y: y > 0,
    lambda y: y.to(torch.complex64),
    lambda y: y[0, 0, 0, 0],
    lambda y: y[:, 0],
    lambda y: y[..., :-1],
    lambda y: y.movedim(1, 3),
    lambda y: y.expand(-1, 3, -1, -1),
    lambda y: y[None],
    lambda y: y.to("meta"),
    lambda y: torch.where(y == y.amax(), math.nan, y),
    lambda y: torch.where(y == y.amax(), math.inf, y),
    lambda y: torch.where(y == y.amin(), -math.inf, y),
    lambda y: (y + 1) * 127.5,
)
RIGHT_IMAGES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda y: y,
    lambda y: y * 0,
    lambda y: y.sign(),
    lambda y: y * 1e-30,
    lambda y: y.transpose(2, 3),
    lambda y: y[:, :, :1].expand_as(y),
    lambda y: y.contiguous(memory_format=torch.channels_last),
)
WRONG_IDS: tuple[Callable[[Tensor], Any], ...] = (
    lambda ids: 1,
    lambda ids: ids.tolist(),
    lambda ids: ids.int(),
    lambda ids: ids.float(),
    lambda ids: ids > 0,
    lambda ids: ids + 100,
    lambda ids: ids - 100,
    lambda ids: ids + 2**40,
    lambda ids: ids[..., None],
    lambda ids: ids.to("meta"),
)
WRONG_SEEDS = (None, 0.5, True, "x", 2**64, -(2**63) - 1, torch.zeros(2, dtype=torch.int64), [0])
WRONG_INDICES: tuple[Callable[[Tensor], Any], ...] = (
    lambda index: index.tolist(),
    lambda index: index.int(),
    lambda index: index.double(),
    lambda index: torch.cat([index, index[:1]]),
    lambda index: index[:, None],
)
seeds = st.one_of(
    st.integers(-(2**63), 2**64 - 1).map(Value),
    st.integers(-(2**63), 2**63 - 1).map(lambda seed: Value(torch.tensor(seed))),
)


def one_of(draw, right, wrong, of: Tensor, likely: int) -> Value:
    """A right one, or with one chance in `likely` a wrong one, made of this tensor."""
    if len(of) and draw(st.integers(1, likely)) == 1:
        return Value(draw(st.sampled_from(wrong))(of), True)
    return Value(draw(st.sampled_from(right))(of))


def image(draw, rows: int, likely: int) -> Value:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return one_of(
        draw, RIGHT_IMAGES, WRONG_IMAGES, torch.rand(rows, 1, 8, 8, generator=generator) * 2 - 1,
        likely,
    )  # fmt: skip


def condition(draw, model: Model, rows: int, likely: int, *, of_y: bool) -> Value:
    """of_y: a wrong one may have too few rows."""
    kind = model.config.cond_kind
    if kind == "none":
        return draw(st.sampled_from([Value(None)] * likely + [Value(torch.zeros(1), True)]))
    if kind == "image":
        return image(draw, rows, likely)
    shape = (rows, *model.config.cond_shape)
    ids = torch.randint(3, shape, generator=torch.Generator().manual_seed(rows))
    if of_y and rows and draw(st.integers(1, 2 * likely)) == 1:
        return Value(ids[:0], True)
    return one_of(draw, (lambda ids: ids, lambda ids: ids.flip(0)), WRONG_IDS, ids, likely)


def numbers(draw, rows: int, high: int, likely: int) -> Value:
    if draw(st.booleans()):
        return Value(None)
    values = draw(st.lists(st.integers(0, high), min_size=rows, max_size=rows))
    index = torch.tensor(values, dtype=torch.int64)
    return one_of(draw, (lambda index: index,), WRONG_INDICES, index, likely)


def seed(draw, likely: int) -> Value:
    if draw(st.integers(1, likely)) == 1:
        return Value(draw(st.sampled_from(WRONG_SEEDS)), True)
    return draw(seeds)


def checked(function: Callable, arguments: dict[str, Value]) -> Any:
    """The result, or None; refused just where something is wrong with an argument."""
    result = call(function, {name: v.value for name, v in arguments.items()}, NAMES)
    wrong = [name for name, v in arguments.items() if v.wrong]
    assert (result is None) == bool(wrong), f"wrong are {wrong}, got {result}"
    return result


def options_of(draw, model: Model, kind: str, rows: int) -> dict[str, Value]:
    """Some options of the sampler, at most one of them wrong."""
    has = model.sampling_options()
    found = {}
    if draw(st.integers(1, 8)) == 1:
        wrong = [("unknown", 1), ("guidance", 2.0 if "guidance" not in has else math.nan)]
        wrong += [
            (name, value)
            for name in ("temperature", "truncation", "step_size", "guidance", "eta", "top_p")
            for value in (math.nan, math.inf, -math.inf, 1e39, 1e308, 2**200)
            if name in has
        ]
        wrong += [(name, "x") for name in ("sampler", "spacing", "variance", "way") if name in has]
        name, value = draw(st.sampled_from(wrong))
        return {name: Value(value, True)}
    scales = ["temperature", "truncation"]
    for name in scales:
        if name in has and draw(st.booleans()):
            found[name] = Value(draw(st.floats(0.01, 3) | st.just(0)))
    if "guidance" in has and kind != "none" and draw(st.booleans()):
        found["guidance"] = Value(draw(st.floats(-5, 20)))
    if "top_p" in has and draw(st.booleans()):
        found |= {"top_p": Value(draw(st.floats(0.1, 1))), "min_p": Value(draw(st.floats(0, 1)))}
        found["top_k"] = Value(draw(st.integers(0, 9)))
    if "sampler" in has:
        found["sampler"] = Value(draw(st.sampled_from(SAMPLERS)))
        found["steps"] = Value(draw(st.integers(1, 4)))
        found["clip"] = Value(draw(st.booleans()))
    return found


def row_of(arguments: dict[str, Value], row: int, rows: int) -> dict[str, Any]:
    """The same call for one row alone; without numbers of its own it keeps that of the batch."""
    index = arguments["index"].value if "index" in arguments else None
    given = {name: v.value for name, v in arguments.items()}
    for name in ("y", "cond"):
        if given.get(name) is not None:
            given[name] = given[name][row : row + 1]
    if "index" in arguments:
        given["index"] = (torch.arange(rows) if index is None else index)[row : row + 1]
    return given


def assert_same(found: Tensor, expected: Tensor, discrete: bool = False) -> None:
    tolerance = {"rtol": 0, "atol": 0} if discrete else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(found, expected, equal_nan=True, **tolerance)


@pytest.mark.parametrize("name", ["loss", *LIKELIHOODS])
def test_losses_and_likelihoods(name, fuzz):
    @given(st.data())
    def check(data):
        family, kind = data.draw(st.sampled_from(PAIRS))
        model, rows = cached(family, kind), data.draw(st.integers(0, 3))
        function = getattr(model, name)
        arguments = {
            "y": image(data.draw, rows, 5) if rows else Value(torch.zeros(0, 1, 8, 8)),
            "cond": condition(data.draw, model, rows, 5, of_y=True),
        }
        if name in ("loss", "elbo"):
            arguments["seed"] = seed(data.draw, 8)
            arguments["index"] = numbers(data.draw, rows, 2**62, 8)
        if name == "loss":
            phases = [*map(Value, (None, *model.phases)), Value("other", True), Value(0, True)]
            arguments["phase"] = data.draw(st.sampled_from(phases))
        try:
            found = checked(function, arguments)
        except NotImplementedError:
            return
        if found is None:
            return
        found = found if name == "loss" else {"total": found}
        given = {key: v.value for key, v in arguments.items()}
        with cgkernels.reference():
            plain = function(**given)
        if not rows:
            assert all(value.shape == (0,) for value in found.values())
            return
        row = data.draw(st.integers(0, rows - 1))
        alone = function(**row_of(arguments, row, rows))
        for part, value in found.items():
            assert value.shape == (rows,) and value.dtype in (torch.float32, torch.float64)
            assert value.isfinite().all(), (family, kind, part)
            assert_same(value, plain[part] if name == "loss" else plain)
            assert_same(value[row : row + 1], alone[part] if name == "loss" else alone)

    fuzz(check)


def test_samples(fuzz):
    @given(st.data())
    def check(data):
        family, kind = data.draw(st.sampled_from(PAIRS))
        model, rows = cached(family, kind), data.draw(st.integers(0, 3))
        if model.sampling_config is None:
            return
        draws = data.draw(st.sampled_from([*map(Value, (None, 0, 1, 2)), Value(-1, True),
                                           Value(2.5, True), Value(True, True),
                                           Value(2**40, True)]))  # fmt: skip
        cond = condition(data.draw, model, rows, 5, of_y=False)
        numbered = rows
        if kind == "none":
            numbered = draws.value if type(draws.value) is int and 0 <= draws.value < 3 else 1
            draws = draws if draws.value is not None else Value(None, True)
        high = 2**32 - 1 if draws.value is not None else 2**62
        arguments = {
            "n": draws,
            "cond": cond,
            "seed": seed(data.draw, 8) if rows and draws.value != 0 else Value(0),
            "index": numbers(data.draw, numbered, high, 8),
        }
        arguments |= {key: Value(value) for key, value in STEPS.get(family, {}).items()}
        arguments |= options_of(data.draw, model, kind, rows)
        found = checked(model.sample, arguments)
        if found is None:
            return
        event = model.config.event_shape
        if kind == "none":
            assert found.shape == (draws.value, *event)
        else:
            leading = () if draws.value is None else (draws.value,)
            assert found.shape == (*leading, rows, *event)
        assert found.dtype == model.dtype and found.isfinite().all()
        given = {key: v.value for key, v in arguments.items()}
        with cgkernels.reference():
            assert_same(found, model.sample(**given), model.discrete)
        if rows and kind != "none":
            row = data.draw(st.integers(0, rows - 1))
            alone = model.sample(**row_of(arguments, row, rows))
            batch = found[row : row + 1] if draws.value is None else found[:, row : row + 1]
            assert_same(batch, alone, model.discrete)

    fuzz(check)
