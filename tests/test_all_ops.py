"""What every op must hold to, over all samples of all ops. A new op adds one file to tests/ops."""

import contextlib
import copy
import inspect

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck, gradgradcheck

import cgkernels
from cgkernels.library import OPS
from cgkernels.testing import assert_within_budget, float32_normals, layouts, plain_and_modeled
from tests.support import (
    FLOATS,
    KERNEL_DEVICES,
    OpCall,
    assert_equal,
    assert_kernels_agree,
    assert_nothing_hidden,
    compiled,
    every_sample,
    fake_results,
    kernel_results,
    launchers,
    memory_of,
    normals,
    op_calls,
    op_modules,
    sample_of,
    spoiled,
)

samples = pytest.mark.parametrize(("module", "label"), every_sample())
costly = pytest.mark.parametrize(("module", "label"), every_sample(costly=True))
differentiable = pytest.mark.parametrize(("module", "label"), every_sample(differentiable=True))


def test_every_op_is_reached():
    calls = {
        call.name
        for module in op_modules()
        for sample in module.samples(torch.float32, torch.device("cpu"))
        for call in op_calls(sample)
    }
    assert calls == set(OPS) == set(launchers())


# The registered ops -------------------------------------------------------------------------------
@costly
def test_opcheck(module, label):
    for call in op_calls(sample_of(module, label)):
        torch.library.opcheck(call.op, call.args)


@samples
def test_the_fake_states_what_comes(module, label):
    for dtype in (*FLOATS, torch.float64):
        for call in op_calls(sample_of(module, label, dtype)):
            for real, fake in zip(call.run(), fake_results(call), strict=True):
                assert real.shape == fake.shape, (call.name, dtype)
                assert (real.dtype, real.device) == (fake.dtype, fake.device), (call.name, dtype)
                assert real.stride() == fake.stride() or real.numel() == 0, (call.name, dtype)


@samples
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernels(module, label, dtype, device):
    """Against float64, sanitized, in guarded memory, in two orders of the programs, all written."""
    for call in op_calls(sample_of(module, label, dtype, device)):
        results = kernel_results(call, order_seed=1)
        assert_kernels_agree(call, results)
        assert_equal(kernel_results(call, order_seed=2), results)


@costly
@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernels_hide_nothing_that_is_not_finite(module, label, device):
    """One NaN or infinity in each argument of each op, forward and backward."""
    calls = {call.name: call for call in op_calls(sample_of(module, label, device=device))[::-1]}
    for call in calls.values():
        tensors = {i: a for i, a in enumerate(call.args) if isinstance(a, Tensor)}
        for words, i, tensor in spoiled(tensors):
            changed = OpCall(call.op, (*call.args[:i], tensor, *call.args[i + 1 :]))
            with float32_normals():
                expected = changed.map(Tensor.cpu).run()
            run = call.op if tensor.is_cuda else launchers()[call.name]
            results = changed.results(run, copy.deepcopy(changed.args))
            name = call.op._schema.arguments[i].name
            words = f"{call.name}, {name}, {words}"
            assert_nothing_hidden(results, expected, words, exact=not may_spread(name))


def may_spread(name):
    """Whether results may differ, if only none is finite that must not be.

    Weights of convolutions meet the zeros of a padding in some algorithms, in others not; a
    variance that is no number comes of an x that is none.
    """
    return name in ("weight", "var")


