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

from typing import Any

import torch
from torch import Tensor

from cgkernels.checks import (
    check_attention,
    check_counters,
    check_flag,
    check_float,
    check_integers,
    check_no_grad,
    check_same_device,
    check_shape,
    check_writable,
    readable,
)
from cgkernels.library import define_op, refuse_forward_mode, using_reference
from cgkernels.ops.decode_attention.cpu import _cpu_append, _cpu_fwd, row_plan
from cgkernels.ops.decode_attention.launch import _launch_append, _launch_fwd, empty_outputs
from cgkernels.ops.decode_attention.reference import append_ref, decode_attention_ref


# Registration -------------------------------------------------------------------------------------
def _fake(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(q)


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


# Public function ----------------------------------------------------------------------------------
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

    The index of a token in its sequence is prefix length + slot - left_pad. It decides what a query
    sees, and which row of the rotary tables rotates the token.

    Args:
        q: (B, Sq, Hq, D), not rotated; D at most 256. Any strides, as for all that follow.
        k_cache, v_cache: (B, S, Hkv, D), Hkv a divisor of Hq; keys in it are rotated. Pass a
            (B, Hkv, S, D) cache as cache.transpose(1, 2). Unused slots may hold anything. With
            k_new neither may share memory with another argument, as a prefix.
        lengths: (B,) int32 or int64, tokens in each row's cache before this call.
        k_new, v_new: (B, Sq, Hkv, D) or both None; keys not rotated.
        rope: tables (cos, sin), each (positions, R / 2) with R <= D: the first R of D dimensions
            are rotated. Rows may be anything, for instance zero. None: no rotation.
        rope_interleaved: pairs (2 i, 2 i + 1) rather than (i, i + R / 2).
        position: (B, Sq) integer, rows of the tables for the queries and new keys; default:
            their indices in the sequence.
        prefix_k, prefix_v: (P, M, Hkv, D), keys and values stored once for all rows that start with
            them. On a GPU all rows of a prefix are multiplied with it at once. With k_new they
            must be no part of the caches, which are written; and a `clone()` of a cache belongs
            outside of what torch.compile sees, where Inductor drops it (pytorch#198031).
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
        (float64 for float64), natural logarithm. A query that sees nothing gives (0, -inf). What
        is not finite in a token reaches the queries that see it, and no others.

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
    check_flag(rope_interleaved=rope_interleaved, return_lse=return_lse)
    shape, capacity = _check_shapes(q, k_cache, v_cache)
    rows, queries, kv_heads, head_size = shape
    pair = {"k_new": k_new, "v_new": v_new}
    _check_pair(pair, (rows, queries, kv_heads, head_size), q)
    new = 0 if k_new is None else queries
    check_integers("lengths", lengths, (rows,), q.device, 0, capacity - new)
    if counters is not None:
        if k_new is None:
            raise ValueError("counters must be None without k_new: then nothing may be written")
        check_counters(counters, rows * queries * q.shape[2], q.device)
    cos = sin = None
    if rope is not None:
        cos, sin = _check_tables(rope, head_size, q)
    prefix_length, prefix_id = _check_prefix(prefix_k, prefix_v, prefix_length, prefix_id, shape, q)
    if left_pad is not None:
        check_integers("left_pad", left_pad, (rows,), q.device, 0, capacity)
        if readable(left_pad) and readable(lengths) and bool((left_pad > lengths).any()):
            raise ValueError(
                f"left_pad must be at most lengths, got {left_pad.tolist()} for {lengths.tolist()}"
            )
    if k_new is not None:
        why = "it is written: what stood there has no gradient"
        check_no_grad(why, k_cache=k_cache, v_cache=v_cache)
        check_writable(
            {"k_cache": k_cache, "v_cache": v_cache, "counters": counters},
            {
                "q": q, **pair, "lengths": lengths, "rope": cos, "rope (sin)": sin,
                "position": position, "prefix_k": prefix_k, "prefix_v": prefix_v,
                "prefix_length": prefix_length, "prefix_id": prefix_id, "left_pad": left_pad,
            },
        )  # fmt: skip
    if position is not None:
        limit = 2**31 if cos is None else cos.shape[0]
        check_integers("position", position, (rows, queries), q.device, 0, limit - 1)
    elif cos is not None and rows and readable(lengths) and readable(cos):
        plan = row_plan(lengths, left_pad, prefix_k, prefix_length, prefix_id, capacity, new)
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


def _by_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k_new: Tensor | None,
    v_new: Tensor | None, options: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if k_new is None or v_new is None:
        return decode_attention_ref(q, k_cache, v_cache, lengths, *options)
    cos, sin, position, prefix_k, _, prefix_length, prefix_id, left_pad, interleaved = options[:9]
    k, v, seen = append_ref(
        k_cache, v_cache, lengths, k_new, v_new, cos, sin, position, prefix_k, prefix_length,
        prefix_id, left_pad, interleaved,
    )  # fmt: skip
    k_cache.copy_(k)
    v_cache.copy_(v)
    return decode_attention_ref(q, k, v, seen, *options)


def _check_shapes(
    q: Tensor, k_cache: Tensor, v_cache: Tensor
) -> tuple[tuple[int, int, int, int], int]:
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


def _check_like(name: str, tensor: Tensor, q: Tensor) -> None:
    """Raise unless tensor has the dtype and device of q."""
    if tensor.dtype != q.dtype:
        raise TypeError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    check_same_device(q=q, **{name: tensor})


def _check_pair(pair: dict[str, Tensor | None], shape: tuple[int, ...], q: Tensor) -> None:
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


def _check_tables(rope: tuple[Tensor, Tensor], head_size: int, q: Tensor) -> tuple[Tensor, Tensor]:
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


def _check_prefix(
    prefix_k: Tensor | None, prefix_v: Tensor | None, prefix_length: Tensor | None,
    prefix_id: Tensor | None, shape: tuple[int, int, int, int], q: Tensor,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
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
