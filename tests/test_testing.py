"""The error budget, the input makers and the guards of cgkernels.testing."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cgkernels.testing import (
    assert_within_budget,
    guarded,
    layouts,
    modeled_rounding,
    plain_and_modeled,
    values,
)

HALF = (torch.bfloat16, torch.float16)


def matmul_case(dtype, k=512):
    """(product in dtype, product in float64, the inputs) of a 64 x 64 matrix product."""
    generator = torch.Generator().manual_seed(k)
    a, b = (torch.randn(64, k, generator=generator).to(dtype) for _ in range(2))
    return a @ b.T, a.double() @ b.double().T, (a, b)


def accumulated_in(dtype, a, b):
    out = torch.zeros(a.shape[0], b.shape[0], dtype=dtype)
    for k in range(0, a.shape[1], 64):
        out += (a[:, k : k + 64].float() @ b[:, k : k + 64].float().T).to(dtype)
    return out


def truncated(x, dtype):
    """float32 x cut to dtype, toward zero."""
    rounded = x.to(dtype)
    toward_zero = torch.nextafter(rounded, torch.zeros_like(rounded))
    return torch.where(rounded.float().abs() > x.abs(), toward_zero, rounded)


# Error budget -------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("k", [64, 512, 2048])
def test_a_right_result_is_within_budget(dtype, k):
    same, exact, (a, b) = matmul_case(dtype, k)
    assert_within_budget((a.float() @ b.float().T).to(dtype), same, exact)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "mutant",
    [
        lambda a, b: accumulated_in(a.dtype, a, b),
        lambda a, b: ((a.float() @ b.float().T) * (1 + torch.finfo(a.dtype).eps)).to(a.dtype),
        lambda a, b: truncated(a.float() @ b.float().T, a.dtype),
        lambda a, b: (a.float() @ b.float().T).to(a.dtype).roll(1),
        lambda a, b: torch.zeros(64, 64, dtype=a.dtype),
    ],
    ids=["rounded accumulator", "scaled", "truncated", "shifted", "zero"],
)
def test_a_lossy_result_is_not(dtype, mutant):
    same, exact, (a, b) = matmul_case(dtype)
    with pytest.raises(AssertionError, match=r"(?s)rms error .* times its .*max error .* times"):
        assert_within_budget(mutant(a, b), same, exact)


@pytest.mark.parametrize("dtype", HALF)
def test_sixteen_bits_may_have_one_and_a_half_times_the_error_of_plain_pytorch(dtype):
    same, exact, (a, b) = matmul_case(dtype)
    lossy = truncated(a.float() @ b.float().T, dtype)  # twice the error: a third of it, and a half
    assert_within_budget(torch.where(torch.arange(64) % 3 == 0, lossy, same), same, exact)
    with pytest.raises(AssertionError, match="rms error"):
        assert_within_budget(torch.where(torch.arange(64) % 2 == 0, lossy, same), same, exact)


def test_one_wrong_value_in_many_fails_by_the_maximum():
    same, exact, _ = matmul_case(torch.bfloat16, 2048)
    same, exact = same.expand(64, 64, 64), exact.expand(64, 64, 64)
    actual = same.clone()
    actual[3, 5, 7] += 4 * actual.abs().max() * torch.finfo(torch.bfloat16).eps
    rms = (actual.double() - exact).square().mean() / (same.double() - exact).square().mean()
    assert rms < 1.5**2
    with pytest.raises(AssertionError, match="max error"):
        assert_within_budget(actual, same, exact)


def test_float32_may_have_twice_the_error_of_plain_pytorch():
    exact = torch.randn(1000, dtype=torch.float64)
    same = (exact * (1 + 1e-6)).float()
    assert_within_budget((exact * (1 + 1.8e-6)).float(), same, exact)
    with pytest.raises(AssertionError, match="rms error"):
        assert_within_budget((exact * (1 + 2.2e-6)).float(), same, exact)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_where_plain_pytorch_is_exact_no_error_is_allowed(dtype):
    x = torch.arange(300, dtype=dtype) % 128
    assert_within_budget(x.clone(), x, x.double())
    wrong = x.clone()
    wrong[7] += wrong[7] * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match="inf times"):
        assert_within_budget(wrong, x, x.double())


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_must_stand_where_the_references_have_them(special):
    exact = torch.randn(300, dtype=torch.float64)
    same = exact.float()
    with_special = same.clone()
    with_special[5] = special
    with pytest.raises(AssertionError, match="result and reference differ in NaN or infinity at 1"):
        assert_within_budget(with_special, same, exact)
    with pytest.raises(AssertionError, match="the two references differ"):
        assert_within_budget(same, with_special, exact)
    exact[5] = special
    with pytest.raises(AssertionError, match="the two references differ"):
        assert_within_budget(same, same, exact)
    with pytest.raises(AssertionError, match="result and reference"):
        assert_within_budget(same, with_special, exact)
    with pytest.raises(AssertionError, match="result and reference"):
        assert_within_budget(torch.full_like(same, special), with_special, exact)
    assert_within_budget(with_special, with_special, exact)
    if special == special:  # not NaN
        opposite = with_special.clone()
        opposite[5] = -special
        with pytest.raises(AssertionError, match="result and reference"):
            assert_within_budget(opposite, with_special, exact)


def test_overflow_of_the_dtype_is_infinity_in_both_references():
    exact = torch.linspace(1e4, 1e5, 300, dtype=torch.float64)
    same = exact.half()
    assert same.isinf().any() and exact.isfinite().all()
    assert_within_budget(same.clone(), same, exact)


def test_several_tensors_are_one_population():
    # One sum is exact in plain PyTorch by luck, the other not: judged alone, the first would fail.
    exact = [torch.ones(1).double(), torch.linspace(1, 2, 300, dtype=torch.float64) / 3]
    same = [e.bfloat16() for e in exact]
    off = [same[0] * (1 + torch.finfo(torch.bfloat16).eps), same[1].clone()]
    assert_within_budget(off, same, exact)
    assert_within_budget(tuple(off), tuple(same), tuple(exact))
    with pytest.raises(AssertionError, match="rms"):
        assert_within_budget(off[0], same[0], exact[0])


def test_wrong_shapes_dtypes_and_counts_are_named():
    exact = torch.randn(8, 3, dtype=torch.float64)
    same = exact.float()
    with pytest.raises(AssertionError, match=r"result 0 has shape \(3, 8\)"):
        assert_within_budget(same.T, same, exact)
    with pytest.raises(AssertionError, match=r"has shape \(1, 3\)"):  # would broadcast
        assert_within_budget(same[:1], same, exact)
    with pytest.raises(AssertionError, match=r"result 0 is .*bfloat16"):
        assert_within_budget(same.bfloat16(), same, exact)
    with pytest.raises(AssertionError, match="result 1 is"):
        assert_within_budget([same, same.half()], [same, same.half()], [exact, exact])
    with pytest.raises(AssertionError, match="1 results, 2 and 2 references"):
        assert_within_budget([same], [same, same], [exact, exact])
    with pytest.raises(AssertionError, match="0 results"):
        assert_within_budget([], [], [])
    with pytest.raises(TypeError, match="float64_reference must be float64"):
        assert_within_budget(same, same, same)
    with pytest.raises(TypeError, match="actual must be float32, float16 or bfloat16"):
        assert_within_budget(exact, exact, exact)


def test_empty_results_need_only_the_right_shape():
    x = torch.empty(0, 4)
    assert_within_budget(x, x, x.double())
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(torch.empty(4, 0), x, x.double())


@given(
    seed=st.integers(0, 2**31),
    scale=st.floats(1e-6, 1e6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_plain_pytorch_is_within_its_own_budget(seed, scale, dtype):
    x = torch.randn(300, generator=torch.Generator().manual_seed(seed)).double() * scale
    assert_within_budget(x.to(dtype), x.to(dtype), x)


# Sums ---------------------------------------------------------------------------------------------
def linear_case(k, rows=1, positive=False, seed=0):
    """x, weight, their product in float64 and as modeled: 300 outputs, as those of norm_linear."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, k, generator=generator) for n in (rows, 300))
    if positive:
        x, weight = x.abs(), weight.abs()
    # Plain PyTorch can be no better than this, on any processor.
    exact = x.double() @ weight.double().T
    modeled = plain_and_modeled(lambda: F.linear(x, weight))[1]
    return x, weight, exact, modeled


