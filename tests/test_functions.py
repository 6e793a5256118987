"""Functions that keep the digits which their definition would lose."""

import math
from decimal import Decimal, localcontext

import pytest
import torch

from cgkernels._triton import tl, triton
from cgkernels.device import expm1_and_minus
from cgkernels.functions import expm1_minus, log_ndtr
from tests.support import KERNEL_DEVICES


def exact_expm1_minus(x: torch.Tensor) -> torch.Tensor:
    """In 60 digits, of the values of x as they are."""
    with localcontext() as context:
        context.prec = 60
        values = [float(Decimal(v).exp() - 1 - Decimal(v)) for v in x.flatten().tolist()]
    return torch.tensor(values, dtype=torch.float64).view(x.shape)


def points(dtype: torch.dtype) -> torch.Tensor:
    """Near 0, on both sides of where the series ends, and far away."""
    near = torch.logspace(-12, 0, 100, dtype=torch.float64)
    far = torch.tensor([1.001, 2.0, 5.0, 20.0, 60.0], dtype=torch.float64)
    return torch.cat([near, -near, far, -far]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_expm1_minus_keeps_its_digits(dtype):
    x = points(dtype)
    error = (expm1_minus(x).double() / exact_expm1_minus(x) - 1).abs().max()
    assert error <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_gradient_of_expm1_minus_is_expm1(dtype):
    x = points(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(expm1_minus(x).sum(), x)
    torch.testing.assert_close(
        gradient.double(), x.detach().double().expm1(), rtol=4 * torch.finfo(dtype).eps, atol=0
    )


def test_expm1_minus_of_the_extremes():
    x = torch.tensor([0.0, float("-inf"), float("nan"), 1e30], requires_grad=True)
    value = expm1_minus(x)
    torch.testing.assert_close(
        value, torch.tensor([0.0, float("inf"), float("nan"), float("inf")]), equal_nan=True
    )
    (gradient,) = torch.autograd.grad(value[:2].sum(), x)
    assert gradient[:2].tolist() == [0.0, -1.0]


def test_log_ndtr_has_a_slope_however_far_below_0():
    x = torch.tensor([-99.9, -100.1, -1e4, -1e8, -3e12, -1e100], dtype=torch.float64)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(log_ndtr(x).sum(), x)
    z = -x.detach()
    torch.testing.assert_close(slope, z / (1 - 1 / z**2 + 3 / z**4), rtol=1e-9, atol=0)
    expected = -z.square() / 2 - (z * math.sqrt(2 * math.pi)).log() - 1 / z**2
    torch.testing.assert_close(log_ndtr(x).detach(), expected, rtol=1e-11, atol=0)
    near = torch.linspace(-90, 9, 100, dtype=torch.float64)
    assert torch.equal(log_ndtr(near), torch.special.log_ndtr(near))


# Kernels ------------------------------------------------------------------------------------------
@triton.jit
def _expm1_kernel(growth_ptr, beyond_ptr, x_ptr, n, BLOCK: tl.constexpr):
    """One program for all."""
    i = tl.arange(0, BLOCK)
    growth, beyond = expm1_and_minus(tl.load(x_ptr + i, mask=i < n, other=0.0))
    tl.store(growth_ptr + i, growth, mask=i < n)
    tl.store(beyond_ptr + i, beyond, mask=i < n)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_those_of_kernels_keep_their_digits(device):
    x = points(torch.float32)
    growth, beyond = torch.empty(2, len(x), device=device)
    _expm1_kernel[(1,)](growth, beyond, x.to(device), len(x), BLOCK=256)
    pairs = ((growth, x.double().expm1()), (beyond, exact_expm1_minus(x)))
    for found, exact in pairs:
        # The exponential of a GPU errs by some last places of its exponent.
        limit = 4 * torch.finfo(x.dtype).eps * x.abs().double().clamp(min=1)
        assert ((found.cpu().double() / exact - 1).abs() <= limit).all()
