"""sample_and_kl: the sample, the divergence and its floor, their gradients, what it refuses."""

import itertools
import math
from collections.abc import Iterator
from decimal import Decimal

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from cgkernels import reference, rows, sample_and_kl
from cgkernels.ops import sample_and_kl as op
from cgkernels.random import normal
from cgkernels.testing import float32_normals, plain_and_modeled
from tests.support import (
    FLOATS,
    KERNEL_DEVICES,
    Sample,
    assert_accurate,
    assert_equal,
    assert_kernels_are_accurate,
    assert_refused,
    kernels,
    normals,
)

LAUNCHERS = {"sample_and_kl_fwd": op._launch_fwd, "sample_and_kl_bwd": op._launch_bwd}

SHAPE = (3, 2, 5, 9)
NAMES = ("mean", "log_variance", "prior_mean", "prior_log_variance")


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def sample(label, *events, **inputs):
        inputs = {**dict(zip(NAMES, events, strict=False)), "seed": seed, "step": 0, **inputs}
        events = tuple(name for name in NAMES if name in inputs)
        numbers = {n: inputs[n] for n in ("index", "step") if isinstance(inputs.get(n), Tensor)}
        per_row = (*events, *(n for n, tensor in numbers.items() if tensor.dim()))
        return Sample(label, sample_and_kl, inputs, events, per_row)

    def data(*shape, count=2, dtype=dtype):
        return [normals(*shape, dtype=dtype, device=device, seed=i) for i in range(count)]

    index = torch.tensor([5, 2**40 + 1, 7], device=device)
    step = torch.tensor([2, 0, 2**24 - 1], device=device)
    seed = torch.tensor(11, device=device)
    both = data(3, 4, 5, 9, count=1)[0]  # as a network gives them
    yield sample("standard prior, halves", *both.chunk(2, 1), index=index)
    yield sample("prior", *data(*SHAPE, count=4), index=index, step=step, free_bits=0.5)
    last = [t.contiguous(memory_format=torch.channels_last) for t in data(*SHAPE, count=4)]
    yield sample("channels_last", *last, free_bits=0.3)
    odd = [t.transpose(1, 3) for t in data(3, 9, 5, 2)]
    one = [t.expand(SHAPE) for t in data(1, *SHAPE[1:])]  # a prior that is learned
    yield sample("transposed, expanded", *odd, *one, seed=3)
    other = torch.float16 if dtype == torch.float32 else torch.float32
    mixed = [data(*SHAPE, count=1)[0], *data(*SHAPE, count=3, dtype=other)]
    yield sample("dtypes", *mixed)
    yield sample("vectors, one step", *data(3, 7), step=torch.tensor(4, device=device))
    yield sample("numbers", *data(3), free_bits=0.2)
    yield sample("empty batch", *data(0, *SHAPE[1:], count=4))


# The definition -----------------------------------------------------------------------------------
def drawn(*shape, count=4):
    return [normals(*shape, seed=i) for i in range(count)]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_it_is_a_sample_of_the_gaussian(dtype):
    mean, log_variance = (t.to(dtype) for t in drawn(3, 4, 50, count=2))
    index, step = torch.tensor([9, 0, 2**33]), torch.tensor([1, 0, 3])
    z, _ = sample_and_kl(mean, log_variance, seed=7, index=index, step=step)
    assert z.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    noise = normal((3, 4, 50), seed=7, index=index, step=step, stream=6, dtype=wide)
    expected = mean.to(wide) + (log_variance.to(wide) / 2).exp() * noise
    assert_equal(z, expected.to(dtype))


@pytest.mark.parametrize("learned", [False, True])
def test_the_divergence_is_that_of_torch_distributions(learned):
    mean, log_variance, prior_mean, prior_log_variance = (t.double() for t in drawn(3, 4, 5))
    prior = {"prior_mean": prior_mean, "prior_log_variance": prior_log_variance} if learned else {}
    _, kl = sample_and_kl(mean, log_variance, **prior, seed=7, step=0)
    q = Normal(mean, (log_variance / 2).exp())
    p = Normal(prior_mean, (prior_log_variance / 2).exp()) if learned else Normal(0.0, 1.0)
    each = kl_divergence(q, p)
    torch.testing.assert_close(kl, each.sum((1, 2)))
    _, floored = sample_and_kl(mean, log_variance, **prior, seed=7, step=0, free_bits=0.7)
    torch.testing.assert_close(floored, each.clamp(min=0.7).sum((1, 2)))
    assert (floored > kl).all()


