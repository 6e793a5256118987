"""Folders of the user's own images.

layout       what path holds                                       y         cond
pairs        images, each with A on the left and B on the right  B         A
two_folders  folders A and B, equal names (extensions may differ)  B         A
unpaired     folders A and B, unrelated                            B         some image of A
classes      one folder per class, numbered in order of its name   images  class ids

Direction "AtoB" makes B from A, as in the table, and "BtoA" makes A from B. The folders A and B are
path/A and path/B; if there is no folder path, they are pathA and pathB: "horse2zebra/train" means
horse2zebra/trainA and horse2zebra/trainB.

An image is what a viewer shows: turned as its EXIF orientation says, transparent parts over white,
16-bit gray scaled to 8 bits, CMYK and palettes as RGB. Color profiles are not applied. It is
resized to size x size without regard to its proportions (bicubic, antialiased). All are read before
the data set is returned and are held in memory as uint8: N x channels x size x size bytes for each
side. Names that begin with a dot, other extensions and deeper folders are passed over. Random crops
and mirror images are taken later, anew in each epoch, by `Dataset.batch`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cgkernels.checks import check_choice
from cgm.data.dataset import Dataset

LAYOUTS = ("pairs", "two_folders", "unpaired", "classes")
DIRECTIONS = ("AtoB", "BtoA")
EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_Item = TypeVar("_Item")
_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")


def load_folder(
    path: str | Path,
    layout: str = "pairs",
    *,
    size: int = 64,
    channels: int = 3,
    cond_channels: int | None = None,
    direction: str = "AtoB",
    crop: int = 0,
    flip: bool = False,
) -> Dataset:
    """The images of a folder as a data set; layouts and reading as described above.

    size: side of the images in pixels. channels: 3 for RGB, 1 for gray. cond_channels: those of
    images that are conditions, default the same. direction: "AtoB" or
    "BtoA"; classes have none. crop: side of the square, at most size, that is taken somewhere out
    of an image; 0: none. flip: mirror half of the images. Every file is decoded here: one that
    cannot be read, an empty or missing folder, an image without its partner, a pair of two sizes
    or of odd width raises ValueError naming it.
    """
    path = Path(path)
    check_choice("layout", layout, LAYOUTS)
    check_choice("direction", direction, DIRECTIONS)
    check_choice("channels", channels, (1, 3))
    check_choice("cond_channels", cond_channels, (None, 1, 3))
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"size must be a positive whole number of pixels, got {size!r}")
    if not isinstance(crop, int) or isinstance(crop, bool) or not 0 <= crop <= size:
        raise ValueError(f"crop must be from 0, none, to size {size}, got {crop!r}")
    augmentation: dict[str, Any] = {"crop": crop, "flip": flip}
    if layout == "classes":
        if cond_channels is not None:
            raise ValueError(f"cond_channels must not be given for classes, got {cond_channels}")
        return dataclasses.replace(_load_classes(path, size, channels), **augmentation)
    load_sides = {"pairs": _load_pairs, "two_folders": _load_two, "unpaired": _load_unpaired}
    most = max(channels, cond_channels or channels)
    a, b = load_sides[layout](path, size, most)
    cond, y = (a, b) if direction == "AtoB" else (b, a)
    cond, y = _in_channels(cond, cond_channels or channels), _in_channels(y, channels)
    paired = layout != "unpaired"
    return Dataset(path.resolve().name, y, cond, "image", paired=paired, **augmentation)


def _in_channels(images: Tensor, channels: int) -> Tensor:
    """Images (N, C, H, W), or gray ones of them by the weights of ITU-R 601, as Pillow's."""
    if images.shape[1] == channels:
        return images
    weights = torch.tensor([19595, 38470, 7471]).view(3, 1, 1)
    return torch.stack([((x * weights).sum(0, keepdim=True) + 0x8000 >> 16).byte() for x in images])


