"""The kernels of `sample_logits`: the cuts of the filters by bisection, the draw, its gradient.

A logit is compared by its order key, an int32 in the order of its float32: 32 bits are bisected,
less those that are zero in the dtypes of the logits (SHIFT). HELD says that one block is the whole
row, which then stays in registers; PIECE is the block of the passes that need more registers.
"""

from cgkernels._triton import tl, triton
from cgkernels.device import STREAM_TOKENS, exp_of, exponential_block


@triton.jit
def _load_value(values, row):
    """An entry of (pointer, stride)."""
    return tl.load(values[0] + row * values[1])


@triton.jit
def _load_logits(logits, uncond, scale, row, token, vocabulary):
    """Guided logits of tokens; -inf beyond the vocabulary."""
    mask = token < vocabulary
    pointer = logits[0] + row * logits[1] + token
    logit = tl.load(pointer, mask=mask, other=float("-inf")).to(tl.float32)
    if uncond is not None:
        pointer = uncond[0] + row * uncond[1] + token
        base = tl.load(pointer, mask=mask, other=float("-inf")).to(tl.float32)
        logit = base + scale * tl.where(logit == base, 0.0, logit - base)
    return logit


@triton.jit
def _logit_block(
    held, logits, uncond, scale, row, start, vocabulary, HELD: tl.constexpr, BLOCK: tl.constexpr
):
    """Logits of a block: from registers where one block is the whole row."""
    if HELD:
        return held
    else:
        token = start + tl.arange(0, BLOCK)
        return _load_logits(logits, uncond, scale, row, token, vocabulary)


@triton.jit
def _mass(logit, largest, inverse):
    """e^d in whole 2^-30."""
    return (exp_of((logit - largest) * inverse) * 2.0**30 + 0.5).to(tl.uint32)


@triton.jit
def _order_key(x, SHIFT: tl.constexpr):
    """A whole number in the order of x; the SHIFT low bits of every logit's float32 are zero."""
    bits = x.to(tl.int32, bitcast=True) >> SHIFT
    return tl.where(bits < 0, bits ^ (0x7FFFFFFF >> SHIFT), bits)


@triton.jit
def _from_order_key(key, SHIFT: tl.constexpr):
    """The float32 of a key."""
    return (tl.where(key < 0, key ^ (0x7FFFFFFF >> SHIFT), key) << SHIFT).to(
        tl.float32, bitcast=True
    )


@triton.jit
def _is_kept(logit, token, edge, first, last):
    """Above the edge of a cut, or on it with an id from first to last."""
    return (logit > edge) | ((logit == edge) & (token >= first) & (token <= last))


