"""decode_attention: the definition, steps and a full forward, splits, prefixes, equal bits."""

import contextlib
import copy
import math
from collections.abc import Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import cgkernels
from cgkernels._triton import tl, triton
from cgkernels.device import tanh
from cgkernels.library import OPS
from cgkernels.ops.decode_attention import decode_attention, launch
from cgkernels.ops.decode_attention.reference import rotary_ref
from cgkernels.testing import assert_within_budget, plain_and_modeled
from tests.support import (
    FLOATS,
    KERNEL_DEVICES,
    OpCall,
    Sample,
    assert_equal,
    assert_nothing_hidden,
    assert_refused,
    kernel_results,
    kernels,
    normals,
    spoiled,
)

LAUNCHERS = {
    "decode_attention_fwd": launch._launch_fwd,
    "decode_attention_append": launch._launch_append,
}

NAN = float("nan")
ROWS = ("q", "k_cache", "v_cache", "lengths", "k_new", "v_new", "position", "prefix_id", "left_pad")
SPLIT = {dtype: launch._launch_config(64, dtype.itemsize)["SPLIT"] for dtype in FLOATS}


def inputs_of(
    rows=3, queries=1, heads=(2, 2), size=32, lengths=(0, 5, 11), *, capacity=None, append=True,
    rotary=0, pads=None, prefixes=(), prefix_id=None, unused=NAN, dtype=torch.float32,
    device="cpu", **options,
):  # fmt: skip
    """Arguments of decode_attention; what is not cached, and what pads, is `unused`."""
    q_heads, kv_heads = heads
    capacity = capacity or max(lengths) + (queries if append else 0) + 3

    def data(*shape, seed):
        return normals(*shape, dtype=dtype, device=device, seed=seed)

    def integers(values):
        return torch.tensor(values, device=device)

    cache = (rows, capacity, kv_heads, size)
    made = {"q": data(rows, queries, q_heads, size, seed=0)}
    made |= {"k_cache": data(*cache, seed=1), "v_cache": data(*cache, seed=2)}
    made["lengths"] = integers(list(lengths))
    slot = torch.arange(capacity, device=device)
    hidden = slot >= made["lengths"][:, None]
    if pads:
        made["left_pad"] = integers(list(pads))
        hidden |= slot < made["left_pad"][:, None]
    for name in ("k_cache", "v_cache"):
        made[name][hidden] = unused
    if append:
        new = (rows, queries, kv_heads, size)
        made |= {"k_new": data(*new, seed=3), "v_new": data(*new, seed=4)}
    if rotary:
        made["rope"] = tables(capacity + max(prefixes, default=0), rotary, dtype, device)
    if prefixes:
        shared = (len(prefixes), max(prefixes) + 2, kv_heads, size)
        made |= {"prefix_k": data(*shared, seed=5), "prefix_v": data(*shared, seed=6)}
        made["prefix_length"] = integers(list(prefixes))
        made["prefix_id"] = integers(prefix_id or [i % len(prefixes) for i in range(rows)])
        for p, length in enumerate(prefixes):
            made["prefix_k"][p, length:] = unused
            made["prefix_v"][p, length:] = unused
    return {**made, "return_lse": True, **options}


