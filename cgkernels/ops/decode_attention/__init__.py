"""Attention of new tokens over a cache of keys and values, a shared prefix before it.

    out = sum_j softmax_j(cap(scale q . k_j)) v_j,   cap(s) = softcap tanh(s / softcap) or s

over the tokens of the shared prefix and of the row's own cache up to the query's own position. New
keys and values are rotated, appended and attended to in the same launch.

Shapes   q, out: (B, Sq, Hq, D); caches (B, S, Hkv, D), prefixes (P, M, Hkv, D) by any strides;
         lse: (B, Hq, Sq); rope: two tables (positions, R / 2).
Dtypes   float32, float16, bfloat16 (float64 on CPU), one for all but the tables; softmax, sums and
         lse in float32. In half types rotated queries and keys, and the weights that values are
         multiplied with, are rounded to the dtype. A row has the same bits alone or in any batch.
Backward none; `prefill_attention` is for training, reference() differentiates without appending.
Source   online softmax: arXiv:1805.02867; split keys: Flash-Decoding (Dao et al. 2023); shared
         prefixes: arXiv:2402.05099; rotary embedding: arXiv:2104.09864; softcap: arXiv:2408.00118.
"""

import math
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from cgkernels._triton import tl, triton
from cgkernels.checks import (
    check_attention,
    check_counters,
    check_float,
    check_integers,
    check_no_grad,
    check_same_device,
    check_shape,
    check_writable,
    readable,
)
from cgkernels.device import launch_next, tanh, wait_for_previous
from cgkernels.library import define_op, refuse_forward_mode, using_reference


