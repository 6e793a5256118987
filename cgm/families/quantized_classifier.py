"""Regression by classes: softmax over the levels of each value, or over the colors of each pixel.

Source   colors as classes, annealed mean: Zhang et al., arXiv:1603.08511.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cgm.data import Dataset
from cgm.data.quantization import Palette, check_palette, from_bins, to_bins, to_palette
from cgm.families.regression import Regression, anneal, batches, choose, likeliest
from cgm.model import Draws, Interval
from cgm.networks.layers import full_precision
from cgm.networks.residual import ResidualConfig


@dataclass(frozen=True)
class QuantizedClassifierConfig(ResidualConfig):
    """What is generated from what, the network, and the classes."""

    # Values that a channel of a pixel can have, each channel by itself.
    levels: Annotated[int, Interval(2, 256)] = 16
    # Colors of two channels that a pixel can have, in place of levels: both channels as one choice.
    palette: Palette = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_palette(self.palette, self.event_shape)


class QuantizedClassifier(Regression):
    """A choice of bins for each value, or of a color for each pixel; `loss`, `log_prob`, `sample`.

    Its parameters are the logits of the classes.
    """

    family: ClassVar[str] = "quantized_classifier"
    is_density: ClassVar[bool] = False

    values: Tensor  # (classes, channels of an output): what the classes stand for

    def __init__(self, config: QuantizedClassifierConfig) -> None:
        if config.palette:
            values = torch.tensor(config.palette, dtype=torch.float32)
        else:
            values = from_bins(torch.arange(config.levels), config.levels)[:, None]
        super().__init__(config, torch.zeros(len(values), config.event_shape[0] // values.shape[1]))
        self.register_buffer("values", values, persistent=False)

    def _losses(self, parameters: Tensor, y: Tensor) -> dict[str, Tensor]:
        """{"total": nats per dimension, "bits": bits per dimension}."""
        total = -self._log_probs(parameters, y).flatten(1).sum(1) / self.dimensions
        return {"total": total, "bits": total / math.log(2)}

    @torch.no_grad()
    def predict(self, *, cond: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """The annealed mean of the classes, (B, C, H, W); of no condition (1, C, H, W).

            sum_k v_k e^(l_k / T) / sum_k e^(l_k / T)

        Temperature T = 1 gives the mean of p(y | cond), 0 its mode, value by value or pixel by
        pixel, and 0.38 is what Zhang et al. chose between them (equation 5).
        """
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        self.check_cond(cond)
        parameters = self._distribution(cond)
        if temperature == 0:
            return self._values(likeliest(parameters, 1)).to(self.dtype)
        return self._expectation(anneal(parameters, 1, temperature)).to(self.dtype)

    @torch.no_grad()
    def fit(self, data: Dataset | Tensor | Iterable[Tensor], *, smoothing: float = 0.0) -> None:
        """Maximum likelihood without a condition: the share of each class, for each output.

        data: a data set; y (N, C, H, W); or batches of y, of which one at a time is held.
        smoothing: how often each class counts as seen beside; with 0 one that was never seen has
        probability 0.
        """
        self._check_fit()
        if not 0 <= smoothing < math.inf:
            raise ValueError(f"smoothing must not be negative, got {smoothing}")
        counts = torch.zeros(self.parameter_shape, dtype=torch.int64, device=self.table.device)
        for y in self._to_fit(data):
            classes = self._classes(y)
            counts.scatter_add_(0, classes, torch.ones_like(classes))
        self.table.copy_((counts.double() + smoothing).log().log_softmax(0))

    def _classes(self, y: Tensor) -> Tensor:
        """The classes (B, outputs, H, W) of y (B, C, H, W)."""
        if self.config.palette:
            return to_palette(y, self.values)[:, None]
        return to_bins(y, self.config.levels)

    def _values(self, classes: Tensor) -> Tensor:
        """What classes (..., outputs, H, W) stand for, (..., C, H, W); NaN of the class -1."""
        values = self.values[classes.clamp(min=0)].masked_fill(classes[..., None] < 0, math.nan)
        return values.movedim(-1, -3).flatten(-4, -3)

    def _mean(self, parameters: Tensor) -> Tensor:
        return self._expectation(parameters.softmax(1))

    def _expectation(self, shares: Tensor) -> Tensor:
        """The mean (B, C, H, W) by probabilities of the classes (B, K, outputs, H, W)."""
        with full_precision(shares):
            return torch.einsum("bkohw,kc->bochw", shares, self.values.to(shares)).flatten(1, 2)

    def _log_probs(self, parameters: Tensor, y: Tensor) -> Tensor:
        return -F.cross_entropy(parameters, self._classes(y), reduction="none")

    def _draw_values(self, parameters: Tensor, draws: Draws, temperature: float) -> Tensor:
        return self._values(choose(parameters, draws, temperature).movedim(-1, 0))


def palette_of(data: Dataset | Tensor | Iterable[Tensor], spacing: float) -> Palette:
    """The colors of a grid that are nearest to some pixel of the data: a palette to describe them.

    The grid has a point at 0 and in each channel one every `spacing`. data: as of `fit`, y
    (N, 2, H, W).
    """
    if not 0 < spacing < math.inf:
        raise ValueError(f"spacing must be positive, got {spacing}")
    cells: set[int] = set()
    for y in batches(data):
        if y.dim() != 4 or y.shape[1] != 2:
            raise ValueError(f"data must be (N, 2, H, W), got {tuple(y.shape)}")
        points = (y.double() / spacing).round()
        if not (points.abs() < 2**31).all():
            raise ValueError(f"data must be finite and spacing not too small, got {spacing}")
        a, b = points.long().unbind(1)
        cells.update((a * 2**32 + b).unique().tolist())  # of pairs it takes twenty times as long
    pairs = ((cell + 2**31 >> 32, (cell + 2**31) % 2**32 - 2**31) for cell in sorted(cells))
    return tuple((a * spacing, b * spacing) for a, b in pairs)
