"""Forward diffusion with noise drawn in registers: x_t = alpha_t x0 + sigma_t z, and the target.

    target = z (epsilon), x0 (x0), alpha z - sigma x0 (v), z - x0 (flow)

Shapes   x0, x_t, target: (B, *event); table (T, 2) = (alpha, sigma); t (B,).
Dtypes   float32, float16, bfloat16 (float64 on CPU); alpha, sigma and the sum stay float32 and are
         rounded once, so that small sigma are not lost in half types.
Backward in x0: once by kernel, twice by differentiating add_noise_bwd_ref.
Source   DDPM arXiv:2006.11239; v: arXiv:2202.00512; flow matching: arXiv:2210.02747.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cgkernels import random
from cgkernels._triton import tl, triton
from cgkernels.checks import (
    as_index,
    as_seed,
    as_step,
    check_float,
    check_no_grad,
    check_noise_size,
    check_rows,
    check_same_device,
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
def add_noise_ref(
    x0: Tensor, table: Tensor, t: Tensor, seed: Tensor, index: Tensor, target: str
) -> tuple[Tensor, Tensor]:
    dtype, alpha, sigma, p0, p1 = _coefficients_ref(x0, table, t, target)
    z = random.normal(
        tuple(x0.shape), seed=seed, index=index, step=0, stream=random.STREAM_TRAINING, dtype=dtype
    )
    x = x0.to(dtype)
    return (alpha * x + sigma * z).to(x0.dtype), (p0 * x + p1 * z).to(x0.dtype)


def add_noise_bwd_ref(
    dx_t: Tensor, dtarget: Tensor, table: Tensor, t: Tensor, target: str
) -> Tensor:
    dtype, alpha, _, p0, _ = _coefficients_ref(dx_t, table, t, target)
    return (alpha * dx_t.to(dtype) + p0 * dtarget.to(dtype)).to(dx_t.dtype)


def _coefficients_ref(
    x: Tensor, table: Tensor, t: Tensor, target: str
) -> tuple[torch.dtype, Tensor, Tensor, Tensor, Tensor]:
    """The dtype of the computation; alpha, sigma, p0 and p1, (B, 1, ...)."""
    dtype = compute_dtype(x)
    per_row = (-1,) + (1,) * (x.dim() - 1)
    alpha, sigma = (c.view(per_row) for c in table[t].to(dtype).unbind(1))
    return dtype, alpha, sigma, *target_coefficients_ref(target, alpha, sigma)


# 2. Kernels ---------------------------------------------------------------------------------------
@triton.jit
def _fwd_kernel(  # type: ignore[no-untyped-def]
    x_t_ptr, x_t_strides, target_ptr, target_strides, x0_ptr, x0_strides,
    table_ptr, t_ptr, t_stride, seed_ptr, index_ptr, timesteps, numel, channels, pixels, blocks,
    TARGET: tl.constexpr, CHANNELS_LAST: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK elements of one row."""
    row, first, position, mask = block_of_row(blocks, numel, BLOCK)
    element = element_of(position, channels, pixels, CHANNELS_LAST)
    alpha, sigma = table_row(table_ptr, tl.load(t_ptr + row * t_stride), timesteps)
    p0, p1 = target_coefficients(alpha, sigma, TARGET)
    seed, index = tl.load(seed_ptr), tl.load(index_ptr + row)
    z = normal_of(seed, index, 0, first, element, STREAM_TRAINING, CHANNELS_LAST, BLOCK)
    x0 = load_row(x0_ptr, x0_strides, row, position, element, pixels, mask, DENSE)
    x_t = alpha * x0 + sigma * z
    target = p0 * x0 + p1 * z
    store_row(x_t_ptr, x_t_strides, x_t, row, position, element, pixels, mask, DENSE)
    store_row(target_ptr, target_strides, target, row, position, element, pixels, mask, DENSE)


