"""A linear layer with the norm before it and what follows it, made for few rows.

    out = act(norm(x) W^T + bias) + residual,   act = identity, GELU, or silu(gate) * up (SwiGLU)

Shapes   x: (..., K); weight: (N, K), bias: (N,), with SwiGLU (2N, K) and (2N,), the gates first;
         norm_weight, norm_bias: (K,); residual, out: (..., N).
Dtypes   x and out float32, float16 or bfloat16 (float64 on CPU), the weight as x, or int8 with a
         float32 scale for each of its rows; float32 inside. In half types norm(x) is rounded to the
         dtype, which is what tensor cores multiply. Up to 64 rows, a row has the same bits alone or
         in any batch.
Backward in all but int8 weights and scales, in plain PyTorch, as often as one likes.
Source   RMSNorm: arXiv:1910.07467; LayerNorm: arXiv:1607.06450; GELU: arXiv:1606.08415; SwiGLU:
         arXiv:2002.05202. Derivatives from the formulas.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cgkernels._triton import tl, triton
from cgkernels.checks import (
    check_counters,
    check_float,
    check_no_grad,
    check_same_device,
    check_shape,
)
from cgkernels.device import launch_next, tanh, wait_for_previous
from cgkernels.library import (
    define_op,
    needs_function,
    refuse_forward_mode,
    using_reference,
)

NORMS = (None, "rms", "layer")
ACTIVATIONS = (None, "gelu", "gelu_tanh", "swiglu")

# More rows than this are a matrix product, which cuBLAS and MKL do better.
FEW_ROWS = 64

_HAS_ONEDNN = torch.backends.mkldnn.is_available()


# 1. Reference -------------------------------------------------------------------------------------
def norm_linear_ref(
    x, weight, scales, norm_weight, norm_bias, bias, residual, norm, activation, eps
):
    wide = _wide(x)
    h = _normed_ref(x, norm_weight, norm_bias, norm, eps)
    y = _affine_ref(F.linear(h.to(wide), weight.to(wide)), scales, bias)
    return _added_ref(_activated_ref(y, activation), residual).to(x.dtype)


def norm_linear_bwd_ref(
    wanted, dout, x, weight, scales, norm_weight, norm_bias, bias, norm, activation, eps
):
    """Gradients of x, weight, norm_weight, norm_bias, bias where wanted, None elsewhere.

    As in PyTorch, the two matrix products take the gradients rounded to x's dtype.
    """
    wide = _wide(x)
    h = _normed_ref(x, norm_weight, norm_bias, norm, eps).flatten(0, -2)
    weight = weight.to(x.dtype)
    dy = dout.to(wide).flatten(0, -2)
    if activation is not None:
        y = _affine_ref(F.linear(h, weight).to(wide), scales, bias)
        dy = _activation_bwd_ref(dy, y, activation)
    gradients: list[Tensor | None] = [None] * 5
    if wanted[4]:
        gradients[4] = dy.sum(0).to(bias.dtype)
    dy = (dy if scales is None else dy * scales).to(x.dtype)
    if wanted[1]:
        gradients[1] = dy.t() @ h
    dh = (dy @ weight).to(wide)
    if norm is None:
        gradients[0] = dh.view(x.shape)
        return gradients
    standard, rstd = _standard_ref(x.flatten(0, -2), norm, eps)
    if wanted[2]:
        gradients[2] = (dh * standard).sum(0).to(norm_weight.dtype)
    if wanted[3]:
        gradients[3] = dh.sum(0).to(norm_bias.dtype)
    if wanted[0]:
        dx = dh if norm_weight is None else dh * norm_weight
        along = (dx * standard).mean(-1, keepdim=True)
        mean = dx.mean(-1, keepdim=True) if norm == "layer" else 0
        gradients[0] = (rstd * (dx - mean - along * standard)).to(x.dtype).view(x.shape)
    return gradients


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)


def _standard_ref(x, norm, eps):
    """x with a mean square (of the distance from the mean) of 1, and the factor that made it so."""
    x = x.to(_wide(x))
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd, rstd


def _normed_ref(x, norm_weight, norm_bias, norm, eps):
    if norm is None:
        return x
    h, _ = _standard_ref(x, norm, eps)
    h = h if norm_weight is None else h * norm_weight
    h = h if norm_bias is None else h + norm_bias
    return h.to(x.dtype)


def _affine_ref(y, scales, bias):
    """Scale and bias of a product that is at least float32."""
    y = y if scales is None else y * scales.to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def _activated_ref(y, activation):
    if activation == "swiglu":
        gate, up = y.chunk(2, -1)
        return F.silu(gate) * up
    if activation is None:
        return y
    return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def _added_ref(y, residual):
    return y if residual is None else y + residual.to(y.dtype)


def _activation_bwd_ref(dout, y, activation):
    if activation == "swiglu":
        gate, up = y.chunk(2, -1)
        s = gate.sigmoid()
        return torch.cat([dout * up * s * (1 + gate * (1 - s)), dout * gate * s], -1)
    if activation == "gelu":
        density = torch.exp(-0.5 * y.square()) / math.sqrt(2 * math.pi)
        return dout * (0.5 * (1 + torch.erf(y / math.sqrt(2))) + y * density)
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (y + 0.044715 * y**3))
    slope = c * (1 + 3 * 0.044715 * y.square())
    return dout * 0.5 * (1 + t + y * (1 - t.square()) * slope)


# 2. Kernels ---------------------------------------------------------------------------------------
@triton.jit
def _finish(
    out_ptr, scales_ptr, bias_ptr, residual_ptr, residual_stride, y, row, there, first, channels,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scale, bias, activation and residual of a tile of products, and its store."""
    line, good, channel = _lines(first, channels, ACTIVATION, BLOCK_N)
    if scales_ptr is not None:
        y = y * tl.load(scales_ptr + line, mask=good, other=0.0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + line, mask=good, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == 1:  # gelu
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == 2:  # gelu_tanh
        y = 0.5 * y * (1.0 + tanh(0.7978845608028654 * (y + 0.044715 * y * y * y)))
    elif ACTIVATION == 3:  # swiglu
        gate, up = tl.split(y.reshape(16, BLOCK_N // 2, 2))
        y = gate * tl.sigmoid(gate) * up
    mask = there[:, None] & (channel < channels)[None, :]
    row = row.to(tl.int64)[:, None]
    if residual_ptr is not None:
        at = residual_ptr + row * residual_stride + channel[None, :]
        y += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    at = out_ptr + row * channels + channel[None, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _lines(first, channels, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows of the weight in a tile, which of them exist, and the channels that come of them.

    With swiglu gate and up of a channel are neighbours in the tile.
    """
    column = first + tl.arange(0, BLOCK_N)
    if ACTIVATION == 3:
        channel = first // 2 + tl.arange(0, BLOCK_N // 2)
        return column // 2 + (column % 2) * channels, column // 2 < channels, channel
    else:
        return column, column < channels, column


@triton.jit
def _prefetch(
    weight_ptr, weight_stride, first_line, channels, first, end, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Asks for a tile of the weight, from feature `first` to `end`, to be brought to the L2 cache.

    That reads nothing, and so is right whatever the launch before may still be writing.
    """
    EACH: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth  # in a line of L2
    line, good, _ = _lines(first_line, channels, ACTIVATION, BLOCK_N)
    weight_row = weight_ptr + tl.where(good, line, 0).to(tl.int64)[:, None] * weight_stride
    for start in range(first, end, 16 * EACH):
        k = tl.minimum(start + tl.arange(0, 16) * EACH, end - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l",
            [(weight_row + k[None, :]).to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _kernel(
    out_ptr, partial_ptr, count_ptr, x_ptr, x_stride, weight_ptr, weight_stride, scales_ptr,
    norm_weight_ptr, norm_bias_ptr, bias_ptr, residual_ptr, residual_stride, rows, channels,
    features, eps,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per 16 rows of x, BLOCK_N rows of the weight and SPLIT of their elements.

    Programs that share a tile of the weight are neighbours: it comes from memory once, and from the
    L2 cache for the others. Each takes the statistics of its rows itself. Of several splits the
    program that is done last adds up all of them, in their order.
    """
    program, tiles = tl.program_id(0), (rows + 15) // 16
    tile, split, block = program % tiles, program // tiles % SPLITS, program // tiles // SPLITS
    if PDL:
        launch_next()
        end = tl.minimum(split * SPLIT + SPLIT, features)
        _prefetch(
            weight_ptr, weight_stride, block * BLOCK_N, channels, split * SPLIT, end, ACTIVATION,
            BLOCK_N,
        )  # fmt: skip
        wait_for_previous()
    row = tile * 16 + tl.arange(0, 16)
    there = row < rows
    x_row = x_ptr + row.to(tl.int64)[:, None] * x_stride
    mean = tl.zeros((16,), tl.float32)
    rest, rstd = mean, mean
    if NORM == 2:
        total = tl.zeros((16, BLOCK_K), tl.float32)
        for start in tl.range(0, features, BLOCK_K, num_stages=STAGES):
            k = start + tl.arange(0, BLOCK_K)
            inside = there[:, None] & (k < features)[None, :]
            total += tl.load(x_row + k[None, :], mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(total, 1) / features
    if NORM != 0:
        total = tl.zeros((16, BLOCK_K), tl.float32)
        left = total
        for start in tl.range(0, features, BLOCK_K, num_stages=STAGES):
            k = start + tl.arange(0, BLOCK_K)
            inside = there[:, None] & (k < features)[None, :]
            x = tl.load(x_row + k[None, :], mask=inside, other=0.0).to(tl.float32)
            if NORM == 2:
                x = tl.where(inside, x - mean[:, None], 0.0)
                left += x
            total += x * x
        rest = tl.sum(left, 1) / features  # of a mean so large that its last place counts
        rstd = 1.0 / tl.sqrt_rn(tl.sum(total, 1) / features - rest * rest + eps)

    line, good, _ = _lines(block * BLOCK_N, channels, ACTIVATION, BLOCK_N)
    weight_row = weight_ptr + line.to(tl.int64)[:, None] * weight_stride
    y = tl.zeros((16, BLOCK_N), tl.float32)
    first = split * SPLIT
    for start in tl.range(first, tl.minimum(first + SPLIT, features), BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < features
        w = tl.load(weight_row + k[None, :], mask=good[:, None] & inside[None, :], other=0)
        x = tl.load(x_row + k[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        if NORM != 0:
            h = x.to(tl.float32)
            h = (h - mean[:, None] - rest[:, None] if NORM == 2 else h) * rstd[:, None]
            if norm_weight_ptr is not None:
                gain = tl.load(norm_weight_ptr + k, mask=inside, other=0.0)
                h *= gain.to(tl.float32)[None, :]
            if norm_bias_ptr is not None:
                shift = tl.load(norm_bias_ptr + k, mask=inside, other=0.0)
                h += shift.to(tl.float32)[None, :]
            x = h.to(x.dtype)
        y = tl.dot(x, tl.trans(w.to(x.dtype)), y, input_precision="ieee")

    if SPLITS > 1:
        group = block * tiles + tile
        lane = tl.arange(0, 16)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        part = partial_ptr + group * (SPLITS * 16 * BLOCK_N) + lane
        tl.store(part + split * (16 * BLOCK_N), y)
        tl.debug_barrier()  # all threads have stored before one of them counts
        done = tl.atomic_add(count_ptr + group, 1, sem="acq_rel", scope="gpu")
        if done == SPLITS - 1:
            y = tl.zeros((16, BLOCK_N), tl.float32)
            for i in tl.static_range(SPLITS):
                y += tl.load(part + i * (16 * BLOCK_N), cache_modifier=".cg")
            _finish(
                out_ptr, scales_ptr, bias_ptr, residual_ptr, residual_stride, y, row, there,
                block * BLOCK_N, channels, ACTIVATION, BLOCK_N,
            )  # fmt: skip
            tl.store(count_ptr + group, 0)  # as the next launch must find it
    else:
        _finish(
            out_ptr, scales_ptr, bias_ptr, residual_ptr, residual_stride, y, row, there,
            block * BLOCK_N, channels, ACTIVATION, BLOCK_N,
        )  # fmt: skip


# 3. Launchers -------------------------------------------------------------------------------------
def _launch_config(channels, features, dtype, activation):
    """Sizes that may depend on nothing else, or a row would depend on its batch.

    Narrow tiles make programs of few channels; from 256 programs on, wider ones halve the share of
    the norm (in float32 they take too many registers). Fewer than 128 programs leave
    multiprocessors idle: they split the features, unless what each gets is streamed sooner than
    partial sums are merged. In half types ptxas left alone spills to get down to 128 registers.

    PDL, from sm_90 on: programs start while the launch before still runs, and fetch their weights.
    """
    lines = 2 * channels if activation == "swiglu" else channels
    half = dtype in (torch.float16, torch.bfloat16)
    block_n = 32 if half and lines >= 8192 else 16
    block_k = 128 if half else 64
    programs = triton.cdiv(lines, block_n)
    splits = max(1, min(triton.cdiv(128, programs), features // 512, 8))
    split = block_k * triton.cdiv(features, splits * block_k)
    return {
        "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": split,
        "SPLITS": triton.cdiv(features, split), "STAGES": 6 if half and block_n == 16 else 4,
        "num_warps": 2, "maxnreg": 168 if half else None, "PDL": False,
    }  # fmt: skip


def _launch(
    x, weight, scales, norm_weight, norm_bias, bias, residual, norm, activation, eps, counters=None
):
    out = _fake(x, weight, scales, norm_weight, norm_bias, bias, residual, norm, activation, eps)
    channels, features = out.shape[-1], x.shape[-1]
    rows = x.numel() // features
    if rows == 0:
        return out
    if rows > FEW_ROWS:
        return _plain(
            x, weight, scales, norm_weight, norm_bias, bias, residual, norm, activation, eps
        )
    x, residual = _rows(x), None if residual is None else _rows(residual)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    config = _launch_config(channels, features, x.dtype, activation)
    tiles = triton.cdiv(rows, 16) * triton.cdiv(weight.shape[0], config["BLOCK_N"])
    partial = count = None
    if config["SPLITS"] > 1:
        size = tiles * config["SPLITS"] * 16 * config["BLOCK_N"]
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
        # Of its own unless the caller gives them: calls on two streams must not meet.
        count = counters
        if count is None:
            count = torch.zeros(tiles, dtype=torch.int32, device=x.device)
    vectors = (None if t is None else t.contiguous() for t in (norm_weight, norm_bias, bias))
    _kernel[(tiles * config["SPLITS"],)](
        out, partial, count, x, x.stride(0), weight, weight.stride(0),
        None if scales is None else scales.contiguous(), *vectors,
        residual, 0 if residual is None else residual.stride(0), rows, channels, features, eps,
        NORM=NORMS.index(norm), ACTIVATION=ACTIVATIONS.index(activation), enable_fp_fusion=True,
        launch_pdl=config["PDL"], **config,
    )  # fmt: skip
    return out


def _least_counters(rows, lines):
    """Enough for tiles of any size that `_launch_config` may choose."""
    return triton.cdiv(rows, 16) * triton.cdiv(lines, 16)


def _rows(x):
    """x as a matrix whose rows lie in one piece."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


# 4. Registration ----------------------------------------------------------------------------------
def _fake(
    x, weight, scales, norm_weight, norm_bias, bias, residual, norm, activation, eps, counters=None
):
    channels = weight.shape[0] // 2 if activation == "swiglu" else weight.shape[0]
    return x.new_empty(*x.shape[:-1], channels)


def _plain(
    x, weight, scales, norm_weight, norm_bias, bias, residual, norm, activation, eps, counters=None
):
    """The CPU path, and that of many rows on CUDA.

    It skips what would change nothing: for one row of a small model each call of PyTorch is a
    share of the time.
    """
    if x.numel() == 0:
        return _fake(
            x, weight, scales, norm_weight, norm_bias, bias, residual, norm, activation, eps
        )
    h = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if norm is not None:
        h = _normed(h.contiguous(), norm_weight, norm_bias, norm, eps)
    transposed = weight.stride() == (1, len(weight))
    if not transposed and not weight.is_contiguous():
        weight = weight.contiguous()
    product, activate = _product, _activated_ref
    if len(h) <= FEW_ROWS and not x.is_cuda:
        onednn = _wide(x) == torch.float32 and _onednn_keeps_rows(transposed)
        product, activate = _by_halves if onednn else _by_rows, _activated_rows
    y = _affine_ref(product(h, weight), scales, bias)
    if activation is not None:
        y = activate(y, activation)
    y = y if x.dim() == 2 else y.view(*x.shape[:-1], -1)
    if residual is not None:
        y += residual
    return _as(x.dtype, y)


def _as(dtype, x):
    return x if x.dtype == dtype else x.to(dtype)


def _normed(x, norm_weight, norm_bias, norm, eps):
    """As `_normed_ref`, in fewer steps."""
    wide = _wide(x)
    gain, shift = (None if t is None else _as(wide, t) for t in (norm_weight, norm_bias))
    h, shape = _as(wide, x), (x.shape[-1],)
    if norm == "rms":
        h = F.rms_norm(h, shape, gain, eps)
    else:  # F.layer_norm loses what is small beside a mean, and need not see a large one
        h = torch.sub(h, h.sum(-1, keepdim=True), alpha=1 / x.shape[-1])
        h = F.layer_norm(h, shape, gain, shift, eps)
    return _as(x.dtype, h)


def _activated_rows(y, activation):
    """The activation of few rows, each value in the same place of a vector of the CPU.

    PyTorch's vectors and what is left over beside them differ in their last bits. So rows go one by
    one; those of swiglu, which do not touch, together, but for 2^15 values and more, which threads
    would divide among them. GELU is oneDNN's, to which a place is nothing.
    """
    if activation == "gelu" and y.dtype == torch.float32 and y.shape[1] > 1 and _HAS_ONEDNN:
        return F.gelu(y)
    parts = y.split(max(1, (2**15 - 1) // y.shape[1]) if activation == "swiglu" else 1)
    return torch.cat([_activated_ref(part, activation) for part in parts])


def _product(h, weight):
    """h weight^T in at least float32."""
    wide = _wide(h)
    dtype = h.dtype if h.is_cuda else wide  # cuBLAS multiplies half types and returns float32
    h, y = _as(dtype, h), h.new_empty(len(h), len(weight), dtype=wide)
    for part, at in _parts(weight, dtype, 2**24 if h.is_cuda else 2**17):
        if dtype != wide:
            y[:, at] = torch.mm(h, part.t(), out_dtype=wide)
        else:
            torch.mm(h, part.t(), out=y[:, at])
    return y


def _parts(weight, dtype, size=2**17):
    """A weight of another dtype is cast a part at a time: 2^17 numbers stay in a core's cache."""
    step = len(weight) if weight.dtype == dtype else max(1, size // weight.shape[1])
    for start in range(0, len(weight), step):
        at = slice(start, start + step)
        yield weight[at].to(dtype), at


def _by_halves(h, weight):
    """h weight^T by oneDNN, for rows that must not depend on each other.

    It adds up in order, with errors that are twice those of other libraries. So the even and the
    odd features are two rows, with zeros between, which are added at the end. One row comes out as
    two, too: of one alone oneDNN would compute the product in another way.
    """
    rows, features = h.shape
    h = torch.where(_even_and_odd(features), _as(torch.float32, h), 0)
    h = h.reshape(2 * rows, features).contiguous()
    if weight.dtype == torch.float32:
        y = _onednn(h, weight)
    else:
        y = h.new_empty(2 * rows, len(weight))
        for part, at in _parts(weight, torch.float32):
            y[:, at] = _onednn(h, part)
    return y[:rows].add_(y[rows:])


@cache
def _even_and_odd(features: int) -> Tensor:
    even = torch.arange(features, device="cpu") % 2 == 0
    return torch.stack([even, ~even])[:, None]


def _onednn(h, weight):
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


def _by_rows(h, weight):
    """h weight^T in at least float32, by a matrix-vector product for each row.

    MKL's order of summation follows the alignment: of the vector, whose rows here all start at 64
    bytes, and of the result where the matrix is transposed, which here it is not. Two rows at
    least, since of one alone it computes the product in another way.
    """
    rows, features = h.shape
    dtype, weight = _wide(h), weight.contiguous()
    aligned = h.new_zeros(max(2, rows), features + -features % 16, dtype=dtype)[:, :features]
    aligned[:rows] = h
    y = h.new_empty(rows, len(weight), dtype=dtype)
    for part, at in _parts(weight, dtype):
        matrices = part.t().expand(len(aligned), -1, -1)
        y[:, at] = torch.bmm(aligned[:, None], matrices)[:rows, 0]
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
        A tensor of layout `torch._mkldnn`, for `norm_linear` alone; or the weight itself where that
        brings nothing: not float32, not on a CPU, a oneDNN whose rows depend on their batch, and
        inside `reference()`.

    Raises:
        ValueError: not a matrix, or empty.

    Example:
        >>> x, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 2.0]])
        >>> norm_linear(x, pack_weight(weight))
        tensor([[11.]])
    """
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must have shape (N, K), not empty, got {tuple(weight.shape)}")
    onednn = _HAS_ONEDNN and weight.device.type == "cpu" and not using_reference()
    if weight.dtype != torch.float32 or not onednn:
        return weight
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    return packed if _packing_keeps_rows(*weight.shape, torch.get_num_threads()) else weight


@cache
def _packing_keeps_rows(lines: int, features: int, threads: int) -> bool:
    """Whether oneDNN gives a row the same bits in any batch with a packed weight of this shape.

    It does from version 3.12 on, in all that was tried; older ones for most shapes.
    """
    numbers = torch.arange((lines + FEW_ROWS) * features, dtype=torch.float32, device="cpu")
    weight, h = numbers.sin_().view(-1, features).split([lines, FEW_ROWS])
    weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    whole = _onednn(h, weight)
    sizes = (2, 3, 4, 8, 15, 16, 17, 33)
    return all(torch.equal(_onednn(h[:rows], weight), whole[:rows]) for rows in sizes)


def _by_packed(x, weight, norm_weight, norm_bias, bias, residual, norm, activation, eps):
    h = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if norm is not None:
        h = _normed(h.contiguous(), norm_weight, norm_bias, norm, eps)
    rows = h.shape[0]
    if rows == 1:  # of one row alone oneDNN would compute the product in another way
        h = torch.cat([h, h])
    kind, how = _ONEDNN_ACTIVATIONS[activation]
    y = torch.ops.mkldnn._linear_pointwise(h, weight, bias, kind, [], how)
    y = y[:1] if rows == 1 else y
    if activation == "swiglu":
        y = _activated_rows(y, activation)
    y = y if x.dim() == 2 else y.view(*x.shape[:-1], -1)
    return y if residual is None else y.add_(residual)


_ONEDNN_ACTIVATIONS = {
    None: ("none", "none"), "swiglu": ("none", "none"), "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}  # fmt: skip


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? scales, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? bias, Tensor? residual, str? norm, str? activation, float eps"
)

_fwd = define_op(
    "norm_linear",
    f"({_ARGUMENTS}) -> Tensor",
    cuda=_launch,
    cpu=_plain,
    fake=_fake,
)

_counted = define_op(
    "norm_linear_counted",
    f"({_ARGUMENTS}, Tensor(a!) counters) -> Tensor",
    cuda=_launch,
    cpu=_plain,
    fake=_fake,
)


# 5. Public function -------------------------------------------------------------------------------
class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, weight, scales, norm_weight, norm_bias, bias, residual, norm, activation, eps
    ):
        ctx.save_for_backward(x, weight, scales, norm_weight, norm_bias, bias)
        ctx.options = norm, activation, eps
        ctx.residual_dtype = None if residual is None else residual.dtype
        return _fwd(
            x, weight, scales, norm_weight, norm_bias, bias, residual, norm, activation, eps
        )

    @staticmethod
    def backward(ctx, dout):
        x, weight, _, norm_weight, norm_bias, bias, residual, *_ = ctx.needs_input_grad
        wanted = x, weight, norm_weight, norm_bias, bias
        dx, dweight, *others = norm_linear_bwd_ref(wanted, dout, *ctx.saved_tensors, *ctx.options)
        dresidual = dout.to(ctx.residual_dtype) if residual else None
        return dx, dweight, None, *others, dresidual, None, None, None


def norm_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """Linear layer with the norm before it and what follows it: act(norm(x) W^T + bias) + residual.

        rms:   norm(x) = x / sqrt(mean(x^2) + eps) * norm_weight
        layer: norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * norm_weight + norm_bias

    One launch for up to 64 rows, in which the weight is read from memory once; a row has the same
    bits alone or in any batch of at most 64 rows. More rows go to PyTorch (cuBLAS): the same
    formula, other bits. To keep a row's bits there, call it for 64 rows at a time.

    Args:
        x: (..., K) float32, float16 or bfloat16 (float64 on the CPU); any strides.
        weight: (N, K) as `torch.nn.Linear` keeps it, of x's dtype or int8, or packed by
            `pack_weight`, then without gradients. With "swiglu" (2N, K), the gates first.
        norm: None, "rms" or "layer"; norm_weight and norm_bias: (K,), the latter for "layer" only.
        eps: added to the mean square.
        bias: (N,), with "swiglu" (2N,).
        activation: None, "gelu", "gelu_tanh" (its approximation) or "swiglu": silu(gate) * up.
        residual: (..., N), added last.
        scales: float32, one for each row of an int8 weight: W = scales[:, None] * weight.
        counters: int32 zeros, at least ceil(rows / 16) * ceil(len(weight) / 16), in which the
            programs of a launch count themselves; zero again when it is done. Calls that share
            them must come one after another, as on one stream. None: of its own, which a second,
            small launch puts to zero.

    Returns:
        (..., N) in x's dtype, contiguous. norm(x) is rounded to x's dtype, and so is the result;
        all between is float32. Differentiable, but not in scales and int8 weights.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.

    Example:
        >>> x, weight = torch.tensor([[3.0, 4.0]]), torch.eye(2)
        >>> norm_linear(x, weight, residual=x)
        tensor([[6., 8.]])
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be None, 'rms' or 'layer', got {norm!r}")
    if activation not in ACTIVATIONS:
        names = "None, 'gelu', 'gelu_tanh' or 'swiglu'"
        raise ValueError(f"activation must be {names}, got {activation!r}")
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a number that is not negative, got {eps!r}")
    check_float(x=x)
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if weight.dtype not in (x.dtype, torch.int8):
        raise TypeError(f"weight must be {x.dtype} as x is, or int8, got {weight.dtype}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must have shape (N, K), not empty, got {tuple(weight.shape)}")
    lines, features = weight.shape
    if activation == "swiglu" and lines % 2:
        raise ValueError(f"weight must have shape (2N, K) for swiglu, got {tuple(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(f"x must have shape (..., {features}), got {tuple(x.shape)}")
    if (scales is None) == (weight.dtype == torch.int8):
        has = "one for each row of an int8 weight" if scales is None else "None for a float weight"
        raise ValueError(f"scales must be {has}")
    if norm is None and norm_weight is not None:
        raise ValueError("norm_weight must be None without a norm")
    if norm != "layer" and norm_bias is not None:
        raise ValueError("norm_bias must be None unless norm is 'layer'")
    channels = lines // 2 if activation == "swiglu" else lines
    for name, tensor, shape in (
        ("norm_weight", norm_weight, (features,)), ("norm_bias", norm_bias, (features,)),
        ("bias", bias, (lines,)), ("scales", scales, (lines,)),
        ("residual", residual, (*x.shape[:-1], channels)),
    ):  # fmt: skip
        if tensor is not None:
            check_float(**{name: tensor})
            if tensor.shape != shape or tensor.device != x.device:
                check_shape(name, tensor, shape)
                check_same_device(x=x, **{name: tensor})
    check_same_device(x=x, weight=weight)
    if counters is not None:
        rows = x.numel() // features
        check_counters(counters, _least_counters(rows, lines), x.device)
    if scales is not None and scales.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"scales must be float32, got {scales.dtype}")
    if weight.is_mkldnn:
        if using_reference():
            weight = weight.to_dense()
        else:
            floats = {"x": x, "norm_weight": norm_weight, "norm_bias": norm_bias, "bias": bias}
            check_no_grad("a packed weight has no backward", **floats, residual=residual)
            return _by_packed(
                x, weight, norm_weight, norm_bias, bias, residual, norm, activation, eps
            )
    check_no_grad("norm_linear has no gradient for it; use reference()", scales=scales)
    args = (
        x, weight, scales, norm_weight, norm_bias, bias, residual, norm, activation, float(eps),
    )  # fmt: skip
    if using_reference():
        return norm_linear_ref(*args)
    if counters is not None:
        refuse_forward_mode()
        floats = {"x": x, "weight": weight, "norm_weight": norm_weight, "norm_bias": norm_bias}
        check_no_grad("norm_linear has no gradients with counters", **floats, bias=bias,
                      residual=residual)  # fmt: skip
        return _counted(*args, counters)
    differentiable = (x, weight, norm_weight, norm_bias, bias, residual)
    run: Callable[..., Tensor] = _NormLinear.apply if needs_function(*differentiable) else _fwd
    return run(*args)
