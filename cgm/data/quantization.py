"""Values in [-1, 1] as whole numbers: bins of the range, or the colors of a palette."""

import torch
from torch import Tensor

from cgkernels.rows import compute_dtype

Palette = tuple[tuple[float, float], ...]  # colors of two channels


def to_bins(y: Tensor, bins: int) -> Tensor:
    """The bin 0 .. bins - 1 of each value in [-1, 1], int64; beyond the range, the outermost.

    The 256 values of an 8-bit image are shared out evenly; `from_bins` gives the middle of those
    that became one.
    """
    steps = ((y.to(compute_dtype(y)) + 1) * 127.5).round().long().clamp(0, 255)
    return steps * bins // 256


def from_bins(numbers: Tensor, bins: int) -> Tensor:
    """The value in [-1, 1] of each bin, float32."""
    steps = (numbers.float() + 0.5) * (256 / bins) - 0.5
    return steps / 127.5 - 1


def to_palette(y: Tensor, palette: Tensor) -> Tensor:
    """The number (B, H, W) of the color of palette (K, C) nearest to each pixel of y (B, C, H, W).

    Of colors equally near, one of them.
    """
    pixels = y.to(compute_dtype(y, palette)).movedim(1, 3)
    distances = torch.cdist(
        pixels.flatten(0, 2), palette.to(pixels), compute_mode="donot_use_mm_for_euclid_dist"
    )
    return distances.argmin(1).view(pixels.shape[:3])


def check_palette(palette: Palette, event_shape: tuple[int, int, int]) -> None:
    """Raises ValueError if a palette, unless it is (), is not one of such images."""
    if not palette:
        return
    if event_shape[0] != 2:
        raise ValueError(f"palette must be () but for two channels, got event_shape {event_shape}")
    if len(set(palette)) != len(palette) or len(palette) < 2:
        raise ValueError(f"palette must have two colors or more, all different, got {palette}")
