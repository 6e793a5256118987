"""Causal attention over whole sequences, their first tokens bidirectional where asked for.

    out_i = sum_j softmax_j(cap(scale q_i . k_j)) v_j,   cap(s) = softcap tanh(s / softcap) or s
    over j in (i - window, i], and over all j < bidirectional where i < bidirectional

No op of its own but PyTorch's scaled_dot_product_attention, composed so that its kernels without a
mask are taken wherever they fit: a mask of T x T keeps the fastest ones out.

Shapes   q, out: (B, T, Hq, D); k, v: (B, T, Hkv, D), Hkv a divisor of Hq.
Dtypes   float32, float16, bfloat16 (float64 on CPU), one for all; out has it too. In half types
         the weights that values are multiplied with are rounded to the dtype.
Backward by PyTorch: once. Twice, and in forward mode, inside reference() or within
         torch.nn.attention.sdpa_kernel(SDPBackend.MATH), as PyTorch's fused kernels have neither.
Source   arXiv:1706.03762; bidirectional prefixes: arXiv:1910.10683; softcap: arXiv:2408.00118.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cgkernels.checks import (
    check_attention,
    check_float,
    check_int,
    check_integers,
    check_same_device,
    check_shape,
    readable,
)
from cgkernels.library import using_reference, without_autocast
from cgkernels.rows import compute_dtype, lies_apart


# Reference ----------------------------------------------------------------------------------------
@without_autocast
def prefill_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, bidirectional: int | Tensor,
    left_pad: Tensor | None, window: int, softcap: float | None, scale: float,
) -> Tensor:  # fmt: skip
    narrow, dtype = q.dtype, compute_dtype(q)
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    mask, blind = _mask(length, q.device, bidirectional, left_pad, window)
    k, v = (t.repeat_interleave(group, 2) for t in (k, v))
    q, k, v = (t.to(dtype).transpose(1, 2) for t in (q, k, v))  # (B, Hq, T, D)
    score = scale * (q @ k.mT)  # (B, Hq, T, T)
    score = softcap * torch.tanh(score / softcap) if softcap else score
    weight = score.masked_fill(~mask, -torch.inf).softmax(-1).to(narrow).to(dtype)
    out = (weight @ v).transpose(1, 2)  # (B, T, Hq, D)
    return out if blind is None else out.masked_fill(blind, 0)


def _mask(
    length: int, device: torch.device, bidirectional: int | Tensor,
    left_pad: Tensor | None, window: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What each query sees, (B or 1, 1, T, T), and which queries are padding, (B, T, 1, 1).

    Padding sees itself, lest a softmax be taken over nothing; its outputs are put to zero.
    """
    at = torch.arange(length, device=device)
    ahead = at - at[:, None]  # of the key, (T, T)
    seen = (ahead <= 0) & (ahead > -window)
    start = at.new_zeros(1) if left_pad is None else left_pad
    inside = at < (start + bidirectional)[:, None]  # of the bidirectional block, (B, T)
    seen = seen | (inside[:, :, None] & inside[:, None])
    padding = at < start[:, None]
    seen = (seen & ~padding[:, None]) | (ahead == 0)
    return seen[:, None], None if left_pad is None else padding[:, :, None, None]


