"""Residual networks that families share: conditions as planes, a U-Net, an encoder.

ConditionPlanes   any condition           -> (B, planes, H, W)
ResidualUNet      (B, C, H, W), (B, D)    -> (B, C', H, W)
ResidualEncoder   (B, C, H, W)            -> (B, D)

Source   residual blocks, GroupNorm, SiLU: Ho et al., arXiv:2006.11239; a vector that scales and
         shifts the features: Perez et al., arXiv:1709.07871 (FiLM).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cgm.model import Count, Depth, ImageConfig, Interval
from cgm.networks.unet import ResidualBlock, group_norm, zero_init


@dataclass(frozen=True)
class ResidualConfig(ImageConfig):
    """What is generated from what, and the size of the networks."""

    # Channels of the networks at full resolution, twice as many at each resolution below.
    width: Annotated[int, Interval(4, ends="[)")] = 32
    # Resolutions of the networks, each half of the one above, rounded up.
    depth: Depth = 3
    # Residual blocks of a resolution of a U-Net, on the way down and again on the way up.
    blocks: Count = 1


class ConditionPlanes(nn.Module):
    """A condition as planes (B, planes, H, W) with the sides of what is generated.

    An image is its own planes. A class has learned ones, and so has no condition at all: they are
    also what tells a network of convolutions where in the image it is.

    planes: how many.
    """

    LEARNED = 4  # planes of a class, and of none

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.planes = config.cond_shape[0] if config.cond_kind == "image" else self.LEARNED
        self.learned = None
        if config.cond_kind != "image":
            size = (max(config.num_classes, 1), self.LEARNED, *config.event_shape[1:])
            self.learned = nn.Parameter(0.1 * torch.randn(size))

    def forward(self, cond: Tensor | None, rows: int) -> Tensor:
        """The planes of rows conditions, checked before: see `Model.check_cond`."""
        if self.learned is None:
            assert cond is not None
            return cond
        return self.learned.expand(rows, -1, -1, -1) if cond is None else self.learned[cond]


class ResidualUNet(nn.Module):
    """A U-Net of residual blocks, which a vector may modulate.

    Args:
        in_channels, out_channels: of x and of the result.
        width: channels at full resolution, at least 4; twice as many at each resolution below.
        depth: resolutions, each half of the one above, rounded up.
        blocks: residual blocks of a resolution, on the way down and again on the way up.
        features: size of the vector, 0 for none.
        start_at_zero: blocks start as their skips, deaf to the vector, and the result as 0; else
            all weights start as PyTorch's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        width: int,
        depth: int,
        blocks: Count = 1,
        features: int = 0,
        start_at_zero: bool = True,
    ) -> None:
        super().__init__()
        self.blocks = blocks
        widths = [width * 2**level for level in range(depth)]
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, after in enumerate(widths):
            before = widths[max(level - 1, 0)]
            self.down.extend(ResidualBlock(n, after) for n in [before] + [after] * (blocks - 1))
        for below, after in pairwise(reversed(widths)):
            before = below + after
            self.up.extend(ResidualBlock(n, after) for n in [before] + [after] * (blocks - 1))
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        if start_at_zero:
            zero_init(self.conv_out)
        else:
            for block in [*self.down, *self.up]:
                block.conv2.reset_parameters()
        self.film_sizes = [2 * block.conv2.out_channels for block in [*self.down, *self.up]]
        self.film = nn.Linear(features, sum(self.film_sizes)) if features else None

    def forward(self, x: Tensor, vector: Tensor | None = None) -> Tensor:
        """(B, out_channels, H, W) of x (B, in_channels, H, W) and vector (B, features), if any."""
        films = iter(
            [None] * len(self.film_sizes)
            if self.film is None
            else self.film(vector).split(self.film_sizes, dim=1)
        )
        h = self.conv_in(x)
        skips = []
        for i, block in enumerate(self.down):
            if i and i % self.blocks == 0:
                skips.append(h)
                h = F.avg_pool2d(h, 2, ceil_mode=True)
            h = block(h, next(films))
        for i, block in enumerate(self.up):
            if i % self.blocks == 0:
                skip = skips.pop()
                h = F.interpolate(h, size=skip.shape[2:], mode="nearest")
                h = torch.cat([h, skip], dim=1)
            h = block(h, next(films))
        return self.conv_out(F.silu(self.norm_out(h)))


class ResidualEncoder(nn.Module):
    """A vector of an image: residual blocks, each after the first at half the resolution.

    Args:
        in_channels: of x.
        sides: (H, W) of x.
        out_features: size of the result.
        width: channels at full resolution, at least 4; twice as many at each resolution below.
        depth: resolutions, each half of the one above, rounded up.
        pooled: the vector is made of the means over all pixels, and knows the position of none.
    """

    def __init__(
        self,
        in_channels: int,
        sides: tuple[int, int],
        out_features: int,
        *,
        width: int,
        depth: int,
        pooled: bool = False,
    ) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth)]
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down = nn.ModuleList(
            ResidualBlock(widths[max(level - 1, 0)], widths[level]) for level in range(depth)
        )
        self.norm_out = group_norm(widths[-1])
        self.pooled = pooled
        height, wide = (-(-side // 2 ** (depth - 1)) for side in sides)
        pixels = 1 if pooled else height * wide
        self.out = nn.Linear(widths[-1] * pixels, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, out_features) of x (B, in_channels, H, W)."""
        h = self.conv_in(x)
        for level, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2, ceil_mode=True) if level else h)
        h = F.silu(self.norm_out(h))
        return self.out(h.mean((2, 3)) if self.pooled else h.flatten(1))
