"""Folders of the user's own images.

layout       what path holds                                       y         cond
pairs        images, each with A on the left and B on the right  B         A
two_folders  folders A and B, equal names (extensions may differ)  B         A
unpaired     folders A and B, unrelated                            B         some image of A
classes      one folder per class, numbered in natural order: 2, 10  images  class ids

Direction "AtoB" makes B from A, as in the table, and "BtoA" makes A from B. The folders A and B are
path/A and path/B; if there is no folder path, they are pathA and pathB: "horse2zebra/train" means
horse2zebra/trainA and horse2zebra/trainB.

An image is what a viewer shows: turned as its EXIF orientation says, transparent parts over white,
16 bits scaled to 8, CMYK and palettes as RGB. Color profiles are not applied. It is resized to
size x size without regard to its proportions (bicubic, antialiased). All are read before the data
set is returned and are held in memory as uint8: N x channels x size x size bytes for each side.
Random crops and mirror images are taken later, anew in each epoch, by `Dataset.batch`.

Read are BMP, JPEG, PNG and WebP of at most 2^26 pixels (8192 x 8192), whatever a few bytes unpack
to. Refused, by name, are images of other formats (TIFF, GIF, HEIC, ..), animated ones, broken
links, and 16-bit ones whose values end below 4096, which are of 12 bits and would come out black.
Names that begin with a dot, files that are no images and deeper folders are passed over.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from cgkernels.checks import check_choice
from cgm.data.dataset import Dataset

LAYOUTS = ("pairs", "two_folders", "unpaired", "classes")
DIRECTIONS = ("AtoB", "BtoA")
EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
# Images that are not read, and so not passed over in silence.
OTHERS = (
    ".avif", ".dng", ".exr", ".gif", ".hdr", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl",
    ".pgm", ".pnm", ".ppm", ".psd", ".tga", ".tif", ".tiff",
)  # fmt: skip
MOST_PIXELS = 2**26
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
    folders = sorted(
        (p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")), key=_natural
    )
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


def _natural(path: Path) -> tuple[list[tuple[bool, int, str]], str]:
    """Order in which numbers in names count as numbers: 2 before 10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", path.name)
    return [(False, int(p), "") if p.isdecimal() else (True, 0, p) for p in parts], path.name


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, by name; ValueError if there are none, or one cannot be read."""
    _check_folder(folder)
    files = []
    for file in sorted(folder.iterdir()):
        suffix = file.suffix.lower()
        if suffix not in EXTENSIONS + OTHERS or file.name.startswith(".") or file.is_dir():
            continue
        if suffix in OTHERS:
            raise ValueError(
                f"{file}: must be of {' '.join(EXTENSIONS)}, others are not read: convert it, or "
                "move it elsewhere"
            )
        if not file.is_file():
            raise ValueError(f"{file}: must be a file, is a broken link, a pipe or a device")
        files.append(file)
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
    if not file.is_file():  # a pipe would wait
        raise ValueError(f"{file}: {'must be a file' if file.exists() else 'is missing'}")
    try:
        with warnings.catch_warnings():
            # Its own, higher limit of Pillow.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=_FORMATS) as opened:
                return _decoded(opened).convert("L" if channels == 1 else "RGB")
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{file}: cannot be read as an image: must be a BMP, JPEG, PNG or WebP"
        ) from error
    # Decoders meet broken data with OSError, SyntaxError, struct.error and more.
    except Exception as error:
        raise ValueError(f"{file}: cannot be read as an image ({error})") from error


def _decoded(opened: ImageFile.ImageFile) -> Image.Image:
    """Upright, of 8 bits, transparent parts over white; nothing is decoded that is refused."""
    width, height = opened.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"must have at most {MOST_PIXELS} pixels, has {width} x {height}")
    # A JPEG with several images has one to show, and what cameras add to it.
    frames = getattr(opened, "n_frames", 1)
    if opened.format in ("PNG", "WEBP") and frames > 1:
        raise ValueError(f"must be one image, is an animation of {frames}")
    # Pillow keeps the high bytes of 16-bit colors.
    high_bytes = any("16B" in str(tile[3]) for tile in opened.tile) and opened.mode[0] != "I"
    opened.load()
    image = ImageOps.exif_transpose(opened)
    if image.mode[0] == "I" or high_bytes:
        levels = np.asarray(image)
        if image.getbands()[-1] == "A":
            levels = levels[..., :-1]
        if 0 < levels.max() < (16 if high_bytes else 4096):
            raise ValueError("must use its 16 bits: no value is above 4095, multiply them by 16")
    return _to_eight_bits(image)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Without transparency and without 16-bit gray, which Pillow's convert would cut off at 255."""
    if image.mode[0] == "I":
        levels = np.asarray(image).astype(np.int64)
        gray = (levels * 255 + 32767) // 65535
        return Image.fromarray(
            np.where(levels == image.info.get("transparency", -1), 255, gray).astype(np.uint8)
        )
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
