"""What `affine_coupling` launches: compiled without a GPU, judged on one."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.meta import meta_samples
from cgkernels.ops.affine_coupling import MASKS, _launch_bwd, _launch_fwd
from cgkernels.testing import Launch


def launches() -> Iterator[Launch]:
    for label, args, bits in meta_inputs():
        yield Launch(label, partial(_launch_fwd, *args), bits)


def bwd_launches() -> Iterator[Launch]:
    dlogdet = torch.empty(16, device="meta")
    for label, args, bits in meta_inputs():
        yield Launch(label, partial(_launch_bwd, args[0], dlogdet, *args), bits)


def meta_inputs():
    """Every mask, option and layout; where y is pixel by pixel, params are narrow accesses."""
    for name, y, bits in meta_samples():
        params = torch.empty_like(y)
        if name == "contiguous torch.float32":
            for mask in MASKS:
                of_mask = params if mask in MASKS[:2] else torch.cat([params, params], 1)
                for inverse in (False, True):
                    label = f"{mask}{' inverse' * inverse} {name}"
                    yield label, (y, of_mask, mask, 2.0, False, inverse), bits
            yield f"additive {name}", (y, params[:, :2], "last", 2.0, True, False), bits
            few = y[..., :16, :16].contiguous()
            yield f"short rows {name}", (few, few, "last", 2.0, False, False), bits
        else:
            wide = bits if name.startswith("contiguous") else 0
            yield f"last inverse {name}", (y, params, "last", 2.0, False, True), wide
            both = torch.cat([params, params], 1)
            yield f"odd {name}", (y, both, "odd", 2.0, False, False), wide


LAUNCHES = {
    "affine_coupling_fwd": launches,
    "affine_coupling_bwd": bwd_launches,
}
