"""diffusion_loss: the squared error against a target that is drawn again, and its gradients."""

from collections.abc import Iterator

import torch

from cgkernels import diffusion_loss
from cgkernels.ops import diffusion_loss as op
from cgkernels.targets import TARGETS
from tests.ops.test_add_noise import make_table
from tests.support import Sample, normals

LAUNCHERS = {"diffusion_loss_fwd": op._launch_fwd, "diffusion_loss_bwd": op._launch_bwd}

SHAPE = (3, 2, 5, 9)


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def sample(label, pred, x0, **inputs):
        table = make_table(dtype=dtype, device=device)
        inputs = {"pred": pred, "x0": x0, "table": table, "t": t, "seed": seed, **inputs}
        per_row = (name for name in ("pred", "x0", "t", "index", "weight") if name in inputs)
        per_row = tuple(name for name in per_row if inputs[name].dim())
        return Sample(label, diffusion_loss, inputs, ("pred", "x0"), per_row)

    def data(*shape, dtype=dtype, seed=0):
        return normals(*shape, dtype=dtype, device=device, seed=seed)

    t = torch.tensor([3, 0, 2], device=device)
    index = torch.tensor([5, 2**40 + 1, 7], device=device)
    seed = torch.tensor(11, device=device)
    weight = torch.tensor([0.5, 2.0, -1.0], device=device)
    pred, x0 = data(*SHAPE), data(*SHAPE, seed=1)
    for target in TARGETS:
        yield sample(target, pred, x0, target=target, index=index, weight=weight)
    last = [x.contiguous(memory_format=torch.channels_last) for x in (pred, x0)]
    yield sample("channels_last", *last, target="v", index=index)
    wide = data(3, 5, 5, 9)
    yield sample("views", wide[:, 1:3], wide.transpose(2, 3)[:1, ::4].expand(SHAPE[:2] + (9, 5))
                 .transpose(2, 3), target="flow", seed=3)  # fmt: skip
    other = torch.float16 if dtype == torch.float32 else torch.float32
    yield sample("network in another dtype", data(*SHAPE, dtype=other), x0, target="v")
    yield sample("vectors, one timestep", data(3, 7), data(3, 7, seed=1), t=torch.tensor(
        2, dtype=torch.int32, device=device))  # fmt: skip
    yield sample("numbers", data(3), data(3, seed=1), target="v")
    yield sample("empty batch", pred[:0], x0[:0], t=t[:0], target="v")
