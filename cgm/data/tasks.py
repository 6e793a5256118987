"""The tasks: four on the shipped images, and three on data drawn by `cgm.data.synthetic`.

class_to_image   class id                     -> image (1, 28, 28)
complete         upper half (1, 14, 28)       -> lower half (1, 14, 28)
colorize         luminance (1, 28, 28)        -> ab colors (2, 28, 28), T-shirts and tops only
edges_to_image   binary edge map (1, 28, 28)  -> image (1, 28, 28)
bouncing_ball    frame (3, 12, 12)            -> the next frame (3, 12, 12)
two_moons        class id                     -> point (2, 1, 1)
eight_gaussians  nothing                      -> point (2, 1, 1)

colorize is made so that p(y | x) is known exactly: with m = garment_mask(x), y is m TEAL with
probability 1/2 and m PINK with probability 1/2, one color for the whole garment. Every garment is
in the data twice, first all in teal and then all in pink: were each there in one drawn color only,
a model could learn which by heart. y = 1 is AB_UNIT units of CIELAB's a or b.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cgkernels.checks import check_choice
from cgm.data import fashion, synthetic
from cgm.data.dataset import Dataset, to_float

AB_UNIT = 50.0
TEAL = (-0.8, -0.2)  # (a, b) of y
PINK = (0.9, -0.1)
LIGHTEST = 75.0  # L* of a white pixel: both colors can still be told apart there
GARMENT_LEVEL = 12  # darker pixels, of 0 .. 255, are background
EDGE_SLOPE = 240  # in the units of the Sobel sums below: a step of s gray levels gives 4 s


def load_task(name: str, split: str = "train") -> Dataset:
    """The data of a task.

    name: one of TASKS. split: "train", 900 of the shipped images per class or 10,000 rows of what
    is drawn, or "test", 100 per class or 2,000. Any other raises ValueError.
    """
    if name in _SYNTHETIC:
        return _SYNTHETIC[name](split)
    check_choice("name", name, TASKS)
    rows = fashion.rows_of(split)
    images, labels = fashion.read()
    return _MAKERS[name](images[rows], labels[rows])


def garment_mask(luminance: Tensor) -> Tensor:
    """Where the garment is, bool: luminance in [-1, 1] above gray level 12 of 255."""
    return luminance > (GARMENT_LEVEL + 0.5) / 127.5 - 1


def edge_map(images: Tensor) -> Tensor:
    """Edges of images (N, 1, H, W) uint8, as uint8 0 or 255.

    sqrt(gx^2 + gy^2) > 240 with the 3 x 3 Sobel sums gx, gy of the gray levels and the border
    continued. These are integers that float32 holds exactly: the map is the same everywhere.
    """
    p = F.pad(images.float(), (1, 1, 1, 1), mode="replicate")
    down = p[..., :-2, :] + 2 * p[..., 1:-1, :] + p[..., 2:, :]
    across = p[..., :-2] + 2 * p[..., 1:-1] + p[..., 2:]
    gx = down[..., 2:] - down[..., :-2]
    gy = across[..., 2:, :] - across[..., :-2, :]
    return (gx.square() + gy.square() > EDGE_SLOPE**2).to(torch.uint8) * 255


def lab_to_rgb(luminance: Tensor, ab: Tensor) -> Tensor:
    """sRGB images (B, 3, H, W) in [-1, 1], of luminance (B, 1, H, W) and ab (B, 2, H, W).

    L* = 75 (luminance + 1) / 2, a* and b* = 50 ab; CIELAB of white D65, cut off where sRGB ends.
    """
    fy = (LIGHTEST * (luminance + 1) / 2 + 16) / 116
    f = torch.cat([fy + AB_UNIT * ab[:, :1] / 500, fy, fy - AB_UNIT * ab[:, 1:] / 200], 1)
    xyz = torch.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    xyz = xyz * xyz.new_tensor([0.95047, 1.0, 1.08883]).view(3, 1, 1)
    to_linear = xyz.new_tensor(
        [[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]]
    )
    linear = torch.einsum("ij,bjhw->bihw", to_linear, xyz).clamp(0, 1)
    rgb = torch.where(
        linear > 0.0031308, 1.055 * linear.clamp_min(0.0031308) ** (1 / 2.4) - 0.055, 12.92 * linear
    )
    return 2 * rgb.clamp(0, 1) - 1


def _class_to_image(images: Tensor, labels: Tensor) -> Dataset:
    names = fashion.CLASS_NAMES
    return Dataset("class_to_image", images, labels, "class", len(names), names)


def _complete(images: Tensor, labels: Tensor) -> Dataset:
    upper, lower = images.chunk(2, dim=2)
    return Dataset("complete", lower, upper, "image")


def _colorize(images: Tensor, labels: Tensor) -> Dataset:
    luminance = images[labels == 0]
    mask = garment_mask(to_float(luminance))
    ab = torch.cat([mask * torch.tensor(color)[:, None, None] for color in (TEAL, PINK)])
    return Dataset("colorize", ab, luminance.repeat(2, 1, 1, 1), "image")


def _edges_to_image(images: Tensor, labels: Tensor) -> Dataset:
    return Dataset("edges_to_image", images, edge_map(images), "image")


_MAKERS: dict[str, Callable[[Tensor, Tensor], Dataset]] = {
    "class_to_image": _class_to_image,
    "complete": _complete,
    "colorize": _colorize,
    "edges_to_image": _edges_to_image,
}
_SYNTHETIC: dict[str, Callable[[str], Dataset]] = {
    "bouncing_ball": synthetic.bouncing_ball,
    "two_moons": synthetic.two_moons,
    "eight_gaussians": synthetic.eight_gaussians,
}
TASKS = (*_MAKERS, *_SYNTHETIC)
