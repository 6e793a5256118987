"""Samples without values, for launches that are compiled and never run."""

from collections.abc import Iterator

import torch
from torch import Tensor


def meta_samples() -> Iterator[tuple[str, Tensor, int]]:
    """Meta tensors (16, 4, 64, 64) of each dtype and layout that makes a difference to a kernel.

    Yields (name, tensor, width in bits that its loads and stores must reach).
    """
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.empty(16, 4, 64, 64, dtype=dtype, device="meta")
        wide = torch.empty(16, 7, 64, 64, dtype=dtype, device="meta")
        last = torch.channels_last
        yield f"contiguous {dtype}", x, 128
        yield f"channels_last {dtype}", x.contiguous(memory_format=last), 128
        yield f"strided {dtype}", wide.contiguous(memory_format=last)[:, :4], 0
