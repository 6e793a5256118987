"""sample_logits: kept sets, draws, log-probabilities and their gradients."""

import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

import cgkernels
from cgkernels import random, sample_logits, sample_logits_
from cgkernels.library import OPS
from cgkernels.ops.sample_logits import TOP_P_RULES, launch
from cgkernels.testing import plain_and_modeled
from tests.support import (
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

LAUNCHERS = {
    "sample_logits_fwd": launch._launch_fwd,
    "sample_logits_": launch._launch_inplace,
    "sample_logits_bwd": launch._launch_bwd,
}

PLACES = [pytest.param("plain", id="plain"), *KERNEL_DEVICES]
"""Where draws are judged: plain PyTorch on the CPU, and wherever kernels run."""

INF, NAN = math.inf, math.nan


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def sample(label, logits, **inputs):
        inputs = {"logits": logits, "seed": seed, "position": 0, **inputs}
        names = ("index", "temperature", "scale", "top_k", "top_p", "min_p", "position")
        per_row = [n for n in names if isinstance(v := inputs.get(n), Tensor) and v.dim()]
        differentiable = ["logits", *(["uncond"] if "uncond" in inputs else [])]
        return Sample(
            label, sample_logits, inputs, tuple(differentiable), (*per_row, *differentiable)
        )

    def data(*shape, dtype=dtype, seed=0):
        return normals(*shape, dtype=dtype, device=device, seed=seed)

    def numbers(*values):
        return torch.tensor(values, device=device)

    seed = numbers(11)[0]
    index, position = numbers(5, 2**40 + 1, 7), numbers(0, 9, 2**24 - 1)
    k, p = numbers(3, 1, 100), numbers(0.9, 0.5, 1.0)
    x, u = data(3, 30), data(3, 30, seed=1)
    yield sample("plain", x, index=index)
    yield sample("temperature", x, temperature=numbers(0.5, 0.0, 2.0), position=position)
    yield sample("all filters", 2 * x, top_k=k, top_p=p, min_p=0.05, index=index)
    yield sample("of hf", 2 * x, top_k=9, top_p=0.7, top_p_rule="hf")
    yield sample("guided", x, uncond=u, scale=numbers(2.0, 0.0, -1.0), top_p=p, position=3)
    yield sample("doubled batch", data(6, 17), scale=1.5, min_p=numbers(0.0, 0.3, 1.0), index=index)
    other = torch.float16 if dtype == torch.float32 else torch.float32
    yield sample("two dtypes", x, uncond=data(3, 30, dtype=other, seed=1), scale=1.5, top_k=5)
    yield sample("view", data(30, 6).t()[::2], temperature=numbers(0.7)[0], top_p=0.8)
    yield sample("one token", x[:, :1], top_k=1, top_p=0.5, min_p=0.5)
    yield sample("empty batch", x[:0], index=index[:0], top_k=2, top_p=0.5)

    def written(label, logits, *, rows=3, counts=((2, 0, 3), (-1, 7, 5)), **inputs):
        """Into every other column of what is there, values that no draw has."""
        made = {
            "tokens": torch.arange(99, 99 + 8 * rows, device=device).view(rows, 8)[:, ::2],
            "log_probs": torch.arange(4 * rows, device=device, dtype=wide).view(4, rows).t(),
            "counts": numbers(*counts).t()[:rows], "logits": logits, "seed": seed, **inputs,
        }  # fmt: skip
        names = [n for n in ("index", "temperature", "top_k") if isinstance(inputs.get(n), Tensor)]
        return Sample(label, sample_logits_, made, (), (*WRITTEN, "logits", *names), WRITTEN)

    wide = torch.promote_types(dtype, torch.float32)
    yield written("written", x, index=index, top_k=k, temperature=numbers(0.5, 0.0, 2.0))
    yield written("written, doubled batch", data(6, 17), scale=1.5, index=index)
    yield written("written, one position", x, counts=((1, 1, 1), (0, 1, 2)), top_p=0.9)
    yield written("written, empty batch", x[:0], rows=0)


WRITTEN = ("tokens", "log_probs", "counts")


@contextlib.contextmanager
def place(name: str) -> Iterator[str]:
    """The device of the tensors, and there the code under test."""
    if name == "plain":
        yield "cpu"
        return
    with kernels(name, order_seed=1):
        yield name


@contextlib.contextmanager
def rereading(block: int = 128, piece: int = 256) -> Iterator[None]:
    """Short rows as long ones are walked: no row is held, several blocks and pieces each."""
    config = {"HELD": False, "BLOCK": block, "PIECE": piece, "num_warps": 1}
    with mock.patch.object(launch, "_launch_config", lambda vocabulary: config):
        yield


def kept_sets(logits: Tensor, **options) -> list[list[int]]:
    """The tokens that each row could draw: those on which its log-probability depends."""
    logits = logits.clone().requires_grad_()
    token, log_prob = sample_logits(logits, seed=0, position=0, **options)
    scale = torch.full_like(log_prob, 2.0**10)  # float16 rounds small probabilities to zero
    (gradient,) = torch.autograd.grad(log_prob, logits, scale)
    kept = (gradient != 0).scatter(1, token[:, None], True)
    return [row.nonzero()[:, 0].tolist() for row in kept.cpu()]


def sorted_reference(row, temperature=1.0, top_k=None, top_p=None, min_p=None, top_p_rule=""):
    """The rule in words, in Python: sort, cut, sum masses as whole numbers."""
    row = row.float()
    d = (row - row.max()) * (torch.ones(()) / torch.tensor(float(temperature)))
    share = random.exp_of(d)
    mass = [int(m) for m in (share * 2.0**30 + 0.5).long()]
    values = row.tolist()
    order = [i for i in range(len(values)) if values[i] > -INF]
    order.sort(key=lambda i: (-values[i], i))
    order = order[:top_k]
    if top_p is not None and top_p < 1:
        p = float(torch.tensor(top_p))
        total = sum(mass[i] for i in order)
        if top_p_rule == "hf":
            order.sort(key=lambda i: (-values[i], -i))
        before, kept = 0, []
        for i in order:
            if before < p * total or not kept:
                kept.append(i)
            before += mass[i]
        order = kept
    if min_p is not None:
        order = [i for i in order if share[i] >= torch.tensor(min_p)]
    return sorted(order)


# Kept sets ----------------------------------------------------------------------------------------
def rows_of_every_kind(vocabulary):
    x = 3 * normals(8, vocabulary)
    x[1] = x[1].round()  # ties
    x[2] = 0
    x[2, ::2] = -0.0
    x[3, 3:] = -INF
    x[4, ::3] = -INF
    x[5] = x[5].bfloat16().float() + 100
    x[6] = -1.2 * torch.arange(1, vocabulary + 1).log()
    x[7] *= 1.3
    return x


FILTERS = {
    "top-k 1": {"top_k": 1},
    "top-k 50": {"top_k": 50},
    "top-k beyond": {"top_k": 10**9},
    "top-p 0": {"top_p": 0.0},
    "top-p 0.95": {"top_p": 0.95, "temperature": 1.7},
    "top-p next to 1": {"top_p": 1 - 2**-24},
    "top-p 1": {"top_p": 1.0},
    "min-p": {"min_p": 0.02},
    "min-p 1": {"min_p": 1.0},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.1, "temperature": 1.5},
    "hf": {"top_p": 0.6, "top_p_rule": "hf"},
    "hf, top-k": {"top_k": 45, "top_p": 0.7, "top_p_rule": "hf"},
}

