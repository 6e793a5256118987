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


def log_ndtr(x: Tensor) -> Tensor:
    """log Phi(x) of float64, of which torch.special.log_ndtr has no slope far below 0.

    Below -100 by the series of Mills' ratio, phi(x) / -x (1 - 1 / x^2 + 3 / x^4), to 2e-11.
    """
    tail = x.clamp(max=-100)
    inverse = tail.square().reciprocal()
    far = -0.5 * (tail.square() + math.log(2 * math.pi)) - (-tail).log()
    far = far + (3 * inverse.square() - inverse).log1p()
    return torch.where(x < -100, far, torch.special.log_ndtr(x.clamp(min=-100)))