def terms(x, weight):
    """The products, in float32, those of a sum along the first dimension."""
    return (x[:, None] * weight).movedim(-1, 0)


def in_sequence(terms):
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def in_lanes(terms, lanes):
    return in_sequence(in_sequence(terms.unflatten(0, (-1, lanes))))


def in_blocks(terms, size):
    return in_sequence(torch.stack([in_sequence(block) for block in terms.split(size)]))


def by_pairs(terms):
    while len(terms) > 1:
        if len(terms) % 2:
            terms = torch.cat([terms, torch.zeros_like(terms[:1])])
        terms = terms[::2] + terms[1::2]
    return terms[0]


ORDERS = {
    "4 lanes": lambda terms: in_lanes(terms, 4),
    "8 lanes": lambda terms: in_lanes(terms, 8),
    "16 lanes": lambda terms: in_lanes(terms, 16),
    "by pairs": by_pairs,
    "blocks of 64": lambda terms: in_blocks(terms, 64),
    "blocks of 256": lambda terms: in_blocks(terms, 256),
    "blocks of 512": lambda terms: in_blocks(terms, 512),
}


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("k", [128, 384, 1536, 3072])
@pytest.mark.parametrize("order", ORDERS)
def test_sums_in_any_order_of_a_library_are_within_budget(order, k, rows, positive):
    x, weight, exact, modeled = linear_case(k, rows, positive)
    assert_within_budget(ORDERS[order](terms(x, weight)), exact.float(), exact, modeled)


