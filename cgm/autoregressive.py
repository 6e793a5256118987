"""Conditional autoregressive model: p(y | cond) = product of p(y_i | y_<i, cond), by a transformer.

A picture is the sequence of its quantised values: pixels in raster order, the channels of a pixel
one after another. The condition is a prefix of that sequence: a class, tokens, the quantised values
of a picture, or a start symbol alone; the code is the same for all.

Source   PixelRNN arXiv:1601.06759; Image Transformer arXiv:1802.05751; image GPT (Chen et al.,
         2020); classifier-free guidance arXiv:2207.12598.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import cgkernels
from cgkernels.checks import as_seed, check_shape, readable
from cgkernels.random import STREAM_CONDITION_DROPOUT, uniform
from cgm.families import Model, numbered, solver_options
from cgm.graphs import captured
from cgm.networks.transformer import Block, Transformer, TransformerConfig


# Config -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class AutoregressiveConfig:
    """What is generated from what, and the network."""

    # Shape (C, H, W) of what is generated.
    event_shape: tuple[int, int, int] = (1, 28, 28)
    # Kind of condition.
    cond_kind: Literal["none", "class", "image", "tokens"] = "none"
    # Number of classes, or of different tokens.
    num_classes: int = 0
    # Shape of one condition: (C, H, W) of a picture, (M,) of tokens, else ().
    cond_shape: tuple[int, ...] = ()

    # Values that a channel of a pixel can have; 256 loses nothing of an 8-bit picture.
    levels: int = 16
    # Blocks of the transformer.
    layers: int = 4
    # Width of its residual stream.
    width: int = 96
    # Query heads.
    heads: int = 4
    # Key and value heads, a divisor of `heads`; 0: as many as query heads.
    kv_heads: int = 0
    # Width of the MLP.
    hidden: int = 256
    # Normalisation.
    norm: Literal["rms", "layer"] = "rms"
    # Activation of the MLP.
    activation: Literal["swiglu", "gelu"] = "swiglu"
    # How positions enter: rotation by the place in the sequence, by row and column, or a learned
    # vector each.
    positions: Literal["rotary", "rotary_2d", "learned"] = "rotary_2d"
    # Share of training examples whose condition is dropped, so that guidance has its other half.
    cond_dropout: float = 0.1

    def __post_init__(self) -> None:
        if len(self.event_shape) != 3 or min(self.event_shape) < 1:
            raise ValueError(f"event_shape must be (C, H, W), got {self.event_shape}")
        if not 2 <= self.levels <= 256:
            raise ValueError(f"levels must be from 2 to 256, got {self.levels}")
        if self.cond_kind in ("class", "tokens") and self.num_classes < 1:
            raise ValueError(f"num_classes must be positive for {self.cond_kind} conditions")
        if self.cond_kind == "image" and (len(self.cond_shape) != 3 or min(self.cond_shape) < 1):
            raise ValueError(f"cond_shape must be (C, H, W) for pictures, got {self.cond_shape}")
        if self.cond_kind == "tokens" and len(self.cond_shape) != 1:
            raise ValueError(f"cond_shape must be (M,) for tokens, got {self.cond_shape}")
        if not 0 <= self.cond_dropout < 1:
            raise ValueError(f"cond_dropout must be in [0, 1), got {self.cond_dropout}")
        if self.positions == "rotary_2d" and self.width // self.heads % 4:
            raise ValueError(
                "heads must leave a multiple of 4 of width to each for rotary_2d positions, "
                f"got {self.width} / {self.heads}"
            )

    @property
    def prefix_length(self) -> int:
        """Tokens of the condition."""
        return math.prod(self.cond_shape) if self.cond_kind in ("image", "tokens") else 1


@dataclass(frozen=True)
class SamplingConfig:
    """How `ConditionalTransformer.sample` draws each value."""

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
    # On a GPU, replay one captured step instead of launching every kernel.
    graph: bool = True


# Model --------------------------------------------------------------------------------------------
class ConditionalTransformer(Model):
    """Autoregressive model of p(y | cond); `loss`, `log_prob` and `sample` of all families.

    Tokens: value v of channel c of y is c levels + v; then come the values of a condition picture
    (channel by channel alike), the classes or the tokens, and last the symbol "no condition".
    """

    family: ClassVar[str] = "autoregressive"
    sampling_config: ClassVar[type[SamplingConfig]] = SamplingConfig

    def __init__(self, config: AutoregressiveConfig) -> None:
        super().__init__()
        self.config = config
        symbols = {
            "none": 0,
            "class": config.num_classes,
            "tokens": config.num_classes,
            "image": config.levels * (config.cond_shape or (0,))[0],
        }[config.cond_kind]
        self.first_symbol = config.event_shape[0] * config.levels
        self.null = self.first_symbol + symbols
        self.transformer = Transformer(
            TransformerConfig(
                vocabulary=self.null + 1,
                length=config.prefix_length + math.prod(config.event_shape),
                outputs=config.levels,
                layers=config.layers,
                width=config.width,
                heads=config.heads,
                kv_heads=config.kv_heads,
                hidden=config.hidden,
                norm=config.norm,
                activation=config.activation,
                positions="learned" if config.positions == "learned" else "rotary",
            )
        )

    # Likelihood -----------------------------------------------------------------------------------
    def loss(
        self,
        y: Tensor,
        *,
        cond: Tensor | None = None,
        phase: str = "model",
        seed: int | Tensor,
        index: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Cross-entropy of each example, all positions at once (teacher forcing).

        y is (B, C, H, W) in [-1, 1]; which conditions are dropped depends on (seed, index) only.
        Returns {"total": (B,) nats per dimension, "bits": (B,) bits per dimension}.
        """
        if phase not in self.phases:
            raise ValueError(f"phase must be one of {self.phases}, got {phase!r}")
        rows = self._check(y, cond)
        prefix = self._prefix(cond, rows, y.device)
        dropout = self.config.cond_dropout
        if cond is not None and dropout > 0:
            if index is None:
                index = torch.arange(rows, device=y.device)
            u = uniform((rows,), seed=seed, index=index, stream=STREAM_CONDITION_DROPOUT)
            prefix = torch.where((u < dropout)[:, None], self.null, prefix)
        total = -self._log_probs(y, prefix).mean(1)
        return {"total": total, "bits": total / math.log(2)}

    @torch.no_grad()
    def log_prob(self, y: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """Exact log p(y | cond) in nats, (B,), of the picture quantised to `levels`.

        In bits per dimension it is -log_prob / (C H W ln 2).
        """
        rows = self._check(y, cond)
        return self._log_probs(y, self._prefix(cond, rows, y.device)).sum(1)

    def _log_probs(self, y: Tensor, prefix: Tensor) -> Tensor:
        """log p of each value of y (B, C H W), float32."""
        values = quantise(y, self.config.levels)
        inputs = torch.cat([prefix, self._tokens(values)[:, :-1]], 1)
        logits = self.transformer(inputs, self._rope(y.device))[:, prefix.shape[1] - 1 :]
        flat = F.cross_entropy(logits.float().flatten(0, 1), values.flatten(), reduction="none")
        return -flat.view_as(values)

    # Sampling -------------------------------------------------------------------------------------
    @torch.no_grad()
    def sample(
        self,
        n: int | None = None,
        *,
        cond: Tensor | None = None,
        seed: int | Tensor = 0,
        index: Tensor | None = None,
        given: Tensor | None = None,
        **solver: Any,
    ) -> Tensor:
        """Samples of p(y | cond), in [-1, 1].

        Args:
            n: draws for each condition, which share its prefix; None: one, without the leading
                dimension.
            cond: (B,) class ids, (B, C, H, W) pictures or (B, M) tokens; None for a model without
                condition, or for p(y) where training dropped conditions.
            seed: 64-bit int or one-element int64 tensor.
            index: (B,) int64, the number of each condition; default 0 .. B - 1. Without cond (n,),
                the number of each sample.
            given: (B, C, H', W), the upper rows of each picture, which are kept; without cond
                (1, C, H', W).
            solver: fields of `SamplingConfig`.

        Returns:
            (B, C, H, W), or (n, B, C, H, W), or without cond (n, C, H, W). A sample depends on
            (seed, number of its condition, draw) and on nothing else, up to the round-off of the
            network.

        Raises:
            ValueError, TypeError: an argument that does not fit, by name.
        """
        options = solver_options(SamplingConfig, solver)
        config, device = self.config, self.transformer.embedding.weight.device
        rows, shape, index = numbered(n, cond, index, device)
        if cond is None:
            if config.cond_kind != "none" and config.cond_dropout == 0:
                raise ValueError("cond must be given: this model was trained without dropping it")
            if options.guidance != 1:
                raise ValueError(f"guidance must be 1 without cond, got {options.guidance}")
        else:
            self._check_cond(cond, rows)
            if options.guidance != 1 and config.cond_dropout == 0:
                raise ValueError(
                    "guidance must be 1: this model was trained without dropping its condition"
                )
        conditions = 1 if cond is None else rows
        if given is not None:
            channels, height, width = config.event_shape
            if given.dim() != 4 or not 0 < given.shape[2] < height:
                raise ValueError(
                    f"given must have from 1 to {height - 1} rows, got shape {tuple(given.shape)}"
                )
            check_shape("given", given, (conditions, channels, given.shape[2], width))
        if index.numel() == 0:
            return torch.empty((*shape, *config.event_shape), device=device)
        prefix = self._prefix(None if cond is None else cond.to(device), conditions, device)
        run = _Run(self, prefix, given, index, as_seed(seed, device)[0], options)
        values = run.solve()
        return dequantise(values, config.levels, config.event_shape).view(
            *shape, *config.event_shape
        )

    # Tokens ---------------------------------------------------------------------------------------
    def _tokens(self, values: Tensor) -> Tensor:
        """Tokens of values (B, C H W) in the order of the sequence."""
        channels = self.config.event_shape[0]
        channel = torch.arange(values.shape[1], device=values.device) % channels
        return values + channel * self.config.levels

    def _prefix(self, cond: Tensor | None, rows: int, device: torch.device) -> Tensor:
        """Tokens (B, M) of the condition."""
        config = self.config
        if cond is None:
            return torch.full((rows, config.prefix_length), self.null, device=device)
        if config.cond_kind == "image":
            values = quantise(cond, config.levels)
            channel = torch.arange(values.shape[1], device=device) % config.cond_shape[0]
            return self.first_symbol + channel * config.levels + values
        return self.first_symbol + (cond[:, None] if config.cond_kind == "class" else cond)

    def _rope(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Rotary table of the whole sequence of inputs (the last value of y is none)."""
        config = self.config
        if config.positions == "learned":
            return None
        length = config.prefix_length + math.prod(config.event_shape) - 1
        if config.positions == "rotary":
            return self.transformer.rope_table(torch.arange(length, device=device))
        # Rows and columns; a condition picture stands above, other conditions in the corner.
        places = _raster(config.event_shape, device)[:-1]
        before = torch.zeros(config.prefix_length, 2, device=device)
        if config.cond_kind == "image":
            before = _raster(config.cond_shape, device)
            before[:, 0] -= config.cond_shape[1]
        return self.transformer.rope_table(torch.cat([before, places]))

    # Checks ---------------------------------------------------------------------------------------
    def _check(self, y: Tensor, cond: Tensor | None) -> int:
        check_shape("y", y, (y.shape[0], *self.config.event_shape))
        if not y.is_floating_point():
            raise TypeError(f"y must be floating, got {y.dtype}")
        self._check_cond(cond, y.shape[0])
        return y.shape[0]

    def _check_cond(self, cond: Tensor | None, rows: int) -> None:
        config = self.config
        if config.cond_kind == "none":
            if cond is not None:
                raise TypeError("cond must be None: this model has no condition")
            return
        if cond is None:
            if config.cond_dropout == 0:
                raise ValueError(f"cond must be given: {config.cond_kind}")
            return
        check_shape("cond", cond, (rows, *config.cond_shape))
        if config.cond_kind == "image":
            if not cond.is_floating_point():
                raise TypeError(f"cond must be floating, got {cond.dtype}")
            return
        if cond.dtype != torch.int64:
            raise TypeError(f"cond must be int64 ids, got {cond.dtype}")
        highest = config.num_classes - 1
        if readable(cond) and cond.numel() and not 0 <= cond.min() <= cond.max() <= highest:
            raise ValueError(
                f"cond must be in [0, {highest}], got {int(cond.min())} to {int(cond.max())}"
            )


def quantise(y: Tensor, levels: int) -> Tensor:
    """Values 0 .. levels - 1 of pictures (B, C, H, W) in [-1, 1], in the order of the sequence.

    The 256 values of an 8-bit picture are shared out evenly; `dequantise` gives the middle of those
    that became one.
    """
    steps = ((y.movedim(1, 3).flatten(1) + 1) * 127.5).round().long().clamp(0, 255)
    return steps * levels // 256


def dequantise(values: Tensor, levels: int, shape: tuple[int, ...]) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1] of values (B, C H W)."""
    channels, height, width = shape
    steps = (values.float() + 0.5) * (256 / levels) - 0.5
    pictures = (steps / 127.5 - 1).view(-1, height, width, channels)
    return pictures.movedim(3, 1).contiguous()


def _raster(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """(row, column) of each element of the sequence, (H W C, 2) float32."""
    channels, height, width = shape
    rows = torch.arange(height, device=device, dtype=torch.float32)
    columns = torch.arange(width, device=device, dtype=torch.float32)
    return torch.cartesian_prod(rows, columns).repeat_interleave(channels, 0)


class _Run:
    """One run of sampling: tensors that stay where they are, so that a step can be a CUDA graph.

    Keys and values of a condition and of the given pixels are stored once for all of its draws.
    With guidance the first half of the rows is unconditional.
    """

    def __init__(
        self,
        model: ConditionalTransformer,
        prefix: Tensor,
        given: Tensor | None,
        index: Tensor,
        seed: Tensor,
        options: SamplingConfig,
    ) -> None:
        config, device, rows = model.config, index.device, len(index)
        self.model, self.options, self.network = model, options, model.transformer
        self.index, self.seed = index, seed
        self.guided = options.guidance != 1
        conditions = len(prefix)
        if self.guided:  # the unconditional prefixes differ by what is given, if at all
            null = torch.full_like(prefix if given is not None else prefix[:1], model.null)
            prefix = torch.cat([null, prefix])
        order = torch.arange(rows, device=device) % conditions  # one condition, many draws
        if self.guided:
            nulls = len(prefix) - conditions
            order = torch.cat([order % nulls, nulls + order])
        known = torch.empty(conditions, 0, dtype=torch.int64, device=device)
        if given is not None:
            known = quantise(given.to(device), config.levels)
            tokens = model._tokens(known)
            prefix = torch.cat([prefix, tokens.repeat(1 + self.guided, 1)], 1)
        self.prefix, self.order, self.known = prefix, order, known.shape[1]
        total = math.prod(config.event_shape)
        self.values = torch.zeros(rows, total, dtype=torch.int64, device=device)
        self.values[:, : self.known] = known[torch.arange(rows, device=device) % conditions]
        self.rope = model._rope(device)
        network, weight = self.network.config, self.network.embedding.weight
        slots = max(1, total - self.known - 1)
        shape = (network.layers, len(order), slots, network.key_heads, network.head_size)
        self.keys = torch.empty(shape, dtype=weight.dtype, device=device)
        self.cached_values = torch.empty_like(self.keys)
        self.lengths = torch.zeros(len(order), dtype=torch.int32, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.scale = torch.full((), float(options.guidance), device=device)
        self.prefix_length = torch.full(
            (len(prefix),), prefix.shape[1], dtype=torch.int32, device=device
        )

    def solve(self) -> Tensor:
        """The values (rows, C H W)."""
        self._start()
        steps = self.values.shape[1] - self.known - 1
        step: Callable[[], None] = self._step
        if self.options.graph and self.index.is_cuda and steps:
            step = captured(self._step)
            self._reset()
        for _ in range(steps):
            step()
        self._draw()
        return self.values

    def _start(self) -> None:
        """Prefixes, and the logits of the first value."""
        rope = None
        length = self.prefix.shape[1]
        if self.rope is not None:
            rope = (self.rope[0][:length], self.rope[1][:length])
        x, keys, values = self.network.prefill(self.prefix, rope)
        self.prefix_keys, self.prefix_values = keys, values
        self.first_logits = self.network.head(self.network.norm(x[:, -1]))[self.order]
        self.logits = torch.empty_like(self.first_logits)
        self._reset()

    def _reset(self) -> None:
        self.logits.copy_(self.first_logits)
        self.lengths.zero_()
        self.position.fill_(self.known)

    def _step(self) -> None:
        token = self._draw()
        channel = self.position % self.model.config.event_shape[0]
        token = token + channel * self.model.config.levels
        x = self.network.embedding(token.repeat(1 + self.guided)[:, None])
        if self.network.positions is not None:
            x = x + self.network.positions(self.position + self.model.config.prefix_length)
        for layer, block in enumerate(self.network.blocks):
            assert isinstance(block, Block)
            x = block.step(
                x,
                (self.keys[layer], self.cached_values[layer]),
                lengths=self.lengths,
                rope=self.rope,
                rope_interleaved=self.network.config.interleaved,
                prefix_k=self.prefix_keys[layer],
                prefix_v=self.prefix_values[layer],
                prefix_length=self.prefix_length,
                prefix_id=self.order,
            )
        self.logits.copy_(self.network.head(self.network.norm(x[:, 0])))
        self.lengths.add_(1)
        self.position.add_(1)

    def _draw(self) -> Tensor:
        """The next value of each row, which is also written."""
        options = self.options
        token, _ = cgkernels.sample_logits(
            self.logits,
            scale=self.scale if self.guided else None,
            temperature=options.temperature,
            top_k=options.top_k or None,
            top_p=options.top_p if options.top_p != 1 else None,
            min_p=options.min_p or None,
            seed=self.seed,
            index=self.index,
            position=self.position[0],
        )
        self.values.index_copy_(1, self.position, token[:, None])
        return token
