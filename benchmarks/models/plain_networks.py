"""The published image-to-image networks as one writes them with torch.nn, to compare ours with.

Names of parameters, order of layers and activations in place as in the known implementation of
pix2pix and CycleGAN.
"""

import torch
from torch import Tensor, nn


def plain_norm(kind: str, channels: int) -> nn.Module:
    """As torch.nn has it."""
    return {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d, "none": nn.Identity}[kind](
        channels
    )


class PlainDiscriminator(nn.Module):
    """n convolutions of stride 2, two of stride 1."""

    def __init__(self, n: int, kind: str, width: int, channels: int = 3) -> None:
        super().__init__()
        bias, inside = kind == "instance", width
        parts = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        for i in range(1, n + 1):
            out = width * min(2**i, 8)
            parts += [
                nn.Conv2d(inside, out, 4, 2 if i < n else 1, 1, bias=bias),
                plain_norm(kind, out), nn.LeakyReLU(0.2, True),
            ]  # fmt: skip
            inside = out
        self.model = nn.Sequential(*parts, nn.Conv2d(inside, 1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Of images (B, C, H, W)."""
        return self.model(x)


class PlainPixel(nn.Module):
    """Three 1 x 1 convolutions."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        bias = kind == "instance"
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 1), nn.LeakyReLU(0.2, True),
            nn.Conv2d(width, 2 * width, 1, bias=bias), plain_norm(kind, 2 * width),
            nn.LeakyReLU(0.2, True), nn.Conv2d(2 * width, 1, 1, bias=bias),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Of images (B, C, H, W)."""
        return self.net(x)


class PlainLevel(nn.Module):
    """One level of the U-Net with all inside it."""

    def __init__(self, level: int, downs: int, width: int, kind: str, dropout: bool) -> None:
        super().__init__()
        outer, inner, bias = level == 0, level == downs - 1, kind == "instance"
        inside = width * min(2**level, 8)
        outside = 3 if outer else width * min(2 ** (level - 1), 8)
        down = nn.Conv2d(outside, inside, 4, 2, 1, bias=bias)
        up = nn.ConvTranspose2d(inside * (2 - inner), outside, 4, 2, 1, bias=bias or outer)
        self.outer = outer
        if outer:
            parts = [down, PlainLevel(1, downs, width, kind, dropout), nn.ReLU(True), up, nn.Tanh()]
        elif inner:
            parts = [nn.LeakyReLU(0.2, True), down, nn.ReLU(True), up, plain_norm(kind, outside)]
        else:
            parts = [
                nn.LeakyReLU(0.2, True), down, plain_norm(kind, inside),
                PlainLevel(level + 1, downs, width, kind, dropout),
                nn.ReLU(True), up, plain_norm(kind, outside),
            ]  # fmt: skip
            parts += [nn.Dropout(0.5)] if dropout and level >= 4 else []
        self.model = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        """Of images (B, C, H, W)."""
        # The activation in place makes the skip leaky_relu(x).
        return self.model(x) if self.outer else torch.cat([x, self.model(x)], 1)


class PlainUNet(nn.Module):
    """Nested levels with skips."""

    def __init__(self, downs: int, kind: str, width: int, dropout: bool = False) -> None:
        super().__init__()
        self.model = PlainLevel(0, downs, width, kind, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Of images (B, C, H, W)."""
        return self.model(x)


class PlainBlock(nn.Module):
    """Two convolutions and the sum."""

    def __init__(self, width: int, kind: str, dropout: bool) -> None:
        super().__init__()

        def conv():
            return [
                nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3, bias=kind == "instance"),
                plain_norm(kind, width),
            ]  # fmt: skip

        self.conv_block = nn.Sequential(
            *conv(), nn.ReLU(True), *([nn.Dropout(0.5)] if dropout else []), *conv()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Of images (B, C, H, W)."""
        return x + self.conv_block(x)


class PlainResnet(nn.Module):
    """Down, residual blocks, up."""

    def __init__(self, blocks: int, kind: str, width: int, dropout: bool = False) -> None:
        super().__init__()
        bias = kind == "instance"
        parts = [
            nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7, bias=bias), plain_norm(kind, width),
            nn.ReLU(True),
        ]  # fmt: skip
        for w in (width, 2 * width):
            parts += [
                nn.Conv2d(w, 2 * w, 3, 2, 1, bias=bias), plain_norm(kind, 2 * w), nn.ReLU(True)
            ]  # fmt: skip
        parts += [PlainBlock(4 * width, kind, dropout) for _ in range(blocks)]
        for w in (4 * width, 2 * width):
            parts += [
                nn.ConvTranspose2d(w, w // 2, 3, 2, 1, 1, bias=bias), plain_norm(kind, w // 2),
                nn.ReLU(True),
            ]  # fmt: skip
        parts += [nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh()]
        self.model = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        """Of images (B, C, H, W)."""
        return self.model(x)