def tables(positions, rotary, dtype=torch.float32, device="cpu"):
    """Equal in float32 and float64; the third row is zero, as tables of conditions may be."""
    angle = torch.outer(torch.arange(positions), 100.0 ** -torch.linspace(0, 1, rotary // 2))
    both = [f(angle.double()).float() for f in (torch.cos, torch.sin)]
    for t in both:
        t[2] = 0
    return tuple(t.to(device, torch.promote_types(dtype, torch.float32)) for t in both)


def heads_first(inputs):
    """The same call with caches in (B, H, S, D) order."""
    caches = {n: inputs[n].transpose(1, 2).contiguous().transpose(1, 2) for n in WRITTEN}
    return {**inputs, **caches}


WRITTEN = ("k_cache", "v_cache")


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def sample(label, made=None, **how):
        made = made or inputs_of(unused=7.0, dtype=dtype, device=device, **how)
        mutates = WRITTEN if "k_new" in made else ()
        per_row = tuple(name for name in ROWS if name in made)
        return Sample(label, decode_attention, made, (), per_row, mutates)

    def made(**how):
        return inputs_of(unused=7.0, dtype=dtype, device=device, **how)

    # Results of under 256 values: more would have to agree to the bit in half types, but kernels
    # round the weights before the division and plain PyTorch does after it.
    yield sample("append")
    yield sample("cached", append=False, lengths=(1, 5, 11))
    yield sample("grouped, half-split", heads=(4, 2), size=16, rotary=16)
    yield sample("interleaved, part", size=20, rotary=8, rope_interleaved=True, queries=2)
    narrow = {"queries": 3, "heads": (2, 1), "size": 12, "window": 4, "pads": (0, 2, 3)}
    yield sample("left padding, window", **narrow)
    yield sample("cached, window", append=False, lengths=(3, 5, 11), **{**narrow, "queries": 2})
    yield sample("softcap", heads=(3, 1), size=20, softcap=2.0, scale=0.5)
    yield sample("heads first", heads_first(made(heads=(4, 2), size=20)))
    shared = {"prefixes": (9, 4), "prefix_id": [1, 0, 1]}
    yield sample("prefix", **shared, counters=torch.zeros(6, dtype=torch.int32, device=device))
    everything = {**shared, "queries": 2, "heads": (2, 1), "size": 20, "pads": (0, 2, 3)}
    everything |= {"rotary": 12, "window": 8, "softcap": 3.0}
    position = torch.tensor([[3, 1], [0, 4], [2, 2]], device=device, dtype=torch.int32)
    yield sample("everything", **everything, position=position)
    yield sample("cached, everything", append=False, lengths=(2, 5, 11), **everything)
    none = {name: t[:0] for name, t in made(append=False).items() if name in ROWS}
    yield sample("empty batch", {**none, "return_lse": True})


# The definition -----------------------------------------------------------------------------------
def by_hand(inputs):
    """Output and log-sum-exp of every query, one by one, in float64."""
    get = inputs.get
    q, lengths, prefix_id = inputs["q"], inputs["lengths"], get("prefix_id")
    rows, queries, q_heads, size = q.shape
    kv_heads = inputs["k_cache"].shape[2]
    scale, softcap = get("scale") or size**-0.5, get("softcap")
    out, lse = torch.zeros(q.shape).double(), torch.full((rows, q_heads, queries), -torch.inf)
    lse = lse.double()

    def rotated(x, at):
        if get("rope") is None:
            return x.double()
        cos, sin = (t[at].double() for t in inputs["rope"])
        turned, x = 2 * cos.numel(), x.double()
        pairs = x[:turned].view(-1, 2) if get("rope_interleaved") else x[:turned].view(2, -1).mT
        spun = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)
        spun = torch.view_as_real(spun)
        spun = spun.flatten() if get("rope_interleaved") else spun.mT.flatten()
        return torch.cat([spun, x[turned:]])

    for b in range(rows):
        pad = int(inputs["left_pad"][b]) if "left_pad" in inputs else 0
        before = int(inputs["prefix_length"][prefix_id[b]]) if prefix_id is not None else 0
        length = int(lengths[b])
        last = before + length - pad + (0 if "k_new" in inputs else -queries)
        for h in range(q_heads):
            kv = h // (q_heads // kv_heads)
            keys, values = [], []
            if before:
                keys += [k.double() for k in inputs["prefix_k"][prefix_id[b], :before, kv]]
                values += [v.double() for v in inputs["prefix_v"][prefix_id[b], :before, kv]]
            keys += [k.double() for k in inputs["k_cache"][b, pad:length, kv]]
            values += [v.double() for v in inputs["v_cache"][b, pad:length, kv]]
            at = [last + i for i in range(queries)]
            if "position" in inputs:
                at = inputs["position"][b].tolist()
            if "k_new" in inputs:
                keys += [rotated(inputs["k_new"][b, i, kv], at[i]) for i in range(queries)]
                values += [v.double() for v in inputs["v_new"][b, :, kv]]
            for i in range(queries):
                end = last + i + 1
                start = max(0, end - (get("window") or end))
                if end <= start:
                    continue
                score = scale * torch.stack(keys[start:end]) @ rotated(q[b, i, h], at[i])
                score = softcap * torch.tanh(score / softcap) if softcap else score
                out[b, i, h] = score.softmax(0) @ torch.stack(values[start:end])
                lse[b, h, i] = score.logsumexp(0)
    return out, lse


CASES = {
    "plain": {},
    "cached": {"append": False, "lengths": (1, 0, 11), "queries": 2},
    "grouped": {"heads": (6, 2), "queries": 3},
    "half-split": {"rotary": 32, "queries": 2},
    "interleaved part": {"rotary": 12, "rope_interleaved": True},
    "window": {"window": 4, "queries": 3},
    "softcap": {"softcap": 1.5, "scale": 1.0},
    "left padding": {"pads": (0, 5, 2), "rotary": 8},
    "prefix": {"prefixes": (7, 0), "heads": (4, 2), "rotary": 8},
    "prefix, window": {"prefixes": (7, 3), "queries": 3, "window": 6, "pads": (0, 2, 3)},
    "positions": {"rotary": 8, "position": torch.tensor([[2], [0], [13]])},
    "prefix alone": {"append": False, "lengths": (0, 0, 0), "prefixes": (7, 3), "rotary": 8},
}


def run(inputs):
    """(out, lse, k_cache, v_cache); inputs stay as they are."""
    inputs = copy.deepcopy(inputs)
    return *decode_attention(**inputs), inputs["k_cache"], inputs["v_cache"]


@pytest.mark.parametrize("case", CASES)
def test_it_is_softmax_of_scores_times_values(case):
    inputs = inputs_of(dtype=torch.float64, **CASES[case])
    out, lse, *_ = run(inputs)
    torch.testing.assert_close((out, lse), by_hand(inputs))
    with cgkernels.reference():
        torch.testing.assert_close(run(inputs)[:2], (out, lse))


WAYS = [
    "reference", "cpu", pytest.param("cpu kernel", marks=pytest.mark.kernel),
    pytest.param("cuda", marks=pytest.mark.cuda),
]  # fmt: skip


def run_by(way, inputs):
    """(out, lse) of one of WAYS."""
    if way == "reference":
        with cgkernels.reference():
            return run(inputs)[:2]
    if way == "cpu":
        return run(inputs)[:2]
    device = way.removesuffix(" kernel")
    with kernels(device):
        return tuple(t.cpu() for t in run(on(inputs, device))[:2])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_what_is_not_finite_reaches_those_who_see_it_alone(case, way):
    """A mask is a choice, not a sum with -inf nor a product with 0."""
    inputs = inputs_of(**CASES[case])
    floats = {n: t for n, t in inputs.items() if n[0] in "qkvp" and isinstance(t, torch.Tensor)}
    for words, name, tensor in spoiled(floats):
        if way == "cpu kernel" and "nan" not in words:
            continue  # for time
        changed = {**inputs, name: tensor}
        out, lse = by_hand(changed)
        out = out.masked_fill((lse == -torch.inf).mT[..., None], 0)  # only scores of -inf
        results = [t.double() for t in run_by(way, changed)]
        assert_nothing_hidden(results, (out, lse), words, eps=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", ["k_new", "v_new"])
def test_a_new_token_does_not_see_the_next(bad, way):
    """Two, one key each, the second not a number; and 512 cached tokens before the second."""
    for lengths in ((0,), (511,), (512,)):
        inputs = inputs_of(1, 2, (1, 1), 8, lengths=lengths)
        inputs[bad][:, 1] = NAN
        clean = {**inputs, bad: inputs[bad].nan_to_num(3.0)}
        out, lse = run_by(way, inputs)
        torch.testing.assert_close(out[:, :1].double(), by_hand(clean)[0][:, :1])
        assert out[:, 1].isnan().all() and lse[..., 0].isfinite().all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_value_is_not_hidden(value, way):
    """Whatever its weight: it comes out as infinity, or as NaN where the weight is 0."""
    for length in (0, 5, 513):
        inputs = inputs_of(2, 1, (2, 1), 8, lengths=(length, length))
        inputs["v_new"][0, 0, 0, 3] = value
        out, lse = run_by(way, inputs)
        assert not out[0, ..., 3].isfinite().any() and lse.isfinite().all()
        assert out[0, ..., :3].isfinite().all() and out[1].isfinite().all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("length", [0, 5, 512, 513])
def test_a_query_or_its_own_key_that_is_not_a_number(length, way):
    """PyTorch's attention for CPUs makes zeros of it where 512 k tokens are before it."""
    for name in ("q", "k_new"):
        inputs = inputs_of(2, 1, (2, 1), 8, lengths=(length, length))
        true_out, true_lse = by_hand(inputs)
        inputs[name][0, ..., 0] = NAN
        out, lse = run_by(way, inputs)
        assert out[0].isnan().all() and lse[0].isnan().all()
        for got, true in ((out, true_out), (lse, true_lse)):
            torch.testing.assert_close(got[1].double(), true[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_queries_that_overlap_in_memory(way):
    """Of tokens, heads and rows; and of caches, that are only read."""
    memory = normals(300)
    overlapping = (
        (5, 1, 3, 1),
        (0, 2, 0, 1),
        (1, 16, 8, 1),
        (3, 0, 1, 2),
        (0, 0, 0, 0),
        (8, 8, 8, 1),
    )
    for queries, strides in product((1, 3), overlapping):
        inputs = inputs_of(2, queries, (2, 2), 8, lengths=(3, 7), append=False)
        for name in ("q", "k_cache", "v_cache"):
            shape = inputs[name].shape
            changed = {**inputs, name: memory.as_strided(shape, strides)}
            results = [t.double() for t in run_by(way, changed)]
            torch.testing.assert_close(results, list(by_hand(changed)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [0.0, -0.0, -0.5])
@pytest.mark.parametrize("case", ["grouped", "window", "softcap", "prefix, window"])
def test_scales_that_are_not_positive(case, scale, way):
    inputs = inputs_of(**{**CASES[case], "scale": scale})
    out, lse = run_by(way, inputs)
    if scale == 0:  # by_hand takes it for the default
        inputs["q"], inputs["scale"] = torch.zeros_like(inputs["q"]), 1.0
    results = [t.double() for t in (out, lse)]
    torch.testing.assert_close(results, list(by_hand(inputs)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("queries", "heads"), [(2, 0), (0, 4), (0, 0)])
def test_tokens_without_queries_are_appended(queries, heads, way):
    """And no tokens are."""
    inputs = inputs_of(3, queries, (4, 2), 8, lengths=(0, 4, 9), rotary=4, unused=0.0)
    expected = run(inputs)[2:]
    changed = {**inputs, "q": inputs["q"][:, :, :heads].clone()}
    with cgkernels.reference() if way == "reference" else contextlib.nullcontext():
        if way in ("reference", "cpu"):
            results = run(changed)
        else:
            with kernels(way.removesuffix(" kernel")):
                results = [t.cpu() for t in run(on(changed, way.removesuffix(" kernel")))]
    assert results[0].shape == (3, queries, heads, 8) and results[1].shape == (3, heads, queries)
    torch.testing.assert_close(tuple(results[2:]), expected)
    assert queries == 0 or not torch.equal(expected[0], inputs["k_cache"])


def test_the_new_tokens_are_where_the_lengths_say():
    inputs = inputs_of(lengths=(0, 4, 9), queries=2, rotary=8)
    *_, k, v = run(inputs)
    with cgkernels.reference():
        assert_equal(run(inputs)[2:], (k, v), equal_nan=True)
    for b, n in enumerate((0, 4, 9)):
        before = {name: inputs[name][b].clone() for name in WRITTEN}
        assert_equal(v[b, n : n + 2], inputs["v_new"][b])
        assert not torch.equal(k[b, n : n + 2], inputs["k_new"][b])  # rotated
        for name, after in (("k_cache", k), ("v_cache", v)):
            outside = torch.arange(after.shape[1])
            outside = (outside < n) | (outside >= n + 2)
            assert_equal(after[b, outside], before[name][outside], equal_nan=True)
    assert_equal(inputs["lengths"], torch.tensor([0, 4, 9]))


def full_forward(q, k, v, rotary, rope, window=None):
    """Causal attention over whole sequences (B, T, H, D), in float64."""
    at = torch.arange(q.shape[1]).expand(q.shape[0], -1)
    q, k = (rotary_ref(x.double(), *rope, at, False) if rotary else x.double() for x in (q, k))
    k, v = (x.double().repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    ahead = at[0] - at[0][:, None]
    mask = (ahead <= 0) & (ahead > -(window or len(at[0])))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("queries", [1, 3])
def test_steps_equal_a_full_forward_at_every_position(queries, window):
    q, k, v = normals(2, 24, 4, 32), normals(2, 24, 2, 32, seed=1), normals(2, 24, 2, 32, seed=2)
    rope = tables(24, 16)
    cache = {name: torch.full((2, 24, 2, 32), NAN) for name in WRITTEN}
    steps = []
    for t in range(0, 24, queries):
        now = slice(t, t + queries)
        new = {"k_new": k[:, now], "v_new": v[:, now], "rope": rope, "window": window}
        steps.append(decode_attention(q[:, now], **cache, lengths=torch.tensor([t, t]), **new))
    full = full_forward(q, k, v, 16, rope, window)
    torch.testing.assert_close(torch.cat(steps, 1).double(), full, rtol=1e-5, atol=1e-5)


def test_any_order_of_appending_gives_the_same_cache():
    whole = inputs_of(lengths=(4, 4, 4), queries=4, rotary=8)
    _, _, k, v = run(whole)
    cache = {name: whole[name].clone() for name in WRITTEN}
    for i in range(4):
        one = {name: whole[name][:, i : i + 1] for name in ("q", "k_new", "v_new")}
        lengths = whole["lengths"] + i
        decode_attention(**one, **cache, lengths=lengths, rope=whole["rope"])
    assert_equal((cache["k_cache"], cache["v_cache"]), (k, v), equal_nan=True)


def test_a_prefix_is_the_beginning_of_a_cache():
    inputs = inputs_of(prefixes=(9, 4), prefix_id=[1, 0, 1], heads=(4, 2), rotary=8)
    out, lse, *_ = run(inputs)
    for b, p in enumerate([1, 0, 1]):
        m, n = int(inputs["prefix_length"][p]), int(inputs["lengths"][b])
        alone = {name: inputs[name][b : b + 1] for name in ("q", "k_new", "v_new")}
        for name in "kv":
            parts = inputs[f"prefix_{name}"][p, :m], inputs[f"{name}_cache"][b]
            alone[f"{name}_cache"] = torch.cat(parts)[None].clone()
        alone |= {"lengths": torch.tensor([m + n]), "rope": inputs["rope"], "return_lse": True}
        torch.testing.assert_close(run(alone)[:2], (out[b : b + 1], lse[b : b + 1]))


@pytest.fixture
def attended(monkeypatch):
    """(rows, tokens, memory) of the keys that go to the fused attention on the CPU."""
    seen = []
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def watched(q, k, v, **options):
        seen.append((k.shape[0], k.shape[2], k.untyped_storage().data_ptr()))
        return flash(q, k, v, **options)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", watched)
    return seen


def test_the_cpu_path_reads_the_live_slots_only_and_copies_none(attended):
    """Views of the cache go to the fused attention, as long as the row is."""
    inputs = inputs_of(rows=4, lengths=(5, 5, 11, 5), pads=(0, 0, 2, 0), capacity=500)
    decode_attention(**inputs)
    storage = inputs["k_cache"].untyped_storage().data_ptr()
    assert attended == [(2, 6, storage), (1, 10, storage), (1, 6, storage)]


@pytest.mark.parametrize(
    ("which", "lengths", "options", "runs"),
    [
        ([1] * 6, (3, 8, 3, 0, 4, 4), {}, [(6, 9)]),  # wherever in their own caches
        ([0, 1, 2, 0, 1, 2], (3,) * 6, {}, [(3, 9), (3, 9)]),
        ([0, 0, 1, 1, 2, 2], (3,) * 6, {}, [(2, 9)] * 3),
        ([2, 1, 0, 3, 3, 0], (3,) * 6, {}, [(1, 9)] * 3 + [(2, 4), (1, 9)]),
        ([0, 1, 2, 0, 1, 2], (3, 3, 3, 3, 4, 4), {"window": 8}, [(3, 4), (1, 4), (2, 3)]),
    ],
)  # fmt: skip
def test_the_cpu_path_takes_neighboring_prefixes_at_once(
    which, lengths, options, runs, attended, several_threads
):
    """One for all, or one after another, by views; the rows have the bits that they have alone."""
    inputs = inputs_of(6, lengths=lengths, prefixes=(9, 9, 9, 4), prefix_id=which, **options)
    whole = run(inputs)
    alone = Sample("", decode_attention, inputs, (), tuple(n for n in ROWS if n in inputs))
    attended.clear()
    decode_attention(**{**inputs, **{n: inputs[n].clone() for n in WRITTEN}})
    storage = inputs["prefix_k"].untyped_storage().data_ptr()
    assert [(rows, n) for rows, n, memory in attended if memory == storage] == runs
    exact = tuple(t.float() for t in by_hand(inputs))
    torch.testing.assert_close(whole[:2], exact, rtol=1e-5, atol=1e-6)
    for i in range(6):
        part = run(alone.take([i]).inputs)
        assert_equal(part, tuple(t[i : i + 1] for t in whole), equal_nan=True)


def test_reference_is_differentiable():
    inputs = inputs_of(append=False, lengths=(1, 5, 11), unused=0.0, dtype=torch.float64)
    leaves = [inputs[name].requires_grad_() for name in ("q", *WRITTEN)]
    with cgkernels.reference():
        out = decode_attention(**inputs)[0]
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients)


# What is refused ----------------------------------------------------------------------------------
BASE = inputs_of(rotary=8, prefixes=(4, 3), unused=0.0, pads=(0, 1, 2))
CACHE, NEW, PREFIX = BASE["k_cache"], BASE["k_new"], BASE["prefix_k"]
COS, SIN = BASE["rope"]
INTEGERS = torch.zeros(3, dtype=torch.int64)

COUNTERS = torch.zeros(12, dtype=torch.int32)

WRONG = [
    (TypeError, ("counters", "int64"), {"counters": COUNTERS.long()}),
    (ValueError, ("counters", "at least", "(1,)"), {"counters": COUNTERS[:1]}),
    (ValueError, ("counters", "contiguous", "(2,)"), {"counters": COUNTERS.repeat(4)[::2]}),
    (ValueError, ("counters", "cpu", "meta"), {"counters": COUNTERS.to("meta")}),
    (ValueError, ("counters", "zero", "12"), {"counters": COUNTERS + 1}),
    (
        ValueError,
        ("counters", "without k_new"),
        {
            "counters": COUNTERS,
            "k_new": None,
            "v_new": None,
            "lengths": torch.tensor([1, 1, 1]),
        },
    ),
    (TypeError, ("q", "NoneType"), {"q": None}),
    (TypeError, ("q", "int64"), {"q": BASE["q"].long()}),
    (ValueError, ("q", "(B, Sq, Hq, D)", "(3, 1, 2)"), {"q": BASE["q"][..., 0]}),
    (ValueError, ("q", "256", "257"), {"q": torch.zeros(3, 1, 2, 257)}),
    (ValueError, ("q", "requires grad"), {"q": BASE["q"].clone().requires_grad_()}),
    (ValueError, ("k_cache", "(3, S, Hkv, 32)"), {"k_cache": CACHE[:2]}),
    (ValueError, ("k_cache", "(3, S, Hkv, 32)"), {"k_cache": CACHE[..., :16]}),
    (ValueError, ("k_cache", "divisor", "3"), {"k_cache": torch.zeros(3, 15, 3, 32)}),
    (TypeError, ("k_cache", "float32", "float16"), {"k_cache": CACHE.half()}),
    (ValueError, ("k_cache", "cpu", "meta"), {"k_cache": CACHE.to("meta")}),
    (ValueError, ("k_cache", "expanded"), {"k_cache": CACHE[:1].expand(3, -1, -1, -1)}),
    (ValueError, ("v_cache", "(3, 15, 2, 32)"), {"v_cache": CACHE[:, :4]}),
    (TypeError, ("v_cache", "float16"), {"v_cache": CACHE.half()}),
    (TypeError, ("lengths", "float32"), {"lengths": torch.zeros(3)}),
    (TypeError, ("lengths", "int"), {"lengths": 3}),
    (ValueError, ("lengths", "(3,)", "(2,)"), {"lengths": INTEGERS[:2]}),
    (ValueError, ("lengths", "[0, 14]", "15"), {"lengths": torch.tensor([1, 15, 2])}),
    (ValueError, ("lengths", "-1"), {"lengths": torch.tensor([1, -1, 2])}),
    (ValueError, ("lengths", "cpu", "meta"), {"lengths": INTEGERS.to("meta")}),
    (ValueError, ("v_new", "k_new", "None"), {"v_new": None}),
    (ValueError, ("k_new", "v_new", "None"), {"k_new": None}),
    (ValueError, ("k_new", "(3, 1, 2, 32)"), {"k_new": NEW[:, :, :1]}),
    (TypeError, ("v_new", "float64"), {"v_new": NEW.double()}),
    (ValueError, ("k_new", "requires grad"), {"k_new": NEW.clone().requires_grad_()}),
    (TypeError, ("rope", "tuple", "Tensor"), {"rope": COS}),
    (TypeError, ("rope", "float16"), {"rope": (COS.half(), SIN)}),
    (TypeError, ("rope", "NoneType"), {"rope": (COS, None)}),
    (ValueError, ("rope", "R <= 32"), {"rope": (torch.zeros(9, 17), torch.zeros(9, 17))}),
    (ValueError, ("rope", "(15, 4)"), {"rope": (COS[:15], SIN)}),
    (ValueError, ("rope", "14 positions", "5"), {"rope": (COS[:5], SIN[:5])}),
    (ValueError, ("rope", "cpu", "meta"), {"rope": (COS.to("meta"), SIN)}),
    (ValueError, ("position", "(3, 1)", "(3,)"), {"position": INTEGERS}),
    (ValueError, ("position", "[0, 18]", "19"), {"position": INTEGERS[:, None] + 19}),
    (ValueError, ("prefix_v", "prefix_k", "None"), {"prefix_v": None}),
    (ValueError, ("prefix_v", "prefix_k"), {"prefix_k": None}),
    (ValueError, ("prefix_k", "(P > 0, M, 2, 32)"), {"prefix_k": PREFIX[:0]}),
    (ValueError, ("prefix_k", "(2, 6, 2, 32)"), {"prefix_k": PREFIX[:, :, :1]}),
    (TypeError, ("prefix_v", "bfloat16"), {"prefix_v": PREFIX.bfloat16()}),
    (ValueError, ("prefix_length", "[0, 6]", "7"), {"prefix_length": torch.tensor([7, 1])}),
    (ValueError, ("prefix_length", "(2,)"), {"prefix_length": INTEGERS}),
    (ValueError, ("prefix_id", "[0, 1]", "2"), {"prefix_id": torch.tensor([0, 2, 1])}),
    (ValueError, ("prefix_id", "2 prefixes", "None"), {"prefix_id": None}),
    (ValueError, ("left_pad", "[0, 15]", "-1"), {"left_pad": INTEGERS - 1}),
    (ValueError, ("left_pad", "at most lengths"), {"left_pad": torch.tensor([1, 0, 0])}),
    (ValueError, ("window", "0"), {"window": 0}),
    (TypeError, ("window", "True"), {"window": True}),
    (ValueError, ("softcap", "0"), {"softcap": 0}),
    (ValueError, ("softcap", "inf"), {"softcap": math.inf}),
    (ValueError, ("scale", "nan"), {"scale": NAN}),
]


@pytest.mark.parametrize(("error", "words", "changed"), WRONG)
def test_wrong_arguments(error, words, changed):
    call = Sample("wrong", decode_attention, BASE)
    assert_refused(call.replace(**changed), error, *words)


def test_defaults_of_a_single_prefix():
    inputs = inputs_of(prefixes=(6,), prefix_id=[0, 0, 0])
    inputs["prefix_k"], inputs["prefix_v"] = (inputs[f"prefix_{n}"][:, :6] for n in "kv")
    bare = {n: t for n, t in inputs.items() if n not in ("prefix_length", "prefix_id")}
    assert_equal(run(bare), run(inputs), equal_nan=True)


# Kernels ------------------------------------------------------------------------------------------
def assert_kernel_is_accurate(device, *calls, order_seed=0):
    """Within the error budget; several calls are judged as one population."""
    ours, plain, exact, modeled = [], [], [], []
    for inputs in calls:
        with kernels(device, order_seed=order_seed):
            ours.append(run(on(inputs, device)))
        wide = {n: _wide(t) for n, t in inputs.items()}
        with cgkernels.reference():
            here, derived = plain_and_modeled(lambda inputs=inputs: run(inputs))
            plain.append(here)
            modeled.append(derived)
            exact.append(run(wide))
    for i in range(4):  # out, lse, k_cache, v_cache
        got, same, true, model = (
            [results[i] for results in each] for each in (ours, plain, exact, modeled)
        )
        if sum(t.isfinite().sum() for t in true) >= 256:
            assert_within_budget(got, same, true, model)
            continue
        # too few for a root mean square
        for g, s, x, m in zip(got, same, true, model, strict=True):
            g, there = g.cpu(), x.isfinite()
            assert_equal(g[~there].double(), x[~there], equal_nan=True)
            if there.any():
                error, *budgets = (
                    (t[..., there].double() - x[there]).abs().max() for t in (g, s, m)
                )
                assert (
                    error <= 2 * max(budgets) + 2 * torch.finfo(g.dtype).eps * x[there].abs().max()
                )


def _wide(value):
    if isinstance(value, tuple):
        return tuple(t.double() for t in value)
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


def on(inputs, device):
    def move(value):
        if isinstance(value, tuple):
            return tuple(t.to(device) for t in value)
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return {name: move(value) for name, value in inputs.items()}


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("append", [True, False], ids=["append", "cached"])
def test_lengths_around_every_edge(append, dtype, device):
    """Of a block and of a split, with NaN in the slots that hold nothing."""
    split, block = SPLIT[dtype], launch._launch_config(64, dtype.itemsize)["BLOCK"]
    lengths = [n + i for n in (0, block, split, 2 * split) for i in (-1, 0, 1) if n + i >= 0]
    options = {"append": append, "heads": (1, 1), "size": 64, "dtype": dtype}
    assert_kernel_is_accurate(device, inputs_of(len(lengths), lengths=lengths, **options))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_many_splits(dtype, device):
    """One more than are merged at once, and one more than are compared at once."""
    split = SPLIT[dtype]
    lengths = (4 * split + 3, 16 * split + 3)
    options = {"heads": (2, 1), "size": 32, "append": False, "dtype": dtype}
    assert_kernel_is_accurate(device, inputs_of(2, lengths=lengths, **options), order_seed=3)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [20, 32, 64, 80, 96, 100, 128, 256])
def test_head_sizes(size, dtype, device):
    split = launch._launch_config(size, dtype.itemsize)["SPLIT"]
    options = {"size": size, "heads": (4, 2), "rotary": 16, "dtype": dtype}
    assert_kernel_is_accurate(device, inputs_of(2, lengths=(3, split + 9), **options))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("queries", "heads"), [(2, (3, 1)), (5, (2, 2)), (9, (4, 1))])
def test_several_queries(queries, heads, dtype, device):
    """Over the end of a split, and more queries x heads than one tile holds."""
    split = SPLIT[dtype]
    options = {"queries": queries, "heads": heads, "size": 32, "dtype": dtype}
    assert_kernel_is_accurate(
        device,
        inputs_of(2, lengths=(0, split - 2), rotary=32, **options),
        inputs_of(2, lengths=(queries, split + 1), append=False, window=split - 3, **options),
    )


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_options(case, dtype, device):
    """Small, and across a split."""
    small = inputs_of(dtype=dtype, **CASES[case])
    far = {**CASES[case], "window": SPLIT[dtype]} if "window" in CASES[case] else CASES[case]
    lengths = (SPLIT[dtype] + 7, 12, SPLIT[dtype] - 1)
    large = inputs_of(dtype=dtype, **{**far, "lengths": lengths})
    assert_kernel_is_accurate(device, small, heads_first(large))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("queries", [1, 5])
def test_shared_prefixes(queries, dtype, device):
    """Of several splits and of none; groups of more than a tile and of no row."""
    split = SPLIT[dtype]
    # More than the lanes of a tile, and once more than the rows that are looked through at once.
    rows = 20 if dtype == torch.float32 else 70 if queries == 1 else 36
    which = [0] * (rows - 3) + [2, 3, 2]
    made = inputs_of(
        rows, queries, (2, 1) if queries > 1 else (1, 1), 32, [3 * (i % 4) for i in range(rows)],
        prefixes=(split + 5, 9, 0, 2 * split), prefix_id=which, dtype=dtype,
    )  # fmt: skip
    assert_kernel_is_accurate(device, made, order_seed=1)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_windows_that_begin_inside_a_prefix(dtype, device):
    """Rows of one tile then begin with different splits of it, or see nothing of it."""
    split = SPLIT[dtype]
    made = inputs_of(
        5, 2, (2, 1), 32, (0, 3, split - 2, split + 1, 2 * split), prefixes=(2 * split + 5,),
        prefix_id=[0] * 5, pads=(0, 2, 0, 1, 0), window=split + 4, dtype=dtype,
    )  # fmt: skip
    assert_kernel_is_accurate(device, made, order_seed=2)
    sample = Sample("", decode_attention, on(made, device), (), tuple(n for n in ROWS if n in made))
    with kernels(device):
        whole = run(sample.inputs)
        for i in range(5):
            part = run(sample.take([i]).inputs)
            assert_equal(part, tuple(t[i : i + 1] for t in whole), equal_nan=True)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_counters_are_found_and_left_at_zero(device):
    """One after another, calls of other shapes share them; own and shared splits, and too few."""
    counters = torch.zeros(12, dtype=torch.int32, device=device)
    split = SPLIT[torch.float32]
    for made in (
        inputs_of(lengths=(2 * split, 0, split), heads=(4, 2), device=device),
        inputs_of(2, lengths=(0, split), prefixes=(split + 1,), device=device),
        inputs_of(2, lengths=(split, 5), queries=3, device=device),
    ):
        with kernels(device, order_seed=3):
            own = run(made)
            assert own[0].isfinite().all()
            for _ in range(2):
                again = copy.deepcopy(made)
                out, lse = decode_attention(**again, counters=counters)
                written = (again[name] for name in WRITTEN)
                assert_equal((out, lse, *written), own, equal_nan=True)
                assert not counters.any()


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_more_prefixes_than_rows(device):
    """As where every class has a prefix of its own; any row may then be the first of a tile."""
    made = inputs_of(
        5, lengths=(0, 3, 1, 2, 4), prefixes=(4, 150, 7, 3, 0, 6, 2, 9),
        prefix_id=[6, 1, 1, 3, 1], heads=(2, 1),
    )  # fmt: skip
    assert_kernel_is_accurate(device, made)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_a_prefix_is_the_beginning_of_a_cache_on_the_kernel(device):
    made = inputs_of(prefixes=(140, 4), prefix_id=[1, 0, 1], heads=(4, 2), device=device)
    with kernels(device):
        out, lse, *_ = run(made)
        for b, p in enumerate([1, 0, 1]):
            m = int(made["prefix_length"][p])
            alone = {name: made[name][b : b + 1] for name in ("q", "k_new", "v_new")}
            for name in "kv":
                parts = made[f"prefix_{name}"][p, :m], made[f"{name}_cache"][b]
                alone[f"{name}_cache"] = torch.cat(parts)[None].clone()
            alone |= {"lengths": made["lengths"][b : b + 1] + m, "return_lse": True}
            both = out[b : b + 1], lse[b : b + 1]
            torch.testing.assert_close(run(alone)[:2], both, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("device", "dtype", "rows", "shared"),
    [
        pytest.param(*device.values, dtype, rows, shared, marks=device.marks)
        for device, dtype, rows, shared in product(KERNEL_DEVICES, FLOATS, (10, 64), (False, True))
        # 64 rows in one dtype only in the interpreter, which takes its time
        if rows == 10 or device.values == ("cuda",) or (dtype, shared) == (torch.float16, True)
    ],
)
def test_a_row_has_the_same_bits_in_any_batch(shared, rows, dtype, device):
    """Alone, with others at other lengths, permuted, in any order of the programs."""
    split = SPLIT[dtype]
    lengths = [split + 3, 0, 2 * split, 5, *((37 * i) % 23 for i in range(4, rows))]
    prefixes = {"prefixes": (split + 2, 5, 9), "prefix_id": [i % 3 for i in range(rows)]}
    made = inputs_of(
        rows, 1, (1, 1), 32, lengths, dtype=dtype, device=device, **(prefixes if shared else {})
    )
    sample = Sample("", decode_attention, made, (), tuple(n for n in ROWS if n in made))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()
    with kernels(device):
        whole = run(made)
    assert whole[0].isfinite().all() and whole[1].isfinite().all()
    for some in ([0], [2], [3, 0], [1, 9, 2, 0, 7], order):
        with kernels(device, order_seed=len(some)):
            part = run(sample.take(some).inputs)
        assert_equal(part, tuple(t[some] for t in whole), equal_nan=True)


@pytest.fixture
def several_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3  # as it was before the calls
    torch.set_num_threads(threads)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rows", [2, 9, 70, 300])
@pytest.mark.parametrize("seed", range(3))
def test_a_row_has_the_same_bits_in_any_batch_on_the_cpu(seed, rows, softcap, several_threads):
    """Many rows: a last bit that depends on the place in a vector is seen in one of thirty."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (3 * torch.randn(rows, n, 4, 8, generator=generator) for n in (1, 7, 7))
    prefix = torch.randn(rows, 5, 4, 8, generator=generator)
    lengths = torch.full((rows,), 3 + seed)

    def attend(some):
        return decode_attention(
            q[some], k[some], v[some], lengths[some], prefix_k=prefix[some],
            prefix_v=prefix[some], prefix_id=torch.arange(len(some)), softcap=softcap,
            return_lse=True,
        )  # fmt: skip

    everything = torch.arange(rows)
    whole = attend(everything)
    order = torch.randperm(rows, generator=generator)
    for some in (*everything[-40:].split(1), order[: rows // 2 + 1], order):
        assert_equal(attend(some), tuple(t[some] for t in whole))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_appending_is_the_same_as_having_appended(device):
    """To the bit: new tokens are read back from the cache."""
    made = inputs_of(lengths=(0, 126, 130), queries=3, heads=(4, 2), device=device)
    with kernels(device):
        out, lse, k, v = run(made)
        later = {**made, "k_cache": k, "v_cache": v, "lengths": made["lengths"] + 3}
        later |= {"k_new": None, "v_new": None}
        assert_equal(run(later)[:2], (out, lse))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("append", [True, False], ids=["append", "cached"])
def test_what_cannot_be_refused_is_not_a_number(append, device):
    """Rows that overflow their cache or have no prefix; nothing of theirs is written."""
    made = inputs_of(
        6, append=append, lengths=(2,) * 6, capacity=140, prefixes=(4, 131), heads=(2, 1),
        prefix_id=[0, 1, 0, 1, 0, 1], pads=(0,) * 6, device=device,
    )  # fmt: skip
    with kernels(device):
        good = run(made)
    options = (None, None, None, *(made[f"prefix_{n}"] for n in ("k", "v", "length", "id")))
    new = (made["k_new"], made["v_new"], None) if append else ()
    wrong_length = torch.tensor([2, 140 + (not append), 2, -1, 2, 2**40], device=device)
    for name, lengths, ids in (
        ("lengths", wrong_length, made["prefix_id"]),
        ("prefix_id", made["lengths"], torch.tensor([0, 2, 0, -1, 0, 7], device=device)),
    ):
        arguments = (*options[:-1], ids, made["left_pad"], False, 2**30, 0.0, 32**-0.5)
        call = OpCall(
            OPS["decode_attention_append" if append else "decode_attention_fwd"],
            (made["q"], made["k_cache"], made["v_cache"], lengths, *new, *arguments),
        )
        results = kernel_results(call)
        assert all(t[1::2].isnan().all() for t in results[:2]), name
        assert_equal(
            [t[::2] for t in results], [t[::2] for t in good[: len(results)]], equal_nan=True
        )
        if append:
            caches = (made["k_cache"], made["v_cache"])
            assert_equal(results[2][1::2], caches[0][1::2], equal_nan=True)
            assert_equal(results[3][1::2], caches[1][1::2], equal_nan=True)
        if device == "cpu":  # where a compiled graph cannot refuse them either
            assert_equal([t.isnan() for t in call.run()], [t.isnan() for t in results])


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_a_position_outside_the_tables_is_not_a_number(device):
    made = inputs_of(4, lengths=(0, 5, 11, 2), rotary=8, device=device)
    cos, sin = made["rope"]
    position = torch.tensor([[3], [cos.shape[0]], [-1], [2**32 + 3]], device=device)
    args = (
        made["q"], made["k_cache"], made["v_cache"], made["lengths"], made["k_new"], made["v_new"],
        None, cos, sin, position, None, None, None, None, None, False, 2**30, 0.0, 0.2,
    )  # fmt: skip
    out, lse, k, _ = kernel_results(OpCall(OPS["decode_attention_append"], args))
    assert out[1:].isnan().all() and lse[1:].isnan().all()
    assert out[0].isfinite().all() and lse[0].isfinite().all()
    assert k[1, 5, :, :8].isnan().all() and k[1, 5, :, 8:].isfinite().all()


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_rows_that_see_nothing(device):
    """Zero and -inf, whatever lies in the cache; with a prefix and without."""
    for shared in ({}, {"prefixes": (0, 0)}):
        made = inputs_of(append=False, lengths=(0, 0, 0), queries=2, device=device, **shared)
        with kernels(device):
            out, lse, *_ = run(made)
        assert_equal(out, torch.zeros_like(out))
        assert_equal(lse, torch.full_like(lse, -torch.inf))


@triton.jit
def _tanh_kernel(out_ptr, x_ptr, N: tl.constexpr):
    """One program: tanh of all."""
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tanh(tl.load(x_ptr + i)))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_tanh(device):
    """Within 3e-7 of the value, small ones included."""
    x = torch.cat([torch.linspace(-20, 20, 2048), torch.logspace(-30, 1, 2048)]).to(device)
    out = torch.empty_like(x)
    _tanh_kernel[(1,)](out, x, 4096, enable_fp_fusion=True)
    exact = torch.tanh(x.double())
    assert ((out.double() - exact).abs() <= 3e-7 * exact.abs()).all()


# Launch configuration -----------------------------------------------------------------------------
def test_splits_depend_on_head_size_and_dtype_alone():
    for dtype in FLOATS:
        for size in (32, 64, 65, 128, 129, 256):
            config = launch._launch_config(size, dtype.itemsize)
            assert config["SPLIT"] % config["BLOCK"] == 0
            padded = 1 << (size - 1).bit_length()
            assert 32 << 10 <= 2 * config["SPLIT"] * padded * dtype.itemsize <= 256 << 10


@pytest.mark.parametrize(
    ("others", "splits", "width"),
    [(1, 8, 8), (256, 8, 8), (257, 8, 7), (2048, 8, 1), (10**6, 8, 1), (0, 1, 1), (1, 0, 1)],
)
def test_programs_that_share_the_splits_of_a_unit(others, splits, width):
    assert launch._width(others, splits) == width
