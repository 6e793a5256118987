"""Triton kernels for the hot loops of conditional generative models, each a full torch op.

Importing this package needs no GPU and no Triton: every op also runs as plain PyTorch.
"""

from cgkernels.library import reference
from cgkernels.ops.philox_normal import philox_normal

__all__ = ["philox_normal", "reference"]
