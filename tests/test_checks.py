"""Argument errors: each check by itself; what the public functions refuse is in tests/ops."""

import itertools
import operator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from cgkernels import checks
from cgkernels.memory import Memory, overlaps_itself

META = torch.device("meta")


def refused(error, match):
    return pytest.raises(error, match=match)


# Tensors ------------------------------------------------------------------------------------------
def test_shapes():
    checks.check_shape("x", torch.zeros(2, 3), (2, 3))
    checks.check_shape("x", torch.zeros(()), ())
    with refused(ValueError, r"^x must have shape \(2, 4\), got \(2, 3\)$"):
        checks.check_shape("x", torch.zeros(2, 3), (2, 4))
    checks.check_rows("x", torch.zeros(0))
    with refused(ValueError, "^x must have shape"):
        checks.check_rows("x", torch.zeros(()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_dtypes(dtype):
    checks.check_float(x=torch.zeros(1, dtype=dtype), y=torch.zeros(1))


@pytest.mark.parametrize(
    "wrong", [torch.zeros(1, dtype=torch.int64), torch.zeros(1).cfloat(), 1.0, None, [1.0]]
)
def test_what_is_no_floating_tensor(wrong):
    with refused(TypeError, "^y must be"):
        checks.check_float(x=torch.zeros(1), y=wrong)


def test_float64_is_for_the_cpu():
    with FakeTensorMode():  # a CUDA tensor without a GPU
        x = torch.empty(1, dtype=torch.float64, device="cuda")
    with refused(TypeError, r"^x must be float32, float16 or bfloat16 \(float64 on the CPU only\)"):
        checks.check_float(x=x)


@pytest.mark.parametrize("shape", [(12,), (3, 11), (0, 12), (1, 3, 12)])
def test_tables_of_wrong_shape(shape):
    with refused(ValueError, r"^table must have shape \(rows, 12\) with rows > 0, got"):
        checks.check_table(torch.zeros(shape), 12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coefficients_in_half_types_are_refused(dtype):
    """Alphas near 1 would round to 1."""
    with refused(TypeError, "^table must be float32"):
        checks.check_table(torch.zeros(3, 12, dtype=dtype), 12)


def test_devices():
    x, y = torch.zeros(1), torch.zeros(1, device=META)
    checks.check_same_device(x=x, z=x)
    checks.check_same_device(y=y)
    with refused(ValueError, "^y must be on the device of x, cpu, got meta$"):
        checks.check_same_device(x=x, z=x, y=y)


def test_gradients_that_are_not_there():
    x = torch.zeros(1, requires_grad=True)
    checks.check_no_grad("why", x=x.detach(), scale=1.0, y=None)
    with torch.no_grad():
        checks.check_no_grad("why", x=x)
    with refused(ValueError, "^x requires grad, but why$"):
        checks.check_no_grad("why", x=x)


def test_the_noise_numbers_2_to_the_34_elements():
    checks.check_noise_size("x", (10**6, 2**17, 2**17))
    with refused(ValueError, r"^x must have at most 2\^34 elements a sample"):
        checks.check_noise_size("x", (1, 2**17, 2**17 + 1))


# Numbers ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("seed", "expected"),
    [(0, 0), (-1, -1), (2**64 - 1, -1), (2**63, -(2**63)), (torch.tensor([[7]]), 7)],
)
def test_seeds(seed, expected):
    tensor, _ = checks.as_seed(seed, None)
    assert tensor.shape == () and tensor.dtype == torch.int64 and tensor == expected


def test_a_seed_tensor_is_not_copied():
    """A captured graph reads it again at each replay."""
    seed = torch.tensor([5])
    tensor, device = checks.as_seed(seed, None)
    seed.fill_(6)
    assert tensor == 6 and device == seed.device


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seeds_of_more_than_64_bits(seed):
    with refused(ValueError, "^seed must fit in 64 bits"):
        checks.as_seed(seed, None)


def test_indices():
    assert checks.as_index(None, 3, None).tolist() == [0, 1, 2]
    assert checks.as_index(None, 3, META).device == META
    index = torch.tensor([2**40, -1])
    assert checks.as_index(index, 2, "cpu") is index
    with refused(ValueError, "^index must be on cpu, got meta$"):
        checks.as_index(index.to(META), 2, "cpu")
    with refused(TypeError, "^index must be an int64 tensor, got torch.int32$"):
        checks.as_index(index.int(), 2, None)
    with refused(TypeError, "^index must be an int64 tensor, got int$"):
        checks.as_index(0, 1, None)


@pytest.mark.parametrize("step", [3, torch.tensor(3), torch.tensor([3, 3]), torch.tensor(3).int()])
def test_steps(step):
    tensor = checks.as_step("step", step, 2, None, 4)
    assert tensor.dtype == torch.int64 and tensor.tolist() == [3, 3]


def test_steps_outside():
    for step in (4, -1, torch.tensor(4), torch.tensor([0, -1])):
        with refused(ValueError, r"^t must be in \[0, 4\), got"):
            checks.as_step("t", step, 2, None, 4)
    assert checks.as_step("t", torch.zeros(0, dtype=torch.int64), 0, None, 4).numel() == 0


def test_numbers_for_rows():
    like = torch.zeros(2, dtype=torch.bfloat16)
    for value in (2, 2.0, torch.tensor(2.0), torch.tensor([2.0, 2.0]).bfloat16()):
        row_values = checks.as_row_values("scale", value, 2, like)
        assert row_values.dtype == torch.float32 and row_values.tolist() == [2, 2]
    assert checks.as_row_values("scale", 0.1, 2, like.double()).dtype == torch.float64
    for value in (float("nan"), float("inf"), -float("inf"), torch.tensor([1.0, float("nan")])):
        with refused(ValueError, "^scale must be finite"):
            checks.as_row_values("scale", value, 2, like)
    for value in (True, "2", None, 2j, torch.tensor(2)):
        with refused(TypeError, "^scale must be a number or a floating tensor"):
            checks.as_row_values("scale", value, 2, like)


# Never waiting for a device -----------------------------------------------------------------------
def test_only_values_on_the_cpu_are_looked_at():
    """Elsewhere a look waits for the device; in a trace it breaks the graph."""
    x = torch.zeros(2)
    assert checks.readable(x) and checks.readable(torch.nn.Parameter(x))
    assert not checks.readable(x.to(META))
    with FakeTensorMode() as mode:
        assert not checks.readable(mode.from_tensor(x))
        assert not checks.readable(torch.empty(2, device="cuda"))
    seen = []
    torch.compile(lambda x: seen.append(checks.readable(x)) or x + 1, backend="eager")(x)
    assert seen == [False]


def test_values_out_of_reach_pass():
    """A step outside its table then gives NaN, and a NaN guidance scale NaN."""
    with FakeTensorMode():
        step = torch.full((2,), 99, device="cuda")
        assert checks.as_step("step", step, 2, "cuda", 4).shape == (2,)
        scale = torch.full((2,), float("nan"), device="cuda")
        assert checks.as_row_values("scale", scale, 2, scale).shape == (2,)


def test_integers_of_a_shape_in_a_range():
    device = torch.device("cpu")
    for dtype in (torch.int32, torch.int64):
        checks.check_integers("n", torch.tensor([0, 4], dtype=dtype), (2,), device, 0, 4)
        checks.check_integers("n", torch.zeros(0, dtype=dtype), (0,), device, 0, 4)
    for wrong in (torch.zeros(2), torch.zeros(2, dtype=torch.bool), [0, 1], 1):
        with refused(TypeError, "n must be an int32 or int64 tensor"):
            checks.check_integers("n", wrong, (2,), device, 0, 4)
    for values, words in (([0, 5], "from 0 to 5"), ([-1, 2], "from -1 to 2")):
        with refused(ValueError, rf"n must be in \[0, 4\], got values {words}"):
            checks.check_integers("n", torch.tensor(values), (2,), device, 0, 4)
    with refused(ValueError, r"n must have shape \(3,\)"):
        checks.check_integers("n", torch.tensor([0, 1]), (3,), device, 0, 4)
    with refused(ValueError, "n must be on cpu, got meta"):
        checks.check_integers("n", torch.tensor([0, 1], device="meta"), (2,), device, 0, 4)


# What is written ----------------------------------------------------------------------------------
def test_what_is_written_shares_no_memory_with_itself():
    checks.check_writable({"x": torch.zeros(2, 3).T, "y": torch.zeros(1, 3).expand(1, 3)}, {})
    with refused(ValueError, "x must not be expanded"):
        checks.check_writable({"x": torch.zeros(1, 3).expand(2, 3)}, {})
    with refused(ValueError, "x must not overlap itself"):
        checks.check_writable({"x": torch.zeros(9).as_strided((3, 3), (2, 1))}, {})
    with torch.inference_mode():
        made = torch.zeros(3)
        checks.check_writable({"x": made}, {})
    with refused(ValueError, "x must not be an inference tensor"):
        checks.check_writable({"x": made}, {})


def test_what_is_written_shares_no_memory_with_another_argument():
    whole = torch.zeros(2, 6, 4)
    checks.check_writable({"x": whole[:, :2], "y": whole[:, 2:4]}, {"z": whole[:, 4:], "s": 1.0})
    checks.check_writable({"x": whole[..., ::2]}, {"y": whole[..., 1::2], "z": whole.to(META)})
    checks.check_writable({"x": whole[:, :0], "y": whole}, {"z": None})
    with refused(ValueError, "y must not share memory with x, which is written"):
        checks.check_writable({"x": whole[:, :3], "y": whole[:, 2:4]}, {})
    with refused(ValueError, "z must not share memory with x, which is written"):
        checks.check_writable({"x": whole[..., ::2]}, {"z": whole.view(torch.int16)[:1, :1, 4]})


@given(st.data())
def test_shared_memory_is_that_of_a_byte(data):
    """Against the bytes of all elements, one by one."""
    buffer = torch.zeros(400)

    def view():
        shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
        strides = [data.draw(st.sampled_from([0, 1, 2, 3, 5, 8, 12, 24])) for _ in shape]
        base = data.draw(st.sampled_from([buffer, buffer.view(torch.int16)]))
        return base.as_strided(shape, strides, data.draw(st.integers(0, 60)))

    def taken(tensor):
        start = tensor.storage_offset() * tensor.itemsize
        at = [
            start + tensor.itemsize * sum(map(operator.mul, place, tensor.stride()))
            for place in itertools.product(*map(range, tensor.shape))
        ]
        return {a + byte for a in at for byte in range(tensor.itemsize)}

    a, b = view(), view()
    assert Memory(a).meets(b) == (not taken(a).isdisjoint(taken(b)))
    assert overlaps_itself(a) or len(taken(a)) == a.numel() * a.itemsize


# Options ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("low", [-checks.LARGEST, 0, checks.SMALLEST])
def test_numbers(low):
    for right in (2, 2.0, np.float64(2), 2**63 - 1, 2.0**64, checks.LARGEST):
        checks.check_number("eps", right, low)
    for wrong in (None, "2", 2j, True, [2.0], np.float32(2), np.array(2.0), torch.tensor(2.0)):
        with refused(TypeError, "^eps must be a number"):
            checks.check_number("eps", wrong, low)
    for wrong in (2**63, 1e308, 10**5000, -(10**5000), float("nan"), float("inf"), -float("inf")):
        with refused(ValueError, "^eps must be a number"):
            checks.check_number("eps", wrong, low)


def test_numbers_that_are_divided_by():
    checks.check_number("limit", 80, checks.SMALLEST, 80)
    for wrong in (0, 1e-320, -1, 80.1):
        with refused(ValueError, f"^limit must be a number above 0 and at most 80, got {wrong}"):
            checks.check_number("limit", wrong, checks.SMALLEST, 80)


@pytest.mark.parametrize("wrong", [None, "2", 2.0, 2j, True, np.int64(2), torch.tensor(2)])
def test_ints_and_flags(wrong):
    checks.check_int("window", 10**5000, 1)
    checks.check_flag(over_batch=False)
    with refused(TypeError, "^window must be an int"):
        checks.check_int("window", wrong, 1)
    with refused(ValueError, "^window must be an int of at least 1, got 0"):
        checks.check_int("window", 0, 1)
    with refused(ValueError, "^stride must be one of 1, 2, got"):
        checks.check_choice("stride", wrong, (1, 2))
    if wrong is not True:
        with refused(TypeError, "^over_batch must be True or False"):
            checks.check_flag(over_batch=wrong)


def test_what_has_no_strides_shares_no_memory():
    """A sparse or packed argument is refused by its own check, not where addresses are compared."""
    others = {"packed": torch.ones(2, 3).to_mkldnn(), "sparse": torch.eye(2).to_sparse()}
    checks.check_writable({"x": torch.zeros(3)}, others)
