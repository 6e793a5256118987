"""Triton kernels for the hot loops of conditional generative models, each a full torch op.

Importing this package needs no GPU and no Triton: every op also runs as plain PyTorch.
"""

from cgkernels.library import reference
from cgkernels.ops.add_noise import add_noise
from cgkernels.ops.diffusion_loss import diffusion_loss
from cgkernels.ops.guided_step import guided_step, guided_step_
from cgkernels.ops.philox_normal import philox_normal

__all__ = [
    "add_noise",
    "diffusion_loss",
    "guided_step",
    "guided_step_",
    "philox_normal",
    "reference",
]
