"""Makes the shipped file anew from the published ones.

python -m cgm.data.pack t10k-images-idx3-ubyte.gz t10k-labels-idx1-ubyte.gz OUT
"""

import gzip
import sys
from pathlib import Path

import numpy as np

from cgm.data import fashion


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of a gzipped IDX file: bytes 0 0 8 ndim, big-endian uint32 sizes, values."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an IDX file of bytes")
    start = 4 + 4 * raw[3]
    return np.frombuffer(raw, np.uint8, offset=start).reshape(np.frombuffer(raw[4:start], ">u4"))


def main(argv: list[str]) -> None:
    """Read the images and labels, write the packed file."""
    if len(argv) != 3:
        sys.exit(__doc__)
    images, labels, out = map(Path, argv)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_bytes(fashion.pack(read_idx(images), read_idx(labels)))
    temporary.replace(out)


if __name__ == "__main__":
    main(sys.argv[1:])