@triton.jit
def _search(
    target, low, count_low, weight_low, held, held_mass, largest, inverse, logits, uncond, scale,
    row, vocabulary, BY_MASS: tl.constexpr, FROM_BELOW: tl.constexpr, SHIFT: tl.constexpr,
    HELD: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """The cut that keeps each token with (weight before it) < target, and a key just below it.

    A weight is a mass, or 1. Above the key low lie count_low tokens of weight_low >= target.
    """
    high = _order_key(largest, SHIFT)
    count_high = count_low * 0
    weight_high = target * 0
    undecided = (high > low + 1) & (count_low > 1)
    while undecided:
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        edge = _from_order_key(middle, SHIFT)
        count = count_low * 0
        weight = target * 0
        for start in range(0, vocabulary, BLOCK):
            logit = _logit_block(
                held, logits, uncond, scale, row, start, vocabulary, HELD, BLOCK
            )  # fmt: skip
            above = logit > edge
            if BY_MASS and HELD:  # both in one number: the masses of a held row are below 2^45
                ONE: tl.constexpr = 2**45
                both = tl.sum(tl.where(above, held_mass.to(tl.int64) + ONE, 0), 0)
                count += (both >> 45).to(tl.int32)
                weight += both & (ONE - 1)
            else:
                count += tl.sum(above.to(tl.int32), 0)
                if BY_MASS:
                    mass = _mass(logit, largest, inverse)
                    weight += tl.sum(tl.where(above, mass, 0).to(tl.int64), 0)
        if not BY_MASS:
            weight += count
        enough = weight >= target
        low = tl.where(enough, middle, low)
        count_low = tl.where(enough, count, count_low)
        weight_low = tl.where(enough, weight, weight_low)
        high = tl.where(enough, high, middle)
        count_high = tl.where(enough, count_high, count)
        weight_high = tl.where(enough, weight_high, weight)
        undecided = (high > low + 1) & (count_low - count_high > 1)
        if not BY_MASS:
            undecided = undecided & (weight_low != target)

    # What is left lies in (low, high]. Its first token is kept; unless all are, they tie.
    left = count_low - count_high
    room = target - weight_high
    each = target * 0 + 1
    if BY_MASS:
        each = _mass(_from_order_key(high, SHIFT), largest, inverse).to(tl.int64)
    edge = _from_order_key(low, SHIFT)
    first = tl.full((), 0, tl.int32)
    last = tl.full((), -1, tl.int32)
    if (left - 1) * each >= room:
        edge = _from_order_key(high, SHIFT)
        inner = tl.full((), 0, tl.int32)
        outer = tl.full((), 0, tl.int32) + vocabulary
        while outer > inner + 1:
            middle = (inner + outer) // 2
            count = count_low * 0  # of those that tie and have a lower id than middle
            for start in range(0, vocabulary, PIECE):
                token = start + tl.arange(0, PIECE)
                logit = _load_logits(logits, uncond, scale, row, token, vocabulary)
                count += tl.sum(((logit == edge) & (token < middle)).to(tl.int32), 0)
            inside = (count - 1) * each < room
            if FROM_BELOW:
                inside = (left - 1 - count) * each >= room
            inner = tl.where(inside, middle, inner)
            outer = tl.where(inside, outer, middle)
        if FROM_BELOW:
            first = outer
            last += vocabulary
        else:
            last = inner - 1
    return edge, first, last, low


@triton.jit
def _distribution(
    logits, uncond, scale, temperature, top_k, top_p, min_p, row, vocabulary,
    HF: tl.constexpr, SHIFT: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """What a row is drawn from: scale, max l, 1 / T, the case, and the cuts of the filters."""
    if uncond is not None:
        scale = _load_value(scale, row)
    t = _load_value(temperature, row)
    greedy = t == 0
    inverse = tl.div_rn(tl.full((), 1.0, tl.float32), tl.where(greedy, 1.0, t))
    inverse = tl.minimum(inverse, 3.4028234663852886e38)

    held = 0.0
    if HELD:
        held = _load_logits(logits, uncond, scale, row, tl.arange(0, BLOCK), vocabulary)
    largest = tl.full((), float("-inf"), tl.float32)
    count = tl.full((), 0, tl.int32)
    broken = tl.full((), 0, tl.int32)
    for start in range(0, vocabulary, BLOCK):
        logit = _logit_block(held, logits, uncond, scale, row, start, vocabulary, HELD, BLOCK)
        largest = tl.maximum(largest, tl.max(tl.where(logit == logit, logit, float("-inf")), 0))
        count += tl.sum((logit > float("-inf")).to(tl.int32), 0)
        broken += tl.sum((logit != logit).to(tl.int32), 0)
    valid = (broken == 0) & (tl.abs(largest) < float("inf")) & (t >= 0) & (t < float("inf"))

    low = _order_key(tl.full((), float("-inf"), tl.float32), SHIFT)
    k_edge = tl.full((), float("-inf"), tl.float32)
    k_first = tl.full((), 0, tl.int32)
    k_last = tl.full((), -1, tl.int32)
    if top_k is not None:
        k = _load_value(top_k, row)
        valid = valid & (k >= 1)
        if k < count:
            k_edge, k_first, k_last, low = _search(
                k, low, count, count.to(tl.int64), held, 0, largest, inverse, logits, uncond, scale,
                row, vocabulary, False, False, SHIFT, HELD, BLOCK, PIECE,
            )  # fmt: skip
            count = k.to(tl.int32)
    p_edge, p_first, p_last = k_edge, k_first, k_last
    if top_p is not None:
        p = _load_value(top_p, row)
        valid = valid & (p >= 0) & (p <= 1)
        if p < 1:
            total = tl.full((), 0, tl.int64)
            for start in range(0, vocabulary, PIECE):
                token = start + tl.arange(0, PIECE)
                logit = _load_logits(logits, uncond, scale, row, token, vocabulary)
                mass = _mass(logit, largest, inverse)
                kept = _is_kept(logit, token, k_edge, k_first, k_last)
                total += tl.sum(tl.where(kept, mass, 0).to(tl.int64), 0)
            held_mass = 0
            if HELD:
                held_mass = _mass(held, largest, inverse)
            enough = tl.ceil(p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
            p_edge, p_first, p_last, low = _search(
                tl.maximum(enough, 1), low, count, total, held, held_mass, largest, inverse, logits,
                uncond, scale, row, vocabulary, True, HF, SHIFT, HELD, BLOCK, PIECE,
            )  # fmt: skip
    least = tl.full((), 0.0, tl.float32)
    if min_p is not None:
        least = _load_value(min_p, row)
        valid = valid & (least >= 0) & (least <= 1)
    cuts = (k_edge, k_first, k_last, p_edge, p_first, p_last, least)
    return scale, largest, inverse, greedy, valid, cuts


@triton.jit
def _share_and_mask(logit, token, largest, inverse, cuts):
    """e^d, and whether the tokens may be drawn."""
    k_edge, k_first, k_last, p_edge, p_first, p_last, least = cuts
    share = exp_of((logit - largest) * inverse)
    kept = _is_kept(logit, token, k_edge, k_first, k_last)
    kept = kept & _is_kept(logit, token, p_edge, p_first, p_last)
    return share, kept & (share >= least)


@triton.jit
def _fwd_kernel(
    tokens, log_probs, counts, logits, uncond, scale, temperature, top_k, top_p, min_p,
    seed_ptr, index_ptr, position, vocabulary, columns, counters,
    COUNTERS: tl.constexpr, HF: tl.constexpr, SHIFT: tl.constexpr, HELD: tl.constexpr,
    BLOCK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """One program per row; with counts it writes at the position, and counts on."""
    row = tl.program_id(0).to(tl.int64)
    scale, largest, inverse, greedy, valid, cuts = _distribution(
        logits, uncond, scale, temperature, top_k, top_p, min_p, row, vocabulary,
        HF, SHIFT, HELD, BLOCK, PIECE,
    )  # fmt: skip
    seed, index = tl.load(seed_ptr), tl.load(index_ptr + row)
    position = _load_value(position, row)
    valid = valid & (position >= 0) & (position < 2**24)
    drawn = tl.full((), 0, tl.int32)
    best = tl.full((), -1.0, tl.float32)
    total = tl.full((), 0, tl.int64)
    for start in range(0, vocabulary, PIECE):
        token = start + tl.arange(0, PIECE)
        logit = _load_logits(logits, uncond, scale, row, token, vocabulary)
        share, kept = _share_and_mask(logit, token, largest, inverse, cuts)
        total += tl.sum(tl.where(kept, (share * 2.0**40).to(tl.int64), 0), 0)
        e = exponential_block(seed, index, position, start, STREAM_TOKENS, PIECE)
        score = tl.where(kept, tl.div_rn(share, e), -1.0)
        score = tl.where(greedy, (logit == largest).to(tl.float32), score)
        score, place = tl.max(score, 0, return_indices=True)
        drawn = tl.where(score > best, start + place, drawn)
        best = tl.maximum(score, best)
    logit = _load_logits(logits, uncond, scale, row, drawn, vocabulary)
    log_prob = (logit - largest) * inverse - tl.log(total.to(tl.float32) * 2.0**-40)
    log_prob = tl.where(greedy, 0.0, log_prob)
    drawn = tl.where(valid, drawn.to(tl.int64), -1)
    log_prob = tl.where(valid, log_prob, float("nan"))
    if counts is None:
        tl.store(tokens[0] + row, drawn)
        tl.store(log_probs[0] + row, log_prob)
    else:
        inside = (position >= 0) & (position < columns)
        tl.store(tokens[0] + row * tokens[1] + position * tokens[2], drawn, mask=inside)
        tl.store(log_probs[0] + row * log_probs[1] + position * log_probs[2], log_prob, mask=inside)
        tl.debug_barrier()  # all threads have read the position before one of them counts on
        i = tl.arange(0, COUNTERS)
        count = counts[0] + row * counts[1] + i * counts[2]
        tl.store(count, tl.load(count, mask=i < counters, other=0) + 1, mask=i < counters)


@triton.jit
def _bwd_kernel(
    dlogits_ptr, duncond_ptr, dlog_prob, token, logits, uncond, scale, temperature,
    top_k, top_p, min_p, vocabulary,
    HF: tl.constexpr, SHIFT: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """One program per row: the kept set again, then (drawn - probability) / T."""
    row = tl.program_id(0).to(tl.int64)
    scale, largest, inverse, greedy, valid, cuts = _distribution(
        logits, uncond, scale, temperature, top_k, top_p, min_p, row, vocabulary,
        HF, SHIFT, HELD, BLOCK, PIECE,
    )  # fmt: skip
    total = tl.full((), 0, tl.int64)
    for start in range(0, vocabulary, PIECE):
        candidate = start + tl.arange(0, PIECE)
        logit = _load_logits(logits, uncond, scale, row, candidate, vocabulary)
        share, kept = _share_and_mask(logit, candidate, largest, inverse, cuts)
        total += tl.sum(tl.where(kept, (share * 2.0**40).to(tl.int64), 0), 0)
    drawn = _load_value(token, row)
    factor = tl.where(greedy, 0.0, _load_value(dlog_prob, row) * inverse)
    factor = tl.where(valid & (drawn >= 0), factor, float("nan"))
    one = tl.div_rn(tl.full((), 1.0, tl.float32), total.to(tl.float32) * 2.0**-40)
    for start in range(0, vocabulary, PIECE):
        candidate = start + tl.arange(0, PIECE)
        logit = _load_logits(logits, uncond, scale, row, candidate, vocabulary)
        share, kept = _share_and_mask(logit, candidate, largest, inverse, cuts)
        dlogit = factor * ((candidate == drawn).to(tl.float32) - tl.where(kept, share * one, 0.0))
        mask = candidate < vocabulary
        offset = row * vocabulary + candidate
        if uncond is not None:
            du = (1 - scale) * dlogit
            tl.store(duncond_ptr + offset, du.to(duncond_ptr.dtype.element_ty), mask=mask)
            dlogit = scale * dlogit
        tl.store(dlogits_ptr + offset, dlogit.to(dlogits_ptr.dtype.element_ty), mask=mask)
