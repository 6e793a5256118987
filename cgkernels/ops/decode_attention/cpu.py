"""`decode_attention` on a CPU: neighboring rows at once, by PyTorch's own attention."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cgkernels.ops.decode_attention.launch import empty_outputs
from cgkernels.ops.decode_attention.reference import rotary_ref, rotate
from cgkernels.rows import compute_dtype, lies_apart

Attention = tuple[Tensor, Tensor]
"""Results (rows, heads, queries, D), and their log-sum-exp (rows, heads, queries)."""

RowPlan = tuple[int, int, int, int]
"""End of the cached tokens or -1, padding, length of the prefix, prefix."""

_MERGED_AT_ONCE = 64  # rows

_VECTOR = 16  # keys, fewer of which alone PyTorch takes the maximum of one by one


def _cpu_fwd(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    return _cpu_append(q, k_cache, v_cache, lengths, None, None, None, *options)


def _cpu_append(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k_new: Tensor | None,
    v_new: Tensor | None, counters: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    position: Tensor | None, prefix_k: Tensor | None, prefix_v: Tensor | None,
    prefix_length: Tensor | None, prefix_id: Tensor | None, left_pad: Tensor | None,
    interleaved: bool, window: int, softcap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Neighboring rows that see as many tokens at once, on views of caches and prefixes."""
    rows, queries, q_heads, head_size = q.shape
    if q.numel() == 0:
        if q_heads == 0 and k_new is not None:  # appended all the same, as for any queries
            others = (position, prefix_k, prefix_v, prefix_length, prefix_id, left_pad, interleaved)
            _cpu_append(
                k_new, k_cache, v_cache, lengths, k_new, v_new, None, cos, sin, *others, window,
                softcap, scale,
            )  # fmt: skip
        return empty_outputs(q)
    kv_heads, dtype = k_cache.shape[2], q.dtype
    counts = (lengths, left_pad, prefix_k, prefix_length, prefix_id, k_cache.shape[1])
    plan = row_plan(*counts, 0 if k_new is None else queries)
    index = [before + end - pad - queries for end, pad, before, _ in plan]  # of first queries
    if cos is not None and sin is not None:
        both = q if k_new is None else torch.cat([q, k_new], 2)
        both = _rotate_rows(both, index, cos, sin, position, interleaved)
        q, k_new = both[:, :, :q_heads], None if k_new is None else both[:, :, q_heads:]
    if queries > 1:
        q = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    q = q.reshape(rows, kv_heads, -1, head_size)  # (B, Hkv, G Sq, D)
    q = q.to(compute_dtype(q))
    attend = partial(_attend_range, queries, window, softcap, scale)
    out, lse = _attend_own(attend, plan, queries, q, k_cache, v_cache, k_new, v_new)
    if prefix_k is not None and prefix_v is not None:
        parts = []
        for some, which, before, first in _prefix_runs(plan, index, queries, window):
            shape = (some.stop - some.start, -1, -1, -1)
            k, v = (t[which].expand(shape) for t in (prefix_k, prefix_v))
            parts.append(attend(q[some], k, v, first, 0, before))
        out, lse = _merge(out, lse, *_concatenate(parts))
    out.nan_to_num_(math.nan, math.nan, math.nan)  # a weight of 0 makes NaN of inf, others not
    if queries > 1:
        out = out.unflatten(2, (-1, queries)).permute(0, 3, 1, 2, 4)
    out = out.reshape(rows, queries, q_heads, head_size).to(dtype).contiguous()
    return out, lse.reshape(rows, q_heads, queries).contiguous()


