"""What launches the kernel of `decode_attention`: sizes, partition of the work, arguments."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cgkernels._triton import triton
from cgkernels.ops.decode_attention.kernel import _kernel
from cgkernels.rows import compute_dtype


def _launch_config(head_size: int, itemsize: int) -> dict[str, Any]:
    """Sizes that may depend on nothing else, or a row would depend on its batch.

    A split is 32 to 128 KiB of keys and values, what one program streams in about as long as it
    takes to start one; a block of both, three times for the pipeline, fits the 99 KiB of sm_120.

    PDL, from sm_90 on: programs start while the launch before still runs.
    """
    wide = head_size > 128
    if itemsize == 4:
        sizes = {"SPLIT": 128, "BLOCK": 16, "STAGES": 2, "num_warps": 8 if wide else 4}
    elif wide:
        sizes = {"SPLIT": 128, "BLOCK": 32, "STAGES": 3, "num_warps": 8}
    else:
        sizes = {"SPLIT": 256, "BLOCK": 64, "STAGES": 3, "num_warps": 4}
    return {**sizes, "PDL": False}


@dataclass(frozen=True)
class _Partition:
    """How the work is divided among programs; it changes no result. Words as in `kernel.py`."""

    lanes: int  # queries x heads in a query tile
    tiles_per_row: int  # query tiles of one key head in one row
    slots: int  # partial results of a query tile, at most
    width: int  # programs that share the splits of one query tile
    programs: int  # of the rows' own caches
    prefix_lanes: int  # queries x heads of the pack that is multiplied with a shared prefix
    prefix_width: int
    prefix_programs: int
    packs_per_prefix: int  # 0: a pack may start at every query tile


def _partition(q: Tensor, k_cache: Tensor, prefix_k: Tensor | None, split: int) -> _Partition:
    rows, queries, q_heads, head_size = q.shape
    capacity, kv_heads = k_cache.shape[1:3]
    items = queries * (q_heads // kv_heads)
    # 64 lanes would spill, and 32 of the largest heads where values are chosen for each query;
    # float32 has no tensor cores, which more lanes than needed slow down.
    few = q.dtype == torch.float32 or (queries > 1 and head_size > 128)
    lanes = min(16 if few else 32, triton.next_power_of_2(items))
    prefix_lanes = max(16, lanes)  # 32 beside the tiles of single queries would spill on sm_90
    tiles_per_row = triton.cdiv(items, lanes)
    q_tiles = rows * tiles_per_row
    slots = splits = max(1, triton.cdiv(capacity, split))
    width = _width(q_tiles * kv_heads, splits)
    prefix_programs = packs_per_prefix = 0
    prefix_width = 1
    if prefix_k is not None:
        prefixes, prefix_capacity = prefix_k.shape[:2]
        prefix_splits = triton.cdiv(prefix_capacity, split)
        slots += prefix_splits
        # Enough packs should all query tiles have one prefix, for each prefix; or, if that is
        # fewer, a pack at every query tile.
        packs_per_prefix = triton.cdiv(q_tiles, prefix_lanes // lanes)
        packs_per_prefix = packs_per_prefix if prefixes * packs_per_prefix <= q_tiles else 0
        packs = prefixes * packs_per_prefix or q_tiles
        prefix_width = _width(packs * kv_heads, prefix_splits)
        prefix_programs = packs * kv_heads * prefix_width
    return _Partition(
        lanes, tiles_per_row, slots, width, q_tiles * kv_heads * width, prefix_lanes, prefix_width,
        prefix_programs, packs_per_prefix,
    )  # fmt: skip


def _width(others: int, splits: int) -> int:
    """Programs that share the splits of one query tile, beside so many others.

    A cache is seldom full, and programs without a split to do cost time: beyond some 2,000 programs
    each takes several splits. Which program takes a split changes nothing in the result.
    """
    return max(1, min(splits, 2048 // max(1, others)))


def _launch_fwd(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    return _launch_append(q, k_cache, v_cache, lengths, None, None, None, *options)


def _launch_append(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k_new: Tensor | None,
    v_new: Tensor | None, counters: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    position: Tensor | None, prefix_k: Tensor | None, prefix_v: Tensor | None,
    prefix_length: Tensor | None, prefix_id: Tensor | None, left_pad: Tensor | None,
    interleaved: bool, window: int, softcap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = empty_outputs(q)
    if out.numel() == 0:
        if q.shape[2] == 0 and k_new is not None:  # appended all the same, as for any queries
            others = (position, prefix_k, prefix_v, prefix_length, prefix_id, left_pad, interleaved)
            _launch_append(
                k_new, k_cache, v_cache, lengths, k_new, v_new, None, cos, sin, *others, window,
                softcap, scale,
            )  # fmt: skip
        return out, lse
    rows, queries, q_heads, head_size = q.shape
    capacity, kv_heads = k_cache.shape[1:3]
    prefixes, prefix_capacity = (0, 0) if prefix_k is None else prefix_k.shape[:2]
    config = _launch_config(head_size, q.element_size())
    part = _partition(q, k_cache, prefix_k, config["SPLIT"])
    if prefix_k is not None or part.lanes > 16:
        # Of two kinds of programs, or a large tile: four warps would spill.
        config = {**config, "num_warps": 8}
    acc = peak = count = None
    if part.slots > 1:
        q_tiles = rows * part.tiles_per_row * kv_heads
        partial = q_tiles * part.slots * part.lanes
        acc = torch.empty(partial * head_size, dtype=torch.float32, device=q.device)
        peak = torch.empty(partial * 2, dtype=torch.float32, device=q.device)
        # Of its own unless the caller gives them: calls on two streams must not meet.
        count = counters
        if count is None:
            count = torch.zeros(q_tiles, dtype=torch.int32, device=q.device)
    align, new_align = _align(k_cache, v_cache, prefix_k, prefix_v), _align(q, k_new, v_new)
    small = (lengths, left_pad, prefix_length, prefix_id, position, cos, sin)
    _kernel[(part.prefix_programs + part.programs,)](
        out, lse, acc, peak, count, *_with_strides(new_align, q),
        *_with_strides(align, k_cache, v_cache), *_with_strides(new_align, k_new, v_new),
        *_with_strides(align, prefix_k, prefix_v),
        *(None if t is None else t.contiguous() for t in small),
        rows, queries, kv_heads, q_heads // kv_heads, capacity, prefixes, prefix_capacity,
        0 if cos is None else cos.shape[0], part.tiles_per_row, part.slots, part.width,
        part.prefix_programs, part.prefix_width, part.packs_per_prefix, window, scale, softcap,
        OWN_M=max(16, part.lanes), PREFIX_M=part.prefix_lanes, D=head_size,
        D_PAD=max(16, triton.next_power_of_2(head_size)),
        ROTARY=0 if cos is None else 2 * cos.shape[1], INTERLEAVED=interleaved,
        SOFTCAP=softcap != 0, SELECT=queries > 1 or (prefix_k is not None and window < 2**30),
        LANES=part.lanes, ALIGN=align, NEW_ALIGN=new_align,
        enable_fp_fusion=True,
        launch_pdl=config["PDL"],
        maxnreg=255,  # without it ptxas spills a few registers to have one more block at a time
        **config,
    )  # fmt: skip
    return out, lse


def empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse, not yet written."""
    rows, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(rows, heads, queries, dtype=compute_dtype(q))


def _align(first: Tensor, *others: Tensor | None) -> int:
    """Elements in 16 bytes, or the part of them that divides all strides but the last.

    Strides are given in multiples of it: the compiler sees through no other divisor.
    """
    strides = [s for t in (first, *others) if t is not None for s in t.stride()[:3]]
    return math.gcd(16 // first.element_size(), *strides)


def _with_strides(align: int, *tensors: Tensor | None) -> list[Any]:
    """Each tensor and its strides, all but the last in multiples of so many elements."""
    return [
        item
        for t in tensors
        for item in (t, None if t is None else (*(s // align for s in t.stride()[:3]), t.stride(3)))
    ]
