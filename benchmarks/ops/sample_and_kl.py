"""What `sample_and_kl` launches: compiled without a GPU, judged on one."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.meta import meta_samples
from cgkernels.ops.sample_and_kl import _launch_bwd, _launch_fwd
from cgkernels.testing import Launch


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
