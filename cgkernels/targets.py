"""What a denoiser is trained to predict, as a function of the clean sample and its noise."""

from torch import Tensor

from cgkernels.checks import check_choice

TARGETS = ("epsilon", "x0", "v", "flow")


def check_target(target: str) -> None:
    """Raise unless target is one of `TARGETS`."""
    check_choice("target", target, TARGETS)


def target_coefficients(target: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(p0, p1) of target = p0 x0 + p1 z, with x_t = alpha x0 + sigma z."""
    zero, one = alpha * 0, alpha * 0 + 1
    return {
        "epsilon": (zero, one),
        "x0": (one, zero),
        "v": (-sigma, alpha),  # arXiv:2202.00512
        "flow": (-one, one),  # arXiv:2210.02747; the velocity for alpha = 1 - sigma
    }[target]
