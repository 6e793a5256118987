"""Conditional autoregressive model: p(y | cond) = product of p(y_i | y_<i, cond), by a transformer.

An image is the sequence of its quantized values: pixels in raster order, the channels of a pixel
one after another, or as one color of a palette. The condition is a prefix of that sequence: a
class, tokens, the quantized values of an image, or a start symbol alone; the code is the same for
all.

Source   PixelRNN arXiv:1601.06759; Image Transformer arXiv:1802.05751; image GPT (Chen et al.,
         2020); classifier-free guidance arXiv:2207.12598.
"""

import copy
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cgkernels.checks import readable
from cgkernels.random import STREAM_CONDITION_DROPOUT, uniform
from cgkernels.rows import compute_dtype
from cgm.data.quantization import Palette, check_palette, from_bins, to_bins, to_palette
from cgm.model import (
    Count,
    Density,
    Draws,
    GuidedConfig,
    Interval,
    Model,
    Natural,
    Positive,
    Step,
)
from cgm.networks.transformer import Transformer, TransformerConfig
from cgm.sampling.decoding import Decoder, SamplingConfig


# Config -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class AutoregressiveConfig(GuidedConfig):
    """What is generated from what, and the network."""

    # Values that a channel of a pixel can have; 256 loses nothing of an 8-bit image.
    levels: Annotated[int, Interval(2, 256)] = 16
    # Colors of two channels that a pixel of what is generated can have, in place of levels: both
    # channels are one choice.
    palette: Palette = ()
    # Blocks of the transformer.
    depth: Count = 4
    # Channels of its residual stream.
    width: Count = 96
    # Query heads.
    heads: Count = 4
    # Key and value heads, a divisor of `heads`; 0: as many as query heads.
    kv_heads: Natural = 0
    # Width of the MLP.
    hidden: Count = 256
    # Normalization.
    norm: Literal["rms", "layer"] = "rms"
    # Activation of the MLP.
    activation: Literal["swiglu", "gelu"] = "swiglu"
    # How positions enter: rotation by the position in the sequence, by row and column, or a learned
    # vector each.
    positions: Literal["rotary", "rotary_2d", "learned"] = "rotary_2d"
    # Base of the wavelengths of rotary positions: they are up to 2 pi times it, in positions or
    # rows.
    rope_base: Positive = 10000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_palette(self.palette, self.event_shape)
        if self.positions == "rotary_2d" and self.width // self.heads % 4:
            raise ValueError(
                "heads must leave a multiple of 4 of width to each for rotary_2d positions, "
                f"got {self.width} / {self.heads}"
            )

    def _check_image_cond(self) -> None:
        """The sides of a condition can be others than those of what is generated."""
        if len(self.cond_shape) != 3:
            raise ValueError(f"cond_shape must be (C, H, W) for images, got {self.cond_shape}")

    @property
    def prefix_length(self) -> int:
        """Tokens of the condition."""
        return math.prod(self.cond_shape) if self.cond_kind in ("image", "tokens") else 1

    @property
    def choices(self) -> int:
        """What a value of the sequence can be."""
        return len(self.palette) or self.levels

    @property
    def sequence_shape(self) -> tuple[int, int, int]:
        """Shape (values of a pixel, H, W) of the sequence of an image."""
        return (1 if self.palette else self.event_shape[0], *self.event_shape[1:])


