"""What `diffusion_loss` launches: compiled without a GPU, judged on one."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.meta import meta_samples
from cgkernels.ops.diffusion_loss import _launch_bwd, _launch_fwd
from cgkernels.targets import TARGETS
from cgkernels.testing import Launch


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
