"""Labeled grids of images as PNG files.

Nothing here touches pyplot or its settings; every pixel of an image becomes a square of whole
pixels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from PIL import Image
from torch import Tensor

from cgm.checkpoints import replacing
from cgm.data import lab_to_rgb

_DPI = 64  # a power of two: sizes in inches are exact, so that no pixel is resampled
_LETTER = 13  # height of letters, pixels
_SIDE = 64  # images are enlarged to at least this many pixels
POINT = (2, 1, 1)  # shape of a point of the plane
_NARROW, _WIDE = 2, 18  # gaps between images, and around groups


def image_grid(
    file: str | Path,
    groups: Sequence[tuple[str, Tensor]],
    *,
    row_labels: Sequence[str] = (),
    title: str = "",
) -> None:
    """Writes a grid of images as a PNG; a file of that name is replaced.

    Args:
        groups: columns that belong together, from left to right: their header, and their images
            (columns, rows, C, H, W) in [-1, 1] with C = 1 (gray) or 3 (RGB); values beyond are cut
            off, and NaN is black. All have the same number of rows.
        row_labels: one for each row, or none.

    Raises:
        ValueError: shapes do not fit.
    """
    rows = groups[0][1].shape[1] if groups and groups[0][1].dim() == 5 else 0
    for header, images in groups:
        if images.dim() != 5 or images.shape[2] not in (1, 3) or images.shape[1] != rows:
            raise ValueError(
                f"groups must hold (columns, {rows}, 1 or 3, H, W), got "
                f"{tuple(images.shape)} for {header!r}"
            )
    if rows == 0 or (row_labels and len(row_labels) != rows):
        raise ValueError(f"row_labels must be {rows} > 0 or none, got {len(row_labels)}")

    def text_width(text: str) -> int:
        size = renderer.get_text_width_height_descent(text, font, ismath=False)
        return round(size[0])

    font = FontProperties(size=_LETTER * 72 / _DPI)
    renderer = FigureCanvasAgg(Figure(dpi=_DPI)).get_renderer()
    scale = -(-_SIDE // max(max(images.shape[3:]) for _, images in groups))
    row_height = max(images.shape[3] for _, images in groups) * scale + _NARROW
    line = 2 * _LETTER
    top = _WIDE + line * bool(title) + line * any(header for header, _ in groups)
    height = top + rows * row_height - _NARROW + _WIDE

    left = _WIDE
    texts = []  # x, y, text, alignment
    if row_labels:
        left += max(map(text_width, row_labels))
        for row, label in enumerate(row_labels):
            middle = top + row * row_height + (row_height - _NARROW) / 2
            texts.append((left, middle, label, "right"))
        left += _WIDE // 2
    placed = []  # x, y, pixels
    for header, images in groups:
        step = images.shape[4] * scale + _NARROW
        for column, of_rows in enumerate(_pixels(images, scale)):
            for row, pixels in enumerate(of_rows):
                space = row_height - _NARROW - pixels.shape[0]
                placed.append((left + column * step, top + row * row_height + space // 2, pixels))
        texts.append((left, top - line / 2, header, "left"))
        left += max(len(images) * step - _NARROW, text_width(header)) + _WIDE
    texts.append((_WIDE, _WIDE + _LETTER / 2, title, "left"))
    width = max(left, text_width(title) + 2 * _WIDE)

    canvas = np.full((height, width, 3), 255, np.uint8)
    for x, y, pixels in placed:
        canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    figure.figimage(canvas, origin="upper")
    for x, y, text, alignment in texts:
        figure.text(
            x / width, 1 - y / height, text, font=font, color="black", parse_math=False,
            horizontalalignment=alignment, verticalalignment="center",
        )  # fmt: skip
    with replacing(Path(file)) as temporary, temporary.open("wb") as opened:
        FigureCanvasAgg(figure).print_png(opened)


def sample_grid(
    file: str | Path,
    samples: Tensor,
    *,
    cond: Tensor | None = None,
    real: Tensor | None = None,
    labels: Sequence[str] = (),
    stacked: bool = False,
    real_header: str = "real",
) -> None:
    """Writes a row for each condition: the condition, if it is an image, its samples, the real y.

    Args:
        samples: (draws, rows, C, H, W), shown as `as_images` says. Of one row without label and
            condition the draws fill rows of eight. Points (draws, rows, 2, 1, 1) are shown by
            `point_map`, all draws of a row in one image, and real then likewise.
        cond: images (rows, C, H, W).
        real: (rows, C, H, W), the true y.
        labels: one for each row, or none.
    """
    if samples.shape[2:] == POINT:
        samples = point_map(samples)[None]
        real = None if real is None else point_map(real[None])
    if cond is None and not labels and samples.shape[1] == 1:
        draws = as_images(samples)
        wide = min(8, len(draws))
        white = torch.ones(-len(draws) % wide, *draws.shape[1:])
        rows = torch.cat([draws, white]).unflatten(0, (-1, wide))[:, :, 0]
        image_grid(file, [("", rows.transpose(0, 1))])
        return
    groups = [("samples", as_images(samples, cond, stacked=stacked))]
    if cond is not None:
        groups.insert(0, ("condition", as_images(cond)[None]))
    if real is not None:
        groups.append((real_header, as_images(real, cond, stacked=stacked)[None]))
    image_grid(file, groups, row_labels=labels)


def point_map(points: Tensor) -> Tensor:
    """Where points (draws, rows, 2, 1, 1) lie: an image (rows, 1, 64, 64) of each row, in [-1, 1].

    It shows the square [-1.25, 1.25]^2, the second coordinate upwards. White is where no point is,
    black where there are three times as many as in the mean of the places that have any.
    """
    places = ((points.flatten(2).double() / 1.25 + 1) * (_SIDE / 2)).floor().long()
    inside = ((places >= 0) & (places < _SIDE)).all(2)
    rows = torch.arange(points.shape[1], device=points.device).expand_as(inside)
    across, down = places[..., 0], _SIDE - 1 - places[..., 1]
    cells = ((rows * _SIDE + down) * _SIDE + across)[inside]
    counts = torch.bincount(cells, minlength=points.shape[1] * _SIDE**2)
    counts = counts.view(-1, 1, _SIDE, _SIDE).double()
    mean = counts.sum((2, 3), keepdim=True) / (counts > 0).sum((2, 3), keepdim=True).clamp_min(1)
    return (1 - 2 * (counts / (3 * mean.clamp_min(1))).clamp_max(1)).float().cpu()


def as_images(y: Tensor, cond: Tensor | None = None, *, stacked: bool = False) -> Tensor:
    """What to show of y (..., C, H, W): images with 1 or 3 channels.

    Two channels are the colors ab of the luminance cond (..., 1, H, W) of `cgm.data.lab_to_rgb`.
    stacked: y is the part of an image below cond. The leading dimensions of cond may be broadcast.
    """
    if stacked and cond is not None:
        upper = cond.expand(*y.shape[:-3], *cond.shape[-3:])
        return torch.cat([upper, y], -2)
    if y.shape[-3] == 2 and cond is not None:
        luminance = cond.expand(*y.shape[:-3], *cond.shape[-3:])
        return lab_to_rgb(luminance.flatten(0, -4), y.flatten(0, -4)).unflatten(0, y.shape[:-3])
    return y


def write_image(file: str | Path, image: Tensor) -> None:
    """Writes an image (1 or 3, H, W) in [-1, 1] as a PNG, pixel by pixel."""
    with replacing(Path(file)) as temporary:
        Image.fromarray(_pixels(image[None, None], 1)[0, 0]).save(temporary, "PNG")


def _pixels(images: Tensor, scale: int) -> np.ndarray:
    """(columns, rows, H scale, W scale, 3) uint8."""
    levels = ((images.float().cpu().nan_to_num(-1.0) + 1) * 127.5).round().clamp(0, 255)
    rgb = levels.to(torch.uint8).expand(-1, -1, 3, -1, -1).movedim(2, -1).numpy()
    return rgb.repeat(scale, axis=2).repeat(scale, axis=3)
