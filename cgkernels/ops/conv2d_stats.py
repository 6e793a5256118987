"""Convolution without bias, and the statistics of its result that an instance norm needs.

    y = conv2d(x, weight),   mean, var = those of y over its pixels, for each image and channel

The statistics come out of the convolution's epilogue, where y is still in registers: the norm that
follows need not read y for them. They are those of y as it is stored, rounded.

Shapes   x: (N, C, H, W); weight: (O, C, k, k), k = 1, 3 or 4; stride 1 or 2; padding 0, 1 or 2;
         y: (N, O, h, w), h = (H + 2 padding - k) // stride + 1, w alike; mean, var: (N, O).
         y is channels_last; so are x and weight best, which are copied otherwise.
Dtypes   float32, float16, bfloat16 (float64 on CPU), the weight as x; float32 inside, and products
         of float32 are never TF32; y has x's dtype; mean, var: float32. An image has the same bits
         alone or in any batch.
Backward in x and weight, of y, mean and var, as often as one likes: PyTorch's convolutions.
Source   implicit GEMM: arXiv:1410.0759; merging of variances: Chan, Golub, LeVeque 1979.
         Derivatives from the formulas.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cgkernels._triton import tl, triton
from cgkernels.checks import check_choice, check_float, check_same_device
from cgkernels.library import define_op, needs_function, using_reference, without_autocast
from cgkernels.moments import centered_moments, merge_moments
from cgkernels.rows import channels_last_format, compute_dtype

KERNELS, STRIDES, PADDINGS = (1, 3, 4), (1, 2), (0, 1, 2)


# 1. Reference -------------------------------------------------------------------------------------
@without_autocast
def conv2d_stats_ref(
    x: Tensor, weight: Tensor, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x)
    y = F.conv2d(x.to(dtype), weight.to(dtype), None, stride, padding).to(x.dtype)
    return y, *_stats_ref(y)


def _stats_ref(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each image and channel, (N, O), in at least float32."""
    _, mean, var = centered_moments(y, over_batch=False)
    return mean.view(y.shape[:2]), var.view(y.shape[:2])