CASES = [(name, torch.float32) for name in FILTERS]
CASES += [("all", torch.bfloat16), ("hf, top-k", torch.float16), ("top-k 50", torch.bfloat16)]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_kept_sets_are_those_of_the_sorted_reference(name, dtype, where):
    x = rows_of_every_kind(149).to(dtype)
    with place(where) as device:
        kept = kept_sets(x.to(device), **FILTERS[name])
    assert kept == [sorted_reference(row, **FILTERS[name]) for row in x]


@pytest.mark.parametrize("where", KERNEL_DEVICES)
@pytest.mark.parametrize("name", ["top-k 50", "all", "hf, top-k"])
def test_kept_sets_of_rows_that_are_read_again(name, where):
    x = rows_of_every_kind(300)[[1, 2, 4]]
    with rereading(), place(where) as device:
        kept = kept_sets(x.to(device), **FILTERS[name])
    assert kept == [sorted_reference(row, **FILTERS[name]) for row in x]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("rule", TOP_P_RULES)
def test_the_two_rules_of_top_p(rule, where):
    """Of equal tokens the lowest ids, or as transformers does the highest, and equally many."""
    x = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.125, 0.125]]).log()
    with place(where) as device:
        x = x.to(device)
        half, most, none, cut = (
            kept_sets(x, top_p_rule=rule, **options)
            for options in (
                {"top_p": 0.5},
                {"top_p": 0.8},
                {"top_p": 0},
                {"top_p": 0.5, "top_k": 3},
            )
        )
    hf = rule == "hf"
    assert half == [[2, 3] if hf else [0, 1], [0]]
    assert most == [[0, 1, 2, 3], [0, 1, 3] if hf else [0, 1, 2]]
    assert none == [[3] if hf else [0], [0]]
    assert cut == [[1, 2] if hf else [0, 1], [0]]  # of the 3 that top-k left


