"""Reparametrized sample of a Gaussian and its divergence from another, in one pass.

    z  = mean + exp(log_variance / 2) epsilon
    kl = sum_d max(free_bits, kl_d)
    kl_d = (e^r - 1 - r + (mean - prior_mean)^2 exp(-prior_log_variance)) / 2
    r  = log_variance - prior_log_variance

epsilon is drawn in registers; without a prior it is the standard normal one. With free_bits 0, kl
is the divergence itself. Near the prior e^r - 1 - r is a series, or nothing of it would be left.

Shapes   mean, log_variance, prior_mean, prior_log_variance, z: (B, *event); kl: (B,).
Dtypes   float32, float16, bfloat16 (float64 on CPU), mixed as they come; float32 inside; z has
         mean's dtype, kl is float32. The order of its sum depends on the event's size and memory
         format alone.
Backward in mean, log_variance, prior_mean, prior_log_variance: once by kernel, which draws the
         noise again, twice by differentiating sample_and_kl_bwd_ref.
Source   arXiv:1312.6114, sections 2.4 and appendix B. Free bits: arXiv:1606.04934, appendix C.8;
         there the floor is under the mean over a minibatch of the sum over a group of dimensions,
         here under each dimension of each sample, so that no row depends on another.
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
    check_noise_size,
    check_number,
    check_rows,
    check_same_device,
    check_shape,
)
from cgkernels.device import (
    STREAM_LATENTS,
    block_of_row,
    element_of,
    expm1_and_minus,
    is_last_program,
    load_row,
    normal_of,
    store_row,
    sum_of_parts,
)
from cgkernels.functions import expm1_minus
from cgkernels.library import define_op, needs_function, using_reference
from cgkernels.rows import (
    compute_dtype,
    empty_rows,
    in_strides_of,
    row_launch,
    with_row_strides,
    with_strides,
)


# 1. Reference -------------------------------------------------------------------------------------
def sample_and_kl_ref(
    mean: Tensor,
    log_variance: Tensor,
    prior_mean: Tensor | None,
    prior_log_variance: Tensor | None,
    seed: Tensor,
    index: Tensor,
    step: Tensor,
    free_bits: float,
) -> tuple[Tensor, Tensor]:
    dtype, std, noise, _, _, _, kl = _parts_ref(
        mean, log_variance, prior_mean, prior_log_variance, seed, index, step
    )
    kl = kl.clamp(min=free_bits)
    z = (mean.to(dtype) + std * noise).to(mean.dtype)
    # Contiguous, so that the sum of a row has one order in any batch; (B,) has no event.
    return z, kl.unsqueeze(-1).flatten(1).contiguous().sum(1)


def sample_and_kl_bwd_ref(
    dz: Tensor,
    dkl: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    prior_mean: Tensor | None,
    prior_log_variance: Tensor | None,
    seed: Tensor,
    index: Tensor,
    step: Tensor,
    free_bits: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients with respect to mean, log_variance, prior_mean and prior_log_variance."""
    dtype, std, noise, distance, precision, growth, kl = _parts_ref(
        mean, log_variance, prior_mean, prior_log_variance, seed, index, step
    )
    dz, dkl = dz.to(dtype), dkl.view(-1, *(1,) * (mean.dim() - 1)).expand(kl.shape)
    dkl = torch.where(kl < free_bits, torch.zeros_like(dkl), dkl)
    pull = dkl * distance * precision
    dmean = (dz + pull).to(mean.dtype)
    dlog_variance = (0.5 * (dz * std * noise + dkl * growth)).to(log_variance.dtype)
    if prior_mean is None or prior_log_variance is None:
        return dmean, dlog_variance, None, None
    dprior = -0.5 * (dkl * growth + pull * distance)
    dprior = dprior.to(prior_log_variance.dtype)
    return dmean, dlog_variance, (-pull).to(prior_mean.dtype), dprior


def _parts_ref(
    mean: Tensor,
    log_variance: Tensor,
    prior_mean: Tensor | None,
    prior_log_variance: Tensor | None,
    seed: Tensor,
    index: Tensor,
    step: Tensor,
) -> tuple[torch.dtype, Tensor, Tensor, Tensor, Tensor | float, Tensor, Tensor]:
    """The dtype of the computation, and in it what the formula consists of.

    exp(log_variance / 2), epsilon, mean - prior_mean, exp(-prior_log_variance), e^r - 1, kl_d.
    """
    dtype = compute_dtype(mean, log_variance, prior_mean, prior_log_variance)
    noise = random.normal(
        tuple(mean.shape), seed=seed, index=index, step=step, stream=random.STREAM_LATENTS,
        dtype=dtype,
    )  # fmt: skip
    precision: Tensor | float = 1.0
    distance, log_ratio = mean.to(dtype), log_variance.to(dtype)
    std = (0.5 * log_ratio).exp()
    if prior_mean is not None and prior_log_variance is not None:
        distance = distance - prior_mean.to(dtype)
        log_ratio = log_ratio - prior_log_variance.to(dtype)
        precision = (-prior_log_variance.to(dtype)).exp()
    kl = 0.5 * (expm1_minus(log_ratio) + distance.square() * precision)
    return dtype, std, noise, distance, precision, log_ratio.expm1(), kl