def conv2d_stats_bwd_ref(
    wanted: tuple[bool, bool],
    dy: Tensor | None,
    dmean: Tensor | None,
    dvar: Tensor | None,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    mean: Tensor,
    stride: int,
    padding: int,
) -> tuple[Tensor | None, ...]:
    """Gradients of x and weight where wanted, None elsewhere; dy, dmean, dvar: None for zero.

    As in PyTorch, the two convolutions take the gradient of y rounded to its dtype.
    """
    wide, pixels = compute_dtype(x), math.prod(y.shape[2:])
    parts: list[Tensor] = []
    if dy is not None:
        parts.append(dy.to(wide))
    if dmean is not None:
        parts.append((dmean / pixels)[..., None, None])
    if dvar is not None:
        parts.append((dvar * (2 / pixels))[..., None, None] * (y - mean[..., None, None]))
    if not parts:
        return None, None
    dy = functools.reduce(operator.add, parts).to(x.dtype).expand(y.shape)
    # In half types a GPU accumulates in float32, and a CPU may be slow, or round in between.
    dtype = x.dtype if x.is_cuda else wide
    dy = dy.to(dtype).contiguous(memory_format=channels_last_format())
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy, x.to(dtype), weight.to(dtype), None, (stride, stride),
        (padding, padding), (1, 1), False, (0, 0), 1, (*wanted, False),
    )  # fmt: skip
    return tuple(
        gradient.to(x.dtype) if want else None
        for want, gradient in zip(wanted, (dx, dweight), strict=True)
    )


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# 2. Kernels ---------------------------------------------------------------------------------------
@triton.jit
def _sum_of_rows(  # type: ignore[no-untyped-def]
    x, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """By twos, eights and the rest: no chain of additions is long, nor its error large.

    Tensor cores leave row r and r + 8 in one thread, eight rows in a warp: so no sum costs more.
    """
    x = x.reshape(ROWS // 16, 2, 8, COLUMNS)
    return tl.sum(tl.sum(tl.sum(x, 1), 1), 0)


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    y_ptr, mean_ptr, rest_ptr, m2_ptr, x_ptr, weight_ptr, features, height, width, channels,
    out_width, pixels, stride, padding, tiles, blocks, extent, reach,
    KERNEL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_M pixels of an image and BLOCK_N output channels: an implicit GEMM.

    Stores y, and of the tile what `merge_moments` takes: of each channel the mean, what rounding
    took from it, and the sum of the squared distances from both.
    Programs that share pixels are neighbors.
    """
    program = tl.program_id(0)
    block, tile, image = program % blocks, program // blocks % tiles, program // blocks // tiles
    # 64 bits only where positions, or the distances of taps, need them.
    pixel = (tile + extent * 0) * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel_mask = pixel < pixels
    channel = block * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_mask = channel < channels
    # The first tap of each pixel; where there is no pixel, all its taps are above the image.
    top = tl.where(pixel_mask, pixel // out_width * stride - padding, -KERNEL)
    left = pixel % out_width * stride - padding
    first = (image.to(tl.int64) * height + top) * width + left
    x_row_ptr = x_ptr + first[:, None] * features
    weight_row_ptr = weight_ptr + channel.to(tl.int64)[:, None] * (KERNEL * KERNEL * features)

    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # One loop over blocks of features and taps, that it may be pipelined. Its counter is split by
    # // and %, which Triton miscompiles with eight warps (triton#1254): launch at most four.
    steps = (features + BLOCK_K - 1) // BLOCK_K * (KERNEL * KERNEL)
    for i in tl.range(0, steps, num_stages=STAGES):
        tap = i % (KERNEL * KERNEL)
        down, right = tap // KERNEL, tap % KERNEL
        feature = i // (KERNEL * KERNEL) * BLOCK_K + tl.arange(0, BLOCK_K)
        feature_mask = (feature < features)[None, :]
        row, column = top + down, left + right
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        at = ((down + reach * 0) * width + right) * features + feature
        at = x_row_ptr + at[None, :]
        x = tl.load(at, mask=inside[:, None] & feature_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        at = weight_row_ptr + (tap * features + feature)[None, :]
        w = tl.load(at, mask=channel_mask[:, None] & feature_mask, other=0.0)  # [BLOCK_N, BLOCK_K]
        y = tl.dot(x, tl.trans(w), y, input_precision="ieee")

    rounded = y.to(y_ptr.dtype.element_ty)
    at = image.to(tl.int64) * pixels + pixel
    at = y_ptr + at[:, None] * channels + channel[None, :]
    tl.store(at, rounded, mask=pixel_mask[:, None] & channel_mask[None, :])
    y = rounded.to(tl.float32)  # zero where there is no pixel
    share = 1.0 / tl.minimum(BLOCK_M, pixels - tile * BLOCK_M)
    mean = _sum_of_rows(y, BLOCK_M, BLOCK_N) * share
    distance = tl.where(pixel_mask[:, None], y - mean[None, :], 0.0)
    total = _sum_of_rows(distance, BLOCK_M, BLOCK_N)
    rest = total * share
    m2 = _sum_of_rows(distance * distance, BLOCK_M, BLOCK_N) - total * rest
    at = (image.to(tl.int64) * tiles + tile) * channels + channel
    tl.store(mean_ptr + at, mean, mask=channel_mask)
    tl.store(rest_ptr + at, rest, mask=channel_mask)
    tl.store(m2_ptr + at, m2, mask=channel_mask)


# 3. Launchers -------------------------------------------------------------------------------------
def _launch_config(pixels: int, channels: int, features: int, dtype: torch.dtype) -> dict[str, Any]:
    """Sizes that may depend on nothing else, or an image would depend on its batch.

    Four warps at most (see `_kernel`). A tile of 64 x 128 moves fewer bytes a product than one of
    64 x 64; it is taken where one image then still makes the 128 programs that a GPU needs.
    Features that are no multiple of 16 are loaded one by one, each through a pointer of its own:
    few at once, and so are those of float32, or registers spill. Of float32 by vectors ptxas left
    alone spills to get down to 128 registers.
    """
    half, vectors = dtype in (torch.float16, torch.bfloat16), features % 16 == 0
    wide = half and channels >= 128 and triton.cdiv(pixels, 64) * triton.cdiv(channels, 128) >= 128
    block_n = 128 if wide else 64 if half or vectors else 32
    return {
        "BLOCK_M": 64,
        "BLOCK_N": min(block_n, max(16, triton.next_power_of_2(channels))),
        "BLOCK_K": min(64 if half and vectors else 16, max(16, triton.next_power_of_2(features))),
        "STAGES": 4 if half or vectors else 2, "num_warps": 4,
        "maxnreg": 192 if vectors and not half else None,
    }  # fmt: skip


def _launch(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, var = _fake(x, weight, stride, padding)
    if y.numel() == 0:
        return y, mean, var
    x, weight = _channels_last(x), _channels_last(weight)
    images, channels, height, width = y.shape
    features, kernel, pixels = x.shape[1], weight.shape[2], height * width
    config = _launch_config(pixels, channels, features, x.dtype)
    tiles = triton.cdiv(pixels, config["BLOCK_M"])
    blocks = triton.cdiv(channels, config["BLOCK_N"])
    parts = torch.empty(3, images, tiles, channels, dtype=torch.float32, device=x.device)
    _kernel[(images * tiles * blocks,)](
        y, *parts, x, weight, features, *x.shape[2:], channels, width, pixels, stride, padding,
        tiles, blocks, tiles * config["BLOCK_M"], kernel * x.shape[3] * (features + 64),
        KERNEL=kernel, enable_fp_fusion=True, **config,
    )  # fmt: skip
    merge_moments(mean, var, parts, pixels, config["BLOCK_M"])
    return y, mean, var


# 4. Registration ----------------------------------------------------------------------------------
def _fake(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    images, _, *sides = x.shape
    channels, _, kernel, _ = weight.shape
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in sides)
    y = torch.empty(
        (images, channels, height, width), dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    mean, var = (x.new_empty(images, channels, dtype=compute_dtype(x)) for _ in range(2))
    return y, mean, var


def _cpu(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    out, mean, var = _fake(x, weight, stride, padding)
    if out.numel() == 0:
        return out, mean, var
    dtype = compute_dtype(x)
    x, weight = _channels_last(x.to(dtype)), _channels_last(weight.to(dtype))
    images = x.split(1 if weight.shape[2] == 1 else len(x))
    y = out.copy_(torch.cat([_conv2d(part, weight, stride, padding) for part in images]))
    return y, *_stats_ref(y)


def _conv2d(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """The convolution by oneDNN, which gives an image the same bits in any batch, if k is not 1.

    So much for what was tried. One image alone PyTorch may compute in another way: it is doubled.
    """
    several = torch.cat([x, x]) if len(x) == 1 else x
    return F.conv2d(several, weight, None, stride, padding)[: len(x)]


_fwd = define_op(
    "conv2d_stats",
    "(Tensor x, Tensor weight, int stride, int padding) -> (Tensor, Tensor, Tensor)",
    cuda=_launch,
    cpu=_cpu,
    fake=_fake,
)


# 5. Public function -------------------------------------------------------------------------------
class _Conv2dStats(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, *ctx.options = inputs
        ctx.save_for_backward(x, weight, *output[:2])
        ctx.set_materialize_grads(False)  # without statistics in a loss, y is not read for them

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:2]
        gradients = conv2d_stats_bwd_ref(wanted, dy, dmean, dvar, *ctx.saved_tensors, *ctx.options)
        return *gradients, None, None


def conv2d_stats(
    x: Tensor, weight: Tensor, *, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution without bias, with mean and variance of each image and channel of its result.

        y = conv2d(x, weight),   mean = mean(y),   var = mean((y - mean)^2)   over the pixels of y

    For the instance norm that follows, (y - mean) / sqrt(var + eps), which then need not read y for
    its statistics. Around the image x is zero. An image has the same bits alone or in any batch.

    Args:
        x: (N, C, H, W) float32, float16 or bfloat16 (float64 on the CPU); any strides, best
            channels_last.
        weight: (O, C, k, k) of x's dtype, k = 1, 3 or 4; best channels_last.
        stride: 1 or 2.
        padding: 0, 1 or 2 on each side.

    Returns:
        y: (N, O, h, w) in x's dtype, channels_last, h = (H + 2 padding - k) // stride + 1, w alike.
        mean, var (biased): (N, O) float32 (float64 for float64), of y as it was rounded. All three
        are differentiable in x and weight.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.

    Example:
        >>> x = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
        >>> y, mean, var = conv2d_stats(x, torch.ones(1, 1, 1, 1), stride=1, padding=0)
        >>> mean, var
        (tensor([[3.]]), tensor([[3.5000]]))
    """
    check_float(x=x, weight=weight)
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must be {x.dtype} as x is, got {weight.dtype}")
    check_same_device(x=x, weight=weight)
    check_choice("stride", stride, STRIDES)
    check_choice("padding", padding, PADDINGS)
    if weight.dim() != 4 or 0 in weight.shape[:2]:
        raise ValueError(
            f"weight must have shape (O, C, k, k), not empty, got {tuple(weight.shape)}"
        )
    _, features, kernel, other = weight.shape
    if kernel != other or kernel not in KERNELS:
        raise ValueError(
            f"weight must have shape (O, C, k, k), k of {KERNELS}, got {tuple(weight.shape)}"
        )
    if x.dim() != 4 or x.shape[1] != features:
        raise ValueError(f"x must have shape (N, {features}, H, W), got {tuple(x.shape)}")
    least = max(1, kernel - 2 * padding)
    if min(x.shape[2:]) < least:
        raise ValueError(
            f"x must have sides of at least {least}, for a kernel of {kernel} with padding "
            f"{padding}, got {tuple(x.shape)}"
        )
    if using_reference():
        return conv2d_stats_ref(x, weight, stride, padding)
    run: Callable[..., tuple] = _Conv2dStats.apply if needs_function(x, weight) else _fwd
    return run(x, weight, stride, padding)
