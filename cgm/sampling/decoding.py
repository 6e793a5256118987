"""Decoding: tokens drawn one after another, keys and values of earlier ones kept.

What rows have in common at their start is a prefix, whose keys and values are stored once for all
of them. A token step is, for each layer, one launch of attention and four of linear layers with
what stands around them, and three more: the embedding, the output layer, the draw. It waits for
nothing on the host.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cgkernels
from cgkernels.checks import as_seed, check_shape, readable
from cgm.model import Config, Interval, Natural, NotNegative, number_samples, solver_options
from cgm.networks.fused_linear import called_linear, fused_linear
from cgm.networks.transformer import Rope, Transformer
from cgm.sampling.cuda_graph import capture

# Token steps in one CUDA graph: what the host does for a replay is shared by so many.
_STEPS_PER_GRAPH = 8


@dataclass(frozen=True)
class SamplingConfig(Config):
    """How each token is drawn."""

    # Guidance scale s of u + s (c - u) on logits; 1 is the plain conditional model, half the work.
    guidance: float = 1.0
    # Divides the logits; 0 takes the most likely value.
    temperature: NotNegative = 1.0
    # Keep this many of the most likely values; 0: all.
    top_k: Natural = 0
    # Keep the most likely values up to this mass.
    top_p: Annotated[float, Interval(0, 1)] = 1.0
    # Keep values at least this share as likely as the most likely.
    min_p: Annotated[float, Interval(0, 1)] = 0.0
    # Round the weights to 8 bits, with a scale for each output: less to read, a little worse.
    int8: bool = False
    # On a GPU, replay captured steps instead of launching every kernel.
    graph: bool = True


class Decoder:
    """One run: tensors that stay where they are, so that steps can be CUDA graphs.

    Autocast is off in it: a token step has launches that know nothing of it, and a sample depends
    on (seed, index) alone. Modules that are more than their tensors, by a hook or an adapter, are
    called in every step, which takes more launches.

    Args:
        prefix: (P, M) tokens, M >= 1; or P tensors (M_p,), of different lengths.
        order: (R,) the prefix of each row. With guidance R is twice the number of samples, the
            unconditional rows first.
        length: tokens to draw for each sample.
        index: (samples,) the number of each sample.
        guidance: (samples,) instead of that of the options.
        rope: tables of all positions, prefix included, or None.
        first: position of the first token that is drawn, by which the noise is numbered; so many
            tokens at least are in the prefix.
        offsets: (first + length,), added to the value drawn at a position for the token that it is
            there; None: a value is its token.
    """

    def __init__(
        self,
        network: Transformer,
        prefix: Tensor | Sequence[Tensor],
        order: Tensor,
        length: int,
        options: SamplingConfig,
        *,
        seed: int | Tensor,
        index: Tensor,
        guidance: Tensor | None = None,
        rope: Rope | None,
        first: int = 0,
        offsets: Tensor | None = None,
    ) -> None:
        device = index.device
        self.called = not network.reads_tensors()
        network = network.int8() if options.int8 else network
        self.order, self.rope = order, rope
        self.offsets = None if offsets is None else offsets[first:]
        self.first, self.length = first, length
        self.graph = options.graph and index.is_cuda
        self.index, self.seed = index, as_seed(seed, device)[0]
        self.copies = len(order) // len(index)

        # Each prefix alone: what the others are must not change its bits.
        sizes = [len(one) for one in prefix]
        with _without_autocast(device):
            parts = [
                network.prefill(
                    one[None], None if rope is None else (rope[0][:size], rope[1][:size])
                )
                for one, size in zip(prefix, sizes, strict=True)
            ]
            last = torch.cat([part[0][:, -1] for part in parts])
            if device.type == "cpu" and not self.called:
                network = network.pack()
            linear = called_linear if self.called else fused_linear
            self.first_logits = linear(last, network.head, network.norm)[order]
        self.network = network
        self.prefix_keys, self.prefix_values = (
            torch.cat([_lengthened(part[i], max(sizes)) for part in parts], 1) for i in (1, 2)
        )
        self.starts = None
        self.prefix_length = torch.full((len(sizes),), sizes[0], dtype=torch.int32, device=device)
        if len(set(sizes)) > 1:
            self.prefix_length = torch.tensor(sizes, dtype=torch.int32, device=device)
            self.starts = self.prefix_length[order]
        dtype = self.first_logits.dtype
        wide = torch.promote_types(dtype, torch.float32)  # what a draw takes without a cast
        self.drawing: dict[str, Any] = {
            "scale": options.guidance if self.copies > 1 else None,
            "temperature": options.temperature,
            "top_p": options.top_p if options.top_p != 1 else None,
            "min_p": options.min_p or None,
        }
        # Checked here as numbers, by name; as tensors they cost a step no launch.
        cgkernels.sample_logits(
            self.first_logits[: self.copies],
            seed=0,
            position=0,
            top_k=options.top_k or None,
            **self.drawing,
        )
        for name, value in self.drawing.items():
            if value is not None:
                self.drawing[name] = torch.full((), float(value), dtype=wide, device=device)
        if guidance is not None:
            self.drawing["scale"] = guidance.to(wide)
        if options.top_k:
            self.drawing["top_k"] = torch.full((), options.top_k, device=device)

        c = network.config
        shape = (c.layers, len(order), max(1, length - 1), c.key_heads, c.head_size)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        # Of each sample: its position, then for each of its rows the slot of the last token. As a
        # draw counts them on together, the slots are one behind, and begin at -1.
        self.counts = torch.empty(1 + self.copies, len(index), dtype=torch.int64, device=device)
        self.lengths = self.counts[1:].flatten()
        # By position. Tokens are written as the values that they are before offsets are added.
        written = (len(index), first + length)
        self.tokens = torch.zeros(written, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(written, dtype=wide, device=device)
        self.counters = None if device.type == "cpu" else network.step_counters(len(order))
        self._reset()

    def run(self, stops: Tensor | None = None) -> Tensor:
        """The tokens drawn, (samples, length).

        stops: tokens of which every row need not go on behind one; on a CPU, where that can be
        looked at without waiting, nothing does once all rows have one.
        """
        with _without_autocast(self.index.device):
            steps = self.length - 1
            if self.graph and steps >= _STEPS_PER_GRAPH:
                replay = capture(self._step, self.index.device, _STEPS_PER_GRAPH)
                self._reset()
                for _ in range(steps // _STEPS_PER_GRAPH):
                    replay()
                steps %= _STEPS_PER_GRAPH
            drawn = self.tokens[:, self.first :]
            for step in range(1, steps + 1):
                if stops is not None and readable(drawn) and _all_stopped(drawn[:, :step], stops):
                    break
                self._step()
        return drawn

    def _reset(self) -> None:
        """The first tokens drawn, and nothing in the caches."""
        self.counts[0] = self.first
        self.lengths.fill_(-1)
        self._draw(self.first_logits)

    def _step(self) -> None:
        """Makes the logits of the next token of each row, and draws it."""
        logits = self.network.step(
            self.tokens[:, self.first :],
            self.offsets,
            self.keys,
            self.values,
            self.lengths,
            self.prefix_keys,
            self.prefix_values,
            starts=self.starts,
            called=self.called,
            prefix_length=self.prefix_length,
            prefix_id=self.order,
            rope=self.rope,
            counters=self.counters,
        )
        self._draw(logits)

    def _draw(self, logits: Tensor) -> None:
        """Writes the next token of each sample, and counts on."""
        self.logits = logits
        cgkernels.sample_logits_(
            self.tokens, self.log_probs, self.counts.t(), logits,
            seed=self.seed, index=self.index, **self.drawing,
        )  # fmt: skip


def _lengthened(cache: Tensor, length: int) -> Tensor:
    """cache (layers, 1, M, H_kv, D) with so many tokens, those that are new zero."""
    more = length - cache.shape[2]
    return F.pad(cache, (0, 0, 0, 0, 0, more)) if more else cache


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _all_stopped(drawn: Tensor, stops: Tensor) -> bool:
    return bool(torch.isin(drawn, stops).any(1).all())


@torch.no_grad()
def generate(
    network: Transformer,
    prompt: Tensor,
    length: int,
    *,
    n: int | None = None,
    seed: int | Tensor = 0,
    index: Tensor | None = None,
    attention_mask: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    **solver: Any,
) -> Tensor:
    """Tokens that continue prompts; those of one prompt share its keys and values.

    Args:
        network: whose output is a token, for instance of `from_transformers`.
        prompt: (B, M) int64, M >= 1.
        length: tokens to draw after each.
        n: draws for each prompt; None: one, without the leading dimension.
        seed: 64-bit int or one-element int64 tensor.
        index: (B,) int64, the number of each prompt; default 0 .. B - 1.
        attention_mask: (B, M) integer or bool, for prompts of different lengths that are padded on
            the left, as a tokenizer with `padding_side="left"` makes them: 0 for padding, then 1.
            It is read on the host.
        eos_token_id: a token, or several, after which a row is padded; None: there is none.
        pad_token_id: what it is padded with; None: the first of eos_token_id.
        solver: fields of `SamplingConfig`, but guidance. `temperature=0` is greedy.

    Returns:
        (B, length) or (n, B, length) int64, without the prompt. A row depends on (seed, number of
        the prompt, draw) and on nothing else, not on autocast either. It is -1 from where the
        network puts out NaN.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    if not isinstance(network, Transformer):
        raise TypeError(f"network must be a Transformer, got {type(network).__name__}")
    options, c = solver_options(SamplingConfig, solver, "generate"), network.config
    if options.guidance != 1:
        raise ValueError(f"guidance must be 1 for prompts alone, got {options.guidance}")
    if c.outputs not in (0, c.vocabulary):
        raise ValueError(f"network must put out its {c.vocabulary} tokens, got {c.outputs}")
    prompts = _check_prompts(network, prompt, attention_mask)
    stops, pad = _check_stops(eos_token_id, pad_token_id, c.vocabulary, prompt.device)
    longest = max((len(one) for one in prompts), default=1)
    if isinstance(length, bool) or not isinstance(length, int):
        raise TypeError(f"length must be an int, got {length!r}")
    if longest >= c.length:
        raise ValueError(f"prompt must have less than {c.length} tokens, got {longest}")
    if not 0 < length <= c.length - longest:
        raise ValueError(
            f"length must be from 1 to {c.length - longest} after this prompt, got {length}"
        )
    shape, index = number_samples(n, len(prompt), index, prompt.device)
    if index.numel() == 0:
        return torch.empty((*shape, length), dtype=torch.int64, device=prompt.device)
    rope = None
    if c.positions == "rotary":
        positions = torch.arange(longest + length - 1, device=prompt.device)
        rope = network.rope_table(positions, (positions + 1).clamp_min(longest))
    order = torch.arange(len(index), device=prompt.device) % len(prompt)
    run = Decoder(network, prompts, order, length, options, seed=seed, index=index, rope=rope)
    tokens = run.run(stops)
    if stops is not None:
        ends = torch.isin(tokens, stops).long()
        tokens = tokens.masked_fill(ends.cumsum(1) > ends, pad)
    return tokens.view(*shape, length)


