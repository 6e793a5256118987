"""What `conv2d_stats` launches: compiled without a GPU, judged on one."""

from collections.abc import Iterator
from functools import partial

import torch

from cgkernels.ops.conv2d_stats import _channels_last, _launch
from cgkernels.testing import Launch


def launches() -> Iterator[Launch]:
    def launch(dtype, features, channels, side, kernel, stride, *, padding=1, last=True, bits=128):
        x = torch.empty(16, features, side, side, dtype=dtype, device="meta")
        weight = x.new_empty(channels, features, kernel, kernel)
        if last:
            x, weight = _channels_last(x), _channels_last(weight)
        label = f"{kernel}x{kernel} {features}-{channels} stride {stride} at {side} {dtype}"
        return Launch(
            label, partial(_launch, x, weight, stride, padding), bits, dot=dtype != torch.float32
        )

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield launch(dtype, 64, 128, 128, 4, 2)
        yield launch(dtype, 128, 256, 64, 4, 2)
        yield launch(dtype, 256, 512, 32, 4, 1)
        yield launch(dtype, 256, 256, 64, 3, 1)
        yield launch(dtype, 64, 128, 64, 1, 1, padding=0)
        yield launch(dtype, 35, 70, 33, 4, 2, padding=2, last=False, bits=0)
        yield launch(dtype, 3, 16, 32, 3, 1, bits=0)


LAUNCHES = {
    "conv2d_stats": launches,
}
