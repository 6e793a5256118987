"""Last layer of a patch discriminator and its loss: mean over the patches of loss(conv2d(x)).

    d = conv2d(x, weight) + bias,   s = 1 for real and generator, -1 for fake
    lsgan: (d - (1 + s) / 2)^2      vanilla, nonsaturating: softplus(-s d)
    hinge: relu(1 - s d), for the generator -d      wgan: -s d

A convolution to one channel is a product of each pixel with the k^2 taps of the weight, of which a
patch then adds up k^2 neighbors: x is read once, and what lies between is small.

Shapes   x: (N, C, H, W); weight: (1, C, k, k), k = 1, 3 or 4; bias: (1,); loss: (N,); patch map:
         (N, 1, H + 2 padding - k + 1, W + 2 padding - k + 1).
Dtypes   float32, float16, bfloat16 (float64 on CPU); float32 inside, and so is the loss; the patch
         map has x's dtype. An image has the same bits alone or in any batch.
Backward in x, weight, bias, in plain PyTorch, as often as one likes.
Source   patches: arXiv:1611.07004; losses: arXiv:1611.04076 (lsgan), arXiv:1406.2661 (vanilla,
         nonsaturating), arXiv:1705.02894 (hinge), arXiv:1701.07875 (wgan).
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
    check_same_device,
    check_shape,
)
from cgkernels.library import define_op, needs_function, using_reference, without_autocast
from cgkernels.rows import compute_dtype, row_strides, with_row_strides

LOSSES = ("lsgan", "vanilla", "nonsaturating", "hinge", "wgan")
PATCH_TARGETS = ("real", "fake", "generator")

# Forms of loss, as the kernel knows them; 0 is none.
_SQUARE, _SOFTPLUS, _HINGE, _LINEAR = 1, 2, 3, 4
_FORMS = dict(zip(LOSSES, (_SQUARE, _SOFTPLUS, _SOFTPLUS, _HINGE, _LINEAR), strict=True))


# 1. Reference -------------------------------------------------------------------------------------
@without_autocast
def patch_head_loss_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss: str | None,
    target: str | None,
    padding: int,
) -> Tensor:
    dtype = compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    logits = F.conv2d(x.to(dtype), weight.to(dtype), bias, padding=padding)
    return _result_ref(logits, x.dtype, loss, target)


def patch_head_loss_bwd_ref(
    wanted: tuple[bool, bool, bool],
    dresult: Tensor,
    dlogits: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss: str | None,
    target: str | None,
    padding: int,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias where wanted, None elsewhere.

    dlogits: (N, 1, h, w), the derivatives of each loss in its logits; None where these are to be
    differentiated again. As in PyTorch, matrix products on a GPU take the gradients rounded to x's
    dtype.
    """
    wide, (n, c, h, w), k = compute_dtype(x), x.shape, weight.shape[-1]
    if loss is None or target is None:
        dlogits = dresult.to(wide)
    else:
        if dlogits is None:
            dlogits = _dlogits_ref(_logits(x, weight, bias, padding), loss, target)
        dlogits = dlogits * dresult.view(-1, 1, 1, 1)
    gradients: list[Tensor | None] = [None] * 3
    dtype = x.dtype if x.is_cuda else wide
    if wanted[0] or wanted[1]:
        windows = F.unfold(dlogits, k, padding=k - 1 - padding)  # (N, k^2, H W)
        windows = windows.transpose(1, 2).reshape(n * h * w, k * k).to(dtype)
    if wanted[0]:
        dx = windows @ _taps(weight).to(dtype).t()
        gradients[0] = dx.to(x.dtype).view(n, h, w, c).permute(0, 3, 1, 2)
    if wanted[1]:
        dweight = windows.t() @ x.permute(0, 2, 3, 1).reshape(n * h * w, c).to(dtype)
        gradients[1] = dweight.flip(0).t().reshape(weight.shape).to(weight.dtype)
    if wanted[2]:
        assert bias is not None
        gradients[2] = dlogits.sum().view(1).to(bias.dtype)
    return tuple(gradients)


def _form_of(loss: str, target: str) -> tuple[int, float]:
    """The form of a loss, and its sign."""
    form = _FORMS[loss]
    if form == _HINGE and target == "generator":
        form = _LINEAR
    return form, -1.0 if target == "fake" else 1.0


def _losses_ref(logits: Tensor, loss: str, target: str) -> Tensor:
    form, sign = _form_of(loss, target)
    if form == _SQUARE:
        return (logits - (1 + sign) / 2).square()
    if form == _SOFTPLUS:
        return -F.logsigmoid(sign * logits)
    return torch.relu(1 - sign * logits) if form == _HINGE else -sign * logits


