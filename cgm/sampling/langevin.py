"""Langevin steps of an energy, and annealed importance sampling of its normalizer.

Source   Langevin steps with a step size of their own: Du, Mordatch, arXiv:1903.08689; annealed
         importance sampling: Neal, arXiv:physics/9803008; Metropolis's correction of Langevin
         steps: Roberts, Tweedie, Bernoulli 2(4), 1996.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cgkernels
from cgkernels.checks import as_index, as_seed
from cgkernels.random import STREAM_INITIAL, STREAM_LANGEVIN, normal, uniform
from cgkernels.rows import compute_dtype
from cgm.sampling.cuda_graph import capture

Energy = Callable[[Tensor], Tensor]  # (B, *event) -> (B,)


@torch.inference_mode(False)
def langevin(
    energy: Energy,
    start: Tensor,
    *,
    steps: int,
    step_size: float,
    temperature: float = 1.0,
    bound: float = math.inf,
    seed: int | Tensor,
    index: Tensor | None = None,
    graph: bool = False,
) -> Tensor:
    """y after so many steps y <- clamp(y - a dE/dy, -bound, bound) + sqrt(2 a T) z from `start`.

    The chain has the density exp(-E / T) up to O(a): of E = y^T A y / 2 the covariance
    T (A - a A^2 / 2)^-1, exactly. One launch of `cgkernels.guided_step_` makes a step of the
    gradient; z is that of the samplers (stream 1), step s that of step s of the chain.

    Args:
        energy: E (B,) of y (B, *event), each row of its own row alone.
        start: (B, *event), which stays as it is.
        seed, index: of the noise, as in `cgkernels.guided_step`.
        graph: on a GPU, replay one captured step.

    Raises:
        ValueError: steps, step_size, temperature or bound does not fit.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be an int of at least 0, got {steps!r}")
    if not 0 < step_size < math.inf:
        raise ValueError(f"step_size must be positive, got {step_size}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if not bound > 0:
        raise ValueError(f"bound must be positive, got {bound}")
    y = start.detach().clone()
    if steps == 0 or y.numel() == 0:
        return y
    table = langevin_table(steps, step_size, temperature, bound)
    table = table.to(y.device, compute_dtype(y))
    noise: dict[str, Any] = {"seed": None, "index": None}
    if temperature:
        noise["seed"] = as_seed(seed, y.device)[0]
        noise["index"] = as_index(index, len(y), y.device)
    counter = torch.zeros(1, dtype=torch.int64, device=y.device)

    def step() -> None:
        _, force = with_gradient(energy, y)
        cgkernels.guided_step_(y, force, table=table, step=counter[0], **noise)
        counter.add_(1)

    run: Callable[[], None] = step
    if graph and y.is_cuda:
        run = capture(step, y.device)
        y.copy_(start)
        counter.zero_()
    for _ in range(steps):
        run()
    return y


def langevin_table(steps: int, step_size: float, temperature: float, bound: float) -> Tensor:
    """(steps, 12) float64, for `cgkernels.guided_step`: of x = y and the gradient in place of a
    network's output, x0 = clamp(y - a dE/dy) and x' = x0 + sqrt(2 a T) z.

    All rows are one: the number of a row is that of the noise.
    """
    table = torch.zeros(steps, 12, dtype=torch.float64, device="cpu")
    a0, a1, _, b1, _, _, _, b5, clip_min, clip_max, _, _ = table.T
    a0[:], a1[:], b1[:], b5[:] = 1, -step_size, 1, math.sqrt(2 * step_size * temperature)
    clip_min[:], clip_max[:] = -bound, bound
    return table


def with_gradient(energy: Energy, y: Tensor) -> tuple[Tensor, Tensor]:
    """E (B,) and dE/dy (B, *event) of y (B, *event); parameters get no gradients of it."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        values = energy(y)
        return values.detach(), torch.autograd.grad(values.sum(), y)[0]


# log Z --------------------------------------------------------------------------------------------
def annealed_weights(
    energy: Energy,
    shape: tuple[int, ...],
    *,
    std: float = 1.0,
    temperatures: int = 200,
    steps: int = 1,
    step_size: float,
    seed: int | Tensor,
    index: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Log-weights (B,) of chains whose exponentials have the mean Z = integral of exp(-E).

    A chain goes from N(0, std^2) to exp(-E) through exp(-(1 - b) |y|^2 / (2 std^2) - b E) with
    b = 1 / temperatures, 2 / temperatures, .. 1, and collects what the density gains by each change
    of b. At each b it makes Langevin steps of length step_size, accepted or refused as Metropolis
    and Hastings do, so that they keep the density of b. The mean is right however few they are; its
    variance is small only where the chain can follow, which is to say in few dimensions.
    arXiv:physics/9803008, equation 11.

    energy: (B,) of y, in nats. shape: (B, *event). seed, index: of the noise, stream 5, the start
    stream 0.
    """
    for name, count in (("temperatures", temperatures), ("steps", steps)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {count!r}")
    for name, value in (("std", std), ("step_size", step_size)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}")
    seed, device = as_seed(seed, device)
    index = as_index(index, shape[0], device)
    draws: dict[str, Any] = {"seed": seed, "index": index, "device": device}

    def of_start(y: Tensor) -> Tensor:
        return y.flatten(1).square().sum(1) / (2 * std**2)

    y = std * normal(shape, step=0, stream=STREAM_INITIAL, **draws)
    log_start = 0.5 * math.prod(shape[1:]) * math.log(2 * math.pi * std**2)
    # float64: a sum of many small terms.
    weights = torch.full((shape[0],), log_start, dtype=torch.float64, device=device)
    for number in range(1, temperatures + 1):
        b = number / temperatures
        with torch.no_grad():
            weights = weights + (of_start(y) - energy(y)) / temperatures
        if number == temperatures:
            break

        def between(y: Tensor, b: float = b) -> Tensor:
            return (1 - b) * of_start(y) + b * energy(y)

        for step in range((number - 1) * steps, number * steps):
            z = normal(shape, step=2 * step, stream=STREAM_LANGEVIN, **draws)
            u = uniform((shape[0],), step=2 * step + 1, stream=STREAM_LANGEVIN, **draws)
            y = _metropolis_step(between, y, step_size, z, u)
    return weights.to(y.dtype)


def _metropolis_step(energy: Energy, y: Tensor, a: float, z: Tensor, u: Tensor) -> Tensor:
    """A Langevin step that keeps exp(-E), by the rule of Metropolis and Hastings."""
    before, force = with_gradient(energy, y)
    proposal = y - a * force + math.sqrt(2 * a) * z
    after, force_after = with_gradient(energy, proposal)
    reverse = y - proposal + a * force_after  # the noise of the way back, times sqrt(2 a)
    log_ratio = z.square().flatten(1).sum(1) / 2 - reverse.square().flatten(1).sum(1) / (4 * a)
    accepted = u.log() < before - after + log_ratio
    return torch.where(accepted.view(-1, *(1,) * (y.dim() - 1)), proposal, y)
