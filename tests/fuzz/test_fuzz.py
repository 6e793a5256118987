"""The oracle of the made-up calls can fail."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import call


def refuses(x, scale):
    raise ValueError("scale must be positive")


def refuses_without_a_name(x, scale):
    raise ValueError("something is wrong")


def writes_before_it_refuses(x, scale):
    x.fill_(1)
    raise ValueError("scale must be positive")


def test_a_refusal_names_an_argument_and_writes_nothing():
    arguments = {"x": torch.zeros(2), "scale": -1}
    assert call(refuses, arguments) is None
    with pytest.raises(AssertionError, match="names no argument"):
        call(refuses_without_a_name, arguments)
    with pytest.raises(AssertionError, match="wrote"):
        call(writes_before_it_refuses, arguments)


def test_a_run_makes_its_calls(request):
    made, fuzz = [], request.getfixturevalue("fuzz")  # so that this file has no share of the others

    @given(st.integers())
    def check(n):
        made.append(n)

    fuzz(check)
    assert 1 <= len(made) <= request.config.getoption("--fuzz")