# 2. Kernels ---------------------------------------------------------------------------------------
@triton.jit
def _parts(  # type: ignore[no-untyped-def]
    mean_ptr, mean_strides, log_variance_ptr, log_variance_strides,
    prior_mean_ptr, prior_mean_strides, prior_log_variance_ptr, prior_log_variance_strides,
    seed_ptr, index_ptr, step_ptr, step_stride, row, first, position, element, mask, pixels,
    CHANNELS_LAST: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `_parts_ref`, of a block, with the mean itself first."""
    mean = load_row(mean_ptr, mean_strides, row, position, element, pixels, mask, DENSE)
    log_variance = load_row(
        log_variance_ptr, log_variance_strides, row, position, element, pixels, mask, DENSE
    )
    seed, index = tl.load(seed_ptr), tl.load(index_ptr + row)
    step = tl.load(step_ptr + row * step_stride)
    noise = normal_of(seed, index, step, first, element, STREAM_LATENTS, CHANNELS_LAST, BLOCK)
    std = tl.exp(0.5 * log_variance)
    distance, log_ratio, precision = mean, log_variance, 1.0
    if prior_mean_ptr is not None:
        distance -= load_row(
            prior_mean_ptr, prior_mean_strides, row, position, element, pixels, mask, DENSE
        )
        prior = load_row(
            prior_log_variance_ptr, prior_log_variance_strides, row, position, element, pixels,
            mask, DENSE,
        )  # fmt: skip
        log_ratio -= prior
        precision = tl.exp(-prior)
    growth, beyond = expm1_and_minus(log_ratio)
    kl = 0.5 * (beyond + distance * distance * precision)
    return mean, std, noise, distance, precision, growth, kl


@triton.jit
def _fwd_kernel(  # type: ignore[no-untyped-def]
    z_ptr, z_strides, mean_ptr, mean_strides, log_variance_ptr, log_variance_strides,
    prior_mean_ptr, prior_mean_strides, prior_log_variance_ptr, prior_log_variance_strides,
    kl_ptr, partial_ptr, count_ptr, seed_ptr, index_ptr, step_ptr, step_stride, floor,
    numel, channels, pixels, blocks,
    CHANNELS_LAST: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK elements of one row; of several the last one done adds up their sums.

    It adds them in the order of their elements, whichever programs made them.
    """
    row, first, position, mask = block_of_row(blocks, numel, BLOCK)
    element = element_of(position, channels, pixels, CHANNELS_LAST)
    mean, std, noise, _, _, _, kl = _parts(
        mean_ptr, mean_strides, log_variance_ptr, log_variance_strides,
        prior_mean_ptr, prior_mean_strides, prior_log_variance_ptr, prior_log_variance_strides,
        seed_ptr, index_ptr, step_ptr, step_stride, row, first, position, element, mask, pixels,
        CHANNELS_LAST, DENSE, BLOCK,
    )  # fmt: skip
    kl = tl.where(kl < floor, floor, kl)  # unlike maximum, this keeps NaN
    total = tl.sum(tl.where(mask, kl, 0.0), 0)
    if partial_ptr is None:
        tl.store(kl_ptr + row, total)
        store_row(z_ptr, z_strides, mean + std * noise, row, position, element, pixels, mask, DENSE)
    else:
        tl.store(partial_ptr + tl.program_id(0), total)
        last = is_last_program(count_ptr + row, blocks)
        # After the atomic, which waits for all stores before it.
        store_row(z_ptr, z_strides, mean + std * noise, row, position, element, pixels, mask, DENSE)
        if last:
            tl.store(kl_ptr + row, sum_of_parts(partial_ptr + row * blocks, blocks, BLOCK))


@triton.jit
def _bwd_kernel(  # type: ignore[no-untyped-def]
    dmean_ptr, dmean_strides, dlog_variance_ptr, dlog_variance_strides,
    dprior_mean_ptr, dprior_mean_strides, dprior_log_variance_ptr, dprior_log_variance_strides,
    dz_ptr, dz_strides, mean_ptr, mean_strides, log_variance_ptr, log_variance_strides,
    prior_mean_ptr, prior_mean_strides, prior_log_variance_ptr, prior_log_variance_strides,
    dkl_ptr, seed_ptr, index_ptr, step_ptr, step_stride, floor,
    numel, channels, pixels, blocks,
    CHANNELS_LAST: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK elements of one row."""
    row, first, position, mask = block_of_row(blocks, numel, BLOCK)
    element = element_of(position, channels, pixels, CHANNELS_LAST)
    _, std, noise, distance, precision, growth, kl = _parts(
        mean_ptr, mean_strides, log_variance_ptr, log_variance_strides,
        prior_mean_ptr, prior_mean_strides, prior_log_variance_ptr, prior_log_variance_strides,
        seed_ptr, index_ptr, step_ptr, step_stride, row, first, position, element, mask, pixels,
        CHANNELS_LAST, DENSE, BLOCK,
    )  # fmt: skip
    dz = load_row(dz_ptr, dz_strides, row, position, element, pixels, mask, DENSE)
    dkl = tl.where(kl < floor, 0.0, tl.load(dkl_ptr + row))
    pull = dkl * distance * precision
    store_row(dmean_ptr, dmean_strides, dz + pull, row, position, element, pixels, mask, DENSE)
    value = 0.5 * (dz * std * noise + dkl * growth)
    store_row(
        dlog_variance_ptr, dlog_variance_strides, value, row, position, element, pixels, mask, DENSE
    )
    if dprior_mean_ptr is not None:
        store_row(
            dprior_mean_ptr, dprior_mean_strides, -pull, row, position, element, pixels, mask, DENSE
        )
        value = -0.5 * (dkl * growth + pull * distance)
        store_row(
            dprior_log_variance_ptr, dprior_log_variance_strides, value, row, position, element,
            pixels, mask, DENSE,
        )  # fmt: skip


# 3. Launchers -------------------------------------------------------------------------------------
def _launch_fwd(
    mean: Tensor,
    log_variance: Tensor,
    prior_mean: Tensor | None,
    prior_log_variance: Tensor | None,
    seed: Tensor,
    index: Tensor,
    step: Tensor,
    free_bits: float,
) -> tuple[Tensor, Tensor]:
    z, kl = _fake_fwd(
        mean, log_variance, prior_mean, prior_log_variance, seed, index, step, free_bits
    )
    if mean.numel() == 0:
        return z, kl.zero_()
    inputs = (mean, log_variance, prior_mean, prior_log_variance)
    tensors = (z, *map(with_row_strides, inputs))
    grid, arguments = row_launch(*tensors)
    sums = count = None
    if arguments["blocks"] > 1:
        sums = torch.empty(grid[0], dtype=torch.float32, device=mean.device)
        # Zeroed by each call, not left at zero by the last: calls on two streams must not meet.
        count = torch.zeros(mean.shape[0], dtype=torch.int32, device=mean.device)
    _fwd_kernel[grid](
        *with_strides(*tensors), kl, sums, count, seed, index.contiguous(), step,
        step.stride(0), free_bits, **arguments,
    )  # fmt: skip
    return z, kl


def _launch_bwd(
    dz: Tensor,
    dkl: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    prior_mean: Tensor | None,
    prior_log_variance: Tensor | None,
    seed: Tensor,
    index: Tensor,
    step: Tensor,
    free_bits: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (mean, log_variance, prior_mean, prior_log_variance)
    gradients = _fake_bwd(dz, dkl, *inputs, seed, index, step, free_bits)
    if mean.numel() == 0:
        return gradients
    wanted = (None if t is None else g for t, g in zip(inputs, gradients, strict=True))
    tensors = (*wanted, *map(with_row_strides, (dz, *inputs)))
    grid, arguments = row_launch(*tensors)
    _bwd_kernel[grid](
        *with_strides(*tensors), dkl.contiguous(), seed, index.contiguous(), step, step.stride(0),
        free_bits, **arguments,
    )  # fmt: skip
    return gradients


# 4. Registration ----------------------------------------------------------------------------------
def _fake_fwd(
    mean: Tensor,
    log_variance: Tensor,
    prior_mean: Tensor | None,
    prior_log_variance: Tensor | None,
    seed: Tensor,
    index: Tensor,
    step: Tensor,
    free_bits: float,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(mean, log_variance, prior_mean, prior_log_variance)
    return empty_rows(mean), torch.empty(mean.shape[0], dtype=dtype, device=mean.device)


def _cpu_fwd(mean: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    z, kl = sample_and_kl_ref(mean, *rest)
    return in_strides_of(mean, z), kl


def _fake_bwd(
    dz: Tensor,
    dkl: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    prior_mean: Tensor | None,
    prior_log_variance: Tensor | None,
    seed: Tensor,
    index: Tensor,
    step: Tensor,
    free_bits: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors for a prior that is not given."""
    dprior_mean, dprior_log_variance = (
        mean.new_empty(0) if t is None else empty_rows(t) for t in (prior_mean, prior_log_variance)
    )
    return empty_rows(mean), empty_rows(log_variance), dprior_mean, dprior_log_variance


def _cpu_bwd(dz: Tensor, dkl: Tensor, mean: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    gradients = sample_and_kl_bwd_ref(dz, dkl, mean, *rest)
    return tuple(
        mean.new_empty(0) if t is None or g is None else in_strides_of(t, g)
        for t, g in zip((mean, *rest[:3]), gradients, strict=True)
    )


_fwd = define_op(
    "sample_and_kl_fwd",
    "(Tensor mean, Tensor log_variance, Tensor? prior_mean, Tensor? prior_log_variance, "
    "Tensor seed, Tensor index, Tensor step, float free_bits) -> (Tensor, Tensor)",
    cuda=_launch_fwd,
    cpu=_cpu_fwd,
    fake=_fake_fwd,
)

_bwd = define_op(
    "sample_and_kl_bwd",
    "(Tensor dz, Tensor dkl, Tensor mean, Tensor log_variance, Tensor? prior_mean, "
    "Tensor? prior_log_variance, Tensor seed, Tensor index, Tensor step, float free_bits) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    cuda=_launch_bwd,
    cpu=_cpu_bwd,
    fake=_fake_bwd,
)


# 5. Public function -------------------------------------------------------------------------------
class _SampleAndKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.free_bits = args
        ctx.save_for_backward(*tensors)
        return _fwd(*args)

    @staticmethod
    def backward(ctx: Any, dz: Tensor, dkl: Tensor) -> tuple[Tensor | None, ...]:
        args = (dz, dkl, *ctx.saved_tensors, ctx.free_bits)
        if torch.is_grad_enabled():  # create_graph=True
            return *sample_and_kl_bwd_ref(*args), None, None, None, None
        inputs = ctx.saved_tensors[:4]
        gradients = (None if t is None else g for t, g in zip(inputs, _bwd(*args), strict=True))
        return *gradients, None, None, None, None


def sample_and_kl(
    mean: Tensor,
    log_variance: Tensor,
    *,
    prior_mean: Tensor | None = None,
    prior_log_variance: Tensor | None = None,
    seed: int | Tensor,
    index: Tensor | None = None,
    step: int | Tensor,
    free_bits: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """z ~ N(mean, exp(log_variance)), and the divergence of that from the prior, in one pass.

        z  = mean + exp(log_variance / 2) epsilon
        kl = sum_d KL(N(mean_d, exp(log_variance_d)) | N(prior_mean_d, exp(prior_log_variance_d)))

    epsilon is drawn in registers from (seed, index, step), stream 6, and never stored.

    Args:
        mean, log_variance: (B, *event), any strides.
        prior_mean, prior_log_variance: like mean, or both None for the standard normal prior.
        seed: 64-bit int or one-element int64 tensor.
        index: (B,) int64, the number of each sample; default 0 .. B - 1.
        step: int or integer tensor () or (B,), in [0, 2^24): the number of the z of a sample, which
            in training changes at every step, unless seed or index does. On a GPU tensor the range
            is not checked.
        free_bits: nats; where the divergence of a dimension of a sample is less, this is added in
            its place, and it has no gradient. It does not touch z.

    Returns:
        z like mean, and kl (B,) float32 (float64 for float64 inputs). Differentiable in mean,
        log_variance, prior_mean and prior_log_variance.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.

    Example:
        >>> mean, log_variance = torch.zeros(2, 3), torch.zeros(2, 3)
        >>> z, kl = sample_and_kl(mean, log_variance, seed=0, step=0)
        >>> z.shape, kl
        (torch.Size([2, 3]), tensor([0., 0.]))
    """
    prior = {"prior_mean": prior_mean, "prior_log_variance": prior_log_variance}
    given = {name: t for name, t in prior.items() if t is not None}
    if len(given) == 1:
        raise ValueError(
            f"{next(iter(prior.keys() - given))} must be given with {next(iter(given))}, got None"
        )
    check_float(mean=mean, log_variance=log_variance, **given)
    check_rows("mean", mean)
    for name, tensor in {"log_variance": log_variance, **given}.items():
        check_shape(name, tensor, tuple(mean.shape))
    check_same_device(mean=mean, log_variance=log_variance, **given)
    check_noise_size("mean", tuple(mean.shape))
    check_number("free_bits", free_bits, 0)
    rows = mean.shape[0]
    seed, _ = as_seed(seed, mean.device)
    index = as_index(index, rows, mean.device)
    step = as_step("step", step, rows, mean.device, 2**24)
    args = (mean, log_variance, prior_mean, prior_log_variance, seed, index, step, free_bits)
    if using_reference():
        return sample_and_kl_ref(*args)
    run: Callable[..., tuple[Tensor, Tensor]]
    run = _SampleAndKL.apply if needs_function(*args[:4]) else _fwd
    return run(*args)