# Model --------------------------------------------------------------------------------------------
class ConditionalTransformer(Model):
    """Autoregressive model of p(y | cond); `loss`, `log_prob` and `sample` of all families.

    Tokens: value v of channel c of y is c levels + v, color k of a palette is k; then come the
    values of a condition image (channel by channel alike), the classes or the tokens, and last
    the symbol "no condition".
    """

    family: ClassVar[str] = "autoregressive"
    sampling_config: ClassVar[type[SamplingConfig]] = SamplingConfig
    discrete: ClassVar[bool] = True
    has_int8: ClassVar[bool] = True

    palette: Tensor  # (colors, 2)

    def __init__(self, config: AutoregressiveConfig) -> None:
        super().__init__()
        self.config = config
        symbols = {
            "none": 0,
            "class": config.num_classes,
            "tokens": config.num_classes,
            "image": config.levels * (config.cond_shape or (0,))[0],
        }[config.cond_kind]
        palette = torch.tensor(config.palette, dtype=torch.float32)
        self.register_buffer("palette", palette, persistent=False)
        self.first_symbol = config.sequence_shape[0] * config.choices
        self.null = self.first_symbol + symbols
        self.transformer = Transformer(
            TransformerConfig(
                vocabulary=self.null + 1,
                length=config.prefix_length + math.prod(config.sequence_shape),
                outputs=config.choices,
                layers=config.depth,
                width=config.width,
                heads=config.heads,
                kv_heads=config.kv_heads,
                hidden=config.hidden,
                norm=config.norm,
                activation=config.activation,
                positions="learned" if config.positions == "learned" else "rotary",
                rope_base=config.rope_base,
            )
        )

    def compile_networks(self, mode: str) -> None:
        """Puts the token step under torch.compile."""
        step = torch.compile(self.transformer.step, mode=mode, dynamic=False)
        self.transformer.step = step  # type: ignore[method-assign]

    def int8(self) -> "ConditionalTransformer":
        """A copy for sampling and likelihoods, with weights of 8 bits."""
        twin = copy.copy(self)
        twin._modules = {"transformer": self.transformer.int8()}
        return twin

    # Likelihood -----------------------------------------------------------------------------------
    @property
    def density(self) -> Density:
        return "exact"

    def _loss(self, y: Tensor, cond: Tensor | None, step: Step) -> dict[str, Tensor]:
        """Cross-entropy of each example, all positions at once (teacher forcing).

        Which conditions are dropped is random. Returns {"total": nats per dimension, "bits": bits
        per dimension}.
        """
        prefix = self._prefix(cond, len(y), y.device)
        dropout = self.config.cond_dropout
        if cond is not None and dropout > 0:
            u = uniform(
                (len(y),), seed=step.seed, index=step.index, step=0, stream=STREAM_CONDITION_DROPOUT
            )
            prefix = torch.where((u < dropout)[:, None], self.null, prefix)
        nats = -_nan_where(_not_finite(y, cond), self._log_probs(y, prefix).sum(1))
        total = nats / math.prod(self.config.event_shape)
        return {"total": total, "bits": total / math.log(2)}

    @torch.no_grad()
    def log_prob(self, y: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """Exact log p(y | cond) in nats, (B,), of the image quantized to `levels` or `palette`.

        In bits per dimension it is -log_prob / (C H W ln 2).
        """
        self.check_inputs(y, cond)
        log_probs = self._log_probs(y, self._prefix(cond, len(y), y.device)).sum(1)
        return _nan_where(_not_finite(y, cond), log_probs)

    def _log_probs(self, y: Tensor, prefix: Tensor) -> Tensor:
        """log p of each value (B, L) of y, float32."""
        values = self._values(y)
        inputs = torch.cat([prefix, self._tokens(values)[:, :-1]], 1)
        logits = self.transformer(inputs, self._rope(y.device))[:, prefix.shape[1] - 1 :]
        flat = F.cross_entropy(logits.float().flatten(0, 1), values.flatten(), reduction="none")
        return -flat.view_as(values)

    # Sampling -------------------------------------------------------------------------------------
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
        """Samples of p(y | cond), in [-1, 1], as of all families.

        given: (B, C, H', W), the upper rows of each image, which are kept; without cond
        (1, C, H', W).
        """
        return self._sample(n, cond, seed, index, solver, given=given)

    def _guidance(self, options: SamplingConfig) -> float:
        return options.guidance

    def _draw(self, draws: Draws, options: SamplingConfig, given: Tensor | None = None) -> Tensor:
        """In [-1, 1]; the draws of a condition share its prefix."""
        config, device, index = self.config, self.device, draws.index
        conditions = draws.rows
        if given is not None:
            self._check_given(given, conditions)
        prefix = self._prefix(draws.cond, conditions, device)
        total = math.prod(config.sequence_shape)
        guided = draws.guidance is not None or options.guidance != 1
        if guided:  # the unconditional prefixes differ by what is given, if at all
            null = torch.full_like(prefix if given is not None else prefix[:1], self.null)
            prefix = torch.cat([null, prefix])
        known = torch.empty(conditions, 0, dtype=torch.int64, device=device)
        if given is not None:
            known = self._values(given)
            prefix = torch.cat([prefix, self._tokens(known).repeat(1 + guided, 1)], 1)
        condition_of_sample = torch.arange(len(index), device=device) % conditions
        order = condition_of_sample
        if guided:
            nulls = len(prefix) - conditions
            order = torch.cat([order % nulls, nulls + order])
        run = Decoder(
            self.transformer, prefix, order, total - known.shape[1], options,
            seed=draws.seed, index=index, guidance=draws.guidance, rope=self._rope(device),
            first=known.shape[1],
            offsets=self._offsets(total, device) if config.sequence_shape[0] > 1 else None,
        )  # fmt: skip
        values = torch.cat([known[condition_of_sample], run.run()], 1)
        unknown = _not_finite(draws.cond, given)
        if unknown is not None:
            unknown = unknown[condition_of_sample]
        return _nan_where(unknown, self._images(values))

    def _check_given(self, given: Tensor, conditions: int) -> None:
        channels, height, width = self.config.event_shape
        if not isinstance(given, Tensor) or given.dim() != 4 or not 0 < given.shape[2] < height:
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"given must have from 1 to {height - 1} rows, got shape {got}")
        self._check_image("given", given, conditions, (channels, given.shape[2], width))

    # Tokens ---------------------------------------------------------------------------------------
    def _values(self, y: Tensor) -> Tensor:
        """Values (B, L) of images (B, C, H, W), in the order of the sequence."""
        if self.config.palette:
            return to_palette(_wide(y), self.palette).flatten(1)
        return quantize(y, self.config.levels)

    def _images(self, values: Tensor) -> Tensor:
        """Images (B, C, H, W) of values (B, L), in the model's dtype; NaN where one is -1."""
        config = self.config
        # A draw from logits that are NaN is -1: there is no distribution, and so no value.
        drawn = (values >= 0).view(
            -1, config.event_shape[1], config.event_shape[2], config.sequence_shape[0]
        )
        if config.palette:
            images = self.palette[values].movedim(1, 2).unflatten(2, config.event_shape[1:])
        else:
            images = dequantize(values, config.levels, config.event_shape)
        return images.to(self.dtype).where(drawn.movedim(3, 1), torch.nan).contiguous()

    def _tokens(self, values: Tensor) -> Tensor:
        """Tokens of values (B, L)."""
        return values + self._offsets(values.shape[1], values.device)

    def _offsets(self, length: int, device: torch.device) -> Tensor:
        """What is added to the value at each position for its token."""
        channels = self.config.sequence_shape[0]
        return torch.arange(length, device=device) % channels * self.config.choices

    def _prefix(self, cond: Tensor | None, rows: int, device: torch.device) -> Tensor:
        """Tokens (B, M) of the condition."""
        config = self.config
        if cond is None:
            return torch.full((rows, config.prefix_length), self.null, device=device)
        if config.cond_kind == "image":
            values = quantize(cond, config.levels)
            channel = torch.arange(values.shape[1], device=device) % config.cond_shape[0]
            return self.first_symbol + channel * config.levels + values
        return self.first_symbol + (cond[:, None] if config.cond_kind == "class" else cond)

    def _rope(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Rotary table of the whole sequence of inputs (the last value of y is none)."""
        config = self.config
        if config.positions == "learned":
            return None
        length = config.prefix_length + math.prod(config.sequence_shape) - 1
        if config.positions == "rotary":
            return self.transformer.rope_table(torch.arange(length, device=device))
        # Rows and columns; a condition image stands above, other conditions in the corner.
        positions = _raster(config.sequence_shape, device)[:-1]
        before = torch.zeros(config.prefix_length, 2, device=device)
        if config.cond_kind == "image":
            before = _raster(config.cond_shape, device)
            before[:, 0] -= config.cond_shape[1]
        return self.transformer.rope_table(torch.cat([before, positions]))


def quantize(y: Tensor, levels: int) -> Tensor:
    """Values 0 .. levels - 1 of images (B, C, H, W) in [-1, 1], in the order of the sequence.

    They are the bins of `cgm.data.quantization`.
    """
    return to_bins(_wide(y).movedim(1, 3).flatten(1), levels)


def dequantize(values: Tensor, levels: int, shape: tuple[int, ...]) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] of values (B, C H W)."""
    channels, height, width = shape
    images = from_bins(values, levels).view(-1, height, width, channels)
    return images.movedim(3, 1).contiguous()


def _wide(y: Tensor) -> Tensor:
    """In float32 at least: half types cannot tell the 256 values of 8 bits apart midway."""
    return y.to(compute_dtype(y))


def _not_finite(*images: Tensor | None) -> Tensor | None:
    """Rows (B,) with a value that is not finite, of images that no check could look at before.

    None: there are none. As whole numbers they would be as good as any.
    """
    rows = [
        ~image.isfinite().flatten(1).all(1)
        for image in images
        if image is not None and image.is_floating_point() and not readable(image)
    ]
    return torch.stack(rows).any(0) if rows else None


def _nan_where(rows: Tensor | None, result: Tensor) -> Tensor:
    """result (B, ...), NaN in these rows."""
    if rows is None:
        return result
    return result.masked_fill(rows.view(-1, *[1] * (result.dim() - 1)), torch.nan)


def _raster(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """(row, column) of each element of the sequence, (H W C, 2) float32."""
    channels, height, width = shape
    rows = torch.arange(height, device=device, dtype=torch.float32)
    columns = torch.arange(width, device=device, dtype=torch.float32)
    return torch.cartesian_prod(rows, columns).repeat_interleave(channels, 0)
