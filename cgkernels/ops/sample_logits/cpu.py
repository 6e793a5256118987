"""`sample_logits` on a CPU: the definition, without the noise where no row needs it."""

from typing import Any

import torch
from torch import Tensor

from cgkernels.ops.sample_logits.reference import (
    guided_logits_ref,
    sample_logits_bwd_ref,
    sample_logits_ref,
    write_ref,
)


def _cpu_fwd(
    logits: Tensor, uncond: Tensor | None, scale: Tensor | None, temperature: Tensor,
    top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None, *others: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if temperature.any():
        return sample_logits_ref(logits, uncond, scale, temperature, top_k, top_p, min_p, *others)
    # All rows are greedy: no noise, whose words are most of the work.
    logit, *_, valid = guided_logits_ref(logits, uncond, scale, temperature, top_k, top_p, min_p)
    token, position = logit.argmax(-1), others[-1]
    valid = valid & (position >= 0) & (position < 2**24)
    return torch.where(valid, token, -1), torch.where(valid, temperature, torch.nan)


def _cpu_inplace(tokens: Tensor, log_probs: Tensor, counts: Tensor, *args: Any) -> None:
    """In fewer steps where all rows stand at one position."""
    position = counts[:, 0]
    drawn, at = _cpu_fwd(*args, position), position.tolist()
    if not at or at.count(at[0]) < len(at) or not 0 <= at[0] < tokens.shape[1]:
        write_ref(tokens, log_probs, counts, *drawn)
        return
    for written, value in zip((tokens, log_probs), drawn, strict=True):
        written.select(1, at[0]).copy_(value)
    counts.add_(1)


def _cpu_bwd(
    dlog_prob: Tensor, token: Tensor, logits: Tensor, uncond: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    dlogits, duncond = sample_logits_bwd_ref(dlog_prob, token, logits, uncond, *options)
    return dlogits.contiguous(), logits.new_empty(0) if duncond is None else duncond.contiguous()
