"""What a case is, and how an op declares its own: shapes, cost, sweep, other ways to compute it."""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.records import version_of
from benchmarks.timing import Call, input_sets, name_of

Inputs = dict[str, Any]
MODES = ("default", "reduce-overhead", "max-autotune")  # of torch.compile
# Providers of these.
COMPILED = {"default": "compile", **{mode: f"compile-{mode}" for mode in MODES[1:]}}


@dataclass(frozen=True)
class Provider:
    """A way to compute a case: a call for each set of inputs.

    needs: the package that it comes from; cuda: it makes sense on CUDA only.
    """

    build: Callable[[Sequence[Inputs]], list[Call]]
    needs: str = ""
    cuda: bool = False

    def missing(self, device: torch.device) -> str:
        """Why it cannot run here; empty if it can."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return "not installed"
        return "needs CUDA" if self.cuda and device.type != "cuda" else ""


@dataclass(frozen=True)
class Extent:
    """What a sweep of growth varies, its value, and the exponent that time may grow with."""

    name: str
    value: int
    limit: float


@dataclass(frozen=True)
class Case:
    """One call on inputs of one shape and dtype.

    suite: ops, models or growth. name: of the op or model; variant: what it does, "" for all of it.
    size, label: the shape in one word, and in words with the model that it comes from. inputs:
    random ones of a seed. gate: raises AssertionError unless ours is right on these. nbytes, flops:
    the least that must be moved and done. items: samples (ops: elements) a call. source: the module
    that defines it. rank: cases of a lower one run first. extent: of a sweep of growth. rotate:
    calls must take turns on several inputs, lest they find their own in the cache.
    """

    suite: str
    name: str
    variant: str
    size: str
    label: str
    dtype: torch.dtype
    inputs: Callable[[int, torch.device], Inputs]
    gate: Callable[[Sequence[Inputs]], None]
    providers: Mapping[str, Provider]
    nbytes: int
    flops: int
    items: int
    source: str
    rank: int = 0
    extent: Extent | None = None
    rotate: bool = True

    @property
    def version(self) -> str:
        """Hash of the code behind it."""
        return version_of(self.source)

    def sets(self, device: torch.device) -> list[Inputs]:
        """Random inputs, as many sets as calls must rotate through."""
        first = self.inputs(0, device)
        nbytes = sum(v.nbytes for v in first.values() if isinstance(v, Tensor))
        count = input_sets(nbytes, device) if self.rotate else 1
        return [first, *(self.inputs(seed, device) for seed in range(1, count))]

    def __str__(self) -> str:
        parts = (self.name, self.variant, self.size, name_of(self.dtype))
        return " ".join(part for part in parts if part)


# Shapes -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Size:
    """One shape, for most ops of samples (B, C, H, W), and where it is met.

    cpu: it is small enough for a CPU. first: it is looked at before the others.
    """

    shape: tuple[int, ...]
    model: str
    cpu: bool = False
    first: bool = False

    @property
    def label(self) -> str:
        return f"{self.model} {self.shape}"


SIZES = {
    "fashion": Size((20, 1, 28, 28), "the shipped model", cpu=True),
    "cifar10": Size((64, 3, 32, 32), "DDPM U-Net on CIFAR-10", cpu=True),
    "sd15": Size((8, 4, 64, 64), "Stable Diffusion 1.5 latents", first=True),
    "sdxl": Size((8, 4, 128, 128), "Stable Diffusion XL latents"),
    "adm256": Size((32, 3, 256, 256), "ADM on ImageNet 256", first=True),
    "pixels512": Size((32, 3, 512, 512), "pixels at 512, for bandwidth"),
}


@dataclass(frozen=True)
class Sweep:
    """Shapes of a sweep over the extent of this name, linear in it; on CUDA so many times larger.

    axis: the dimension that grows, by default the first, whose growth the name stands for.
    """

    extent: str
    shapes: tuple[tuple[int, ...], ...]
    larger: int
    axis: int = 0


@dataclass(frozen=True)
class OpCase:
    """How an op is measured, for any size.

    make: inputs of a shape, dtype, generator and device. ours and plain take them by keyword.
    cost: bytes that must be moved and operations that must be done, of a shape and an element's
    size. finish: what of the result is judged and timed, where that is more (a backward). sweep:
    how it must grow. exact: the truth that ours is judged against, where it is not ours run plainly
    in float64. values: how many of each output make a judgement.
    """

    variant: str
    make: Callable[[tuple[int, ...], torch.dtype, torch.Generator, torch.device], Inputs]
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    cost: Callable[[tuple[int, ...], int], tuple[int, int]]
    finish: Callable[[Any, Inputs], Any] = lambda result, inputs: result
    peers: Callable[[], dict[str, Provider]] = dict
    sizes: Mapping[str, Size] = field(default_factory=lambda: SIZES)
    sweep: Sweep = Sweep("elements", tuple((rows, 4, 64, 64) for rows in (4, 8, 16, 32, 64)), 16)
    exact: Callable[..., Any] | None = None
    values: int = 256  # what the error budget needs


def passes(passes: int, flops: int) -> Callable[[tuple[int, ...], int], tuple[int, int]]:
    """The cost of an elementwise op: passes over the samples, operations an element."""
    return lambda shape, size: (passes * math.prod(shape) * size, flops * math.prod(shape))


def normal(shape, dtype, generator, device):
    """Drawn on the CPU, so that a seed gives the same inputs everywhere."""
    return torch.randn(shape, generator=generator).to(device, dtype)


def numbers(generator, device, rows):
    seed = torch.randint(2**62, (1,), generator=generator).to(device)
    return {"seed": seed, "index": torch.arange(rows, device=device)}
