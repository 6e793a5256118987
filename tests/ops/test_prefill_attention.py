"""prefill_attention: the definition, gradients, its agreement with decode_attention."""

import contextlib
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import cgkernels
from cgkernels import decode_attention, prefill_attention
from cgkernels.testing import assert_within_budget, plain_and_modeled
from tests.support import (
    FLOATS,
    Sample,
    assert_nothing_hidden,
    assert_refused,
    compiled,
    diverse,
    normals,
)

LAUNCHERS: dict = {}

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def samples(dtype, device):
    """None: it registers no op, so that what every op must hold to is PyTorch's to hold."""
    return iter(())


def inputs_of(rows=3, length=37, heads=(4, 2), size=32, dtype=torch.float32, device="cpu", **how):
    q_heads, kv_heads = heads
    made = {
        name: normals(rows, length, n, size, dtype=dtype, device=device, seed=seed)
        for seed, (name, n) in enumerate((("q", q_heads), ("k", kv_heads), ("v", kv_heads)))
    }
    how = {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in how.items()}
    return {**made, **how}


CASES = {
    "plain": {},
    "every head its own keys": {"heads": (3, 3)},
    "one key head": {"heads": (3, 1), "size": 20, "scale": 0.1},
    "prefix": {"bidirectional": 9},
    "prefix of one": {"bidirectional": 1},
    "all bidirectional": {"bidirectional": 37},
    "prefixes": {"bidirectional": torch.tensor([0, 9, 37])},
    "left padding": {"left_pad": torch.tensor([0, 5, 36])},
    "left padding, prefix": {"left_pad": torch.tensor([0, 5, 37]), "bidirectional": 4},
    "window": {"window": 5},
    "window, prefix": {"window": 5, "bidirectional": 9, "left_pad": torch.tensor([2, 0, 7])},
    "window of all": {"window": 37, "bidirectional": 3},
    "softcap": {"softcap": 1.5, "scale": 1.0, "bidirectional": torch.tensor([3, 0, 1])},
}


def by_hand(inputs):
    """Every query one by one, in float64."""
    q, k, v = (inputs[name].detach().double().cpu() for name in "qkv")
    rows, length, q_heads, size = q.shape
    scale, softcap = inputs.get("scale", size**-0.5), inputs.get("softcap")
    window = inputs.get("window") or length

    def of_row(name, b):
        value = inputs.get(name, 0)
        return int(value[b]) if isinstance(value, torch.Tensor) else value

    out = torch.zeros_like(q)
    for b in range(rows):
        pad = of_row("left_pad", b)
        block = pad + of_row("bidirectional", b)
        for i in range(pad, length):
            seen = [j for j in range(pad, i + 1) if j > i - window or i < block]
            seen += range(i + 1, block) if i < block else ()
            for h in range(q_heads):
                kv = h // (q_heads // k.shape[2])
                score = scale * k[b, seen, kv] @ q[b, i, h]
                score = softcap * torch.tanh(score / softcap) if softcap else score
                out[b, i, h] = score.softmax(0) @ v[b, seen, kv]
    return out


@pytest.mark.parametrize("case", CASES)
def test_it_is_softmax_of_scores_times_values(case):
    inputs = inputs_of(dtype=torch.float64, **CASES[case])
    torch.testing.assert_close(prefill_attention(**inputs), by_hand(inputs))
    with cgkernels.reference():
        torch.testing.assert_close(prefill_attention(**inputs), by_hand(inputs))


def values_and_gradients(inputs, dtype=None):
    """The output and the gradients of q, k and v, for a fixed gradient of the output."""
    leaves = [inputs[n].detach().to(dtype or inputs[n].dtype).requires_grad_() for n in "qkv"]
    out = prefill_attention(**{**inputs, **dict(zip("qkv", leaves, strict=True))})
    seed = normals(*out.shape, dtype=inputs["q"].dtype, device=out.device, seed=7).to(out.dtype)
    return out, *torch.autograd.grad(out, leaves, seed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype, device):
    """Against float64 and against plain PyTorch of the same dtype, which keeps all scores."""
    inputs = inputs_of(dtype=dtype, device=device, **CASES[case])
    ours = values_and_gradients(inputs)
    on_cpu = {n: t.cpu() if isinstance(t, torch.Tensor) else t for n, t in inputs.items()}
    with cgkernels.reference():
        plain, modeled = plain_and_modeled(lambda: values_and_gradients(inputs))
        exact = values_and_gradients(on_cpu, torch.float64)
    for got, same, true, model in zip(ours, plain, exact, modeled, strict=True):
        assert got.dtype == dtype
        assert_within_budget(got, same, true, model)


