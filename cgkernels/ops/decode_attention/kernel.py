"""The kernel of `decode_attention`: append, split keys, online softmax and merge in one launch.

A query tile is LANES of the queries x heads that share a key head in one row. Its keys are divided
into splits of SPLIT tokens, first those of the shared prefix and then those of the row's own cache;
the splits are shared out among the programs of the tile, and the last program to be done merges
their partial results in the order of the splits. Strides of tokens, heads and rows come in
multiples of ALIGN elements, those of q and the new tokens of NEW_ALIGN (see `launch.py`).
"""

from cgkernels._triton import tl, triton
from cgkernels.device import launch_next, tanh, wait_for_previous


@triton.jit
def _load_rotated(
    x_ptr, strides, row, token, head, d, position, mask, cos_ptr, sin_ptr, positions,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Tokens of a head (n, D), rotated by the angles of their positions, in float32."""
    token = token.to(tl.int64)
    base = x_ptr + (row * strides[0] + token * strides[1] + head * strides[2])[:, None] * ALIGN
    x = tl.load(base + d[None, :] * strides[3], mask=mask, other=0.0).to(tl.float32)
    if cos_ptr is not None:
        if INTERLEAVED:
            first = d % 2 == 0
            angle, partner = d // 2, tl.where(first, d + 1, d - 1)
        else:
            first = d < ROTARY // 2
            angle = tl.where(first, d, d - ROTARY // 2)
            partner = tl.where(first, d + ROTARY // 2, d - ROTARY // 2)
        rotated = mask & (d < ROTARY)[None, :]
        known = rotated & ((position >= 0) & (position < positions))[:, None]
        at = position.to(tl.int64)[:, None] * (ROTARY // 2) + angle[None, :]
        cos = tl.load(cos_ptr + at, mask=known, other=float("nan"))
        sin = tl.load(sin_ptr + at, mask=known, other=float("nan"))
        other = tl.load(base + partner[None, :] * strides[3], mask=rotated, other=0.0)
        other = other.to(tl.float32)
        other = tl.where(first[None, :], -other, other)
        x = tl.where(rotated, x * cos + other * sin, x)
    return x


@triton.jit
def _attend_block(
    acc, peak, total, q, k, v, index, lo, hi, first, last, partial, scale, softcap,
    SOFTCAP: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    """A step of the online softmax in base 2: keys lo <= index < hi, of each lane first .. last.

    partial: some lane sees not all of them. Then what is not finite in a value, which even a weight
    of 0 would turn into NaN, is kept from the sum, and given to those that see it.
    """
    score = tl.dot(q, tl.trans(k), input_precision="ieee")  # (M, BLOCK)
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
    weight = weight.to(v.dtype)
    if not SELECT:
        acc = tl.dot(weight, v, acc, input_precision="ieee")
    elif partial:
        # Marked in the sum itself, by what no sum of a split comes to: registers are scarce.
        HALF: tl.constexpr = v.dtype == tl.float16
        MARK: tl.constexpr = 2.0**15 if HALF else 2.0**100
        bad = (v - v) != 0
        sees = tl.where(visible, MARK, 0.0).to(v.dtype)
        acc = tl.dot(sees, tl.where(bad, MARK, 0.0).to(v.dtype), acc, input_precision="ieee")
        acc = tl.where(acc >= (2.0**29 if HALF else float("inf")), float("nan"), acc)
        acc = tl.dot(weight, tl.where(bad, 0.0, v).to(v.dtype), acc, input_precision="ieee")
    else:
        acc = tl.dot(weight, v, acc, input_precision="ieee")
    return acc, higher, total


@triton.jit
def _row_extent(
    row, valid, lengths_ptr, left_pad_ptr, prefix_length_ptr, prefix_id_ptr, queries, capacity,
    prefixes, prefix_capacity, window, NEW: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """What of prefix and cache a row (or each of some rows) sees, in tokens and in splits.

    Every program of a row must come to the same splits: this is the one place where they are made.
    """
    length = tl.load(lengths_ptr + row, mask=valid, other=0).to(tl.int64)
    end = length + queries if NEW else length
    fits = valid & (length >= 0) & (end <= capacity)
    pad = length * 0
    if left_pad_ptr is not None:
        pad = tl.load(left_pad_ptr + row, mask=valid, other=0).to(tl.int64)
    before = length * 0
    if prefix_id_ptr is not None:
        prefix = tl.load(prefix_id_ptr + row, mask=valid, other=0).to(tl.int64)
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
def _rows_of_prefix(prefix_id_ptr, rows, prefix, rank, M: tl.constexpr):
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
def _store_output(
    out_ptr, lse_ptr, acc, peak, total, row, query, head, mask, queries, q_heads, d,
    D: tl.constexpr,
):  # fmt: skip
    """Normalized rows of the output and their log-sum-exp; (0, -inf) where nothing was seen."""
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
def _merge_splits(
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
    _store_output(
        out_ptr, lse_ptr, acc, peak, total, row, query, head, mask, queries, q_heads, d, D
    )


@triton.jit
def _attend_splits(
    program, out_ptr, lse_ptr, acc_ptr, peak_ptr, count_ptr, q_ptr, q_strides,
    k_ptr, k_strides, v_ptr, v_strides, k_new_ptr, k_new_strides, v_new_ptr, v_new_strides,
    prefix_k_ptr, prefix_k_strides, prefix_v_ptr, prefix_v_strides,
    lengths_ptr, left_pad_ptr, prefix_length_ptr, prefix_id_ptr, position_ptr, cos_ptr, sin_ptr,
    rows, queries, kv_heads, group, capacity, prefixes, prefix_capacity, positions,
    tiles_per_row, slots, width, packs_per_prefix, window, scale, softcap,
    SHARED: tl.constexpr, M: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, SOFTCAP: tl.constexpr, SELECT: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
    ALIGN: tl.constexpr, NEW_ALIGN: tl.constexpr,
):  # fmt: skip
    """Splits w, w + width, ... of a query tile's own cache, or of a prefix that query tiles share.

    SHARED: M / LANES query tiles with one prefix, a pack, are multiplied with it at once.
    """
    APPEND: tl.constexpr = k_new_ptr is not None
    w, program = program % width, program // width
    kv_head = (program % kv_heads).to(tl.int64)
    q_tile = program // kv_heads
    j, d = tl.arange(0, M), tl.arange(0, D_PAD)  # (M,), (D_PAD,)
    if SHARED:
        # Of the query tiles with one prefix, M / LANES from the rank-th on.
        PACKED: tl.constexpr = M // LANES
        if packs_per_prefix > 0:
            prefix = (q_tile // packs_per_prefix).to(tl.int64)
            rank = q_tile % packs_per_prefix * PACKED
        else:  # more prefixes than query tiles: each of these may be the first of a pack
            prefix = tl.load(prefix_id_ptr + q_tile // tiles_per_row).to(tl.int64)
            rank = q_tile % tiles_per_row
            for start in range(0, q_tile // tiles_per_row, 64):
                other = start + tl.arange(0, 64)
                same = other < q_tile // tiles_per_row
                same &= tl.load(prefix_id_ptr + other, mask=same, other=-1) == prefix
                rank += tl.sum(same.to(tl.int32), 0) * tiles_per_row
            prefix = tl.where(rank % PACKED == 0, prefix, -1)
        ranks = rank + j // LANES  # (M,), as all that follows from it
        row = _rows_of_prefix(prefix_id_ptr, rows, prefix, ranks // tiles_per_row, M)
        tile, lane = ranks % tiles_per_row, j % LANES
        valid = row >= 0
        row = tl.maximum(row, 0)
        q_tile = row * tiles_per_row + tile
        any_valid = (prefix >= 0) & (prefix < prefixes) & (tl.max(valid.to(tl.int32), 0) > 0)
    else:
        row, tile, lane = q_tile // tiles_per_row, q_tile % tiles_per_row, j
        valid = row >= 0
        any_valid = valid
    if any_valid:
        (
            fits, end, pad, before, slot, own_lo, own_first, own_splits, prefix_lo, prefix_first,
            prefix_splits,
        ) = _row_extent(
            row, valid, lengths_ptr, left_pad_ptr, prefix_length_ptr, prefix_id_ptr, queries,
            capacity, prefixes, prefix_capacity, window, APPEND, SPLIT,
        )  # fmt: skip
        splits = prefix_splits + own_splits + 0 * j  # (M,)
        item = tile * LANES + lane  # (M,), of queries x heads
        query = item % queries
        head = kv_head * group + item // queries
        mask = (lane < LANES) & (item < tl.where(fits, queries * group, 0))
        q_heads = kv_heads * group
        row64 = row.to(tl.int64)
        part = (q_tile.to(tl.int64) * kv_heads + kv_head) * slots + 0 * j  # of partial results
        q_slot = slot + query
        if SHARED:
            last = q_slot - pad + before  # of the prefix's tokens
            first_split = tl.min(tl.where(mask, prefix_first, 2**30), 0)
            hi = tl.max(tl.where(mask, before, 0), 0)
            lo = tl.min(tl.where(mask, prefix_lo, 2**30), 0)
            end_split = tl.where(lo < hi, (hi + SPLIT - 1) // SPLIT, 0)
            k_head = prefix * prefix_k_strides[0] + kv_head * prefix_k_strides[2]
            v_head = prefix * prefix_v_strides[0] + kv_head * prefix_v_strides[2]
            k_head, v_head = prefix_k_ptr + k_head * ALIGN, prefix_v_ptr + v_head * ALIGN
            k_step, k_dim = prefix_k_strides[1], prefix_k_strides[3]
            v_step, v_dim = prefix_v_strides[1], prefix_v_strides[3]
        else:
            last = q_slot
            first_split, end_split = own_first, own_first + own_splits
            lo, hi = own_lo, end
            k_head = k_ptr + (row64 * k_strides[0] + kv_head * k_strides[2]) * ALIGN
            v_head = v_ptr + (row64 * v_strides[0] + kv_head * v_strides[2]) * ALIGN
            k_step, k_dim = k_strides[1], k_strides[3]
            v_step, v_dim = v_strides[1], v_strides[3]
        done = tl.zeros((M,), tl.int32)
        if first_split + w < end_split:
            q_position = q_slot - pad + before
            if position_ptr is not None:
                q_position = tl.load(position_ptr + row64 * queries + query, mask=mask, other=0)
            q = _load_rotated(
                q_ptr, q_strides, row64, query, head, d, q_position,
                mask[:, None] & (d < D)[None, :], cos_ptr, sin_ptr, positions, ROTARY, INTERLEAVED,
                NEW_ALIGN,
            ).to(q_ptr.dtype.element_ty)  # (M, D_PAD)  # fmt: skip
            first = last - window + 1
            all_first = tl.max(tl.where(mask, first, -(2**31)), 0)  # of what all lanes see
            all_last = tl.min(tl.where(mask, last, 2**31 - 1), 0)
            # What is the same for all splits is computed again: kept in registers, it spills.
            for split in tl.range(first_split + w, end_split, width, disable_licm=True):
                acc = tl.zeros((M, D_PAD), tl.float32)
                peak = tl.full((M,), float("-inf"), tl.float32)
                total = tl.zeros((M,), tl.float32)
                split_lo = tl.maximum(split * SPLIT, lo)
                split_hi = tl.minimum(split * SPLIT + SPLIT, hi)
                if APPEND and not SHARED:
                    # The new tokens of this split; the loop below reads them back. All query tiles
                    # of a row that share the key head store the same bits.
                    for start in range(tl.maximum(split_lo, slot), split_hi, 16):
                        index = start + tl.arange(0, 16)
                        token = index - slot
                        inside = (index < split_hi)[:, None] & (d < D)[None, :]
                        position = index - pad + before
                        if position_ptr is not None:
                            at = position_ptr + row64 * queries + token
                            position = tl.load(at, mask=index < split_hi, other=0)
                        k = _load_rotated(
                            k_new_ptr, k_new_strides, row64, token, kv_head, d, position,
                            inside, cos_ptr, sin_ptr, positions, ROTARY, INTERLEAVED, NEW_ALIGN,
                        )  # fmt: skip
                        v = _load_rotated(
                            v_new_ptr, v_new_strides, row64, token, kv_head, d, position,
                            inside, None, None, 0, 0, False, NEW_ALIGN,
                        )  # fmt: skip
                        wide = index.to(tl.int64)[:, None]
                        k_at = wide * k_step * ALIGN + d[None, :] * k_dim
                        v_at = wide * v_step * ALIGN + d[None, :] * v_dim
                        tl.store(k_head + k_at, k.to(k_ptr.dtype.element_ty), mask=inside)
                        tl.store(v_head + v_at, v.to(v_ptr.dtype.element_ty), mask=inside)
                    tl.debug_barrier()
                for start in tl.range(
                    split_lo // BLOCK * BLOCK, split_hi, BLOCK, num_stages=STAGES
                ):
                    index = start + tl.arange(0, BLOCK)
                    inside = ((index >= split_lo) & (index < split_hi))[:, None] & (d < D)[None, :]
                    wide = index.to(tl.int64)[:, None]
                    k_at = wide * k_step * ALIGN + d[None, :] * k_dim
                    v_at = wide * v_step * ALIGN + d[None, :] * v_dim
                    k = tl.load(k_head + k_at, mask=inside, other=0.0)  # (BLOCK, D_PAD)
                    v = tl.load(v_head + v_at, mask=inside, other=0.0)
                    acc, peak, total = _attend_block(
                        acc, peak, total, q, k, v, index, split_lo, split_hi, first, last,
                        (tl.maximum(start, split_lo) < all_first)
                        | (tl.minimum(start + BLOCK, split_hi) - 1 > all_last),
                        scale, softcap, SOFTCAP, SELECT,
                    )  # fmt: skip
                if SHARED:
                    owned = mask & (split >= prefix_first) & (prefix_splits > 0)
                    place = part + split - prefix_first
                else:
                    owned = mask
                    place = part + prefix_splits + split - own_first
                _store_output(
                    out_ptr, lse_ptr, acc, peak, total, row, query, head, owned & (splits == 1),
                    queries, q_heads, d, D,
                )  # fmt: skip
                if acc_ptr is not None:
                    store = owned & (splits > 1)
                    tl.store(
                        acc_ptr + (place * LANES + lane)[:, None] * D + d[None, :], acc,
                        mask=store[:, None] & (d < D)[None, :],
                    )  # fmt: skip
                    tl.store(peak_ptr + place * (2 * LANES) + lane, peak, mask=store)
                    tl.store(peak_ptr + place * (2 * LANES) + lane + LANES, total, mask=store)
                done += owned.to(tl.int32)
            if acc_ptr is not None:
                # The last program to come here has what all others stored before they arrived.
                leader = mask & (lane == 0) & (done > 0) & (splits > 1)
                tl.debug_barrier()
                count = count_ptr + q_tile.to(tl.int64) * kv_heads + kv_head + 0 * j
                arrived = tl.atomic_add(count, done, mask=leader, sem="acq_rel", scope="gpu")
                tl.debug_barrier()
                last_one = (leader & (arrived + done == splits)).to(tl.int32)
                tl.store(count, 0, mask=last_one > 0)  # as the next launch must find it
                last_one = tl.max(tl.reshape(last_one, (M // LANES, LANES)), 1)
                last_one = tl.broadcast_to(last_one[:, None], (M // LANES, LANES))
                ready = mask & (tl.reshape(last_one, (M,)) > 0)
                if tl.max(ready.to(tl.int32), 0) > 0:
                    AT_ONCE: tl.constexpr = max(1, min(4, 4096 // (M * D_PAD)))
                    _merge_splits(
                        out_ptr, lse_ptr, acc_ptr, peak_ptr, part, splits, row,
                        query, head, ready, queries, q_heads, d, lane, D, LANES, M, AT_ONCE,
                    )  # fmt: skip
        if not SHARED:  # noqa: SIM102  (a constexpr and a value)
            # Nothing is seen, or the row does not fit its cache.
            if (w == 0) & ((prefix_splits + own_splits == 0) | (not fits)):
                blank = tl.zeros((M,), tl.float32) + tl.where(fits, 0.0, float("nan"))
                _store_output(
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
    tiles_per_row, slots, width, prefix_programs, prefix_width, packs_per_prefix, window, scale,
    softcap, OWN_M: tl.constexpr, PREFIX_M: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, SOFTCAP: tl.constexpr, SELECT: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
    ALIGN: tl.constexpr, NEW_ALIGN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """First the programs of the shared prefixes, then those of the rows' own caches."""
    program = tl.program_id(0)
    if PDL:
        launch_next()
        wait_for_previous()
    if prefix_k_ptr is not None:
        if program < prefix_programs:
            _attend_splits(
                program, out_ptr, lse_ptr, acc_ptr, peak_ptr, count_ptr, q_ptr, q_strides,
                k_ptr, k_strides, v_ptr, v_strides, k_new_ptr, k_new_strides, v_new_ptr,
                v_new_strides, prefix_k_ptr, prefix_k_strides, prefix_v_ptr, prefix_v_strides,
                lengths_ptr, left_pad_ptr, prefix_length_ptr, prefix_id_ptr, position_ptr, cos_ptr,
                sin_ptr, rows, queries, kv_heads, group, capacity, prefixes, prefix_capacity,
                positions, tiles_per_row, slots, prefix_width, packs_per_prefix, window, scale,
                softcap, True, PREFIX_M, D, D_PAD, ROTARY, INTERLEAVED, SOFTCAP, SELECT, SPLIT,
                BLOCK, LANES, STAGES, ALIGN, NEW_ALIGN,
            )  # fmt: skip
        program -= prefix_programs
    if program >= 0:
        _attend_splits(
            program, out_ptr, lse_ptr, acc_ptr, peak_ptr, count_ptr, q_ptr, q_strides,
            k_ptr, k_strides, v_ptr, v_strides, k_new_ptr, k_new_strides, v_new_ptr,
            v_new_strides, prefix_k_ptr, prefix_k_strides, prefix_v_ptr, prefix_v_strides,
            lengths_ptr, left_pad_ptr, prefix_length_ptr, prefix_id_ptr, position_ptr, cos_ptr,
            sin_ptr, rows, queries, kv_heads, group, capacity, prefixes, prefix_capacity,
            positions, tiles_per_row, slots, width, packs_per_prefix, window, scale, softcap,
            False, OWN_M, D, D_PAD, ROTARY, INTERLEAVED, SOFTCAP, SELECT, SPLIT, BLOCK, LANES,
            STAGES, ALIGN, NEW_ALIGN,
        )  # fmt: skip
