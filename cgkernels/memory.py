"""Which tensors share memory: of those that an op writes, none may with another.

Strides and addresses decide, exactly: channels of one buffer are interleaved, and share nothing.
"""

import torch
from torch import Tensor


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements may share memory: a stride must pass all that the smaller ones span."""
    if tensor.is_contiguous():
        return False
    extent = 1
    for stride, n in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if n > 1 and stride < extent:
            return tensor.numel() > 0
        extent += (n - 1) * stride
    return False


class Memory:
    """The bytes of a tensor; none of one without addresses, as on the meta device."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.first = _address(tensor)
        self.end = self.first + _span(tensor)

    def meets(self, other: Tensor) -> bool:
        """Whether a byte of the other tensor is one of these."""
        first = _address(other)
        if not self.first or not first or first >= self.end or self.first >= first + _span(other):
            return False
        tensor, steps = self.tensor, {1: [other.itemsize - 1, self.tensor.itemsize - 1]}
        for side, t in enumerate((other, tensor)):
            for n, stride in zip(t.shape, t.stride(), strict=True):
                if n > 1 and stride > 0:
                    steps.setdefault(stride * t.itemsize, [0, 0])[side] += n - 1
        terms = [
            (step, above, below) for step, (above, below) in sorted(steps.items(), reverse=True)
        ]
        return _reaches(first - self.first, terms)


def _address(tensor: Tensor) -> int:
    """Of the first element; 0 where there is none."""
    if tensor.is_meta or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return 0
    if tensor.layout != torch.strided or tensor.is_nested:  # refused by its own check
        return 0
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return 0
    return tensor.data_ptr()


def _span(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


def _reaches(distance: int, terms: list[tuple[int, int, int]]) -> bool:
    """Whether distance + sum of k step = 0 with -below <= k <= above, of (step, above, below)."""
    if not terms:
        return distance == 0
    (step, above, below), *rest = terms
    most, least = (sum(term[0] * term[end] for term in rest) for end in (1, 2))
    first = max(-below, -((distance + most) // step))
    last = min(above, (least - distance) // step)
    return any(_reaches(distance + k * step, rest) for k in range(first, last + 1))
