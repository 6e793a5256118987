"""Distances of rows (N, d), in float64 on the CPU, in which no round-off decides of a tie."""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256  # rows whose distances to all others are held at a time
TIE = 1e-12  # numbers so near to each other are equal: what float64 makes of equal distances


def as_rows(name: str, rows: Tensor, *, like: Tensor | None = None, least: int = 0) -> Tensor:
    """The rows (n, d) in float64 on the CPU; `like` is a row they must be as wide as."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(rows).__name__}")
    if rows.dim() != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name} must be (N, d) with d > 0, got {tuple(rows.shape)}")
    if not rows.is_floating_point():
        raise TypeError(f"{name} must be floating, got {rows.dtype}")
    if like is not None and len(like) != rows.shape[1]:
        raise ValueError(f"{name} must be (N, {len(like)}), got {tuple(rows.shape)}")
    if len(rows) < least:
        raise ValueError(f"{name} must be at least {least} rows, got {len(rows)}")
    rows = rows.detach().to("cpu", torch.float64)
    if not rows.isfinite().all():
        raise ValueError(f"{name} must be finite, got infinities or NaN")
    return rows


def squares_of(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """(n, N) squared Euclidean distances by one matrix product, and what they may be off by.

    Those of equal rows are exactly 0.
    """
    center = others.mean(0)
    rows, others = rows - center, others - center
    lengths = rows.square().sum(1)[:, None] + others.square().sum(1)
    squares = torch.addmm(lengths, rows, others.T, alpha=-2)
    error = TIE * lengths
    # What is left of two equal rows is round-off of their lengths.
    return squares.masked_fill_(squares <= error, 0), error


class Balls(NamedTuple):
    """Squared radii (N,), with and without what they may be off by."""

    most: Tensor
    least: Tensor


def balls_of(rows: Tensor, *ks: int) -> list[Balls]:
    """Around each row, as far as its k-th nearest other row, for each k."""
    parts = []
    for block in rows.split(BLOCK):
        squares, error = squares_of(block, rows)
        # The nearest of all is the row itself, or another that is equal to it.
        nearest = squares.topk(max(ks) + 1, largest=False, sorted=True)
        parts.append(torch.stack([nearest.values, error.gather(1, nearest.indices)]))
    squares, error = torch.cat(parts, 1)[:, :, list(ks)].unbind(0)
    return [Balls(r + e, r - e) for r, e in zip(squares.T, error.T, strict=True)]


def nearest(rows: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (n,) of each row (n, d) to the nearest of reference (N, d), and its number (n,).

    Of several equally near ones it is the first.
    """
    reference = as_rows("reference", reference, least=1)
    rows = as_rows("rows", rows, like=reference[0])
    found = []
    for block in rows.split(BLOCK):
        squares, error = squares_of(block, reference)
        least = (squares + error).amin(1, keepdim=True)
        found.append((squares - error <= least).byte().argmax(1))
    number = torch.cat(found)
    return (rows - reference[number]).square().sum(1).sqrt(), number
