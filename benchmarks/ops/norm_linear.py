"""What `norm_linear` launches: compiled without a GPU, judged on one."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from cgkernels.ops.norm_linear.launch import _launch, _launch_config, _least_counters
from cgkernels.testing import Launch


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
