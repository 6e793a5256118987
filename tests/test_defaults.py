"""PyTorch's default dtype and default device are not what losses and samples depend on."""

import contextlib

import pytest
import torch

from tests.families.test_protocol import CONDS, STEPS, every, images, made


@contextlib.contextmanager
def other_defaults(dtype: torch.dtype):
    """What nobody said a dtype and a device of has this dtype, and no values."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_losses_and_samples_do_not_depend_on_defaults(family, kind, dtype):
    model, cond = made(family, kind), CONDS[kind]

    def results():
        made = [model.loss(images, cond=cond, phase=phase, seed=3) for phase in model.phases]
        if model.sampling_config is not None:
            draws = model.sample(2, cond=cond, seed=5, **STEPS.get(family, {}))
            made.append({"draws": draws, "none": model.sample(0, cond=cond)})
        return made

    torch.manual_seed(0)
    expected = results()
    with other_defaults(dtype):
        actual = results()
    for there, here in zip(actual, expected, strict=True):
        for name, value in here.items():
            assert there[name].dtype == value.dtype, name
            assert torch.equal(there[name], value), name
