"""What is measured: every op and every reference model, declared once for all doors.

The cases of an op are in the file of its name in `ops`, those of models in `models`.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch

from benchmarks.harness.case import Case, Extent, Size, op_case
from benchmarks.harness.ceilings import name_of
from benchmarks.harness.records import OURS
from benchmarks.models import shipped
from benchmarks.models.generation import generation_cases
from benchmarks.models.image_to_image import image_to_image_cases
from benchmarks.ops import CASES

SUITES = ("ops", "models", "growth")


def cases(suite: str, device: torch.device) -> list[Case]:
    """The cases of a suite for a device, the most important first; "all" is ops and models."""
    if suite == "growth":
        return [
            dataclasses.replace(case, providers={OURS: case.providers[OURS]})
            for case in _growth_cases(device)
        ]
    found: list[Case] = []
    if suite in ("ops", "all"):
        found += _op_cases(device)
    if suite in ("models", "all"):
        found += shipped.shipped_cases(device)
        found += generation_cases(device)
        found += image_to_image_cases(device)
    return sorted(found, key=lambda case: case.rank)


def _op_cases(device: torch.device) -> Iterator[Case]:
    cuda = device.type == "cuda"
    dtypes = (
        (torch.bfloat16, torch.float32, torch.float16) if cuda else (torch.float32, torch.bfloat16)
    )
    for (name, variants), (j, dtype) in product(CASES.items(), enumerate(dtypes)):
        for op in variants:
            sizes = {name: size for name, size in op.sizes.items() if cuda or size.cpu}
            for i, (size, of) in enumerate(sorted(sizes.items(), key=_looked_at_first)):
                yield op_case("ops", name, op, size, of.shape, of.label, dtype, i + 2 * j)


def _looked_at_first(named: tuple[str, Size]) -> bool:
    """On CUDA a size between launch and bandwidth, and a large one, come before the others."""
    return not named[1].first


def _growth_cases(device: torch.device) -> Iterator[Case]:
    """Sweeps over sizes, of ours alone: nothing may grow faster than its work does."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    for name, variants in CASES.items():
        for op in variants:
            sweep = op.sweep
            for shape in sweep.shapes:
                axis, larger = sweep.axis, sweep.larger if cuda else 1
                shape = (*shape[:axis], shape[axis] * larger, *shape[axis + 1 :])
                value = math.prod(shape) if sweep.extent == "elements" else shape[axis]
                extent = Extent(sweep.extent, value, 1.0)
                size = f"{sweep.extent}{value}"
                yield op_case("growth", name, op, size, shape, str(shape), dtype, 0, extent)
    yield from shipped.growth_cases(device)


def select(
    suite: str,
    device: torch.device,
    *,
    names: Sequence[str] = (),
    sizes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    providers: Sequence[str] = (),
) -> list[Case]:
    """The cases that fit every list that is not empty, with these providers.

    Raises:
        ValueError: a suite, name, size, dtype or provider that none of the cases has.
    """
    if suite not in (*SUITES, "all"):
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, all, got {suite!r}")
    found = cases(suite, device)
    for what, asked, value in (
        ("names", names, lambda case: [case.name]),
        ("sizes", sizes, lambda case: [case.size]),
        ("dtypes", dtypes, lambda case: [name_of(case.dtype)]),
        ("providers", providers, lambda case: list(case.providers)),
    ):
        known = list(dict.fromkeys(v for case in found for v in value(case)))
        for name in asked:
            if name not in known:
                raise ValueError(
                    f"{what} must be of {', '.join(known)} for suite {suite} on {device.type}, "
                    f"got {name!r}"
                )
    found = [
        case
        for case in found
        if (not names or case.name in names)
        and (not sizes or case.size in sizes)
        and (not dtypes or name_of(case.dtype) in dtypes)
    ]
    if not found:
        raise ValueError(f"no case of suite {suite} has these names, sizes and dtypes together")
    if providers:
        found = [
            dataclasses.replace(
                case, providers={n: p for n, p in case.providers.items() if n in providers}
            )
            for case in found
        ]
    return found