def _check_prompts(
    network: Transformer, prompt: Tensor, attention_mask: Tensor | None
) -> Tensor | list[Tensor]:
    """The prompts without their padding."""
    c = network.config
    if not isinstance(prompt, Tensor):
        raise TypeError(f"prompt must be an int64 tensor, got {type(prompt).__name__}")
    if prompt.layout != torch.strided:
        raise TypeError(f"prompt must be a dense tensor, got {prompt.layout}")
    if prompt.dim() != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt must have shape (B, M > 0), got {tuple(prompt.shape)}")
    if prompt.dtype != torch.int64:
        raise TypeError(f"prompt must be int64, got {prompt.dtype}")
    device = next(network.parameters()).device
    if prompt.device != device:
        raise ValueError(f"prompt must be on {device} as the network is, got {prompt.device}")
    if readable(prompt) and prompt.numel() and not 0 <= prompt.min() <= prompt.max() < c.vocabulary:
        raise ValueError(
            f"prompt must be in [0, {c.vocabulary}), got {prompt.min()} to {prompt.max()}"
        )
    if attention_mask is None:
        return prompt
    if not isinstance(attention_mask, Tensor) or attention_mask.is_floating_point():
        got = getattr(attention_mask, "dtype", type(attention_mask).__name__)
        raise TypeError(f"attention_mask must be an integer or bool tensor, got {got}")
    check_shape("attention_mask", attention_mask, tuple(prompt.shape))
    mask = attention_mask.cpu()
    sizes = mask.long().sum(1).tolist()
    expected = torch.arange(prompt.shape[1]) >= prompt.shape[1] - mask.long().sum(1)[:, None]
    if not torch.equal(mask.long(), expected.long()) or 0 in sizes:
        raise ValueError(
            "attention_mask must have 0 for padding on the left, then 1 for at least one token, in "
            f"every row; got {mask.long().tolist()}"
        )
    if c.rope_dynamic and len(set(sizes)) > 1:
        raise ValueError("attention_mask must be None for dynamic rope: lengths of rows differ")
    return [row[len(row) - size :] for row, size in zip(prompt, sizes, strict=True)]


def _check_stops(
    eos: int | Sequence[int] | None, pad: int | None, vocabulary: int, device: torch.device
) -> tuple[Tensor | None, int]:
    """The tokens that end a row, or None, and what follows them."""
    stops: list[int] = []
    if eos is not None:
        stops = list(eos) if isinstance(eos, Sequence) else [eos]
    for name, tokens in (("eos_token_id", stops), ("pad_token_id", [] if pad is None else [pad])):
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int):
                raise TypeError(f"{name} must be made of ints, got {token!r}")
            if not 0 <= token < vocabulary:
                raise ValueError(f"{name} must be in [0, {vocabulary}), got {token}")
    if not stops:
        return None, 0
    return torch.tensor(stops, device=device), stops[0] if pad is None else pad
