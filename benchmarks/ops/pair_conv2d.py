"""What `pair_conv2d` launches: compiled without a GPU, judged on one."""

from collections.abc import Iterator
from functools import partial

import torch

from cgkernels.ops.pair_conv2d import _launch
from cgkernels.testing import Launch


def launches() -> Iterator[Launch]:
    def launch(label, dtype, x=3, y=3, outputs=64, size=256, kernel=4, stride=2, last=False):
        def image(channels):
            made = torch.empty(16, channels, size, size, dtype=dtype, device="meta")
            return made.contiguous(memory_format=torch.channels_last) if last else made

        first, second = image(x), image(y) if y else None
        weight, bias = first.new_empty(outputs, x + y, kernel, kernel), first.new_empty(outputs)
        args = (first, second, weight, bias, stride, 0 if kernel == 1 else 1, 0.2)
        return Launch(f"{label} {dtype}", partial(_launch, *args), dot=dtype != torch.float32)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield launch("pair", dtype)
        yield launch("channels_last", dtype, last=True)
        yield launch("one image", dtype, y=0)
        yield launch("labels", dtype, x=36)
        yield launch("3 x 3", dtype, kernel=3)
        yield launch("1 x 1", dtype, kernel=1, stride=1)
    yield launch("odd", torch.bfloat16, x=1, y=2, outputs=77, size=129, stride=1)


LAUNCHES = {
    "pair_conv2d": launches,
}
