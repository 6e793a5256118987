"""What samples are worth where the truth is known: colors of garments, points, a ball.

Source   energy distance and its permutation test: Szekely, Rizzo, "Testing for equal distributions
         in high dimension", InterStat 2004.
"""

import math

import torch
from torch import Tensor

from cgkernels.random import STREAM_DATA, uniform
from cgm.data.synthetic import (
    GAUSSIAN_SIGMA,
    MOON_CENTERS,
    MOON_RADIUS,
    MOON_SIGMA,
    SIDE,
    gaussian_centers,
)
from cgm.data.tasks import PINK, TEAL, garment_mask

Scores = dict[str, float]
_NEAR = 0.2  # a garment is of a color if its pixels are this near on average, of 1 = to gray
_STEP_PERMUTATION = 6  # of the data's stream
_SEEN = 0.3  # of the brightest pixel: what counts as the ball


# Colors -------------------------------------------------------------------------------------------
def color_scores(samples: Tensor, luminance: Tensor) -> Scores:
    """Of garments colored n times each: samples (n, B, 2, H, W), luminance (B, 1, H, W).

    With s the place of a color on the line from teal, -1, to pink, 1, and means over the garment:

    chroma        mean |s|; truth 1, gray 0
    consistency   |mean sign(s)|; truth 1, each pixel for itself about sqrt(2 / (pi pixels))
    teal, pink    share of samples whose mean distance to that color is below 0.2 of the way to
                  gray; truth 1/2 each
    background    mean chroma off the garment, as a share of that of the two colors; truth 0
    best of n     mean over garments and colors of the smallest distance of a sample, likewise;
                  truth 0 for several samples, and 2 (1/2)^n if all are right
    calibration error  root mean square, over garments, of the share of pink among its samples, by
                  the mean of s, less 1/2; 1 / (2 sqrt(n)) of the truth itself, 1/2 of a model that
                  has one answer
    """
    if samples.dim() != 5 or samples.shape[1:3] != (len(luminance), 2):
        raise ValueError(
            f"samples must be (n, {len(luminance)}, 2, H, W), got {tuple(samples.shape)}"
        )
    samples = samples.double()
    mask = garment_mask(luminance).expand(-1, 2, -1, -1)[:, 0].double()
    pixels, rest = mask.sum((1, 2)), (1 - mask).sum((1, 2))
    if not len(samples) or not (pixels > 0).all():
        raise ValueError("samples must be some, and every luminance must show a garment")
    colors = torch.tensor([TEAL, PINK], dtype=torch.float64, device=samples.device)
    middle, half = colors.mean(0), (colors[1] - colors[0]) / 2
    s = ((samples - middle[:, None, None]) * half[:, None, None]).sum(2) / half.square().sum()

    def over(values: Tensor, where: Tensor, count: Tensor) -> Tensor:
        return (values * where).sum((2, 3)) / count.clamp_min(1)

    distances = torch.stack(
        [
            over((samples - color[:, None, None]).norm(dim=2), mask, pixels) / half.norm()
            for color in colors
        ]
    )  # (2, n, B)
    near = (distances < _NEAR).double().mean((1, 2)).tolist()
    pink = (over(s, mask, pixels) > 0).double().mean(0)
    chroma = samples.norm(dim=2) / colors.norm(dim=1).mean()
    return {
        "chroma": over(s.abs(), mask, pixels).mean().item(),
        "consistency": over(s.sign(), mask, pixels).abs().mean().item(),
        "teal": near[0],
        "pink": near[1],
        "background": over(chroma, 1 - mask, rest).mean().item(),
        "best of n": distances.amin(1).mean().item(),
        "calibration error": (pink - 0.5).square().mean().sqrt().item(),
    }


# Points -------------------------------------------------------------------------------------------
def energy_test(a: Tensor, b: Tensor, *, permutations: int = 199, seed: int = 0) -> float:
    """p-value of the energy test that the rows of a (N, *) and of b (M, *) have one distribution.

    E = 2 mean|a - b| - mean|a - a'| - mean|b - b'|, ranked among those of as many random divisions
    of all rows; the smallest p is 1 / (permutations + 1). Memory grows with (N + M)^2.
    """
    n, m = len(a), len(b)
    if n < 2 or m < 2:
        raise ValueError(f"a and b must have two rows or more, got {n} and {m}")
    both = torch.cat([a, b]).double().flatten(1)
    distances = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist")
    u = uniform(
        (permutations, n + m), seed=seed, step=_STEP_PERMUTATION, stream=STREAM_DATA,
        dtype=torch.float64, device=both.device,
    )  # fmt: skip
    first = torch.zeros(permutations + 1, n + m, dtype=torch.float64, device=both.device)
    first[0, :n] = 1
    first[1:].scatter_(1, u.argsort(1)[:, :n], 1.0)
    # With weights 1/n on the one part and -1/m on the other, E = - w D w.
    weights = first / n - (1 - first) / m
    energy = -((weights @ distances) * weights).sum(1)
    # The same division can come again: rounding must not rank it.
    return (energy >= energy[0] * (1 - 1e-9)).double().mean().item()