def test_the_divergence_is_what_samples_say():
    """E ln q(z) - ln p(z): sample and divergence are of one and the same Gaussian."""
    mean, log_variance = torch.tensor([[0.8]]), torch.tensor([[-1.0]])
    many = 200_000
    z, kl = sample_and_kl(
        mean.expand(many, 1), log_variance.expand(many, 1), seed=1, index=torch.arange(many), step=0
    )
    ratio = Normal(mean, (log_variance / 2).exp()).log_prob(z) - Normal(0.0, 1.0).log_prob(z)
    assert abs(ratio.mean() - kl[0]) < 5 * ratio.std() / math.sqrt(many)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_divergence_is_float32(dtype):
    mean, log_variance = normals(3, 4, dtype=dtype), normals(3, 4)
    for a, b in ((mean, log_variance), (log_variance, mean), (mean, mean)):
        z, kl = sample_and_kl(a, b, seed=0, step=0)
        assert z.dtype == a.dtype and kl.dtype == torch.float32
    assert (
        sample_and_kl(log_variance, log_variance.double(), seed=0, step=0)[1].dtype == torch.float64
    )


def test_nothing_diverges_from_nothing():
    z, kl = sample_and_kl(torch.zeros(3, 0), torch.zeros(3, 0), seed=0, step=0, free_bits=1.0)
    assert z.shape == (3, 0)
    assert_equal(kl, torch.zeros(3))


@pytest.mark.parametrize("free_bits", [0.0, 0.7])
def test_gradients_are_those_of_the_plain_formula(free_bits):
    inputs = [t.double().requires_grad_() for t in drawn(3, 4, 5)]
    mean, log_variance, prior_mean, prior_log_variance = inputs
    z, kl = sample_and_kl(
        mean, log_variance, prior_mean=prior_mean, prior_log_variance=prior_log_variance,
        seed=7, step=0, free_bits=free_bits,
    )  # fmt: skip
    noise = normal((3, 4, 5), seed=7, step=0, stream=6, dtype=torch.float64)
    std, prior_std = (log_variance / 2).exp(), (prior_log_variance / 2).exp()
    each = kl_divergence(Normal(mean, std), Normal(prior_mean, prior_std))
    plain = mean + std * noise, each.clamp(min=free_bits).sum((1, 2))
    ours, theirs = (
        torch.autograd.grad(a.pow(3).sum() + b.square().sum(), inputs) for a, b in ((z, kl), plain)
    )
    torch.testing.assert_close(list(ours), list(theirs))


def test_below_the_floor_only_the_sample_has_a_gradient():
    mean, log_variance = (t.requires_grad_() for t in drawn(3, 4, count=2))
    z, kl = sample_and_kl(mean, log_variance, seed=7, step=0, free_bits=100.0)
    assert_equal(kl, torch.full((3,), 400.0))
    of_kl = torch.autograd.grad(kl.sum(), (mean, log_variance), retain_graph=True)
    assert all((g == 0).all() for g in of_kl)
    assert_equal(torch.autograd.grad(z.sum(), mean)[0], torch.ones(3, 4))


def test_near_the_prior_the_divergence_keeps_its_digits():
    check_near_the_prior("cpu")
    with reference():
        check_near_the_prior("cpu")