def by_hand_of_finite(inputs):
    """by_hand; NaN for a query that sees a key that is not finite, or is not itself."""
    k, q = (inputs[n].isfinite().all(3, keepdim=True) for n in "kq")
    nan = {"k": torch.where(k, inputs["k"], math.nan), "q": torch.where(q, inputs["q"], math.nan)}
    return by_hand({**inputs, **nan})


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_what_is_not_finite_reaches_those_who_see_it_alone(case, reference):
    """Forward; and backward, where no gradient comes from them, as if it were not there."""
    inputs = inputs_of(**CASES[case])
    for name, token, value in (
        ("k", 36, math.nan), ("k", 5, -math.inf), ("v", 20, math.inf), ("v", 8, math.nan),
        ("q", 7, math.nan), ("q", 0, math.inf),
    ):  # fmt: skip
        tensor = inputs[name].clone()
        tensor[1, token, 0, 3] = value
        clean = {**inputs, name: tensor.nan_to_num(2.0, 2.0, 2.0)}
        expected = by_hand_of_finite({**inputs, name: tensor})
        with cgkernels.reference() if reference else contextlib.nullcontext():
            ours, theirs = (
                gradients_where_finite(made, expected) for made in ({**inputs, name: tensor}, clean)
            )
        words = f"{name} {token} {value}"
        assert_nothing_hidden(ours[:1], [expected], words, eps=1e-5)
        torch.testing.assert_close(ours[1:], theirs[1:], msg=lambda m, w=words: f"{w}: {m}")


def gradients_where_finite(inputs, of):
    """The output and the gradients of q, k and v, of the results that are finite in `of`."""
    leaves = {n: inputs[n].clone().requires_grad_() for n in "qkv"}
    out = prefill_attention(**{**inputs, **leaves})
    seed = normals(*out.shape, seed=7).masked_fill(~of.isfinite(), 0)
    gradients = torch.autograd.grad(out, list(leaves.values()), seed)
    return [out.detach().double(), *gradients]


def test_padding_may_be_anything():
    """Queries, too: 0 times the gradient of NaN is NaN."""
    inputs = inputs_of(**CASES["left padding"])
    spoiled = {n: inputs[n].clone() for n in "qkv"}
    for tensor in spoiled.values():
        tensor[1, :5], tensor[2, :36] = math.nan, math.inf
    ours = values_and_gradients({**inputs, **spoiled})
    torch.testing.assert_close(ours, values_and_gradients(inputs))
    assert not any(t[1, :5].any() for t in ours)


def test_two_tokens_and_a_key_that_is_not_a_number():
    one, k = torch.ones(1, 2, 1, 1), torch.tensor([1.0, math.nan]).view(1, 2, 1, 1)
    for options in ({}, {"window": 1}, {"window": 2}, {"softcap": 1.0}, {"bidirectional": 1}):
        assert prefill_attention(one, k, one, **options).flatten().isnan().tolist() == [False, True]
        assert prefill_attention(one, one, k, **options).flatten().isnan().tolist() == [False, True]
    assert prefill_attention(one, k, one, bidirectional=2).isnan().all()


@pytest.mark.parametrize("reference", [False, True])
def test_a_prefix_that_padding_leaves_no_room_for(reference):
    """Five tokens of padding and a prefix of all 37: it ends with the row, NaN or not."""
    whole = {"left_pad": torch.tensor([0, 5, 36]), "bidirectional": 37}
    room = {**whole, "bidirectional": torch.tensor([37, 32, 1])}
    inputs = inputs_of(**whole)
    inputs["k"][1, 36, 0, 3] = math.nan
    with cgkernels.reference() if reference else contextlib.nullcontext():
        out = prefill_attention(**inputs)
        torch.testing.assert_close(out, prefill_attention(**{**inputs, **room}), equal_nan=True)
    assert out[1, 5:, :2].isnan().all() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("reference", [False, True])
