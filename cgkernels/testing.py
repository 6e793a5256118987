"""What tests and benchmarks share: an error budget, inputs, guarded memory, offline compilation.

Nothing here needs a GPU; only the offline compilation (`compile_launch`) needs Triton.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from cgkernels import random
from cgkernels._offline import KernelReport, Launch, compile_launch, problems
from cgkernels._rounding import modeled_rounding

__all__ = [
    "KernelReport",
    "Launch",
    "assert_within_budget",
    "compile_launch",
    "float32_normals",
    "guarded",
    "layouts",
    "modeled_rounding",
    "plain_and_modeled",
    "poisoned_empty",
    "problems",
    "values",
]

_T = TypeVar("_T")

_MANY = 256  # values, from which on their root mean square is a judgment


# Error budget -------------------------------------------------------------------------------------
def assert_within_budget(
    actual: Tensor | Sequence[Tensor],
    same_dtype_reference: Tensor | Sequence[Tensor],
    float64_reference: Tensor | Sequence[Tensor],
    modeled_reference: Tensor | Sequence[Tensor] | None = None,
) -> None:
    """Assert that actual is about as near to the truth as plain PyTorch in the same dtype must be.

    With e, b and m the distances of actual, same_dtype_reference and modeled_reference from
    float64_reference, and f = 1.5 (16-bit dtypes) or 2 (float32):

        rms e <= f rms m,  or  rms e <= rms b
        max |e| <= 2 max(max |m|, max |b|) + 2 eps max |float64_reference|

    (of fewer than 256 values, f is larger by what few may exceed: `_few`).

    m is derived from the lengths of sums and the sizes of their terms (`modeled_rounding`), and so
    the same on every processor; b is that of the library that this processor gets, and counts where
    it is larger. Without a model it is rms e <= f rms b: for what PyTorch rounds alike everywhere.

    What f rms m allows of a float32 sum of K terms with both signs is, with R the root of the sum
    of their squares and u = 2^-24, about 1.5 0.42 sqrt(min(K, 512) / 2) u R: K = 1,536 in one
    sequence has 0.42 sqrt(K / 2) u R, 1.15 times as much, and in four lanes 0.58 times.

    NaN, +inf and -inf must stand at the same places in all. Where m and b are exact (copies) the
    first line allows no error at all. The band of the second line forgives a lone outlier; it is
    the root mean square that catches a lossy kernel.

    Args:
        actual: result of the kernel; several tensors of one dtype are judged as one population.
        same_dtype_reference: the definition in plain PyTorch on the same inputs; dtypes equal.
        float64_reference: the definition in float64, on the inputs as rounded to the tested dtype.
        modeled_reference: draws of same_dtype_reference within `modeled_rounding`, with one
            dimension more; both come from `plain_and_modeled`. Needed wherever a library sums,
            multiplies or convolves.

    The rule is statistical: give it some 256 values or more, pooled over seeds where one result is
    small. It suits no float64 result, which has no wider reference.

    Raises:
        AssertionError: with both ratios and the worst element, or a wrong shape, dtype or NaN.
        TypeError: dtypes with which no budget exists.
    """
    groups = [actual, same_dtype_reference, float64_reference]
    if modeled_reference is not None:
        groups.append(modeled_reference)
    got, same, exact, *model = ([t] if isinstance(t, Tensor) else list(t) for t in groups)
    if not all(len(ts) == len(got) > 0 for ts in (same, exact, *model)):
        counts = " and ".join(str(len(ts)) for ts in (same, exact, *model))
        raise AssertionError(f"{len(got)} results, {counts} references")
    dtype = got[0].dtype
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"actual must be float32, float16 or bfloat16, got {dtype}")
    for i, (g, s, x, *ms) in enumerate(zip(got, same, exact, *model, strict=True)):
        if x.dtype != torch.float64:
            raise TypeError(f"float64_reference must be float64, got {x.dtype}")
        for reference, shape in ((s, s.shape), *((m, m.shape[1:]) for m in ms)):
            if not g.dtype == reference.dtype == dtype:
                what = f"its reference {reference.dtype}, not {dtype}"
                raise AssertionError(f"result {i} is {g.dtype}, {what}")
            if not g.shape == shape == x.shape:
                shapes = f"references {tuple(shape)} and {tuple(x.shape)}"
                raise AssertionError(f"result {i} has shape {tuple(g.shape)}, {shapes}")
    device = exact[0].device
    modeled = [m.detach().to(device).flatten(1) for ms in model for m in ms]
    g, s, x = (
        torch.cat([t.detach().to(device).flatten() for t in ts]) for ts in (got, same, exact)
    )
    _check_special("the two references", s, x.to(dtype))
    _check_special("result and reference", g, s)
    finite = s.isfinite()
    g, s, true = (t[finite].double() for t in (g, s, x))
    if true.numel() == 0:
        return
    error, of_plain = (g - true).abs(), (s - true).abs()
    of_model = None
    if modeled:
        parts = zip(modeled, x.split([m.shape[1] for m in modeled]), strict=True)
        of_model = torch.cat([(m.double() - part).abs().flatten() for m, part in parts])
        of_model = of_model[of_model.isfinite()]
    budget = _budget(dtype, true, of_plain, of_model)
    if _rms(error) <= budget.rms and error.max().item() <= budget.max:
        return
    at = int(error.argmax())
    raise AssertionError(
        f"less accurate than plain PyTorch in {dtype}, {true.numel()} finite values:\n"
        f"  rms error {_rms(error):.3e} is {_ratio(_rms(error), budget.base)} times {budget.of} "
        f"{budget.base:.3e}, at most {budget.factor:.3g} allowed\n"
        f"  max error {error.max().item():.3e} is "
        f"{_ratio(error.max().item(), budget.worst)} times {budget.of} {budget.worst:.3e}, "
        f"at most 2 allowed, and {budget.band:.3e} more\n"
        f"  worst: got {g[at].item()!r}, float64 {true[at].item()!r}, plain {s[at].item()!r}"
    )


@dataclass(frozen=True)
class _Budget:
    """What is allowed: factor times base, and twice worst and the band."""

    of: str
    base: float
    factor: float
    worst: float
    band: float

    @property
    def rms(self) -> float:
        return self.factor * self.base

    @property
    def max(self) -> float:
        return 2 * self.worst + self.band


def _budget(dtype: torch.dtype, exact: Tensor, plain: Tensor, model: Tensor | None) -> _Budget:
    """Of the errors of plain PyTorch and, where there is one, of the model."""
    factor = 2.0 if dtype == torch.float32 else 1.5
    band = 2 * torch.finfo(dtype).eps * exact.abs().max().item()
    if model is None:
        return _Budget("its", _rms(plain), factor, plain.max().item(), band)
    worst = max(plain.max().item(), model.max().item())
    factor *= _few(exact.numel())
    if factor * _rms(model) >= _rms(plain):
        return _Budget("the model's", _rms(model), factor, worst, band)
    return _Budget("its", _rms(plain), 1.0, worst, band)


def _few(count: int) -> float:
    """How much more the root mean square of few errors may be than that which is expected.

    The mean square of n normal errors exceeds 1 + 2 sqrt(t / n) + 2 t / n times its expectation
    with a probability of at most exp(-t): B. Laurent and P. Massart, Ann. Stat. 28 (2000), lemma 1.
    One in ten thousand is allowed; from 256 values on it is left to the margin of the budget.
    """
    t = math.log(1e4)
    return math.sqrt(1 + 2 * math.sqrt(t / count) + 2 * t / count) if count < _MANY else 1.0


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def plain_and_modeled(run: Callable[[], _T]) -> tuple[_T, _T]:
    """What plain PyTorch gives in the dtype under test: here, and with errors as derived.

    run returns a tensor or several; it is called more than once. What is modeled has one dimension
    more, the first, of draws: several of small results, whose errors are few.
    """
    plain = run()
    size = sum(t.numel() for t in tree_leaves(plain) if isinstance(t, Tensor))
    drawn = []
    for seed in range(min(8, max(1, 16 * _MANY // max(1, size)))):
        with modeled_rounding(seed):
            drawn.append(run())
    return plain, tree_map(lambda *each: torch.stack(each), *drawn)


def _check_special(what: str, left: Tensor, right: Tensor) -> None:
    """NaN and infinities must stand at equal places."""
    differ = _special(left) != _special(right)
    if differ.any():
        at = int(differ.int().argmax())
        raise AssertionError(
            f"{what} differ in NaN or infinity at {int(differ.sum())} of {differ.numel()} values, "
            f"first at {at} of the flattened values: {left[at].item()} and {right[at].item()}"
        )


def _special(t: Tensor) -> Tensor:
    """0 where finite, and a number for each of NaN, inf and -inf."""
    return t.isnan().int() + 2 * t.isposinf().int() + 3 * t.isneginf().int()


def _ratio(error: float, budget: float) -> str:
    return f"{error / budget:.2f}" if budget else "inf"


@contextlib.contextmanager
def float32_normals() -> Iterator[None]:
    """random.py with each operation after the logarithm rounded to float32, as a kernel has to.

    The error budget of a kernel is what plain PyTorch in the same dtype would get; random.py alone
    works in float64 whatever the dtype.
    """
    exact = random._box_muller

    def rounded(w: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        radius = exact(w, torch.zeros_like(v))[0]
        x, y = (z / radius for z in exact(w, v))
        return tuple((radius.float() * c.float()).double() for c in (x, y))

    with mock.patch.object(random, "_box_muller", rounded):
        yield


# Inputs -------------------------------------------------------------------------------------------
def values(
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Inputs of one shape that kernels fail on in different ways, by name.

    normal, small and large: standard normals times 1, 1e-3 and 1e3; offset: mean 100 and standard
    deviation 1, where a variance cancels; equal: one normal row for all; integers: from -8 to 8,
    on which sums and products are exact.
    """
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    made = {
        "normal": z,
        "small": 1e-3 * z,
        "large": 1e3 * z,
        "offset": 100 + z,
        "equal": z[:1].expand_as(z) if z.dim() else z,
        "integers": torch.randint(-8, 9, tuple(shape), generator=generator),
    }
    return {name: t.to(device, dtype) for name, t in made.items()}


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The values of x in every memory layout that its shape admits, by name.

    What lies between the elements of a slice is NaN (the largest value of an integer dtype).
    """
    made = {"contiguous": x.contiguous()}
    made["misaligned"] = _filled(x, x.numel() + 1)[1:].view(x.shape)  # base not on 16 bytes
    if x.dim() >= 1:
        made["strided"] = _filled(x, *x.shape[:-1], 2 * x.shape[-1])[..., ::2]
    if x.dim() >= 2:
        reverse = tuple(range(x.dim()))[::-1]
        made["transposed"] = x.permute(reverse).contiguous().permute(reverse)
        wide = _filled(x, x.shape[0], x.shape[1] + 3, *x.shape[2:])
        made["channel_slice"] = wide[:, 1:-2]
    if x.dim() == 4:
        made["channels_last"] = x.contiguous(memory_format=torch.channels_last)
        wide = wide.contiguous(memory_format=torch.channels_last)
        made["channels_last_slice"] = wide[:, 1:-2]
    for name, t in made.items():
        if name not in ("contiguous", "transposed", "channels_last"):
            t.copy_(x)
    if x.dim() and x.shape[0] > 1 and bool((x == x[:1]).all()):
        made["expanded"] = x[:1].expand_as(x)
    return made


def _fill_value(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def _filled(like: Tensor, *shape: int) -> Tensor:
    return torch.full(shape, _fill_value(like.dtype), dtype=like.dtype, device=like.device)


# Guarded memory -----------------------------------------------------------------------------------
@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """torch.empty* returns NaN (integers: the largest value), so that forgotten output is seen.

    In all threads: the switch is PyTorch's, of the process.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