def _dlogits_ref(logits: Tensor, loss: str, target: str) -> Tensor:
    """Derivatives of the mean over the patches."""
    form, sign = _form_of(loss, target)
    if form == _SQUARE:
        slopes = 2 * (logits - (1 + sign) / 2)
    elif form == _SOFTPLUS:
        slopes = -sign * torch.sigmoid(-sign * logits)
    elif form == _HINGE:
        slopes = -sign * (~(sign * logits >= 1)).to(logits.dtype)  # as PyTorch's of NaN
    else:
        slopes = torch.full_like(logits, -sign)
    return slopes / logits[0:1].numel() if len(logits) else slopes


def _result_ref(logits: Tensor, dtype: torch.dtype, loss: str | None, target: str | None) -> Tensor:
    if loss is None or target is None:
        return logits.to(dtype)
    return _losses_ref(logits, loss, target).flatten(1).mean(1)


def _taps(weight: Tensor) -> Tensor:
    """(C, k^2): what pixels are multiplied with, the last tap first, as `fold` adds them up."""
    return weight.reshape(weight.shape[1], -1).flip(1)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """The convolution by products with taps, which on a CPU is many times faster than oneDNN's.

    One image after the other, or its bits would depend on the batch. One tap gets a second beside
    it: MKL's product of a matrix and a vector depends on where in memory they are.
    """
    dtype, k = compute_dtype(x), weight.shape[-1]
    pixels = x.to(dtype).permute(0, 2, 3, 1).flatten(1, 2).contiguous()  # (N, H W, C)
    taps = F.pad(_taps(weight).to(dtype), (0, 1 if k == 1 else 0))
    products = [image @ taps for image in pixels]
    stacked = torch.stack(products) if products else pixels @ taps  # (N, H W, k^2)
    logits = F.fold(
        stacked[..., : k * k].transpose(1, 2), _patches(x, weight, padding), k,
        padding=k - 1 - padding,
    )  # fmt: skip
    return logits if bias is None else logits + bias.to(dtype)


def _patches(x: Tensor, weight: Tensor, padding: int) -> tuple[int, int]:
    """Rows and columns of the patch map."""
    rows, columns = (size + 2 * padding - weight.shape[-1] + 1 for size in x.shape[2:])
    return rows, columns


