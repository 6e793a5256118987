"""`affine_coupling`: what it is measured on, what it launches, how it is tuned."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

import cgkernels
from benchmarks.harness.case import Inputs, OpCase, Size, passes
from benchmarks.harness.inputs import meta_samples, normal
from benchmarks.harness.tuning import Config, row_blocks, tuned
from cgkernels.ops.affine_coupling import MASKS, _launch_bwd, _launch_fwd
from cgkernels.testing import Launch

_SIZES = {
    "fashion": Size((20, 8, 14, 14), "a flow on 28 x 28, after the first squeeze", cpu=True),
    "glow32_l1": Size((64, 12, 16, 16), "Glow on CIFAR-10, first level", cpu=True, first=True),
    "glow256_l1": Size((16, 12, 128, 128), "Glow on 256, first level"),
    "glow256_l5": Size((16, 192, 8, 8), "Glow on 256, fifth level"),
    "wide": Size((64, 12, 256, 256), "Glow on 512, first level, for bandwidth", first=True),
}
_LIMIT = 2.0


def _inputs(
    shape, dtype, generator, device, *, mask="last", additive=False, inverse=False, backward=False
):  # fmt: skip
    rows, channels, *sides = shape
    touched = channels - channels // 2 if mask == "last" else channels
    # As of a trained network: log s of one sign for the most part, so that its sum says something.
    params = normal((rows, touched * (1 if additive else 2), *sides), dtype, generator, device)
    made: Inputs = {
        "y": normal(shape, dtype, generator, device).requires_grad_(backward),
        "params": (params + 0.5).requires_grad_(backward),
        "mask": mask,
    }
    return made | {"additive": additive, "inverse": inverse}


def _plain(y, params, mask, additive, inverse):
    """As flows write it: halves, or a mask of zeros and ones that is multiplied with."""
    if mask == "last":
        stay, y = y.tensor_split([y.shape[1] // 2], 1)
    else:
        rows, columns = (torch.arange(n, device=y.device) for n in y.shape[2:])
        inside = ((rows[:, None] + columns) % 2 == 1).to(y.dtype)
    if additive:
        moved = y - params if inverse else y + params
        logdet = torch.zeros(len(y), device=y.device)
    else:
        raw, shift = params.chunk(2, 1)
        log_scale = _LIMIT * torch.tanh(raw / _LIMIT)
        if mask != "last":
            log_scale, shift = inside * log_scale, inside * shift
        scale = torch.exp(-log_scale if inverse else log_scale)
        moved = (y - shift) * scale if inverse else y * scale + shift
        logdet = log_scale.flatten(1).sum(1)
        logdet = -logdet if inverse else logdet
    return torch.cat([stay, moved], 1) if mask == "last" else moved, logdet


def _gradient(results, inputs):
    out, logdet = results
    wanted = (inputs["y"], inputs["params"])
    gradients = torch.autograd.grad(
        (out, logdet), wanted, (out.detach().flip(0), torch.ones_like(logdet))
    )
    return out.detach(), logdet.detach(), *gradients


def _additive_cost(shape, size):
    """y is read and written; the shift is half as large."""
    return 5 * math.prod(shape) * size // 2, math.prod(shape)


def _case(variant: str, cost, **options) -> OpCase:
    case = OpCase(
        variant, partial(_inputs, **options), cgkernels.affine_coupling, _plain, cost, sizes=_SIZES
    )
    return replace(case, finish=_gradient) if options.get("backward") else case


CASES = [
    _case("channels", passes(3, 20)),
    _case("channels, inverse", passes(3, 20), inverse=True),
    _case("channels, forward and backward", passes(7, 50), backward=True),
    _case("additive", _additive_cost, additive=True),
    _case("checkerboard", passes(4, 20), mask="odd"),
]  # fmt: skip


# Launches -----------------------------------------------------------------------------------------
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


# Tuning -------------------------------------------------------------------------------------------
def _row_splits(numel: int, dense: bool) -> Iterator[Config]:
    """As `row_blocks`, of which a program takes one to eight, and at most 1024 programs a row."""
    for config in row_blocks(numel, dense):
        block = config["BLOCK"]
        for blocks in (1, 2, 4, 8):
            if blocks == 1 or block * blocks < 2 * numel:
                yield {"SPLIT": block * max(blocks, math.ceil(numel / (1024 * block))), **config}


TUNABLE = tuned(_launch_fwd, _row_splits)
