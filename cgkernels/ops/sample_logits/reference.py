"""The definition of `sample_logits` in plain PyTorch, by sorting; its gradient; and the writing."""

import torch
from torch import Tensor

from cgkernels import random


def sample_logits_ref(
    logits: Tensor, uncond: Tensor | None, scale: Tensor | None, temperature: Tensor,
    top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None, top_p_rule: str,
    seed: Tensor, index: Tensor, position: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """token and log_prob, both (B,)."""
    logit, d, _, greedy, valid = guided_logits_ref(
        logits, uncond, scale, temperature, top_k, top_p, min_p
    )
    valid = valid & (position >= 0) & (position < 2**24)
    kept = _kept_ref(logit, d, top_k, top_p, min_p, top_p_rule)
    e = random.exponential(
        tuple(logit.shape), seed=seed, index=index, step=position.clamp(0, 2**24 - 1),
        stream=random.STREAM_TOKENS, dtype=d.dtype,
    )  # fmt: skip
    score = torch.where(kept, random.exp_of(d.detach()) / e, -1)
    token = torch.where(greedy, logit.argmax(-1), score.argmax(-1))
    log_prob = d.masked_fill(~kept, -torch.inf).log_softmax(-1)
    log_prob = log_prob.gather(-1, token[:, None])[:, 0].masked_fill(greedy, 0)
    return torch.where(valid, token, -1), torch.where(valid, log_prob, torch.nan)


def sample_logits_bwd_ref(
    dlog_prob: Tensor, token: Tensor, logits: Tensor, uncond: Tensor | None,
    scale: Tensor | None, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None,
    min_p: Tensor | None, top_p_rule: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gradients with respect to logits and uncond."""
    logit, d, inverse, greedy, valid = guided_logits_ref(
        logits, uncond, scale, temperature, top_k, top_p, min_p
    )
    kept = _kept_ref(logit, d, top_k, top_p, min_p, top_p_rule)
    drawn = torch.arange(d.shape[1], device=d.device) == token[:, None]
    factor = (dlog_prob * inverse).masked_fill(greedy, 0)
    factor = torch.where(valid & (token >= 0), factor, torch.nan)[:, None]
    dlogit = factor * (drawn.to(d.dtype) - d.masked_fill(~kept, -torch.inf).softmax(-1))
    if uncond is None or scale is None:
        return dlogit.to(logits.dtype), None
    scale = scale[:, None]
    return (scale * dlogit).to(logits.dtype), ((1 - scale) * dlogit).to(uncond.dtype)


def guided_logits_ref(
    logits: Tensor, uncond: Tensor | None, scale: Tensor | None, temperature: Tensor,
    top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Guided logits l and d (B, V); 1 / T, whether T is 0, whether there is a distribution (B,)."""
    logit = logits.to(temperature.dtype)
    if uncond is not None and scale is not None:
        base = uncond.to(temperature.dtype)
        excluded = (logit == -torch.inf) & (base == -torch.inf)  # by both: not a number, else
        logit = base + scale[:, None] * (logit - base).masked_fill(excluded, 0)
    largest = logit.detach().amax(-1)
    greedy = temperature == 0
    valid = largest.isfinite() & (temperature >= 0) & (temperature < torch.inf)
    if top_k is not None:
        valid = valid & (top_k >= 1)
    for share in (top_p, min_p):
        if share is not None:
            valid = valid & (share >= 0) & (share <= 1)
    inverse = torch.ones_like(temperature) / temperature.masked_fill(greedy, 1)
    inverse = inverse.clamp(max=torch.finfo(inverse.dtype).max)  # 0 * inf is not a number
    return logit, (logit - largest[:, None]) * inverse[:, None], inverse, greedy, valid


def _kept_ref(
    logit: Tensor, d: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None,
    top_p_rule: str,
) -> Tensor:  # fmt: skip
    """Mask (B, V) of the tokens that may be drawn: here by sorting."""
    logit = logit.detach()
    share = random.exp_of(d.detach())
    kept = logit > -torch.inf
    if top_k is not None or top_p is not None:
        ordered, order = torch.sort(logit, dim=-1, descending=True, stable=True)
        rank = torch.arange(logit.shape[1], device=logit.device)
        count = kept.sum(-1, keepdim=True)  # (B, 1)
        if top_k is not None:
            count = torch.minimum(count, top_k[:, None])
        inside = rank < count  # (B, V), in the order of falling logits
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


def write_ref(
    tokens: Tensor, log_probs: Tensor, counts: Tensor, token: Tensor, log_prob: Tensor
) -> None:
    """Write the draws at their positions, where those exist, and count on."""
    at = counts[:, 0]
    inside = (at >= 0) & (at < tokens.shape[1])
    at = at.clamp(0, max(0, tokens.shape[1] - 1))[:, None]
    for written, drawn in ((tokens, token), (log_probs, log_prob)):
        if written.numel():
            kept = torch.where(inside, drawn, written.gather(1, at)[:, 0])
            written.scatter_(1, at, kept[:, None])
    counts.add_(1)
