"""`sample_and_kl`: what it is measured on, what it launches, how it is tuned."""

from collections.abc import Iterator
from functools import partial

import torch

import cgkernels
from benchmarks.harness.case import Inputs, OpCase, passes
from benchmarks.harness.inputs import meta_samples, normal, numbers
from benchmarks.harness.tuning import ROWS
from cgkernels.ops.sample_and_kl import _launch_bwd, _launch_fwd
from cgkernels.testing import Launch


def _inputs(shape, dtype, generator, device, *, prior=False, backward=False) -> Inputs:
    """Means and log variances as a network gives them: halves of one tensor."""
    made: Inputs = {}
    for whose in ("", "prior_") if prior else ("",):
        both = normal((shape[0], 2 * shape[1], *shape[2:]), dtype, generator, device)
        for name, half in zip(("mean", "log_variance"), both.chunk(2, 1), strict=True):
            made[whose + name] = half.requires_grad_(backward)
    return made | {"step": 0} | numbers(generator, device, shape[0])


def _plain(mean, log_variance, seed, index, step, prior_mean=None, prior_log_variance=None):
    z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    log_ratio, square = log_variance.float(), mean.float().square()
    if prior_mean is not None:
        log_ratio = log_ratio - prior_log_variance
        square = (mean.float() - prior_mean).square() * torch.exp(-prior_log_variance.float())
    kl = 0.5 * (log_ratio.exp() - 1 - log_ratio + square)
    return z, kl.flatten(1).sum(1)


def _gradients(result, inputs):
    """Of |z|^2 / 2 + kl: so z is its own gradient."""
    z, kl = (t.detach() for t in result)
    wanted = (inputs["mean"], inputs["log_variance"])
    return z, kl, *torch.autograd.grad(result, wanted, (z, torch.ones_like(kl)))


CASES = [
    OpCase("", _inputs, cgkernels.sample_and_kl, _plain, passes(3, 15)),
    OpCase("prior", partial(_inputs, prior=True), cgkernels.sample_and_kl, _plain,
           passes(5, 20)),
    OpCase("forward and backward", partial(_inputs, backward=True), cgkernels.sample_and_kl,
           _plain, passes(6, 30), finish=_gradients),
]  # fmt: skip


# Launches -----------------------------------------------------------------------------------------
def launches() -> Iterator[Launch]:
    for name, args, bits in meta_inputs():
        yield Launch(name, partial(_launch_fwd, *args), bits)


def bwd_launches() -> Iterator[Launch]:
    for name, args, bits in meta_inputs():
        dkl = torch.empty(16, device="meta")
        yield Launch(name, partial(_launch_bwd, args[0], dkl, *args), bits)


def meta_inputs():
    """Labels, arguments of the forward op, and the width of its loads and stores."""
    index = torch.empty(16, dtype=torch.int64, device="meta")
    seed = torch.empty((), dtype=torch.int64, device="meta")
    numbers = (seed, index, index)
    for name, x, bits in meta_samples():
        yield name, (x, x, None, None, *numbers, 0.0), bits
        yield f"prior {name}", (x, x, x, x, *numbers, 0.0), bits
    vector = torch.empty(16, 32, device="meta")
    yield "short rows", (vector, vector, None, None, *numbers, 0.5), 0


LAUNCHES = {
    "sample_and_kl_fwd": launches,
    "sample_and_kl_bwd": bwd_launches,
}


# Tuning -------------------------------------------------------------------------------------------
TUNABLE = ROWS
