"""Mean and variance over pixels: their definition in PyTorch, and merging those of parts.

    mean = sum x / n,   M2 = sum (x - mean)^2,   var = M2 / n (biased)

    of parts t with n_t values:  mean = sum n_t mean_t / n
                                 M2 = sum M2_t + n_t (mean_t - mean)^2

The kernel works in float32 and takes nothing off large numbers: the mean of a part comes in two
summands, and a mean of 1000 standard deviations costs the variance nothing.

Source   merging: Chan, Golub, LeVeque, Stanford STAN-CS-79-773.
"""

from torch import Tensor

from cgkernels._triton import tl, triton
from cgkernels.device import merged_moments
from cgkernels.rows import compute_dtype, memory_format

MERGED_PARTS = 256
"""Parts that the kernel merges at a time."""

_BLOCK_C = 16  # channels of a program: 64 bytes of each part


def centered_moments(x: Tensor, over_batch: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x - mean, mean and var of x (N, C, H, W) in at least float32, in two passes.

    mean, var: (N, C, 1, 1), or (1, C, 1, 1) over the batch. Not by torch.var_mean, which sums in
    float64 on a CPU: no kernel can be asked for that.
    """
    x = x.to(compute_dtype(x)).contiguous(memory_format=memory_format(x))
    mean = pixel_mean(x, over_batch)
    centered = x - mean
    return centered, mean, pixel_mean(centered.square(), over_batch)


def pixel_mean(x: Tensor, over_batch: bool) -> Tensor:
    """Over the pixels, in the same bits in any batch: to a single sum threads would all add."""
    if over_batch:
        return x.mean((0, 2, 3), keepdim=True)
    if x.shape[:2] == (1, 1):
        return x.expand(2, -1, -1, -1).mean((2, 3), keepdim=True)[:1]
    return x.mean((2, 3), keepdim=True)


@triton.jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    mean_ptr, var_ptr, part_mean_ptr, part_rest_ptr, part_m2_ptr, origin_ptr,
    channels, total, split, parts, PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per group and BLOCK_C channels: mean and variance of all of its parts."""
    program, blocks = tl.program_id(0), (channels + BLOCK_C - 1) // BLOCK_C
    channel = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    group = (program // blocks).to(tl.int64)
    channel_mask = channel < channels
    first = group * parts * channels + channel
    mean = tl.zeros((BLOCK_C,), tl.float32)
    rest, m2 = mean, mean
    merged = tl.zeros((), tl.int64)  # values so far
    split = merged + split
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        at = first[:, None] + part[None, :] * channels  # [BLOCK_C, PARTS]
        mask = channel_mask[:, None] & (part < parts)[None, :]
        next_mean = tl.load(part_mean_ptr + at, mask=mask, other=0.0)
        next_rest = tl.load(part_rest_ptr + at, mask=mask, other=0.0)
        next_m2 = tl.load(part_m2_ptr + at, mask=mask, other=0.0)
        count = tl.minimum(tl.maximum(total - part * split, 0), split)
        values = tl.minimum(total - merged, PARTS * split)
        next_mean, next_rest, next_m2 = merged_moments(
            next_mean, next_rest, next_m2, count.to(tl.float32)[None, :], values
        )
        if start == 0:
            mean, rest, m2 = next_mean, next_rest, next_m2
        else:
            both = tl.where(tl.arange(0, 2) == 0, merged, values).to(tl.float32)
            mean, rest, m2 = merged_moments(
                tl.join(mean, next_mean), tl.join(rest, next_rest), tl.join(m2, next_m2),
                both[None, :], merged + values,
            )  # fmt: skip
        merged += values
    if origin_ptr is not None:
        mean += tl.load(origin_ptr + first, mask=channel_mask, other=0.0)  # which all parts have
    at = group * channels + channel
    tl.store(mean_ptr + at, mean + rest, mask=channel_mask)
    tl.store(var_ptr + at, m2 / total, mask=channel_mask)


def merge_moments(mean: Tensor, var: Tensor, parts: Tensor, total: int, split: int) -> None:
    """Writes mean and var of groups of `total` values, cut into parts of `split` in their order.

    Args:
        mean, var: (groups, channels), float32 as the next.
        parts: (3 or 4, groups, parts, channels): of each part the two summands of its mean, M2,
            and, where all values of a group had the same number taken off, that number.
    """
    _, groups, count, channels = parts.shape
    part_mean, part_rest, part_m2, *origin = parts
    _merge_kernel[(groups * triton.cdiv(channels, _BLOCK_C),)](
        mean, var, part_mean, part_rest, part_m2, origin[0] if origin else None, channels, total,
        split, count, PARTS=MERGED_PARTS, BLOCK_C=_BLOCK_C, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
