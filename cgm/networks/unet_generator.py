"""U-Net of pix2pix: 4 x 4 convolutions that halve, transposed ones that double, and skips.

    a_0 = leaky_relu(conv(x)),   a_i = leaky_relu(norm(conv(a_(i-1)))),   a_n = relu(conv(a_(n-1)))
    u_n = a_n,   u_i = (relu(a_i), dropout(relu(norm(deconv(u_(i+1))))))
    y = tanh(deconv(u_0)),   levels i = 0 .. n, dropout where both sides are of full width

Shapes   x (B, C, H, W) -> (B, C_out, H, W); H and W multiples of 2^(n + 1).
Names    of parameters as in the published generators of pix2pix and CycleGAN.
Source   Isola et al., arXiv:1611.07004; Ronneberger et al., arXiv:1505.04597.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cgm.model import Config, Count, Interval
from cgm.networks.layers import (
    check_image,
    conv_before_norm,
    dropout,
    has_bias,
    init_normal,
    is_unhooked,
    join_channels,
    memory_format,
    new_norm,
    norm_act,
    norm_leaky_relu_and_relu_,
    norm_relu_,
)

Noise = tuple[int | Tensor, Tensor | None]  # seed, index

# Published numbers of the parts of a level; its activations have numbers too.
_OUTERMOST = {"down": "0", "inner": "1", "up": "3"}
_BETWEEN = {"down": "1", "down_norm": "2", "inner": "3", "up": "5", "up_norm": "6"}
_INNERMOST = {"down": "1", "up": "3", "up_norm": "4"}
_NONE = nn.Identity()


@dataclass(frozen=True)
class UNetGeneratorConfig(Config):
    """Sizes and kinds of the parts."""

    # Channels of the image that comes in.
    in_channels: Count = 3
    # Channels of the image that goes out.
    out_channels: Count = 3
    # Levels, each of which halves the sides: 8 for 256 pixels, 7 for 128, 5 for 32.
    downs: Annotated[int, Interval(2, ends="[)")] = 8
    # Channels of the outermost level; they double with each further one, up to eight times as many.
    width: Count = 64
    # Normalization.
    norm: Literal["batch", "instance", "none"] = "batch"
    # Dropout in the inner levels of full width, which there are from 6 levels on.
    dropout: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout and self.downs < 6:
            raise ValueError(f"dropout must be False with fewer than 6 downs, got {self.downs}")


class Level(nn.Module):
    """One level with all those inside it: `number` 0 is the outermost."""

    def __init__(self, config: UNetGeneratorConfig, number: int) -> None:
        super().__init__()
        outermost, innermost = number == 0, number == config.downs - 1
        inside = config.width * min(2**number, 8)
        before = config.in_channels if outermost else config.width * min(2 ** (number - 1), 8)
        after = config.out_channels if outermost else before
        self.number = number
        self.dropout = config.dropout and 4 <= number < config.downs - 1
        self.numbers = _OUTERMOST if outermost else _INNERMOST if innermost else _BETWEEN
        bias, twice = has_bias(config.norm), 1 if innermost else 2
        parts: dict[str, nn.Module] = {
            "down": nn.Conv2d(before, inside, 4, 2, 1, bias=bias),
            "down_norm": new_norm(config.norm, inside),
            "inner": _NONE if innermost else Level(config, number + 1),
            "up": nn.ConvTranspose2d(twice * inside, after, 4, 2, 1, bias=bias or outermost),
            "up_norm": new_norm(config.norm, after),
        }
        self.model = nn.ModuleDict({number: parts[name] for name, number in self.numbers.items()})

    def forward(self, a: Tensor, noise: Noise | None, out: Tensor | None = None) -> Tensor:
        """(B, C, 2 h, 2 w) from what the level outside gives down, (B, C', 2 h, 2 w), activated.

        out: where it is written, too.
        """
        part = self._parts()
        down_norm = part.get("down_norm", _NONE)
        h = conv_before_norm(part["down"], down_norm, a)
        if "inner" not in part:
            h = F.relu(h)
        else:  # both halves of what goes up are written where they belong: nothing is copied
            both = _room_for_two(h)
            skip, inner = both.chunk(2, dim=1)
            h, skip = norm_leaky_relu_and_relu_(skip, h, down_norm)
            written = type(part["inner"]) is Level and is_unhooked(part["inner"])
            h = part["inner"](h, noise, inner)
            h = join_channels(both, skip, h) if written else torch.cat([skip, h], 1)
        if self.number == 0:
            return torch.tanh(part["up"](h))
        h = conv_before_norm(part["up"], part["up_norm"], h)
        assert out is not None  # but for the outermost level
        if not self.dropout or noise is None:
            return norm_relu_(out, h, part["up_norm"])
        h = norm_act(h, part["up_norm"], "relu")
        h = dropout(h, seed=noise[0], index=noise[1], layer=self.number)
        out.copy_(h.detach())
        return h

    def _parts(self) -> dict[str, Any]:
        return {name: self.model[number] for name, number in self.numbers.items()}


class UNetGenerator(nn.Module):
    """An image from an image; the noise of a sample is its dropout."""

    def __init__(self, config: UNetGeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Level(config, 0)
        init_normal(self)

    def forward(
        self, x: Tensor, *, seed: int | Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """y (B, C_out, H, W) in (-1, 1) of x (B, C, H, W).

        seed: of the dropout, in training and evaluation alike; None: no dropout.
        index: (B,) int64 numbers of the samples, default 0 .. B - 1. What is dropped of a sample
            depends on (seed, index) alone.

        Raises:
            ValueError: channels are not those of the config, or a side is no multiple of 2^downs.
        """
        check_image("x", x, self.config.in_channels)
        side = 2**self.config.downs
        if x.shape[2] % side or x.shape[3] % side:
            raise ValueError(f"x must have sides of multiples of {side}, got {tuple(x.shape)}")
        return self.model(x, None if seed is None else (seed, index))


def _room_for_two(h: Tensor) -> Tensor:
    """Uninitialized, of twice as many channels."""
    shape = (h.shape[0], 2 * h.shape[1], *h.shape[2:])
    return torch.empty(shape, dtype=h.dtype, device=h.device, memory_format=memory_format(h))
