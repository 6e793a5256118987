"""`guided_step` on a CPU: the definition, in the strides of the inputs."""

from torch import Tensor

from cgkernels.ops.guided_step.reference import guided_step_bwd_ref, guided_step_ref
from cgkernels.rows import in_strides_of


def _cpu_fwd(
    x: Tensor, cond: Tensor, uncond: Tensor | None, table: Tensor, step: Tensor, scale: Tensor,
    log_variance: Tensor | None, h1: Tensor | None, h2: Tensor | None, seed: Tensor | None,
    index: Tensor | None, return_x0: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, x0 = guided_step_ref(
        x, cond, uncond, table, step, scale, log_variance, h1, h2, seed, index
    )
    return in_strides_of(x, out), in_strides_of(x, x0) if return_x0 else x.new_empty(0)


def _cpu_bwd(
    dout: Tensor, dx0: Tensor | None, x: Tensor, cond: Tensor, uncond: Tensor | None,
    table: Tensor, step: Tensor, scale: Tensor, h1: Tensor | None, h2: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    gradients = guided_step_bwd_ref(dout, dx0, x, cond, uncond, table, step, scale, h1, h2)
    return tuple(
        x.new_empty(0) if t is None or g is None else in_strides_of(t, g)
        for t, g in zip((x, cond, uncond, h1, h2), gradients, strict=True)
    )
