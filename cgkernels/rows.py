"""Layouts and dtypes of (B, C, *spatial) tensors as kernels see them: rows of C x pixels elements.

A kernel walks the elements of each sample (row) in the order of memory and numbers them in logical
(C, H, W) order, so that noise does not depend on the memory format.
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from cgkernels._triton import triton

Strides = tuple[int, int, int]


class Layout(NamedTuple):
    """How a set of equally shaped tensors is walked."""

    numel: int  # elements in a row
    channels: int
    pixels: int
    channels_last: bool  # walk pixel by pixel, all channels of one before the next
    dense: bool  # in every tensor, a row's memory follows that walk without gaps


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype in which an op computes: that of its tensors, but at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def lies_apart(x: Tensor, tokens: int) -> bool:
    """Whether vectors along the last dimension of x lie dense and do not overlap.

    But for equal ones; not along the dimension of tokens, whose matrices libraries multiply. What
    PyTorch's attention for CPUs relies upon, and does not look at.
    """
    *others, dense = x.stride()
    width = x.shape[-1]
    return dense == 1 and others[tokens] >= width and all(s == 0 or s >= width for s in others)


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format that is nearest to the strides of x (N, C, H, W)."""
    pixel = x.stride(3) if x.shape[3] > 1 else x.stride(2)
    last = x.shape[1] > 1 and x.shape[2] * x.shape[3] > 1 and 0 < x.stride(1) < pixel
    return torch.channels_last if last else torch.contiguous_format


def row_strides(tensor: Tensor) -> Strides | None:
    """Strides (batch, channel, pixel), or None where the spatial dimensions are no single one."""
    batch, *rest = tensor.stride()
    if not rest:
        return batch, 1, 1
    spatial = [(n, s) for n, s in zip(tensor.shape[2:], rest[1:], strict=True) if n != 1]
    for (_, outer), (n, inner) in pairwise(spatial):
        if outer != n * inner:
            return None
    return batch, rest[0], spatial[-1][1] if spatial else 1


@overload
def with_row_strides(tensor: Tensor) -> Tensor: ...
@overload
def with_row_strides(tensor: Tensor | None) -> Tensor | None: ...
def with_row_strides(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself, or a contiguous copy where it has no row strides; None stays None."""
    if tensor is None or row_strides(tensor) is not None:
        return tensor
    return tensor.contiguous()


def strides_of(tensor: Tensor | None) -> Strides | None:
    """`row_strides` of a tensor that has them."""
    if tensor is None:
        return None
    strides = row_strides(tensor)
    assert strides is not None
    return strides


def row_layout(*tensors: Tensor | None) -> Layout:
    """The walk that suits the first tensor best, and whether it is dense in all of them."""
    present = [t for t in tensors if t is not None]
    shape = present[0].shape
    channels = shape[1] if len(shape) > 1 else 1
    pixels = math.prod(shape[2:])
    all_strides = [s for t in tensors if (s := strides_of(t)) is not None]
    first = all_strides[0]
    channels_last = channels > 1 and pixels > 1 and first[1] < first[2]
    inner = (1, channels) if channels_last else (pixels, 1)
    dense = all(
        (channels == 1 or s[1] == inner[0]) and (pixels == 1 or s[2] == inner[1])
        for s in all_strides
    )
    return Layout(channels * pixels, channels, pixels, channels_last, dense)


def row_block(numel: int, dense: bool) -> dict[str, int]:
    """Block size and warps of an elementwise kernel over rows of this many elements.

    Dense rows: 1024 elements by four warps are eight a thread, one 128-bit access in 16-bit dtypes,
    two in float32. Else each element of each tensor has an address of its own: four a thread, or
    registers spill. Short rows take the next power of two, so that few lanes are masked off.
    """
    block = 1024 if dense else 512
    while block > 128 and block >= 2 * numel:
        block //= 2
    return {"BLOCK": block, "num_warps": max(1, block // (256 if dense else 128))}


def row_launch(*tensors: Tensor | None) -> tuple[tuple[int], dict[str, Any]]:
    """Grid, sizes and switches of an elementwise kernel over the rows of these tensors."""
    layout = row_layout(*tensors)
    config = row_block(layout.numel, layout.dense)
    blocks = triton.cdiv(layout.numel, config["BLOCK"])
    rows = next(t.shape[0] for t in tensors if t is not None)
    return (rows * blocks,), {
        "numel": layout.numel, "channels": layout.channels, "pixels": layout.pixels,
        "blocks": blocks, "CHANNELS_LAST": layout.channels_last, "DENSE": layout.dense,
        "enable_fp_fusion": True, **config,
    }  # fmt: skip


def with_strides(*tensors: Tensor | None) -> list[Any]:
    """Each tensor followed by its strides, as kernels take them."""
    return [item for t in tensors for item in (t, strides_of(t))]


def empty_rows(like: Tensor) -> Tensor:
    """As `empty_like`, but contiguous where that would have no row strides."""
    out = torch.empty_like(like)
    if row_strides(out) is None:
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
    return out


def in_strides_of(like: Tensor, value: Tensor) -> Tensor:
    """The value in the strides that `empty_rows` gives, which is what a fake states."""
    out = empty_rows(like)
    return value if value.stride() == out.stride() else out.copy_(value)
