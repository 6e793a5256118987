"""Decoding: tokens drawn one after another, keys and values of earlier ones kept.

What rows have in common at their start is a prefix, whose keys and values are stored once for all
of them. A token step is, for each layer, one launch of attention and four of linear layers with
what stands around them, and three more: the embedding, the output layer, the draw. It waits for
nothing on the host.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import cgkernels
from cgkernels.checks import as_seed, readable
from cgm.model import number_samples, solver_options
from cgm.networks.transformer import Rope, Transformer, fused_linear
from cgm.sampling.cuda_graph import capture

# Token steps in one CUDA graph: what the host does for a replay is shared by so many.
_STEPS_PER_GRAPH = 8


@dataclass(frozen=True)
class SamplingConfig:
    """How each token is drawn."""

    # Guidance scale s of u + s (c - u) on logits; 1 is the plain conditional model, half the work.
    guidance: float = 1.0
    # Divides the logits; 0 takes the most likely value.
    temperature: float = 1.0
    # Keep this many of the most likely values; 0: all.
    top_k: int = 0
    # Keep the most likely values up to this mass.
    top_p: float = 1.0
    # Keep values at least this share as likely as the most likely.
    min_p: float = 0.0
    # Round the weights to 8 bits, with a scale for each output: less to read, a little worse.
    int8: bool = False
    # On a GPU, replay captured steps instead of launching every kernel.
    graph: bool = True


class Decoder:
    """One run: tensors that stay where they are, so that steps can be CUDA graphs.

    Args:
        prefix: (P, M) tokens, M >= 1.
        order: (R,) the prefix of each row. With guidance R is twice the number of samples, the
            unconditional rows first.
        length: tokens to draw for each sample.
        index: (samples,) the number of each sample.
        rope: tables of all positions, prefix included, or None.
        first: position of the first token that is drawn, by which the noise is numbered; so many
            tokens at least are in the prefix.
        offsets: (first + length,), added to the value drawn at a position for the token that it is
            there; None: a value is its token.
    """

    def __init__(
        self,
        network: Transformer,
        prefix: Tensor,
        order: Tensor,
        length: int,
        options: SamplingConfig,
        *,
        seed: int | Tensor,
        index: Tensor,
        rope: Rope | None,
        first: int = 0,
        offsets: Tensor | None = None,
    ) -> None:
        device = index.device
        network = network.int8() if options.int8 else network
        self.order, self.rope = order, rope
        self.offsets = None if offsets is None else offsets[first:]
        self.first, self.length = first, length
        self.graph = options.graph and index.is_cuda
        self.index, self.seed = index, as_seed(seed, device)[0]
        self.copies = len(order) // len(index)

        # Each prefix alone: what the others are must not change its bits.
        head = None if rope is None else (rope[0][: prefix.shape[1]], rope[1][: prefix.shape[1]])
        parts = [network.prefill(one[None], head) for one in prefix]
        self.prefix_keys, self.prefix_values = (
            torch.cat([part[i] for part in parts], 1) for i in (1, 2)
        )
        last = torch.cat([part[0][:, -1] for part in parts])
        self.network = network = network.pack() if device.type == "cpu" else network
        self.first_logits = fused_linear(last, network.head, network.norm)[order]
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
            self.first_logits[: self.copies], seed=0, top_k=options.top_k or None, **self.drawing
        )
        for name, value in self.drawing.items():
            if value is not None:
                self.drawing[name] = torch.full((), float(value), dtype=wide, device=device)
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
        self.prefix_length = torch.full(
            (len(prefix),), prefix.shape[1], dtype=torch.int32, device=device
        )
        self._reset()

    def run(self) -> Tensor:
        """The tokens drawn, (samples, length)."""
        steps = self.length - 1
        if self.graph and steps >= _STEPS_PER_GRAPH:
            replay = capture(self._step, self.index.device, _STEPS_PER_GRAPH)
            self._reset()
            for _ in range(steps // _STEPS_PER_GRAPH):
                replay()
            steps %= _STEPS_PER_GRAPH
        for _ in range(steps):
            self._step()
        return self.tokens[:, self.first :]

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


@torch.no_grad()
def generate(
    network: Transformer,
    prompt: Tensor,
    length: int,
    *,
    n: int | None = None,
    seed: int | Tensor = 0,
    index: Tensor | None = None,
    **solver: Any,
) -> Tensor:
    """Tokens that continue prompts; those of one prompt share its keys and values.

    Args:
        network: whose output is a token, for instance of `from_transformers`.
        prompt: (B, M) int64, M >= 1.
        length: tokens to draw after each; none of them ends it.
        n: draws for each prompt; None: one, without the leading dimension.
        seed: 64-bit int or one-element int64 tensor.
        index: (B,) int64, the number of each prompt; default 0 .. B - 1.
        solver: fields of `SamplingConfig`, but guidance. `temperature=0` is greedy.

    Returns:
        (B, length) or (n, B, length) int64, without the prompt. A row depends on (seed, number of
        the prompt, draw) and on nothing else.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    options, c = solver_options(SamplingConfig, solver), network.config
    if options.guidance != 1:
        raise ValueError(f"guidance must be 1 for prompts alone, got {options.guidance}")
    if c.outputs not in (0, c.vocabulary):
        raise ValueError(f"network must put out its {c.vocabulary} tokens, got {c.outputs}")
    if prompt.dim() != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt must have shape (B, M > 0), got {tuple(prompt.shape)}")
    if prompt.dtype != torch.int64:
        raise TypeError(f"prompt must be int64, got {prompt.dtype}")
    if readable(prompt) and prompt.numel() and not 0 <= prompt.min() <= prompt.max() < c.vocabulary:
        raise ValueError(
            f"prompt must be in [0, {c.vocabulary}), got {prompt.min()} to {prompt.max()}"
        )
    most = c.length - prompt.shape[1]
    if not 0 < length <= most:
        raise ValueError(f"length must be from 1 to {most} after this prompt, got {length}")
    shape, index = number_samples(n, len(prompt), index, prompt.device)
    if index.numel() == 0:
        return torch.empty((*shape, length), dtype=torch.int64, device=prompt.device)
    rope = None
    if c.positions == "rotary":
        positions = torch.arange(prompt.shape[1] + length - 1, device=prompt.device)
        rope = network.rope_table(positions)
    order = torch.arange(len(index), device=prompt.device) % len(prompt)
    run = Decoder(network, prompt, order, length, options, seed=seed, index=index, rope=rope)
    return run.run().view(*shape, length)
