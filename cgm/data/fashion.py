"""Fashion-MNIST's 10,000 test images, which ship with the package (MIT, see the license beside).

The file is xz: the labels in published order, one byte each, then the images sorted by class
(stable) and stored column by column, 28 x 28 bytes each: 3,576,188 bytes, read in about 0.2 s. PNG
and lossless WebP mosaics in the same order take 3.80 MB. `python -m cgm.data.pack` makes it.

Source   H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking
         machine learning algorithms", arXiv:1708.07747.
"""

import functools
import lzma
from importlib import resources

import numpy as np
import torch
from torch import Tensor

FILE = "fashion_mnist.xz"
CLASS_NAMES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
SIDE = 28
HELD_OUT = 100  # images per class kept from training


@functools.cache
def read() -> tuple[Tensor, Tensor]:
    """Images (10000, 1, 28, 28) uint8 and labels (10000,) int64, in published order."""
    images, labels = unpack(resources.files("cgm.data").joinpath(FILE).read_bytes())
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()


def rows_of(split: str) -> Tensor:
    """Rows of a split, ascending: "test" is the last 100 of each class, "train" the others."""
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    labels = read()[1]
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(len(CLASS_NAMES)):
        held_out[(labels == label).nonzero()[-HELD_OUT:]] = True
    return (held_out if split == "test" else ~held_out).nonzero()[:, 0]


def pack(images: np.ndarray, labels: np.ndarray) -> bytes:
    """The file's bytes of images (N, 28, 28) and labels (N,), both uint8."""
    columns = images[np.argsort(labels, kind="stable")].transpose(0, 2, 1)
    # Four bits of context from the byte before suit gray levels better than text's three.
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0}
    return lzma.compress(labels.tobytes() + columns.tobytes(), filters=[lzma2])


def unpack(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The images (N, 28, 28) and labels (N,) that `pack` packed."""
    raw = np.frombuffer(lzma.decompress(data), np.uint8)
    n = raw.size // (1 + SIDE * SIDE)
    labels = raw[:n].copy()
    images = np.empty((n, SIDE, SIDE), np.uint8)
    columns = raw[n:].reshape(n, SIDE, SIDE)
    images[np.argsort(labels, kind="stable")] = columns.transpose(0, 2, 1)
    return images, labels
