"""What launches the kernel of `norm_linear`; more rows than it is made for go to cuBLAS."""

from typing import Any

import torch
from torch import Tensor

from cgkernels._triton import triton
from cgkernels.ops.norm_linear.cpu import FEW_ROWS, _eager
from cgkernels.ops.norm_linear.kernel import _kernel
from cgkernels.ops.norm_linear.reference import ACTIVATIONS, NORMS, _empty_output


def _launch_config(
    channels: int, features: int, dtype: torch.dtype, activation: str | None
) -> dict[str, Any]:
    """Sizes that may depend on nothing else, or a row would depend on its batch.

    Narrow tiles make programs of few channels; from 256 programs on, wider ones halve the share of
    the norm (in float32 they take too many registers). Fewer than 128 programs leave
    multiprocessors idle: they split the features, unless what each gets is streamed sooner than
    partial sums are merged. In half types ptxas left alone spills to get down to 128 registers.

    PDL, from sm_90 on: programs start while the launch before still runs, and fetch their weights.
    """
    weight_rows = 2 * channels if activation == "swiglu" else channels
    half = dtype in (torch.float16, torch.bfloat16)
    block_n = 32 if half and weight_rows >= 8192 else 16
    block_k = 128 if half else 64
    programs = triton.cdiv(weight_rows, block_n)
    splits = max(1, min(triton.cdiv(128, programs), features // 512, 8))
    split = block_k * triton.cdiv(features, splits * block_k)
    return {
        "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": split,
        "SPLITS": triton.cdiv(features, split), "STAGES": 6 if half and block_n == 16 else 4,
        "num_warps": 2, "maxnreg": 168 if half else None, "PDL": False,
    }  # fmt: skip


def _launch(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: str | None,
    activation: str | None,
    eps: float,
    counters: Tensor | None = None,
) -> Tensor:
    out = _empty_output(x, weight, activation)  # (..., N)
    channels, features = out.shape[-1], x.shape[-1]
    rows = x.numel() // features
    if rows == 0:
        return out
    if rows > FEW_ROWS:
        return _eager(
            x, weight, scales, norm_weight, norm_bias, bias, residual, norm, activation, eps
        )
    x, residual = _as_matrix(x), None if residual is None else _as_matrix(residual)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    config = _launch_config(channels, features, x.dtype, activation)
    tiles = triton.cdiv(rows, 16) * triton.cdiv(weight.shape[0], config["BLOCK_N"])
    partial = count = None
    if config["SPLITS"] > 1:
        size = tiles * config["SPLITS"] * 16 * config["BLOCK_N"]
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
        # Of its own unless the caller gives them: calls on two streams must not meet.
        count = counters
        if count is None:
            count = torch.zeros(tiles, dtype=torch.int32, device=x.device)
    vectors = (None if t is None else t.contiguous() for t in (norm_weight, norm_bias, bias))
    _kernel[(tiles * config["SPLITS"],)](
        out, partial, count, x, x.stride(0), weight, weight.stride(0),
        None if scales is None else scales.contiguous(), *vectors,
        residual, 0 if residual is None else residual.stride(0), rows, channels, features, eps,
        NORM=NORMS.index(norm), ACTIVATION=ACTIVATIONS.index(activation), enable_fp_fusion=True,
        launch_pdl=config["PDL"], **config,
    )  # fmt: skip
    return out


def _least_counters(rows: int, weight_rows: int) -> int:
    """Enough for tiles of any size that `_launch_config` may choose."""
    return triton.cdiv(rows, 16) * triton.cdiv(weight_rows, 16)


def _as_matrix(x: Tensor) -> Tensor:
    """(rows, features), each row in one piece."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
