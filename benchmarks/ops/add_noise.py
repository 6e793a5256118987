"""`add_noise`: what it is measured on, what it launches, how it is tuned."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

import cgkernels
from benchmarks.harness.case import Inputs, OpCase, Provider, passes
from benchmarks.harness.ceilings import Call
from benchmarks.harness.inputs import meta_samples, training_inputs
from benchmarks.harness.plain import coefficients
from benchmarks.harness.tuning import ROWS
from cgkernels.ops.add_noise import _launch_bwd, _launch_fwd
from cgkernels.targets import TARGETS
from cgkernels.testing import Launch


def _plain_add_noise(x0, table, t, target, seed, index):
    alpha, sigma = coefficients(x0, table, t)
    z = torch.randn_like(x0)
    return alpha * x0 + sigma * z, alpha * z - sigma * x0


def _diffusers_noise() -> dict[str, Provider]:
    def build(sets: Sequence[Inputs]) -> list[Call]:
        import diffusers

        scheduler = diffusers.DDPMScheduler()

        def add(x0, t, **rest):
            z = torch.randn_like(x0)
            return scheduler.add_noise(x0, z, t), scheduler.get_velocity(x0, z, t)

        return [partial(add, **inputs) for inputs in sets]

    return {"diffusers": Provider(build, needs="diffusers")}


CASES = [
    OpCase("v", training_inputs, cgkernels.add_noise, _plain_add_noise, passes(3, 12),
           peers=_diffusers_noise),
]  # fmt: skip


# Launches -----------------------------------------------------------------------------------------
def launches() -> Iterator[Launch]:
    table, t, seed, index = meta_numbers()
    for name, x, bits in meta_samples():
        for target in TARGETS if name == "contiguous torch.float32" else ("v",):
            run = partial(_launch_fwd, x, table, t, seed, index, target)
            yield Launch(f"{target} {name}", run, bits)


def bwd_launches() -> Iterator[Launch]:
    table, t, *_ = meta_numbers()
    for name, x, bits in meta_samples():
        yield Launch(f"v {name}", partial(_launch_bwd, x, x, table, t, "v"), bits)


def meta_numbers():
    """table, t, seed, index as the public function makes them."""
    integers = [torch.empty(s, dtype=torch.int64, device="meta") for s in (16, (), 16)]
    return torch.empty(1000, 2, device="meta"), *integers


LAUNCHES = {
    "add_noise_fwd": launches,
    "add_noise_bwd": bwd_launches,
}


# Tuning -------------------------------------------------------------------------------------------
TUNABLE = ROWS
