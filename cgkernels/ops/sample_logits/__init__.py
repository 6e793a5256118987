"""Sampling of one token a row: guidance, temperature, top-k, top-p, min-p, Gumbel-max, no sort.

    l = u + s (c - u)                              c, u: conditional, unconditional logits
    d = (l - max l) / T
    kept: a prefix of the tokens in the order of falling l, ties by rising token id:
        top_k: the first k; then top_p: those with (mass before the token) < p (mass of all);
        then min_p: those with e^d >= min_p
    token = argmax over the kept of d + g = argmax of e^d / E,       g = -ln E, E exponential
    log_prob = d[token] - ln(sum of e^d over the kept)

A mass is e^d rounded to a whole number of 2^-30, so that sums of masses are exact in any order, and
the kept set is the same on every device. So is the token: e^d, E and the quotient are computed by
operations that are rounded one by one. The cut of a filter is found by bisection of the 32 bits of
a float32 l, not by sorting.

`sample_logits_` is the end of a token step: it writes both at the position and counts on, in the
same launch.

Shapes   c, u: (B, V); T, s, top_p, min_p, top_k, index, position: (B,); token, log_prob: (B,).
Dtypes   c, u float32, float16, bfloat16 (float64 on CPU), mixed as they come; float32 inside;
         token int64, log_prob float32.
Backward of log_prob in c, u, the token and the kept set held fixed: once by kernel, twice by
         differentiating sample_logits_bwd_ref. The token has none.
Source   Gumbel-max: Gumbel, 1954; top-k arXiv:1805.04833; top-p arXiv:1904.09751; min-p
         arXiv:2407.01082; classifier-free guidance of tokens arXiv:2306.17806.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cgkernels import random
from cgkernels._triton import tl, triton
from cgkernels.checks import (
    as_index,
    as_row_values,
    as_seed,
    as_step,
    check_float,
    check_int64,
    check_integers,
    check_no_grad,
    check_same_device,
    check_shape,
    check_writable,
    readable,
)
from cgkernels.device import exp_of, exponential_block
from cgkernels.library import (
    define_op,
    needs_function,
    refuse_forward_mode,
    using_reference,
)

TOP_P_RULES = ("mass_before", "hf")

_LARGEST_VOCABULARY = 2**22  # sums of masses then are exact in float64, too


# 1. Reference -------------------------------------------------------------------------------------
def sample_logits_ref(
    logits, uncond, scale, temperature, top_k, top_p, min_p, top_p_rule, seed, index, position
):
    logit, d, _, greedy, sound = _tempered_ref(
        logits, uncond, scale, temperature, top_k, top_p, min_p
    )
    sound = sound & (position >= 0) & (position < 2**24)
    kept = _kept_ref(logit, d, top_k, top_p, min_p, top_p_rule)
    e = random.exponential(
        tuple(logit.shape), seed=seed, index=index, step=position.clamp(0, 2**24 - 1),
        stream=random.STREAM_TOKENS, dtype=d.dtype,
    )  # fmt: skip
    score = torch.where(kept, random.exp_of(d.detach()) / e, -1)
    token = torch.where(greedy, logit.argmax(-1), score.argmax(-1))
    log_prob = d.masked_fill(~kept, -torch.inf).log_softmax(-1)
    log_prob = log_prob.gather(-1, token[:, None])[:, 0].masked_fill(greedy, 0)
    return torch.where(sound, token, -1), torch.where(sound, log_prob, torch.nan)


def sample_logits_bwd_ref(
    dlog_prob, token, logits, uncond, scale, temperature, top_k, top_p, min_p, top_p_rule
):
    """Gradients with respect to logits and uncond."""
    logit, d, inverse, greedy, sound = _tempered_ref(
        logits, uncond, scale, temperature, top_k, top_p, min_p
    )
    kept = _kept_ref(logit, d, top_k, top_p, min_p, top_p_rule)
    drawn = torch.arange(d.shape[1], device=d.device) == token[:, None]
    factor = (dlog_prob * inverse).masked_fill(greedy, 0)
    factor = torch.where(sound & (token >= 0), factor, torch.nan)[:, None]
    dlogit = factor * (drawn.to(d.dtype) - d.masked_fill(~kept, -torch.inf).softmax(-1))
    if uncond is None:
        return dlogit.to(logits.dtype), None
    scale = scale[:, None]
    return (scale * dlogit).to(logits.dtype), ((1 - scale) * dlogit).to(uncond.dtype)


def _tempered_ref(logits, uncond, scale, temperature, top_k, top_p, min_p):
    """Guided logits, d, 1 / T, where T is 0, and where there is a distribution to draw from."""
    logit = logits.to(temperature.dtype)
    if uncond is not None:
        base = uncond.to(temperature.dtype)
        excluded = (logit == -torch.inf) & (base == -torch.inf)  # by both: not a number, else
        logit = base + scale[:, None] * (logit - base).masked_fill(excluded, 0)
    largest = logit.detach().amax(-1)
    greedy = temperature == 0
    sound = largest.isfinite() & (temperature >= 0) & (temperature < torch.inf)
    if top_k is not None:
        sound = sound & (top_k >= 1)
    for share in (top_p, min_p):
        if share is not None:
            sound = sound & (share >= 0) & (share <= 1)
    inverse = torch.ones_like(temperature) / temperature.masked_fill(greedy, 1)
    inverse = inverse.clamp(max=torch.finfo(inverse.dtype).max)  # 0 * inf is not a number
    return logit, (logit - largest[:, None]) * inverse[:, None], inverse, greedy, sound


def _kept_ref(logit, d, top_k, top_p, min_p, top_p_rule):
    """Mask of the tokens that may be drawn: here by sorting."""
    logit = logit.detach()
    share = random.exp_of(d.detach())
    kept = logit > -torch.inf
    if top_k is not None or top_p is not None:
        ordered, order = torch.sort(logit, dim=-1, descending=True, stable=True)
        rank = torch.arange(logit.shape[1], device=logit.device)
        count = kept.sum(-1, keepdim=True)
        if top_k is not None:
            count = torch.minimum(count, top_k[:, None])
        inside = rank < count
        if top_p is not None:
            top_p = top_p[:, None]
            mass = torch.where(inside, (share * 2.0**30 + 0.5).long().gather(-1, order), 0)
            total = mass.sum(-1, keepdim=True)
            enough = (top_p.double() * total.double()).ceil().long().clamp(min=1)
            nucleus = (inside & (mass.cumsum(-1) - mass < enough)).sum(-1, keepdim=True)
            nucleus = torch.where(top_p < 1, nucleus, count)
            inside = rank < nucleus
            if top_p_rule == "hf":  # as many of those that tie at the edge, from the other end
                edge = ordered.gather(-1, (nucleus - 1).clamp(min=0))
                first = (ordered > edge).sum(-1, keepdim=True)
                end = torch.minimum((ordered >= edge).sum(-1, keepdim=True), count)
                tied = (rank >= end - (nucleus - first)) & (rank < end)
                inside = (rank < first) | tied
        kept = torch.zeros_like(kept).scatter(-1, order, inside)
    if min_p is not None:
        kept = kept & (share >= min_p[:, None])
    return kept


# 2. Kernels ---------------------------------------------------------------------------------------
@triton.jit
def _of_row(values, row):
    """An entry of (pointer, stride)."""
    return tl.load(values[0] + row * values[1])


@triton.jit
def _logit_at(logits, uncond, scale, row, token, vocabulary):
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
        return _logit_at(logits, uncond, scale, row, token, vocabulary)


@triton.jit
def _mass_of(logit, largest, inverse):
    """e^d in whole 2^-30."""
    return (exp_of((logit - largest) * inverse) * 1073741824.0 + 0.5).to(tl.uint32)


@triton.jit
def _key(x, SHIFT: tl.constexpr):
    """A whole number in the order of x; the SHIFT low bits of every logit's float32 are zero."""
    bits = x.to(tl.int32, bitcast=True) >> SHIFT
    return tl.where(bits < 0, bits ^ (0x7FFFFFFF >> SHIFT), bits)


