"""What a case is, and how an op declares its own: shapes, cost, sweep, other ways to compute it.

A case is a call of ours on random inputs of a shape that a known model has, with the bytes that it
must move, the operations that it must do, and the other ways to compute the same.

Plain PyTorch is what one would write without this library: noise comes from PyTorch's own
generator, whose draws depend on the batch and on the device, and which is cheaper than ours on a
CPU. That a sample depends on its seed and index alone is part of what ours is timed for.
"""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import cgkernels
from benchmarks.harness.ceilings import Call, input_sets, name_of
from benchmarks.harness.records import OURS, version_of
from cgkernels.testing import assert_within_budget, float32_normals, plain_and_modeled

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
    in float64. values: how many of each output make a judgment.
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


# An op of one size --------------------------------------------------------------------------------
def op_case(
    suite: str, name: str, op: OpCase, size: str, shape: tuple[int, ...], label: str,
    dtype: torch.dtype, rank: int, extent: Extent | None = None,
) -> Case:  # fmt: skip
    """The case of the op of this name on inputs of a shape and dtype; `Case` has the arguments."""
    numel = math.prod(shape)
    nbytes, flops = op.cost(shape, dtype.itemsize)

    def inputs(seed: int, device: torch.device) -> Inputs:
        return op.make(shape, dtype, torch.Generator().manual_seed(seed), device)

    def build(function: Callable[..., Any], sets: Sequence[Inputs]) -> list[Call]:
        return [lambda i=i: op.finish(function(**i), i) for i in sets]  # type: ignore[misc]

    def compiled(mode: str, sets: Sequence[Inputs]) -> list[Call]:
        return build(torch.compile(op.plain, mode=mode, dynamic=False), sets)

    providers = {
        OURS: Provider(partial(build, op.ours)),
        "eager": Provider(partial(build, op.plain)),
    }
    for mode, provider in COMPILED.items():
        providers[provider] = Provider(partial(compiled, mode), cuda=mode != "default")
    return Case(
        suite, name, op.variant, size, label, dtype, inputs,
        partial(_gate, op, inputs), providers | op.peers(),
        nbytes=nbytes, flops=flops, items=numel,
        source=f"cgkernels.ops.{name}", rank=rank, extent=extent,
    )  # fmt: skip


def _gate(op: OpCase, make: Callable, sets: Sequence[Inputs]) -> None:
    """Ours on these inputs against the truth, all sets together where one gives few values."""
    results: list[tuple[list[Tensor], ...]] = []
    sets, extra = list(sets), 0
    while True:
        for given in sets:
            ours = _outputs(op, op.ours, _fresh(given))
            with float32_normals():
                plain, modeled = plain_and_modeled(partial(_plain_outputs, op, given))
            exact = _outputs(op, _plainly(op.exact or op.ours), _fresh(given, torch.float64))
            results.append((ours, plain, exact, modeled))
        fewest = min(sum(r[0][i].numel() for r in results) for i in range(len(results[0][0])))
        if fewest >= op.values:
            break
        extra += 1
        sets = [make(10_000 + extra, _device_of(sets[0]))]
    for of_output in range(len(results[0][0])):
        ours, plain, exact, modeled = ([r[i][of_output] for r in results] for i in range(4))
        if ours[0].is_floating_point():
            assert_within_budget(ours, plain, exact, modeled)
        else:
            _assert_equal(ours, exact)


def _assert_equal(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Whole numbers, such as tokens, have no budget."""
    wrong = sum(int((a.cpu() != b).sum()) for a, b in zip(ours, exact, strict=True))
    if wrong:
        raise AssertionError(f"{wrong} of {sum(t.numel() for t in ours)} whole numbers are wrong")


def _outputs(op: OpCase, function: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    result = op.finish(function(**inputs), inputs)
    return [t.detach() for t in (result if isinstance(result, tuple) else (result,))]


def _plain_outputs(op: OpCase, inputs: Inputs) -> list[Tensor]:
    return _outputs(op, _plainly(op.ours), _fresh(inputs))


def _plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(**inputs: Any) -> Any:
        with cgkernels.reference():
            return function(**inputs)

    return call


def _fresh(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """Copies; in float64 on the CPU, where alone the references take it."""
    made = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            copy = value.detach().clone()
            if dtype is not None:
                copy = copy.cpu().to(dtype if copy.is_floating_point() else copy.dtype)
            value = copy.requires_grad_(value.requires_grad)
        made[name] = value
    return made


def _device_of(inputs: Inputs) -> torch.device:
    return next(v.device for v in inputs.values() if isinstance(v, Tensor))
