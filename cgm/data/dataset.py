"""A data set: rows of y with their conditions, held in memory."""

from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch import Tensor

from cgkernels.random import STREAM_DATA, uniform

# What the data draw, one step number of their stream each.
STEP_ORDER, STEP_PARTNER, STEP_AUGMENT, STEP_AUGMENT_PARTNER = 0, 1, 2, 3

# What a data set says of itself that the config of a model for it says too.
DATA_FIELDS = ("event_shape", "cond_kind", "cond_shape", "num_classes")

CondKind = Literal["none", "class", "image", "tokens"]


class Batch(TypedDict):
    """y (B, *event), and cond: None, class ids (B,), tokens (B, M) or images (B, C, H, W)."""

    y: Tensor
    cond: Tensor | None


@dataclass(frozen=True, eq=False)
class Dataset:
    """N rows of what is generated, y, and of what it is generated from, cond.

    Images are held as uint8 (a quarter of the memory) and become float32 in [-1, 1] in `batch`;
    float32 tensors pass unchanged. A wrong dtype, length or crop, a value that is not finite, and
    what looks like images (N, H, W, C), or float32 ones in [0, 255], raise ValueError or TypeError.
    """

    name: str
    y: Tensor  # (N, *event), uint8 or float32
    cond: Tensor | None = None  # class ids (N,) int64, tokens (N, M) int64, or (N, C, H, W) as y
    cond_kind: CondKind = "none"
    num_classes: int = 0  # number of classes, or of different tokens
    class_names: tuple[str, ...] = ()
    paired: bool = True  # False: rows of y and cond are unrelated, and need not be equally many
    crop: int = 0  # `batch` takes a square of this side out of each image, somewhere; 0: none
    flip: bool = False  # `batch` mirrors half of the images, left to right

    def __post_init__(self) -> None:
        for name in ("y", "cond"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) and (name, value) != ("cond", None):
                raise TypeError(
                    f"{name} must be a tensor, such as torch.from_numpy makes of an array, got "
                    f"{type(value).__name__}"
                )
        if self.y.dim() < 2 or len(self.y) == 0:
            raise ValueError(f"y must be (N, *event) with N > 0, got {tuple(self.y.shape)}")
        _check_pixels("y", self.y)
        self._check_augmentation()
        if self.cond is None:
            if self.cond_kind != "none":
                raise ValueError(f"cond must be given with cond_kind {self.cond_kind!r}")
            return
        dims = {"class": 1, "tokens": 2, "image": 4}
        if self.cond_kind not in dims:
            raise ValueError(f"cond_kind must be one of {', '.join(dims)}, got {self.cond_kind!r}")
        if self.cond.dim() != dims[self.cond_kind] or len(self.cond) == 0:
            raise ValueError(
                f"cond of kind {self.cond_kind!r} must have {dims[self.cond_kind]} dimensions and "
                f"a row, got {tuple(self.cond.shape)}"
            )
        if self.paired and len(self.cond) != len(self.y):
            raise ValueError(
                f"cond must have as many rows as y, {len(self.y)}, got {len(self.cond)}"
            )
        if self.cond_kind == "image":
            _check_pixels("cond", self.cond)
            return
        _check_dtype("cond", self.cond, torch.int64)
        low, high = (int(v) for v in self.cond.aminmax())
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"cond must be in [0, num_classes = {self.num_classes}), got {low} to {high}"
            )
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"class_names must be {self.num_classes} names, got {len(self.class_names)}"
            )

    def _check_augmentation(self) -> None:
        if isinstance(self.crop, bool) or not isinstance(self.crop, int) or self.crop < 0:
            raise ValueError(f"crop must be a side in pixels, or 0 for none, got {self.crop!r}")
        if not self.augmented:
            return
        if self.y.dim() != 4:
            raise ValueError(
                f"crop and flip are for images (N, C, H, W), got y {tuple(self.y.shape)}"
            )
        sides = [self.y.shape[2:]]
        if self.cond is not None and self.cond_kind == "image" and self.cond.dim() == 4:
            sides.append(self.cond.shape[2:])
            if self.paired and sides[0] != sides[1]:
                raise ValueError(
                    "crop and flip need pairs of one size, got y "
                    f"{tuple(self.y.shape)} and cond {tuple(self.cond.shape)}"
                )
        if self.crop > min(map(min, sides)):
            raise ValueError(
                f"crop must be at most the side of the images, {min(map(min, sides))}, "
                f"got {self.crop}"
            )

    def __len__(self) -> int:
        """Number of rows of y."""
        return len(self.y)

    @property
    def augmented(self) -> bool:
        """Whether `batch` crops or mirrors."""
        return self.crop > 0 or self.flip

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one y, as `batch` gives it."""
        return self._cropped(self.y)

    @property
    def cond_shape(self) -> tuple[int, ...]:
        """Shape of one condition, as `batch` gives it; () for a class id or none."""
        if self.cond is None or self.cond_kind != "image":
            return () if self.cond is None else tuple(self.cond.shape[1:])
        return self._cropped(self.cond)

    def _cropped(self, images: Tensor) -> tuple[int, ...]:
        if self.crop:
            return images.shape[1], self.crop, self.crop
        return tuple(images.shape[1:])

    def batch(self, rows: Tensor, epoch: int = 0) -> Batch:
        """The rows (B,) int64 of y and their conditions.

        Of unpaired data, row r comes with the condition floor(M u), u uniform and a function of
        (r, epoch): each epoch draws other partners. So are the place of the crop, at pixel
        floor((side - crop + 1) u) of each side, and whether the image is mirrored, u < 1/2: the
        same for the two images of a pair, and for those of unpaired data each its own.
        """
        if rows.dtype != torch.int64 or rows.dim() != 1:
            raise TypeError(f"rows must be int64 (B,), got {rows.dtype} {tuple(rows.shape)}")
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise ValueError(
                f"rows must be in [0, {len(self)}), got {int(rows.min())} to {int(rows.max())}"
            )
        y = self._images(self.y, rows, rows, epoch, STEP_AUGMENT)
        if self.cond is None:
            return {"y": y, "cond": None}
        partners, step = rows, STEP_AUGMENT
        if not self.paired:
            u = _row_uniform(rows, 0, epoch, STEP_PARTNER)
            partners, step = (u * len(self.cond)).long(), STEP_AUGMENT_PARTNER
        if self.cond_kind == "image":
            return {"y": y, "cond": self._images(self.cond, partners, rows, epoch, step)}
        return {"y": y, "cond": self.cond[partners]}

    def _images(self, images: Tensor, taken: Tensor, rows: Tensor, epoch: int, step: int) -> Tensor:
        """The images `taken` for these rows, cropped and mirrored as the noise of a row says."""
        if not self.augmented:
            return to_float(images[taken])
        u = _row_uniform(rows, 0, epoch, step, 3)
        height, width = images.shape[2:]
        high, wide = (self.crop, self.crop) if self.crop else (height, width)
        down = (u[:, :1] * (height - high + 1)).long() + torch.arange(high)
        across = (u[:, 1:2] * (width - wide + 1)).long() + torch.arange(wide)
        if self.flip:
            across = torch.where(u[:, 2:] < 0.5, across.flip(1), across)
        # One gather in place of a loop: (B, h, w, C), the indexed dimensions first.
        cut = images[taken[:, None, None], :, down[:, :, None], across[:, None]]
        return to_float(cut.movedim(3, 1).contiguous())


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """A permutation of 0 .. n - 1, int64: a function of (n, seed, epoch) and of nothing else.

    The order of the Philox uniforms of the rows; training that resumes finds the same order again.
    """
    if n < 0 or epoch < 0:
        raise ValueError(f"n and epoch must not be negative, got {n} and {epoch}")
    return _row_uniform(torch.arange(n), seed, epoch, STEP_ORDER).argsort(stable=True)


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]: v / 127.5 - 1. Other dtypes pass unchanged."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def _row_uniform(rows: Tensor, seed: int, epoch: int, step: int, *event: int) -> Tensor:
    """float64 uniforms (B, *event), a function of (row, seed, epoch) and of the use, step."""
    return uniform(
        (len(rows), *event),
        seed=seed,
        index=rows + epoch * 2**32,
        step=step,
        stream=STREAM_DATA,
        dtype=torch.float64,
    )


def _check_pixels(name: str, pixels: Tensor) -> None:
    _check_dtype(name, pixels, torch.uint8, torch.float32)
    floating = pixels.is_floating_point()
    if floating and not (finite := pixels.isfinite()).all():
        row = int((~finite).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"{name} must be finite, got row {row} with values that are not")
    if pixels.dim() != 4:
        return
    _, channels, height, width = pixels.shape
    if channels > 4 and height > 4 and width in (1, 3, 4) and (channels == height or not floating):
        raise ValueError(
            f"{name} must be (N, C, H, W), got {tuple(pixels.shape)}, which looks like "
            f"(N, H, W, C): pass {name}.movedim(3, 1)"
        )
    if floating and channels in (1, 3, 4) and height * width > 1:
        low, high = (float(v) for v in pixels.aminmax())
        if low >= 0 and high > 2:
            raise ValueError(
                f"{name} must be in [-1, 1] if float32, got values from {low:g} to {high:g}: pass "
                "images in [0, 255] as uint8"
            )


def _check_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
