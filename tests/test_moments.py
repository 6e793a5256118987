"""Mean and variance: the definition, and the kernel that merges those of parts."""

import pytest
import torch

from cgkernels.moments import MERGED_PARTS, centered_moments, merge_moments
from tests.support import KERNEL_DEVICES, assert_equal, normals


@pytest.mark.parametrize("over_batch", [False, True])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_moments_are_those_of_pytorch(format, over_batch):
    x = (3 + normals(2, 5, 6, 7, dtype=torch.float64)).contiguous(memory_format=format)
    centered, mean, var = centered_moments(x, over_batch)
    axes = (0, 2, 3) if over_batch else (2, 3)
    expected = torch.var_mean(x, axes, correction=0, keepdim=True)
    torch.testing.assert_close((var, mean), expected)
    assert_equal(centered, x - mean)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("parts", [1, 2, 255, 256, 257, 600])
def test_parts_are_merged(parts, device):
    """Means far from zero and apart, and a last part of fewer pixels."""
    split, last = 64, 7
    total = (parts - 1) * split + last
    mean = 5 + normals(2, parts, 18, seed=1).to(device)
    m2 = split * normals(2, parts, 18, seed=2).square().to(device)
    origin = 1000 + normals(2, 1, 18, seed=3).to(device)
    got = torch.empty(2, 2, 18, device=device)
    origins = origin.expand(2, parts, 18)
    merge_moments(*got, torch.stack([mean, torch.zeros_like(mean), m2, origins]), total, split)
    counts = torch.full((parts, 1), float(split), dtype=torch.float64)
    counts[-1] = last
    wide, m2 = mean.cpu().double(), m2.cpu().double()
    exact = (wide * counts).sum(1) / total
    var = (m2 + counts * (wide - exact[:, None]).square()).sum(1) / total
    exact += origin[:, 0].cpu().double()
    torch.testing.assert_close(got[0].cpu().double(), exact, rtol=1.2e-7, atol=0)
    torch.testing.assert_close(got[1].cpu().double(), var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_a_mean_keeps_both_its_summands(device):
    """1000 standard deviations, in more parts than are merged at a time, without an origin."""
    parts, split = MERGED_PARTS + 44, 64
    x = 1000 + normals(1, parts, split, 3, dtype=torch.float64)
    mean = x.mean(2)
    part_mean = mean.float()
    rest = (mean - part_mean.double()).float()
    m2 = (x - mean[:, :, None]).square().sum(2).float()
    got = torch.empty(2, 1, 3, device=device)
    merge_moments(*got, torch.stack([part_mean, rest, m2]).to(device), parts * split, split)
    exact = torch.stack([x.mean((1, 2)), x.var((1, 2), correction=0)])
    torch.testing.assert_close(got[0].cpu().double(), exact[0], rtol=6e-8, atol=0)
    torch.testing.assert_close(got[1].cpu().double(), exact[1], rtol=1e-6, atol=0)
