"""Cases of the op of flows, at the shapes of known ones."""

import math
from dataclasses import replace
from functools import partial

import torch

import cgkernels
from benchmarks.opcase import Inputs, OpCase, Size, normal, passes

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


CASES: dict[str, list[OpCase]] = {
    "affine_coupling": [
        _case("channels", passes(3, 20)),
        _case("channels, inverse", passes(3, 20), inverse=True),
        _case("channels, forward and backward", passes(7, 50), backward=True),
        _case("additive", _additive_cost, additive=True),
        _case("checkerboard", passes(4, 20), mask="odd"),
    ],
}  # fmt: skip
