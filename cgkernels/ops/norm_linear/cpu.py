"""`norm_linear` by PyTorch's own operators: the CPU path, and that of many rows on CUDA.

Up to 64 rows on a CPU, a row has the same bits alone or in any batch. Libraries do not promise
that: each product is computed in a way that keeps it, by oneDNN where its rows do not depend on
each other, else row by row.
"""

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cgkernels.checks import check_tensor
from cgkernels.library import using_reference
from cgkernels.ops.norm_linear.reference import (
    _activation_ref,
    _empty_output,
    _scale_and_bias_ref,
)
from cgkernels.rows import compute_dtype

# More rows than this are a matrix product, which cuBLAS and MKL do better.
FEW_ROWS = 64

_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def _eager(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: str | None,
    activation: str | None,
    eps: float,
    counters: Tensor | None = None,
) -> Tensor:
    """As the reference, without what would change nothing.

    For one row of a small model each call of PyTorch is a share of the time.
    """
    if x.numel() == 0:
        return _empty_output(x, weight, activation)
    h = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])  # (rows, K)
    if norm is not None:
        h = _norm(h.contiguous(), norm_weight, norm_bias, norm, eps)
    transposed = weight.stride() == (1, len(weight))
    if not transposed and not weight.is_contiguous():
        weight = weight.contiguous()
    product, activate = _product, _activation_ref
    if len(h) <= FEW_ROWS and not x.is_cuda:
        onednn = compute_dtype(x) == torch.float32 and _onednn_keeps_rows(transposed)
        product, activate = _product_by_onednn if onednn else _product_by_rows, _activation_by_rows
    y = _scale_and_bias_ref(product(h, weight), scales, bias)  # (rows, N or 2N)
    if activation is not None:
        y = activate(y, activation)
    y = y if x.dim() == 2 else y.view(*x.shape[:-1], -1)
    if residual is not None:
        y += residual
    return _cast(y, x.dtype)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _norm(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, norm: str, eps: float
) -> Tensor:
    """As `_norm_ref`, in fewer steps."""
    dtype = compute_dtype(x)
    gain, shift = (None if t is None else _cast(t, dtype) for t in (norm_weight, norm_bias))
    h, shape = _cast(x, dtype), (x.shape[-1],)
    if norm == "rms":
        h = F.rms_norm(h, shape, gain, eps)
    else:  # F.layer_norm loses what is small beside a mean, and need not see a large one
        h = torch.sub(h, h.sum(-1, keepdim=True), alpha=1 / x.shape[-1])
        h = F.layer_norm(h, shape, gain, shift, eps)
    return _cast(h, x.dtype)