def check_near_the_prior(device):
    """64 latents with one divergence each, and what it is in 60 digits; and so its gradients.

    Of r = log_variance - prior_log_variance it is (e^r - 1 - r) / 2 + distance^2 / 2, of which
    float32 has no digits left if it is computed like that.
    """
    for r, distance, prior in itertools.product((-1e-3, 1e-5, 0.03, -0.9, 2.5), (0, 1e-3), (0, 2)):
        prior = torch.full((1, 64), float(prior))
        tensors = [torch.full((1, 64), float(distance)), prior + r, torch.zeros(1, 64), prior]
        exact_r = Decimal(tensors[1][0, 0].item()) - Decimal(prior[0, 0].item())
        precision, offset = (-Decimal(prior[0, 0].item())).exp(), Decimal(tensors[0][0, 0].item())
        kl = 32 * (exact_r.exp() - 1 - exact_r + offset * offset * precision)
        pull = offset * precision
        gradients = [pull, (exact_r.exp() - 1) / 2, -pull]
        gradients.append(-((exact_r.exp() - 1) + pull * offset) / 2)
        for learned in (False, True) if prior[0, 0] == 0 else (True,):
            names = NAMES if learned else NAMES[:2]
            inputs = {
                n: t.to(device).requires_grad_() for n, t in zip(names, tensors, strict=False)
            }
            _, found = sample_and_kl(**inputs, seed=0, step=0)
            assert found.item() == pytest.approx(float(kl), rel=2e-6, abs=0)
            slopes = torch.autograd.grad(found.sum(), tuple(inputs.values()))
            for slope, exact in zip(slopes, gradients, strict=False):
                exact = torch.full((1, 64), float(exact), dtype=torch.float64)
                torch.testing.assert_close(slope.cpu().double(), exact, rtol=1e-6, atol=1e-30)


def test_at_the_prior_nothing_diverges_and_no_floor_hides_a_gradient():
    log_variance = torch.linspace(-1e-3, 1e-3, 1001)[:, None].requires_grad_()
    _, kl = sample_and_kl(torch.zeros(1001, 1), log_variance, seed=0, step=0)
    assert (kl >= 0).all()
    (gradient,) = torch.autograd.grad(kl.sum(), log_variance)
    exact = log_variance.detach().double().expm1() / 2
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-6, atol=0)
    # A floor that lies between the divergences of two neighbors, 1e-7 of it apart.
    floor = (kl[0] + kl[1]).item() / 2
    _, floored = sample_and_kl(torch.zeros(1001, 1), log_variance, seed=0, step=0, free_bits=floor)
    assert (floored[0] == kl[0]) and floored[1] == torch.tensor(floor)


# What is refused ----------------------------------------------------------------------------------
X, INT64 = normals(3, 4, 5), torch.zeros(3, dtype=torch.int64)
PRIOR = {"prior_mean": X, "prior_log_variance": X}

WRONG = [
    (ValueError, ("mean", "(B, ...)"), {"mean": torch.zeros(())}),
    (TypeError, ("mean", "int64"), {"mean": X.long()}),
    (TypeError, ("mean", "NoneType"), {"mean": None}),
    (ValueError, ("log_variance", "(3, 4, 5)", "(3, 4)"), {"log_variance": X[..., 0]}),
    (ValueError, ("log_variance", "cpu", "meta"), {"log_variance": X.to("meta")}),
    (TypeError, ("log_variance", "float"), {"log_variance": 0.0}),
    (ValueError, ("prior_log_variance", "prior_mean"), {"prior_mean": X}),
    (ValueError, ("prior_mean", "prior_log_variance"), {"prior_log_variance": X}),
    (ValueError, ("prior_mean", "(1, 4, 5)"), {**PRIOR, "prior_mean": X[:1]}),
    (TypeError, ("prior_log_variance", "bool"), {**PRIOR, "prior_log_variance": X.bool()}),
    (ValueError, ("prior_mean", "cpu", "meta"), {**PRIOR, "prior_mean": X.to("meta")}),
    (TypeError, ("free_bits", "None"), {"free_bits": None}),
    (TypeError, ("free_bits", "True"), {"free_bits": True}),
    (ValueError, ("free_bits", "-0.1"), {"free_bits": -0.1}),
    (ValueError, ("free_bits", "inf"), {"free_bits": math.inf}),
    (ValueError, ("free_bits", "nan"), {"free_bits": math.nan}),
    (ValueError, ("step", "[0, 16777216)", "16777216"), {"step": 2**24}),
    (ValueError, ("step", "(3,)", "(2,)"), {"step": INT64[:2]}),
    (TypeError, ("step", "0.5"), {"step": 0.5}),
    (TypeError, ("seed", "None"), {"seed": None}),
    (ValueError, ("seed", "(3,)"), {"seed": INT64}),
    (TypeError, ("index", "int32"), {"index": INT64.int()}),
    (ValueError, ("index", "(3,)", "(4,)"), {"index": torch.arange(4)}),
    (ValueError, ("index", "cpu", "meta"), {"index": INT64.to("meta")}),
]