@pytest.mark.cuda
@samples
def test_nothing_waits_for_the_device(module, label):
    """As a loop that is captured in a CUDA graph requires."""
    sample = sample_of(module, label, device="cuda")
    sample.run()  # compiles
    inputs = copy.deepcopy(sample.inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample.call(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# torch.compile and torch.export -------------------------------------------------------------------
@costly
def test_compiles_to_one_graph(module, label):
    """Forward and backward, with the results of the eager run."""
    sample = sample_of(module, label)
    counts, run = compiled(sample)
    inputs, same = copy.deepcopy(sample.inputs), copy.deepcopy(sample.inputs)
    wanted = [[i[name].requires_grad_() for name in sample.differentiable] for i in (inputs, same)]
    outputs, expected = run(inputs), sample.call(same)
    assert_equal(outputs, expected, equal_nan=True)
    if sample.differentiable:
        outputs, expected = ([t for t in o if t.requires_grad] for o in (outputs, expected))
        seeds = [normals(*t.shape, seed=i).to(t) for i, t in enumerate(outputs)]
        gradients = torch.autograd.grad(outputs, wanted[0], seeds)
        assert_equal(gradients, torch.autograd.grad(expected, wanted[1], seeds))
    assert counts == {"forward": 1, "backward": int(bool(sample.differentiable))}


@costly
def test_exports_as_one_node(module, label):
    sample = sample_of(module, label)
    tensors = sample.tensors
    fixed = {name: value for name, value in sample.inputs.items() if name not in tensors}

    class Model(torch.nn.Module):
        def forward(self, tensors):
            return sample.call({**fixed, **tensors})

    exported = torch.export.export(Model(), (copy.deepcopy(tensors),), strict=False)
    ours = [node for node in exported.graph.nodes if node.target in OPS.values()]
    assert len(ours) == 1
    assert_equal(exported.module()(copy.deepcopy(tensors)), sample.run(), equal_nan=True)


# Derivatives --------------------------------------------------------------------------------------
@differentiable
def test_gradients(module, label):
    """First and second derivatives, in float64 against finite differences."""
    sample = sample_of(module, label, torch.float64)
    names = sample.differentiable
    values = [sample.inputs[name].double().clone().requires_grad_() for name in names]

    def run(*values):
        return sample.call({**sample.inputs, **dict(zip(names, values, strict=True))})

    assert gradcheck(run, values, fast_mode=True)
    assert gradgradcheck(run, values, fast_mode=True)


@differentiable
def test_both_backwards_agree(module, label):
    """The op that first derivatives take, and the formula that second derivatives go through."""
    sample = sample_of(module, label)
    inputs = copy.deepcopy(sample.inputs)
    wanted = [inputs[name].requires_grad_() for name in sample.differentiable]
    outputs = [out for out in sample.call(inputs) if out.requires_grad]
    seeds = [normals(*out.shape, seed=i).to(out) for i, out in enumerate(outputs)]
    by_op = torch.autograd.grad(outputs, wanted, seeds, retain_graph=True)
    by_formula = torch.autograd.grad(outputs, wanted, seeds, create_graph=True)
    assert_equal(by_op, tuple(g.detach() for g in by_formula))
    assert all(not g.requires_grad for g in by_op)
    assert all(g.dtype == x.dtype for g, x in zip(by_op, wanted, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("module", "label"), every_sample(costly=True, differentiable=True))
def test_gradients_by_torch_func(module, label):
    """torch.func.grad, and a gradient for each lane of vmap: as autograd gives them one by one."""
    sample = sample_of(module, label)
    if sample.mutates:
        pytest.skip("writes a tensor, which has no lanes")
    if "index" in inspect.signature(sample.fn).parameters and "index" not in sample.inputs:
        sample = sample.replace(index=torch.arange(sample.batch))
    names = sample.differentiable
    values = [torch.stack([v, 0.5 * v]) for v in (sample.inputs[name] for name in names)]

    factors = [normals(*out.shape, seed=i) for i, out in enumerate(sample.run())]

    def run(*values):
        outputs = sample.call({**sample.inputs, **dict(zip(names, values, strict=True))})
        pairs = zip(outputs, factors, strict=True)
        return sum((out * factor).sum() for out, factor in pairs if out.is_floating_point())

    each = tuple(range(len(names)))
    lanes = torch.func.vmap(torch.func.grad(run, each))(*values)
    whole = torch.func.grad(lambda *v: torch.func.vmap(run)(*v).sum(), each)(*values)
    for lane in range(2):
        inputs = [v[lane].clone().requires_grad_() for v in values]
        expected = torch.autograd.grad(run(*inputs), inputs)
        alone = torch.func.grad(run, each)(*(v[lane] for v in values))
        for found in (alone, [g[lane] for g in lanes], [g[lane] for g in whole]):
            torch.testing.assert_close(list(found), list(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_lanes_must_not_draw_the_same_noise():
    """Unless each has numbers of its own, of which each gets the noise."""
    index, table = torch.arange(3), torch.tensor([[0.8, 0.6]])
    calls = {
        "philox_normal": lambda i: cgkernels.philox_normal((1, 2), seed=0, step=0, index=i),
        "add_noise": lambda i: cgkernels.add_noise(
            torch.ones(1, 2), table=table, t=0, seed=0, index=i
        )[0],
        "sample_and_kl": lambda i: cgkernels.sample_and_kl(
            torch.zeros(1, 2), torch.zeros(1, 2), seed=0, step=0, index=i
        )[0],
        "random.normal": lambda i: cgkernels.random.normal(
            (1, 2), seed=0, step=0, index=i, stream=0
        ),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=r"index must be given inside torch\.func\.vmap"):
            torch.func.vmap(lambda _, call=call: call(None))(index)
        assert_equal(
            torch.func.vmap(call)(index[:, None]), torch.stack([call(i) for i in index[:, None]])
        )


@samples
def test_forward_mode_is_refused(module, label):
    """Never a tangent of zero without a word, whichever tensor has one."""
    sample = sample_of(module, label)
    for name, value in sample.tensors.items():
        if not value.is_floating_point():
            continue

        def run(value, name=name):
            return sample.call({**copy.deepcopy(sample.inputs), name: value})

        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(run, (value.clone(),), (value.clone(),))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
            run(forward_ad.make_dual(value.clone(), value.clone()))


# Values -------------------------------------------------------------------------------------------
@samples
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reference_agrees(module, label, dtype):
    sample = sample_of(module, label, dtype)
    exact = sample_of(module, label, torch.float64)
    # The float64 sample has other values: those of this one count, as they were rounded.
    exact = exact.replace(**{n: t.to(exact.tensors[n].dtype) for n, t in sample.tensors.items()})
    results = sample.run()
    with cgkernels.reference():
        (plain, modeled), true = plain_and_modeled(sample.run), exact.run()
    for ours, theirs, truth, model in zip(results, plain, true, modeled, strict=True):
        if truth.is_floating_point():
            assert_within_budget(ours, theirs, truth.double(), model)
        else:
            assert_equal((ours, theirs), (truth, truth))


@samples
def test_nothing_that_is_not_finite_is_hidden(module, label):
    """One NaN or infinity in each input: results as the reference's, gradients not finite either.

    What passes back through a kink where it is NaN is a convention, even in PyTorch.
    """
    sample = sample_of(module, label)
    for words, name, tensor in spoiled(sample.tensors):
        changed = sample.replace(**{name: tensor})
        try:
            with cgkernels.reference():
                expected = changed.run(), gradients_of(changed)
        except ValueError as error:
            assert str(error).startswith(f"{name} must be finite")
            continue
        assert_nothing_hidden(changed.run(), expected[0], words, exact=not may_spread(name))
        for of, ours, theirs in zip(
            sample.differentiable, gradients_of(changed), expected[1], strict=True
        ):
            if may_spread(of):  # and to which weights is that of the algorithm, too
                assert theirs.isfinite().all() or not ours.isfinite().all(), f"{words}: {of}"
            else:
                where = f"gradient of {of}, {words}"
                assert_nothing_hidden([ours], [theirs], where, exact=False)


def gradients_of(sample, autocast=None):
    """autocast: to this dtype, of the forward alone, as PyTorch asks for."""
    inputs = copy.deepcopy(sample.inputs)
    wanted = [inputs[name].requires_grad_() for name in sample.differentiable]
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        outputs = [out for out in sample.call(inputs) if out.requires_grad]
    seeds = [normals(*out.shape, seed=i).to(out) for i, out in enumerate(outputs)]
    return torch.autograd.grad(outputs, wanted, seeds) if wanted else ()


@samples
def test_float64_stays_float64(module, label):
    results = sample_of(module, label, torch.float64).run()
    assert {out.dtype for out in results if out.is_floating_point()} == {torch.float64}
    for out, narrow in zip(results, sample_of(module, label).run(), strict=True):
        narrow = narrow.to(out.dtype)
        torch.testing.assert_close(narrow, out, rtol=1e-2, atol=1e-2, equal_nan=True)


@samples
@pytest.mark.parametrize("dtype", (*FLOATS, torch.float64), ids=str)
@pytest.mark.parametrize("reference", [False, True])
def test_autocast_changes_nothing(module, label, dtype, reference):
    """Nor does it in the reference, which is the oracle wherever it runs."""
    narrow = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    sample = sample_of(module, label, dtype)
    with cgkernels.reference() if reference else contextlib.nullcontext():
        expected = sample.run(), gradients_of(sample)
        with torch.autocast("cpu", narrow):
            results = sample.run()
        found = results, gradients_of(sample, narrow)
    for results, same in zip(found, expected, strict=True):
        assert [out.dtype for out in results] == [out.dtype for out in same]
        assert_equal(results, same, equal_nan=True)


@samples
def test_everything_is_written(module, label):
    sample = sample_of(module, label)
    expected = sample.run()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        assert torch.empty(1).isnan()
        poisoned = sample.run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal(poisoned, expected)


@samples
def test_inputs_stay_as_they_are(module, label):
    """Around the views that are declared as written, too."""
    sample = sample_of(module, label)
    inputs = copy.deepcopy(sample.inputs)
    before = copy.deepcopy(sample.inputs)
    for name in sample.mutates:
        before[name].zero_()
    sample.call(inputs)
    for name in sample.mutates:
        inputs[name].zero_()
    for name in sample.tensors:
        assert_equal(memory_of(inputs[name]), memory_of(before[name]))


@pytest.mark.parametrize(("module", "label"), every_sample(per_row=True))
def test_a_sample_is_the_same_alone_and_in_any_batch(module, label):
    sample = sample_of(module, label)
    batch = sample.batch
    results = sample.run()
    assert_equal(sample.run(), results)
    for rows in ([], *([i] for i in range(batch)), list(range(batch))[::-1]):
        some = sample.take(rows).run()
        assert_equal(some, tuple(out[rows] for out in results))


@samples
def test_layouts(module, label):
    """Each input in every memory layout gives the same values, those of weights and tables, too."""
    sample = sample_of(module, label)
    results, gradients = sample.run(), gradients_of(sample)
    for name, value in sample.tensors.items():
        for layout in layouts(value).values() if name != "counters" else ():  # one memory
            changed = sample.replace(**{name: layout})
            torch.testing.assert_close(changed.run(), results, equal_nan=True)
            torch.testing.assert_close(gradients_of(changed), gradients, equal_nan=True)


@samples
def test_memory_that_overlaps(module, label):
    """Each input that is only read: rows that are one, or windows of one memory."""
    sample = sample_of(module, label)
    for name, value in sample.tensors.items():
        if name in (*sample.mutates, "table") or not value.is_floating_point() or value.numel() < 2:
            continue
        memory = value.flatten()[: 1 + sum(n - 1 for n in value.shape)].clone()
        one_row = [0] * (value.dim() - 1) + [int(value.dim() > 1)]
        for strides in (one_row, [1] * value.dim()):
            overlapping = memory.as_strided(value.shape, strides)
            changed = sample.replace(**{name: overlapping})
            alone = sample.replace(**{name: overlapping.contiguous().clone()})
            torch.testing.assert_close(changed.run(), alone.run(), equal_nan=True)
            found, true = gradients_of(changed), gradients_of(alone)
            torch.testing.assert_close(found, true, equal_nan=True)
