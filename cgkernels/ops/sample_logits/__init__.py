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
from typing import Any

import torch
from torch import Tensor

from cgkernels.checks import (
    as_index,
    as_row_values,
    as_seed,
    as_step,
    check_choice,
    check_float,
    check_int64,
    check_integers,
    check_no_grad,
    check_same_device,
    check_shape,
    check_writable,
    readable,
)
from cgkernels.library import (
    define_op,
    needs_function,
    refuse_forward_mode,
    using_reference,
)
from cgkernels.ops.sample_logits.cpu import _cpu_bwd, _cpu_fwd, _cpu_inplace
from cgkernels.ops.sample_logits.launch import (
    _launch_bwd,
    _launch_fwd,
    _launch_inplace,
    empty_gradients,
    empty_outputs,
)
from cgkernels.ops.sample_logits.reference import (
    sample_logits_bwd_ref,
    sample_logits_ref,
    write_ref,
)

TOP_P_RULES = ("mass_before", "hf")

_LARGEST_VOCABULARY = 2**22  # sums of masses then are exact in float64, too


# Registration -------------------------------------------------------------------------------------
_fwd = define_op(
    "sample_logits_fwd",
    "(Tensor logits, Tensor? uncond, Tensor? scale, Tensor temperature, Tensor? top_k, "
    "Tensor? top_p, Tensor? min_p, str top_p_rule, Tensor seed, Tensor index, Tensor position) "
    "-> (Tensor, Tensor)",
    cuda=_launch_fwd,
    cpu=_cpu_fwd,
    fake=empty_outputs,
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
    fake=empty_gradients,
)


# Public functions ---------------------------------------------------------------------------------
class _SampleLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, uncond: Tensor | None, scale: Tensor | None, temperature: Tensor,
        top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None, top_p_rule: str,
        *noise: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        options = (scale, temperature, top_k, top_p, min_p)
        token, log_prob = _fwd(logits, uncond, *options, top_p_rule, *noise)
        ctx.save_for_backward(token, logits, uncond, *options)
        ctx.top_p_rule = top_p_rule
        ctx.mark_non_differentiable(token)
        return token, log_prob

    @staticmethod
    def backward(ctx: Any, dtoken: Tensor, dlog_prob: Tensor) -> tuple[Tensor | None, ...]:
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
    position: int | Tensor,
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
            the highest ids are kept instead. So does transformers where its sort leaves equal
            logits in the order of their ids, which it does not promise; now and then it does not.
        seed: 64-bit int or one-element int64 tensor.
        index: (B,) int64, the number of each sample; default 0 .. B - 1.
        position: place of the token in its sequence, int or integer tensor () or (B,), in
            [0, 2^24). It must change from token to token: what is drawn at one is the same always.

    A tensor on the device costs no launch beside the one, and a CUDA graph can change it; a number
    costs one to be written there.

    Returns:
        token (B,) int64, and log_prob (B,) float32 (float64 for float64 logits), differentiable in
        logits and uncond with the token and the kept set held fixed.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.

    Example:
        >>> logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
        >>> token, log_prob = sample_logits(logits.expand(1000, 4), top_p=0.6, seed=0, position=0)
        >>> token.unique(), (log_prob.exp()[token == 0][0] * 7).round()
        (tensor([0, 1]), tensor(5.))
    """
    args, like = _check_arguments(
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

    None of the tensors that are written may share memory with another argument.

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
    args, like = _check_arguments(
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
    check_no_grad("it is written: what stood there has no gradient", log_probs=log_probs)
    check_same_device(logits=like, tokens=tokens, log_probs=log_probs, counts=counts)
    check_writable(
        {"tokens": tokens, "log_probs": log_probs, "counts": counts},
        {
            "logits": logits, "uncond": uncond, "scale": scale, "temperature": temperature,
            "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed, "index": index,
        },
    )  # fmt: skip
    most = min(tokens.shape[1], 2**24) - 1
    check_integers("counts", counts[:, 0], (rows,), counts.device, 0, most)
    if using_reference():
        drawn = sample_logits_ref(*(*args, counts[:, 0]))
        write_ref(tokens, log_probs, counts, *drawn)
    else:
        refuse_forward_mode()
        _inplace(tokens, log_probs, counts, *args)
    return tokens


def _check_arguments(
    logits: Tensor,
    uncond: Tensor | None,
    scale: float | Tensor | None,
    temperature: float | Tensor,
    top_k: int | Tensor | None,
    top_p: float | Tensor | None,
    min_p: float | Tensor | None,
    top_p_rule: str,
    seed: int | Tensor,
    index: Tensor | None,
) -> tuple[tuple[Any, ...], Tensor]:
    """The arguments of the op but the position, and a tensor of their device and widest dtype."""
    check_choice("top_p_rule", top_p_rule, TOP_P_RULES)
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


def _as_range(name: str, value: float | Tensor, rows: int, like: Tensor, most: float) -> Tensor:
    """As `as_row_values`, for values from 0 to most."""
    made = as_row_values(name, value, rows, like)
    if isinstance(value, Tensor):
        outside = readable(value) and bool(((value < 0) | (value > most)).any())
    else:
        outside = not 0 <= value <= most
    if outside:
        end = "]" if most < torch.inf else ")"
        got = value.tolist() if isinstance(value, Tensor) else value
        raise ValueError(f"{name} must be in [0, {most}{end}, got {got}")
    return made