@pytest.mark.parametrize(("error", "words", "changed"), WRONG)
def test_wrong_arguments(error, words, changed):
    call = Sample("wrong", sample_and_kl, {"mean": X, "log_variance": X, "seed": 0, "step": 0})
    assert_refused(call.replace(**changed), error, *words)


# Kernels ------------------------------------------------------------------------------------------
def results_and_gradients(inputs, dz, dkl, **options):
    """z and kl, and the gradients of all inputs for gradients of these."""
    inputs = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    z, kl = sample_and_kl(**inputs, **options)
    gradients = torch.autograd.grad((z, kl), tuple(inputs.values()), (dz, dkl))
    return z.detach(), kl.detach(), *gradients


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("numel", [1, 127, 129, 1024, 1025, 2 * 1024 + 7])
def test_sizes_around_a_block(numel, dtype, device):
    inputs = {name: normals(2, numel, dtype=dtype, seed=i) for i, name in enumerate(NAMES)}
    inputs = inputs if numel % 2 else dict(list(inputs.items())[:2])
    dz, dkl = normals(2, numel, dtype=dtype, seed=9), torch.tensor([1.5, -0.5])

    def run(cast):
        given = {name: cast(t) for name, t in inputs.items()}
        return results_and_gradients(given, cast(dz), cast(dkl), seed=1, step=3, free_bits=0.4)

    with kernels(device):
        actual = run(lambda t: t.to(device))
    with float32_normals():
        plain, modeled = plain_and_modeled(lambda: run(lambda t: t))
    assert_accurate(actual, plain, run(torch.Tensor.double), modeled)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("blocks", [15, 17])
def test_partial_sums_are_merged(blocks, device, monkeypatch):
    """Fewer and more than the last program takes at once."""
    monkeypatch.setattr(rows, "row_block", lambda numel, dense: {"BLOCK": 16, "num_warps": 1})
    mean, log_variance = (normals(2, 16 * blocks, device=device, seed=i) for i in range(2))
    inputs = {"mean": mean, "log_variance": log_variance, "seed": 1, "step": 0}
    assert_kernels_are_accurate(Sample("", sample_and_kl, inputs), device)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_a_row_has_one_result(device):
    """Alone, in a batch, permuted, in any order of the programs; its gradients, too."""
    inputs = {name: normals(4, 3, 20, 18, device=device, seed=i) for i, name in enumerate(NAMES)}
    dz = normals(4, 3, 20, 18, device=device, seed=8)
    index = torch.tensor([7, 2**35, 0, 1], device=device)
    step = torch.tensor([3, 0, 2, 1], device=device)
    dkl = torch.tensor([1.0, 2.0, 3.0, -1.0], device=device)

    def run(some, order_seed=0):
        given = {name: t[some] for name, t in inputs.items()}
        options = {"index": index[some], "step": step[some], "seed": 5, "free_bits": 0.2}
        with kernels(device, order_seed=order_seed):
            return results_and_gradients(given, dz[some], dkl[some], **options)

    whole = run([0, 1, 2, 3])
    for some in ([2], [3, 2, 1, 0]):
        assert_equal(run(some, order_seed=1), tuple(out[some] for out in whole))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_near_the_prior_a_kernel_keeps_the_digits(device):
    with kernels(device):
        check_near_the_prior(device)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_number_stays_none(name, value, device):
    """In its row, as it is in the reference: a floor must not hide it, nor a gradient of zero."""
    inputs = {n: normals(3, 7, seed=i) for i, n in enumerate(NAMES)}
    inputs[name][1, 2] = value
    dz, dkl = normals(3, 7, seed=9), torch.tensor([1.0, 2.0, -1.0])

    def run(device):
        given = {n: t.to(device) for n, t in inputs.items()}
        return results_and_gradients(
            given, dz.to(device), dkl.to(device), seed=0, step=0, free_bits=0.5
        )  # fmt: skip

    with float32_normals():
        plain = run("cpu")
    with kernels(device):
        found = run(device)
    assert not plain[1][1].isfinite() and plain[1][::2].isfinite().all()
    for ours, theirs in zip(found, plain, strict=True):
        assert_equal(ours.cpu().isnan(), theirs.isnan())
        torch.testing.assert_close(ours.cpu(), theirs, equal_nan=True)
