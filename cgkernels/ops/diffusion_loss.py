"""Denoising loss of each sample: weight mean((pred - target)^2), with the noise drawn again.

The target is the one that `add_noise` made from the same (seed, index); drawing its noise a second
time in registers costs less than storing and reading it.

Shapes   pred, x0: (B, *event); table (T, 2) = (alpha, sigma); t, weight, loss: (B,).
Dtypes   float32, float16, bfloat16 (float64 on CPU), pred and x0 mixed as they come; float32
         inside; the loss is float32. The order of its sum depends on the event's size and memory
         format alone.
Backward in pred, x0: once by kernel, twice by differentiating diffusion_loss_bwd_ref.
Source   DDPM arXiv:2006.11239 eq. 14; v: arXiv:2202.00512; weights: arXiv:2303.09556.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cgkernels import random
from cgkernels._triton import tl, triton
from cgkernels.checks import (
    as_index,
    as_row_values,
    as_seed,
    as_step,
    check_float,
    check_no_grad,
    check_noise_size,
    check_rows,
    check_same_device,
    check_shape,
    check_table,
    warn_of_repeated_noise,
)
from cgkernels.device import (
    STREAM_TRAINING,
    block_of_row,
    element_of,
    load_row,
    normal_of,
    store_row,
    sum_of_parts,
    table_row,
    target_coefficients,
)
from cgkernels.library import define_op, needs_function, using_reference
from cgkernels.rows import (
    compute_dtype,
    empty_rows,
    in_strides_of,
    row_launch,
    with_row_strides,
    with_strides,
)
from cgkernels.targets import TARGETS, check_target
from cgkernels.targets import target_coefficients as target_coefficients_ref


# 1. Reference -------------------------------------------------------------------------------------
def diffusion_loss_ref(
    pred: Tensor,
    x0: Tensor,
    table: Tensor,
    t: Tensor,
    seed: Tensor,
    index: Tensor,
    weight: Tensor,
    target: str,
) -> Tensor:
    difference, _ = _difference_ref(pred, x0, table, t, seed, index, target)
    return weight * difference.square().unsqueeze(-1).flatten(1).mean(1)  # (B,) has no event


def diffusion_loss_bwd_ref(
    dloss: Tensor,
    pred: Tensor,
    x0: Tensor,
    table: Tensor,
    t: Tensor,
    seed: Tensor,
    index: Tensor,
    weight: Tensor,
    target: str,
) -> tuple[Tensor, Tensor]:
    difference, p0 = _difference_ref(pred, x0, table, t, seed, index, target)
    factor = 2 * weight * dloss / max(1, pred[0:1].numel())
    dpred = factor.view(p0.shape) * difference
    return dpred.to(pred.dtype), (-p0 * dpred).to(x0.dtype)


def _difference_ref(
    pred: Tensor,
    x0: Tensor,
    table: Tensor,
    t: Tensor,
    seed: Tensor,
    index: Tensor,
    target: str,
) -> tuple[Tensor, Tensor]:
    """pred - target, and the share p0 that x0 has in the target."""
    dtype = compute_dtype(pred, x0)
    per_row = (-1,) + (1,) * (pred.dim() - 1)
    alpha, sigma = (c.view(per_row) for c in table[t].to(dtype).unbind(1))
    p0, p1 = target_coefficients_ref(target, alpha, sigma)
    z = random.normal(
        tuple(x0.shape), seed=seed, index=index, step=0, stream=random.STREAM_TRAINING, dtype=dtype
    )
    return pred.to(dtype) - (p0 * x0.to(dtype) + p1 * z), p0


# 2. Kernels ---------------------------------------------------------------------------------------
@triton.jit
def _difference(  # type: ignore[no-untyped-def]
    pred_ptr, pred_strides, x0_ptr, x0_strides, table_ptr, t_ptr, t_stride, seed_ptr, index_ptr,
    timesteps, row, first, position, mask, channels, pixels,
    TARGET: tl.constexpr, CHANNELS_LAST: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """pred - target of a block (zero beyond the row), p0 and the elements."""
    element = element_of(position, channels, pixels, CHANNELS_LAST)
    alpha, sigma = table_row(table_ptr, tl.load(t_ptr + row * t_stride), timesteps)
    p0, p1 = target_coefficients(alpha, sigma, TARGET)
    seed, index = tl.load(seed_ptr), tl.load(index_ptr + row)
    z = normal_of(seed, index, 0, first, element, STREAM_TRAINING, CHANNELS_LAST, BLOCK)
    pred = load_row(pred_ptr, pred_strides, row, position, element, pixels, mask, DENSE)
    x0 = load_row(x0_ptr, x0_strides, row, position, element, pixels, mask, DENSE)
    return tl.where(mask, pred - (p0 * x0 + p1 * z), 0.0), p0, element


@triton.jit
def _partial_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, pred_ptr, pred_strides, x0_ptr, x0_strides,
    table_ptr, t_ptr, t_stride, seed_ptr, index_ptr, timesteps, numel, channels, pixels, blocks,
    TARGET: tl.constexpr, CHANNELS_LAST: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK elements of one row: the sum of their squared differences."""
    row, first, position, mask = block_of_row(blocks, numel, BLOCK)
    difference, _, _ = _difference(
        pred_ptr, pred_strides, x0_ptr, x0_strides, table_ptr, t_ptr, t_stride, seed_ptr,
        index_ptr, timesteps, row, first, position, mask, channels, pixels,
        TARGET, CHANNELS_LAST, DENSE, BLOCK,
    )  # fmt: skip
    tl.store(partial_ptr + tl.program_id(0), tl.sum(difference * difference, 0))


