"""What `patch_head_loss` launches: compiled without a GPU, judged on one."""

from collections.abc import Iterator
from functools import partial

import torch

from cgkernels.ops.patch_head_loss import _launch
from cgkernels.testing import Launch


def launches() -> Iterator[Launch]:
    def launch(label, dtype, loss, target, *, n=16, c=512, size=31, kernel=4, last=True, bits=128):
        x = torch.empty(n, c, size, size, dtype=dtype, device="meta")
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        weight, bias = x.new_empty(1, c, kernel, kernel), x.new_empty(1)
        args = (x, weight, bias, loss, target, 0 if kernel == 1 else 1)
        half = dtype != torch.float32
        return Launch(f"{label} {dtype}", partial(_launch, *args), bits, dot=half)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for loss, target in (("lsgan", "real"), ("vanilla", "fake"), ("hinge", "real"),
                             ("wgan", "generator"), (None, None)):  # fmt: skip
            yield launch(f"{loss} {target}", dtype, loss, target)
        yield launch("3 x 3", dtype, "hinge", "fake", kernel=3, bits=0)
        yield launch("1 x 1", dtype, "hinge", "fake", kernel=1, c=128, size=256, bits=0)
        yield launch("contiguous", dtype, "hinge", "fake", last=False, bits=0)
    yield launch("odd", torch.bfloat16, "vanilla", "real", n=1, c=77, size=17, bits=0)


LAUNCHES = {
    "patch_head_loss": launches,
}