@pytest.mark.parametrize("k", [40, 130, 384, 512])
def test_short_sums_may_be_in_one_sequence(k):
    x, weight, exact, modeled = linear_case(k)
    assert_within_budget(in_sequence(terms(x, weight)), exact.float(), exact, modeled)


def accumulated_in_bfloat16(terms):
    total = torch.zeros_like(terms[0])
    for block in terms.split(64):
        total = (total + block.sum(0)).bfloat16().float()
    return total


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(
    "mutant",
    [in_sequence, accumulated_in_bfloat16, lambda terms: by_pairs(terms[:-1])],
    ids=["sequence", "bfloat16", "dropped term"],
)
def test_a_long_sum_that_is_lossy_is_not(mutant, rows, positive):
    x, weight, exact, modeled = linear_case(1536, rows, positive)
    with pytest.raises(AssertionError, match=r"rms error .* times the model's"):
        assert_within_budget(mutant(terms(x, weight)), exact.float(), exact, modeled)


def test_a_result_that_is_no_worse_than_plain_pytorch_is_within_budget():
    """Where a library itself sums in sequence, what calls it cannot do better."""
    x, weight, exact, modeled = linear_case(1536)
    plain = in_sequence(terms(x, weight))
    assert_within_budget(plain.clone(), plain, exact, modeled)
    worse = exact + 1.1 * (plain.double() - exact)
    with pytest.raises(AssertionError, match="times its"):
        assert_within_budget(worse.float(), plain, exact, modeled)


@pytest.mark.parametrize("dtype", HALF)
def test_half_types_are_rounded_once_in_the_model_too(dtype):
    a, b = matmul_case(dtype)[2]
    exact = a.double() @ b.double().T
    modeled = plain_and_modeled(lambda: a @ b.T)[1]
    right = (a.float() @ b.float().T).to(dtype)
    assert_within_budget(right, exact.to(dtype), exact, modeled)
    with pytest.raises(AssertionError, match="rms error"):
        assert_within_budget(accumulated_in(dtype, a, b), exact.to(dtype), exact, modeled)