def test_autocast_changes_nothing(reference):
    for case in ("plain", "window", "softcap", "left padding, prefix"):
        inputs = inputs_of(**CASES[case])
        with cgkernels.reference() if reference else contextlib.nullcontext():
            expected = prefill_attention(**inputs)
            with torch.autocast("cpu", torch.bfloat16):
                found = prefill_attention(**inputs)
        assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("scale", [0.0, -0.0, -0.3])
@pytest.mark.parametrize("case", ["plain", "prefix", "window", "left padding", "softcap"])
def test_scales_that_are_not_positive(case, scale):
    inputs = inputs_of(dtype=torch.float64, **{**CASES[case], "scale": scale})
    ours = values_and_gradients(inputs)
    torch.testing.assert_close(ours[0], by_hand(inputs))
    with cgkernels.reference():
        torch.testing.assert_close(ours, values_and_gradients(inputs))


@pytest.mark.parametrize("case", ["plain", "prefix", "window", "softcap"])
@pytest.mark.parametrize(
    "strides", [(5, 1, 3, 1), (0, 0, 8, 1), (1, 16, 8, 1), (8, 8, 8, 1), (3, 0, 1, 2), (9, 9, 9, 0)]
)
def test_tensors_that_overlap_in_memory(strides, case):
    inputs = inputs_of(heads=(2, 2), size=8, **CASES[case])
    memory = normals(1000)
    for name in "qkv":
        changed = {**inputs, name: memory.as_strided(inputs[name].shape, strides)}
        out = prefill_attention(**changed)
        torch.testing.assert_close(out.double(), by_hand(changed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 2.0}], ids=str)
def test_it_is_what_decoding_computes_token_by_token(options, device):
    """Behind a bidirectional prefix that is shared, its keys and values stored once."""
    # A window applies to tokens of a prefix in the cache as to any others.
    prefix = 0 if "window" in options else 6
    inputs = inputs_of(3, 21, device=device, bidirectional=prefix, **options)
    for name in "kv":
        inputs[name][:, :prefix] = inputs[name][:1, :prefix]
    out = prefill_attention(**inputs)
    q, k, v = (inputs[name] for name in "qkv")
    cache = {f"{n}_cache": torch.full_like(k, math.nan) for n in "kv"}
    if prefix:
        options = {**options, "prefix_k": k[:1, :prefix], "prefix_v": v[:1, :prefix]}
    for t in range(prefix, 21):
        now = slice(t, t + 1)
        step = decode_attention(
            q[:, now], **cache, lengths=torch.full((3,), t - prefix, device=device),
            k_new=k[:, now], v_new=v[:, now], **options,
        )  # fmt: skip
        torch.testing.assert_close(step, out[:, now], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["plain", "prefix", "left padding"])
def test_layouts(case):
    """Heads before tokens, and slices of one product."""
    inputs = inputs_of(heads=(2, 2), **CASES[case])
    expected = prefill_attention(**inputs)
    first = {n: inputs[n].transpose(1, 2).contiguous().transpose(1, 2) for n in "qkv"}
    sliced = dict(zip("qkv", torch.cat([inputs[n] for n in "qkv"], 2).split(2, 2), strict=True))
    for made in (first, sliced):
        torch.testing.assert_close(prefill_attention(**{**inputs, **made}), expected)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(("rows", "length"), [(0, 5), (3, 0), (2, 1)])
@pytest.mark.parametrize("options", [{}, {"bidirectional": 1}, {"window": 1}, {"softcap": 2.0}])
def test_few_tokens(options, rows, length, reference):
    options = {n: min(value, length) if n == "bidirectional" else value
               for n, value in options.items()}  # fmt: skip
    inputs = inputs_of(rows, length, **options)
    leaves = [inputs[name].requires_grad_() for name in "qkv"]
    if reference:
        with cgkernels.reference():
            out = prefill_attention(**inputs)
    else:
        out = prefill_attention(**inputs)
    assert out.shape == inputs["q"].shape
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(g.shape == x.shape for g, x in zip(gradients, leaves, strict=True))


