"""What `instance_norm_act` launches: compiled without a GPU, judged on one."""

from collections.abc import Iterator
from functools import partial

import torch

from cgkernels.ops.instance_norm_act.launch import _launch_bwd, _launch_fwd, _launch_inplace
from cgkernels.ops.instance_norm_act.reference import _empty_padded, _empty_statistics
from cgkernels.testing import Launch


def launches() -> Iterator[Launch]:
    for name, args, bits in meta_inputs():
        yield Launch(name, partial(_launch_fwd, *args), bits)


def inplace_launches() -> Iterator[Launch]:
    for name, x, out, slopes in meta_skips():
        second = None if len(slopes) == 1 else _empty_padded(x, 0)
        args = (out, second, x, None, None, None, 1e-5, slopes, 0, False)
        yield Launch(name, partial(_launch_inplace, *args), 128)


def bwd_launches() -> Iterator[Launch]:
    for name, (x, weight, bias, residual, *options), bits in meta_inputs():
        dy, statistics = _empty_padded(x, options[-2]), _empty_statistics(x, options[-1])
        dtype = None if residual is None else residual.dtype
        args = (dy, None, x, *statistics, weight, bias, dtype, *options)
        yield Launch(name, partial(_launch_bwd, *args), bits)
    for name, x, second, slopes in meta_skips():
        if len(slopes) == 2:
            given = (_empty_padded(x, 0), second, x, *_empty_statistics(x, False))
            args = (*given, None, None, None, 1e-5, slopes, 0, False)
            yield Launch(name, partial(_launch_bwd, *args), 128)


def meta_skips():
    """x, half a tensor of twice the channels, and slopes of what is made of x."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for name, size in (("large", (4, 64, 128, 128)), ("few pixels", (16, 256, 16, 16))):
            x, both = (_meta(size[0], n * size[1], *size[2:], dtype=dtype) for n in (1, 2))
            yield f"skip, {name} {dtype}", x, both.chunk(2, 1)[1], [0.2, 0.0]
        yield f"slice {dtype}", x, both.chunk(2, 1)[1], [0.0]


def meta_inputs():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        large, small = _meta(4, 64, 128, 128, dtype=dtype), _meta(16, 256, 16, 16, dtype=dtype)
        wide = _meta(4, 192, 128, 128, dtype=dtype)[:, 64:128]
        first, few = large.contiguous(), small.contiguous()
        affine = [large.new_empty(64, dtype=torch.float32) for _ in range(2)]
        plain, relu, batch = (1e-5, [0.2], 0, False), (1e-5, [0.0], 1, False), (1e-5, [0.2])
        for name, args, bits in (
            ("instance", (large, None, None, None, *plain), 128),
            ("few pixels", (small, None, None, None, *plain), 128),
            ("batch", (large, *affine, None, *batch, 0, True), 128),
            ("padded", (large, *affine, large, *relu), 128),
            ("few pixels, padded", (small, None, None, small, *relu), 128),
            ("slices", (wide, None, None, wide, *plain), 128),
            ("contiguous", (first, None, None, None, *plain), 128),
            ("contiguous, few pixels", (few, None, None, None, *plain), 128),
            ("contiguous, batch, padded", (first, *affine, first, *batch, 3, True), 0),
        ):
            yield f"{name} {dtype}", args, bits
    odd = _meta(4, 35, 33, 35, dtype=torch.bfloat16)
    yield "odd", (odd, None, None, odd.float(), 1e-5, [0.2], 1, True), 0
    huge = _meta(1, 1, 2**16, 2**16, dtype=torch.bfloat16)  # positions of 64 bits
    yield "2^32 pixels", (huge, None, None, None, 1e-5, [0.2], 0, False), 0


def _meta(*shape, dtype):
    """In channels_last."""
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


LAUNCHES = {
    "instance_norm_act_fwd": launches,
    "instance_norm_act_bwd": bwd_launches,
    "instance_norm_act_": inplace_launches,
}
