"""Triton kernels for the hot loops of conditional generative models, each a full torch op.

Importing this package needs no GPU and no Triton: every op also runs as plain PyTorch.
"""

from cgkernels.library import reference
from cgkernels.ops.add_noise import add_noise
from cgkernels.ops.affine_coupling import affine_coupling
from cgkernels.ops.conv2d_stats import conv2d_stats
from cgkernels.ops.decode_attention import decode_attention
from cgkernels.ops.diffusion_loss import diffusion_loss
from cgkernels.ops.embed_tokens import embed_tokens
from cgkernels.ops.guided_step import guided_step, guided_step_
from cgkernels.ops.instance_norm_act import instance_norm_act, instance_norm_act_
from cgkernels.ops.norm_linear import norm_linear, pack_weight
from cgkernels.ops.pair_conv2d import pair_conv2d
from cgkernels.ops.patch_head_loss import patch_head_loss, patch_loss
from cgkernels.ops.philox_normal import philox_normal
from cgkernels.ops.prefill_attention import prefill_attention
from cgkernels.ops.sample_and_kl import sample_and_kl
from cgkernels.ops.sample_logits import sample_logits, sample_logits_

__version__ = "0.1.0"  # pyproject.toml reads it here

__all__ = [
    "add_noise",
    "affine_coupling",
    "conv2d_stats",
    "decode_attention",
    "diffusion_loss",
    "embed_tokens",
    "guided_step",
    "guided_step_",
    "instance_norm_act",
    "instance_norm_act_",
    "norm_linear",
    "pack_weight",
    "pair_conv2d",
    "patch_head_loss",
    "patch_loss",
    "philox_normal",
    "prefill_attention",
    "reference",
    "sample_and_kl",
    "sample_logits",
    "sample_logits_",
]