def gaussian_scores(points: Tensor, truth: Tensor) -> Scores:
    """Of points (N, 2, 1, 1) drawn of the eight Gaussians, and as many true ones.

    p-value         of `energy_test`
    least share     the smallest share of a Gaussian times 8; truth about 1
    on a Gaussian   share within 3 sigma of a center; truth 0.989
    """
    distances = torch.cdist(
        points.double().flatten(1), gaussian_centers().to(points.device),
        compute_mode="donot_use_mm_for_euclid_dist",
    )  # fmt: skip
    nearest, which = distances.min(1)
    counts = torch.bincount(which, minlength=distances.shape[1]).double()
    return {
        "p-value": energy_test(points, truth),
        "least share": (counts.min() / counts.mean()).item(),
        "on a Gaussian": (nearest < 3 * GAUSSIAN_SIGMA).double().mean().item(),
    }


def moon_scores(points: Tensor, moon: Tensor, true: Tensor, true_moon: Tensor) -> Scores:
    """Of points (N, 2, 1, 1) drawn for moons (N,), and true points (M, 2, 1, 1) of moons (M,).

    p-value       of `energy_test`, with the moon as a third coordinate
    on its moon   share within 3 sigma of the half circle that was asked for, on its side of the
                  center; truth 0.997
    """

    def labeled(where: Tensor, which: Tensor) -> Tensor:
        return torch.cat([where.double().flatten(1), which.double()[:, None]], 1)

    centers = torch.tensor(MOON_CENTERS, dtype=torch.float64, device=points.device)[moon]
    x, y = (points.double().flatten(1) - centers).unbind(1)
    near = (torch.hypot(x, y) - MOON_RADIUS).abs() < 3 * MOON_SIGMA
    side = torch.where(moon == 0, y >= 0, y <= 0)
    return {
        "p-value": energy_test(labeled(points, moon), labeled(true, true_moon)),
        "on its moon": (near & side).double().mean().item(),
    }


# The ball -----------------------------------------------------------------------------------------
def centroids(frames: Tensor) -> Tensor:
    """Where the ball is, (B, 2) across and down in pixels, of frames (B, 3, 12, 12).

    The mean place of what is brighter than 0.3 of the brightest pixel, weighted by its light.
    """
    light = (frames.double().mean(1) + 1).clamp_min(0)
    light = light * (light > _SEEN * light.amax((1, 2), keepdim=True))
    total = light.sum((1, 2)).clamp_min(torch.finfo(torch.float64).tiny)
    grid = torch.arange(SIDE, dtype=torch.float64, device=frames.device)
    across, down = (light.sum(1) @ grid) / total, (light.sum(2) @ grid) / total
    return torch.stack([across, down], 1)


def ball_scores(samples: Tensor, before: Tensor, position: Tensor) -> Scores:
    """Of next frames (n, B, 3, 12, 12) of balls that meet no wall and were at `position` before.

    peak            mean light of the brightest pixel, as a share of that in the frame before;
                    truth about 1
    speed           mean distance that the ball went, in pixels; truth 2
    right speed     share that went 1.5 to 2.5
    least eighth    the smallest share of an eighth of the directions, times 8; truth about 1
    resultant       length of the mean direction; truth about 0
    """
    n, rows = samples.shape[:2]
    moved = centroids(samples.flatten(0, 1)).view(n, rows, 2) - position.to(samples.device)
    speed = moved.norm(dim=2)
    angle = torch.atan2(moved[..., 1], moved[..., 0])
    eighth = ((angle / (2 * math.pi) + 1) % 1 * 8).long().clamp(0, 7)
    shares = torch.bincount(eighth.flatten(), minlength=8).double() / (n * rows)
    light = (samples.double().mean(2).amax((2, 3)) + 1) / (before.double().mean(1).amax((1, 2)) + 1)
    return {
        "peak": light.mean().item(),
        "speed": speed.mean().item(),
        "right speed": ((speed > 1.5) & (speed < 2.5)).double().mean().item(),
        "least eighth": 8 * shares.min().item(),
        "resultant": torch.hypot(angle.cos().mean(), angle.sin().mean()).item(),
    }


def r_squared(features: Tensor, target: Tensor) -> float:
    """R^2 of the linear regression (with intercept) of target (N, k) from features (N, d).

    1 - residual / total, both summed over the k columns.
    """
    ones = torch.ones(len(features), 1, dtype=torch.float64, device=features.device)
    x = torch.cat([features.double(), ones], 1)
    y = target.double()
    fitted = x @ torch.linalg.lstsq(x, y).solution
    total = (y - y.mean(0)).square().sum()
    return (1 - (y - fitted).square().sum() / total).item()
