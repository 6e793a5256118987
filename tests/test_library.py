"""Registration, the reference switch, when an autograd.Function is needed; and the examples."""

import doctest

import pytest
import torch
from torch.autograd import forward_ad

import cgkernels
from benchmarks.ops import LAUNCHES
from cgkernels import add_noise, guided_step_
from cgkernels.library import OPS, needs_function, using_reference
from cgkernels.testing import Launch
from tests.support import assert_equal, every_sample, launchers, op_calls, sample_of

TABLE = torch.tensor([[0.8, 0.6]])


def test_every_op_has_all_its_parts():
    assert set(OPS) == set(LAUNCHES) == set(launchers())
    for name, op in OPS.items():
        assert op is getattr(torch.ops.cgkernels, name).default
        for key in ("CPU", "CUDA", "Meta"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cgkernels::{name}", key)


def test_launches_are_listed():
    """Each with the arguments of its op, which the op's fake takes."""
    for name, op in OPS.items():
        launches = list(LAUNCHES[name]())
        assert launches and all(isinstance(launch, Launch) for launch in launches)
        assert len({launch.label for launch in launches}) == len(launches), name
        for launch in launches:
            assert launch.run.func is launchers()[name] and not launch.run.keywords
            op(*launch.run.args)


@pytest.mark.parametrize("name", cgkernels.__all__)
def test_examples_of_the_documentation(name):
    function = getattr(cgkernels, name)
    names = {"torch": torch, **{n: getattr(cgkernels, n) for n in cgkernels.__all__}}
    assert function.__doc__
    for example in doctest.DocTestFinder(recurse=False).find(function, name, globs=names):
        assert doctest.DocTestRunner().run(example).failed == 0


# reference() --------------------------------------------------------------------------------------
def test_reference_ends_with_its_block():
    assert not using_reference()
    with cgkernels.reference():
        with cgkernels.reference():
            assert using_reference()
        assert using_reference()
    assert not using_reference()
    with pytest.raises(ZeroDivisionError), cgkernels.reference():
        raise ZeroDivisionError
    assert not using_reference()


@pytest.mark.parametrize(("module", "label"), every_sample())
def test_reference_calls_no_op(module, label):
    """Plain PyTorch under autograd, backward included."""
    with cgkernels.reference():
        assert op_calls(sample_of(module, label)) == []


def test_the_reference_has_forward_mode_derivatives():
    x, tangent = torch.randn(2, 3), torch.randn(2, 3)

    def run(x):
        return add_noise(x, table=TABLE, t=0, seed=0)[0]

    with cgkernels.reference():
        _, derivative = torch.func.jvp(run, (x,), (tangent,))
    torch.testing.assert_close(derivative, 0.8 * tangent)


# Autograd -----------------------------------------------------------------------------------------
def test_when_a_function_is_needed():
    plain, leaf = torch.zeros(1), torch.zeros(1, requires_grad=True)
    assert needs_function(None, plain, leaf)
    assert not needs_function(None, plain)
    with torch.no_grad():
        assert not needs_function(leaf)
    with torch.inference_mode():
        assert not needs_function(leaf)


def test_without_gradients_no_graph_is_made():
    x = torch.randn(2, 3, requires_grad=True)
    assert add_noise(x, table=TABLE, t=0, seed=0)[0].grad_fn is not None
    with torch.no_grad():
        assert add_noise(x, table=TABLE, t=0, seed=0)[0].grad_fn is None
    assert add_noise(x.detach(), table=TABLE, t=0, seed=0)[0].grad_fn is None
    with torch.inference_mode():
        assert add_noise(x, table=TABLE, t=0, seed=0)[0].is_inference()


def test_forward_mode_is_refused_before_anything_is_written():
    x = torch.randn(2, 3)
    before = x.clone()
    table = torch.zeros(1, 12)
    with forward_ad.dual_level():
        cond = forward_ad.make_dual(torch.randn(2, 3), torch.randn(2, 3))
        with pytest.raises(NotImplementedError, match=r"forward-mode.*cgkernels\.reference\(\)"):
            guided_step_(x, cond, table=table, step=0)
    assert_equal(x, before)


@pytest.mark.cuda
def test_kernels_run_on_the_device_of_their_tensors():
    """Whatever the current device is."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(0):
        z = cgkernels.philox_normal((2, 3), seed=0, step=0, device="cuda:1")
    assert z.device == torch.device("cuda:1")
    assert_equal(z.cpu(), cgkernels.philox_normal((2, 3), seed=0, step=0, device="cuda:0").cpu())
