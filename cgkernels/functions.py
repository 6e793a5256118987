"""Functions of references that, written as they are defined, would lose their digits."""

import math

import torch
from torch import Tensor

_TERMS = {torch.float32: 10, torch.float64: 18}  # the next is below 2^-27 or 2^-56 of the sum


def expm1_minus(x: Tensor) -> Tensor:
    """e^x - 1 - x of float32 or float64, not negative: the divergence of Gaussians is made of it.

    Within 2 eps of itself: near 0 by the series x^2 / 2 + x^3 / 6 + .., where the difference has no
    digits; beyond 1 nothing cancels. On a GPU `device.expm1_and_minus`.
    """
    near = x.clamp(-1, 1)
    series = torch.zeros_like(near)
    for n in range(_TERMS[x.dtype], 1, -1):
        series = series * near + 1 / math.factorial(n)
    return torch.where(x.abs() < 1, series * near * near, x.expm1() - x)
