"""`diffusion_loss`: what it is measured on, what it launches, how it is tuned."""

from collections.abc import Iterator
from functools import partial

import torch

import cgkernels
from benchmarks.harness.case import OpCase, passes
from benchmarks.harness.inputs import meta_samples, normal, training_inputs
from benchmarks.harness.plain import coefficients
from benchmarks.harness.tuning import ROWS
from cgkernels.ops.diffusion_loss import _launch_bwd, _launch_fwd
from cgkernels.targets import TARGETS
from cgkernels.testing import Launch


def _loss_inputs(shape, dtype, generator, device, *, backward=False):
    pred = normal(shape, dtype, generator, device).requires_grad_(backward)
    return {"pred": pred, **training_inputs(shape, dtype, generator, device)}


def _plain_loss(pred, x0, table, t, target, seed, index):
    """As trainers write it, with the noise that was drawn for the network's input kept: z again."""
    alpha, sigma = coefficients(x0, table, t)
    goal = alpha * torch.randn_like(x0) - sigma * x0
    return (pred - goal).float().square().flatten(1).mean(1)


def _gradient(loss, inputs):
    return loss.detach(), *torch.autograd.grad(loss.sum(), inputs["pred"])


CASES = [
    OpCase("v", _loss_inputs, cgkernels.diffusion_loss, _plain_loss, passes(2, 12)),
    OpCase("v, forward and backward", partial(_loss_inputs, backward=True),
           cgkernels.diffusion_loss, _plain_loss, passes(3, 15), finish=_gradient),
]  # fmt: skip


# Launches -----------------------------------------------------------------------------------------
def launches() -> Iterator[Launch]:
    for name, args, bits in meta_inputs():
        yield Launch(name, partial(_launch_fwd, *args), bits)


def bwd_launches() -> Iterator[Launch]:
    dloss = torch.empty(16, device="meta")
    for name, args, bits in meta_inputs():
        yield Launch(name, partial(_launch_bwd, dloss, *args), bits)


def meta_inputs():
    index = torch.empty(16, dtype=torch.int64, device="meta")
    seed = torch.empty((), dtype=torch.int64, device="meta")
    table, weight = torch.empty(1000, 2, device="meta"), torch.empty(16, device="meta")
    for name, x, bits in meta_samples():
        for target in TARGETS if name == "contiguous torch.float32" else ("v",):
            args = (x, x, table, index, seed, index, weight, target)
            yield f"{target} {name}", args, bits


LAUNCHES = {
    "diffusion_loss_fwd": launches,
    "diffusion_loss_bwd": bwd_launches,
}


# Tuning -------------------------------------------------------------------------------------------
TUNABLE = ROWS
