"""`norm_linear`: what it is measured on, what it launches, how it is tuned.

Shapes are (rows, N, K), for a linear layer of N channels and K features.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cgkernels
from benchmarks.harness.case import Inputs, OpCase, Size, Sweep
from benchmarks.harness.inputs import normal
from benchmarks.harness.tuning import Config, early, tuned
from cgkernels.ops.norm_linear.launch import _launch, _launch_config, _least_counters
from cgkernels.testing import Launch


def _layers(model: str, channels: int, features: int, cpu: bool = False) -> dict[str, Size]:
    """A layer for the rows that one launch takes; on a CPU for a few."""
    return {
        f"b{rows}_{channels}x{features}": Size(
            (rows, channels, features), model, cpu=cpu and rows in (1, 8), first=rows == 8
        )
        for rows in (1, 8, 16, 64)
    }


_SMALL, _LARGE, _OURS = "GPT-2 small", "Llama-2 7B", "six layers of 384"
_HEAD = "GPT-2 small with LlamaGen's codebook"


def _linear_inputs(
    shape, dtype, generator, device, *, norm=None, activation=None, bias=False, residual=False,
    int8=False,
):  # fmt: skip
    rows, channels, features = shape
    lines = 2 * channels if activation == "swiglu" else channels
    vector = partial(normal, dtype=dtype, generator=generator, device=device)
    weight = normal((lines, features), torch.float32, generator, device) / features**0.5
    made: Inputs = {
        "x": vector((rows, features)), "norm": norm, "activation": activation,
        "norm_weight": None if norm is None else 1 + vector((features,)) / 4,
        "norm_bias": vector((features,)) if norm == "layer" else None,
        "bias": vector((lines,)) if bias else None,
        "residual": vector((rows, channels)) if residual else None,
    }  # fmt: skip
    if not int8:
        return {**made, "weight": weight.to(dtype), "scales": None}
    scales = weight.abs().amax(1) / 127
    return {**made, "weight": (weight / scales[:, None]).round().to(torch.int8), "scales": scales}


def _plain_linear(
    x, weight, scales, norm, norm_weight, norm_bias, bias, activation, residual, eps=1e-5
):
    """The modules one after another; weights of 8 bits as gpt-fast multiplies them."""
    if norm == "rms":
        x = F.rms_norm(x, x.shape[-1:], norm_weight, eps)
    elif norm == "layer":
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    if scales is None:
        y = F.linear(x, weight, bias)
    else:
        y = F.linear(x, weight.to(x.dtype)) * scales.to(x.dtype)
    if activation == "swiglu":
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    elif activation is not None:
        y = F.gelu(y)
    return y if residual is None else y + residual


def _linear_cost(
    shape, size, *, norm=None, activation=None, bias=False, residual=False, int8=False
):
    rows, channels, features = shape
    lines = 2 * channels if activation == "swiglu" else channels
    vectors = {None: 0, "rms": 1, "layer": 2}[norm] * features + (lines if bias else 0)
    states = rows * (features + (2 if residual else 1) * channels)
    weight = lines * (features + 4) if int8 else lines * features * size
    return weight + size * (vectors + states), 2 * rows * lines * features


def _linear(variant: str, sizes: Mapping[str, Size], **options: Any) -> OpCase:
    return OpCase(
        variant, partial(_linear_inputs, **options), cgkernels.norm_linear, _plain_linear,
        partial(_linear_cost, **options), sizes=sizes,
        sweep=Sweep("channels", tuple((8, n, 768) for n in (512, 1024, 2048, 4096, 8192)), 4, 1),
    )  # fmt: skip


CASES = [
    _linear("rms", _layers(_SMALL, 2304, 768) | _layers(_HEAD, 16384, 768)
            | _layers(_OURS, 1536, 384, cpu=True), norm="rms"),
    _linear("rms, int8", _layers(_SMALL, 2304, 768) | _layers(_HEAD, 16384, 768)
            | _layers(_OURS, 1536, 384, cpu=True), norm="rms", int8=True),
    _linear("layer, bias, gelu", _layers(_SMALL, 3072, 768)
            | _layers(_OURS, 1536, 384, cpu=True), norm="layer", bias=True, activation="gelu"),
    _linear("rms, swiglu", _layers(_LARGE, 11008, 4096) | _layers(_OURS, 1024, 384, cpu=True),
            norm="rms", activation="swiglu"),
    _linear("residual", _layers(_SMALL, 768, 768) | _layers(_SMALL, 768, 3072)
            | _layers(_OURS, 384, 1536, cpu=True), residual=True),
]  # fmt: skip


# Launches -----------------------------------------------------------------------------------------
def launches() -> Iterator[Launch]:
    def launch(label, dtype, channels, features, *, int8=False, bits=128, **options):
        weight_rows = 2 * channels if options.get("activation") == "swiglu" else channels
        x = torch.empty(8, features, dtype=dtype, device="meta")
        weight = x.new_empty(weight_rows, features, dtype=torch.int8 if int8 else dtype)
        inputs = {
            "scales": x.new_empty(weight_rows, dtype=torch.float32) if int8 else None,
            "norm_weight": x.new_empty(features), "norm_bias": None,
            "bias": None, "residual": None, "norm": "rms", "activation": None, **options,
        }  # fmt: skip
        kind = "int8" if int8 else ""
        args = (x, weight, *inputs.values(), 1e-5)
        # Scales and bias are too few for a full vector.
        bits = 64 if int8 else 32 if inputs["bias"] is not None else bits
        name = f"{label} {channels} x {features} {dtype} {kind}"
        return Launch(name, partial(_launch, *args), bits)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for channels, features in ((2304, 768), (768, 3072), (16384, 768)):
            yield launch("rms", dtype, channels, features)
            yield launch("rms", dtype, channels, features, int8=True)
    half = torch.bfloat16
    vector, bias = (torch.empty(n, dtype=half, device="meta") for n in (768, 3072))
    layer = {"norm": "layer", "norm_weight": vector, "norm_bias": vector, "bias": bias}
    for activation in ("gelu", "gelu_tanh"):
        yield launch(f"layer, {activation}", half, 3072, 768, activation=activation, **layer)
    yield launch("rms, swiglu", half, 2048, 768, activation="swiglu")
    yield launch("rms, swiglu", half, 11008, 4096, activation="swiglu")
    residual = torch.empty(8, 768, dtype=half, device="meta")
    yield launch("residual", half, 768, 768, norm=None, norm_weight=None, residual=residual)
    yield launch("odd", half, 769, 771, bits=0)


def counted_launches() -> Iterator[Launch]:
    """Those with splits: it is the same kernel."""
    for launch in launches():
        x, weight, *_, activation, _ = launch.run.args
        assert isinstance(x, Tensor) and isinstance(weight, Tensor)
        if _launch_config(len(weight), x.shape[1], x.dtype, activation)["SPLITS"] > 1:
            counters = x.new_empty(_least_counters(len(x), len(weight)), dtype=torch.int32)
            yield Launch(launch.label, partial(_launch, *(*launch.run.args, counters)), 128)


LAUNCHES = {
    "norm_linear": launches,
    "norm_linear_counted": counted_launches,
}


# Tuning -------------------------------------------------------------------------------------------
def _linear_tiles(
    channels: int, features: int, dtype: torch.dtype, activation: str | None
) -> Iterator[Config]:
    """Tiles of 16 to 64 rows of the weight; of the features all, or parts of 256 or more."""
    few = [n for n in (1, 2, 4, 8) if n == 1 or features >= 256 * n]
    for block_n, block_k, warps, splits in product((16, 32, 64), (64, 128), (1, 2, 4), few):
        if block_n * block_k > 4096:
            continue
        split = block_k * math.ceil(features / (splits * block_k))
        sizes = {
            "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": split,
            "SPLITS": math.ceil(features / split), "STAGES": 4, "num_warps": warps,
            "maxnreg": None,
        }  # fmt: skip
        yield from early(sizes, warps == 2)


TUNABLE = tuned(_launch, _linear_tiles)
