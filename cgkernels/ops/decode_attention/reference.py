"""The definition of `decode_attention` in plain PyTorch: rotation, append, masked attention."""

import torch
from torch import Tensor

from cgkernels.library import without_autocast
from cgkernels.rows import compute_dtype


@without_autocast
def decode_attention_ref(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, cos: Tensor | None,
    sin: Tensor | None, position: Tensor | None, prefix_k: Tensor | None,
    prefix_v: Tensor | None, prefix_length: Tensor | None, prefix_id: Tensor | None,
    left_pad: Tensor | None, interleaved: bool, window: int, softcap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, Sq, Hq, D) and lse (B, Hq, Sq), of caches that have the new tokens already."""
    rows, queries, q_heads, _ = q.shape
    dtype = compute_dtype(q)
    capacity, kv_heads = k_cache.shape[1:3]
    counts = _row_counts(lengths, left_pad, prefix_k, prefix_length, prefix_id, capacity, 0)
    length, pad, before, fits = (n[:, None] for n in counts)  # (B, 1)
    slot = torch.arange(capacity, device=q.device)
    q_index = before + length - pad - queries + torch.arange(queries, device=q.device)  # (B, Sq)
    k_index = before + slot - pad  # (B, S)
    used = (slot >= pad) & (slot < length)  # (B, S)
    k, v = k_cache, v_cache
    if prefix_k is not None:
        assert prefix_v is not None and prefix_id is not None
        shared = torch.arange(prefix_k.shape[1], device=q.device).expand(rows, -1)  # (B, M)
        chosen = prefix_id.long().clamp(0, prefix_k.shape[0] - 1)
        k, v = torch.cat([prefix_k[chosen], k], 1), torch.cat([prefix_v[chosen], v], 1)
        k_index, used = torch.cat([shared, k_index], 1), torch.cat([shared < before, used], 1)
    visible = used[:, None] & (k_index[:, None] <= q_index[..., None])  # (B, Sq, M + S)
    visible &= k_index[:, None] > q_index[..., None] - window
    k, v = (t.masked_fill(~used[..., None, None], 0).to(dtype) for t in (k, v))  # NaN where unused
    rotated = rotary_ref(q, cos, sin, q_index if position is None else position, interleaved)
    rotated = rotated.to(dtype).unflatten(2, (kv_heads, q_heads // kv_heads))
    score = scale * torch.einsum("bihgd,bjhd->bhgij", rotated, k)  # (B, Hkv, G, Sq, M + S)
    score = softcap * torch.tanh(score / softcap) if softcap else score
    score = score.masked_fill(~visible[:, None, None], -torch.inf)
    lse = score.logsumexp(-1)  # (B, Hkv, G, Sq)
    weight = torch.exp(score - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    weight = weight.to(q.dtype).to(dtype)
    bad = ~v.isfinite()  # with a weight of 0 they would still make NaN
    seen = torch.einsum("bij,bjhd->bihd", visible.to(dtype), bad.to(dtype)) > 0
    out = torch.einsum("bhgij,bjhd->bihgd", weight, v.masked_fill(bad, 0))
    out = out.masked_fill(seen.unsqueeze(3), torch.nan).flatten(2, 3)  # (B, Sq, Hq, D)
    out = out.masked_fill(~fits[..., None, None], torch.nan)
    lse = lse.flatten(1, 2).masked_fill(~fits[..., None], torch.nan)  # (B, Hq, Sq)
    return out.to(q.dtype), lse


@without_autocast
def append_ref(
    k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k_new: Tensor, v_new: Tensor,
    cos: Tensor | None, sin: Tensor | None, position: Tensor | None, prefix_k: Tensor | None,
    prefix_length: Tensor | None, prefix_id: Tensor | None, left_pad: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Both caches with the new tokens, the keys rotated; a row that would overflow stays as it is.

    Also the lengths that `decode_attention_ref` needs to see them; -1 for a row that overflows.
    """
    capacity, new = k_cache.shape[1], k_new.shape[1]
    counts = _row_counts(lengths, left_pad, prefix_k, prefix_length, prefix_id, capacity, new)
    length, pad, before, fits = (n[:, None] for n in counts)  # (B, 1)
    seen = torch.where(fits, length + new, -1)[:, 0]
    if new == 0:
        return k_cache, v_cache, seen
    token = torch.arange(capacity, device=lengths.device) - length  # of each slot, (B, S)
    written = (fits & (token >= 0) & (token < new))[..., None, None]
    if position is None:
        position = before + length - pad + torch.arange(new, device=lengths.device)
    k_new = rotary_ref(k_new, cos, sin, position, interleaved)
    source = token.clamp(0, new - 1)[..., None, None].expand(k_cache.shape)
    k, v = (
        torch.where(written, fresh.gather(1, source), cache) if capacity else cache
        for cache, fresh in ((k_cache, k_new), (v_cache, v_new))
    )
    return k, v, seen


def rotary_ref(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, position: Tensor, interleaved: bool
) -> Tensor:
    """x (B, n, H, D) with its first dimensions rotated by the angles of its positions (B, n)."""
    if cos is None or sin is None:
        return x
    inside = ((position >= 0) & (position < cos.shape[0]))[..., None]
    row = position.long().clamp(0, cos.shape[0] - 1)
    c, s = (t[row].masked_fill(~inside, torch.nan) for t in (cos, sin))  # (B, n, R / 2)
    return rotate(x, c, s, interleaved)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, n, H, D) rotated by angles (B, n, R / 2) or (n, R / 2)."""
    dtype = compute_dtype(x)
    rotary = 2 * cos.shape[-1]
    c, s = (t.to(dtype).unsqueeze(-2) for t in (cos, sin))
    rotated = x[..., :rotary].to(dtype)
    if interleaved:
        a, b = rotated.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)
    else:
        a, b = rotated.chunk(2, -1)
        rotated = torch.cat([a * c - b * s, b * c + a * s], -1)
    rotated = rotated.to(x.dtype)
    return rotated if rotary == x.shape[-1] else torch.cat([rotated, x[..., rotary:]], -1)


def _row_counts(
    lengths: Tensor, left_pad: Tensor | None, prefix_k: Tensor | None,
    prefix_length: Tensor | None, prefix_id: Tensor | None, capacity: int, new: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Length, padding, length of the prefix, int64 (B,), and whether a row's tokens fit."""
    length = lengths.long()
    fits = (length >= 0) & (length + new <= capacity)
    pad = torch.zeros_like(length) if left_pad is None else left_pad.long()
    if prefix_k is None:
        return length, pad, torch.zeros_like(length), fits
    assert prefix_length is not None and prefix_id is not None
    prefixes, prefix_capacity = prefix_k.shape[:2]
    before = prefix_length.long()[prefix_id.long().clamp(0, prefixes - 1)]
    fits &= (prefix_id >= 0) & (prefix_id < prefixes) & (before >= 0) & (before <= prefix_capacity)
    return length, pad, before, fits
