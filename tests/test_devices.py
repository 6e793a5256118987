"""Tensors on the second of two GPUs while the first is current, on a machine without any."""

import contextlib
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import cgkernels
from benchmarks.ops import LAUNCHES
from cgkernels.checks import as_index, as_seed, as_step, check_device
from cgkernels.library import OPS, on_its_device
from tests.support import every_sample, sample_of

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


@contextlib.contextmanager
def current(number):
    """As if CUDA were there, with this current device."""
    with (
        mock.patch.object(torch.cuda, "is_initialized", lambda: True),
        mock.patch.object(torch.cuda, "current_device", lambda: number),
    ):
        yield


def fake(tensor, device):
    """Without values; of the same layout."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return made.requires_grad_(tensor.requires_grad)


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in OPS.values():
            self.calls.append([a.device for a in args if isinstance(a, Tensor)])
        return func(*args, **(kwargs or {}))


def call(sample, **moved):
    """On the second device, some tensors elsewhere: the devices that ops are called with."""
    with FakeTensorMode(), current(0), Recorder() as recorder:
        inputs = {
            name: tree_map_only(Tensor, partial(fake, device=moved.get(name, SECOND)), value)
            for name, value in sample.inputs.items()
        }
        if "device" in inputs:
            inputs["device"] = SECOND
        try:
            sample.call(inputs)
        except RuntimeError as error:
            if "not linked with support for cuda" not in str(error):
                raise
            pytest.skip("indexes a tensor, which needs CUDA")
    return recorder.calls


def given(sample):
    """Names of inputs that are tensors, or hold some."""
    return [
        n for n, v in sample.inputs.items() if any(isinstance(t, Tensor) for t in tree_leaves(v))
    ]


samples = pytest.mark.parametrize(("module", "label"), every_sample(costly=True))


@samples
def test_ops_are_called_with_what_is_on_the_second_device(module, label):
    sample = sample_of(module, label)
    if given(sample):
        assert {device for devices in call(sample) for device in devices} == {SECOND}


@samples
def test_a_tensor_on_another_device_is_refused_by_name(module, label):
    sample = sample_of(module, label)
    names = given(sample)
    call(sample)
    for name in names if len(names) > 1 else ():
        with pytest.raises(ValueError, match=r"must be on") as raised:
            call(sample, **{name: FIRST})
        words = str(raised.value)
        assert {str(FIRST), str(SECOND)} <= set(words.replace(",", "").split()), words
        # By its own name, or, of the tensor that says where the others must be, by one of theirs.
        named = words.split(" ")[0]
        assert named == name or (named in names and str(SECOND) == words.split()[-1]), words


@pytest.mark.parametrize("name", sorted(OPS))
def test_an_op_launches_on_the_device_of_its_tensors(name):
    """All launches are made within the guard, which takes the first of the tensors."""
    guarded, launch = [], next(LAUNCHES[name]()).run

    @contextlib.contextmanager
    def device_of(tensor):
        guarded.append(tensor)
        yield
        guarded.append("left")

    with mock.patch.object(torch.cuda, "device_of", device_of):
        on_its_device(lambda *args: guarded.append(args))(*launch.args)
    first = next(a for a in launch.args if isinstance(a, Tensor))
    assert guarded[0] is first and guarded[2] == "left"
    assert all(a is b for a, b in zip(guarded[1], launch.args, strict=True))


def test_devices_are_compared_not_their_types():
    with FakeTensorMode(), current(0):
        number = torch.zeros((), dtype=torch.int64, device=SECOND)
        many = torch.zeros(3, dtype=torch.int64, device=SECOND)
        for device in (FIRST, "cuda", "cuda:0", "cpu"):
            for refused, name in (
                (lambda d: as_seed(number, d), "seed"),
                (lambda d: as_index(many, 3, d), "index"),
                (lambda d: as_step("step", many, 3, d, 10), "step"),
            ):
                with pytest.raises(ValueError, match=rf"{name} must be on {device}, got cuda:1"):
                    refused(device)
        for device in (SECOND, "cuda:1", None):
            as_seed(number, device), as_index(many, 3, device)
            as_step("step", many, 3, device, 10)
        with current(1):
            assert as_seed(number, "cuda")[1] == SECOND
    for device in ("cpu", "cpu:0", torch.device("cpu")):
        check_device("x", torch.zeros(1), device)


@pytest.mark.cuda
def test_kernels_run_on_the_device_of_their_tensors():
    """Whatever the current device is."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(0):
        z = cgkernels.philox_normal((2, 3), seed=0, device="cuda:1")
        with pytest.raises(ValueError, match="seed must be on cuda"):
            seed = torch.zeros((), dtype=torch.int64, device="cuda:1")
            cgkernels.philox_normal((2, 3), seed=seed, device="cuda")
    assert z.device == SECOND
    torch.testing.assert_close(
        z.cpu(), cgkernels.philox_normal((2, 3), seed=0, device="cuda:0").cpu(), rtol=0, atol=0
    )