def test_the_rule_of_transformers():
    """Its formula: ascending, and those whose cumulative probability is up to 1 - p are removed."""
    x = 3 * normals(50, 97)
    x[:20] = torch.randint(0, 5, (20, 97), generator=torch.Generator().manual_seed(0)) * math.log(2)
    for p in (0.2, 0.55, 0.9):
        ascending, order = x.double().sort(dim=-1, descending=False, stable=True)
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
        removed[:, -1] = False
        expected = torch.zeros_like(removed).scatter(1, order, ~removed)
        expected = [row.nonzero()[:, 0].tolist() for row in expected]
        assert kept_sets(x, top_p=p, top_p_rule="hf") == expected


# Draws --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", PLACES)
def test_a_draw_is_gumbel_max_with_the_noise_of_the_contract(where):
    x, index = normals(40, 23), torch.arange(40) * 2**33 + 5
    position = torch.arange(40) * 1000
    with place(where) as device:
        token, _ = sample_logits(
            x.to(device), seed=3, index=index.to(device), position=position.to(device)
        )
    u = random.uniform(
        (40, 23), seed=3, index=index, step=position, stream=2, dtype=torch.float64
    )  # fmt: skip
    assert_equal(token.cpu(), (x.double() - (-u.log()).log()).argmax(1))


DISTRIBUTIONS = {
    "flat": torch.zeros(16),
    "zipf": -1.1 * torch.arange(1, 25).log(),
    "nearly one-hot": torch.tensor([0.0, *(7 * [-9.0])]),
    "two-way tie": torch.tensor([1.0, 1.0]),
    "ties": torch.tensor([0.0, 2.0, 2.0, 0.0, 2.0, -INF, 1.0]),
    "rounded to bfloat16": normals(16).bfloat16(),
}


def draws(logits, count, device="cpu", **options):
    """Tokens of `count` samples, a million in pieces."""
    tokens = []
    for start in range(0, count, 2**15):
        index = torch.arange(start, min(start + 2**15, count), device=device)
        rows = logits.to(device).expand(len(index), -1)
        tokens.append(sample_logits(rows, index=index, seed=1, position=0, **options)[0].cpu())
    return torch.cat(tokens)