# 1. Reference -------------------------------------------------------------------------------------
def decode_attention_ref(
    q, k_cache, v_cache, lengths, cos, sin, position, prefix_k, prefix_v, prefix_length, prefix_id,
    left_pad, interleaved, window, softcap, scale,
):  # fmt: skip
    rows, queries, q_heads, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    capacity, kv_heads = k_cache.shape[1:3]
    slot = torch.arange(capacity, device=q.device)
    counts = _counts(lengths, left_pad, prefix_k, prefix_length, prefix_id, capacity, 0)
    length, pad, before, fits = (n[:, None] for n in counts)
    last = before + length - pad - queries + torch.arange(queries, device=q.device)  # (B, Sq)
    place, live = before + slot - pad, (slot >= pad) & (slot < length)  # (B, S)
    k, v = k_cache, v_cache
    if prefix_k is not None:
        shared = torch.arange(prefix_k.shape[1], device=q.device).expand(rows, -1)
        chosen = prefix_id.long().clamp(0, prefix_k.shape[0] - 1)
        k, v = torch.cat([prefix_k[chosen], k], 1), torch.cat([prefix_v[chosen], v], 1)
        place, live = torch.cat([shared, place], 1), torch.cat([shared < before, live], 1)
    visible = live[:, None] & (place[:, None] <= last[..., None])
    visible &= place[:, None] > last[..., None] - window
    k, v = (t.masked_fill(~live[..., None, None], 0).to(dtype) for t in (k, v))  # NaN where unused
    turned = rotated_ref(q, cos, sin, last if position is None else position, interleaved)
    turned = turned.to(dtype).unflatten(2, (kv_heads, q_heads // kv_heads))
    score = scale * torch.einsum("bihgd,bjhd->bhgij", turned, k)
    score = softcap * torch.tanh(score / softcap) if softcap else score
    score = score.masked_fill(~visible[:, None, None], -torch.inf)
    lse = score.logsumexp(-1)
    weight = torch.exp(score - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    weight = weight.to(q.dtype).to(dtype)
    out = torch.einsum("bhgij,bjhd->bihgd", weight, v).flatten(2, 3)
    out = out.masked_fill(~fits[..., None, None], torch.nan)
    lse = lse.flatten(1, 2).masked_fill(~fits[..., None], torch.nan)
    return out.to(q.dtype), lse


def appended_ref(
    k_cache, v_cache, lengths, k_new, v_new, cos, sin, position, prefix_k, prefix_length, prefix_id,
    left_pad, interleaved,
):  # fmt: skip
    """Both caches with the new tokens, the keys rotated; a row that would overflow stays as it is.

    Also the lengths that `decode_attention_ref` needs to see them; -1 for a row that overflows.
    """
    capacity, new = k_cache.shape[1], k_new.shape[1]
    counts = _counts(lengths, left_pad, prefix_k, prefix_length, prefix_id, capacity, new)
    length, pad, before, fits = (n[:, None] for n in counts)
    token = torch.arange(capacity, device=lengths.device) - length  # of each slot, (B, S)
    written = (fits & (token >= 0) & (token < new))[..., None, None]
    if position is None:
        position = before + length - pad + torch.arange(new, device=lengths.device)
    k_new = rotated_ref(k_new, cos, sin, position, interleaved)
    source = token.clamp(0, new - 1)[..., None, None].expand(k_cache.shape)
    k, v = (
        torch.where(written, fresh.gather(1, source), cache) if capacity else cache
        for cache, fresh in ((k_cache, k_new), (v_cache, v_new))
    )
    return k, v, torch.where(fits, length + new, -1)[:, 0]


def rotated_ref(x, cos, sin, position, interleaved):
    """x (B, n, H, D) with its first dimensions rotated by the angles of its positions (B, n)."""
    if cos is None:
        return x
    inside = ((position >= 0) & (position < cos.shape[0]))[..., None]
    at = position.long().clamp(0, cos.shape[0] - 1)
    c, s = (t[at].masked_fill(~inside, torch.nan) for t in (cos, sin))
    return _turned(x, c, s, interleaved)


def _turned(x, cos, sin, interleaved):
    """x (B, n, H, D) rotated by angles (B, n, R / 2) or (n, R / 2)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    rotary = 2 * cos.shape[-1]
    c, s = (t.to(dtype).unsqueeze(-2) for t in (cos, sin))
    turned = x[..., :rotary].to(dtype)
    if interleaved:
        a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat([a * c - b * s, b * c + a * s], -1)
    turned = turned.to(x.dtype)
    return turned if rotary == x.shape[-1] else torch.cat([turned, x[..., rotary:]], -1)


def _counts(lengths, left_pad, prefix_k, prefix_length, prefix_id, capacity, new):
    """Length, padding, length of the prefix, int64 (B,), and whether a row's tokens fit."""
    length = lengths.long()
    fits = (length >= 0) & (length + new <= capacity)
    pad = torch.zeros_like(length) if left_pad is None else left_pad.long()
    if prefix_k is None:
        return length, pad, torch.zeros_like(length), fits
    prefixes, prefix_capacity = prefix_k.shape[:2]
    before = prefix_length.long()[prefix_id.long().clamp(0, prefixes - 1)]
    fits &= (prefix_id >= 0) & (prefix_id < prefixes) & (before >= 0) & (before <= prefix_capacity)
    return length, pad, before, fits


# 2. Kernels ---------------------------------------------------------------------------------------
@triton.jit
def _rotated(
    x_ptr, strides, row, token, head, d, position, mask, cos_ptr, sin_ptr, positions,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Tokens of a head (n, D), rotated by the angles of their positions, in float32."""
    base = x_ptr + (row * strides[0] + token * strides[1] + head * strides[2])[:, None] * UNIT
    x = tl.load(base + d[None, :] * strides[3], mask=mask, other=0.0).to(tl.float32)
    if cos_ptr is not None:
        if INTERLEAVED:
            first = d % 2 == 0
            angle, partner = d // 2, tl.where(first, d + 1, d - 1)
        else:
            first = d < ROTARY // 2
            angle = tl.where(first, d, d - ROTARY // 2)
            partner = tl.where(first, d + ROTARY // 2, d - ROTARY // 2)
        turned = mask & (d < ROTARY)[None, :]
        known = turned & ((position >= 0) & (position < positions))[:, None]
        at = position[:, None] * (ROTARY // 2) + angle[None, :]
        cos = tl.load(cos_ptr + at, mask=known, other=float("nan"))
        sin = tl.load(sin_ptr + at, mask=known, other=float("nan"))
        other = tl.load(base + partner[None, :] * strides[3], mask=turned, other=0.0)
        other = other.to(tl.float32)
        other = tl.where(first[None, :], -other, other)
        x = tl.where(turned, x * cos + other * sin, x)
    return x


@triton.jit
def _update(
    acc, peak, total, q, k, v, index, lo, hi, first, last, scale, softcap, SOFTCAP: tl.constexpr
):
    """A step of the online softmax in base 2: keys lo <= index < hi, of each lane first .. last."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SOFTCAP:
        score = (softcap * 1.4426950408889634) * tanh(score * (scale / softcap))
    else:
        score = score * (scale * 1.4426950408889634)
    visible = (index[None, :] >= first[:, None]) & (index[None, :] <= last[:, None])
    visible &= ((index >= lo) & (index < hi))[None, :]
    score = tl.where(visible, score, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf is no number
    weight = tl.exp2(score - safe[:, None])
    shrink = tl.exp2(peak - safe)
    total = total * shrink + tl.sum(weight, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
    return acc, higher, total


@triton.jit
def _extent(
    row, there, lengths_ptr, left_pad_ptr, prefix_length_ptr, prefix_id_ptr, queries, capacity,
    prefixes, prefix_capacity, window, NEW: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """What of prefix and cache a row (or each of some rows) sees, in tokens and in splits.

    Every program of a row must come to the same splits: this is the one place where they are made.
    """
    length = tl.load(lengths_ptr + row, mask=there, other=0).to(tl.int64)
    end = length + queries if NEW else length
    fits = there & (length >= 0) & (end <= capacity)
    pad = length * 0
    if left_pad_ptr is not None:
        pad = tl.load(left_pad_ptr + row, mask=there, other=0).to(tl.int64)
    before = length * 0
    if prefix_id_ptr is not None:
        prefix = tl.load(prefix_id_ptr + row, mask=there, other=0).to(tl.int64)
        fits &= (prefix >= 0) & (prefix < prefixes)
        before = tl.load(prefix_length_ptr + prefix, mask=fits, other=0).to(tl.int64)
        fits &= (before >= 0) & (before <= prefix_capacity)
    end = tl.where(fits, end, 0).to(tl.int32)
    before = tl.where(fits, before, 0).to(tl.int32)
    pad = tl.where(fits, pad, 0).to(tl.int32)
    slot = end - queries  # of the first query
    own_lo = tl.maximum(tl.maximum(pad, slot - window + 1), 0)
    own_first = own_lo // SPLIT
    own_splits = tl.where(own_lo < end, (end + SPLIT - 1) // SPLIT - own_first, 0)
    prefix_lo = tl.maximum(slot - window + 1 - pad + before, 0)
    prefix_first = prefix_lo // SPLIT
    prefix_splits = tl.where(prefix_lo < before, (before + SPLIT - 1) // SPLIT - prefix_first, 0)
    return (
        fits, end, pad, before, slot, own_lo, own_first, own_splits, prefix_lo, prefix_first,
        prefix_splits,
    )  # fmt: skip


@triton.jit
def _rows_with(prefix_id_ptr, rows, prefix, rank, M: tl.constexpr):
    """The rank-th row with this prefix for each of some ranks, -1 beyond the last."""
    found = tl.full((M, 64), -1, tl.int32)  # reduced once: Triton 3.6 fails on a maximum in a loop
    seen = 0
    for start in range(0, rows, 64):
        row = start + tl.arange(0, 64)
        same = tl.load(prefix_id_ptr + row, mask=row < rows, other=-1) == prefix
        at = seen + tl.cumsum(same.to(tl.int32), 0) - 1
        hit = same[None, :] & (at[None, :] == rank[:, None])
        found = tl.where(hit, row[None, :], found)
        seen += tl.sum(same.to(tl.int32), 0)
    return tl.max(found, 1)


@triton.jit
def _write(
    out_ptr, lse_ptr, acc, peak, total, row, query, head, mask, queries, q_heads, d,
    D: tl.constexpr,
):  # fmt: skip
    """Normalised rows of the output and their log-sum-exp; (0, -inf) where nothing was seen."""
    row = row.to(tl.int64)
    empty = total == 0
    out = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, total)[:, None])
    at = ((row * queries + query) * q_heads + head)[:, None] * D + d[None, :]
    inside = mask[:, None] & (d < D)[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
    lse = (peak + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453
    lse = tl.where(empty, float("-inf"), lse)
    tl.store(lse_ptr + (row * q_heads + head) * queries + query, lse, mask=mask)


@triton.jit
def _merge(
    out_ptr, lse_ptr, acc_ptr, peak_ptr, part, splits, row, query, head, mask, queries, q_heads, d,
    lane, D: tl.constexpr, LANES: tl.constexpr, M: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Partial results 0 .. splits - 1 of each lane, in this order, whoever made them."""
    peak = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, d.shape[0]), tl.float32)
    for start in range(0, tl.max(tl.where(mask, splits, 0), 0), AT_ONCE):
        for j in tl.static_range(AT_ONCE):  # so many loads in flight
            inside = mask & (start + j < splits)
            at = (part + start + j) * LANES
            one = peak_ptr + 2 * at + lane
            new = tl.load(one, mask=inside, other=float("-inf"), cache_modifier=".cg")
            sum = tl.load(one + LANES, mask=inside, other=0.0, cache_modifier=".cg")
            value = tl.load(
                acc_ptr + (at + lane)[:, None] * D + d[None, :],
                mask=inside[:, None] & (d < D)[None, :], other=0.0, cache_modifier=".cg",
            )  # fmt: skip
            higher = tl.maximum(peak, new)
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            shrink, weight = tl.exp2(peak - safe), tl.exp2(new - safe)
            # Explicit, so that lanes of different tiles cannot be contracted differently.
            total = tl.fma(weight, sum, total * shrink)
            weight = tl.broadcast_to(weight[:, None], acc.shape)
            acc = tl.fma(weight, value, acc * shrink[:, None])
            peak = higher
    _write(out_ptr, lse_ptr, acc, peak, total, row, query, head, mask, queries, q_heads, d, D)


@triton.jit
def _work(
    program, out_ptr, lse_ptr, acc_ptr, peak_ptr, count_ptr, q_ptr, q_strides,
    k_ptr, k_strides, v_ptr, v_strides, k_new_ptr, k_new_strides, v_new_ptr, v_new_strides,
    prefix_k_ptr, prefix_k_strides, prefix_v_ptr, prefix_v_strides,
    lengths_ptr, left_pad_ptr, prefix_length_ptr, prefix_id_ptr, position_ptr, cos_ptr, sin_ptr,
    rows, queries, kv_heads, group, capacity, prefixes, prefix_capacity, positions,
    chunks, slots, width, tiles_each, window, scale, softcap,
    SHARED: tl.constexpr, M: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
    UNIT: tl.constexpr, NEW_UNIT: tl.constexpr,
):  # fmt: skip
    """Splits w, w + width, ... of a unit's own cache, or of the prefix of a tile of units.

    A unit is LANES of the queries x heads that share a key head in one row.
    """
    APPEND: tl.constexpr = k_new_ptr is not None
    w, program = program % width, program // width
    kv_head = (program % kv_heads).to(tl.int64)
    unit = program // kv_heads
    j, d = tl.arange(0, M), tl.arange(0, D_PAD)
    if SHARED:
        # The tile: M / LANES of the units with one prefix, from the rank-th on.
        UNITS: tl.constexpr = M // LANES
        if tiles_each > 0:
            prefix = (unit // tiles_each).to(tl.int64)
            rank = unit % tiles_each * UNITS
        else:  # more prefixes than units: each unit may be the first of a tile
            prefix = tl.load(prefix_id_ptr + unit // chunks).to(tl.int64)
            rank = unit % chunks
            for start in range(0, unit // chunks, 64):
                other = start + tl.arange(0, 64)
                same = other < unit // chunks
                same &= tl.load(prefix_id_ptr + other, mask=same, other=-1) == prefix
                rank += tl.sum(same.to(tl.int32), 0) * chunks
            prefix = tl.where(rank % UNITS == 0, prefix, -1)
        ranks = rank + j // LANES
        row = _rows_with(prefix_id_ptr, rows, prefix, ranks // chunks, M)
        chunk, lane = ranks % chunks, j % LANES
        there = row >= 0
        row = tl.maximum(row, 0)
        unit = row * chunks + chunk
        any_there = (prefix >= 0) & (prefix < prefixes) & (tl.max(there.to(tl.int32), 0) > 0)
    else:
        row, chunk, lane = unit // chunks, unit % chunks, j
        there = row >= 0
        any_there = there
    if any_there:
        (
            fits, end, pad, before, slot, own_lo, own_first, own_splits, prefix_lo, prefix_first,
            prefix_splits,
        ) = _extent(
            row, there, lengths_ptr, left_pad_ptr, prefix_length_ptr, prefix_id_ptr, queries,
            capacity, prefixes, prefix_capacity, window, APPEND, SPLIT,
        )  # fmt: skip
        splits = prefix_splits + own_splits + 0 * j
        item = chunk * LANES + lane  # of queries x heads
        query = item % queries
        head = kv_head * group + item // queries
        mask = (lane < LANES) & (item < tl.where(fits, queries * group, 0))
        q_heads = kv_heads * group
        row64 = row.to(tl.int64)
        part = (unit.to(tl.int64) * kv_heads + kv_head) * slots + 0 * j
        place = slot + query
        if SHARED:
            last = place - pad + before  # of the prefix's tokens
            first_split = tl.min(tl.where(mask, prefix_first, 2**30), 0)
            hi = tl.max(tl.where(mask, before, 0), 0)
            lo = tl.min(tl.where(mask, prefix_lo, 2**30), 0)
            end_split = tl.where(lo < hi, (hi + SPLIT - 1) // SPLIT, 0)
            k_head = prefix * prefix_k_strides[0] + kv_head * prefix_k_strides[2]
            v_head = prefix * prefix_v_strides[0] + kv_head * prefix_v_strides[2]
            k_head, v_head = prefix_k_ptr + k_head * UNIT, prefix_v_ptr + v_head * UNIT
            k_step, k_unit = prefix_k_strides[1], prefix_k_strides[3]
            v_step, v_unit = prefix_v_strides[1], prefix_v_strides[3]
        else:
            last = place
            first_split, end_split = own_first, own_first + own_splits
            lo, hi = own_lo, end
            k_head = k_ptr + (row64 * k_strides[0] + kv_head * k_strides[2]) * UNIT
            v_head = v_ptr + (row64 * v_strides[0] + kv_head * v_strides[2]) * UNIT
            k_step, k_unit = k_strides[1], k_strides[3]
            v_step, v_unit = v_strides[1], v_strides[3]
        done = tl.zeros((M,), tl.int32)
        if first_split + w < end_split:
            q_position = place - pad + before
            if position_ptr is not None:
                q_position = tl.load(position_ptr + row64 * queries + query, mask=mask, other=0)
            q = _rotated(
                q_ptr, q_strides, row64, query, head, d, q_position,
                mask[:, None] & (d < D)[None, :], cos_ptr, sin_ptr, positions, ROTARY, INTERLEAVED,
                NEW_UNIT,
            ).to(q_ptr.dtype.element_ty)  # fmt: skip
            first = last - window + 1
            # What is the same for all splits is computed again: kept in registers, it spills.
            for split in tl.range(first_split + w, end_split, width, disable_licm=True):
                acc = tl.zeros((M, D_PAD), tl.float32)
                peak = tl.full((M,), float("-inf"), tl.float32)
                total = tl.zeros((M,), tl.float32)
                split_lo = tl.maximum(split * SPLIT, lo)
                split_hi = tl.minimum(split * SPLIT + SPLIT, hi)
                if APPEND and not SHARED:
                    # The new tokens of this split; the loop below reads them back. Units of one row
                    # store the same bits.
                    for start in range(tl.maximum(split_lo, slot), split_hi, 16):
                        index = start + tl.arange(0, 16)
                        token = index - slot
                        inside = (index < split_hi)[:, None] & (d < D)[None, :]
                        position = index - pad + before
                        if position_ptr is not None:
                            at = position_ptr + row64 * queries + token
                            position = tl.load(at, mask=index < split_hi, other=0)
                        k = _rotated(
                            k_new_ptr, k_new_strides, row64, token, kv_head, d, position,
                            inside, cos_ptr, sin_ptr, positions, ROTARY, INTERLEAVED, NEW_UNIT,
                        )  # fmt: skip
                        v = _rotated(
                            v_new_ptr, v_new_strides, row64, token, kv_head, d, position,
                            inside, None, None, 0, 0, False, NEW_UNIT,
                        )  # fmt: skip
                        wide = index.to(tl.int64)[:, None]
                        k_at = wide * k_step * UNIT + d[None, :] * k_unit
                        v_at = wide * v_step * UNIT + d[None, :] * v_unit
                        tl.store(k_head + k_at, k.to(k_ptr.dtype.element_ty), mask=inside)
                        tl.store(v_head + v_at, v.to(v_ptr.dtype.element_ty), mask=inside)
                    tl.debug_barrier()
                for start in tl.range(
                    split_lo // BLOCK * BLOCK, split_hi, BLOCK, num_stages=STAGES
                ):
                    index = start + tl.arange(0, BLOCK)
                    inside = ((index >= split_lo) & (index < split_hi))[:, None] & (d < D)[None, :]
                    wide = index.to(tl.int64)[:, None]
                    k_at = wide * k_step * UNIT + d[None, :] * k_unit
                    v_at = wide * v_step * UNIT + d[None, :] * v_unit
                    k = tl.load(k_head + k_at, mask=inside, other=0.0)
                    v = tl.load(v_head + v_at, mask=inside, other=0.0)
                    acc, peak, total = _update(
                        acc, peak, total, q, k, v, index, split_lo, split_hi, first, last, scale,
                        softcap, SOFTCAP,
                    )  # fmt: skip
                if SHARED:
                    mine = mask & (split >= prefix_first) & (prefix_splits > 0)
                    here = part + split - prefix_first
                else:
                    mine = mask
                    here = part + prefix_splits + split - own_first
                _write(
                    out_ptr, lse_ptr, acc, peak, total, row, query, head, mine & (splits == 1),
                    queries, q_heads, d, D,
                )  # fmt: skip
                if acc_ptr is not None:
                    store = mine & (splits > 1)
                    tl.store(
                        acc_ptr + (here * LANES + lane)[:, None] * D + d[None, :], acc,
                        mask=store[:, None] & (d < D)[None, :],
                    )  # fmt: skip
                    tl.store(peak_ptr + here * (2 * LANES) + lane, peak, mask=store)
                    tl.store(peak_ptr + here * (2 * LANES) + lane + LANES, total, mask=store)
                done += mine.to(tl.int32)
            if acc_ptr is not None:
                # The last program to come here has what all others stored before they came.
                lead = mask & (lane == 0) & (done > 0) & (splits > 1)
                tl.debug_barrier()
                count = count_ptr + unit.to(tl.int64) * kv_heads + kv_head + 0 * j
                came = tl.atomic_add(count, done, mask=lead, sem="acq_rel", scope="gpu")
                tl.debug_barrier()
                last_one = (lead & (came + done == splits)).to(tl.int32)
                tl.store(count, 0, mask=last_one > 0)  # as the next launch must find it
                last_one = tl.max(tl.reshape(last_one, (M // LANES, LANES)), 1)
                last_one = tl.broadcast_to(last_one[:, None], (M // LANES, LANES))
                ready = mask & (tl.reshape(last_one, (M,)) > 0)
                if tl.max(ready.to(tl.int32), 0) > 0:
                    AT_ONCE: tl.constexpr = max(1, min(4, 4096 // (M * D_PAD)))
                    _merge(
                        out_ptr, lse_ptr, acc_ptr, peak_ptr, part, splits, row,
                        query, head, ready, queries, q_heads, d, lane, D, LANES, M, AT_ONCE,
                    )  # fmt: skip
        if not SHARED:  # noqa: SIM102  (a constexpr and a value)
            if (w == 0) & (
                (prefix_splits + own_splits == 0) | (not fits)
            ):  # nothing to see, or nothing to say
                blank = tl.zeros((M,), tl.float32) + tl.where(fits, 0.0, float("nan"))
                _write(
                    out_ptr, lse_ptr, tl.zeros((M, D_PAD), tl.float32), blank, blank, row, query,
                    head, (lane < LANES) & (item < queries * group), queries, q_heads, d, D,
                )  # fmt: skip


@triton.jit
def _kernel(
    out_ptr, lse_ptr, acc_ptr, peak_ptr, count_ptr, q_ptr, q_strides,
    k_ptr, k_strides, v_ptr, v_strides, k_new_ptr, k_new_strides, v_new_ptr, v_new_strides,
    prefix_k_ptr, prefix_k_strides, prefix_v_ptr, prefix_v_strides,
    lengths_ptr, left_pad_ptr, prefix_length_ptr, prefix_id_ptr, position_ptr, cos_ptr, sin_ptr,
    rows, queries, kv_heads, group, capacity, prefixes, prefix_capacity, positions,
    chunks, slots, width, prefix_programs, prefix_width, tiles_each, window, scale, softcap,
    TILE: tl.constexpr, SHARED_TILE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
    UNIT: tl.constexpr, NEW_UNIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """First the programs of the shared prefixes, then those of the rows' own caches."""
    program = tl.program_id(0)
    if PDL:
        launch_next()
        wait_for_previous()
    if prefix_k_ptr is not None:
        if program < prefix_programs:
            _work(
                program, out_ptr, lse_ptr, acc_ptr, peak_ptr, count_ptr, q_ptr, q_strides,
                k_ptr, k_strides, v_ptr, v_strides, k_new_ptr, k_new_strides, v_new_ptr,
                v_new_strides, prefix_k_ptr, prefix_k_strides, prefix_v_ptr, prefix_v_strides,
                lengths_ptr, left_pad_ptr, prefix_length_ptr, prefix_id_ptr, position_ptr, cos_ptr,
                sin_ptr, rows, queries, kv_heads, group, capacity, prefixes, prefix_capacity,
                positions, chunks, slots, prefix_width, tiles_each, window, scale, softcap,
                True, SHARED_TILE, D, D_PAD, ROTARY, INTERLEAVED, SOFTCAP, SPLIT, BLOCK, LANES,
                STAGES, UNIT, NEW_UNIT,
            )  # fmt: skip
        program -= prefix_programs
    if program >= 0:
        _work(
            program, out_ptr, lse_ptr, acc_ptr, peak_ptr, count_ptr, q_ptr, q_strides,
            k_ptr, k_strides, v_ptr, v_strides, k_new_ptr, k_new_strides, v_new_ptr,
            v_new_strides, prefix_k_ptr, prefix_k_strides, prefix_v_ptr, prefix_v_strides,
            lengths_ptr, left_pad_ptr, prefix_length_ptr, prefix_id_ptr, position_ptr, cos_ptr,
            sin_ptr, rows, queries, kv_heads, group, capacity, prefixes, prefix_capacity,
            positions, chunks, slots, width, tiles_each, window, scale, softcap,
            False, TILE, D, D_PAD, ROTARY, INTERLEAVED, SOFTCAP, SPLIT, BLOCK, LANES,
            STAGES, UNIT, NEW_UNIT,
        )  # fmt: skip


# 3. Launchers -------------------------------------------------------------------------------------
def _launch_config(head_size, itemsize):
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


def _width(others, splits):
    """Programs that share the splits of one unit.

    A cache is seldom full, and programs without a split to do cost time: beyond some 2,000 programs
    each takes several splits. Which program takes a split changes nothing in the result.
    """
    return max(1, min(splits, 2048 // max(1, others)))


def _launch_fwd(q, k_cache, v_cache, lengths, *options):
    return _launch_append(q, k_cache, v_cache, lengths, None, None, None, *options)


def _launch_append(
    q, k_cache, v_cache, lengths, k_new, v_new, counters, cos, sin, position, prefix_k, prefix_v,
    prefix_length, prefix_id, left_pad, interleaved, window, softcap, scale,
):  # fmt: skip
    out, lse = _outputs(q)
    if out.numel() == 0:
        return out, lse
    rows, queries, q_heads, head_size = q.shape
    capacity, kv_heads = k_cache.shape[1:3]
    group = q_heads // kv_heads
    config = _launch_config(head_size, q.element_size())
    # 64 lanes would spill; float32 has no tensor cores, which more lanes than needed slow down.
    shared_tile = 16 if q.dtype == torch.float32 else 32
    lanes = min(shared_tile, triton.next_power_of_2(queries * group))
    if prefix_k is not None or lanes > 16:
        config["num_warps"] = 8  # of two kinds of programs, or a large tile: four would spill
    chunks = triton.cdiv(queries * group, lanes)
    units = rows * chunks
    slots = splits = max(1, triton.cdiv(capacity, config["SPLIT"]))
    width = _width(units * kv_heads, splits)
    prefixes = prefix_capacity = prefix_programs = tiles_each = 0
    prefix_width = 1
    if prefix_k is not None:
        prefixes, prefix_capacity = prefix_k.shape[:2]
        prefix_splits = triton.cdiv(prefix_capacity, config["SPLIT"])
        slots += prefix_splits
        # The tiles of one prefix, should all units have it; or a tile at every unit, if fewer.
        tiles_each = triton.cdiv(units, shared_tile // lanes)
        tiles_each = tiles_each if prefixes * tiles_each <= units else 0
        tiles = prefixes * tiles_each or units
        prefix_width = _width(tiles * kv_heads, prefix_splits)
        prefix_programs = tiles * kv_heads * prefix_width
    acc = peak = count = None
    if slots > 1:
        parts = units * kv_heads * slots * lanes
        acc = torch.empty(parts * head_size, dtype=torch.float32, device=q.device)
        peak = torch.empty(parts * 2, dtype=torch.float32, device=q.device)
        # Of its own unless the caller gives them: calls on two streams must not meet.
        count = counters
        if count is None:
            count = torch.zeros(units * kv_heads, dtype=torch.int32, device=q.device)
    # Strides in units of what one access can hold: the compiler sees through no other divisor.
    unit, new_unit = _unit(k_cache, v_cache, prefix_k, prefix_v), _unit(q, k_new, v_new)
    small = (lengths, left_pad, prefix_length, prefix_id, position, cos, sin)
    _kernel[(prefix_programs + units * kv_heads * width,)](
        out, lse, acc, peak, count, *_with_strides(new_unit, q),
        *_with_strides(unit, k_cache, v_cache), *_with_strides(new_unit, k_new, v_new),
        *_with_strides(unit, prefix_k, prefix_v),
        *(None if t is None else t.contiguous() for t in small),
        rows, queries, kv_heads, group, capacity, prefixes, prefix_capacity,
        0 if cos is None else cos.shape[0], chunks, slots, width, prefix_programs, prefix_width,
        tiles_each, window, scale, softcap, TILE=max(16, lanes), SHARED_TILE=shared_tile,
        D=head_size, D_PAD=max(16, triton.next_power_of_2(head_size)),
        ROTARY=0 if cos is None else 2 * cos.shape[1], INTERLEAVED=interleaved,
        SOFTCAP=softcap != 0, LANES=lanes, UNIT=unit, NEW_UNIT=new_unit,
        enable_fp_fusion=True,
        launch_pdl=config["PDL"],
        maxnreg=255,  # without it ptxas spills a few registers to have one more block at a time
        **config,
    )  # fmt: skip
    return out, lse


def _unit(*tensors):
    """Elements in 16 bytes, or the part of them that divides all strides but the last."""
    strides = [s for t in tensors if t is not None for s in t.stride()[:3]]
    return math.gcd(16 // tensors[0].element_size(), *strides)


def _with_strides(unit, *tensors):
    """Each tensor and its strides, all but the last in units of so many elements."""
    return [
        item
        for t in tensors
        for item in (t, None if t is None else (*(s // unit for s in t.stride()[:3]), t.stride(3)))
    ]


# 4. Registration ----------------------------------------------------------------------------------
def _outputs(q):
    rows, queries, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(rows, heads, queries, dtype=wide)


def _fake(q, *others):
    return _outputs(q)


def _cpu_fwd(q, k_cache, v_cache, lengths, *options):
    return _cpu_append(q, k_cache, v_cache, lengths, None, None, None, *options)


def _cpu_append(
    q, k_cache, v_cache, lengths, k_new, v_new, counters, cos, sin, position, prefix_k, prefix_v,
    prefix_length, prefix_id, left_pad, interleaved, window, softcap, scale,
):  # fmt: skip
    """Neighbouring rows that see as many tokens at once, on views of caches and prefixes."""
    rows, queries, q_heads, head_size = q.shape
    if q.numel() == 0:
        return _outputs(q)
    kv_heads, dtype = k_cache.shape[2], q.dtype
    counts = (lengths, left_pad, prefix_k, prefix_length, prefix_id, k_cache.shape[1])
    plan = _cpu_plan(*counts, 0 if k_new is None else queries)
    places = [before + end - pad - queries for end, pad, before, _ in plan]  # of first queries
    if cos is not None:
        both = q if k_new is None else torch.cat([q, k_new], 2)
        first = places[0]
        if position is None and len(set(places)) == 1 and 0 <= first <= cos.shape[0] - queries:
            # The usual case: all rows stand at one place, and their angles are a view.
            c, s = (t[first : first + queries] for t in (cos, sin))
            both = _turned(both, c, s, interleaved)
        else:
            if position is None:
                position = torch.tensor(places)[:, None] + torch.arange(queries)
            both = rotated_ref(both, cos, sin, position, interleaved)
        q, k_new = both[:, :, :q_heads], None if k_new is None else both[:, :, q_heads:]
    if queries > 1:
        q = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    q = q.reshape(rows, kv_heads, -1, head_size)
    q = q.to(torch.promote_types(dtype, torch.float32))
    see = partial(_cpu_part, queries, window, softcap, scale)
    parts = []
    start = 0
    for (end, pad), run in groupby(row[:2] for row in plan):
        some = slice(start, start := start + len(list(run)))
        if end < 0:  # more tokens than the cache holds, or no prefix
            parts.append((q[some] * torch.nan, q[some, ..., 0] * torch.nan))
            continue
        tensors = [q, k_cache, v_cache, k_new, v_new]
        if start - some.start < rows:
            tensors = [t if t is None else t[some] for t in tensors]
        query, k, v, *new = tensors
        if k_new is not None:
            for cache, fresh in zip((k, v), new, strict=True):
                cache.narrow(1, end - queries, queries).copy_(fresh)
        parts.append(see(query, k, v, end - queries, max(pad, 0), end))
    out, lse = _joined(parts)
    if prefix_k is not None:
        parts = []
        for some, which, before, place in _prefix_runs(plan, places, queries, window):
            shape = (some.stop - some.start, -1, -1, -1)
            k, v = (t[which].expand(shape) for t in (prefix_k, prefix_v))
            parts.append(see(q[some], k, v, place, 0, before))
        out, lse = _merged(out, lse, *_joined(parts))
    if queries > 1:
        out = out.unflatten(2, (-1, queries)).permute(0, 3, 1, 2, 4)
    out = out.reshape(rows, queries, q_heads, head_size).to(dtype).contiguous()
    return out, lse.reshape(rows, q_heads, queries).contiguous()


_MERGED_AT_ONCE = 64  # rows, on a CPU


def _merged(part, lse, other, other_lse):
    """Attention over the tokens of both, of each with its log-sum-exp.

    PyTorch's vectors and what is left over beside them may differ in the last bit. So every row is
    padded to whole vectors, and not more of them go at once than one thread takes.
    """
    if len(lse) > _MERGED_AT_ONCE:
        parts = (t.split(_MERGED_AT_ONCE) for t in (part, lse, other, other_lse))
        return _joined([_merged(*some) for some in zip(*parts, strict=True)])
    count, shape = lse[0].numel(), lse.shape
    a, b = (F.pad(t.flatten(1), (0, -count % 64)) for t in (lse, other_lse))
    both = torch.logaddexp(a, b)
    weight = a.sub_(both).exp_().nan_to_num_(0)  # where both are -inf
    both, weight = (t[:, :count].view(shape) for t in (both, weight))
    return (part - other).mul_(weight[..., None]).add_(other), both


def _joined(parts):
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


def _cpu_plan(lengths, left_pad, prefix_k, prefix_length, prefix_id, capacity, new):
    """(end of the cached tokens or -1, padding, length of the prefix, prefix) of each row."""
    pads = [0] * lengths.numel() if left_pad is None else left_pad.tolist()
    ends = [n + new if 0 <= n <= capacity - new else -1 for n in lengths.tolist()]
    if prefix_k is None:
        return [(end, pad, 0, 0) for end, pad in zip(ends, pads, strict=True)]
    prefixes, prefix_capacity = prefix_k.shape[:2]
    known = [n if 0 <= n <= prefix_capacity else -1 for n in prefix_length.tolist()]
    which = prefix_id.tolist()
    befores = [known[p] if 0 <= p < prefixes else -1 for p in which]
    rows = zip(ends, pads, befores, which, strict=True)
    return [row if row[0] >= 0 and row[2] >= 0 else (-1, 0, 0, 0) for row in rows]


def _prefix_runs(plan, places, queries, window):
    """(rows, prefixes, their length, place of the first query): neighbours that one call serves.

    Their prefixes are one, or one after another, so that neither has to be copied. Rows at other
    places belong together as long as all their queries see the whole prefix.
    """
    kinds = [
        (before, None if place >= before - 1 and place + queries <= window else place)
        for (_, _, before, _), place in zip(plan, places, strict=True)
    ]
    start = 0
    while start < len(plan):
        stop, first, step = start + 1, plan[start][3], None
        while stop < len(plan) and kinds[stop] == kinds[start]:
            ahead = plan[stop][3] - plan[stop - 1][3]
            if ahead not in ((0, 1) if step is None else (step,)):
                break
            stop, step = stop + 1, ahead
        yield slice(start, stop), slice(first, plan[stop - 1][3] + 1), plan[start][2], places[start]
        start = stop


def _cpu_part(queries, window, softcap, scale, q, k, v, first, lo, hi):
    """Attention and log-sum-exp over tokens lo .. hi - 1, for queries from the place `first` on."""
    lo, hi = max(lo, first - window + 1), min(hi, first + queries)
    if lo >= hi:
        return torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf)
    k, v = (t[:, lo:hi].transpose(1, 2).to(q.dtype) for t in (k, v))
    mask = hidden = None
    if first < hi - 1 or first + queries - 1 - window >= lo:
        place = torch.arange(lo, hi)
        last = first + torch.arange(queries)[:, None]
        hidden = ((place > last) | (place <= last - window)).repeat(q.shape[2] // queries, 1)
        mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
    if softcap:
        # Row by row: PyTorch's products and vectors depend on how many there are.
        rows = [_capped(*row, mask, softcap, scale) for row in zip(q, k, v, strict=True)]
        out, lse = (torch.stack(values) for values in zip(*rows, strict=True))
    else:
        # What scaled_dot_product_attention runs on a CPU; only this entry has the log-sum-exp. It
        # takes the last dimension for dense. Of several threads each has its own scratch memory,
        # whose alignment MKL's order of summation follows, and a row's place says which is its own.
        if q.stride(-1) * k.stride(-1) * v.stride(-1) != 1:
            q, k, v = (t.contiguous() for t in (q, k, v))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, attn_mask=mask, scale=scale
            )
        finally:
            torch.set_num_threads(threads)
    if hidden is not None:
        blind = hidden.all(1)
        out, lse = out.masked_fill(blind[:, None], 0), lse.masked_fill(blind, -torch.inf)
    return out, lse


def _capped(q, k, v, mask, softcap, scale):
    score = softcap * torch.tanh(scale * (q @ k.mT) / softcap)
    score = score if mask is None else score + mask
    lse = score.logsumexp(-1)
    return torch.exp(score - lse[..., None]) @ v, lse


_OPTIONS = (
    "Tensor? cos, Tensor? sin, Tensor? position, Tensor? prefix_k, Tensor? prefix_v, "
    "Tensor? prefix_length, Tensor? prefix_id, Tensor? left_pad, bool interleaved, int window, "
    "float softcap, float scale) -> (Tensor, Tensor)"
)

_fwd = define_op(
    "decode_attention_fwd",
    f"(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, {_OPTIONS}",
    cuda=_launch_fwd,
    cpu=_cpu_fwd,
    fake=_fake,
)

_append = define_op(
    "decode_attention_append",
    "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, Tensor k_new, "
    f"Tensor v_new, Tensor(c!)? counters, {_OPTIONS}",
    cuda=_launch_append,
    cpu=_cpu_append,
    fake=_fake,
)


# 5. Public function -------------------------------------------------------------------------------
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    rope_interleaved: bool = False,
    position: Tensor | None = None,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    prefix_length: Tensor | None = None,
    prefix_id: Tensor | None = None,
    left_pad: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    counters: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest tokens of each row over its prefix and its cache, causal, cached.

    With k_new and v_new the Sq new tokens are rotated and written to slots lengths ..
    lengths + Sq - 1 of the caches, in place, and query i sees the slots up to lengths + i. Without,
    the queries belong to the last Sq of `lengths` cached tokens. `lengths` is never changed: add Sq
    to it before the next call. One launch on a GPU (see counters), and nothing waits for the
    host.

    The place of a token is prefix length + slot - left_pad. It decides what a query sees, and which
    row of the rotary tables turns the token.

    Args:
        q: (B, Sq, Hq, D), not rotated; D at most 256. Any strides, as for all that follow.
        k_cache, v_cache: (B, S, Hkv, D), Hkv a divisor of Hq; keys in it are rotated. Pass a
            (B, Hkv, S, D) cache as cache.transpose(1, 2). Unused slots may hold anything.
        lengths: (B,) int32 or int64, tokens in each row's cache before this call.
        k_new, v_new: (B, Sq, Hkv, D) or both None; keys not rotated.
        rope: tables (cos, sin), each (positions, R / 2) with R <= D: the first R of D dimensions
            are rotated. Rows may be anything, for instance zero. None: no rotation.
        rope_interleaved: pairs (2 i, 2 i + 1) rather than (i, i + R / 2).
        position: (B, Sq) integer, rows of the tables for the queries and new keys; default: places.
        prefix_k, prefix_v: (P, M, Hkv, D), keys and values stored once for all rows that start with
            them. On a GPU all rows of a prefix are multiplied with it at once.
        prefix_length: (P,) integer, tokens of each prefix; default M.
        prefix_id: (B,) integer, the prefix of each row; may be left out for P = 1.
        left_pad: (B,) integer, slots at the start of a row's cache to skip; default 0.
        window: each query sees the last `window` tokens, itself included; default all.
        softcap: scores s become softcap tanh(s / softcap); default off.
        scale: of scores; default 1 / sqrt(D).
        return_lse: also return the log-sum-exp of the scores.
        counters: with k_new alone; int32 zeros, at least B Sq Hq, in which the programs of a launch
            count themselves; zero again when it is done. Calls that share them must come one after
            another, as on one stream. None: of its own, which a second, small launch puts to zero.

    Returns:
        out (B, Sq, Hq, D) in q's dtype, contiguous; with return_lse also lse (B, Hq, Sq) float32
        (float64 for float64), natural logarithm. A query that sees nothing gives (0, -inf).

        On a GPU, and in a compiled graph, values cannot be refused. There a row comes out as NaN
        whose tokens exceed its cache (nothing is written) or whose prefix is none, and a token
        whose position is outside the tables is rotated to NaN.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name; inputs that require grad.
        NotImplementedError: inside forward-mode differentiation.

    Example:
        >>> k_cache, v_cache = torch.zeros(2, 16, 1, 64), torch.zeros(2, 16, 1, 64)
        >>> q, k, v = torch.randn(2, 1, 4, 64), torch.randn(2, 1, 1, 64), torch.randn(2, 1, 1, 64)
        >>> lengths = torch.tensor([0, 0])
        >>> out = decode_attention(q, k_cache, v_cache, lengths, k_new=k, v_new=v)
        >>> torch.equal(out, v.expand(2, 1, 4, 64)) and torch.equal(k_cache[:, :1], k)
        True
    """
    refuse_forward_mode()
    shape, capacity = _checked_shapes(q, k_cache, v_cache)
    rows, queries, kv_heads, head_size = shape
    pair = {"k_new": k_new, "v_new": v_new}
    _check_pair(pair, (rows, queries, kv_heads, head_size), q)
    if k_new is not None:
        check_writable(k_cache=k_cache, v_cache=v_cache)
    new = 0 if k_new is None else queries
    check_integers("lengths", lengths, (rows,), q.device, 0, capacity - new)
    if counters is not None:
        if k_new is None:
            raise ValueError("counters must be None without k_new: then nothing may be written")
        check_counters(counters, rows * queries * q.shape[2], q.device)
    cos = sin = None
    if rope is not None:
        cos, sin = _checked_tables(rope, head_size, q)
    prefix_length, prefix_id = _checked_prefix(
        prefix_k, prefix_v, prefix_length, prefix_id, shape, q
    )
    if left_pad is not None:
        check_integers("left_pad", left_pad, (rows,), q.device, 0, capacity)
        if readable(left_pad) and readable(lengths) and bool((left_pad > lengths).any()):
            raise ValueError(
                f"left_pad must be at most lengths, got {left_pad.tolist()} for {lengths.tolist()}"
            )
    if position is not None:
        limit = 2**31 if cos is None else cos.shape[0]
        check_integers("position", position, (rows, queries), q.device, 0, limit - 1)
    elif cos is not None and rows and readable(lengths) and readable(cos):
        plan = _cpu_plan(lengths, left_pad, prefix_k, prefix_length, prefix_id, capacity, new)
        most = max(before + end - pad for end, pad, before, _ in plan)
        if most > cos.shape[0]:
            raise ValueError(f"rope must have rows for {most} positions, got {cos.shape[0]}")
    scale = head_size**-0.5 if scale is None else scale
    check_attention(window, softcap, scale)
    options = (
        cos, sin, position, prefix_k, prefix_v, prefix_length, prefix_id, left_pad,
        rope_interleaved, min(window or 2**30, 2**30), float(softcap or 0.0), float(scale),
    )  # fmt: skip
    if using_reference():
        out, lse = _by_reference(q, k_cache, v_cache, lengths, k_new, v_new, options)
    else:
        check_no_grad(
            "decode_attention has no backward; train with prefill_attention, or use reference()",
            q=q, k_cache=k_cache, v_cache=v_cache, **pair, prefix_k=prefix_k, prefix_v=prefix_v,
            rope=cos if cos is not None and cos.requires_grad else sin,
        )  # fmt: skip
        if k_new is None:
            out, lse = _fwd(q, k_cache, v_cache, lengths, *options)
        else:
            out, lse = _append(q, k_cache, v_cache, lengths, k_new, v_new, counters, *options)
    return (out, lse) if return_lse else out


def _by_reference(q, k_cache, v_cache, lengths, k_new, v_new, options):
    if k_new is None:
        return decode_attention_ref(q, k_cache, v_cache, lengths, *options)
    cos, sin, position, prefix_k, _, prefix_length, prefix_id, left_pad, interleaved = options[:9]
    k, v, seen = appended_ref(
        k_cache, v_cache, lengths, k_new, v_new, cos, sin, position, prefix_k, prefix_length,
        prefix_id, left_pad, interleaved,
    )  # fmt: skip
    k_cache.copy_(k)
    v_cache.copy_(v)
    return decode_attention_ref(q, k, v, seen, *options)


def _checked_shapes(q, k_cache, v_cache):
    """(rows, queries, key heads, head size) and the capacity of the caches."""
    check_float(q=q, k_cache=k_cache, v_cache=v_cache)
    if q.dim() != 4:
        raise ValueError(f"q must have shape (B, Sq, Hq, D), got {tuple(q.shape)}")
    rows, queries, heads, head_size = q.shape
    if not 1 <= head_size <= 256:
        raise ValueError(f"q must have heads of 1 to 256 dimensions, got {head_size}")
    if k_cache.dim() != 4 or k_cache.shape[0] != rows or k_cache.shape[3] != head_size:
        raise ValueError(
            f"k_cache must have shape ({rows}, S, Hkv, {head_size}), got {tuple(k_cache.shape)}"
        )
    capacity, kv_heads = k_cache.shape[1:3]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k_cache must have a divisor of q's {heads} heads, got {kv_heads}")
    check_shape("v_cache", v_cache, tuple(k_cache.shape))
    _check_like("k_cache", k_cache, q)
    _check_like("v_cache", v_cache, q)
    return (rows, queries, kv_heads, head_size), capacity


def _check_like(name, tensor, q):
    """Raise unless tensor has the dtype and device of q."""
    if tensor.dtype != q.dtype:
        raise TypeError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    check_same_device(q=q, **{name: tensor})


def _check_pair(pair, shape, q):
    """Raise unless keys and values are both None, or of this shape and like q."""
    (k_name, k), (v_name, v) = pair.items()
    if (k is None) != (v is None):
        missing, other = (k_name, v_name) if k is None else (v_name, k_name)
        raise ValueError(f"{missing} must be given with {other}, got None")
    for name, tensor in pair.items():
        if tensor is not None:
            check_float(**{name: tensor})
            check_shape(name, tensor, shape)
            _check_like(name, tensor, q)


def _checked_tables(rope, head_size, q):
    if not isinstance(rope, tuple) or len(rope) != 2:
        raise TypeError(f"rope must be a tuple (cos, sin), got {type(rope).__name__}")
    cos, sin = rope
    for table in rope:
        if not isinstance(table, Tensor) or table.dtype not in (torch.float32, torch.float64):
            got = table.dtype if isinstance(table, Tensor) else type(table).__name__
            raise TypeError(f"rope must be float32 tables (float64 on the CPU), got {got}")
        if table.dim() != 2 or not 0 < 2 * table.shape[1] <= head_size or table.shape[0] == 0:
            raise ValueError(
                f"rope must have tables (positions > 0, R / 2) with R <= {head_size}, got "
                f"{tuple(table.shape)}"
            )
    check_float(rope=cos)
    check_float(rope=sin)
    check_shape("rope", sin, tuple(cos.shape))
    check_same_device(q=q, rope=cos)
    check_same_device(q=q, rope=sin)
    return cos, sin


def _checked_prefix(prefix_k, prefix_v, prefix_length, prefix_id, shape, q):
    """prefix_length and prefix_id with their defaults; both None where there is no prefix."""
    if prefix_k is None:
        for name, value in (
            ("prefix_v", prefix_v), ("prefix_length", prefix_length), ("prefix_id", prefix_id),
        ):  # fmt: skip
            if value is not None:
                raise ValueError(f"{name} must be given with prefix_k, got {type(value).__name__}")
        return None, None
    rows, _, kv_heads, head_size = shape
    check_float(prefix_k=prefix_k)
    if prefix_k.dim() != 4 or prefix_k.shape[0] == 0:
        raise ValueError(
            f"prefix_k must have shape (P > 0, M, {kv_heads}, {head_size}), got "
            f"{tuple(prefix_k.shape)}"
        )
    prefixes, capacity = prefix_k.shape[:2]
    pair = {"prefix_k": prefix_k, "prefix_v": prefix_v}
    _check_pair(pair, (prefixes, capacity, kv_heads, head_size), q)
    if prefix_length is None:
        prefix_length = torch.full((prefixes,), capacity, dtype=torch.int32, device=q.device)
    if prefix_id is None:
        if prefixes != 1:
            raise ValueError(f"prefix_id must be given for {prefixes} prefixes, got None")
        prefix_id = torch.zeros(rows, dtype=torch.int32, device=q.device)
    check_integers("prefix_length", prefix_length, (prefixes,), q.device, 0, capacity)
    check_integers("prefix_id", prefix_id, (rows,), q.device, 0, prefixes - 1)
    return prefix_length, prefix_id
