"""diffusion_loss: the squared error against a target that is drawn again, and its gradients."""

from collections.abc import Iterator

import pytest
import torch

from cgkernels import add_noise, diffusion_loss
from cgkernels.library import OPS
from cgkernels.ops import diffusion_loss as op
from cgkernels.random import normal
from cgkernels.targets import TARGETS
from cgkernels.testing import float32_normals, plain_and_modeled
from tests.ops.test_add_noise import TARGETS_BY_DEFINITION, make_table
from tests.support import (
    FLOATS,
    KERNEL_DEVICES,
    OpCall,
    Sample,
    assert_accurate,
    assert_equal,
    assert_refused,
    kernel_results,
    kernels,
    normals,
)

LAUNCHERS = {"diffusion_loss_fwd": op._launch_fwd, "diffusion_loss_bwd": op._launch_bwd}

SHAPE = (3, 2, 5, 9)


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def sample(label, pred, x0, **inputs):
        table = make_table(dtype=dtype, device=device)
        inputs = {"pred": pred, "x0": x0, "table": table, "t": t, "seed": seed, **inputs}
        per_row = (name for name in ("pred", "x0", "t", "index", "weight") if name in inputs)
        per_row = tuple(name for name in per_row if inputs[name].dim())
        return Sample(label, diffusion_loss, inputs, ("pred", "x0"), per_row)

    def data(*shape, dtype=dtype, seed=0):
        return normals(*shape, dtype=dtype, device=device, seed=seed)

    t = torch.tensor([3, 0, 2], device=device)
    one_t = torch.tensor(2, dtype=torch.int32, device=device)
    index = torch.tensor([5, 2**40 + 1, 7], device=device)
    seed = torch.tensor(11, device=device)
    weight = torch.tensor([0.5, 2.0, -1.0], device=device)
    pred, x0 = data(*SHAPE), data(*SHAPE, seed=1)
    for target in TARGETS:
        yield sample(target, pred, x0, target=target, index=index, weight=weight)
    last = [x.contiguous(memory_format=torch.channels_last) for x in (pred, x0)]
    yield sample("channels_last", *last, target="v", index=index)
    views = data(3, 5, 5, 9)[:, 1:3], data(1, 2, 9, 5).transpose(2, 3).expand(SHAPE)
    yield sample("views", *views, target="flow", seed=3)
    other = torch.float16 if dtype == torch.float32 else torch.float32
    yield sample("network in another dtype", data(*SHAPE, dtype=other), x0, target="v")
    yield sample("vectors, one timestep", data(3, 7), data(3, 7, seed=1), t=one_t)
    yield sample("numbers", data(3), data(3, seed=1), target="v")
    yield sample("empty batch", pred[:0], x0[:0], t=t[:0], target="v")


# The definition -----------------------------------------------------------------------------------
@pytest.mark.parametrize("target", TARGETS)
def test_it_is_the_weighted_mean_of_squares(target):
    pred, x0, t = normals(3, 4, 5), normals(3, 4, 5, seed=1), torch.tensor([4, 0, 2])
    table, index, weight = make_table(), torch.tensor([9, 0, 2**33]), torch.tensor([1.0, 0.5, 3.0])
    options = {"table": table, "t": t, "seed": 7, "index": index, "target": target}
    loss = diffusion_loss(pred, x0, **options, weight=weight)
    z = normal((3, 4, 5), seed=7, index=index, step=0, stream=3)
    goal = torch.stack([
        TARGETS_BY_DEFINITION[target](x0[i], z[i], *table[t[i]]) for i in range(3)
    ])  # fmt: skip
    torch.testing.assert_close(loss, weight * (pred - goal).square().mean((1, 2)))
    torch.testing.assert_close(diffusion_loss(pred, x0, **options), loss / weight)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_the_target_of_add_noise_has_no_loss(target, dtype):
    x0, table = normals(3, 4, 5, dtype=dtype), make_table(dtype=dtype)
    options = {"table": table, "t": torch.tensor([4, 0, 2]), "seed": 7, "target": target}
    _, goal = add_noise(x0, **options)
    loss = diffusion_loss(goal, x0, **options)
    rounding = torch.finfo(dtype).eps * goal.abs().flatten(1).max(1).values.double()
    assert (loss.double() <= rounding.square()).all()
    if dtype in (torch.float32, torch.float64):
        assert_equal(loss, torch.zeros_like(loss))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_loss_is_float32(dtype):
    pred, x0 = normals(3, 4, dtype=dtype), normals(3, 4, seed=1)
    for a, b in ((pred, x0), (x0, pred), (pred, pred)):
        assert diffusion_loss(a, b, table=make_table(), t=0, seed=0).dtype == torch.float32


def test_the_loss_of_float64_is_float64():
    pred, x0 = normals(3, 4).double(), normals(3, 4, seed=1)
    table = make_table(dtype=torch.float64)
    for a, b in ((pred, x0), (x0, pred)):
        assert diffusion_loss(a, b, table=table, t=0, seed=0).dtype == torch.float64


