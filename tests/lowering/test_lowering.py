"""Launches of odd and of huge sizes, brought to Triton's IR for sm_90: they all compile, and count.

No interpreter sees this: Triton makes a constant of a whole number that is 1, knows those that 16
divides, and gives 64 bits to those that need them alone.
"""

import itertools
import random
from functools import partial

import pytest
import torch

from benchmarks.ops import LAUNCHES
from cgkernels._offline import Launch, lower_launch
from cgkernels._triton import HAS_TRITON, tl, triton
from cgkernels.library import OPS
from tests.lowering.calls import launches
from tests.lowering.ranges import overflows

pytestmark = [
    pytest.mark.offline,
    pytest.mark.skipif(not HAS_TRITON or triton.knobs.runtime.interpret, reason="needs Triton"),
]

ONE, WHOLE, ODD = 1, 16, 7

# Each pair of images, channels, height and width takes each pair of these: an orthogonal array.
SIZES = [
    tuple((ONE, WHOLE, ODD)[i] for i in (a, b, (a + b) % 3, (a + 2 * b) % 3))
    for a, b in itertools.product(range(3), repeat=2)
]
HUGE = [
    (2**20, 3, 64, 64),  # images
    (1, 3, 2**16 + 8, 2**16),  # pixels
    (2, 2**20, 64, 64),  # channels
    (4, 1024, 4, 2**20),  # what is between
    (1, 2, 2**14, 2**14), (3, 4, 1, 2**31 - 9), (2, 1, 46340, 46341), (3, 2**26, 4, 4),
]  # fmt: skip
first_sizes = [*SIZES[:1], *(pytest.param(s, marks=pytest.mark.slow) for s in SIZES[1:])]
first_huge = [*HUGE[:1], *(pytest.param(s, marks=pytest.mark.slow) for s in HUGE[1:])]


@triton.jit
def _take(out_ptr, x_ptr, rows, columns, BLOCK: tl.constexpr):
    """One program per BLOCK elements, with a number that may be 1 and a product that may wrap."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i % columns * rows, mask=i < columns)
    tl.store(out_ptr + i, x / rows.to(tl.float32), mask=i < columns)


def take(rows, columns):
    x = torch.empty(rows, columns, device="meta")
    _take[(triton.cdiv(columns, 256),)](x, x, rows, columns, BLOCK=256)


def problems(found):
    """Of launches (op, launch): what does not compile, and what 32 bits do not hold."""
    said = {}
    for op, launch in found:
        try:
            lowered = lower_launch(launch, 90)
        except Exception as error:
            said.setdefault((op, str(error)[-200:]), f"{op}, {launch.label}: {error}")
            continue
        for one in lowered:
            for what in overflows(one.ir, one.grid, one.arguments):
                said.setdefault(
                    (one.kernel, what.split(" at ")[-1]), f"{op}, {launch.label}: {what}"
                )
    return list(said.values())


def test_what_is_found():
    one, large, fine = (Launch("toy", partial(take, *n)) for n in ((1, 8), (2**16, 2**16), (8, 8)))
    assert "has no attribute" in problems([("toy", one)])[0]
    (found,) = problems([("toy", large)])
    assert "arith.muli up to 4,294,901,760" in found and "test_lowering.py" in found
    assert problems([("toy", fine)]) == []


@pytest.mark.parametrize("size", first_sizes, ids=str)
def test_small_sizes_compile(size):
    """One image, one channel, one pixel, one step, one token, one head; odd and whole sizes."""
    assert problems(launches(size)) == []


@pytest.mark.parametrize("size", first_huge, ids=str)
def test_huge_sizes_count_in_64_bits(size):
    assert problems(launches(size)) == []


def test_every_op_is_called():
    found = {op for size in SIZES[4:6] for op, _ in launches(size)}
    assert found == set(OPS)


def numbered(args, choose):
    """The arguments with each whole number replaced, strides too."""
    if isinstance(args, tuple):
        return tuple(numbered(value, choose) for value in args)
    return choose() if isinstance(args, int) and not isinstance(args, bool) else args


@pytest.mark.parametrize("op", sorted(LAUNCHES))
def test_every_kernel_takes_any_number(op):
    """All whole numbers of a launch 1, divisible by 16 or neither, and each with each other one."""

    def variants(args):
        draw = random.Random(0).choice
        for choices in ((ONE,), (WHOLE,), (ODD,), *[(ONE, WHOLE, ODD)] * 5):
            yield numbered(args, partial(draw, choices))

    lower_launch(next(LAUNCHES[op]()), 90, variants)
