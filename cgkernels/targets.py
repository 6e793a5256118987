"""What a denoiser is trained to predict, as a function of the clean sample and its noise."""

TARGETS = ("epsilon", "x0", "v", "flow")


def check_target(target: str) -> None:
    """Raise unless target is one of `TARGETS`."""
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")


def target_coefficients(target, alpha, sigma):
    """(p0, p1) of target = p0 x0 + p1 z, with x_t = alpha x0 + sigma z."""
    zero, one = alpha * 0, alpha * 0 + 1
    return {
        "epsilon": (zero, one),
        "x0": (one, zero),
        "v": (-sigma, alpha),  # arXiv:2202.00512
        "flow": (-one, one),  # arXiv:2210.02747; the velocity for alpha = 1 - sigma
    }[target]
