"""What `guided_step` launches: compiled without a GPU, judged on one."""

from collections.abc import Iterator
from functools import partial

import torch

from cgkernels.ops.guided_step.launch import _launch_bwd, _launch_fwd, _launch_inplace
from cgkernels.testing import Launch


def launches() -> Iterator[Launch]:
    shape = (16, 4, 64, 64)
    step, scale, table, seed, index = meta_numbers(shape[0])

    def launch(x, c, u=None, v=None, h1=None, h2=None, noise=False, x0=False):
        rows = x.shape[0]
        s, i = (seed, index[:rows]) if noise else (None, None)
        args = (x, c, u, table, step[:rows], scale[:rows], v, h1, h2, s, i, x0)
        return partial(_launch_fwd, *args)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        t, last = _meta(shape, dtype), _meta(shape, dtype, channels_last=True)
        yield Launch(f"plain {dtype}", launch(t, t), 128)
        yield Launch(f"noise {dtype}", launch(t, t, noise=True), 128)
        yield Launch(f"guided, x0 {dtype}", launch(t, t, t, x0=True), 128)
        yield Launch(f"guided, noise {dtype}", launch(t, t, t, noise=True), 128)
        yield Launch(f"learned variance {dtype}", launch(t, t, t, v=t, noise=True), 128)
        yield Launch(f"history, x0 {dtype}", launch(t, t, t, h1=t, h2=t, x0=True), 128)
        yield Launch(f"channels_last {dtype}", launch(last, last, last, noise=True), 128)
    half, wide = _meta(shape, torch.bfloat16), _meta(shape, torch.float32)
    yield Launch("float32 state, bfloat16 network", launch(wide, half, half, noise=True), 128)
    huge = _meta((1, 4, 2**15, 2**15), torch.bfloat16)  # positions of 64 bits
    yield Launch("2^32 elements a row", launch(huge, huge, huge, noise=True), 128)
    small = _meta((16, 1, 5, 5), torch.float32)
    yield Launch("short rows", launch(small, small, small, noise=True))


def inplace_launches() -> Iterator[Launch]:
    shape = (16, 4, 64, 64)
    step, scale, table, seed, index = meta_numbers(shape[0])

    def launch(x, t, v=None, h=None, noise=False):
        s, i = (seed, index) if noise else (None, None)
        return partial(_launch_inplace, x, t, t, table, step, scale, v, h, h, s, i, x)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        t = _meta(shape, dtype)
        part = _meta(shape, dtype, extra_channels=4)
        last_part = _meta(shape, dtype, extra_channels=3, channels_last=True)
        yield Launch(f"twin {dtype}", launch(part, t, noise=True), 128)
        yield Launch(f"shift {dtype}", launch(part, t, h=t), 128)
        yield Launch(f"strided, everything {dtype}", launch(last_part, t, t, t, noise=True))


def bwd_launches() -> Iterator[Launch]:
    shape = (16, 4, 64, 64)
    step, scale, table, *_ = meta_numbers(shape[0])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        t, last = _meta(shape, dtype), _meta(shape, dtype, channels_last=True)
        for name, args, bits in (
            ("plain", (t, None, t, t, None, table, step, scale, None, None), 128),
            ("guided, history", (t, t, t, t, t, table, step, scale, t, t), 128),
            ("mixed layouts", (t, t, last, t, t, table, step, scale, None, None), 0),
        ):
            yield Launch(f"{name} {dtype}", partial(_launch_bwd, *args), bits)


def meta_numbers(rows):
    """step, scale, table, seed, index as the public function makes them."""
    step = torch.empty((), dtype=torch.int64, device="meta").expand(rows)
    scale = torch.empty((), device="meta").expand(rows)
    seed = torch.empty((), dtype=torch.int64, device="meta")
    index = torch.empty(rows, dtype=torch.int64, device="meta")
    return step, scale, torch.empty(50, 12, device="meta"), seed, index


def _meta(shape, dtype, *, channels_last=False, extra_channels=0):
    """A meta tensor, or the first channels of a wider buffer."""
    wide = (shape[0], shape[1] + extra_channels, *shape[2:])
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(wide, dtype=dtype, device="meta", memory_format=format)[:, : shape[1]]


LAUNCHES = {
    "guided_step_fwd": launches,
    "guided_step_bwd": bwd_launches,
    "guided_step_": inplace_launches,
}
