"""Data that are drawn here, so that the truth about them is known: two sets of points, and a ball.

eight_gaussians   a point (2, 1, 1), of no condition: eight Gaussians on a circle, equally likely
two_moons         moon, a class id -> a point (2, 1, 1) on that half circle, blurred
bouncing_ball     a frame (3, 12, 12) -> the next one, of a ball whose velocity no frame shows

Everything is a function of the split and of the row: the test rows are the ones after those of
training. Densities are exact, per unit of area. `digits` are images that no model is trained on.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cgkernels.random import STREAM_DATA, normal, uniform
from cgm.data.dataset import Dataset

ROWS = {"train": (0, 10_000), "test": (10_000, 2_000)}  # first row, and how many
_STEP_NOISE, _STEP_CHOICE = 4, 5  # of the data's stream; `cgm.data.dataset` has those before

# Points -------------------------------------------------------------------------------------------
GAUSSIANS, CIRCLE, GAUSSIAN_SIGMA = 8, 0.75, 0.06
MOON_CENTERS = ((-0.25, -0.1), (0.25, 0.1))  # of the upper and the lower half circle
MOON_RADIUS, MOON_SIGMA = 0.5, 0.05


def gaussian_centers() -> Tensor:
    """The centers (8, 2), float64."""
    angle = torch.arange(GAUSSIANS, dtype=torch.float64) * (2 * math.pi / GAUSSIANS)
    return CIRCLE * torch.stack([angle.cos(), angle.sin()], 1)


def eight_gaussians(split: str = "train") -> Dataset:
    """Points 0.75 (cos(k pi / 4), sin(k pi / 4)) + 0.06 z, k of 0 .. 7 equally likely."""
    rows = _rows(split)
    which = (_uniform(rows, 1) * GAUSSIANS).long()[:, 0]
    return Dataset("eight_gaussians", _points(gaussian_centers()[which], GAUSSIAN_SIGMA, rows))


def eight_gaussians_log_prob(points: Tensor) -> Tensor:
    """log p in nats, (N,) float64, of points (N, 2, 1, 1)."""
    offsets = points.double().flatten(1)[:, None] - gaussian_centers().to(points.device)
    exponents = -offsets.square().sum(2) / (2 * GAUSSIAN_SIGMA**2)
    return exponents.logsumexp(1) - math.log(GAUSSIANS * 2 * math.pi * GAUSSIAN_SIGMA**2)


def two_moons(split: str = "train") -> Dataset:
    """Points at the angle pi u and the radius 0.5 + 0.05 z about the center of their moon.

    The first moon is the upper half of its circle, the second the lower half of the other.
    """
    rows = _rows(split)
    u = _uniform(rows, 2)
    moon = (u[:, 0] * 2).long()
    angle = math.pi * (u[:, 1] + moon)
    radius = MOON_RADIUS + MOON_SIGMA * _normal(rows, 1)[:, 0]
    offsets = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    points = torch.tensor(MOON_CENTERS, dtype=torch.float64)[moon] + offsets
    names = ("upper", "lower")
    y = points.float()[:, :, None, None]
    return Dataset("two_moons", y, moon, "class", len(names), names)


def two_moons_log_prob(points: Tensor, moon: Tensor) -> Tensor:
    """log p(point | moon) in nats, (N,) float64, of points (N, 2, 1, 1) and moons (N,).

    p = N(r; 0.5, 0.05^2) / (pi r) at the radius r on the side of the moon, else 0: its logarithm
    is -inf there. (A radius below 0 would be ten standard deviations off.)
    """
    centers = torch.tensor(MOON_CENTERS, dtype=torch.float64, device=points.device)
    x, y = (points.double().flatten(1) - centers[moon]).unbind(1)
    radius = torch.hypot(x, y)
    normalized = (radius - MOON_RADIUS) / MOON_SIGMA
    log_radial = -normalized.square() / 2 - math.log(MOON_SIGMA * math.sqrt(2 * math.pi))
    inside = torch.where(moon == 0, y >= 0, y <= 0)
    log_prob = log_radial - math.log(math.pi) - radius.log()
    return log_prob.masked_fill(~inside, -math.inf)


def _points(centers: Tensor, sigma: float, rows: Tensor) -> Tensor:
    return (centers + sigma * _normal(rows, 2)).float()[:, :, None, None]


# The ball -----------------------------------------------------------------------------------------
SIDE, BALL_SIGMA, SPEED = 12, 0.8, 2.0  # in pixels
NEAREST, FARTHEST = 1.0, 10.0  # where the center of the ball turns back
_FIRST, _LAST = 2.0, 9.0  # between these it starts


@dataclass(frozen=True, eq=False)
class Balls:
    """Frames, and what they were made of: what a model of them should find."""

    before: Tensor  # (N, 3, 12, 12) in [-1, 1]
    after: Tensor  # (N, 3, 12, 12)
    position: Tensor  # (N, 2) of the first frame: across and down, in pixels
    velocity: Tensor  # (N, 2), pixels a frame
    color: Tensor  # (N, 3) in [0, 1]
    bounced: Tensor  # (N,) whether it met a wall


def balls(split: str = "train") -> Balls:
    """A ball of some color, somewhere, that goes 2 pixels in some direction.

    frame = 2 color exp(-|pixel - position|^2 / (2 0.8^2)) - 1, the position uniform in [2, 9]^2,
    the angle of the velocity uniform, each part of the color in [0.3, 1]. The center is
    reflected at 1 and at 10.
    """
    rows = _rows(split)
    u = _uniform(rows, 6)
    position = _FIRST + (_LAST - _FIRST) * u[:, :2]
    angle = 2 * math.pi * u[:, 2]
    velocity = SPEED * torch.stack([angle.cos(), angle.sin()], 1)
    color = 0.3 + 0.7 * u[:, 3:]
    free = position + velocity
    turned = torch.where(free < NEAREST, 2 * NEAREST - free, free)
    turned = torch.where(free > FARTHEST, 2 * FARTHEST - free, turned)
    return Balls(
        _frames(position, color),
        _frames(turned, color),
        position,
        velocity,
        color,
        (turned != free).any(1),
    )


def bouncing_ball(split: str = "train") -> Dataset:
    """The next frame from this one: see `balls`."""
    drawn = balls(split)
    return Dataset("bouncing_ball", drawn.after, drawn.before, "image")


def _frames(position: Tensor, color: Tensor) -> Tensor:
    grid = torch.arange(SIDE, dtype=torch.float64)
    across, down = (
        torch.exp(-(grid - position[:, i : i + 1]).square() / (2 * BALL_SIGMA**2)) for i in (0, 1)
    )
    light = down[:, :, None] * across[:, None]
    return (2 * color[:, :, None, None] * light[:, None] - 1).float()


# Images that are no clothes -----------------------------------------------------------------------
# Ends of the strokes of a display of seven, across and down in [0, 1]; and the strokes of a digit.
_CORNERS = ((0, 0), (1, 0), (0, 0.5), (1, 0.5), (0, 1), (1, 1))
_STROKES = ((0, 1), (0, 2), (1, 3), (2, 3), (2, 4), (3, 5), (4, 5))
_DIGITS = ("0124567", "25", "02346", "02356", "1235", "01356", "013456", "025", "0123456", "012356")


def digits(n: int, seed: int = 0) -> Tensor:
    """Images (n, 1, 28, 28) in [-1, 1] that look like written digits: strokes, white on black.

    Digit i mod 10 of seven strokes, whose height, width, slant, thickness and place vary.
    """
    u = _uniform(torch.arange(n), 6, seed)
    height, width = 14 + 6 * u[:, 0], 6 + 5 * u[:, 1]
    slant, thickness = 0.3 * u[:, 2] - 0.05, 1.0 + 0.8 * u[:, 3]
    middle = 13.5 + 3 * (u[:, 4:] - 0.5)
    corners = torch.tensor(_CORNERS, dtype=torch.float64)[None] - 0.5
    down = corners[..., 1] * height[:, None]
    across = corners[..., 0] * width[:, None] - slant[:, None] * down
    points = torch.stack([across, down], 2) + middle[:, None]
    grid = torch.arange(28, dtype=torch.float64)
    pixels = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1)
    nearest = torch.full((n, 28, 28), math.inf, dtype=torch.float64)
    for number, (a, b) in enumerate(_STROKES):
        drawn = torch.tensor([str(number) in digit for digit in _DIGITS])[torch.arange(n) % 10]
        start, along = points[:, a, None, None], (points[:, b] - points[:, a])[:, None, None]
        offset = pixels - start
        t = ((offset * along).sum(-1) / along.square().sum(-1)).clamp(0, 1)
        distance = (offset - t[..., None] * along).norm(dim=-1)
        distance = distance.masked_fill(~drawn[:, None, None], math.inf)
        nearest = torch.minimum(nearest, distance)
    light = (thickness[:, None, None] + 0.5 - nearest).clamp(0, 1)
    return (2 * light - 1).float()[:, None]


# Noise of rows ------------------------------------------------------------------------------------
def _rows(split: str) -> Tensor:
    if split not in ROWS:
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    first, count = ROWS[split]
    return torch.arange(first, first + count)


def _normal(rows: Tensor, event: int) -> Tensor:
    shape = (len(rows), event)
    return normal(
        shape, seed=0, index=rows, step=_STEP_NOISE, stream=STREAM_DATA, dtype=torch.float64
    )


def _uniform(rows: Tensor, event: int, seed: int = 0) -> Tensor:
    shape = (len(rows), event)
    return uniform(
        shape, seed=seed, index=rows, step=_STEP_CHOICE, stream=STREAM_DATA, dtype=torch.float64
    )