# Composition --------------------------------------------------------------------------------------
@without_autocast
def _compose(
    q: Tensor, k: Tensor, v: Tensor, bidirectional: int | Tensor,
    left_pad: Tensor | None, window: int, scale: float,
) -> Tensor:  # fmt: skip
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    whole = left_pad is None and window >= length and not isinstance(bidirectional, Tensor)
    if not whole:
        mask, blind = _mask(length, q.device, bidirectional, left_pad, window)
        # Kernels that take a mask take no groups.
        k, v = (t if group == 1 else t.repeat_interleave(group, 2) for t in (k, v))
        out = _attend(q, k, v, scale, attn_mask=mask)
        return out if blind is None else out.masked_fill(blind, 0)
    if bidirectional == length:
        return _attend(q, k, v, scale)
    out = _attend(q, k, v, scale, is_causal=True)
    if bidirectional <= 1:
        return out
    # The square of the block once more: less than what a mask would cost, and is_causal would align
    # the first of the later queries, not the last, with the first key.
    block = _attend(q[:, :bidirectional], k[:, :bidirectional], v[:, :bidirectional], scale)
    return torch.cat([block, out[:, bidirectional:]], 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, **how: Any) -> Tensor:
    how |= {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}  # no symbol, in a trace
    if scale <= 0:  # PyTorch's kernels scale their maxima, and the -inf of what is masked, too
        q, scale = q * (-1 if scale else 0), -scale or 1.0
    q, k, v = (t if lies_apart(t, 1) else t.contiguous() for t in (q, k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, **how).transpose(1, 2)


# What is not finite -------------------------------------------------------------------------------
def _isolate(
    q: Tensor, k: Tensor, v: Tensor, bidirectional: int | Tensor,
    left_pad: Tensor | None, window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k and v made finite, and which outputs are not to be, (B, T, Hkv, G or 1, D).

    In sums a weight of 0 does not keep NaN out: so it is put to 0, and counted. What a query sees
    are neighbors: a count up to the last of them, less that before the first.
    """
    length, kv_heads = k.shape[1:3]
    bad = ((k * 0).sum(3, keepdim=True) + v * 0) != 0  # (B, T, Hkv, D)
    count = bad.cumsum(1, dtype=torch.int32)
    at = torch.arange(length, device=q.device)
    start = at.new_zeros(1) if left_pad is None else left_pad
    stop = (start + bidirectional).clamp(max=length)
    inside = (at >= start[:, None]) & (at < stop[:, None])  # (B or 1, T)
    last = torch.where(inside, stop[:, None] - 1, at)
    seen = _take(count, last)
    if window < length:
        before = torch.where(inside, start[:, None], at - window + 1) - 1
        seen = seen - _take(count, before.clamp(min=0)) * (before >= 0)[..., None, None]
    own = (q * 0).sum(3, keepdim=True).unflatten(2, (kv_heads, -1)) != 0  # (B, T, Hkv, G, 1)
    q, k, v = (t.nan_to_num(0.0, 0.0, 0.0) for t in (q, k, v))
    return q, k, v, (seen > 0).unsqueeze(3) | own


def _take(count: Tensor, at: Tensor) -> Tensor:
    """count (B, T, ...) at tokens (B or 1, T)."""
    return count.gather(1, at[..., None, None].expand_as(count))


# Public function ----------------------------------------------------------------------------------
def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bidirectional: int | Tensor = 0,
    left_pad: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of every token over those before it, as in training and for a prefix.

    What `decode_attention` computes token by token, at once and with gradients: the same k and v
    fill its cache or its shared prefix. Keys and queries come rotated, where they are.

    Args:
        q: (B, T, Hq, D). Any strides, as for all that follow.
        k, v: (B, T, Hkv, D), Hkv a divisor of Hq.
        bidirectional: the first so many tokens of a row, counted after its padding, all see one
            another, whatever the window (a prefix language model); a number for all rows or (B,)
            integers.
        left_pad: (B,) integer, tokens at the start of a row that nobody sees, and which give zero;
            default 0.
        window: each token sees the last `window` tokens, itself included; default all.
        softcap: scores s become softcap tanh(s / softcap); default off.
        scale: of scores; default 1 / sqrt(D).

    Plain causal attention and one number of bidirectional tokens need no mask of T x T, the other
    options do; softcap also has all scores in memory.

    Returns:
        (B, T, Hq, D) in q's dtype. NaN or infinity in a token makes NaN of the tokens that see it,
        of no others: on a CPU outside a trace. PyTorch's kernels for GPUs multiply hidden values by
        a weight of 0, so what is not finite there may reach others.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.

    Example:
        >>> q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
        >>> out = prefill_attention(q, k, v, bidirectional=3)
        >>> torch.allclose(out[:, :3], prefill_attention(q, k, v)[:, :3])
        False
        >>> torch.allclose(out[:, 3:], prefill_attention(q, k, v)[:, 3:], atol=1e-6)
        True
    """
    check_float(q=q, k=k, v=v)
    if q.dim() != 4 or q.shape[3] == 0:
        raise ValueError(f"q must have shape (B, T, Hq, D > 0), got {tuple(q.shape)}")
    rows, length, heads, head_size = q.shape
    if k.dim() != 4 or (*k.shape[:2], k.shape[3]) != (rows, length, head_size):
        raise ValueError(
            f"k must have shape ({rows}, {length}, Hkv, {head_size}), got {tuple(k.shape)}"
        )
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(f"k must have a divisor of q's {heads} heads, got {k.shape[2]}")
    check_shape("v", v, tuple(k.shape))
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    check_same_device(q=q, k=k, v=v)
    if isinstance(bidirectional, Tensor):
        check_integers("bidirectional", bidirectional, (rows,), q.device, 0, length)
    else:
        check_int("bidirectional", bidirectional, 0, length)
    if left_pad is not None:
        check_integers("left_pad", left_pad, (rows,), q.device, 0, length)
    scale = head_size**-0.5 if scale is None else scale
    check_attention(window, softcap, scale)
    window = length if window is None else min(window, length)
    if left_pad is not None:  # what is there reaches nobody, nor does its gradient
        padding = torch.arange(length, device=q.device) < left_pad[:, None]
        q, k, v = (t.masked_fill(padding[..., None, None], 0) for t in (q, k, v))
    bad = None
    looked_at = all(map(readable, (q, k, v)))  # elsewhere it would wait, or cost a dozen launches
    if looked_at and not all(math.isfinite(t.detach().sum().item()) for t in (q, k, v)):
        q, k, v, bad = _isolate(q, k, v, bidirectional, left_pad, window)
    if using_reference() or softcap is not None:
        out = prefill_attention_ref(q, k, v, bidirectional, left_pad, window, softcap, scale)
        out = out.to(q.dtype)
    else:
        out = _compose(q, k, v, bidirectional, left_pad, window, scale)
    if bad is None:
        return out
    return out.unflatten(2, (k.shape[2], -1)).masked_fill(bad, math.nan).flatten(2, 3)
