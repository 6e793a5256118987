"""First layer of a conditional discriminator: convolution of two images, read where they lie.

    out = leaky_relu(conv2d(cat([x, y], 1), weight) + bias, slope)

Shapes   x: (N, Cx, H, W); y: (N, Cy, H, W) or none; weight: (O, Cx + Cy, k, k), k = 1, 3 or 4;
         bias: (O,); out: (N, O, (H + 2 padding - k) // stride + 1, likewise of W), channels_last.
Dtypes   float32, float16, bfloat16 (float64 on CPU), all alike; float32 inside. An image has the
         same bits alone or in any batch.
Backward in x, y, weight, bias by PyTorch's convolutions, as often as one likes. The slope is taken
         from the sign of the output, which alone is kept beside inputs and weight.
Source   arXiv:1611.07004 (conditional patch discriminator); LeakyReLU: Maas et al., 2013.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cgkernels._triton import tl, triton
from cgkernels.checks import (
    check_choice,
    check_float,
    check_int,
    check_number,
    check_same_device,
    check_shape,
)
from cgkernels.library import define_op, needs_function, using_reference, without_autocast
from cgkernels.rows import channels_last_format, compute_dtype


# 1. Reference -------------------------------------------------------------------------------------
@without_autocast
def pair_conv2d_ref(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    slope: float,
) -> Tensor:
    dtype = compute_dtype(x)
    pair = x if y is None else torch.cat([x, y], 1)
    bias = None if bias is None else bias.to(dtype)
    z = F.conv2d(pair.to(dtype), weight.to(dtype), bias, stride, padding)
    return (z if slope == 1 else F.leaky_relu(z, slope)).to(x.dtype)


def pair_conv2d_bwd_ref(
    wanted: tuple[bool, bool, bool, bool],
    dout: Tensor,
    out: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    slope: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, y, weight and bias where wanted, None elsewhere.

    Each image is convolved with its slice of the weight, so that nothing is concatenated. All in
    one memory format, since oneDNN takes twice as long where they are mixed; in channels_last its
    sums have four times the error. As in PyTorch, convolutions on a GPU take the gradients rounded
    to x's dtype.
    """
    dtype = x.dtype if x.is_cuda else compute_dtype(x)
    layout = channels_last_format() if x.is_cuda else torch.contiguous_format
    dz = dout.to(dtype)
    if slope != 1:
        dz = torch.ops.aten.leaky_relu_backward(dz, out.to(dtype), slope, True)
    dz = dz.contiguous(memory_format=layout)
    gradients: list[Tensor | None] = [None] * 4
    parts: list[Tensor] = []
    of_x, of_y = weight[:, : x.shape[1]], weight[:, x.shape[1] :]
    for i, image, part in ((0, x, of_x), (1, y, of_y)):
        if image is None or not (wanted[i] or wanted[2]):
            continue
        dimage, dpart, _ = torch.ops.aten.convolution_backward(
            dz, image.to(dtype, memory_format=layout), part.to(dtype, memory_format=layout), None,
            [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [wanted[i], wanted[2], False],
        )  # fmt: skip
        parts.append(dpart)
        if wanted[i]:
            gradients[i] = dimage.to(x.dtype)
    if wanted[2]:
        gradients[2] = torch.cat(parts, 1).to(weight.dtype)
    if wanted[3]:
        assert bias is not None
        gradients[3] = dz.sum((0, 2, 3), dtype=compute_dtype(x)).to(bias.dtype)
    return tuple(gradients)


# 2. Kernels ---------------------------------------------------------------------------------------
@triton.jit
def _accumulate(  # type: ignore[no-untyped-def]
    z, x_ptr, x_strides, n, row, column, height, width, channels, reach, weight_row_ptr,
    channel_mask, KERNEL: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z and the products of one image with its slice of the weight.

    The products go over (channel, row, column), the order of the weight in memory. row, column: of
    the corner of each window, where an address is the sum of one of the window and one of the tap.
    """
    taps: tl.constexpr = KERNEL * KERNEL
    corner = n * x_strides[0] + row.to(tl.int64) * x_strides[2] + column.to(tl.int64) * x_strides[3]
    for start in range(0, channels * taps, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        i, j = k % taps // KERNEL, k % KERNEL
        tap = (k // taps).to(tl.int64) * x_strides[1]
        # 64 bits only where a tap reaches so far: they take registers.
        tap += (i + reach * 0) * x_strides[2]
        tap += (j + reach * 0) * x_strides[3]
        i, j = row[:, None] + i[None, :], column[:, None] + j[None, :]
        inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
        inside = inside & (k < channels * taps)[None, :]
        x = tl.load(x_ptr + corner[:, None] + tap[None, :], mask=inside, other=0.0)
        mask = channel_mask[:, None] & (k < channels * taps)[None, :]
        weight = tl.load(weight_row_ptr[:, None] + k[None, :], mask=mask, other=0.0)
        z = tl.dot(x, tl.trans(weight), z, input_precision="ieee")
    return z


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    out_ptr, x_ptr, x_strides, x_channels, y_ptr, y_strides, y_channels, weight_ptr, bias_ptr,
    height, width, columns, pixels, outputs, padding, slope, tiles, blocks, extent, reach,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_M pixels of one image and BLOCK_N channels of the output."""
    program = tl.program_id(0)
    block, tile = program % blocks, program // blocks % tiles
    n = (program // blocks // tiles).to(tl.int64)
    # 64 bits only where positions need them.
    pixel = (tile + extent * 0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = block * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_mask = channel < outputs
    row, column = pixel // columns * STRIDE - padding, pixel % columns * STRIDE - padding
    features = (x_channels + y_channels) * (KERNEL * KERNEL)
    weight_row_ptr = weight_ptr + channel.to(tl.int64) * features
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # of BLOCK_M pixels, BLOCK_N channels
    z = _accumulate(
        z, x_ptr, x_strides, n, row, column, height, width, x_channels, reach, weight_row_ptr,
        channel_mask, KERNEL, BLOCK_K,
    )  # fmt: skip
    if y_ptr is not None:
        weight_row_ptr += x_channels * (KERNEL * KERNEL)
        z = _accumulate(
            z, y_ptr, y_strides, n, row, column, height, width, y_channels, reach, weight_row_ptr,
            channel_mask, KERNEL, BLOCK_K,
        )  # fmt: skip
    if bias_ptr is not None:
        z += tl.load(bias_ptr + channel, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    z = tl.where(z > 0, z, z * slope)
    at = out_ptr + (n * pixels + pixel)[:, None] * outputs + channel[None, :]
    mask = (pixel < pixels)[:, None] & channel_mask[None, :]
    tl.store(at, z.to(out_ptr.dtype.element_ty), mask=mask)


# 3. Launchers -------------------------------------------------------------------------------------
def _launch_config(features: int, outputs: int, dtype: torch.dtype) -> dict[str, Any]:
    """Sizes that may not depend on the batch, or an image would.

    Three channels are 48 features, which blocks of 16 divide. At most four warps: with eight, loops
    over a flattened (channel, row, column) have been miscompiled (triton issue 1254). In float32
    loads ahead of their use take more registers than there are.
    """
    block_n = max(16, min(64, triton.next_power_of_2(outputs)))
    block_k = 32 if features % 32 == 0 or features > 128 else 16
    wide = dtype == torch.float32
    return {
        "BLOCK_M": 64 if wide else 128, "BLOCK_N": block_n, "BLOCK_K": block_k,
        "num_stages": 1 if wide else 3, "num_warps": 4,
    }  # fmt: skip


def _launch(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    slope: float,
) -> Tensor:
    out = _fake(x, y, weight, bias, stride, padding, slope)
    if x.shape[0] == 0:
        return out
    n, outputs, rows, columns = out.shape
    channels, kernel = x.shape[1], weight.shape[-1]
    config = _launch_config(channels * kernel**2, outputs, x.dtype)
    tiles = triton.cdiv(rows * columns, config["BLOCK_M"])
    blocks = triton.cdiv(outputs, config["BLOCK_N"])
    strides = [s for image in (x, y) if image is not None for s in image.stride()[2:]]
    _kernel[(n * tiles * blocks,)](
        out, x, x.stride(), channels, y, None if y is None else y.stride(),
        weight.shape[1] - channels, weight.contiguous(),
        None if bias is None else bias.contiguous(), x.shape[2], x.shape[3], columns,
        rows * columns, outputs, padding, float(slope), tiles, blocks,
        tiles * config["BLOCK_M"], (kernel - 1) * max(strides), KERNEL=kernel, STRIDE=stride,
        enable_fp_fusion=True, **config,
    )  # fmt: skip
    return out


# 4. Registration ----------------------------------------------------------------------------------
def _fake(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    slope: float,
) -> Tensor:
    size = ((s + 2 * padding - weight.shape[-1]) // stride + 1 for s in x.shape[2:])
    return torch.empty(
        (x.shape[0], weight.shape[0], *size), dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last,
    )  # fmt: skip


def _cpu(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    slope: float,
) -> Tensor:
    """One image after the other: all at once, oneDNN's bits would depend on the batch.

    A copy of both in channels_last, in which oneDNN is fastest, costs less than it gains, and less
    than two convolutions, which need none.
    """
    out = _fake(x, y, weight, bias, stride, padding, slope)
    dtype, channels, last = compute_dtype(x), x.shape[1], torch.channels_last
    pair = torch.empty(
        (1, weight.shape[1], *x.shape[2:]), dtype=dtype, device=x.device, memory_format=last
    )
    weight = weight.to(dtype, memory_format=last)
    bias = None if bias is None else bias.to(dtype)
    for n in range(x.shape[0]):
        pair[:, :channels] = x[n]
        if y is not None:
            pair[:, channels:] = y[n]
        z = F.conv2d(pair, weight, bias, stride, padding)
        out[n] = z[0] if slope == 1 else F.leaky_relu_(z, slope)[0]
    return out


_fwd = define_op(
    "pair_conv2d",
    "(Tensor x, Tensor? y, Tensor weight, Tensor? bias, int stride, int padding, float slope) "
    "-> Tensor",
    cuda=_launch,
    cpu=_cpu,
    fake=_fake,
)


# 5. Public function -------------------------------------------------------------------------------
class _PairConv2d(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, y, weight, bias, *ctx.options = inputs
        ctx.save_for_backward(output, x, y, weight, bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:4]
        gradients = pair_conv2d_bwd_ref(wanted, dout, *ctx.saved_tensors, *ctx.options)
        return *gradients, None, None, None


def pair_conv2d(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 2,
    padding: int = 1,
    slope: float = 0.2,
) -> Tensor:
    """First layer of a conditional discriminator: leaky_relu(conv2d(cat([x, y], 1)), slope).

    Both images are read where they lie, and bias and LeakyReLU cost no pass of their own.

    Args:
        x: (N, Cx, H, W) float32, float16 or bfloat16 (float64 on the CPU); any strides.
        y: (N, Cy, H, W) of x's dtype, any strides; None for a convolution of x alone.
        weight: (O, Cx + Cy, k, k) of x's dtype, those of x first; k = 1, 3 or 4.
        bias: (O,) of x's dtype.
        stride: 1 or 2. padding: zeros at each border, at most k - 1.
        slope: below zero, itself not negative; 1 for none.

    Returns:
        (N, O, (H + 2 padding - k) // stride + 1, likewise of W) in x's dtype, channels_last.
        Differentiable in all tensors, twice, too. The forward never multiplies float32 as TF32; the
        backward is PyTorch's, and follows its settings.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.

    Example:
        >>> x, y = torch.tensor([3.0, 1.0]).view(2, 1, 1, 1, 1)
        >>> pair_conv2d(x, y, torch.tensor([1.0, -5.0]).view(1, 2, 1, 1), padding=0).item()
        -0.4000000059604645
    """
    check_float(x=x, weight=weight)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must have shape (N, Cx, H, W), only N 0, got {tuple(x.shape)}")
    tensors, channels = {"x": x, "weight": weight}, x.shape[1]
    if y is not None:
        check_float(y=y)
        rows, _, height, width = x.shape
        if y.dim() != 4 or y.shape[1] == 0 or (y.shape[0], *y.shape[2:]) != (rows, height, width):
            raise ValueError(
                f"y must have shape ({rows}, Cy, {height}, {width}) with channels, "
                f"got {tuple(y.shape)}"
            )
        tensors["y"], channels = y, channels + y.shape[1]
    kernel = weight.shape[-1] if weight.dim() == 4 else 0
    if kernel not in (1, 3, 4) or tuple(weight.shape[1:]) != (channels, kernel, kernel):
        raise ValueError(
            f"weight must have shape (O, {channels}, k, k) with k = 1, 3 or 4, "
            f"got {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"weight must have output channels, got {tuple(weight.shape)}")
    check_choice("stride", stride, (1, 2))
    check_int("padding", padding, 0, kernel - 1)
    if min(x.shape[2:]) + 2 * padding < kernel:
        raise ValueError(
            f"x must have height and width of at least {kernel - 2 * padding}, got {tuple(x.shape)}"
        )
    check_number("slope", slope, 0)
    if bias is not None:
        check_float(bias=bias)
        check_shape("bias", bias, (weight.shape[0],))
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype} as x is, got {tensor.dtype}")
    check_same_device(**tensors)
    args = (x, y, weight, bias, stride, padding, float(slope))
    if using_reference():
        return pair_conv2d_ref(*args)
    run = _PairConv2d.apply if needs_function(x, y, weight, bias) else _fwd
    return run(*args)
