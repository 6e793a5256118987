"""Registration, the reference switch, when an autograd.Function is needed; and the examples."""

import asyncio
import contextvars
import doctest
import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

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


def test_reference_is_of_its_thread():
    """Two that interleave: A enters, B enters, A leaves, B leaves; and one that starts inside."""
    entered, left, seen = threading.Event(), threading.Event(), {}

    def other():
        seen["started"] = using_reference()
        with cgkernels.reference():
            entered.set()
            left.wait(10)
            seen["inside"] = using_reference()
        seen["after"] = using_reference()

    with cgkernels.reference():
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(10)
    assert not using_reference()
    left.set()
    thread.join()
    assert seen == {"started": False, "inside": True, "after": False}
    assert not using_reference()


def test_reference_is_of_its_context():
    """Of two tasks in one thread, too."""
    seen = []

    async def inside(entered, left):
        with cgkernels.reference():
            entered.set()
            await left.wait()
            seen.append(using_reference())

    async def both():
        first, second = (tuple(asyncio.Event() for _ in range(2)) for _ in range(2))
        tasks = [asyncio.create_task(inside(*events)) for events in (first, second)]
        await first[0].wait()
        await second[0].wait()
        seen.append(using_reference())
        for task, events in zip(tasks, (first, second), strict=True):
            events[1].set()
            await task
            seen.append(using_reference())

    asyncio.run(both())
    assert seen == [False, True, False, True, False] and not using_reference()


def test_a_backward_is_where_it_was_begun():
    """Also in a thread of autograd's, which has no context but what PyTorch takes along."""
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            # As on a GPU: what was stashed is there, and the context is empty.
            seen.append(contextvars.Context().run(using_reference))
            return dy

    x = torch.ones((), requires_grad=True)
    with cgkernels.reference():
        Look.apply(x).backward()
        inside = Look.apply(x)
    inside.backward()
    (gradient,) = torch.autograd.grad(Look.apply(x) ** 2, x, create_graph=True)
    with cgkernels.reference():
        gradient.backward()
    assert seen == [True, False, False, True] and not using_reference()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_checkpoint_computes_again_by_the_reference(device):
    x = torch.randn(2, 3, device=device, requires_grad=True)

    def run(x):
        return add_noise(x, table=TABLE.to(device), t=0, seed=0)[0].square()

    with cgkernels.reference():
        checkpoint(run, x, use_reentrant=False).sum().backward()
        (expected,) = torch.autograd.grad(run(x).sum(), x)
    assert_equal(x.grad, expected)


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
