"""Constants that kernels share with plain PyTorch."""

import pytest

from cgkernels import device, random

STREAMS = [name for name in vars(device) if name.startswith("STREAM_")]


@pytest.mark.parametrize("name", STREAMS)
def test_streams_of_kernels_are_those_of_the_contract(name):
    assert getattr(device, name).value == getattr(random, name)


def test_kernels_have_the_streams_that_they_draw_from():
    assert STREAMS == ["STREAM_SAMPLER", "STREAM_TOKENS", "STREAM_TRAINING", "STREAM_LATENTS"]
