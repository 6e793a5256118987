"""Whether a model finds clothes likelier than images that are none.

Source   area under the ROC curve as a rank statistic: Hanley, McNeil, Radiology 143, 1982. That a
         likelihood can be higher for other data: Nalisnick et al., arXiv:1810.09136.
"""

import math

import torch
from torch import Tensor

from cgkernels.random import STREAM_DATA, uniform
from cgm.data import synthetic
from cgm.model import Model

_STEP_NOISE = 7  # of the data's stream
_ROWS_AT_ONCE = 50


def auroc(likely: Tensor, unlikely: Tensor) -> float:
    """P(a > b) + P(a = b) / 2 of a of likely (N,) and b of unlikely (M,): 1/2 is chance.

    ValueError for a value that is NaN, or no values.
    """
    if not len(likely) or not len(unlikely):
        raise ValueError(
            f"likely and unlikely must not be empty, got {len(likely)} and {len(unlikely)}"
        )
    if likely.isnan().any() or unlikely.isnan().any():
        raise ValueError("likely and unlikely must have no NaN")
    ranked = unlikely.double().sort().values
    values = likely.double()
    below = torch.searchsorted(ranked, values, right=False)
    not_above = torch.searchsorted(ranked, values, right=True)
    return ((below + not_above).double().mean() / (2 * len(ranked))).item()


@torch.no_grad()
def log_density(model: Model, y: Tensor, *, seed: int = 0) -> Tensor:
    """log p(y), or what the model has in its place, (B,) float64 on the CPU; y (B, *event).

    The bound elbo of images, else minus the energy, else log_prob. With a class as condition it
    is the log of the mean over the classes, which for an energy is one only up to the classes' own
    constants.

    Raises:
        ValueError: the model is conditioned on something else, or has none of these.
    """
    config, device = model.config, model.device
    if model.density is None:
        raise ValueError(
            f"model must have a density, a bound or an energy; a {model.family} has none"
        )
    if config.cond_kind not in ("none", "class"):
        raise ValueError(f"model must have a class or no condition, got {config.cond_kind!r}")
    parts = []
    for rows in y.split(_ROWS_AT_ONCE):
        rows = rows.to(device)
        if config.cond_kind == "none":
            parts.append(model.log_density(rows, seed=seed).double().cpu())
            continue
        classes = torch.arange(config.num_classes, device=device)
        each = [
            model.log_density(rows, cond=c.expand(len(rows)), seed=seed).double().cpu()
            for c in classes
        ]
        parts.append(torch.stack(each).logsumexp(0) - math.log(len(each)))
    return torch.cat(parts)


def has_density(model: Model) -> bool:
    """Whether `log_density` takes this model."""
    return model.density is not None and model.config.cond_kind in ("none", "class")


def anomaly_scores(model: Model, clothes: Tensor, *, seed: int = 0) -> dict[str, float]:
    """AUROC of clothes (N, 1, 28, 28) against as many others, by `log_density`.

    digits   written digits, `synthetic.digits`
    noise    each pixel uniform in [-1, 1]
    """
    n = len(clothes)
    noise = uniform((n, *clothes.shape[1:]), seed=seed, step=_STEP_NOISE, stream=STREAM_DATA)
    found = log_density(model, clothes, seed=seed)
    others = {"digits": synthetic.digits(n, seed), "noise": 2 * noise - 1}
    return {name: auroc(found, log_density(model, y, seed=seed)) for name, y in others.items()}