@triton.jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    loss_ptr, partial_ptr, weight_ptr, weight_stride, blocks, numel, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: partial sums in the order of their blocks, weighted mean."""
    row = tl.program_id(0).to(tl.int64)
    total = sum_of_parts(partial_ptr + row * blocks, blocks, BLOCK)
    weight = tl.load(weight_ptr + row * weight_stride)
    tl.store(loss_ptr + row, weight * (total / numel))


@triton.jit
def _bwd_kernel(  # type: ignore[no-untyped-def]
    dpred_ptr, dpred_strides, dx0_ptr, dx0_strides, pred_ptr, pred_strides, x0_ptr, x0_strides,
    dloss_ptr, weight_ptr, weight_stride,
    table_ptr, t_ptr, t_stride, seed_ptr, index_ptr, timesteps, numel, channels, pixels, blocks,
    TARGET: tl.constexpr, CHANNELS_LAST: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK elements of one row."""
    row, first, position, mask = block_of_row(blocks, numel, BLOCK)
    difference, p0, element = _difference(
        pred_ptr, pred_strides, x0_ptr, x0_strides, table_ptr, t_ptr, t_stride, seed_ptr,
        index_ptr, timesteps, row, first, position, mask, channels, pixels,
        TARGET, CHANNELS_LAST, DENSE, BLOCK,
    )  # fmt: skip
    weight = tl.load(weight_ptr + row * weight_stride)
    dpred = (2 * weight * tl.load(dloss_ptr + row) / numel) * difference
    store_row(dpred_ptr, dpred_strides, dpred, row, position, element, pixels, mask, DENSE)
    store_row(dx0_ptr, dx0_strides, -p0 * dpred, row, position, element, pixels, mask, DENSE)


# 3. Launchers -------------------------------------------------------------------------------------
def _launch_fwd(
    pred: Tensor,
    x0: Tensor,
    table: Tensor,
    t: Tensor,
    seed: Tensor,
    index: Tensor,
    weight: Tensor,
    target: str,
) -> Tensor:
    loss = _fake_fwd(pred, x0, table, t, seed, index, weight, target)
    if pred.numel() == 0:
        return loss.fill_(float("nan"))  # the mean of nothing, as in PyTorch
    rows = pred.shape[0]
    tensors = (with_row_strides(pred), with_row_strides(x0))
    grid, arguments = row_launch(*tensors)
    blocks = arguments["blocks"]
    partial = torch.empty(rows * blocks, dtype=torch.float32, device=pred.device)
    _partial_kernel[grid](
        partial, *with_strides(*tensors), table.contiguous(), t, t.stride(0), seed,
        index.contiguous(), table.shape[0], TARGET=TARGETS.index(target), **arguments,
    )  # fmt: skip
    _merge_kernel[(rows,)](
        loss, partial, weight, weight.stride(0), blocks, arguments["numel"], BLOCK=256,
        num_warps=2, enable_fp_fusion=True,
    )  # fmt: skip
    return loss


def _launch_bwd(
    dloss: Tensor,
    pred: Tensor,
    x0: Tensor,
    table: Tensor,
    t: Tensor,
    seed: Tensor,
    index: Tensor,
    weight: Tensor,
    target: str,
) -> tuple[Tensor, Tensor]:
    dpred, dx0 = _fake_bwd(dloss, pred, x0, table, t, seed, index, weight, target)
    if pred.numel() == 0:
        return dpred, dx0
    tensors = (dpred, dx0, with_row_strides(pred), with_row_strides(x0))
    grid, arguments = row_launch(*tensors)
    _bwd_kernel[grid](
        *with_strides(*tensors), dloss.contiguous(), weight, weight.stride(0), table.contiguous(),
        t, t.stride(0), seed, index.contiguous(), table.shape[0], TARGET=TARGETS.index(target),
        **arguments,
    )  # fmt: skip
    return dpred, dx0


# 4. Registration ----------------------------------------------------------------------------------
def _fake_fwd(
    pred: Tensor,
    x0: Tensor,
    table: Tensor,
    t: Tensor,
    seed: Tensor,
    index: Tensor,
    weight: Tensor,
    target: str,
) -> Tensor:
    return torch.empty(pred.shape[0], dtype=weight.dtype, device=pred.device)