def test_the_mean_of_no_elements_is_not_a_number():
    empty = torch.zeros(3, 0)
    assert diffusion_loss(empty, empty, table=make_table(), t=0, seed=0).isnan().all()


@pytest.mark.parametrize("target", TARGETS)
def test_gradients_are_those_of_the_plain_formula(target):
    pred, x0 = (normals(3, 4, 5, seed=i).requires_grad_() for i in range(2))
    table, t, weight = make_table(), torch.tensor([4, 0, 2]), torch.tensor([1.0, 0.5, 3.0])
    options = {"table": table, "t": t, "seed": 7, "target": target}
    loss = diffusion_loss(pred, x0, **options, weight=weight)
    alpha, sigma = table[t][:, :, None, None].unbind(1)
    z = normal((3, 4, 5), seed=7, step=0, stream=3)
    goal = TARGETS_BY_DEFINITION[target](x0, z, alpha, sigma)
    plain = weight * (pred - goal).square().mean((1, 2))
    ours, theirs = (
        torch.autograd.grad(out.square().sum(), (pred, x0), allow_unused=True)
        for out in (loss, plain)
    )
    theirs = [torch.zeros_like(x0) if g is None else g for g in theirs]
    torch.testing.assert_close(list(ours), theirs)


# What is refused ----------------------------------------------------------------------------------
X0, INT64, TABLE = normals(3, 4, 5), torch.zeros(3, dtype=torch.int64), make_table()
NAN = float("nan")

WRONG = [
    (ValueError, ("x0", "(B, ...)"), {"x0": torch.zeros(()), "pred": torch.zeros(())}),
    (TypeError, ("x0", "int64"), {"x0": X0.long()}),
    (TypeError, ("x0", "NoneType"), {"x0": None}),
    (TypeError, ("pred", "NoneType"), {"pred": None}),
    (TypeError, ("pred", "bool"), {"pred": X0.bool()}),
    (ValueError, ("pred", "(3, 4, 5)", "(3, 4, 6)"), {"pred": torch.zeros(3, 4, 6)}),
    (ValueError, ("pred", "(3, 4, 5)", "(1, 4, 5)"), {"pred": X0[:1]}),
    (ValueError, ("pred", "cpu", "meta"), {"pred": X0.to("meta")}),
    (TypeError, ("table", "NoneType"), {"table": None}),
    (TypeError, ("table", "float16"), {"table": TABLE.half()}),
    (ValueError, ("table", "(rows, 2)", "(5, 1)"), {"table": TABLE[:, :1]}),
    (ValueError, ("table", "(0, 2)"), {"table": TABLE[:0]}),
    (ValueError, ("table", "cpu", "meta"), {"table": TABLE.to("meta")}),
    (ValueError, ("table", "requires grad"), {"table": TABLE.clone().requires_grad_()}),
    (ValueError, ("t", "[0, 5)", "5"), {"t": 5}),
    (ValueError, ("t", "[0, 5)", "from -1 to 1"), {"t": torch.tensor([1, 0, -1])}),
    (ValueError, ("t", "[0, 2)"), {"t": 2, "table": TABLE[:2]}),
    (ValueError, ("t", "(3,)", "(2,)"), {"t": INT64[:2]}),
    (ValueError, ("t", "cpu", "meta"), {"t": INT64.to("meta")}),
    (TypeError, ("t", "1.0"), {"t": 1.0}),
    (TypeError, ("t", "False"), {"t": False}),
    (TypeError, ("t", "float64"), {"t": INT64.double()}),
    (TypeError, ("seed", "1.0"), {"seed": 1.0}),
    (ValueError, ("seed", "(1, 3)"), {"seed": INT64[None]}),
    (ValueError, ("seed", "cpu", "meta"), {"seed": INT64.to("meta")[0]}),
    (TypeError, ("index", "float32"), {"index": torch.zeros(3)}),
    (ValueError, ("index", "(3,)", "(3, 1)"), {"index": INT64[:, None]}),
    (ValueError, ("index", "cpu", "meta"), {"index": INT64.to("meta")}),
    (ValueError, ("target", "'noise'"), {"target": "noise"}),
    (ValueError, ("weight", "(3,)", "(1,)"), {"weight": torch.ones(1)}),
    (ValueError, ("weight", "nan"), {"weight": torch.tensor([1.0, NAN, 1.0])}),
    (ValueError, ("weight", "cpu", "meta"), {"weight": torch.ones(3, device="meta")}),
    (ValueError, ("weight", "requires grad"), {"weight": torch.ones(3, requires_grad=True)}),
    (TypeError, ("weight", "int64"), {"weight": INT64}),
    (TypeError, ("weight", "[1, 1, 1]"), {"weight": [1, 1, 1]}),
]