@triton.jit
def _bwd_kernel(  # type: ignore[no-untyped-def]
    dx0_ptr, dx0_strides, dx_t_ptr, dx_t_strides, dtarget_ptr, dtarget_strides,
    table_ptr, t_ptr, t_stride, timesteps, numel, channels, pixels, blocks,
    TARGET: tl.constexpr, CHANNELS_LAST: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK elements of one row."""
    row, _, position, mask = block_of_row(blocks, numel, BLOCK)
    element = element_of(position, channels, pixels, CHANNELS_LAST)
    alpha, sigma = table_row(table_ptr, tl.load(t_ptr + row * t_stride), timesteps)
    p0, _ = target_coefficients(alpha, sigma, TARGET)
    dx_t = load_row(dx_t_ptr, dx_t_strides, row, position, element, pixels, mask, DENSE)
    dtarget = load_row(dtarget_ptr, dtarget_strides, row, position, element, pixels, mask, DENSE)
    dx0 = alpha * dx_t
    dx0 += p0 * dtarget
    store_row(dx0_ptr, dx0_strides, dx0, row, position, element, pixels, mask, DENSE)


# 3. Launchers -------------------------------------------------------------------------------------
def _launch_fwd(
    x0: Tensor, table: Tensor, t: Tensor, seed: Tensor, index: Tensor, target: str
) -> tuple[Tensor, Tensor]:
    x_t, target_out = _fake_fwd(x0, table, t, seed, index, target)
    if x0.numel() == 0:
        return x_t, target_out
    tensors = (x_t, target_out, with_row_strides(x0))
    grid, arguments = row_launch(*tensors)
    _fwd_kernel[grid](
        *with_strides(*tensors),
        table.contiguous(), t, t.stride(0), seed, index.contiguous(), table.shape[0],
        TARGET=TARGETS.index(target), **arguments,
    )  # fmt: skip
    return x_t, target_out


def _launch_bwd(dx_t: Tensor, dtarget: Tensor, table: Tensor, t: Tensor, target: str) -> Tensor:
    dx0 = _fake_bwd(dx_t, dtarget, table, t, target)
    if dx0.numel() == 0:
        return dx0
    tensors = (dx0, with_row_strides(dx_t), with_row_strides(dtarget))
    grid, arguments = row_launch(*tensors)
    _bwd_kernel[grid](
        *with_strides(*tensors),
        table.contiguous(), t, t.stride(0), table.shape[0],
        TARGET=TARGETS.index(target), **arguments,
    )  # fmt: skip
    return dx0


# 4. Registration ----------------------------------------------------------------------------------
def _fake_fwd(
    x0: Tensor, table: Tensor, t: Tensor, seed: Tensor, index: Tensor, target: str
) -> tuple[Tensor, Tensor]:
    return empty_rows(x0), empty_rows(x0)


def _cpu_fwd(
    x0: Tensor, table: Tensor, t: Tensor, seed: Tensor, index: Tensor, target: str
) -> tuple[Tensor, Tensor]:
    x_t, target_out = add_noise_ref(x0, table, t, seed, index, target)
    return in_strides_of(x0, x_t), in_strides_of(x0, target_out)


def _fake_bwd(dx_t: Tensor, dtarget: Tensor, table: Tensor, t: Tensor, target: str) -> Tensor:
    return empty_rows(dx_t)


def _cpu_bwd(dx_t: Tensor, dtarget: Tensor, table: Tensor, t: Tensor, target: str) -> Tensor:
    return in_strides_of(dx_t, add_noise_bwd_ref(dx_t, dtarget, table, t, target))


_fwd = define_op(
    "add_noise_fwd",
    "(Tensor x0, Tensor table, Tensor t, Tensor seed, Tensor index, str target) "
    "-> (Tensor, Tensor)",
    cuda=_launch_fwd,
    cpu=_cpu_fwd,
    fake=_fake_fwd,
)

_bwd = define_op(
    "add_noise_bwd",
    "(Tensor dx_t, Tensor dtarget, Tensor table, Tensor t, str target) -> Tensor",
    cuda=_launch_bwd,
    cpu=_cpu_bwd,
    fake=_fake_bwd,
)


# 5. Public function -------------------------------------------------------------------------------
class _AddNoise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x0: Tensor, table: Tensor, t: Tensor, seed: Tensor, index: Tensor, target: str
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(table, t)
        ctx.target = target
        return _fwd(x0, table, t, seed, index, target)

    @staticmethod
    def backward(ctx: Any, dx_t: Tensor, dtarget: Tensor) -> tuple[Tensor | None, ...]:
        # Grad mode in a backward means create_graph=True.
        run: Callable[..., Tensor] = add_noise_bwd_ref if torch.is_grad_enabled() else _bwd
        return run(dx_t, dtarget, *ctx.saved_tensors, ctx.target), None, None, None, None, None


def add_noise(
    x0: Tensor,
    *,
    table: Tensor,
    t: int | Tensor,
    seed: int | Tensor,
    index: Tensor | None = None,
    target: str = "epsilon",
) -> tuple[Tensor, Tensor]:
    """Noisy sample x_t = alpha_t x0 + sigma_t z and what a denoiser is to predict from it.

    z is drawn in registers from (seed, index), stream 3, step 0, and never stored;
    `diffusion_loss` draws the same.

    Args:
        x0: (B, *event), any strides.
        table: (T, 2) float32 on x0's device (float64 with float64 x0): alpha_t, sigma_t.
        t: timestep of each sample, int or integer tensor () or (B,), in [0, T). On a GPU tensor
            this is not checked: rows with a timestep outside the table come out as NaN.
        seed: 64-bit int or one-element int64 tensor. In training seed or index must change from
            step to step, or a network learns one z by heart: seed=step, or index = row + 2^32 epoch
            for row the number of a sample in its data set. A warning says so, once, where a line
            draws for another (B,) t with the same int and no index, while gradients are recorded.
        index: (B,) int64, the number of each sample; default 0 .. B - 1.
        target: "epsilon": z; "x0": x0; "v": alpha z - sigma x0; "flow": z - x0.

    Returns:
        (x_t, target), both like x0. Differentiable in x0.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.

    Example, two steps of training:
        >>> table, x0 = torch.tensor([[0.8, 0.6]]), torch.zeros(2, 3)
        >>> for step in range(2):
        ...     x_t, z = add_noise(x0, table=table, t=torch.tensor([0, 0]), seed=step)
        >>> bool(torch.allclose(x_t, 0.6 * z))
        True
    """
    check_target(target)
    check_float(x0=x0, table=table)
    check_rows("x0", x0)
    check_same_device(x0=x0, table=table)
    check_table(table, 2)
    check_no_grad("add_noise has no gradient for it; use reference()", table=table)
    check_noise_size("x0", tuple(x0.shape))
    if isinstance(t, Tensor) and t.dim() and torch.is_grad_enabled():
        warn_of_repeated_noise("add_noise", seed, index, t)
    t = as_step("t", t, x0.shape[0], x0.device, table.shape[0])
    seed, _ = as_seed(seed, x0.device)
    index = as_index(index, x0.shape[0], x0.device)
    if using_reference():
        return add_noise_ref(x0, table, t, seed, index, target)
    run: Callable[..., tuple[Tensor, Tensor]]
    run = _AddNoise.apply if needs_function(x0) else _fwd
    return run(x0, table, t, seed, index, target)