def test_the_model_has_the_error_that_its_formula_says():
    """2/3 of 1.5 times the error of runs of 512: what such runs have, added up in float32."""
    x, weight, exact, modeled = linear_case(1536, 8)
    runs = in_blocks(terms(x, weight), 512)
    ratio = (modeled - exact).square().mean() / (runs - exact).square().mean()
    assert ratio.sqrt() == pytest.approx(0.75, rel=0.1)


def test_the_model_is_the_same_when_repeated_and_leaves_what_it_is_given():
    x, weight = torch.randn(5, 70), torch.randn(9, 70)
    before = x.clone()

    def run():
        total = torch.zeros(5, 9)
        torch.mm(x, weight.T, out=total)
        return total.div_(10).exp_().addmm_(x, weight.T), x.var(1), x.cumsum(1)

    (plain, model), (_, again) = plain_and_modeled(run), plain_and_modeled(run)
    assert all(torch.equal(a, b) for a, b in zip(model, again, strict=True))
    assert torch.equal(x, before)
    for here, draws in zip(plain, model, strict=True):
        assert draws.shape[1:] == here.shape and draws.dtype == here.dtype
        assert not torch.equal(draws[0], draws[1])
        torch.testing.assert_close(draws, here.expand_as(draws), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.layer_norm(x, (33,)), lambda x: F.rms_norm(x, (33,)),
        lambda x: F.group_norm(x, 5), lambda x: F.instance_norm(x),
        lambda x: F.batch_norm(x, None, None, training=True), lambda x: x.softmax(-1),
        lambda x: x.log_softmax(-1), lambda x: x.logsumexp(-1), lambda x: x.var(-1),
        lambda x: x.std(1), lambda x: torch.var_mean(x, 2)[0], lambda x: x.mean(1),
        lambda x: x.sum(), lambda x: x.norm(dim=1), lambda x: x.cumsum(2),
        lambda x: F.mse_loss(x, x.flip(1)), lambda x: x @ x.mT,
        lambda x: F.conv1d(x, x[:, :, :3]), lambda x: F.avg_pool1d(x, 3) @ x[..., :11].mT,
        lambda x: F.scaled_dot_product_attention(x, x, x), lambda x: torch.einsum("bij,bkj", x, x),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_their_gradients_are_modeled(function, dtype):
    """Values near those of plain PyTorch, and in float32 other ones in each draw."""

    def run():
        # So small that there are several draws.
        x = (1 + torch.randn(2, 10, 33, generator=torch.Generator().manual_seed(1))).to(dtype)
        out = function(x.requires_grad_())
        seed = torch.linspace(-1, 1, out.numel()).to(out.dtype).view(out.shape)
        return out.detach(), *torch.autograd.grad(out, x, seed)

    for i, (here, draws) in enumerate(zip(*plain_and_modeled(run), strict=True)):
        assert draws.shape[1:] == here.shape and draws.dtype == here.dtype
        tolerance = 256 * torch.finfo(dtype).eps * here.abs().max().item()
        assert (draws - here).abs().max() < tolerance
        if dtype == torch.float32 and i == 0:  # not each gradient is a sum
            assert (draws != draws[0]).any()


def test_the_model_leaves_float64_whole_numbers_and_copies_alone():
    x = torch.randn(40, 30, dtype=torch.float64)
    whole = torch.arange(30)
    with modeled_rounding():
        assert torch.equal(x @ x.T, x @ x.T)
        assert torch.equal(whole.cumsum(0), torch.arange(30) * torch.arange(1, 31) // 2)
        assert torch.equal(x.float().T.contiguous(), x.T.float())
    exact = x.mT @ x
    with modeled_rounding():
        assert torch.equal(x.mT @ x, exact)


# Inputs -------------------------------------------------------------------------------------------
def test_values_are_reproducible_and_what_their_names_say():
    made = values((64, 32), dtype=torch.bfloat16, seed=3)
    again = values((64, 32), dtype=torch.bfloat16, seed=3)
    other = values((64, 32), dtype=torch.bfloat16, seed=4)
    assert all(t.dtype == torch.bfloat16 and t.shape == (64, 32) for t in made.values())
    assert all(torch.equal(made[name], again[name]) for name in made)
    assert not any(torch.equal(made[name], other[name]) for name in made)
    assert all(t.isfinite().all() for t in values((64, 32), dtype=torch.float16).values())
    assert abs(made["offset"].float().mean() - 100) < 1
    assert torch.equal(made["equal"], made["equal"][:1].expand(64, 32))
    assert torch.equal(made["integers"], made["integers"].round())
    assert made["normal"].float().std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    "shape", [(), (7,), (5, 6), (2, 3, 4), (2, 3, 4, 5), (0, 3), (2, 3, 4, 5, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_layouts_have_equal_values(shape, dtype):
    x = (100 * torch.randn(shape)).to(dtype)
    for name, t in layouts(x).items():
        assert t.shape == x.shape and t.dtype == x.dtype, name
        assert torch.equal(t, x), name


def test_layouts_differ_in_memory():
    x = torch.randn(2, 3, 4, 5)
    made = layouts(x)
    assert set(made) == {
        "contiguous", "misaligned", "strided", "transposed", "channel_slice", "channels_last",
        "channels_last_slice",
    }  # fmt: skip
    assert len({(t.stride(), t.data_ptr() % 16) for t in made.values()}) == len(made)
    assert made["misaligned"].is_contiguous() and made["misaligned"].data_ptr() % 16
    assert made["channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert made["channels_last_slice"].stride() == (120, 1, 30, 6)
    storage = torch.tensor(made["channel_slice"].untyped_storage().tolist(), dtype=torch.uint8)
    assert storage.view(torch.float32).isnan().sum() == 2 * 3 * 4 * 5


def test_rows_that_are_equal_can_be_expanded():
    made = layouts(torch.randn(1, 6).repeat(5, 1))
    assert made["expanded"].stride(0) == 0
    assert "expanded" not in layouts(torch.randn(5, 6))


# Guards -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(), (7,), (0, 3), (2, 3, 4, 5)])
def test_guarded_copies_keep_values_layout_and_alignment(shape, dtype):
    for name, x in layouts((100 * torch.randn(shape)).to(dtype)).items():
        with guarded(x) as (copy,):
            assert torch.equal(copy, x), name
            assert copy.stride() == x.stride(), name
            assert copy.data_ptr() % 16 == x.data_ptr() % 16, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("where", [-4096, -1, 24, 24 + 4095])
def test_a_write_around_a_guarded_tensor_is_found(dtype, where):
    def memory(t):
        return t.as_strided((1,), (1,), t.storage_offset() + where)

    x, y = torch.zeros(4, 6, dtype=dtype), torch.zeros(4, 6, dtype=dtype)
    with pytest.raises(AssertionError, match="around tensor 1"), guarded(x, y) as (_, copy):
        memory(copy).fill_(1)
    with guarded(x, y) as (_, copy):
        copy.fill_(1)
    assert not x.any() and not y.any()


def test_a_write_into_the_gaps_of_a_guarded_slice_is_found():
    x = torch.zeros(2, 5, 3, 3)[:, 1:4]
    with pytest.raises(AssertionError, match="around tensor 0"), guarded(x) as (copy,):
        copy.as_strided((1,), (1,), copy.storage_offset() + 3 * 9).fill_(0)


def test_a_read_around_a_guarded_tensor_is_nan():
    with guarded(torch.zeros(8)) as (copy,):
        assert copy.as_strided((10,), (1,), copy.storage_offset() - 1)[[0, 9]].isnan().all()


def test_expanded_tensors_can_be_guarded():
    x = torch.randn(1, 6).expand(5, 6)
    with guarded(x) as (copy,):
        assert copy.stride() == (0, 1) and torch.equal(copy, x)
