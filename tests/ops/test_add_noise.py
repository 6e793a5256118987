"""add_noise: noisy samples and their targets, exact at small noise in every dtype."""

import math
from collections.abc import Iterator

import pytest
import torch

from cgkernels import add_noise, diffusion_loss
from cgkernels.library import OPS
from cgkernels.ops import add_noise as op
from cgkernels.random import normal
from cgkernels.targets import TARGETS
from tests.support import (
    FLOATS,
    HALVES,
    KERNEL_DEVICES,
    OpCall,
    Sample,
    assert_equal,
    assert_kernels_are_accurate,
    assert_refused,
    kernel_results,
    kernels,
    normals,
)

LAUNCHERS = {"add_noise_fwd": op._launch_fwd, "add_noise_bwd": op._launch_bwd}

SHAPE = (3, 2, 5, 9)


def make_table(*, dtype=torch.float32, device="cpu"):
    """(alpha, sigma) of five timesteps; not on the circle, so that the two are not mistaken."""
    alpha = torch.tensor([0.999, 0.9, 0.6, 0.25, 0.0], dtype=torch.float64)
    sigma = torch.tensor([0.01, 0.3, 0.8, 0.95, 1.0], dtype=torch.float64)
    table = torch.stack([alpha, sigma], 1)
    return table.to(device, torch.float64 if dtype == torch.float64 else torch.float32)


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def sample(label, x0, **inputs):
        table = make_table(dtype=dtype, device=device)
        inputs = {"x0": x0, "table": table, "t": t, "seed": seed, **inputs}
        per_row = ("x0", *(name for name in ("t", "index") if name in inputs))
        per_row = tuple(name for name in per_row if inputs[name].dim())
        return Sample(label, add_noise, inputs, ("x0",), per_row)

    def data(*shape):
        return normals(*shape, dtype=dtype, device=device)

    t = torch.tensor([3, 0, 2], device=device)
    one_t = torch.tensor(2, dtype=torch.int32, device=device)
    index = torch.tensor([5, 2**40 + 1, 7], device=device)
    seed = torch.tensor(11, device=device)
    x0 = data(*SHAPE)
    for target in TARGETS:
        yield sample(target, x0, target=target, index=index)
    last = x0.contiguous(memory_format=torch.channels_last)
    yield sample("channels_last", last, target="v", index=index)
    yield sample("transposed", data(3, 5, 2, 9).transpose(1, 2), target="flow", seed=3)
    yield sample("sliced", data(3, 5, 5, 9)[:, 1:3], target="v", seed=3)
    yield sample("expanded", data(1, *SHAPE[1:]).expand(SHAPE), target="flow", seed=3)
    yield sample("vectors, one timestep", data(3, 7), t=one_t)
    yield sample("numbers", data(3), target="v")
    yield sample("empty batch", data(0, *SHAPE[1:]), t=t[:0], target="v")


# The definition -----------------------------------------------------------------------------------
def linear_schedule():
    """(1000, 2) alpha and sigma of the linear betas of DDPM (arXiv:2006.11239), in float64."""
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    return torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()], 1)


def cosine_schedule():
    """(1000, 2) alpha and sigma of the cosine schedule (arXiv:2102.09672), in float64."""
    u = (torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008
    bar = (u * math.pi / 2).cos().square()
    alpha_bar = (1 - (1 - bar[1:] / bar[:-1]).clamp(max=0.999)).cumprod(0)
    return torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()], 1)


SCHEDULES = {"linear": linear_schedule, "cosine": cosine_schedule}

TARGETS_BY_DEFINITION = {
    "epsilon": lambda x0, z, alpha, sigma: z,
    "x0": lambda x0, z, alpha, sigma: x0,
    "v": lambda x0, z, alpha, sigma: alpha * z - sigma * x0,
    "flow": lambda x0, z, alpha, sigma: z - x0,
}


