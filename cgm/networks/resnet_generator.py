"""ResNet generator of CycleGAN: two convolutions that halve, residual blocks, two that double.

    h = act(conv7(x)),  twice h <- act(conv3 / 2 (h)),   act = relu norm
    blocks  h <- h + norm(conv3(dropout(act(conv3(h)))))
    twice h <- act(deconv3(h)),  y = tanh(conv7(h))

The 7 x 7 convolutions and those of the blocks see their input reflected at the border (the blocks
also repeated, or with zeros, where so asked). Whatever makes that input writes the reflected border
with it: `norm_act` is one pass.

Shapes   x (B, C, H, W) -> (B, C_out, H', W'), sides rounded up to multiples of 4.
Names    of parameters as in the published generators of CycleGAN.
Source   Zhu et al., arXiv:1703.10593; Johnson et al., arXiv:1603.08155.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cgm.model import Config, Count
from cgm.networks.layers import (
    check_image,
    conv_before_norm,
    dropout,
    has_bias,
    init_normal,
    new_norm,
    norm_act,
)

Padding = Literal["reflect", "replicate", "zero"]


@dataclass(frozen=True)
class ResnetGeneratorConfig(Config):
    """Sizes and kinds of the parts."""

    # Channels of the image that comes in.
    in_channels: Count = 3
    # Channels of the image that goes out.
    out_channels: Count = 3
    # Residual blocks: 9 for 256 pixels, 6 for 128.
    blocks: Count = 9
    # Channels at full resolution; the blocks have four times as many.
    width: Count = 64
    # Normalization.
    norm: Literal["batch", "instance", "none"] = "instance"
    # Dropout in every block.
    dropout: bool = False
    # Border of the convolutions in the blocks; the other convolutions are as published.
    padding: Padding = "reflect"


class ResnetBlock(nn.Module):
    """x + norm(conv(dropout(relu(norm(conv(x)))))), both convolutions with a border."""

    def __init__(self, config: ResnetGeneratorConfig, number: int) -> None:
        super().__init__()
        width, bias = 4 * config.width, has_bias(config.norm)
        self.number, self.dropout, self.padding = number, config.dropout, config.padding
        # Published numbers, where dropout and a border that is not of zeros have some too.
        bordered = int(config.padding != "zero")
        self.first, self.second = bordered, 3 + 2 * bordered + config.dropout
        self.conv_block = nn.ModuleDict(
            {
                str(self.first): nn.Conv2d(width, width, 3, bias=bias),
                str(self.first + 1): new_norm(config.norm, width),
                str(self.second): nn.Conv2d(width, width, 3, bias=bias),
                str(self.second + 1): new_norm(config.norm, width),
            }
        )

    def forward(
        self, x: Tensor, *, pad: int, seed: int | Tensor | None, index: Tensor | None
    ) -> Tensor:
        """(B, C, H + 2 pad, W + 2 pad) of x (B, C, H + 2, W + 2), both with their border."""
        conv, norm = self._layer(self.first)
        dropped = self.dropout and seed is not None
        h = conv_before_norm(conv, norm, x)
        h = _norm_act(h, norm, "relu", pad=0 if dropped else 1, padding=self.padding)
        if self.dropout and seed is not None:
            h = dropout(h, seed=seed, index=index, layer=self.number)
            h = _pad(h, 1, self.padding)
        conv, norm = self._layer(self.second)
        h = conv_before_norm(conv, norm, h)
        residual = x[:, :, 1:-1, 1:-1]
        return _norm_act(h, norm, residual=residual, pad=pad, padding=self.padding)

    def _layer(self, number: int) -> tuple[Any, nn.Module]:
        return self.conv_block[str(number)], self.conv_block[str(number + 1)]


def _norm_act(
    x: Tensor,
    norm: nn.Module,
    activation: Literal["relu"] | None = None,
    *,
    residual: Tensor | None = None,
    pad: int,
    padding: Padding,
) -> Tensor:
    """`norm_act` with a border of this kind; a reflected one costs it nothing."""
    reflected = pad if padding == "reflect" else 0
    h = norm_act(x, norm, activation, residual=residual, pad=reflected)
    return h if reflected else _pad(h, pad, padding)


def _pad(h: Tensor, pad: int, padding: Padding) -> Tensor:
    return F.pad(h, (pad,) * 4, mode="constant" if padding == "zero" else padding) if pad else h


class ResnetGenerator(nn.Module):
    """An image from an image."""

    def __init__(self, config: ResnetGeneratorConfig) -> None:
        super().__init__()
        self.config = config
        width, n, bias = config.width, config.blocks, has_bias(config.norm)
        self.model = nn.ModuleDict()

        def layer(number: int, conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
            self.model[str(number)] = conv
            self.model[str(number + 1)] = new_norm(config.norm, conv.out_channels)

        # By their published numbers, where reflection, activations and dropout have some too.
        layer(1, nn.Conv2d(config.in_channels, width, 7, bias=bias))
        layer(4, nn.Conv2d(width, 2 * width, 3, 2, 1, bias=bias))
        layer(7, nn.Conv2d(2 * width, 4 * width, 3, 2, 1, bias=bias))
        for i in range(n):
            self.model[str(10 + i)] = ResnetBlock(config, i)
        layer(10 + n, nn.ConvTranspose2d(4 * width, 2 * width, 3, 2, 1, 1, bias=bias))
        layer(13 + n, nn.ConvTranspose2d(2 * width, width, 3, 2, 1, 1, bias=bias))
        self.model[str(17 + n)] = nn.Conv2d(width, config.out_channels, 7)
        init_normal(self)

    def forward(
        self, x: Tensor, *, seed: int | Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """y (B, C_out, H', W') in (-1, 1) of x (B, C, H, W).

        seed: of the dropout, in training and evaluation alike; None: no dropout.
        index: (B,) int64 numbers of the samples, default 0 .. B - 1. What is dropped of a sample
            depends on (seed, index) alone.

        Raises:
            ValueError: channels are not those of the config, or a side is less than 5.
        """
        check_image("x", x, self.config.in_channels, least=5)
        n = self.config.blocks
        h = self._layer(1, F.pad(x, (3,) * 4, mode="reflect"))
        h = self._layer(7, self._layer(4, h), 1, self.config.padding)
        for i in range(n):
            block: Any = self.model[str(10 + i)]
            h = block(h, pad=int(i < n - 1), seed=seed, index=index)
        h = self._layer(13 + n, self._layer(10 + n, h), pad=3)
        return torch.tanh(self.model[str(17 + n)](h))

    def _layer(self, number: int, h: Tensor, pad: int = 0, padding: Padding = "reflect") -> Tensor:
        conv: Any = self.model[str(number)]
        norm = self.model[str(number + 1)]
        h = conv_before_norm(conv, norm, h)
        return _norm_act(h, norm, "relu", pad=pad, padding=padding)