@pytest.mark.parametrize(("error", "words", "changed"), WRONG)
def test_wrong_arguments(error, words, changed):
    inputs = {"pred": X0, "x0": X0, "table": TABLE, "t": 1, "seed": 0}
    call = Sample("wrong", diffusion_loss, inputs)
    assert_refused(call.replace(**changed), error, *words)


# Kernels ------------------------------------------------------------------------------------------
def losses_and_gradients(pred, x0, dloss, options):
    """The loss of each row, and the gradients of pred and x0 for a gradient of each loss."""
    pred, x0 = (t.detach().clone().requires_grad_() for t in (pred, x0))
    loss = diffusion_loss(pred, x0, **options)
    return loss.detach(), *torch.autograd.grad(loss, (pred, x0), dloss)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("numel", [1, 127, 128, 129, 1023, 1024, 1025, 2 * 1024 + 7])
def test_sizes_around_a_block(numel, dtype, device):
    pred, x0 = (normals(2, numel, dtype=dtype, seed=i) for i in range(2))
    dloss, weight = torch.tensor([1.5, -0.5]), torch.tensor([2.0, 3.0])
    options = {"table": make_table(), "t": torch.tensor([3, 1]), "seed": 1, "target": "v"}

    def run(cast):
        def prepare(value):
            return cast(value) if isinstance(value, torch.Tensor) else value

        numbers = {name: prepare(value) for name, value in {**options, "weight": weight}.items()}
        return losses_and_gradients(cast(pred), cast(x0), cast(dloss), numbers)

    with kernels(device):
        actual = run(lambda t: t.to(device))
    with float32_normals():
        plain, modeled = plain_and_modeled(lambda: run(lambda t: t))
    exact = run(lambda t: t.double() if t.is_floating_point() else t)
    assert_accurate(actual, plain, exact, modeled)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 1000])
def test_partial_sums_are_merged(blocks, device):
    """Fewer, as many and more than the merging program takes at once."""
    partial, weight = normals(3, blocks).square().to(device), torch.tensor(2.0, device=device)
    loss = torch.empty(3, device=device)
    op._merge_kernel[(3,)](
        loss, partial, weight.expand(3), 0, blocks, 10 * blocks, BLOCK=256, enable_fp_fusion=True
    )
    exact = 2 * partial.cpu().double().sum(1) / (10 * blocks)
    torch.testing.assert_close(loss.cpu().double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_a_row_has_one_loss(device):
    """Alone, in a batch, permuted, in any order of the programs; its gradients, too."""
    pred, x0 = (normals(4, 3, 20, 18, device=device, seed=i) for i in range(2))
    index = torch.tensor([7, 2**35, 0, 1], device=device)
    t = torch.tensor([3, 0, 2, 1], device=device)
    dloss = torch.tensor([1.0, 2.0, 3.0, -1.0], device=device)
    table = make_table(device=device)

    def run(rows, order_seed=0):
        numbers = {"t": t[rows], "index": index[rows], "weight": dloss[rows].abs()}
        options = {"table": table, "seed": 5, "target": "flow", **numbers}
        with kernels(device, order_seed=order_seed):
            return losses_and_gradients(pred[rows], x0[rows], dloss[rows], options)

    whole = run([0, 1, 2, 3])
    for rows in ([2], [3, 2, 1, 0]):
        assert_equal(run(rows, order_seed=1), tuple(out[rows] for out in whole))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("outside", [-1, 5, 2**40])
def test_a_timestep_outside_the_table_is_not_a_number(outside, device):
    """On a GPU nobody can refuse it without waiting; it must not look like a result."""
    pred, x0 = (normals(3, 7, device=device, seed=i) for i in range(2))
    table, t = make_table(device=device), torch.tensor([1, outside, 3], device=device)
    with kernels(device):
        good = diffusion_loss(pred, x0, table=table, t=t.clamp(0, 4), seed=1)
    seed, index = torch.tensor(1, device=device), torch.arange(3, device=device)
    args = (pred, x0, table, t, seed, index, torch.ones(3, device=device), "epsilon")
    (loss,) = kernel_results(OpCall(OPS["diffusion_loss_fwd"], args))
    assert loss[1].isnan()
    assert_equal(loss[::2], good[::2])


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("name", "target"), [("pred", "v"), ("x0", "v"), ("x0", "epsilon")])
def test_what_is_no_number_stays_none(name, target, value, device):
    """In its row, and in the gradients, as in the reference."""
    inputs = {"pred": normals(3, 7), "x0": normals(3, 7, seed=1)}
    inputs[name][1, 2] = value
    dloss = torch.tensor([1.5, -0.5, 2.0])

    def run(device):
        table, t = make_table(device=device), torch.tensor([1, 2, 3], device=device)
        given = (tensor.to(device) for tensor in inputs.values())
        options = {"table": table, "t": t, "seed": 1, "target": target}
        return losses_and_gradients(*given, dloss.to(device), options)

    with float32_normals():
        plain = run("cpu")
    with kernels(device):
        found = run(device)
    assert plain[0].isfinite().tolist() == [True, False, True]
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, equal_nan=True)