def _activation_by_rows(y: Tensor, activation: str | None) -> Tensor:
    """The activation of few rows, each value in the same lane of a vector of the CPU.

    PyTorch's vectors and what is left over beside them differ in their last bits. So rows go one by
    one; those of swiglu, which do not touch, together, but for 2^15 values and more, which threads
    would divide among them. GELU is oneDNN's, to which a lane is nothing.
    """
    if activation == "gelu" and y.dtype == torch.float32 and y.shape[1] > 1 and _HAS_ONEDNN:
        return F.gelu(y)
    parts = y.split(max(1, (2**15 - 1) // y.shape[1]) if activation == "swiglu" else 1)
    return torch.cat([_activation_ref(part, activation) for part in parts])


# Products -----------------------------------------------------------------------------------------
def _product(h: Tensor, weight: Tensor) -> Tensor:
    """h weight^T in at least float32."""
    wide = compute_dtype(h)
    dtype = h.dtype if h.is_cuda else wide  # cuBLAS multiplies half types and returns float32
    h, y = _cast(h, dtype), h.new_empty(len(h), len(weight), dtype=wide)
    for part, columns in _parts(weight, dtype, 2**24 if h.is_cuda else 2**17):
        if dtype != wide:
            y[:, columns] = torch.mm(h, part.t(), out_dtype=wide)
        else:
            torch.mm(h, part.t(), out=y[:, columns])
    return y


def _parts(weight: Tensor, dtype: torch.dtype, size: int = 2**17) -> Iterator[tuple[Tensor, slice]]:
    """A weight of another dtype is cast a part at a time: 2^17 numbers stay in a core's cache."""
    step = len(weight) if weight.dtype == dtype else max(1, size // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        yield weight[rows].to(dtype), rows


def _product_by_onednn(h: Tensor, weight: Tensor) -> Tensor:
    """h weight^T by oneDNN, for rows that must not depend on each other.

    It adds up in order, with errors that are twice those of other libraries. So the even and the
    odd features are two rows, with zeros between, which are added at the end. One row comes out as
    two, too: of one alone oneDNN would compute the product in another way.
    """
    rows, features = h.shape
    h = torch.where(_even_and_odd(features), _cast(h, torch.float32), 0)  # (2, rows, features)
    h = h.reshape(2 * rows, features).contiguous()
    if weight.dtype == torch.float32:
        y = _onednn(h, weight)
    else:
        y = h.new_empty(2 * rows, len(weight))
        for part, columns in _parts(weight, torch.float32):
            y[:, columns] = _onednn(h, part)
    return y[:rows].add_(y[rows:])


@cache
def _even_and_odd(features: int) -> Tensor:
    even = torch.arange(features, device="cpu") % 2 == 0
    return torch.stack([even, ~even])[:, None]


def _onednn(h: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(h, weight, None, "none", [], "none")


@cache
def _onednn_keeps_rows(transposed: bool) -> bool:
    """Whether its products of two rows or more give a row the same bits in any batch.

    oneDNN does not promise it, so it is tried: from version 3.12 on it does, on processors with
    AVX2 or more; older ones only with a weight that is stored transposed.
    """
    if not _HAS_ONEDNN:
        return False
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    numbers = torch.arange(464 * 385, dtype=torch.float32, device="cpu").sin_().view(464, 385)
    h, weight = numbers[:64], numbers[64:]
    weight = weight.t().contiguous().t() if transposed else weight
    whole = _onednn(h, weight)
    return all(torch.equal(_onednn(h[:rows], weight), whole[:rows]) for rows in (2, 3, 8, 17, 33))


def _product_by_rows(h: Tensor, weight: Tensor) -> Tensor:
    """h weight^T in at least float32, by a matrix-vector product for each row.

    MKL's order of summation follows the alignment: of the vector, whose rows here all start at 64
    bytes, and of the result where the matrix is transposed, which here it is not. Two rows at
    least, since of one alone it computes the product in another way.
    """
    rows, features = h.shape
    dtype, weight = compute_dtype(h), weight.contiguous()
    aligned = h.new_zeros(max(2, rows), features + -features % 16, dtype=dtype)[:, :features]
    aligned[:rows] = h
    y = h.new_empty(rows, len(weight), dtype=dtype)
    for part, columns in _parts(weight, dtype):
        matrices = part.t().expand(len(aligned), -1, -1)
        y[:, columns] = torch.bmm(aligned[:, None], matrices)[:rows, 0]
    return y


# Weights as oneDNN wants them ---------------------------------------------------------------------
def pack_weight(weight: Tensor) -> Tensor:
    """The weight in the blocks in which oneDNN reads it fastest, for `norm_linear` on a CPU.

    For products that are repeated, as in decoding: a row or a few are multiplied up to three times
    as fast, and each has the same bits in any batch of at most 64 rows. It is a copy, which later
    changes of the weight do not reach.

    Args:
        weight: (N, K), of any dtype and device.

    Returns:
        A tensor of layout `torch._mkldnn`, for `norm_linear` alone, which PyTorch can neither copy
        nor pickle: its `to_dense()` is the weight again; or the weight itself where that
        brings nothing: not float32, not on a CPU, a oneDNN whose rows depend on their batch, and
        inside `reference()`.

    Raises:
        ValueError, TypeError: not a matrix, or empty.

    Example:
        >>> x, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 2.0]])
        >>> norm_linear(x, pack_weight(weight))
        tensor([[11.]])
    """
    check_tensor("weight", weight)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must have shape (N, K), not empty, got {tuple(weight.shape)}")
    onednn = _HAS_ONEDNN and weight.device.type == "cpu" and not using_reference()
    if weight.dtype != torch.float32 or not onednn:
        return weight
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    return packed if _packing_keeps_rows(*weight.shape, torch.get_num_threads()) else weight


@cache
def _packing_keeps_rows(weight_rows: int, features: int, threads: int) -> bool:
    """Whether oneDNN gives a row the same bits in any batch with a packed weight of this shape.

    It does from version 3.12 on, in all that was tried; older ones for most shapes.
    """
    numbers = torch.arange((weight_rows + FEW_ROWS) * features, dtype=torch.float32, device="cpu")
    weight, h = numbers.sin_().view(-1, features).split([weight_rows, FEW_ROWS])
    weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    whole = _onednn(h, weight)
    sizes = (2, 3, 4, 8, 15, 16, 17, 33)
    return all(torch.equal(_onednn(h[:rows], weight), whole[:rows]) for rows in sizes)


def _by_packed(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: str | None,
    activation: str | None,
    eps: float,
) -> Tensor:
    """`norm_linear` with a weight that `pack_weight` has made."""
    h = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])  # (rows, K)
    if norm is not None:
        h = _norm(h.contiguous(), norm_weight, norm_bias, norm, eps)
    rows = h.shape[0]
    if rows == 1:  # of one row alone oneDNN would compute the product in another way
        h = torch.cat([h, h])
    kind, how = _ONEDNN_ACTIVATIONS[activation]
    y = torch.ops.mkldnn._linear_pointwise(h, weight, bias, kind, [], how)
    y = y[:1] if rows == 1 else y
    if activation == "swiglu":
        y = _activation_by_rows(y, activation)
    y = y if x.dim() == 2 else y.view(*x.shape[:-1], -1)
    return y if residual is None else y.add_(residual)


_ONEDNN_ACTIVATIONS = {
    None: ("none", "none"), "swiglu": ("none", "none"), "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}  # fmt: skip
