"""What tests and benchmarks share: an error budget, inputs, guarded memory, offline compilation.

Nothing here needs a GPU; only the offline compilation (`compile_launch`) needs Triton.
"""

import contextlib
from collections.abc import Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor

from cgkernels import random
from cgkernels._offline import KernelReport, Launch, compile_launch, problems

__all__ = [
    "KernelReport",
    "Launch",
    "assert_within_budget",
    "compile_launch",
    "float32_normals",
    "guarded",
    "layouts",
    "poisoned_empty",
    "problems",
    "values",
]


# Error budget -------------------------------------------------------------------------------------
def assert_within_budget(
    actual: Tensor | Sequence[Tensor],
    same_dtype_reference: Tensor | Sequence[Tensor],
    float64_reference: Tensor | Sequence[Tensor],
) -> None:
    """Assert that actual is about as near to the truth as plain PyTorch in the same dtype is.

    With e = actual - float64_reference and b = same_dtype_reference - float64_reference:

        rms e <= 1.5 rms b  (16-bit dtypes)   or   2 rms b  (float32)
        max |e| <= 2 max |b| + 2 eps max |float64_reference|

    NaN, +inf and -inf must stand where both references have them. Where plain PyTorch is exact
    (copies, small integers) the first line allows no error at all. The band of the second line
    forgives a lone outlier; it is the root mean square that catches a lossy kernel.

    Args:
        actual: result of the kernel; several tensors of one dtype are judged as one population.
        same_dtype_reference: the definition in plain PyTorch on the same inputs; dtypes equal.
        float64_reference: the definition in float64, on the inputs as rounded to the tested dtype.

    The rule is statistical: give it some 256 values or more, pooled over seeds where one result is
    small. It suits no float64 result, which has no wider reference.

    Raises:
        AssertionError: with both ratios and the worst element, or a wrong shape, dtype or NaN.
        TypeError: dtypes with which no budget exists.
    """
    got, same, exact = (
        [t] if isinstance(t, Tensor) else list(t)
        for t in (actual, same_dtype_reference, float64_reference)
    )
    if not len(got) == len(same) == len(exact) > 0:
        raise AssertionError(f"{len(got)} results, {len(same)} and {len(exact)} references")
    dtype = got[0].dtype
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"actual must be float32, float16 or bfloat16, got {dtype}")
    for i, (g, s, x) in enumerate(zip(got, same, exact, strict=True)):
        if x.dtype != torch.float64:
            raise TypeError(f"float64_reference must be float64, got {x.dtype}")
        if not g.dtype == s.dtype == dtype:
            raise AssertionError(f"result {i} is {g.dtype}, its reference {s.dtype}, not {dtype}")
        if not g.shape == s.shape == x.shape:
            shapes = f"references {tuple(s.shape)} and {tuple(x.shape)}"
            raise AssertionError(f"result {i} has shape {tuple(g.shape)}, {shapes}")
    device = exact[0].device
    g, s, x = (
        torch.cat([t.detach().to(device).flatten() for t in ts]) for ts in (got, same, exact)
    )
    _check_special("the two references", s, x.to(dtype))
    _check_special("result and reference", g, s)
    finite = s.isfinite()
    g, s, x = (t[finite].double() for t in (g, s, x))
    if x.numel() == 0:
        return
    error, budget = (g - x).abs(), (s - x).abs()
    rms, rms_budget = (t.square().mean().sqrt().item() for t in (error, budget))
    worst, worst_budget = error.max().item(), budget.max().item()
    factor = 2.0 if dtype == torch.float32 else 1.5
    band = 2 * torch.finfo(dtype).eps * x.abs().max().item()
    if rms <= factor * rms_budget and worst <= 2 * worst_budget + band:
        return
    at = int(error.argmax())
    raise AssertionError(
        f"less accurate than plain PyTorch in {dtype}, {x.numel()} finite values:\n"
        f"  rms error {rms:.3e} is {_ratio(rms, rms_budget)} times its {rms_budget:.3e}, "
        f"at most {factor} allowed\n"
        f"  max error {worst:.3e} is {_ratio(worst, worst_budget)} times its {worst_budget:.3e}, "
        f"at most 2 allowed, and {band:.3e} more\n"
        f"  worst: got {g[at].item()!r}, float64 {x[at].item()!r}, plain {s[at].item()!r}"
    )


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

    def rounded(w, v):
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
    """torch.empty* returns NaN (integers: the largest value), so that forgotten output is seen."""
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