def _fake_bwd(
    dloss: Tensor,
    pred: Tensor,
    x0: Tensor,
    table: Tensor,
    t: Tensor,
    seed: Tensor,
    index: Tensor,
    weight: Tensor,
    target: str,
) -> tuple[Tensor, Tensor]:
    return empty_rows(pred), empty_rows(x0)


def _cpu_bwd(
    dloss: Tensor,
    pred: Tensor,
    x0: Tensor,
    table: Tensor,
    t: Tensor,
    seed: Tensor,
    index: Tensor,
    weight: Tensor,
    target: str,
) -> tuple[Tensor, Tensor]:
    dpred, dx0 = diffusion_loss_bwd_ref(dloss, pred, x0, table, t, seed, index, weight, target)
    return in_strides_of(pred, dpred), in_strides_of(x0, dx0)


_fwd = define_op(
    "diffusion_loss_fwd",
    "(Tensor pred, Tensor x0, Tensor table, Tensor t, Tensor seed, Tensor index, Tensor weight, "
    "str target) -> Tensor",
    cuda=_launch_fwd,
    cpu=diffusion_loss_ref,
    fake=_fake_fwd,
)

_bwd = define_op(
    "diffusion_loss_bwd",
    "(Tensor dloss, Tensor pred, Tensor x0, Tensor table, Tensor t, Tensor seed, Tensor index, "
    "Tensor weight, str target) -> (Tensor, Tensor)",
    cuda=_launch_bwd,
    cpu=_cpu_bwd,
    fake=_fake_bwd,
)


# 5. Public function -------------------------------------------------------------------------------
class _DiffusionLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,
        x0: Tensor,
        table: Tensor,
        t: Tensor,
        seed: Tensor,
        index: Tensor,
        weight: Tensor,
        target: str,
    ) -> Tensor:
        ctx.save_for_backward(pred, x0, table, t, seed, index, weight)
        ctx.target = target
        return _fwd(pred, x0, table, t, seed, index, weight, target)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        # Grad mode in a backward means create_graph=True.
        run: Callable[..., tuple] = _bwd
        if torch.is_grad_enabled():
            run = diffusion_loss_bwd_ref
        return *run(dloss, *ctx.saved_tensors, ctx.target), None, None, None, None, None, None


def diffusion_loss(
    pred: Tensor,
    x0: Tensor,
    *,
    table: Tensor,
    t: int | Tensor,
    seed: int | Tensor,
    index: Tensor | None = None,
    target: str = "epsilon",
    weight: Tensor | None = None,
) -> Tensor:
    """Denoising loss of each sample: loss_i = weight_i mean over the event of (pred - target)^2.

    Args:
        pred: (B, *event), what the network made of `add_noise`'s x_t; any strides.
        x0: (B, *event), the clean sample given to `add_noise`.
        table, t, seed, index, target: as they were given to `add_noise`; so seed or index must
            change from step to step of training, as is said there, and by a warning like that.
        weight: (B,) floating, for instance a table of min-SNR weights at t; default 1.

    Returns:
        (B,) float32 (float64 for float64 inputs). Differentiable in pred and x0; to learn a weight,
        multiply the result by it.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.

    Example:
        >>> table, x0 = torch.tensor([[0.8, 0.6]]), torch.randn(2, 3)
        >>> x_t, z = add_noise(x0, table=table, t=0, seed=0)
        >>> diffusion_loss(z, x0, table=table, t=0, seed=0)
        tensor([0., 0.])
    """
    check_target(target)
    check_float(pred=pred, x0=x0, table=table)
    check_rows("x0", x0)
    check_shape("pred", pred, tuple(x0.shape))
    check_same_device(x0=x0, pred=pred, table=table)
    check_table(table, 2)
    check_no_grad("diffusion_loss has no gradient for it; multiply the loss", weight=weight)
    check_no_grad("diffusion_loss has no gradient for it; use reference()", table=table)
    check_noise_size("x0", tuple(x0.shape))
    rows = x0.shape[0]
    if torch.is_grad_enabled() and (pred.requires_grad or x0.requires_grad):
        warn_of_repeated_noise("diffusion_loss", seed, index, pred)
    t = as_step("t", t, rows, x0.device, table.shape[0])
    like = pred if pred.dtype == torch.float64 else x0
    weight = as_row_values("weight", 1.0 if weight is None else weight, rows, like)
    seed, _ = as_seed(seed, x0.device)
    index = as_index(index, rows, x0.device)
    if using_reference():
        return diffusion_loss_ref(pred, x0, table, t, seed, index, weight, target)
    run: Callable[..., Tensor] = _DiffusionLoss.apply if needs_function(pred, x0) else _fwd
    return run(pred, x0, table, t, seed, index, weight, target)