def p_value(tokens, probability):
    """How often chance alone gives such counts or worse ones: Pearson's chi-square test."""
    counts = torch.bincount(tokens, minlength=len(probability)).double()
    assert counts[probability == 0].sum() == 0
    expected = len(tokens) * probability[probability > 0]
    assert expected.min() > 5
    degrees = len(expected) - 1
    statistic = ((counts[probability > 0] - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor(degrees / 2.0).double(), statistic / 2)


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_million_draws(name, where):
    logits = DISTRIBUTIONS[name]
    tokens = draws(logits, 2**20, where)
    assert p_value(tokens, logits.double().softmax(-1)) > 1e-3


@pytest.mark.parametrize("name", ["zipf", "ties"])
def test_a_million_draws_after_filters(name):
    logits = DISTRIBUTIONS[name]
    options = {"temperature": 1.3, "top_k": 9, "top_p": 0.8}
    kept = sorted_reference(logits, **options)
    probability = torch.zeros(len(logits), dtype=torch.float64)
    probability[kept] = (logits[kept].double() / 1.3).softmax(-1)
    assert p_value(draws(logits, 2**20, **options), probability) > 1e-3


def test_one_hot_draws_one_token():
    logits = torch.full((9,), -INF)
    logits[4] = -3.0
    token, log_prob = sample_logits(logits.expand(10**6 // 9, 9), seed=0, position=0)
    assert (token == 4).all() and (log_prob == 0).all()


@pytest.mark.parametrize("where", PLACES)
def test_temperature_0_takes_the_first_of_the_largest(where):
    x = rows_of_every_kind(149)
    with place(where) as device:
        for options in ({}, {"top_p": 0.0, "top_p_rule": "hf"}, {"top_k": 7}):
            token, log_prob = sample_logits(
                x.to(device), temperature=0, seed=0, position=0, **options
            )
            assert_equal(token.cpu(), x.argmax(1))
            assert (log_prob == 0).all()


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_temperature_0_takes_the_first_of_all_pieces(device):
    x = torch.zeros(2, 600, device=device)
    x[1, [300, 400, 599]] = 1
    with rereading(), kernels(device):
        token, _ = sample_logits(x, temperature=0, seed=0, position=0)
    assert token.tolist() == [0, 300]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_logits_as_large_as_they_come(dtype, where):
    """Kept sets and tokens; the difference of two logits may be infinite."""
    largest = torch.finfo(dtype).max
    x = torch.zeros(4, 70, dtype=dtype)
    x[0, :3], x[0, 3] = largest, -largest
    x[1] = -largest
    x[2, ::2] = largest / 2
    x[3, 5:] = -largest
    for options in ({"top_k": 2}, {"top_p": 0.7}, {"temperature": 1e-30}, {"temperature": 1e30}):
        expected = [sorted_reference(row, **options) for row in x]
        with place(where) as device:
            token, log_prob = sample_logits(x.to(device), seed=0, position=0, **options)
        for row, kept in enumerate(expected):
            assert token[row] in kept and log_prob[row].isfinite()
        assert_equal(token.cpu(), sample_logits(x, seed=0, position=0, **options)[0])


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("vocabulary", [1, 2, 127, 128, 129, 1000, 4097, 16384])
def test_kernels_draw_the_tokens_of_plain_pytorch(vocabulary, device):
    """To the last one: what decides is rounded in the same way everywhere."""
    x, u = 3 * normals(4, vocabulary), 3 * normals(4, vocabulary, seed=1)
    for options in (
        {},
        {"top_k": 40, "top_p": 0.9, "temperature": 0.8},
        {"uncond": u.half(), "scale": 2.5, "min_p": 0.01},
    ):

        def run(device, options=options):
            moved = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in options.items()}
            return sample_logits(x.to(device), seed=2**63, position=77, **moved)

        with kernels(device):
            token, log_prob = run(device)
        plain = run("cpu")
        assert_equal(token.cpu(), plain[0])
        torch.testing.assert_close(log_prob.cpu(), plain[1], rtol=1e-6, atol=1e-6)


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["all", "hf, top-k"])
def test_a_long_row_is_drawn_from_as_a_short_one(name):
    """By the walk that the size asks for, and by others."""
    x = 3 * normals(1, 20_000)
    plain = sample_logits(x, seed=0, position=0, **FILTERS[name])
    with kernels("cpu"):
        token, log_prob = sample_logits(x, seed=0, position=0, **FILTERS[name])
        with rereading(4096, 4096):
            again = sample_logits(x, seed=0, position=0, **FILTERS[name])
    assert_equal(token, plain[0])
    assert_equal(again, (token, log_prob))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_a_row_has_one_token(device):
    """Alone, in a batch, permuted, in any order of the programs; and one gradient."""
    x, index = 3 * normals(4, 150, device=device), torch.tensor([7, 2**35, 0, 1], device=device)
    dlog_prob = torch.tensor([1.0, 2.0, 3.0, -1.0], device=device)

    def run(rows, order_seed=0):
        logits = x[rows].requires_grad_()
        with kernels(device, order_seed=order_seed):
            token, log_prob = sample_logits(
                logits, seed=5, index=index[rows], top_k=40, top_p=0.9, position=6
            )
            gradient = torch.autograd.grad(log_prob, logits, dlog_prob[rows])
        return token, log_prob.detach(), *gradient

    whole = run([0, 1, 2, 3])
    for rows in ([2], [3, 2, 1, 0], [1, 3]):
        assert_equal(run(rows, order_seed=1), tuple(out[rows] for out in whole))


# Log-probabilities --------------------------------------------------------------------------------
def plain_log_prob(logits, token, kept, temperature):
    """log_softmax over the kept tokens, at those drawn."""
    excluded = torch.ones(logits.shape, dtype=torch.bool)
    for row, ids in zip(excluded, kept, strict=True):
        row[ids] = False
    log_prob = (logits / temperature).masked_fill(excluded, -INF).log_softmax(-1)
    return log_prob.gather(1, token[:, None])[:, 0]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(
    ("rows", "options"), [(100, {}), (16, FILTERS["all"])], ids=["no filter", "all filters"]
)
def test_log_probabilities_and_gradients(rows, options, where):
    """Of the distribution drawn from, within the error budget of log_softmax."""
    x = 3 * normals(rows, 40)
    temperature = options.get("temperature", 1.0)
    dlog_prob = normals(rows, seed=1)
    with place(where) as device:
        logits = x.to(device).requires_grad_()
        token, log_prob = sample_logits(logits, seed=0, position=0, **options)
        (gradient,) = torch.autograd.grad(log_prob, logits, dlog_prob.to(device))
    kept = [sorted_reference(row, **options) for row in x]

    def expected(dtype):
        logits = x.to(dtype).requires_grad_()
        log_prob = plain_log_prob(logits, token.cpu(), kept, temperature)
        return log_prob.detach(), *torch.autograd.grad(log_prob, logits, dlog_prob.to(dtype))

    actual = (log_prob.detach(), gradient)
    plain, modeled = plain_and_modeled(lambda: expected(torch.float32))
    assert_accurate(actual, plain, expected(torch.float64), modeled)


@pytest.mark.parametrize("where", PLACES)
def test_gradients_of_guided_logits(where):
    x, scale = 2 * normals(4, 40), torch.tensor([2.0, 0.5, -1.0])[:2]
    with place(where) as device:
        both = x.to(device).requires_grad_()
        token, log_prob = sample_logits(
            both, scale=scale.to(device), seed=0, position=0, top_k=9, temperature=0.7
        )
        (gradient,) = torch.autograd.grad(log_prob.sum(), both)
    plain = x.clone().requires_grad_()
    uncond, cond = plain.chunk(2)
    logits = uncond + scale[:, None] * (cond - uncond)
    kept = [sorted_reference(row, top_k=9) for row in logits.detach()]
    expected = plain_log_prob(logits, token.cpu(), kept, 0.7)
    torch.testing.assert_close(log_prob.detach().cpu(), expected.detach())
    (theirs,) = torch.autograd.grad(expected.sum(), plain)
    torch.testing.assert_close(gradient.cpu(), theirs)


def test_the_token_has_no_gradient():
    token, log_prob = sample_logits(normals(2, 5).requires_grad_(), seed=0, position=0)
    assert log_prob.requires_grad and not token.requires_grad
    assert token.dtype == torch.int64 and log_prob.dtype == torch.float32


def test_the_reference_can_be_differentiated():
    x = normals(3, 30).double().requires_grad_()
    options = {"top_k": 7, "temperature": 0.7, "seed": 0, "position": 0}
    ours = torch.autograd.grad(sample_logits(x, **options)[1].sum(), x)
    with cgkernels.reference():
        theirs = torch.autograd.grad(sample_logits(x, **options)[1].sum(), x)
    torch.testing.assert_close(ours, theirs)


# Rows without a distribution ----------------------------------------------------------------------
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("options", [{}, FILTERS["all"], {"temperature": 0}], ids=str)
def test_rows_without_a_distribution(options, where):
    x = normals(5, 60)
    x[0, 7], x[1], x[2, 3], x[3, 1:] = NAN, -INF, INF, -INF
    with place(where) as device:
        logits = x.to(device).requires_grad_()
        token, log_prob = sample_logits(logits, seed=0, position=0, **options)
        (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
    assert token.cpu()[:4].tolist() == [-1, -1, -1, 0] and token[4] >= 0
    assert log_prob[:3].isnan().all() and log_prob[3] == 0 and log_prob[4].isfinite()
    assert gradient[:3].isnan().all() and gradient[3:].isfinite().all()


@pytest.mark.parametrize("where", PLACES)
def test_tokens_that_both_halves_exclude_are_excluded(where):
    x = normals(2, 20)
    x[:, 5:] = -INF
    with place(where) as device:
        token, log_prob = sample_logits(x.to(device), scale=2.0, seed=0, position=0)
    assert 0 <= token[0] < 5 and log_prob.isfinite().all()


OUT_OF_RANGE = {
    "temperature": (3, [-1.0, NAN, INF]),
    "top_k": (4, [0, -5]),
    "top_p": (5, [-0.1, 1.5, NAN]),
    "min_p": (6, [-0.1, 1.5, NAN]),
    "position": (10, [-1, 2**24]),
}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_numbers_out_of_range_are_seen(name, where):
    """On a GPU nobody can refuse them without waiting; they must not look like a result."""
    argument, wrong = OUT_OF_RANGE[name]
    rows = 1 + len(wrong)
    numbers = [torch.full((rows,), v) for v in (1.0, 5, 0.9, 0.1)]
    seed, zeros = torch.tensor(0), torch.zeros(rows, dtype=torch.int64)
    args = [3 * normals(rows, 60), None, None, *numbers, "mass_before", seed, zeros, zeros]
    args[argument] = torch.tensor([args[argument][0].item(), *wrong])
    call = OpCall(OPS["sample_logits_fwd"], tuple(args))
    if where != "plain":
        token, log_prob = kernel_results(call.map(lambda t: t.to(where)))
    else:
        token, log_prob = call.run()
    assert token[0] >= 0 and log_prob[0].isfinite()
    assert (token[1:] == -1).all() and log_prob[1:].isnan().all()


# What is refused ----------------------------------------------------------------------------------
X, INT64 = normals(4, 9), torch.zeros(4, dtype=torch.int64)

WRONG = [
    (TypeError, ("logits", "NoneType"), {"logits": None}),
    (TypeError, ("logits", "int64"), {"logits": X.long()}),
    (ValueError, ("logits", "(B, V)", "(9,)"), {"logits": X[0]}),
    (ValueError, ("logits", "(B, V)", "(4, 0)"), {"logits": X[:, :0]}),
    (ValueError, ("logits", "2^22"), {"logits": X[:1, :1].expand(1, 2**22 + 1)}),
    (ValueError, ("logits", "half", "(3, 9)"), {"logits": X[:3], "scale": 2.0}),
    (TypeError, ("uncond", "list"), {"uncond": [X], "scale": 2.0}),
    (ValueError, ("uncond", "(4, 9)", "(4, 8)"), {"uncond": X[:, 1:], "scale": 2.0}),
    (ValueError, ("uncond", "cpu", "meta"), {"uncond": X.to("meta"), "scale": 2.0}),
    (ValueError, ("scale", "uncond"), {"uncond": X}),
    (ValueError, ("scale", "inf"), {"uncond": X, "scale": INF}),
    (ValueError, ("scale", "(2,)", "(4,)"), {"scale": torch.ones(4)}),
    (ValueError, ("scale", "requires grad"), {"scale": torch.ones(2, requires_grad=True)}),
    (ValueError, ("temperature", "[0, inf)", "-1"), {"temperature": -1}),
    (ValueError, ("temperature", "[0, inf)", "-1"), {"temperature": -torch.ones(4)}),
    (ValueError, ("temperature", "nan"), {"temperature": NAN}),
    (TypeError, ("temperature", "'hot'"), {"temperature": "hot"}),
    (ValueError, ("temperature", "(4,)", "(3,)"), {"temperature": torch.ones(3)}),
    (ValueError, ("temperature", "requires"), {"temperature": torch.ones(4, requires_grad=True)}),
    (ValueError, ("top_k", "[1, ", "0"), {"top_k": 0}),
    (ValueError, ("top_k", "[1, ", "from 0 to 2"), {"top_k": torch.tensor([1, 0, 2, 2])}),
    (TypeError, ("top_k", "1.5"), {"top_k": 1.5}),
    (TypeError, ("top_k", "float32"), {"top_k": torch.ones(4)}),
    (ValueError, ("top_p", "[0, 1]", "1.01"), {"top_p": 1.01}),
    (ValueError, ("top_p", "[0, 1]", "-0.5"), {"top_p": torch.full((4,), -0.5)}),
    (TypeError, ("top_p", "int64"), {"top_p": INT64}),
    (ValueError, ("top_p", "cpu", "meta"), {"top_p": torch.ones(4, device="meta")}),
    (ValueError, ("min_p", "[0, 1]", "2"), {"min_p": 2}),
    (TypeError, ("min_p", "True"), {"min_p": True}),
    (ValueError, ("top_p_rule", "mass_before", "'vllm'"), {"top_p_rule": "vllm"}),
    (TypeError, ("seed", "1.0"), {"seed": 1.0}),
    (ValueError, ("seed", "(4,)"), {"seed": INT64}),
    (ValueError, ("index", "(4,)", "(3,)"), {"index": INT64[:3]}),
    (TypeError, ("index", "float32"), {"index": X[:, 0]}),
    (ValueError, ("position", "16777216"), {"position": 2**24}),
    (ValueError, ("position", "from -1 to 0"), {"position": INT64 - torch.tensor([1, 0, 0, 0])}),
    (TypeError, ("position", "True"), {"position": True}),
]


NUMBERS = torch.zeros(4, 6).long()

WRONG_WRITTEN = [
    (TypeError, ("tokens", "int32"), {"tokens": NUMBERS.int()}),
    (ValueError, ("tokens", "(4, N)", "(3, 6)"), {"tokens": NUMBERS[:3]}),
    (ValueError, ("tokens", "expanded"), {"tokens": NUMBERS[:1].expand(4, 6)}),
    (TypeError, ("log_probs", "NoneType"), {"log_probs": None}),
    (TypeError, ("log_probs", "float32", "float16"), {"log_probs": NUMBERS.half()}),
    (ValueError, ("log_probs", "(4, 6)", "(4, 5)"), {"log_probs": NUMBERS[:, :5].float()}),
    (TypeError, ("counts", "float32"), {"counts": NUMBERS.float()}),
    (ValueError, ("counts", "(4, k > 0)", "(4, 0)"), {"counts": NUMBERS[:, :0]}),
    (ValueError, ("counts", "(4, k > 0)", "(4,)"), {"counts": NUMBERS[:, 0]}),
    (ValueError, ("counts", "[0, 5]", "6"), {"counts": NUMBERS + 6}),
    (ValueError, ("counts", "cpu", "meta"), {"counts": NUMBERS.to("meta")}),
    (ValueError, ("logits", "requires grad", "sample_logits"), {
        "logits": X.clone().requires_grad_(),
    }),
    (ValueError, ("top_k", "[1, 2147483648)"), {"top_k": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "words", "changed"), WRONG_WRITTEN)
def test_wrong_arguments_of_what_is_written(error, words, changed):
    inputs = {"tokens": NUMBERS, "log_probs": NUMBERS.float(), "counts": NUMBERS[:, :2]}
    call = Sample("wrong", sample_logits_, {**inputs, "logits": X, "seed": 0})
    assert_refused(call.replace(**changed), error, *words)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("positions", [(2, 2, 2), (0, 4, 3)])
def test_what_is_written_is_what_is_drawn(positions, where):
    """At the positions, and nowhere else; the noise is that of the position."""
    x = 3 * normals(3, 200)
    at = torch.tensor(positions)
    token, log_prob = sample_logits(x, seed=5, position=at, top_k=50)
    with place(where) as device:
        tokens = torch.full((3, 5), -7, device=device)
        log_probs = torch.full((3, 5), 9.0, device=device)
        counts = torch.stack([at, torch.tensor([-1, 0, 4])], 1).to(device)
        options = {"seed": 5, "top_k": 50}
        sample_logits_(tokens, log_probs, counts, x.to(device), **options)
    expected = torch.full((3, 5), -7).scatter(1, at[:, None], token[:, None])
    assert_equal(tokens.cpu(), expected)
    close = torch.full((3, 5), 9.0).scatter(1, at[:, None], log_prob[:, None])
    torch.testing.assert_close(log_probs.cpu(), close, rtol=1e-6, atol=1e-6)
    assert counts.tolist() == [[p + 1, n + 1] for p, n in zip(positions, (-1, 0, 4), strict=True)]


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_positions_that_do_not_exist_are_counted_on(device):
    """Where values cannot be refused; nothing is written for them, in guarded memory."""
    counts = torch.tensor([[-1, 3], [2, 0], [5, 1], [2**40, 2]], device=device)
    tokens = torch.full((4, 5), 77, device=device)
    x, row = normals(4, 30, device=device), torch.ones(4, device=device)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    filters = (None, None, row, None, None, None, "mass_before")
    args = (tokens, tokens.float(), counts, x, *filters, seed, torch.arange(4, device=device))
    call = OpCall(OPS["sample_logits_"], args)
    for results in (kernel_results(call), call.map(Tensor.cpu).run()):
        assert_equal(results[2].cpu(), counts.cpu() + 1)
        kept = results[0].cpu() == 77
        assert kept[[0, 2, 3]].all() and kept[1].tolist() == [True, True, False, True, True]


@pytest.mark.parametrize(("error", "words", "changed"), WRONG)
def test_wrong_arguments(error, words, changed):
    call = Sample("wrong", sample_logits, {"logits": X, "seed": 0, "position": 0})
    assert_refused(call.replace(**changed), error, *words)


# Launches -----------------------------------------------------------------------------------------
def test_rows_are_held_where_registers_allow():
    def held(vocabulary):
        return launch._launch_config(vocabulary)["HELD"]

    assert all(map(held, (1, 128, 1000, 8191, 8192, 8208, 16384)))
    assert not any(map(held, (8193, 10007, 16385, 32000, 2**18)))
    for vocabulary in (1, 100, 128, 129, 5000, 16384, 2**18):
        config = launch._launch_config(vocabulary)
        assert config["BLOCK"] >= vocabulary or not config["HELD"]
        assert config["PIECE"] % 4 == 0 and config["PIECE"] <= config["BLOCK"]
