"""What launches the kernels of `guided_step`, on tensors of any strides."""

from torch import Tensor

from cgkernels.ops.guided_step.kernel import _bwd_kernel, _fwd_kernel
from cgkernels.rows import empty_rows, row_launch, row_strides, with_row_strides, with_strides


def _launch_fwd(
    x: Tensor, cond: Tensor, uncond: Tensor | None, table: Tensor, step: Tensor, scale: Tensor,
    log_variance: Tensor | None, h1: Tensor | None, h2: Tensor | None, seed: Tensor | None,
    index: Tensor | None, return_x0: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, x0 = empty_outputs(x, return_x0)
    _launch_step(
        out, None, x0 if return_x0 else None, x, cond, uncond, table, step, scale, log_variance,
        h1, h2, seed, index,
    )  # fmt: skip
    return out, x0


def _launch_inplace(
    x: Tensor, cond: Tensor, uncond: Tensor | None, table: Tensor, step: Tensor, scale: Tensor,
    log_variance: Tensor | None, h1: Tensor | None, h2: Tensor | None, seed: Tensor | None,
    index: Tensor | None, twin: Tensor | None,
) -> None:  # fmt: skip
    written = [t for t in (x, h1, h2, twin) if t is not None]
    if any(row_strides(t) is None for t in written):  # a kernel cannot address these: copy back
        new_x = x.contiguous()
        new_h1, new_h2, new_twin = (None if t is None else t.contiguous() for t in (h1, h2, twin))
        _launch_inplace(
            new_x, cond, uncond, table, step, scale, log_variance, new_h1, new_h2, seed, index,
            new_twin,
        )  # fmt: skip
        for tensor, copy in ((x, new_x), (h1, new_h1), (h2, new_h2), (twin, new_twin)):
            if tensor is not None and copy is not None:
                tensor.copy_(copy)
        return
    _launch_step(
        x, twin, h1, x, cond, uncond, table, step, scale, log_variance, h1, h2, seed, index,
        shift=True,
    )  # fmt: skip


def _launch_step(
    out: Tensor, twin: Tensor | None, x0: Tensor | None,
    x: Tensor, cond: Tensor, uncond: Tensor | None, table: Tensor, step: Tensor, scale: Tensor,
    log_variance: Tensor | None, h1: Tensor | None, h2: Tensor | None, seed: Tensor | None,
    index: Tensor | None, shift: bool = False,
) -> None:  # fmt: skip
    """Writes out, twin and x0; with shift also h2, and then x0 is h1."""
    if x.numel() == 0:
        return
    inputs = map(with_row_strides, (x, cond, uncond, log_variance, h1, h2))
    tensors = (out, twin, x0, *inputs)
    grid, arguments = row_launch(*tensors)
    _fwd_kernel[grid](
        *with_strides(*tensors),
        table.contiguous(), step, step.stride(0), scale, scale.stride(0), seed,
        None if index is None else index.contiguous(), table.shape[0], SHIFT=shift, **arguments,
    )  # fmt: skip


def _launch_bwd(
    dout: Tensor, dx0: Tensor | None, x: Tensor, cond: Tensor, uncond: Tensor | None,
    table: Tensor, step: Tensor, scale: Tensor, h1: Tensor | None, h2: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    gradients = empty_gradients(x, cond, uncond, h1, h2)
    if x.numel() == 0:
        return gradients
    wanted = (True, True, uncond is not None, h1 is not None, h2 is not None)
    inputs = map(with_row_strides, (dout, dx0, x, cond, uncond))
    tensors = (*(g if w else None for g, w in zip(gradients, wanted, strict=True)), *inputs)
    grid, arguments = row_launch(*tensors)
    _bwd_kernel[grid](
        *with_strides(*tensors),
        table.contiguous(), step, step.stride(0), scale, scale.stride(0), table.shape[0],
        **arguments,
    )  # fmt: skip
    return gradients


def empty_outputs(x: Tensor, return_x0: bool) -> tuple[Tensor, Tensor]:
    """x' and x0, not yet written; of an x0 that is not returned an empty one."""
    return empty_rows(x), empty_rows(x) if return_x0 else x.new_empty(0)


def empty_gradients(x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of these tensors, not yet written; of None an empty one."""
    return tuple(x.new_empty(0) if t is None else empty_rows(t) for t in (x, *others))
