"""What launches the kernels of `instance_norm_act`."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cgkernels._triton import triton
from cgkernels.moments import MERGED_PARTS, merge_moments
from cgkernels.ops.instance_norm_act.kernel import (
    _bwd_kernel,
    _bwd_merge_kernel,
    _fwd_kernel,
    _part_kernel,
)
from cgkernels.ops.instance_norm_act.reference import (
    _empty_gradients,
    _empty_padded,
    _empty_statistics,
)
from cgkernels.rows import memory_format, row_strides, with_strides

_MERGED_CHANNELS = 16  # of a program of `_bwd_merge_kernel`


def _launch_config(pixels: int, channels: int, channels_last: bool) -> dict[str, Any]:
    """Tiles and parts for so many pixels a mean; of the batch only where the mean is, too.

    Eight elements a thread leave registers for the offsets and sums of the backward. In
    channels_last tiles are 32 channels wide, whole sectors of memory in any dtype, and yet enough
    programs for one image; else one channel wide, and sixteen elements a thread. Of channels that
    are no multiple of 8 each element has an address of its own: four a thread.
    Up to 1024 pixels one program takes them all, from the cache the second time; beyond that parts
    of 256 pixels or more let all multiprocessors at one image.
    """
    if channels_last:
        tile = 1024 if channels % 8 else 2048
        block_c = min(32, triton.next_power_of_2(channels))
        block_p, warps = tile // block_c, 8
    else:
        block_c = 1
        block_p = min(2048, max(32, triton.next_power_of_2(pixels)))
        warps = max(1, block_p // 512)
    whole = pixels <= 1024
    least = pixels if whole else max(256, triton.cdiv(pixels, MERGED_PARTS))
    split = block_p * triton.cdiv(least, block_p)
    return {
        "WHOLE": whole, "split": split, "BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": warps,
    }  # fmt: skip


@dataclass(frozen=True)
class _Plan:
    """How x is cut into programs."""

    groups: int  # of images with one mean
    total: int  # pixels of a group
    whole: bool  # one program takes all of them
    split: int  # pixels of a part, where not
    sizes: tuple[int, int, int, int, int]  # channels, height, width, pad, total
    channel_blocks: int
    options: dict[str, Any]  # that all kernels take

    @classmethod
    def of(cls, x: Tensor, pad: int, over_batch: bool) -> "_Plan":
        images, channels, height, width = x.shape
        groups, images = (1, images) if over_batch else (images, 1)
        total = images * height * width
        config = _launch_config(total, channels, memory_format(x) == torch.channels_last)
        tile = {name: config[name] for name in ("BLOCK_P", "BLOCK_C", "num_warps")}
        return cls(
            groups, total, config["WHOLE"], config["split"], (channels, height, width, pad, total),
            triton.cdiv(channels, config["BLOCK_C"]),
            {"BATCH": images > 1, **tile, "enable_fp_fusion": True},
        )  # fmt: skip


def _launch_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    slopes: list[float],
    pad: int,
    over_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y = _empty_padded(x, pad)
    return y, *_launch_inplace(y, None, x, weight, bias, residual, eps, slopes, pad, over_batch)


def _launch_inplace(
    out: Tensor,
    second: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    slopes: list[float],
    pad: int,
    over_batch: bool,
) -> tuple[Tensor, Tensor]:
    mean, var = _empty_statistics(x, over_batch)
    if x.numel() == 0:
        return mean.fill_(math.nan), var.fill_(math.nan)  # the mean of nothing, as in PyTorch
    x, residual = _with_row_strides(x), None if residual is None else _with_row_strides(residual)
    # What a kernel cannot address is written by a copy.
    y, second_y = (
        t if t is None or row_strides(t) is not None else _empty_padded(x, pad)
        for t in (out, second)
    )
    plan = _Plan.of(x, pad, over_batch)
    channels, height, width, *_ = plan.sizes
    out_total = plan.total // (height * width) * (height + 2 * pad) * (width + 2 * pad)
    if not plan.whole:
        parts = triton.cdiv(plan.total, plan.split)
        part = mean.new_empty(4, plan.groups, parts, channels)  # mean, rest, M2, origin
        _part_kernel[(plan.groups * plan.channel_blocks * parts,)](
            *part, *with_strides(x), channels, height * width, plan.total, plan.split, parts,
            parts * plan.split, **plan.options,
        )  # fmt: skip
        merge_moments(mean, var, part, plan.total, plan.split)
    split = out_total if plan.whole else plan.split
    parts = triton.cdiv(out_total, split)
    _fwd_kernel[(plan.groups * plan.channel_blocks * parts,)](
        *with_strides(y, second_y), mean, var, *with_strides(x, residual), _contiguous(weight),
        _contiguous(bias), eps, (slopes[0], slopes[-1]), plan.sizes, out_total, split, parts,
        parts * split, WHOLE=plan.whole, PAD=pad > 0, **plan.options,
    )  # fmt: skip
    for given, written in ((out, y), (second, second_y)):
        if given is not None and written is not None and written is not given:
            given.copy_(written)
    return mean, var


def _launch_bwd(
    dy: Tensor,
    second_dy: Tensor | None,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual_dtype: torch.dtype | None,
    eps: float,
    slopes: list[float],
    pad: int,
    over_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, sums, dresidual = _empty_gradients(second_dy, x, mean, residual_dtype, pad, over_batch)
    if x.numel() == 0:
        return dx, sums.zero_(), dresidual
    x, dy = _with_row_strides(x), _with_row_strides(dy)
    second_dy = None if second_dy is None else _with_row_strides(second_dy)
    plan = _Plan.of(x, pad, over_batch)
    split = plan.total if plan.whole else plan.split
    parts = triton.cdiv(plan.total, split)
    grid = (plan.groups * plan.channel_blocks * parts,)
    inputs = (
        *with_strides(dy, second_dy, x), mean, var, _contiguous(weight), _contiguous(bias), eps,
        (slopes[0], slopes[-1]), plan.sizes, split, parts, parts * split,
    )  # fmt: skip
    if not plan.whole:
        channels = plan.sizes[0]
        part = sums.new_empty(2, plan.groups, parts, channels)
        _bwd_kernel[grid](
            *with_strides(None, None), *part, *inputs, SUMS=True, PAD=pad > 0, **plan.options
        )
        _bwd_merge_kernel[(plan.groups * triton.cdiv(channels, _MERGED_CHANNELS),)](
            *sums, *part, channels, parts, PARTS=MERGED_PARTS, BLOCK_C=_MERGED_CHANNELS,
            enable_fp_fusion=True,
        )  # fmt: skip
    outputs = with_strides(dx, dresidual if dresidual.numel() else None)
    _bwd_kernel[grid](*outputs, *sums, *inputs, SUMS=plan.whole, PAD=pad > 0, **plan.options)
    return dx, sums, dresidual


def _with_row_strides(t: Tensor) -> Tensor:
    """As `rows.with_row_strides`, but a copy keeps the memory format."""
    return t if row_strides(t) is not None else t.contiguous(memory_format=memory_format(t))


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