@triton.jit
def _number(key, SHIFT: tl.constexpr):
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
    high = _key(largest, SHIFT)
    count_high = count_low * 0
    weight_high = target * 0
    undecided = (high > low + 1) & (count_low > 1)
    while undecided:
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        edge = _number(middle, SHIFT)
        count = count_low * 0
        weight = target * 0
        for start in range(0, vocabulary, BLOCK):
            logit = _logit_block(
                held, logits, uncond, scale, row, start, vocabulary, HELD, BLOCK
            )  # fmt: skip
            above = logit > edge
            if BY_MASS and HELD:  # both in one number: the masses of a held row are below 2^45
                counted = held_mass.to(tl.int64) + 35184372088832
                both = tl.sum(tl.where(above, counted, 0), 0)
                count += (both >> 45).to(tl.int32)
                weight += both & 35184372088831
            else:
                count += tl.sum(above.to(tl.int32), 0)
                if BY_MASS:
                    mass = _mass_of(logit, largest, inverse)
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
        each = _mass_of(_number(high, SHIFT), largest, inverse).to(tl.int64)
    edge = _number(low, SHIFT)
    first = tl.full((), 0, tl.int32)
    last = tl.full((), -1, tl.int32)
    if (left - 1) * each >= room:
        edge = _number(high, SHIFT)
        inner = tl.full((), 0, tl.int32)
        outer = tl.full((), 0, tl.int32) + vocabulary
        while outer > inner + 1:
            middle = (inner + outer) // 2
            count = count_low * 0  # of those that tie and have a lower id than middle
            for start in range(0, vocabulary, PIECE):
                token = start + tl.arange(0, PIECE)
                logit = _logit_at(logits, uncond, scale, row, token, vocabulary)
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
        scale = _of_row(scale, row)
    t = _of_row(temperature, row)
    greedy = t == 0
    inverse = tl.div_rn(tl.full((), 1.0, tl.float32), tl.where(greedy, 1.0, t))
    inverse = tl.minimum(inverse, 3.4028234663852886e38)

    held = 0.0
    if HELD:
        held = _logit_at(logits, uncond, scale, row, tl.arange(0, BLOCK), vocabulary)
    largest = tl.full((), float("-inf"), tl.float32)
    count = tl.full((), 0, tl.int32)
    broken = tl.full((), 0, tl.int32)
    for start in range(0, vocabulary, BLOCK):
        logit = _logit_block(held, logits, uncond, scale, row, start, vocabulary, HELD, BLOCK)
        largest = tl.maximum(largest, tl.max(tl.where(logit == logit, logit, float("-inf")), 0))
        count += tl.sum((logit > float("-inf")).to(tl.int32), 0)
        broken += tl.sum((logit != logit).to(tl.int32), 0)
    sound = (broken == 0) & (tl.abs(largest) < float("inf")) & (t >= 0) & (t < float("inf"))

    low = _key(tl.full((), float("-inf"), tl.float32), SHIFT)
    k_edge = tl.full((), float("-inf"), tl.float32)
    k_first = tl.full((), 0, tl.int32)
    k_last = tl.full((), -1, tl.int32)
    if top_k is not None:
        k = _of_row(top_k, row)
        sound = sound & (k >= 1)
        if k < count:
            k_edge, k_first, k_last, low = _search(
                k, low, count, count.to(tl.int64), held, 0, largest, inverse, logits, uncond, scale,
                row, vocabulary, False, False, SHIFT, HELD, BLOCK, PIECE,
            )  # fmt: skip
            count = k.to(tl.int32)
    p_edge, p_first, p_last = k_edge, k_first, k_last
    if top_p is not None:
        p = _of_row(top_p, row)
        sound = sound & (p >= 0) & (p <= 1)
        if p < 1:
            total = tl.full((), 0, tl.int64)
            for start in range(0, vocabulary, PIECE):
                token = start + tl.arange(0, PIECE)
                logit = _logit_at(logits, uncond, scale, row, token, vocabulary)
                mass = _mass_of(logit, largest, inverse)
                kept = _is_kept(logit, token, k_edge, k_first, k_last)
                total += tl.sum(tl.where(kept, mass, 0).to(tl.int64), 0)
            held_mass = 0
            if HELD:
                held_mass = _mass_of(held, largest, inverse)
            enough = tl.ceil(p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
            p_edge, p_first, p_last, low = _search(
                tl.maximum(enough, 1), low, count, total, held, held_mass, largest, inverse, logits,
                uncond, scale, row, vocabulary, True, HF, SHIFT, HELD, BLOCK, PIECE,
            )  # fmt: skip
    least = tl.full((), 0.0, tl.float32)
    if min_p is not None:
        least = _of_row(min_p, row)
        sound = sound & (least >= 0) & (least <= 1)
    cuts = (k_edge, k_first, k_last, p_edge, p_first, p_last, least)
    return scale, largest, inverse, greedy, sound, cuts


@triton.jit
def _share_and_kept(logit, token, largest, inverse, cuts):
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
    scale, largest, inverse, greedy, sound, cuts = _distribution(
        logits, uncond, scale, temperature, top_k, top_p, min_p, row, vocabulary,
        HF, SHIFT, HELD, BLOCK, PIECE,
    )  # fmt: skip
    seed, index = tl.load(seed_ptr), tl.load(index_ptr + row)
    position = _of_row(position, row)
    sound = sound & (position >= 0) & (position < 16777216)
    drawn = tl.full((), 0, tl.int32)
    best = tl.full((), -1.0, tl.float32)
    total = tl.full((), 0, tl.int64)
    for start in range(0, vocabulary, PIECE):
        token = start + tl.arange(0, PIECE)
        logit = _logit_at(logits, uncond, scale, row, token, vocabulary)
        share, kept = _share_and_kept(logit, token, largest, inverse, cuts)
        total += tl.sum(tl.where(kept, (share * 1099511627776.0).to(tl.int64), 0), 0)
        e = exponential_block(seed, index, position, start, 2, PIECE)
        score = tl.where(kept, tl.div_rn(share, e), -1.0)
        score = tl.where(greedy, (logit == largest).to(tl.float32), score)
        score, place = tl.max(score, 0, return_indices=True)
        drawn = tl.where(score > best, start + place, drawn)
        best = tl.maximum(score, best)
    logit = _logit_at(logits, uncond, scale, row, drawn, vocabulary)
    log_prob = (logit - largest) * inverse - tl.log(total.to(tl.float32) * 9.094947017729282e-13)
    log_prob = tl.where(greedy, 0.0, log_prob)
    drawn = tl.where(sound, drawn.to(tl.int64), -1)
    log_prob = tl.where(sound, log_prob, float("nan"))
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
    scale, largest, inverse, greedy, sound, cuts = _distribution(
        logits, uncond, scale, temperature, top_k, top_p, min_p, row, vocabulary,
        HF, SHIFT, HELD, BLOCK, PIECE,
    )  # fmt: skip
    total = tl.full((), 0, tl.int64)
    for start in range(0, vocabulary, PIECE):
        candidate = start + tl.arange(0, PIECE)
        logit = _logit_at(logits, uncond, scale, row, candidate, vocabulary)
        share, kept = _share_and_kept(logit, candidate, largest, inverse, cuts)
        total += tl.sum(tl.where(kept, (share * 1099511627776.0).to(tl.int64), 0), 0)
    drawn = _of_row(token, row)
    factor = tl.where(greedy, 0.0, _of_row(dlog_prob, row) * inverse)
    factor = tl.where(sound & (drawn >= 0), factor, float("nan"))
    one = tl.div_rn(tl.full((), 1.0, tl.float32), total.to(tl.float32) * 9.094947017729282e-13)
    for start in range(0, vocabulary, PIECE):
        candidate = start + tl.arange(0, PIECE)
        logit = _logit_at(logits, uncond, scale, row, candidate, vocabulary)
        share, kept = _share_and_kept(logit, candidate, largest, inverse, cuts)
        dlogit = factor * ((candidate == drawn).to(tl.float32) - tl.where(kept, share * one, 0.0))
        mask = candidate < vocabulary
        offset = row * vocabulary + candidate
        if uncond is not None:
            du = (1 - scale) * dlogit
            tl.store(duncond_ptr + offset, du.to(duncond_ptr.dtype.element_ty), mask=mask)
            dlogit = scale * dlogit
        tl.store(dlogits_ptr + offset, dlogit.to(dlogits_ptr.dtype.element_ty), mask=mask)


# 3. Launchers -------------------------------------------------------------------------------------
def _launch_config(vocabulary):
    """How a row is walked.

    Up to 16,384 tokens the filters keep the row in registers, with logit and mass 64 of a thread's
    128; else each of their passes reads it again. So it is with longer rows of odd sizes, where
    each token needs a mask of its own. Noise needs registers, too: the last pass reads the row in
    pieces of eight tokens a thread.
    """
    block = min(16384, max(128, triton.next_power_of_2(vocabulary)))
    held = vocabulary <= block and (block <= 8192 or vocabulary % 16 == 0)
    warps = min(16, max(1, block // 256))
    piece = min(block, 256 * warps)
    return {
        "HELD": held, "BLOCK": block if held else piece, "PIECE": piece,
        "num_warps": warps, "maxnreg": 128,
    }  # fmt: skip


def _launch_fwd(
    logits, uncond, scale, temperature, top_k, top_p, min_p, top_p_rule, seed, index, position
):
    token, log_prob = _fake_fwd(
        logits, uncond, scale, temperature, top_k, top_p, min_p, top_p_rule, seed, index, position
    )
    places = (_by_row(token), _by_row(log_prob), None)
    _launch_draw(
        places, (0, 1), logits, uncond, scale, temperature, top_k, top_p, min_p, top_p_rule, seed,
        index, position,
    )  # fmt: skip
    return token, log_prob


def _launch_inplace(
    tokens, log_probs, counts, logits, uncond, scale, temperature, top_k, top_p, min_p,
    top_p_rule, seed, index,
):  # fmt: skip
    places = tuple((t, *t.stride()) for t in (tokens, log_probs, counts))
    _launch_draw(
        places, (tokens.shape[1], counts.shape[1]), logits, uncond, scale, temperature, top_k,
        top_p, min_p, top_p_rule, seed, index, counts[:, 0],
    )  # fmt: skip


def _launch_draw(
    places, sizes, logits, uncond, scale, temperature, top_k, top_p, min_p, top_p_rule, seed,
    index, position,
):  # fmt: skip
    """places: of tokens, log-probabilities and counts; sizes: columns and counts of a row."""
    rows, vocabulary = logits.shape
    if rows:
        _fwd_kernel[(rows,)](
            *places, _rows(logits), _rows(uncond),
            *map(_by_row, (scale, temperature, top_k, top_p, min_p)), seed, index.contiguous(),
            _by_row(position), vocabulary, *sizes, COUNTERS=triton.next_power_of_2(sizes[1]),
            HF=top_p_rule == "hf", SHIFT=_zero_bits(logits, uncond), enable_fp_fusion=False,
            **_launch_config(vocabulary),
        )  # fmt: skip


def _launch_bwd(
    dlog_prob, token, logits, uncond, scale, temperature, top_k, top_p, min_p, top_p_rule
):
    dlogits, duncond = _fake_bwd(
        dlog_prob, token, logits, uncond, scale, temperature, top_k, top_p, min_p, top_p_rule
    )
    rows, vocabulary = logits.shape
    if rows:
        _bwd_kernel[(rows,)](
            dlogits, None if uncond is None else duncond, _by_row(dlog_prob), _by_row(token),
            _rows(logits), _rows(uncond),
            *map(_by_row, (scale, temperature, top_k, top_p, min_p)), vocabulary,
            HF=top_p_rule == "hf", SHIFT=_zero_bits(logits, uncond), enable_fp_fusion=False,
            **_launch_config(vocabulary),
        )  # fmt: skip
    return dlogits, duncond


def _by_row(values):
    return None if values is None else (values, values.stride(0))


def _rows(logits):
    """A tensor (B, V) with its ids side by side, and the stride of its rows."""
    if logits is not None and logits.stride(1) != 1:
        logits = logits.contiguous()
    return _by_row(logits)


def _zero_bits(logits, uncond):
    """How many low bits are zero in the float32 of every logit: the search may skip them."""
    return {torch.bfloat16: 16, torch.float16: 13}.get(logits.dtype, 0) if uncond is None else 0


# 4. Registration ----------------------------------------------------------------------------------
def _fake_fwd(
    logits, uncond, scale, temperature, top_k, top_p, min_p, top_p_rule, seed, index, position
):
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.int64), temperature.new_empty(rows)


def _fake_bwd(
    dlog_prob, token, logits, uncond, scale, temperature, top_k, top_p, min_p, top_p_rule
):
    dlogits = logits.new_empty(logits.shape)
    return dlogits, logits.new_empty(0) if uncond is None else uncond.new_empty(uncond.shape)


def _cpu_fwd(logits, uncond, scale, temperature, top_k, top_p, min_p, *others):
    if temperature.any():
        return sample_logits_ref(logits, uncond, scale, temperature, top_k, top_p, min_p, *others)
    # All rows are greedy: no noise, whose words are most of the work.
    logit, *_, sound = _tempered_ref(logits, uncond, scale, temperature, top_k, top_p, min_p)
    token, position = logit.argmax(-1), others[-1]
    sound = sound & (position >= 0) & (position < 2**24)
    return torch.where(sound, token, -1), torch.where(sound, temperature, torch.nan)


def _cpu_inplace(tokens, log_probs, counts, *args):
    """In fewer steps where all rows stand at one position."""
    position = counts[:, 0]
    drawn, at = _cpu_fwd(*args, position), position.tolist()
    if not at or at.count(at[0]) < len(at) or not 0 <= at[0] < tokens.shape[1]:
        _write_ref(tokens, log_probs, counts, *drawn)
        return
    for written, value in zip((tokens, log_probs), drawn, strict=True):
        written.select(1, at[0]).copy_(value)
    counts.add_(1)


def _write_ref(tokens, log_probs, counts, token, log_prob):
    """Writes the draws at their positions, where those exist, and counts on."""
    at = counts[:, 0]
    inside = (at >= 0) & (at < tokens.shape[1])
    at = at.clamp(0, max(0, tokens.shape[1] - 1))[:, None]
    for written, drawn in ((tokens, token), (log_probs, log_prob)):
        if written.numel():
            kept = torch.where(inside, drawn, written.gather(1, at)[:, 0])
            written.scatter_(1, at, kept[:, None])
    counts.add_(1)


def _cpu_bwd(dlog_prob, token, logits, uncond, *options):
    dlogits, duncond = sample_logits_bwd_ref(dlog_prob, token, logits, uncond, *options)
    return dlogits.contiguous(), logits.new_empty(0) if uncond is None else duncond.contiguous()


_fwd = define_op(
    "sample_logits_fwd",
    "(Tensor logits, Tensor? uncond, Tensor? scale, Tensor temperature, Tensor? top_k, "
    "Tensor? top_p, Tensor? min_p, str top_p_rule, Tensor seed, Tensor index, Tensor position) "
    "-> (Tensor, Tensor)",
    cuda=_launch_fwd,
    cpu=_cpu_fwd,
    fake=_fake_fwd,
)

_inplace = define_op(
    "sample_logits_",
    "(Tensor(a!) tokens, Tensor(b!) log_probs, Tensor(c!) counts, Tensor logits, Tensor? uncond, "
    "Tensor? scale, Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, "
    "str top_p_rule, Tensor seed, Tensor index) -> ()",
    cuda=_launch_inplace,
    cpu=_cpu_inplace,
    fake=lambda *args: None,
)

_bwd = define_op(
    "sample_logits_bwd",
    "(Tensor dlog_prob, Tensor token, Tensor logits, Tensor? uncond, Tensor? scale, "
    "Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, str top_p_rule) "
    "-> (Tensor, Tensor)",
    cuda=_launch_bwd,
    cpu=_cpu_bwd,
    fake=_fake_bwd,
)


# 5. Public function -------------------------------------------------------------------------------
class _SampleLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, uncond, scale, temperature, top_k, top_p, min_p, top_p_rule, *noise):
        options = (scale, temperature, top_k, top_p, min_p)
        token, log_prob = _fwd(logits, uncond, *options, top_p_rule, *noise)
        ctx.save_for_backward(token, logits, uncond, *options)
        ctx.top_p_rule = top_p_rule
        ctx.mark_non_differentiable(token)
        return token, log_prob

    @staticmethod
    def backward(ctx, dtoken, dlog_prob):
        args = (dlog_prob, *ctx.saved_tensors, ctx.top_p_rule)
        if torch.is_grad_enabled():  # create_graph=True
            dlogits, duncond = sample_logits_bwd_ref(*args)
        else:
            dlogits, duncond = _bwd(*args)
            duncond = None if ctx.saved_tensors[2] is None else duncond
        return dlogits, duncond, *(None,) * 9


def sample_logits(
    logits: Tensor,
    uncond: Tensor | None = None,
    *,
    scale: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    top_p_rule: str = "mass_before",
    seed: int | Tensor,
    index: Tensor | None = None,
    position: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:
    """A token of each row, drawn from its logits, and the log-probability it was drawn with.

        l = uncond + scale (logits - uncond),   d = (l - max l) / temperature

    Of the tokens in the order of falling l, ties by rising id, top-k keeps the first top_k, then
    top-p those that have less than the share top_p of what is left before them, then min-p those
    with at least min_p times the probability of the first. The first is always kept, a token with
    logit -inf never. One is drawn by Gumbel-max, with noise (stream 2, step number = position,
    element = token id) that depends on nothing but the seed, the index and the position: the same
    token comes alone or in any batch, on CPU or GPU.

    log_prob is the natural logarithm of the probability of the token in the distribution that it
    was drawn from: with guidance and temperature, over the kept tokens alone, 0 where temperature
    is 0. It is what importance weights of these very draws need. The likelihood under the model
    is another number: `logits.log_softmax(-1).gather(-1, token[:, None])`.

    A row without a distribution comes out as token -1 and log_prob NaN: a logit is NaN or +inf, or
    all are -inf, or a number given as a GPU tensor, where it is not checked, is out of its range.

    Args:
        logits: (B, V), any strides, V up to 2^22; or with scale and without uncond (2B, V), the
            unconditional half first and the conditional half second.
        uncond: (B, V), the unconditional logits, or None.
        scale: guidance scale, number or floating tensor () or (B,); None: no guidance.
        temperature: number or floating tensor () or (B,), >= 0. 0 takes the largest logit, of
            equal ones that of the lowest id.
        top_k: int or integer tensor () or (B,), >= 1; None, V or more: no filter.
        top_p: number or floating tensor () or (B,), in [0, 1]; None or 1: no filter.
        min_p: number or floating tensor () or (B,), in [0, 1]; None or 0: no filter.
        top_p_rule: "mass_before", as above; "hf": of tokens that tie at the edge of top-p, those of
            the highest ids are kept instead, as transformers does.
        seed: 64-bit int or one-element int64 tensor.
        index: (B,) int64, the number of each sample; default 0 .. B - 1.
        position: place of the token in its sequence, int or integer tensor () or (B,), in
            [0, 2^24).

    A tensor on the device costs no launch beside the one, and a CUDA graph can change it; a number
    costs one to be written there.

    Returns:
        token (B,) int64, and log_prob (B,) float32 (float64 for float64 logits), differentiable in
        logits and uncond with the token and the kept set held fixed.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.

    Example:
        >>> logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
        >>> token, log_prob = sample_logits(logits.expand(1000, 4), top_p=0.6, seed=0)
        >>> token.unique(), (log_prob.exp()[token == 0][0] * 7).round()
        (tensor([0, 1]), tensor(5.))
    """
    args, like = _checked(
        logits, uncond, scale, temperature, top_k, top_p, min_p, top_p_rule, seed, index
    )
    position = as_step("position", position, args[0].shape[0], like.device, 2**24)
    run: Callable[..., tuple[Tensor, Tensor]] = sample_logits_ref
    if not using_reference():
        run = _SampleLogits.apply if needs_function(*args[:2]) else _fwd
    return run(*args, position)


def sample_logits_(
    tokens: Tensor,
    log_probs: Tensor,
    counts: Tensor,
    logits: Tensor,
    uncond: Tensor | None = None,
    *,
    scale: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    top_p_rule: str = "mass_before",
    seed: int | Tensor,
    index: Tensor | None = None,
) -> Tensor:
    """The end of a token step: `sample_logits` whose results are written where they belong.

        position = counts[:, 0]
        tokens[b, position[b]], log_probs[b, position[b]] = token[b], log_prob[b]
        counts += 1

    One launch, of which nothing returns to the host: with `embed_tokens` at the other end a graph
    of the step can be replayed. Where tokens have no such position, nothing is written on a GPU,
    and counting goes on. No gradients.

    Args:
        tokens: (B, N) int64, any strides; written.
        log_probs: (B, N) of the dtype of log_prob, any strides; written.
        counts: (B, k > 0) int64, any strides: the position of each draw, then whatever else is to
            be counted on by one, such as the lengths of caches; written.
        logits and the others: of `sample_logits`.

    Returns:
        tokens.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.

    Example:
        >>> tokens, log_probs = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2)
        >>> counts = torch.tensor([[1]])
        >>> sample_logits_(tokens, log_probs, counts, torch.tensor([[0.0, 9, 0]]), top_k=1, seed=0)
        tensor([[0, 1]])
        >>> counts
        tensor([[2]])
    """
    args, like = _checked(
        logits, uncond, scale, temperature, top_k, top_p, min_p, top_p_rule, seed, index
    )
    check_no_grad("sample_logits_ has no backward; use sample_logits", logits=logits, uncond=uncond)
    rows = args[0].shape[0]
    check_int64(tokens=tokens)
    if tokens.dim() != 2 or tokens.shape[0] != rows:
        raise ValueError(f"tokens must have shape ({rows}, N), got {tuple(tokens.shape)}")
    check_float(log_probs=log_probs)
    check_shape("log_probs", log_probs, tuple(tokens.shape))
    if log_probs.dtype != args[3].dtype:
        raise TypeError(f"log_probs must be {args[3].dtype}, got {log_probs.dtype}")
    check_int64(counts=counts)
    if counts.dim() != 2 or counts.shape[0] != rows or counts.shape[1] == 0:
        raise ValueError(f"counts must have shape ({rows}, k > 0), got {tuple(counts.shape)}")
    check_writable(tokens=tokens, log_probs=log_probs, counts=counts)
    check_same_device(logits=like, tokens=tokens, log_probs=log_probs, counts=counts)
    most = min(tokens.shape[1], 2**24) - 1
    check_integers("counts", counts[:, 0], (rows,), counts.device, 0, most)
    if using_reference():
        drawn = sample_logits_ref(*(*args, counts[:, 0]))
        _write_ref(tokens, log_probs, counts, *drawn)
    else:
        refuse_forward_mode()
        _inplace(tokens, log_probs, counts, *args)
    return tokens


def _checked(logits, uncond, scale, temperature, top_k, top_p, min_p, top_p_rule, seed, index):
    """The arguments of the op but the position, and a tensor of their device and widest dtype."""
    if top_p_rule not in TOP_P_RULES:
        raise ValueError(f"top_p_rule must be one of {', '.join(TOP_P_RULES)}, got {top_p_rule!r}")
    check_float(logits=logits)
    if logits.dim() != 2 or not 0 < logits.shape[1] <= _LARGEST_VOCABULARY:
        raise ValueError(
            f"logits must have shape (B, V) with V from 1 to 2^22, got {tuple(logits.shape)}"
        )
    if scale is not None and uncond is None:
        if logits.shape[0] % 2:
            raise ValueError(
                "logits must have an unconditional and a conditional half where scale is given "
                f"without uncond, got {tuple(logits.shape)}"
            )
        uncond, logits = logits.chunk(2)
    rows = logits.shape[0]
    like = logits
    if uncond is not None:
        check_float(uncond=uncond)
        check_shape("uncond", uncond, tuple(logits.shape))
        check_same_device(logits=logits, uncond=uncond)
        if scale is None:
            raise ValueError("scale must be given with uncond")
        like = uncond if uncond.dtype == torch.float64 else logits
        scale = as_row_values("scale", scale, rows, like)
    check_no_grad(
        "sample_logits has no gradient for it; use reference()",
        scale=scale, temperature=temperature, top_p=top_p, min_p=min_p,
    )  # fmt: skip
    temperature = _as_range("temperature", temperature, rows, like, torch.inf)
    if top_k is not None:
        top_k = as_step("top_k", top_k, rows, like.device, 2**31, least=1)
    top_p = None if top_p is None else _as_range("top_p", top_p, rows, like, 1)
    min_p = None if min_p is None else _as_range("min_p", min_p, rows, like, 1)
    seed, _ = as_seed(seed, like.device)
    index = as_index(index, rows, like.device)
    args = (logits, uncond, scale, temperature, top_k, top_p, min_p, top_p_rule, seed, index)
    return args, like


def _as_range(name, value, rows, like, most):
    """As `as_row_values`, for values from 0 to most."""
    made = as_row_values(name, value, rows, like)
    if isinstance(value, Tensor):
        outside = readable(value) and bool(((value < 0) | (value > most)).any())
        value = value.tolist() if outside else value
    else:
        outside = not 0 <= value <= most
    if outside:
        end = "]" if most < torch.inf else ")"
        raise ValueError(f"{name} must be in [0, {most}{end}, got {value}")
    return made