def _load_pairs(path: Path, size: int, channels: int) -> tuple[Tensor, Tensor]:
    def halves(file: Path) -> np.ndarray:
        image = read_image(file, channels)
        width, height = image.size
        if width % 2:
            raise ValueError(f"{file}: two images side by side need an even width, got {width}")
        half = width // 2
        left = image.crop((0, 0, half, height))
        right = image.crop((half, 0, width, height))
        return np.stack([_planes(left, size), _planes(right, size)])

    a, b = _read_all(halves, image_files(path), (2, channels, size, size)).unbind(1)
    return a, b


def _load_two(path: Path, size: int, channels: int) -> tuple[Tensor, Tensor]:
    folder_a, folder_b = _sides(path)
    a, b = _by_stem(folder_a), _by_stem(folder_b)
    for stem in sorted(a.keys() ^ b.keys()):
        file, other = (a[stem], folder_b) if stem in a else (b[stem], folder_a)
        raise ValueError(f"{file}: no image of that name in {other}")

    def both(stem: str) -> np.ndarray:
        left, right = read_image(a[stem], channels), read_image(b[stem], channels)
        if left.size != right.size:
            raise ValueError(
                f"{a[stem]} is {left.width} x {left.height} pixels, but its partner {b[stem]} is "
                f"{right.width} x {right.height}"
            )
        return np.stack([_planes(left, size), _planes(right, size)])

    first, second = _read_all(both, sorted(a), (2, channels, size, size)).unbind(1)
    return first, second


def _load_unpaired(path: Path, size: int, channels: int) -> tuple[Tensor, Tensor]:
    a, b = (_load_plain(image_files(folder), size, channels) for folder in _sides(path))
    return a, b


def _load_classes(path: Path, size: int, channels: int) -> Dataset:
    _check_folder(path)
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise ValueError(f"{path}: no class folders in it")
    files = [image_files(folder) for folder in folders]
    y = _load_plain([file for group in files for file in group], size, channels)
    counts = torch.tensor([len(group) for group in files])
    labels = torch.arange(len(folders)).repeat_interleave(counts)
    names = tuple(folder.name for folder in folders)
    return Dataset(path.resolve().name, y, labels, "class", len(names), names)


def _load_plain(files: list[Path], size: int, channels: int) -> Tensor:
    shape = (channels, size, size)
    return _read_all(lambda file: _planes(read_image(file, channels), size), files, shape)


def _read_all(
    read: Callable[[_Item], np.ndarray], items: Sequence[_Item], shape: tuple[int, ...]
) -> Tensor:
    """read(item), of this shape, for every item: (N, *shape) uint8."""
    out = np.empty((len(items), *shape), np.uint8)
    # Threads suffice: Pillow gives up the interpreter lock while it decodes and resizes.
    with ThreadPoolExecutor() as pool:
        for row, pixels in zip(out, pool.map(read, items), strict=True):
            row[...] = pixels
    return torch.from_numpy(out)


def _sides(path: Path) -> tuple[Path, Path]:
    if path.is_dir():
        a, b = path / "A", path / "B"
        if not a.is_dir() and (path / "trainA").is_dir():
            raise ValueError(f"{path}: for its trainA and trainB pass {path / 'train'} as path")
        return a, b
    return path.with_name(path.name + "A"), path.with_name(path.name + "B")


def image_files(folder: Path) -> list[Path]:
    _check_folder(folder)
    files = sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".") and file.is_file()
    )
    if not files:
        raise ValueError(f"{folder}: no images ({' '.join(EXTENSIONS)}) in it")
    return files


def _by_stem(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for file in image_files(folder):
        if file.stem in files:
            raise ValueError(f"{file}: {files[file.stem].name} beside it has the same name")
        files[file.stem] = file
    return files


def read_image(file: Path, channels: int) -> Image.Image:
    """The whole image, upright, in mode L or RGB."""
    try:
        with Image.open(file, formats=_FORMATS) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            return _to_eight_bits(image).convert("L" if channels == 1 else "RGB")
    # Decoders meet broken data with OSError, SyntaxError, struct.error and more.
    except Exception as error:
        raise ValueError(f"{file}: cannot be read as an image ({error})") from error


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Without transparency and without 16-bit gray, which Pillow's convert would cut off at 255."""
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        return Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _planes(image: Image.Image, size: int) -> np.ndarray:
    """(C, size, size) uint8."""
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
