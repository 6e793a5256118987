"""The interpreter's repair, its sanitizer and the stubs of ghost replay, each on known kernels."""

import functools

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.language.extra import libdevice

from tests.interpreter import SanitizerError, ghost, sanitize

pytestmark = pytest.mark.kernel


# bfloat16 -----------------------------------------------------------------------------------------
@triton.jit
def _bf16_kernel(out_ptr, x_ptr, y_ptr, N: tl.constexpr, OP: tl.constexpr):
    """One program: out = x OP y, all bfloat16."""
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OP == "add":
        out = x + y
    elif OP == "mul":
        out = x * y
    elif OP == "div":
        out = x / y
    elif OP == "neg":
        out = -x
    elif OP == "scalar mul":
        out = x * 0.3
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "compare":
        out = (x > y).to(tl.float32)
    elif OP == "where":
        out = tl.where(x > 0, x, y)
    elif OP == "clamp":
        out = tl.clamp(x, -y * y, y * y)
    elif OP == "mixed":
        out = x + y.to(tl.float32)
    elif OP == "to float16":
        out = x.to(tl.float16)
    elif OP == "to int32":
        out = (x * 100).to(tl.int32)
    elif OP == "from int32":
        out = (i * 257).to(tl.bfloat16)
    elif OP == "full":
        out = tl.full((N,), 1.7, tl.bfloat16)
    elif OP == "fma":
        out = tl.fma(x, y, x)
    elif OP == "sum":
        out = x * 0 + tl.sum(x, 0).to(tl.float32)
    elif OP == "max":
        out = x * 0 + tl.max(x, 0).to(tl.float32)
    elif OP == "cumsum":
        out = tl.cumsum(x, 0)
    elif OP == "argmax":
        out = x * 0 + tl.argmax(x, 0).to(tl.float32)
    elif OP == "tanh":
        out = libdevice.tanh(x.to(tl.float32))
    elif OP == "pow":
        out = libdevice.pow(tl.abs(x).to(tl.float32), 1.5)
    tl.store(out_ptr + i, out.to(tl.bfloat16))


@triton.jit
def _dot_kernel(out_ptr, x_ptr, y_ptr, N: tl.constexpr):
    """One program: out = x @ y, square, float32 result."""
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at)))


@triton.jit
def _cast_kernel(out_ptr, x_ptr, N: tl.constexpr):
    """One program: float32 -> bfloat16, once by .to and once by the store."""
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, x.to(tl.bfloat16))
    tl.store(out_ptr + N + i, x)


BF16 = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "neg": lambda x, y: -x,
    "scalar mul": lambda x, y: x * torch.tensor(0.3).bfloat16(),  # Triton gives 0.3 the dtype of x
    "maximum": torch.maximum,
    "compare": lambda x, y: x > y,
    "where": lambda x, y: torch.where(x > 0, x, y),
    "clamp": lambda x, y: torch.clamp(x, -y * y, y * y),
    "mixed": lambda x, y: x.float() + y.float(),
    "to float16": lambda x, y: x.half(),
    "to int32": lambda x, y: (x * 100).int(),
    "from int32": lambda x, y: torch.arange(len(x), dtype=torch.int32) * 257,
    "full": lambda x, y: torch.full_like(x, 1.7),
    "fma": lambda x, y: (x.double() * y + x).float(),
    "sum": lambda x, y: x.float().sum().bfloat16().expand_as(x),
    "max": lambda x, y: x.max().expand_as(x),
    "cumsum": lambda x, y: x.float().cumsum(0),
    "argmax": lambda x, y: x.float().argmax().expand_as(x),
    "tanh": lambda x, y: x.float().tanh(),
    "pow": lambda x, y: x.float().abs().pow(1.5),
}


