"""The noise contract: known answers, distribution, independence, and the kernels' version of it."""

import functools
import itertools
import math

import pytest
import torch

from cgkernels import random
from cgkernels._triton import tl, triton
from cgkernels.device import exp_of, exponential_block, exponential_of, four_normals, philox_words
from cgkernels.random import exponential, normal, philox4x32, uniform
from tests.support import KERNEL_DEVICES, assert_equal, in_ulp, normal_of

# Random123's kat_vectors: counter, key, words of philox4x32 with 10 rounds.
KNOWN_ANSWERS = {
    "zero": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}

MANY = 2**22
DOUBLE = torch.float64


def integers(*values):
    return torch.tensor(values, dtype=torch.int64)


def contract_words(quads, *, seed=0, index=(0,), step=0, stream=0):
    """(rows, quads, 4) words of the contract."""
    rows = len(index)
    steps = torch.full((rows,), step)
    words = random.words(
        quads, seed=torch.tensor(seed), index=integers(*index), step=steps, stream=stream
    )
    return torch.stack(words, -1)


# Words --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_known_answers_of_random123(name):
    counter, key, expected = KNOWN_ANSWERS[name]
    words = philox4x32(tuple(map(integers, counter)), tuple(map(integers, key)))
    assert [int(w) for w in words] == list(expected)


@pytest.mark.parametrize("seed", [3, -(2**62) + 12345])
@pytest.mark.parametrize("index", [0, 2**40 * 3 + 7, -5])
def test_the_counter_is_that_of_the_contract(seed, index):
    element, step, stream = torch.arange(21), 2**24 - 2, 200
    z = normal((1, 21), seed=seed, index=integers(index), step=step, stream=stream, dtype=DOUBLE)
    assert_equal(z[0], normal_of(element, seed=seed, index=index, step=step, stream=stream))


def test_normals_of_the_contract_never_change():
    """Written down once: saved seeds must give the same images in every later version."""
    z = normal((2, 5), seed=2026, index=integers(3, 2**32 + 3), step=9, stream=1, dtype=DOUBLE)
    expected = [
        [-1.5589512676778678, -1.1830922400030317, 0.8353035691360128, 0.6933915406743729,
         -1.2557653764560064],
        [-0.18175648777437334, -0.03790097741950315, -0.037536158561527914, 1.2919237445781244,
         1.2735033844046426],
    ]  # fmt: skip
    torch.testing.assert_close(z, torch.tensor(expected, dtype=DOUBLE), rtol=1e-14, atol=0)


def test_no_two_numbers_share_a_counter():
    """Every (seed, index, step, stream, element) of a small grid has words of its own."""
    index = (0, 1, 2, 2**32, 2**32 + 1)
    words = torch.cat(
        [
            contract_words(9, seed=seed, index=index, step=step, stream=stream)
            for seed in (0, 1, 2**32, -1)
            for step in (0, 1, 2, 2**24 - 1)
            for stream in range(8)
        ]
    ).flatten(0, 1)
    assert len(words.unique(dim=0)) == len(words) == 4 * 4 * 8 * 5 * 9


@pytest.mark.parametrize("stream", [0, 1, 254])
def test_the_last_step_does_not_run_into_the_next_stream(stream):
    last, first = 2**24 - 1, 0
    with pytest.raises(ValueError, match=r"step must be in \[0, 16777216\), got 16777216"):
        normal((1, 4), seed=0, step=2**24, stream=stream)
    assert not torch.equal(
        normal((1, 4), seed=0, step=last, stream=stream),
        normal((1, 4), seed=0, step=first, stream=stream + 1),
    )


@pytest.mark.parametrize(
    ("seed", "same"), [(-1, 2**64 - 1), (-(2**63), 2**63), (5, torch.tensor([5]))]
)
def test_seeds_are_64_bits_however_written(seed, same):
    shape = (2, 6)
    assert_equal(
        normal(shape, seed=seed, step=0, stream=0), normal(shape, seed=same, step=0, stream=0)
    )


def test_every_bit_of_seed_and_index_counts():
    def first(seed, index):
        return normal((1, 1), seed=seed, index=integers(index), step=0, stream=0).item()

    seeds = {first(2**bit, 0) for bit in range(64)}
    # The sign bit by its negative value: 2^63 is no int64.
    indices = {first(0, 2**bit if bit < 63 else -(2**63)) for bit in range(64)}
    assert len(seeds | indices) == 128