def row_plan(
    lengths: Tensor, left_pad: Tensor | None, prefix_k: Tensor | None,
    prefix_length: Tensor | None, prefix_id: Tensor | None, capacity: int, new: int,
) -> list[RowPlan]:  # fmt: skip
    """What each row sees, as numbers of the host; `new` tokens are appended."""
    pads = [0] * lengths.numel() if left_pad is None else left_pad.tolist()
    ends = [n + new if 0 <= n <= capacity - new else -1 for n in lengths.tolist()]
    if prefix_k is None:
        return [(end, pad, 0, 0) for end, pad in zip(ends, pads, strict=True)]
    assert prefix_length is not None and prefix_id is not None
    prefixes, prefix_capacity = prefix_k.shape[:2]
    known = [n if 0 <= n <= prefix_capacity else -1 for n in prefix_length.tolist()]
    which = prefix_id.tolist()
    prefix_lengths = [known[p] if 0 <= p < prefixes else -1 for p in which]
    rows = zip(ends, pads, prefix_lengths, which, strict=True)
    return [row if row[0] >= 0 and row[2] >= 0 else (-1, 0, 0, 0) for row in rows]


def _rotate_rows(
    x: Tensor, index: list[int], cos: Tensor, sin: Tensor, position: Tensor | None,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    """x (B, Sq, H, D), whose rows start at these indices of their sequences, rotated."""
    queries, first = x.shape[1], index[0]
    if position is None and len(set(index)) == 1 and 0 <= first <= cos.shape[0] - queries:
        # The usual case: all rows are equally long, and their angles are a view.
        return rotate(x, cos[first : first + queries], sin[first : first + queries], interleaved)
    if position is None:
        position = x.new_tensor(index, dtype=torch.int64)[:, None]
        position = position + torch.arange(queries, device=x.device)
    return rotary_ref(x, cos, sin, position, interleaved)


def _attend_own(
    attend: Callable[..., Attention], plan: list[RowPlan], queries: int, q: Tensor,
    k_cache: Tensor, v_cache: Tensor, k_new: Tensor | None, v_new: Tensor | None,
) -> Attention:  # fmt: skip
    """Attention over the rows' own caches, to which the new tokens are written first."""
    tensors = [q, k_cache, v_cache, *(t for t in (k_new, v_new) if t is not None)]
    parts = []
    start = 0
    for (end, pad), run in groupby(row[:2] for row in plan):
        some = slice(start, start := start + len(list(run)))
        if end < 0:  # more tokens than the cache holds, or no prefix
            parts.append((q[some] * torch.nan, q[some, ..., 0] * torch.nan))
            continue
        whole = start - some.start == len(plan)
        query, k, v, *new = tensors if whole else [t[some] for t in tensors]
        for cache, fresh in zip((k, v), new, strict=False):  # none, or both
            cache.narrow(1, end - queries, queries).copy_(fresh)
        parts.append(attend(query, k, v, end - queries, max(pad, 0), end))
    return _concatenate(parts)


def _prefix_runs(
    plan: list[RowPlan], index: list[int], queries: int, window: int
) -> Iterator[tuple[slice, slice, int, int]]:
    """(rows, prefixes, their length, index of the first query): neighbors that one call serves.

    Their prefixes are one, or one after another, so that neither has to be copied. Rows of other
    lengths belong together as long as all their queries see the whole prefix.
    """
    kinds = [
        (before, None if first >= before - 1 and first + queries <= window else first)
        for (_, _, before, _), first in zip(plan, index, strict=True)
    ]
    start = 0
    while start < len(plan):
        stop, prefix, step = start + 1, plan[start][3], None
        while stop < len(plan) and kinds[stop] == kinds[start]:
            ahead = plan[stop][3] - plan[stop - 1][3]
            if ahead not in ((0, 1) if step is None else (step,)):
                break
            stop, step = stop + 1, ahead
        yield slice(start, stop), slice(prefix, plan[stop - 1][3] + 1), plan[start][2], index[start]
        start = stop


def _attend_range(
    queries: int, window: int, softcap: float, scale: float, q: Tensor, k: Tensor, v: Tensor,
    first: int, lo: int, hi: int,
) -> Attention:  # fmt: skip
    """Attention over tokens lo .. hi - 1 of queries (rows, Hkv, G Sq, D) from index `first` on."""
    lo, hi = max(lo, first - window + 1), min(hi, first + queries)
    if lo >= hi:
        return torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf)
    k, v = (t[:, lo:hi].transpose(1, 2).to(q.dtype) for t in (k, v))  # (rows, Hkv, hi - lo, D)
    hidden = None
    if first < hi - 1 or first + queries - 1 - window >= lo:
        key = torch.arange(lo, hi, device=q.device)
        last = first + torch.arange(queries, device=q.device)[:, None]
        hidden = ((key > last) | (key <= last - window)).repeat(q.shape[2] // queries, 1)
    # What PyTorch's kernel makes of NaN: it adds -inf to what is hidden, and of a few scores that
    # are all NaN it gives 0. NaN in other keys and values comes out as NaN.
    touchy = (q, k[:, :, -_VECTOR:]) if hidden is None else (q, k, v)
    plain = [not softcap] * len(q)
    if not (softcap or all(math.isfinite(t.sum().item()) for t in touchy)):  # NaN, or a large sum
        plain = [all(bool(t.isfinite().all()) for t in row) for row in zip(*touchy, strict=True)]
    if all(plain):
        out, lse = _attend_plain(q, k, v, hidden, scale)
    else:
        # Row by row: PyTorch's products and vectors depend on how many there are.
        rows = zip(plain, q.split(1), k.split(1), v.split(1), strict=True)
        out, lse = _concatenate([
            _attend_plain(q_row, k_row, v_row, hidden, scale) if is_plain
            else _attend_by_definition(q_row, k_row, v_row, hidden, softcap, scale)
            for is_plain, q_row, k_row, v_row in rows
        ])  # fmt: skip
    if hidden is not None:
        blind = hidden.all(1)
        out, lse = out.masked_fill(blind[:, None], 0), lse.masked_fill(blind, -torch.inf)
    return out, lse


def _attend_plain(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float
) -> Attention:
    """What scaled_dot_product_attention runs on a CPU; only this entry has the log-sum-exp.

    Of several threads each has its own scratch memory, whose alignment MKL's order of summation
    follows, and a row's place in the batch says which is its own.
    """
    if not all(lies_apart(t, 2) for t in (q, k, v)):
        q, k, v = (t.contiguous() for t in (q, k, v))
    mask = None
    if hidden is not None:
        mask = torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
    # A thread whose first call of PyTorch falls in between is left with one, too.
    threads = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    try:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=mask, scale=scale
        )
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