@pytest.mark.parametrize("target", TARGETS)
def test_each_row_has_its_own_timestep_and_noise(target):
    x0, t, index = normals(3, 4, 5), torch.tensor([4, 0, 2]), torch.tensor([9, 0, 2**33])
    table = make_table()
    x_t, goal = add_noise(x0, table=table, t=t, seed=7, index=index, target=target)
    z = normal((3, 4, 5), seed=7, index=index, step=0, stream=3)
    for i in range(3):
        alpha, sigma = table[t[i]]
        torch.testing.assert_close(x_t[i], alpha * x0[i] + sigma * z[i])
        expected = TARGETS_BY_DEFINITION[target](x0[i], z[i], alpha, sigma)
        torch.testing.assert_close(goal[i], expected)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_the_target_is_that_of_the_noise_in_x_t(dtype):
    """The noise is drawn in x0's precision once, so that both are rounded from the same sum."""
    x0, table, t = normals(3, 4, 50, dtype=dtype), make_table(dtype=dtype), torch.tensor([3, 0, 2])
    x_t, z = add_noise(x0, table=table, t=t, seed=7)
    assert x_t.dtype == z.dtype == dtype
    exact = normal(
        (3, 4, 50), seed=7, step=0, stream=3, dtype=torch.promote_types(dtype, torch.float32)
    )
    assert_equal(z, exact.to(dtype))
    alpha, sigma = table[t][:, :, None, None].unbind(1)
    assert_equal(x_t, (alpha * x0 + sigma * exact).to(dtype))
    for target, define in TARGETS_BY_DEFINITION.items():
        _, goal = add_noise(x0, table=table, t=t, seed=7, target=target)
        expected = define(x0.to(exact.dtype), exact, alpha, sigma).to(dtype)
        torch.testing.assert_close(goal, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_shared_timestep_is_one_for_each_row(dtype):
    x0, table = normals(3, 4, 5), make_table()
    expected = add_noise(x0, table=table, t=torch.full((3,), 2), seed=7)
    for t in (2, torch.tensor(2, dtype=dtype), torch.full((3,), 2, dtype=dtype)):
        assert_equal(add_noise(x0, table=table, t=t, seed=7), expected)


def test_seeds_and_numbers_of_samples():
    x0, table = torch.zeros(2, 8), make_table()
    _, z = add_noise(x0, table=table, t=1, seed=7)
    assert_equal(add_noise(x0, table=table, t=3, seed=torch.tensor([7]))[1], z)
    assert_equal(add_noise(x0, table=table, t=1, seed=7, index=torch.tensor([1, 0]))[1], z.flip(0))
    assert not torch.equal(add_noise(x0, table=table, t=1, seed=8)[1], z)


# Small noise --------------------------------------------------------------------------------------
def noise_scales(x0, t, schedule, device):
    """The standard deviation that x_t - alpha x0 has along the noise drawn, over sigma.

    The slope of x_t - alpha x0 on z: rounding x_t adds noise of its own, which is no scale. Against
    the z that was drawn rather than against 1: what is left is the op, not the draw.
    """
    table = schedule.float().to(device)
    x_t, _ = add_noise(x0, table=table, t=t, seed=1, index=torch.zeros_like(t))
    z = normal((1, *x0.shape[1:]), seed=1, step=0, stream=3).double()
    alpha, sigma = schedule[t.cpu()].unbind(1)
    noise = x_t.cpu().double() - alpha[:, None] * x0.cpu().double()
    return (noise * z).sum(1) / z.square().sum() / sigma


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_noise_has_the_right_scale_at_every_timestep(device, dtype, schedule):
    """Within 0.5 % in half types, where sums and coefficients in half types miss it at small t."""
    schedule = SCHEDULES[schedule]()
    for low, high, numel in ((0, 20, 2**16), (20, 1000, 2**12)):
        t = torch.arange(low, high, device=device)
        for x0 in (torch.zeros(len(t), numel), normals(len(t), numel).clamp(-1, 1)):
            scales = noise_scales(x0.to(device, dtype), t, schedule, device)
            assert (scales - 1).abs().max() < 0.005


# What is refused ----------------------------------------------------------------------------------
X0, INT64, TABLE = normals(3, 4, 5), torch.zeros(3, dtype=torch.int64), make_table()

WRONG = [
    (ValueError, ("x0", "(B, ...)"), {"x0": torch.zeros(())}),
    (TypeError, ("x0", "int64"), {"x0": X0.long()}),
    (TypeError, ("x0", "NoneType"), {"x0": None}),
    (TypeError, ("x0", "list"), {"x0": [1.0]}),
    (TypeError, ("table", "NoneType"), {"table": None}),
    (TypeError, ("table", "bfloat16"), {"table": TABLE.bfloat16()}),
    (ValueError, ("table", "(rows, 2)", "(5, 3)"), {"table": torch.zeros(5, 3)}),
    (ValueError, ("table", "(rows, 2)", "(2,)"), {"table": torch.zeros(2)}),
    (ValueError, ("table", "(0, 2)"), {"table": TABLE[:0]}),
    (ValueError, ("table", "cpu", "meta"), {"table": TABLE.to("meta")}),
    (ValueError, ("table", "requires grad"), {"table": TABLE.clone().requires_grad_()}),
    (ValueError, ("t", "[0, 5)", "5"), {"t": 5}),
    (ValueError, ("t", "[0, 5)", "-1"), {"t": -1}),
    (ValueError, ("t", "[0, 5)", "from 0 to 5"), {"t": torch.tensor([5, 0, 1])}),
    (ValueError, ("t", "[0, 3)", "from 4 to 4"), {"t": INT64 + 4, "table": TABLE[:3]}),
    (ValueError, ("t", "(3,)", "(2,)"), {"t": INT64[:2]}),
    (ValueError, ("t", "(3,)", "(3, 1)"), {"t": INT64[:, None]}),
    (ValueError, ("t", "cpu", "meta"), {"t": INT64.to("meta")}),
    (TypeError, ("t", "0.5"), {"t": 0.5}),
    (TypeError, ("t", "True"), {"t": True}),
    (TypeError, ("t", "float32"), {"t": torch.zeros(3)}),
    (TypeError, ("t", "None"), {"t": None}),
    (TypeError, ("seed", "None"), {"seed": None}),
    (TypeError, ("seed", "False"), {"seed": False}),
    (ValueError, ("seed", "(3,)"), {"seed": INT64}),
    (ValueError, ("seed", "cpu", "meta"), {"seed": INT64.to("meta")[0]}),
    (TypeError, ("index", "int32"), {"index": INT64.int()}),
    (TypeError, ("index", "range"), {"index": range(3)}),
    (ValueError, ("index", "(3,)", "(4,)"), {"index": torch.arange(4)}),
    (ValueError, ("index", "cpu", "meta"), {"index": INT64.to("meta")}),
    (ValueError, ("target", "epsilon, x0, v, flow", "'eps'"), {"target": "eps"}),
    (ValueError, ("target", "None"), {"target": None}),
]


@pytest.mark.parametrize(("error", "words", "changed"), WRONG)
def test_wrong_arguments(error, words, changed):
    call = Sample("wrong", add_noise, {"x0": X0, "table": TABLE, "t": 1, "seed": 0})
    assert_refused(call.replace(**changed), error, *words)


# Kernels ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("numel", [1, 127, 128, 129, 1023, 1024, 1025, 2 * 1024 + 7])
def test_sizes_around_a_block(numel, dtype, device):
    t = torch.tensor([3, 0], device=device)
    inputs = {"x0": normals(2, numel, dtype=dtype, device=device), "t": t, "seed": 1}
    inputs["table"] = make_table(device=device)
    for target in ("v", "flow"):
        assert_kernels_are_accurate(Sample("", add_noise, {**inputs, "target": target}), device)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_a_sample_has_one_noise(device):
    """Alone, in a batch, permuted, in any memory format, in any order of the programs."""
    index = torch.tensor([7, 2**35, 0, 1], device=device)
    t = torch.tensor([3, 0, 2, 1], device=device)
    x0, table = normals(4, 3, 20, 18, device=device), make_table(device=device)

    def run(rows, order_seed=0, format=torch.contiguous_format):
        some = x0[rows].contiguous(memory_format=format)
        with kernels(device, order_seed=order_seed):
            return add_noise(some, table=table, t=t[rows], index=index[rows], seed=5)

    x_t, z = run([0, 1, 2, 3])
    for rows in ([2], [3, 2, 1, 0]):
        assert_equal(run(rows, order_seed=1), (x_t[rows], z[rows]))
    assert_equal(run([2, 1], format=torch.channels_last)[1], z[[2, 1]])


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("outside", [-1, 5, 2**40])
def test_a_timestep_outside_the_table_is_not_a_number(outside, device):
    """On a GPU nobody can refuse it without waiting; it must not look like a result."""
    x0, table = normals(3, 7, device=device), make_table(device=device)
    t = torch.tensor([1, outside, 3], device=device)
    with kernels(device):
        good = add_noise(x0, table=table, t=t.clamp(0, 4), seed=1)
    seed, index = torch.tensor(1, device=device), torch.arange(3, device=device)
    results = kernel_results(OpCall(OPS["add_noise_fwd"], (x0, table, t, seed, index, "epsilon")))
    assert results[0][1].isnan().all()
    assert_equal([out[::2] for out in results[:1]], [out[::2] for out in good[:1]])


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_draws_the_noise_of_x_t(target, device):
    """To the bit; where the target is a sum, another contraction of it may differ in the last."""
    x0, table = normals(3, 2, 30, device=device), make_table(device=device)
    t = torch.tensor([1, 4, 3], device=device)
    options = {"table": table, "t": t, "seed": 5, "target": target}
    with kernels(device):
        _, goal = add_noise(x0, **options)
        loss = diffusion_loss(goal, x0, **options)
        assert (diffusion_loss(goal + 1, x0, **options) - 1).abs().max() < 1e-5
    assert loss.max() <= (0 if target in ("epsilon", "x0") else 1e-12)