# Distribution -------------------------------------------------------------------------------------
@functools.cache
def many_normals(seed=0):
    """2^22 normals of 64 samples, in float64; not to be written to."""
    return normal((64, MANY // 64), seed=seed, step=0, stream=0, dtype=torch.float64)


def assert_standard_score(value, limit=4.5):
    """A statistic that is standard normal under the null hypothesis."""
    assert abs(float(value)) < limit


def test_moments():
    z = many_normals().flatten()
    n = len(z)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert_standard_score((z.pow(power).mean() - mean) / math.sqrt(variance / n))


def test_kolmogorov_smirnov():
    u = torch.special.ndtr(many_normals().flatten()).sort().values
    n = len(u)
    grid = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((grid[1:] - u).max(), (u - grid[:-1]).max())
    assert distance * math.sqrt(n) < 1.95  # p = 0.001


def test_chi_square_of_equiprobable_bins():
    bins = 256
    u = torch.special.ndtr(many_normals().flatten())
    counts = (u * bins).long().bincount(minlength=bins)
    expected = MANY / bins
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert_standard_score((chi_square - (bins - 1)) / math.sqrt(2 * (bins - 1)))


def test_tails():
    """Counts beyond 3, 4 and 5 in 2^24 draws."""
    magnitudes = [
        normal((64, MANY // 64), seed=seed, step=0, stream=0).abs() for seed in range(4)
    ]  # float32 halves the time
    for limit in (3.0, 4.0, 5.0):
        count = sum(int((m > limit).sum()) for m in magnitudes)
        expected = 4 * MANY * math.erfc(limit / math.sqrt(2))
        assert_standard_score((count - expected) / math.sqrt(expected))


def test_tails_are_not_cut():
    """Beyond 5.678, where Triton's own normals end: a draw found by a search of 1.3e9."""
    z = normal((1, 1024), seed=0, index=integers(854929), step=0, stream=0)
    assert z[0, 957] == z.max() > 6.34
    smallest, straight = integers(0), integers(0)
    assert random._box_muller(smallest, straight)[0].item() == pytest.approx(
        math.sqrt(66 * math.log(2)), rel=1e-9
    )


def test_uniforms():
    u = uniform((64, 2**14), seed=0, step=0, stream=4, dtype=torch.float64)
    n = u.numel()
    assert_standard_score((u.mean() - 0.5) / math.sqrt(1 / 12 / n))
    assert_standard_score((u.square().mean() - 1 / 3) / math.sqrt(4 / 45 / n))
    counts = (u * 256).long().flatten().bincount(minlength=256)
    chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert_standard_score((chi_square - 255) / math.sqrt(2 * 255))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_uniforms_are_inside_0_and_1(dtype, monkeypatch):
    u = uniform((4, 2**16), seed=0, step=0, stream=4, dtype=dtype)
    assert u.dtype == dtype and ((u > 0) & (u < 1)).all()
    edges = tuple(integers(w).expand(1, 1) for w in (0, 1, 2**32 - 2, 2**32 - 1))
    monkeypatch.setattr(random, "words", lambda *args, **kwargs: edges)
    u = uniform((1, 4), seed=0, step=0, stream=4, dtype=dtype)
    assert ((u > 0) & (u < 1)).all()


# Independence -------------------------------------------------------------------------------------
def assert_uncorrelated(rows, limit=5.5):
    """All pairs of rows, their values and their squares; about 2,000 pairs."""
    for x in (rows, rows.square()):
        x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
        scores = (x @ x.T) / math.sqrt(x.shape[1])
        assert_standard_score(scores.fill_diagonal_(0).abs().max(), limit)


def test_elements_are_independent():
    z = many_normals()[0].clone()
    for x in (z, (z.square() - 1) / math.sqrt(2)):
        for lag in range(1, 65):
            products = x[:-lag] * x[lag:]
            assert_standard_score(products.sum() / math.sqrt(len(products)), 5)


def test_the_two_normals_of_a_pair_are_independent():
    cos, sin = many_normals().flatten().unflatten(0, (-1, 2)).unbind(1)
    n = len(cos)
    squares = (cos.square() - 1) * (sin.square() - 1) / 2
    for products in (cos * sin, squares, cos * squares, (cos * sin).sign()):
        scale = products.square().mean().sqrt()
        assert_standard_score(products.sum() / (scale * math.sqrt(n)))
    radius = (cos.square() + sin.square()) / 2  # exponential
    assert_standard_score((radius.mean() - 1) * math.sqrt(n))


def test_samples_are_independent():
    near = integers(*range(32), *(2**32 * draw for draw in range(1, 33)))
    assert_uncorrelated(normal((64, 4096), seed=0, index=near, step=0, stream=0))


def test_steps_are_independent():
    rows = normal((64, 4096), seed=0, index=torch.full((64,), 5), step=torch.arange(64), stream=1)
    assert_uncorrelated(rows)


def test_streams_and_seeds_are_independent():
    streams = [normal((1, 4096), seed=0, step=0, stream=stream) for stream in range(32)]
    seeds = [normal((1, 4096), seed=seed, step=0, stream=0) for seed in range(1, 33)]
    assert_uncorrelated(torch.cat(streams + seeds))


# Shapes and dtypes --------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (3,), (2, 1), (2, 5), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("draw", [normal, uniform])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shapes_and_dtypes(draw, shape, dtype):
    out = draw(shape, seed=1, step=0, stream=2, dtype=dtype)
    assert out.shape == shape and out.dtype == dtype and out.is_contiguous()
    wide = draw(shape, seed=1, step=0, stream=2, dtype=torch.float64)
    torch.testing.assert_close(out.double(), wide, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_elements_count_in_logical_order():
    """The first elements are the same in every event that has them."""
    assert_equal(
        normal((2, 3, 4), seed=0, step=0, stream=0).flatten(1),
        normal((2, 14), seed=0, step=0, stream=0)[:, :12],
    )


# Exponentials -------------------------------------------------------------------------------------
def edges_of_words():
    """Ends of the range, sqrt(1/2) and powers of two, and words between them."""
    borders = [0, 2**32, 0xB504F334, *(2**k for k in range(32))]
    edges = {b + d for b in borders for d in range(-300, 300) if 0 <= b + d < 2**32}
    return torch.cat([torch.tensor(sorted(edges)), contract_words(2**16).flatten()])


def exact_exponentials(w):
    """-ln u, from the nearer end of the range."""
    low, high = (w.double() + 0.5) * 2.0**-32, ((2**32 - 1 - w).double() + 0.5) * 2.0**-32
    return torch.where(w < 2**31, -low.log(), -torch.log1p(-high))


def test_exponentials_are_minus_the_logarithms_of_the_uniforms():
    options = {"seed": 3, "index": integers(0, 2**40), "step": 5, "stream": 2}
    u = uniform((2, 3, 7), dtype=DOUBLE, **options)
    torch.testing.assert_close(exponential((2, 3, 7), dtype=DOUBLE, **options), -u.log())
    torch.testing.assert_close(exponential((2, 3, 7), **options), -u.log().float())


def test_exponentials_are_within_3_ulp():
    w = edges_of_words()
    e = random._exponential_float32(w)
    assert in_ulp(e, exact_exponentials(w)).max() <= 3
    assert e.min() == 2.0**-33 and 22.8 < e.max() < 22.9


def exponents():
    x = torch.linspace(-89, 0, 2**18 + 1)
    return torch.cat([x, -torch.logspace(-45, 2, 10_000), torch.tensor([-0.0, -math.inf, -1e38])])


def test_exp_of_is_within_1_ulp():
    x = exponents()
    normal_range = x > -87
    exact = x.double().exp()
    assert in_ulp(random.exp_of(x), exact)[normal_range].max() <= 1
    assert (random.exp_of(x)[x < -88] == 0).all() and random.exp_of(torch.zeros(1)) == 1
    assert_equal(random.exp_of(x.double()), exact)


# Kernels ------------------------------------------------------------------------------------------
@triton.jit
def _exponentials_kernel(e_ptr, exp_ptr, w_ptr, x_ptr, n, BLOCK: tl.constexpr):
    """One program per BLOCK words and exponents."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + i, mask=i < n, other=0).to(tl.uint32)
    tl.store(e_ptr + i, exponential_of(w), mask=i < n)
    tl.store(exp_ptr + i, exp_of(tl.load(x_ptr + i, mask=i < n, other=0.0)), mask=i < n)


@triton.jit
def _exponential_block_kernel(out_ptr, seed_ptr, index_ptr, step_ptr, first, BLOCK: tl.constexpr):
    """One program: exponentials of elements first .. first + BLOCK - 1 of one sample."""
    seed, index, step = tl.load(seed_ptr), tl.load(index_ptr), tl.load(step_ptr)
    e = exponential_block(seed, index, step, first, 2, BLOCK)
    tl.store(out_ptr + tl.arange(0, BLOCK), e)


@triton.jit
def _words_kernel(
    out_ptr, seed_ptr, index_ptr, step_ptr, first, QUADS: tl.constexpr, STREAM: tl.constexpr
):
    """One program per row: the words of quads first .. first + QUADS - 1, (rows, QUADS, 4)."""
    row = tl.program_id(0)
    lane = tl.arange(0, QUADS)
    seed, index, step = tl.load(seed_ptr), tl.load(index_ptr + row), tl.load(step_ptr + row)
    w0, w1, w2, w3 = philox_words(seed, index, step, first + lane, STREAM)
    at = out_ptr + (row * QUADS + lane) * 4
    tl.store(at, w0.to(tl.int64))
    tl.store(at + 1, w1.to(tl.int64))
    tl.store(at + 2, w2.to(tl.int64))
    tl.store(at + 3, w3.to(tl.int64))


@triton.jit
def _normals_kernel(out_ptr, words_ptr, n, BLOCK: tl.constexpr):
    """One program per BLOCK quads: (4, n) words to (4, n) normals."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w0 = tl.load(words_ptr + i, mask=i < n).to(tl.uint32)
    w1 = tl.load(words_ptr + n + i, mask=i < n).to(tl.uint32)
    w2 = tl.load(words_ptr + 2 * n + i, mask=i < n).to(tl.uint32)
    w3 = tl.load(words_ptr + 3 * n + i, mask=i < n).to(tl.uint32)
    z0, z1, z2, z3 = four_normals(w0, w1, w2, w3)
    tl.store(out_ptr + i, z0, mask=i < n)
    tl.store(out_ptr + n + i, z1, mask=i < n)
    tl.store(out_ptr + 2 * n + i, z2, mask=i < n)
    tl.store(out_ptr + 3 * n + i, z3, mask=i < n)


def kernel_normals(words, device):
    """Four normals of each column of (4, n) words, by the kernels' arithmetic."""
    n = words.shape[1]
    out = torch.empty(4, n, device=device)
    block = 2**16 if device == "cpu" else 512
    _normals_kernel[(triton.cdiv(n, block),)](
        out, words.contiguous().to(device), n, BLOCK=block, enable_fp_fusion=True
    )
    return out.cpu()


def exact_normals(words):
    w0, w1, w2, w3 = words
    return torch.stack([*random._box_muller(w0, w1), *random._box_muller(w2, w3)])


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("first", [0, 2**29, 2**32 - 64])
@pytest.mark.parametrize("stream", [0, 1, 127, 128, 255])
def test_words_of_a_kernel_are_those_of_the_contract(stream, first, device):
    index = integers(0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3, 2**63 - 1, -1, -(2**63))
    step = integers(0, 1, 2**23, 2**24 - 1, 7, 8, 9, 10, 11)
    quad = torch.arange(64) + first
    for seed in (1, 2**32 - 1, 2**63 - 1, -1, -(2**63)):
        arguments = [t.to(device) for t in (torch.tensor(seed), index, step)]
        out = torch.empty(len(index), 64, 4, dtype=torch.int64, device=device)
        _words_kernel[(len(index),)](out, *arguments, first, QUADS=64, STREAM=stream)
        counter = (
            quad.expand(len(index), 64),
            (index & 0xFFFFFFFF)[:, None],
            ((index >> 32) & 0xFFFFFFFF)[:, None],
            (stream * 2**24 + step)[:, None],
        )
        key = torch.tensor(seed & 0xFFFFFFFF), torch.tensor((seed >> 32) & 0xFFFFFFFF)
        assert_equal(out.cpu(), torch.stack(philox4x32(counter, key), -1))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_normals_of_a_kernel_are_within_4_ulp(device):
    words = contract_words(2**18 if device == "cpu" else 2**22).flatten(0, 1).T
    exact = exact_normals(words)
    error = in_ulp(kernel_normals(words, device), exact)
    assert error.max() <= 4


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_normals_of_a_kernel_at_the_edges(device):
    """Ends of the range, sqrt(1/2), powers of two, borders of quadrants; every pair of them."""
    borders = [0, 2**32, 0xB504F334, *(2**k for k in range(32)), *(k * 2**29 for k in range(8))]
    edges = {b + d for b in borders for d in range(-3, 4) if 0 <= b + d < 2**32}
    w, v = torch.tensor(list(itertools.product(sorted(edges), repeat=2))).T
    words = torch.stack([w, v, v, w])
    exact = exact_normals(words)
    z = kernel_normals(words, device)
    assert in_ulp(z, exact).max() <= 4
    assert 6.76 < z.abs().max() < 6.77


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_exponentials_of_a_kernel_are_the_same_bits(device):
    """And so is e^x: what decides about a token must not depend on the device."""
    w, x = edges_of_words(), exponents()
    n = min(len(w), len(x))
    w, x = w[:n], x[-n:]
    e, y = torch.empty(2, n, device=device)
    block = 2**16 if device == "cpu" else 512
    _exponentials_kernel[(triton.cdiv(n, block),)](
        e, y, w.to(device), x.to(device), n, BLOCK=block, enable_fp_fusion=False
    )
    assert_equal(e.cpu(), random._exponential_float32(w))
    assert_equal(y.cpu(), random.exp_of(x))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_a_block_of_exponentials_follows_the_numbering(device):
    seed, index, step = torch.tensor(-3), integers(2**40 + 1), torch.tensor(2**24 - 1)
    out = torch.empty(64, device=device)
    arguments = [t.to(device) for t in (seed, index, step)]
    _exponential_block_kernel[(1,)](out, *arguments, 128, BLOCK=64, enable_fp_fusion=False)
    expected = exponential((1, 192), seed=seed, index=index, step=step, stream=2)
    assert_equal(out.cpu(), expected[0, 128:])
