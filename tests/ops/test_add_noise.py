"""add_noise: noisy samples and their targets, exact at small noise in every dtype."""

from collections.abc import Iterator

import torch

from cgkernels import add_noise
from cgkernels.ops import add_noise as op
from cgkernels.targets import TARGETS
from tests.support import Sample, normals

LAUNCHERS = {"add_noise_fwd": op._launch_fwd, "add_noise_bwd": op._launch_bwd}

SHAPE = (3, 2, 5, 9)


def make_table(*, dtype=torch.float32, device="cpu"):
    """(alpha, sigma) of five timesteps; not on the circle, so that the two are not mistaken."""
    alpha = torch.tensor([0.999, 0.9, 0.6, 0.25, 0.0], dtype=torch.float64)
    sigma = torch.tensor([0.01, 0.3, 0.8, 0.95, 1.0], dtype=torch.float64)
    table = torch.stack([alpha, sigma], 1)
    return table.to(device, torch.float64 if dtype == torch.float64 else torch.float32)


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def sample(label, x0, per_row=(), **inputs):
        table = make_table(dtype=dtype, device=device)
        inputs = {"x0": x0, "table": table, "t": t, "seed": seed, **inputs}
        per_row = ("x0", *(name for name in ("t", "index") if name in inputs))
        per_row = tuple(name for name in per_row if inputs[name].dim())
        return Sample(label, add_noise, inputs, ("x0",), per_row)

    def data(*shape):
        return normals(*shape, dtype=dtype, device=device)

    t = torch.tensor([3, 0, 2], device=device)
    index = torch.tensor([5, 2**40 + 1, 7], device=device)
    seed = torch.tensor(11, device=device)
    x0 = data(*SHAPE)
    for target in TARGETS:
        yield sample(target, x0, target=target, index=index)
    last = x0.contiguous(memory_format=torch.channels_last)
    yield sample("channels_last", last, target="v", index=index)
    yield sample("transposed", data(3, 5, 2, 9).transpose(1, 2), target="flow", seed=3)
    yield sample("sliced", data(3, 5, 5, 9)[:, 1:3], target="v", seed=3)
    yield sample("expanded", data(1, *SHAPE[1:]).expand(SHAPE), target="flow", seed=3)
    yield sample("vectors, one timestep", data(3, 7), t=torch.tensor(
        2, dtype=torch.int32, device=device))  # fmt: skip
    yield sample("numbers", data(3), target="v")
    yield sample("empty batch", data(0, *SHAPE[1:]), t=t[:0], target="v")
