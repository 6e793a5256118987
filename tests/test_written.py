"""What ops write: any strides will do, but no memory that is written twice or read besides."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cgkernels
from tests.fuzz import call
from tests.support import normals

EULER = torch.zeros(1, 12)
EULER[0, [2, 6, 7, 8, 9]] = torch.tensor([1.0, -0.1, 0.3, -torch.inf, torch.inf])


def numbers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def guided_step_() -> dict[str, Any]:
    event = (2, 3, 4, 4)
    names = ("x", "cond", "uncond", "log_variance", "h1", "h2", "twin")
    return {
        **{name: normals(*event, seed=i) for i, name in enumerate(names)},
        "table": EULER.clone(), "step": numbers(2), "scale": torch.ones(2),
        "seed": numbers(1), "index": torch.arange(2),
    }  # fmt: skip


def sample_logits_() -> dict[str, Any]:
    return {
        "tokens": numbers(2, 3), "log_probs": normals(2, 3), "counts": numbers(2, 2),
        "logits": normals(2, 9), "uncond": normals(2, 9, seed=1), "scale": torch.ones(2),
        "temperature": torch.ones(2), "top_k": numbers(2) + 5, "top_p": torch.ones(2) / 2,
        "min_p": torch.zeros(2), "seed": numbers(1), "index": torch.arange(2),
    }  # fmt: skip


def instance_norm_act_() -> dict[str, Any]:
    names = ("out", "second", "x", "residual")
    return {
        **{name: normals(2, 3, 4, 4, seed=i) for i, name in enumerate(names)},
        "weight": normals(3), "bias": normals(3, seed=1),
    }  # fmt: skip


def decode_attention() -> dict[str, Any]:
    return {
        "q": normals(2, 1, 4, 8), "k_cache": normals(2, 5, 2, 8), "v_cache": normals(2, 5, 2, 8),
        "lengths": numbers(2) + 1, "k_new": normals(2, 1, 2, 8), "v_new": normals(2, 1, 2, 8),
        "position": numbers(2, 1), "prefix_k": normals(1, 3, 2, 8), "prefix_v": normals(1, 3, 2, 8),
        "prefix_length": numbers(1), "prefix_id": numbers(2), "left_pad": numbers(2),
        "counters": torch.zeros(8, dtype=torch.int32),
    }  # fmt: skip


def norm_linear() -> dict[str, Any]:
    return {
        "x": normals(2, 8), "weight": normals(8, 8), "norm_weight": normals(8), "norm": "rms",
        "bias": normals(8), "residual": normals(2, 8),
        "counters": torch.zeros(8, dtype=torch.int32),
    }  # fmt: skip


OPS: dict[Callable, tuple[str, ...]] = {
    guided_step_: ("x", "h1", "h2", "twin"),
    sample_logits_: ("tokens", "log_probs", "counts"),
    instance_norm_act_: ("out", "second"),
    decode_attention: ("k_cache", "v_cache", "counters"),
    norm_linear: ("counters",),
}
"""What each op writes."""

WRITTEN = [(made, name) for made, names in OPS.items() for name in names]
ids = {"ids": lambda value: getattr(value, "__name__", value)}


def refused(made: Callable, name: str, arguments: dict[str, Any]) -> None:
    """The call is refused, by the name of this argument, and nothing was written."""
    function = getattr(cgkernels, made.__name__)
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        function(**arguments)
    assert call(function, arguments) is None


@pytest.mark.parametrize("made", OPS, **ids)
def test_the_calls_are_right(made):
    results = call(getattr(cgkernels, made.__name__), made())
    assert results is not None


@pytest.mark.parametrize(("made", "name"), WRITTEN, **ids)
@pytest.mark.parametrize("reference", [False, True])
def test_memory_that_is_written_twice(made, name, reference):
    arguments = made()
    tensor = arguments[name]
    expanded = tensor[:1].expand(tensor.shape)
    closer = [max(1, s - 1) if s > 1 else s for s in tensor.stride()]
    overlapping = tensor.clone().as_strided(tensor.shape, closer)
    with torch.inference_mode():
        inference = tensor.clone()
    wrong = [expanded, inference, *([overlapping] if tensor.dim() > 1 else [])]
    if tensor.is_floating_point():
        wrong.append(tensor.clone().requires_grad_())
    for value in wrong:
        if reference:
            with cgkernels.reference():
                refused(made, name, {**arguments, name: value})
        else:
            refused(made, name, {**arguments, name: value})


@pytest.mark.parametrize(("made", "name"), WRITTEN, **ids)
def test_memory_that_is_read_too(made, name):
    """Of each other argument a byte lies in what is written."""
    for other, value in made().items():
        if other == name or not isinstance(value, Tensor):
            continue
        arguments = made()
        tensor = arguments[name]
        both = torch.zeros(tensor.nbytes + value.nbytes, dtype=torch.uint8)
        ours = both[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        start = (tensor.nbytes - 1) // value.itemsize * value.itemsize  # where our last byte is
        theirs = both[start : start + value.nbytes].view(value.dtype).view(value.shape)
        arguments |= {name: ours, other: theirs}
        function = getattr(cgkernels, made.__name__)
        with pytest.raises(ValueError, match=f"{name}|{other}"):
            function(**arguments)
        assert call(function, arguments) is None


def test_interleaved_memory_is_written():
    """Channels of one buffer, as a network's skip connections are made."""
    whole = torch.zeros(2, 9, 4, 4)
    x = normals(2, 3, 4, 4)
    parts = (whole[:, 3:6], whole[:, :3])
    cgkernels.instance_norm_act_(parts[0], x, second=parts[1], second_activation="relu")
    expected = cgkernels.instance_norm_act(x)
    assert torch.equal(parts[0], expected) and torch.equal(parts[1], expected.relu())
    assert not whole[:, 6:].any()
    halves = torch.zeros(4, 5, 4, 4)
    halves[:2, :3] = x
    cgkernels.guided_step_(
        halves[:2, :3], normals(2, 3, 4, 4, seed=1), table=EULER, step=0, seed=0,
        twin=halves[2:, :3],
    )  # fmt: skip
    assert torch.equal(halves[:2], halves[2:]) and not halves[:, 3:].any()
