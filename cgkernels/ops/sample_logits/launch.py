"""What launches the kernels of `sample_logits`: how a row is walked, and the arguments."""

from typing import Any

import torch
from torch import Tensor

from cgkernels._triton import triton
from cgkernels.ops.sample_logits.kernel import _bwd_kernel, _fwd_kernel


def _launch_config(vocabulary: int) -> dict[str, Any]:
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
    logits: Tensor, uncond: Tensor | None, scale: Tensor | None, temperature: Tensor,
    top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None, top_p_rule: str,
    seed: Tensor, index: Tensor, position: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    token, log_prob = empty_outputs(logits, uncond, scale, temperature)
    _launch_draw(
        (_by_row(token), _by_row(log_prob), None), (0, 1), logits, uncond, scale, temperature,
        top_k, top_p, min_p, top_p_rule, seed, index, position,
    )  # fmt: skip
    return token, log_prob


def _launch_inplace(
    tokens: Tensor, log_probs: Tensor, counts: Tensor,
    logits: Tensor, uncond: Tensor | None, scale: Tensor | None, temperature: Tensor,
    top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None, top_p_rule: str,
    seed: Tensor, index: Tensor,
) -> None:  # fmt: skip
    written = tuple((t, *t.stride()) for t in (tokens, log_probs, counts))
    _launch_draw(
        written, (tokens.shape[1], counts.shape[1]), logits, uncond, scale, temperature, top_k,
        top_p, min_p, top_p_rule, seed, index, counts[:, 0],
    )  # fmt: skip


def _launch_draw(
    written: tuple[Any, ...], sizes: tuple[int, int],
    logits: Tensor, uncond: Tensor | None, scale: Tensor | None, temperature: Tensor,
    top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None, top_p_rule: str,
    seed: Tensor, index: Tensor, position: Tensor,
) -> None:  # fmt: skip
    """written: tokens, log_probs, counts with their strides; sizes: columns and counts of a row."""
    rows, vocabulary = logits.shape
    if rows:
        _fwd_kernel[(rows,)](
            *written, _rows(logits), _rows(uncond),
            *map(_by_row, (scale, temperature, top_k, top_p, min_p)), seed, index.contiguous(),
            _by_row(position), vocabulary, *sizes, COUNTERS=triton.next_power_of_2(sizes[1]),
            HF=top_p_rule == "hf", SHIFT=_zero_bits(logits, uncond), enable_fp_fusion=False,
            **_launch_config(vocabulary),
        )  # fmt: skip


def _launch_bwd(
    dlog_prob: Tensor, token: Tensor,
    logits: Tensor, uncond: Tensor | None, scale: Tensor | None, temperature: Tensor,
    top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None, top_p_rule: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dlogits, duncond = empty_gradients(dlog_prob, token, logits, uncond)
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


def _by_row(values: Tensor | None) -> tuple[Tensor, int] | None:
    """A tensor and the stride of its rows."""
    return None if values is None else (values, values.stride(0))


def _rows(logits: Tensor | None) -> tuple[Tensor, int] | None:
    """As `_by_row`, of a tensor (B, V) with its ids side by side."""
    if logits is not None and logits.stride(1) != 1:
        logits = logits.contiguous()
    return _by_row(logits)


def _zero_bits(logits: Tensor, uncond: Tensor | None) -> int:
    """How many low bits are zero in the float32 of every logit: the search may skip them."""
    return {torch.bfloat16: 16, torch.float16: 13}.get(logits.dtype, 0) if uncond is None else 0


def empty_outputs(
    logits: Tensor, uncond: Tensor | None, scale: Tensor | None, temperature: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    """token and log_prob, not yet written."""
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.int64), temperature.new_empty(rows)


def empty_gradients(
    dlog_prob: Tensor, token: Tensor, logits: Tensor, uncond: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and uncond, not yet written; of no uncond an empty one."""
    dlogits = logits.new_empty(logits.shape)
    return dlogits, logits.new_empty(0) if uncond is None else uncond.new_empty(uncond.shape)