def _attend_by_definition(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, softcap: float, scale: float
) -> Attention:
    """One row (1, Hkv, G Sq, D), with a softcap, or with what is not finite."""
    q, k, v = (t[0] for t in (q, k, v))  # as products of three dimensions
    score = scale * (q @ k.mT)
    score = softcap * torch.tanh(score / softcap) if softcap else score
    score = score if hidden is None else score.masked_fill(hidden, -torch.inf)
    lse = score.logsumexp(-1)
    weight = torch.exp(score - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    bad = ~v.isfinite()
    if hidden is None or not bad.any():
        return (weight @ v)[None], lse[None]
    seen = (~hidden).to(v.dtype) @ bad.to(v.dtype) > 0  # a weight of 0 hides no NaN
    out = (weight @ v.masked_fill(bad, 0)).masked_fill(seen, torch.nan)
    return out[None], lse[None]


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Attention:
    """Attention over the tokens of both, of each with its log-sum-exp.

    PyTorch's vectors and what is left over beside them may differ in the last bit. So every row is
    padded to whole vectors, and not more of them go at once than one thread takes.
    """
    if len(lse) > _MERGED_AT_ONCE:
        parts = (t.split(_MERGED_AT_ONCE) for t in (out, lse, other, other_lse))
        return _concatenate([_merge(*some) for some in zip(*parts, strict=True)])
    count, shape = lse[0].numel(), lse.shape
    a, b = (F.pad(t.flatten(1), (0, -count % 64)) for t in (lse, other_lse))
    both = torch.logaddexp(a, b)
    weight = a.sub_(both).exp_().masked_fill_(both == -torch.inf, 0)
    both, weight = (t[:, :count].view(shape) for t in (both, weight))
    return (out - other).mul_(weight[..., None]).add_(other), both


def _concatenate(parts: Sequence[Attention]) -> Attention:
    """Results of rows that follow one another."""
    if len(parts) == 1:
        return parts[0]
    out, lse = zip(*parts, strict=True)
    return torch.cat(out), torch.cat(lse)
