"""Standard normals of the noise contract: z(seed, index, step, stream, element).

Shapes   out (B, *event); index (B,); step () or (B,).
Dtypes   out float32, float16, bfloat16 (float64 on CPU), rounded once from float32.
Backward none: the noise depends on no differentiable input.
Source   Philox4x32-10, Salmon et al., SC 2011; Box-Muller, 1958; the contract in `random.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cgkernels import random
from cgkernels._triton import tl, triton
from cgkernels.checks import (
    FLOATS,
    as_index,
    as_seed,
    as_step,
    check_dtype,
    check_int,
    check_noise_size,
    check_sizes,
)
from cgkernels.device import block_of_row, element_of, normal_of, row_offset
from cgkernels.library import define_op, using_reference
from cgkernels.rows import row_launch, with_strides


# 1. Reference -------------------------------------------------------------------------------------
def philox_normal_ref(
    seed: Tensor, index: Tensor, step: Tensor, shape: Sequence[int], stream: int, dtype: torch.dtype
) -> Tensor:
    return random.normal(
        tuple(shape), seed=seed, index=index, step=step, stream=stream, dtype=dtype
    )


# 2. Kernels ---------------------------------------------------------------------------------------
@triton.jit
def _fwd_kernel(  # type: ignore[no-untyped-def]
    out_ptr, out_strides, seed_ptr, index_ptr, step_ptr, step_stride,
    numel, channels, pixels, blocks,
    STREAM: tl.constexpr, CHANNELS_LAST: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK elements of one row."""
    row, first, position, mask = block_of_row(blocks, numel, BLOCK)
    element = element_of(position, channels, pixels, CHANNELS_LAST)
    seed, index = tl.load(seed_ptr), tl.load(index_ptr + row)
    step = tl.load(step_ptr + row * step_stride)
    z = normal_of(seed, index, step, first, element, STREAM, CHANNELS_LAST, BLOCK)
    offset = row_offset(out_strides, row, position, element, pixels, DENSE)
    tl.store(out_ptr + offset, z.to(out_ptr.dtype.element_ty), mask=mask)


# 3. Launchers -------------------------------------------------------------------------------------
def _launch_fwd(
    seed: Tensor, index: Tensor, step: Tensor, shape: Sequence[int], stream: int,
    dtype: torch.dtype, channels_last: bool,
) -> Tensor:  # fmt: skip
    out = _fake_fwd(seed, index, step, shape, stream, dtype, channels_last)
    if out.numel() == 0:
        return out
    grid, arguments = row_launch(out)
    _fwd_kernel[grid](
        *with_strides(out), seed, index.contiguous(), step, step.stride(0), STREAM=stream,
        **arguments,
    )  # fmt: skip
    return out


# 4. Registration ----------------------------------------------------------------------------------
def _fake_fwd(
    seed: Tensor, index: Tensor, step: Tensor, shape: Sequence[int], stream: int,
    dtype: torch.dtype, channels_last: bool,
) -> Tensor:  # fmt: skip
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=index.device, memory_format=format)


def _cpu_fwd(
    seed: Tensor, index: Tensor, step: Tensor, shape: Sequence[int], stream: int,
    dtype: torch.dtype, channels_last: bool,
) -> Tensor:  # fmt: skip
    z = philox_normal_ref(seed, index, step, shape, stream, dtype)
    return z.contiguous(memory_format=torch.channels_last) if channels_last else z


_fwd = define_op(
    "philox_normal",
    "(Tensor seed, Tensor index, Tensor step, SymInt[] shape, int stream, ScalarType dtype, "
    "bool channels_last) -> Tensor",
    cuda=_launch_fwd,
    cpu=_cpu_fwd,
    fake=_fake_fwd,
)


# 5. Public function -------------------------------------------------------------------------------
def philox_normal(
    shape: tuple[int, ...],
    *,
    seed: int | Tensor,
    index: Tensor | None = None,
    step: int | Tensor,
    stream: int = random.STREAM_INITIAL,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Standard normals that depend on (seed, index, step, stream, element) and on nothing else.

    A sample gets the same noise alone or in a batch, on CPU or GPU (within 4 ulp of float32) and in
    any memory format; half types round the float32 value. |z| reaches 6.76.

    Args:
        shape: (B, *event); elements are numbered within a sample in logical order.
        seed: 64-bit int, or a one-element int64 tensor (which a CUDA graph can change).
        index: (B,) int64, the number of each sample; default 0 .. B - 1.
        step: int or integer tensor () or (B,), in [0, 2^24): what number of the noise of a sample
            this is. On a GPU tensor the range is not checked.
        stream: purpose of the noise, 0 .. 255; see the STREAM_ constants of `cgkernels.random`.
        dtype: float32, float16, bfloat16; float64 on the CPU.
        device: default that of seed or index where they are tensors, else PyTorch's default.
        memory_format: torch.contiguous_format, or torch.channels_last for 4-D shapes.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.

    Example:
        >>> z = philox_normal((4, 3, 8, 8), seed=0, step=0)
        >>> one = philox_normal((1, 3, 8, 8), seed=0, index=torch.tensor([2]), step=0)
        >>> bool((z[2] == one[0]).all())
        True
    """
    check_sizes("shape", shape)
    check_noise_size("shape", tuple(shape))
    if device is None and isinstance(index, Tensor):
        device = index.device
    check_dtype(dtype, (*FLOATS, torch.float64))
    check_int("stream", stream, 0, 255)
    formats = (torch.contiguous_format, torch.channels_last)
    if not isinstance(memory_format, torch.memory_format) or memory_format not in formats:
        raise ValueError(f"memory_format must be contiguous or channels_last, got {memory_format}")
    channels_last = memory_format is torch.channels_last
    if channels_last and len(shape) != 4:
        raise ValueError(f"memory_format channels_last needs a 4-D shape, got {tuple(shape)}")
    seed, device = as_seed(seed, device)
    index = as_index(index, shape[0], device)
    step = as_step("step", step, shape[0], index.device, 2**24)
    if dtype == torch.float64 and index.is_cuda:
        raise TypeError("dtype float64 is for the CPU only")
    run = _cpu_fwd if using_reference() else _fwd
    return run(seed, index, step, list(shape), stream, dtype, channels_last)