DIVERSE = diverse(
    [Sample(case, prefill_attention, inputs_of(**changes)) for case, changes in CASES.items()]
)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in DIVERSE else [pytest.mark.slow]) for c in CASES]
)
def test_it_compiles_to_one_graph(case):
    inputs = inputs_of(**CASES[case])
    counts, run = compiled(Sample("", prefill_attention, inputs))
    inputs = {n: t.requires_grad_() if n in "qkv" else t for n, t in inputs.items()}
    (out,) = run(inputs)
    leaves = [inputs[name] for name in "qkv"]
    expected = prefill_attention(**inputs)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
    )
    assert counts == {"forward": 1, "backward": 1}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["reference", "math"])
def test_second_derivatives(way, case):
    made = inputs_of(2, 5, (2, 1), 4, torch.float64)
    leaves = [made[name].requires_grad_() for name in "qkv"]

    def shorter(name, value):
        if name == "left_pad":
            return value[:2].clamp(max=5)
        return value[:2].clamp(max=5) if isinstance(value, torch.Tensor) else min(value, 5)

    options = {n: v for n, v in CASES[case].items() if n not in ("heads", "size")}
    options = {n: shorter(n, v) for n, v in options.items()}

    def run(*leaves):
        with cgkernels.reference() if way == "reference" else sdpa_kernel(SDPBackend.MATH):
            return prefill_attention(*leaves, **options)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_no_mask_where_none_is_needed(monkeypatch):
    """It would keep PyTorch's fastest kernels out."""
    seen = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, attn_mask=None, **options):
        seen.append(attn_mask is None)
        return plain(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    for case, calls in (
        ("plain", [True]), ("prefix", [True] * 2), ("all bidirectional", [True]),
        ("window of all", [True] * 2), ("window", [False]), ("prefixes", [False]), ("softcap", []),
    ):  # fmt: skip
        seen.clear()
        prefill_attention(**inputs_of(**CASES[case]))
        assert seen == calls, case


BASE = inputs_of(left_pad=torch.tensor([0, 1, 2]))
K = BASE["k"]
INTEGERS = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "words", "changed"),
    [
        (TypeError, ("q", "int64"), {"q": BASE["q"].long()}),
        (ValueError, ("q", "(B, T, Hq, D > 0)"), {"q": BASE["q"][0]}),
        (ValueError, ("k", "(3, 37, Hkv, 32)"), {"k": K[:, :36]}),
        (ValueError, ("k", "(3, 37, Hkv, 32)"), {"k": K[..., :16]}),
        (ValueError, ("k", "divisor", "4"), {"k": torch.zeros(3, 37, 3, 32)}),
        (TypeError, ("k", "float16"), {"k": K.half()}),
        (ValueError, ("k", "meta"), {"k": K.to("meta")}),
        (ValueError, ("v", "(3, 37, 2, 32)"), {"v": K[:, :, :1]}),
        (TypeError, ("v", "float64"), {"v": K.double()}),
        (TypeError, ("bidirectional", "True"), {"bidirectional": True}),
        (TypeError, ("bidirectional", "2.0"), {"bidirectional": 2.0}),
        (ValueError, ("bidirectional", "0 to 37", "38"), {"bidirectional": 38}),
        (ValueError, ("bidirectional", "[0, 37]", "-1"), {"bidirectional": INTEGERS - 1}),
        (ValueError, ("bidirectional", "(3,)"), {"bidirectional": INTEGERS[:2]}),
        (ValueError, ("left_pad", "[0, 37]", "38"), {"left_pad": INTEGERS + 38}),
        (TypeError, ("left_pad", "int"), {"left_pad": 3}),
        (ValueError, ("window", "0"), {"window": 0}),
        (TypeError, ("window", "True"), {"window": True}),
        (ValueError, ("softcap", "-1"), {"softcap": -1.0}),
        (ValueError, ("scale", "nan"), {"scale": math.nan}),
    ],
)
def test_wrong_arguments(error, words, changed):
    assert_refused(Sample("", prefill_attention, BASE).replace(**changed), error, *words)