# 2. Kernels ---------------------------------------------------------------------------------------
@triton.jit
def _products_kernel(  # type: ignore[no-untyped-def]
    product_ptr, x_ptr, x_strides, weight_ptr, channels, pixels, pitch, tiles,
    TAPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_M pixels of one image: their products with each tap of the weight."""
    program = tl.program_id(0)
    n = (program // tiles).to(tl.int64)
    # 64 bits only where positions need them.
    m = (program % tiles + pitch * 0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tap = tl.arange(0, 16)
    x_row_ptr = x_ptr + n * x_strides[0] + m.to(tl.int64)[:, None] * x_strides[2]
    product = tl.zeros((BLOCK_M, 16), tl.float32)
    for start in tl.range(0, channels, BLOCK_C, num_stages=STAGES):
        c = start + tl.arange(0, BLOCK_C)
        mask = (m < pixels)[:, None] & (c < channels)[None, :]
        x = tl.load(x_row_ptr + c.to(tl.int64)[None, :] * x_strides[1], mask=mask, other=0.0)
        mask = (c < channels)[:, None] & (tap < TAPS)[None, :]
        weight = tl.load(weight_ptr + c[:, None] * TAPS + tap[None, :], mask=mask, other=0.0)
        product = tl.dot(x, weight, product, input_precision="ieee")
    # Rows are padded to whole tiles, so that the stores need no mask, and are wide.
    at = product_ptr + (n * TAPS + tap)[None, :] * pitch + m[:, None]
    tl.store(at, product, mask=(tap < TAPS)[None, :])


@triton.jit
def _patches_kernel(  # type: ignore[no-untyped-def]
    result_ptr, dlogits_ptr, product_ptr, bias_ptr, sign, height, width, columns, patches, pitch,
    padding, extent, KERNEL: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per image: its logits from the products, their derivatives and mean loss."""
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(extent * 0, patches, BLOCK):
        patch = start + tl.arange(0, BLOCK)
        patch_mask = patch < patches
        logit = tl.zeros((BLOCK,), tl.float32)
        for tap in tl.static_range(KERNEL * KERNEL):
            i = patch // columns + tap // KERNEL - padding
            j = patch % columns + tap % KERNEL - padding
            inside = patch_mask & (i >= 0) & (i < height) & (j >= 0) & (j < width)
            at = (n * (KERNEL * KERNEL) + tap) * pitch + i * width + j
            logit += tl.load(product_ptr + at, mask=inside, other=0.0)
        if bias_ptr is not None:
            logit += tl.load(bias_ptr).to(tl.float32)
        at = n * patches + patch
        if FORM == 0:
            tl.store(result_ptr + at, logit.to(result_ptr.dtype.element_ty), mask=patch_mask)
        else:
            loss, slope = _loss_and_slope(logit, sign, FORM)
            total += tl.where(patch_mask, loss, 0.0)
            slope = tl.div_rn(slope, tl.full((), patches, tl.float32))  # 1 is no tensor
            tl.store(dlogits_ptr + at, slope, mask=patch_mask)
    if FORM != 0:
        tl.store(result_ptr + n, tl.sum(total, 0) / patches)


@triton.jit
def _loss_and_slope(logit, sign, FORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """A loss by its form (as in `_FORMS`) and sign, and its derivative."""
    if FORM == 1:
        difference = logit - (0.5 + 0.5 * sign)
        return difference * difference, 2.0 * difference
    elif FORM == 2:
        value, slope = _softplus(-sign * logit)
        return value, -sign * slope
    elif FORM == 3:
        margin = 1.0 - sign * logit
        slope = tl.where(sign * logit >= 1.0, 0.0, -sign)
        return tl.maximum(margin, 0.0, propagate_nan=tl.PropagateNan.ALL), slope
    else:
        return -sign * logit, tl.zeros_like(logit) - sign


@triton.jit
def _softplus(z):  # type: ignore[no-untyped-def]
    """log(1 + e^z) with full relative precision, which the GPU's logarithm lacks near 1; its slope.

    With t = e^-|z| it is max(z, 0) + log(1 + t), and log(1 + t) = 2 artanh(r), r = t / (2 + t).
    The series stops where the next term is under 2e-9 of the sum.
    """
    t = tl.exp(-tl.abs(z))
    r = t / (2.0 + t)
    square = r * r
    p = tl.fma(square, 0.06666666666666667, 0.07692307692307693)
    p = tl.fma(square, p, 0.09090909090909091)
    p = tl.fma(square, p, 0.1111111111111111)
    p = tl.fma(square, p, 0.14285714285714285)
    p = tl.fma(square, p, 0.2)
    p = tl.fma(square, p, 0.3333333333333333)
    value = tl.maximum(z, 0.0) + 2.0 * tl.fma(r * square, p, r)
    return value, tl.where(z < 0, t, 1.0) / (1.0 + t)


# 3. Launchers -------------------------------------------------------------------------------------
def _launch_config(pixels: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tiles of 64 pixels are the least that Hopper's tensor cores take.

    They may depend on the size of an image alone, or its bits would depend on the batch.
    """
    block_c = 32 if dtype == torch.float32 else 64
    return {"BLOCK_M": 64, "BLOCK_C": block_c, "STAGES": 4, "num_warps": 4}


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss: str | None,
    target: str | None,
    padding: int,
) -> tuple[Tensor, Tensor]:
    result, dlogits = _fake(x, weight, bias, loss, target, padding)
    if x.shape[0] == 0:
        return result, dlogits
    x = with_row_strides(x)
    n, channels, height, width = x.shape
    kernel, pixels = weight.shape[-1], height * width
    config = _launch_config(pixels, x.dtype)
    tiles = triton.cdiv(pixels, config["BLOCK_M"])
    pitch = tiles * config["BLOCK_M"]
    product = torch.empty(n * kernel**2 * pitch, dtype=torch.float32, device=x.device)
    _products_kernel[(n * tiles,)](
        product, x, row_strides(x), weight.contiguous(), channels, pixels, pitch, tiles,
        TAPS=kernel**2, enable_fp_fusion=True, **config,
    )  # fmt: skip
    form, sign = (0, 1.0) if loss is None or target is None else _form_of(loss, target)
    rows, columns = _patches(x, weight, padding)
    _patches_kernel[(n,)](
        result, dlogits, product, bias, sign, height, width, columns, rows * columns, pitch,
        padding, triton.cdiv(rows * columns, 1024) * 1024, KERNEL=kernel, FORM=form, BLOCK=1024,
        num_warps=16, enable_fp_fusion=True,
    )  # fmt: skip
    return result, dlogits


# 4. Registration ----------------------------------------------------------------------------------
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss: str | None,
    target: str | None,
    padding: int,
) -> tuple[Tensor, Tensor]:
    """The patch map and nothing, or losses and their derivatives in the logits."""
    shape = (x.shape[0], 1, *_patches(x, weight, padding))
    if loss is None:
        return x.new_empty(shape), x.new_empty(0)
    dtype = compute_dtype(x)
    return x.new_empty(x.shape[0], dtype=dtype), x.new_empty(shape, dtype=dtype)


def _cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss: str | None,
    target: str | None,
    padding: int,
) -> tuple[Tensor, Tensor]:
    logits = _logits(x, weight, bias, padding)
    result = _result_ref(logits, x.dtype, loss, target)
    if loss is None or target is None:
        return result, x.new_empty(0)
    return result, _dlogits_ref(logits, loss, target)


_fwd = define_op(
    "patch_head_loss",
    "(Tensor x, Tensor weight, Tensor? bias, str? loss, str? target, int padding) "
    "-> (Tensor, Tensor)",
    cuda=_launch,
    cpu=_cpu,
    fake=_fake,
)


# 5. Public function -------------------------------------------------------------------------------
class _PatchHeadLoss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, *ctx.options = inputs
        ctx.save_for_backward(x, weight, bias, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, dresult: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, dlogits = ctx.saved_tensors
        # Grad mode in a backward means create_graph=True.
        dlogits = None if torch.is_grad_enabled() else dlogits
        gradients = patch_head_loss_bwd_ref(
            ctx.needs_input_grad[:3], dresult, dlogits, x, weight, bias, *ctx.options
        )
        return *gradients, None, None, None


def patch_head_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    loss: str | None,
    target: str | None,
    padding: int = 1,
) -> Tensor:
    """Last convolution of a patch discriminator and the loss of each image, in one pass over x.

        loss_n = mean over the patches of patch_loss(conv2d(x, weight, bias), loss, target)[n]

    Args:
        x: (N, C, H, W) float32, float16 or bfloat16 (float64 on the CPU); any strides, fastest in
            channels_last.
        weight: (1, C, k, k) of x's dtype; k = 1, 3 or 4, stride 1.
        bias: (1,) of x's dtype.
        loss: "lsgan", "vanilla", "nonsaturating", "hinge" or "wgan", as `patch_loss` defines them;
            None for the patch map.
        target: "real", "fake" or "generator"; None without a loss.
        padding: zeros at each border, at most k - 1.

    Returns:
        (N,) float32 (float64 for float64), of logits that are never rounded to x's dtype; or with
        loss=None the patch map (N, 1, H + 2 padding - k + 1, W + 2 padding - k + 1) in x's dtype.
        Differentiable in x, weight and bias, twice, too (gradient penalties).

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.

    Example:
        >>> x, weight = torch.tensor([3.0, 0.0]).view(1, 1, 1, 2), torch.ones(1, 1, 1, 1)
        >>> patch_head_loss(x, weight, loss="hinge", target="fake", padding=0)
        tensor([2.5000])
    """
    if loss is None:
        if target is not None:
            raise ValueError(f"target must be None without a loss, got {target!r}")
    else:
        _check_names(loss, target)
    check_float(x=x, weight=weight)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must have shape (N, C, H, W), only N 0, got {tuple(x.shape)}")
    channels, kernel = x.shape[1], weight.shape[-1] if weight.dim() else 0
    if kernel not in (1, 3, 4) or tuple(weight.shape) != (1, channels, kernel, kernel):
        raise ValueError(
            f"weight must have shape (1, {channels}, k, k) with k = 1, 3 or 4, "
            f"got {tuple(weight.shape)}"
        )
    check_int("padding", padding, 0, kernel - 1)
    if min(x.shape[2:]) + 2 * padding < kernel:
        raise ValueError(
            f"x must have height and width of at least {kernel - 2 * padding}, got {tuple(x.shape)}"
        )
    tensors = {"x": x, "weight": weight}
    if bias is not None:
        check_float(bias=bias)
        check_shape("bias", bias, (1,))
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype} as x is, got {tensor.dtype}")
    check_same_device(**tensors)
    args = (x, weight, bias, loss, target, padding)
    if using_reference():
        return patch_head_loss_ref(*args)
    run = _PatchHeadLoss.apply if needs_function(x, weight, bias) else _fwd
    return run(*args)[0]


def patch_loss(logits: Tensor, loss: str, target: str) -> Tensor:
    """The loss of each logit d of a discriminator, elementwise.

        loss                    real              fake             generator
        lsgan                   (d - 1)^2         d^2              (d - 1)^2
        vanilla, nonsaturating  softplus(-d)      softplus(d)      softplus(-d)
        hinge                   relu(1 - d)       relu(1 + d)      -d
        wgan                    -d                d                -d

    Args:
        logits: any shape; float32, float16 or bfloat16 (float64 on the CPU).
        loss: its name. vanilla is binary cross entropy, whose generator here is the nonsaturating
            one, as in the reference implementations.
        target: "real" and "fake" for a step of the discriminator, "generator" for the other.

    Returns:
        Of logits' shape, float32 (float64 for float64). Plain PyTorch, differentiable at will.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.

    Example:
        >>> patch_loss(torch.tensor([3.0, -0.5]), "hinge", "real")
        tensor([0.0000, 1.5000])
    """
    _check_names(loss, target)
    check_float(logits=logits)
    return _losses_ref(logits.to(compute_dtype(logits)), loss, target)


def _check_names(loss: str, target: str | None) -> None:
    check_choice("loss", loss, LOSSES)
    check_choice("target", target, PATCH_TARGETS)
