"""PyTorch's default dtype and default device are not what losses and samples depend on."""

import contextlib

import pytest
import torch

from cgm import load_model, shipped
from cgm.checkpoints import shipped_names
from cgm.model import PreciseBuffers
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", shipped_names())
def test_a_checkpoint_is_read_as_it_was_written(name, dtype):
    """In float32 on the CPU, and the tables beside its weights with all of their digits."""
    expected = load_model(shipped(name))
    with other_defaults(dtype):
        model = load_model(shipped(name))
    for kind in ("named_parameters", "named_buffers"):
        tensors = dict(getattr(model, kind)())
        for tensor_name, tensor in getattr(expected, kind)():
            found = tensors[tensor_name]
            assert (found.dtype, found.device) == (tensor.dtype, tensor.device), tensor_name
            assert torch.equal(found, tensor), tensor_name


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_model_that_is_made_in_another_dtype(family, kind, dtype):
    """As PyTorch's layers it takes the default; its tables stay float32, and all of it works."""
    torch.set_default_dtype(dtype)
    try:
        model = made(family, kind)
        assert {p.dtype for p in model.parameters()} == {dtype}
        for module in model.modules():
            wide = isinstance(module, PreciseBuffers) and dtype != torch.float64
            assert not wide or dtype not in {b.dtype for b in module._buffers.values()}
        cond = CONDS[kind]
        cond = cond.to(dtype) if kind == "image" else cond
        for phase in model.phases:
            model.loss(images.to(dtype), cond=cond, phase=phase, seed=3)
        if model.sampling_config is not None:
            drawn = model.sample(2, cond=cond, seed=5, **STEPS.get(family, {}))
            assert drawn.dtype == dtype and drawn.isfinite().all()
        if hasattr(model, "predict"):
            assert model.predict(cond=cond).isfinite().all()
    finally:
        torch.set_default_dtype(torch.float32)