@pytest.mark.parametrize("op", BF16)
def test_bf16_arithmetic_is_that_of_torch(op):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(256, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty(256, dtype=torch.bfloat16)
    _bf16_kernel[(1,)](out, x, y, 256, op)
    assert torch.equal(out, BF16[op](x, y).bfloat16())


def test_bf16_dot_has_a_float32_accumulator():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty(64, 64)
    _dot_kernel[(1,)](out, a, b, 64)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_float32_to_bf16_rounds_to_nearest_even():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (65536,), generator=generator, dtype=torch.int32)
    x = bits.view(torch.float32)
    out = torch.empty(2, 65536, dtype=torch.bfloat16)
    _cast_kernel[(1,)](out, x, 65536)
    torch.testing.assert_close(out, x.bfloat16().expand(2, -1), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _extrema_kernel(out_ptr, x_ptr, y_ptr, N: tl.constexpr):
    """One program: maxima and minima of two numbers each, of all, and such that keep NaN."""
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, tl.maximum(x, y))
    tl.store(out_ptr + N + i, tl.minimum(y, x))
    tl.store(out_ptr + 2 * N + i, tl.max(x, 0) + 0 * i)
    tl.store(out_ptr + 3 * N + i, tl.min(x, 0) + 0 * i)
    tl.store(out_ptr + 4 * N + i, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out_ptr + 5 * N + i, tl.minimum(y, x, propagate_nan=tl.PropagateNan.ALL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extrema_lose_nan_as_on_a_gpu(dtype):
    """PTX: max.f32 and min.f32 return the other operand; with .NaN they return NaN."""
    nan = float("nan")
    x, y = torch.tensor([nan, 1, 2, -3], dtype=dtype), torch.tensor([5, nan, 4, 1], dtype=dtype)
    out = torch.empty(6, 4, dtype=dtype)
    _extrema_kernel[(1,)](out, x, y, 4)
    expected = [[5, 1, 4, 1], [5, 1, 2, -3], [2] * 4, [-3] * 4, [nan, nan, 4, 1], [nan, nan, 2, -3]]
    torch.testing.assert_close(out.float(), torch.tensor(expected), equal_nan=True)


# Sanitizer ----------------------------------------------------------------------------------------
@triton.jit
def _double(
    out_ptr, x_ptr, n, LOAD_ALL: tl.constexpr, STORE_ALL: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per BLOCK elements: out = 2 x, with either mask forgotten on demand."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=(i < n) | LOAD_ALL)
    tl.store(out_ptr + i, x * 2, mask=(i < n) | STORE_ALL)


@triton.jit
def _same_address(out_ptr):
    """Every program stores its own number to one address."""
    tl.store(out_ptr, tl.program_id(0).to(tl.float32))


@triton.jit
def _neighbor(out_ptr, n):
    """Program p reads element p + 1 and writes element p."""
    p = tl.program_id(0)
    tl.store(out_ptr + p, tl.load(out_ptr + (p + 1) % n) + 1)


@triton.jit
def _last_adds_up(out_ptr, part_ptr, count_ptr, LATE: tl.constexpr, SEM: tl.constexpr):
    """Program p stores p + 1; the last to come sums what the four stored."""
    p = tl.program_id(0)
    if not LATE:
        tl.store(part_ptr + p, p + 1)
    came = tl.atomic_add(count_ptr, 1, sem=SEM)
    if LATE:
        tl.store(part_ptr + p, p + 1)
    if came == 3:
        tl.store(out_ptr, tl.sum(tl.load(part_ptr + tl.arange(0, 4)), 0))


@triton.jit
def _count(out_ptr, LANES: tl.constexpr):
    """Every program adds one to LANES addresses, atomically."""
    tl.atomic_add(out_ptr + tl.arange(0, LANES), 1.0)


@triton.jit
def _copy_by_descriptor(out_ptr, x_ptr, rows, cols, BLOCK: tl.constexpr):
    """One program per BLOCK x BLOCK tile: a copy through tensor descriptors."""
    x = tl.make_tensor_descriptor(x_ptr, [rows, cols], [cols, 1], [BLOCK, BLOCK])
    out = tl.make_tensor_descriptor(out_ptr, [rows, cols], [cols, 1], [BLOCK, BLOCK])
    at = [tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK]
    out.store(at, x.load(at))


def added_up(late=False, sem="acq_rel"):
    part, count, out = (torch.zeros(n, dtype=torch.int32) for n in (4, 1, 1))
    _last_adds_up[(4,)](out, part, count, late, sem)
    return int(out) == 10


def doubled(load_all=False, store_all=False, programs=4):
    x, out = torch.randn(100), torch.empty(100)
    _double[(programs,)](out, x, 100, load_all, store_all, 32)
    return torch.equal(out, 2 * x)


@pytest.mark.parametrize("order_seed", [None, 0, 1])
def test_the_sanitizer_lets_right_kernels_pass(order_seed):
    image, copy, count = torch.randn(40, 48), torch.empty(40, 48), torch.zeros(1)
    with sanitize(order_seed=order_seed):
        assert doubled() and added_up()
        _copy_by_descriptor[(3, 3)](copy, image, 40, 48, 16)
        _count[(4,)](count, 1)
    assert torch.equal(copy, image) and count == 4


@pytest.mark.parametrize(
    ("finding", "run"),
    [
        ("_double: out-of-bounds load, 28 of 32 lanes", functools.partial(doubled, load_all=True)),
        ("_double: out-of-bounds store", functools.partial(doubled, store_all=True)),
        ("_count: out-of-bounds atomic", lambda: _count[(4,)](torch.zeros(2), 4)),
        ("_same_address: write-write race", lambda: _same_address[(4,)](torch.zeros(1))),
        ("_neighbor: read-write race", lambda: _neighbor[(4,)](torch.zeros(4), 4)),
        ("_last_adds_up: read-write race", functools.partial(added_up, late=True)),
        ("_last_adds_up: read-write race", functools.partial(added_up, sem="relaxed")),
    ],
    ids=["load", "store", "atomic", "two writers", "reader and writer", "late", "unordered"],
)
def test_the_sanitizer_finds(finding, run):
    with pytest.raises(SanitizerError, match=finding), sanitize():
        run()


def test_an_access_far_outside_is_found_before_it_kills_the_process():
    with pytest.raises(SanitizerError, match="out-of-bounds load"), sanitize():
        _double[(1,)](torch.empty(1), torch.zeros(1), 1, True, False, 2**20)


def test_output_that_a_program_forgets_is_seen():
    with sanitize():
        assert not doubled(programs=3)


def test_reads_across_programs_can_be_declared():
    with sanitize(reads=False):
        _neighbor[(4,)](torch.zeros(4), 4)


def test_a_shuffled_order_shows_a_dependence_between_programs():
    results = set()
    for order_seed in (None, 0, 1, 2):
        out = torch.zeros(8)
        with sanitize(order_seed=order_seed, reads=False):
            _neighbor[(8,)](out, 8)
        results.add(tuple(out.tolist()))
    assert len(results) > 1


def test_errors_of_the_test_itself_pass_through_and_nothing_stays_patched():
    with pytest.raises(ZeroDivisionError), sanitize():
        raise ZeroDivisionError
    _same_address[(4,)](torch.zeros(1))


# Conftest and ghost -------------------------------------------------------------------------------
def test_empty_is_poisoned_in_kernel_tests():
    assert torch.empty(100).isnan().all()
    assert (torch.empty(100, dtype=torch.int32) == 2**31 - 1).all()


def test_ghost_launches_nothing_and_names_what_was_asked_for():
    out = torch.zeros(1)
    with ghost() as launched:
        _count[(4,)](out, 1)
        assert not doubled()
    assert launched == ["_count", "_double"] and out == 0
    _count[(4,)](out, 1)
    assert out == 4
