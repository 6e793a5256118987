"""Ways to run one model's `sample`, which all draw the same samples, up to round-off.

fused      the model as it is: kernels of cgkernels, one captured step replayed on a GPU
plain      the same model inside `cgkernels.reference()`, every kernel launched from Python
compiled   plain, with the networks under `torch.compile`
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cgkernels
from cgm.model import Model

WAYS = ("fused", "plain", "compiled")


def conditions(model: Model, rows: int, seed: int = 0) -> Tensor | None:
    """Random conditions of the kind that a model has, on its device."""
    config, device = model.config, model.device
    generator = torch.Generator().manual_seed(seed)
    if config.cond_kind == "none":
        return None
    if config.cond_kind == "image":
        return (2 * torch.rand(rows, *config.cond_shape, generator=generator) - 1).to(device)
    shape = (rows, *config.cond_shape)
    return torch.randint(config.num_classes, shape, generator=generator).to(device)


def model_call(
    model: Model, way: str, cond: Tensor | None, *, rows: int, seed: int = 0, **solver: Any
) -> Callable[[], Tensor]:
    """The call that draws one sample for each condition in one of the `WAYS`.

    compiled expects `compiled_copy(model)`.
    """
    n = rows if cond is None else None
    if way == "fused":
        return lambda: model.sample(n, cond=cond, seed=seed, **solver)
    if "graph" in model.sampling_options():
        solver["graph"] = False

    def draw() -> Tensor:
        with cgkernels.reference():
            return model.sample(n, cond=cond, seed=seed, **solver)

    return draw


def compiled_copy(model: Model, mode: str = "default") -> Model:
    """A copy whose networks are under torch.compile."""
    twin = copy.deepcopy(model)
    twin.compile_networks(mode)
    return twin


def difference_of(model: Model, found: Tensor, expected: Tensor) -> float:
    """The largest between the samples of two ways, of a range of [-1, 1].

    Where values are drawn one after another, one sample in four may come out otherwise: round-off
    may tip a draw over, and then all that follow it are others.
    """
    each = (found - expected).abs().flatten(1).amax(1).sort().values
    return each[len(each) - 1 - (len(each) // 4 if model.discrete else 0)].item()
