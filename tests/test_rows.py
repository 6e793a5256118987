"""Layouts of rows: strides, the walk, and the launch configuration."""

import pytest
import torch

from cgkernels.rows import row_block, row_layout, row_strides, with_row_strides


def buffer(*shape: int, channels_last: bool = False) -> torch.Tensor:
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, device="meta").contiguous(memory_format=format)


@pytest.mark.parametrize(
    "tensor, strides",
    [
        (buffer(5), (1, 1, 1)),
        (buffer(5, 3), (3, 1, 1)),
        (buffer(5, 3, 4), (12, 4, 1)),
        (buffer(2, 3, 4, 5), (60, 20, 1)),
        (buffer(2, 3, 4, 5, 6), (360, 120, 1)),
        (buffer(2, 3, 4, 5, channels_last=True), (60, 1, 3)),
        (buffer(2, 7, 4, 5, channels_last=True)[:, :3], (140, 1, 7)),
        (buffer(2, 7, 4, 5)[:, 2:5], (140, 20, 1)),
        (buffer(1, 3, 4, 5).expand(2, -1, -1, -1), (0, 20, 1)),
        (buffer(2, 3, 1, 5)[..., ::2], (15, 5, 2)),
        (buffer(2, 3, 4, 5).transpose(2, 3), None),
        (buffer(2, 3, 4, 6)[..., :5], None),
    ],
)
def test_row_strides(tensor, strides):
    assert row_strides(tensor) == strides
    copy = with_row_strides(tensor)
    assert (copy is tensor) == (strides is not None) and row_strides(copy) is not None


def test_the_walk_follows_the_memory_of_the_first():
    x, last = buffer(2, 3, 4, 5), buffer(2, 3, 4, 5, channels_last=True)
    part = buffer(2, 7, 4, 5, channels_last=True)[:, :3]
    assert row_layout(x, None, x) == (60, 3, 20, False, True)
    assert row_layout(last, last) == (60, 3, 20, True, True)
    assert row_layout(x, last) == (60, 3, 20, False, False)
    assert row_layout(last, x) == (60, 3, 20, True, False)
    assert row_layout(part, part) == (60, 3, 20, True, False)
    assert row_layout(buffer(2, 7, 4, 5)[:, 2:5]).dense  # gaps lie between rows only
    assert row_layout(buffer(2, 1, 4, 5, channels_last=True)) == (20, 1, 20, False, True)
    assert row_layout(buffer(5)) == (1, 1, 1, False, True)


@pytest.mark.parametrize(
    "numel, dense, block, warps",
    [
        (1, True, 128, 1), (128, True, 128, 1), (129, True, 256, 1), (256, True, 256, 1),
        (257, True, 512, 2), (512, True, 512, 2), (513, True, 1024, 4), (2**32, True, 1024, 4),
        (1, False, 128, 1), (129, False, 256, 2), (257, False, 512, 4), (2**32, False, 512, 4),
    ],
)  # fmt: skip
def test_block_and_warps(numel, dense, block, warps):
    assert row_block(numel, dense) == {"BLOCK": block, "num_warps": warps}
