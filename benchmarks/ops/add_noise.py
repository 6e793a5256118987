"""What `add_noise` launches: compiled without a GPU, judged on one."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.meta import meta_samples
from cgkernels.ops.add_noise import _launch_bwd, _launch_fwd
from cgkernels.targets import TARGETS
from cgkernels.testing import Launch


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
