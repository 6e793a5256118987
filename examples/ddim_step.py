"""One op of cgkernels in a DDIM loop that you write yourself.

The data are Gaussian, N(2, 0.5^2) with the condition and N(0, 0.5^2) without it, so that the best
denoiser is a formula and no network need be trained. With a guidance scale w the samples must then
come out as N(2 w, 0.5^2). `guided_step` does guidance, prediction of x0, the step and its noise in
one pass; beside it runs the same loop in plain PyTorch, with the coefficients written out and the
same noise, so that both can be compared.

Prints the mean and standard deviation of the samples beside the true ones, the largest difference
of the two loops, and whether a sample drawn alone has the bits that it has in the batch. The
standard deviation falls short of the truth by what a finite number of steps leaves, in both loops.
"""

import torch
from torch import Tensor

from cgkernels import guided_step, philox_normal
from cgkernels.random import STREAM_INITIAL, STREAM_SAMPLER
from cgkernels.samplers import Schedule, make_schedule, make_table

STD = 0.5


def denoiser(x: Tensor, mean: float, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that the best denoiser sees in x = alpha x0 + sigma z, for x0 from N(mean, STD^2).

    E[x0 | x] = mean + alpha STD^2 / (alpha^2 STD^2 + sigma^2) (x - alpha mean)
    """
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    x0 = mean + gain * (x - alpha * mean)
    return (x - alpha * x0) / sigma


def sample(
    rows: int, schedule: Schedule, *, steps: int, guidance: float, eta: float, index: Tensor
) -> Tensor:
    """The loop with the op: x (rows, 3, 8, 8) from noise to data."""
    plan = make_table("ddim", schedule, steps=steps, eta=eta)
    table, levels = plan.table.float(), schedule.training_table()[plan.timesteps]
    x = philox_normal((rows, 3, 8, 8), seed=0, index=index, step=0, stream=STREAM_INITIAL)
    for step, (alpha, sigma) in enumerate(levels):
        cond, uncond = denoiser(x, 2.0, alpha, sigma), denoiser(x, 0.0, alpha, sigma)
        x = guided_step(
            x, cond, uncond, table=table, step=step, scale=guidance, seed=0, index=index
        )
    return x


def sample_plain(
    rows: int, schedule: Schedule, *, steps: int, guidance: float, eta: float, index: Tensor
) -> Tensor:
    """The same loop in plain PyTorch: DDIM (arXiv:2010.02502), equations 12 and 16."""
    timesteps = make_table("ddim", schedule, steps=steps, eta=eta).timesteps
    levels = torch.from_numpy(schedule.alphas_cumprod)[timesteps]  # A_t, float64
    following = torch.cat([levels[1:], torch.ones(1)])
    x = philox_normal((rows, 3, 8, 8), seed=0, index=index, step=0, stream=STREAM_INITIAL)
    for step, (now, after) in enumerate(zip(levels, following, strict=True)):
        alpha, sigma = now.sqrt().float(), (1 - now).sqrt().float()
        cond, uncond = denoiser(x, 2.0, alpha, sigma), denoiser(x, 0.0, alpha, sigma)
        e = uncond + guidance * (cond - uncond)
        x0 = (x - sigma * e) / alpha
        std = eta * ((1 - after) / (1 - now) * (1 - now / after)).sqrt()
        z = philox_normal(tuple(x.shape), seed=0, index=index, step=step, stream=STREAM_SAMPLER)
        x = after.sqrt().float() * x0 + (1 - after - std**2).sqrt().float() * e + std.float() * z
    return x


def main(rows: int = 64, steps: int = 250, guidance: float = 1.5, eta: float = 1.0) -> dict:
    """Runs both loops and prints what they give; returns the printed numbers."""
    schedule, index = make_schedule("linear"), torch.arange(rows)
    options = {"steps": steps, "guidance": guidance, "eta": eta}
    x = sample(rows, schedule, **options, index=index)
    plain = sample_plain(rows, schedule, **options, index=index)
    alone = sample(1, schedule, **options, index=index[-1:])
    found = {
        "mean": x.mean().item(),
        "true mean": 2.0 * guidance,
        "std": x.std().item(),
        "true std": STD,
        "largest difference": (x - plain).abs().max().item(),
        "alone as in the batch": torch.equal(alone[0], x[-1]),
    }
    print(f"{rows} samples (3, 8, 8), {steps} steps, guidance {guidance}, eta {eta}")
    print(f"mean {found['mean']:.3f}, true {found['true mean']:.3f}")
    print(f"std  {found['std']:.3f}, true {found['true std']:.3f}")
    print(f"largest difference from plain PyTorch: {found['largest difference']:.1e}")
    print(f"sample {rows - 1} alone has the bits of the batch: {found['alone as in the batch']}")
    return found


if __name__ == "__main__":
    main()