@contextlib.contextmanager
def guarded(*tensors: Tensor, band: int = 4096) -> Iterator[tuple[Tensor, ...]]:
    """Copies of tensors, layout and alignment kept, with guards before, after and in their gaps.

    A guard is NaN (the largest value of an integer dtype), so that what is read from it spoils the
    result. On leaving the block every guard must still be what it was. This finds an access that
    leaves one tensor by up to `band` elements, inside another tensor or not, on any device.

    Raises:
        AssertionError: on leaving, naming the tensor (by its place) whose guards were written.
    """
    copies, guards = [], []
    for x in tensors:
        span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        start = band + x.data_ptr() // x.element_size() % 16
        buffer = _filled(x, start + (span if x.numel() else 0) + band)
        ours = torch.zeros_like(buffer, dtype=torch.bool)
        ours.as_strided(x.shape, x.stride(), start).fill_(True)
        copy = buffer.as_strided(x.shape, x.stride(), start)
        once = copy
        for d, stride in enumerate(x.stride()):  # copy_ refuses to write an element twice
            if stride == 0 and x.shape[d] > 1:
                once, x = once.narrow(d, 0, 1), x.narrow(d, 0, 1)
        once.copy_(x)
        copies.append(copy)
        guards.append((buffer, ~ours, buffer[~ours]))
    yield tuple(copies)
    for i, (buffer, where, before) in enumerate(guards):
        after = buffer[where]
        if not torch.equal(after.view(torch.uint8), before.view(torch.uint8)):
            raise AssertionError(f"memory around tensor {i} was written")
