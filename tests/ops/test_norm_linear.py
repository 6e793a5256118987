"""norm_linear: a norm, a linear layer and what follows it, in one launch for few rows."""

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from benchmarks.ops import LAUNCHES
from cgkernels.library import OPS, reference
from cgkernels.ops.norm_linear import cpu, norm_linear, pack_weight
from cgkernels.ops.norm_linear.launch import _launch, _launch_config
from cgkernels.testing import assert_within_budget, compile_launch, plain_and_modeled, values
from tests.support import (
    FLOATS,
    HALVES,
    KERNEL_DEVICES,
    OpCall,
    Sample,
    assert_equal,
    assert_kernels_agree,
    assert_refused,
    kernel_results,
    kernels,
    normals,
    one_of_each_dtype,
)

LAUNCHERS = {"norm_linear": _launch, "norm_linear_counted": _launch}

DIFFERENTIABLE = ("x", "weight", "norm_weight", "norm_bias", "bias", "residual")


def make_inputs(shape, channels, dtype, device="cpu", *, int8=False, options=(), **fixed):
    """Inputs of `norm_linear`: a batch of x, and those of the options that are named."""
    features = shape[-1]
    lines = 2 * channels if fixed.get("activation") == "swiglu" else channels
    shapes = {
        "norm_weight": (features,), "norm_bias": (features,), "bias": (lines,),
        "residual": (*shape[:-1], channels),
    }  # fmt: skip
    made = {
        name: normals(*shapes[name], dtype=dtype, device=device, seed=i)
        for i, name in enumerate(options)
    }
    if "norm_weight" in made:
        made["norm_weight"] = made["norm_weight"] / 4 + 1
    weight = normals(lines, features, seed=9) / math.sqrt(features)
    if int8:
        scales = weight.abs().amax(1) / 127
        weight = (weight / scales[:, None]).round().to(device, torch.int8)
        made["scales"] = scales.float().to(device)
    else:
        weight = weight.to(device, dtype)
    x = normals(*shape, dtype=dtype, device=device, seed=8)
    return {"x": x, "weight": weight, **made, **fixed}


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def sample(label, shape, channels, **options):
        return sample_of(label, make_inputs(shape, channels, dtype, device, **options))

    def sample_of(label, inputs):
        differentiable = [n for n in DIFFERENTIABLE if n in inputs]
        if "scales" in inputs:
            differentiable.remove("weight")
        per_row = tuple(n for n in ("x", "residual") if n in inputs)
        return Sample(label, norm_linear, inputs, tuple(differentiable), per_row)

    block = ("norm_weight", "norm_bias", "bias", "residual")
    yield sample("plain", (3, 40), 16)
    yield sample("rms", (3, 40), 16, norm="rms", options=("norm_weight",), eps=1e-6)
    yield sample("layer, gelu", (2, 3, 33), 19, norm="layer", activation="gelu", options=block)
    yield sample("layer, no gain", (3, 24), 7, norm="layer", options=("norm_bias",))
    tanh = {"activation": "gelu_tanh", "options": ("bias", "residual")}
    yield sample("no norm, gelu_tanh", (3, 24), 20, **tanh)
    yield sample(
        "rms, swiglu", (4, 1, 40), 21, norm="rms", activation="swiglu",
        options=("norm_weight", "bias", "residual"),
    )  # fmt: skip
    yield sample(
        "int8", (3, 40), 18, int8=True, norm="rms", activation="swiglu",
        options=("norm_weight", "bias", "residual"),
    )  # fmt: skip
    views = make_inputs((4, 3, 24), 20, dtype, device, norm="rms", options=("residual",))
    wide = normals(40, 48, dtype=dtype, device=device, seed=3)
    yield sample_of("views", {
        **views, "x": views["x"].transpose(1, 2).contiguous().transpose(1, 2),
        "weight": wide[::2, :24], "residual": views["residual"][:, :1].expand(4, 3, 20),
    })  # fmt: skip
    yield sample("empty batch", (0, 24), 20, norm="rms")
    counted = make_inputs((3, 40), 16, dtype, device, norm="rms", options=("bias",))
    counters = torch.zeros(2, dtype=torch.int32, device=device)
    names = ("x",)
    yield Sample("counters", norm_linear, {**counted, "counters": counters}, (), names)


# The definition -----------------------------------------------------------------------------------
def by_modules(
    x, weight, *, norm=None, norm_weight=None, norm_bias=None, eps=1e-5, bias=None, activation=None,
    residual=None, scales=None,
):  # fmt: skip
    """What one would write with torch.nn.functional, in the dtype of x."""
    size = x.shape[-1:]
    if norm == "rms":
        x = F.rms_norm(x, size, norm_weight, eps)
    elif norm == "layer":
        x = F.layer_norm(x, size, norm_weight, norm_bias, eps)
    if scales is not None:
        weight = (scales[:, None] * weight).to(x.dtype)
    y = F.linear(x, weight, bias)
    if activation == "swiglu":
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    elif activation is not None:
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y if residual is None else y + residual


def widened(inputs):
    return {
        n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for n, v in inputs.items()
    }


EVERYTHING = ("norm_weight", "norm_bias", "bias", "residual")

VARIANTS = {
    "plain": {},
    "bias, residual": {"options": ("bias", "residual")},
    "rms": {"norm": "rms", "options": ("norm_weight",)},
    "rms, no gain, swiglu": {"norm": "rms", "activation": "swiglu"},
    "layer": {"norm": "layer", "options": EVERYTHING[:2]},
    "layer, gelu": {"norm": "layer", "activation": "gelu", "options": EVERYTHING},
    "layer, gelu_tanh": {"norm": "layer", "activation": "gelu_tanh", "options": EVERYTHING},
    "rms, swiglu": {
        "norm": "rms", "activation": "swiglu", "options": ("norm_weight", "bias", "residual")
    },
}  # fmt: skip

variants = pytest.mark.parametrize("variant", VARIANTS)


@variants
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [7, 65])
def test_it_is_what_the_modules_compute(rows, dtype, variant):
    inputs = make_inputs((rows, 130), 67, dtype, **VARIANTS[variant])
    with torch.no_grad():
        exact = by_modules(**widened(inputs))
    plain, modeled = plain_and_modeled(lambda: by_modules(**inputs))
    assert_within_budget(norm_linear(**inputs), plain, exact, modeled)


@variants
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_are_those_of_the_modules(dtype, variant):
    inputs = make_inputs((70, 257), 259, dtype, **VARIANTS[variant])
    names = [name for name in DIFFERENTIABLE if name in inputs]
    dout = normals(70, 259, dtype=dtype, seed=20)

    def gradients(function, inputs):
        leaves = {n: v.detach().clone().requires_grad_() for n, v in inputs.items() if n in names}
        out = function(**{**inputs, **leaves})
        return torch.autograd.grad(out, [leaves[n] for n in names], dout.to(out.dtype))

    exact = gradients(by_modules, widened(inputs))
    ours = gradients(norm_linear, inputs)
    plain, modeled = plain_and_modeled(lambda: gradients(by_modules, inputs))
    for one, same, true, model in zip(ours, plain, exact, modeled, strict=True):
        assert_within_budget(one, same, true, model)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [3, 65])
def test_an_int8_weight_is_its_scales_times_its_integers(rows, dtype):
    options = {"norm": "rms", "activation": "swiglu", "options": ("norm_weight", "bias")}
    inputs = make_inputs((rows, 130), 30, dtype, int8=True, **options)
    weight = inputs["scales"].double()[:, None] * inputs["weight"]
    exact = norm_linear(**{**widened(inputs), "weight": weight, "scales": None})
    tolerance = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        norm_linear(**inputs).double(), exact, rtol=tolerance, atol=tolerance
    )


def test_a_large_mean_costs_no_digits():
    x = 100 + normals(16, 300)
    inputs = {"weight": normals(40, 300, seed=1), "norm": "layer"}
    exact = by_modules(x.double(), **widened(inputs))
    plain, modeled = plain_and_modeled(lambda: by_modules(x, **inputs))
    assert_within_budget(norm_linear(x, **inputs), plain, exact, modeled)


@pytest.fixture(params=[True, False], ids=["oneDNN", "by rows"])
def product(request, monkeypatch):
    """How the CPU multiplies a few rows: as it finds best, or as it can everywhere."""
    if not request.param:
        monkeypatch.setattr(cpu, "_onednn_keeps_rows", lambda transposed: False)


@contextlib.contextmanager
def threads(count) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize(("features", "channels"), [(33, 19), (65, 7), (385, 400)])
def test_on_the_cpu_a_row_has_the_same_bits_in_any_batch(
    features, channels, activation, int8, dtype, product
):
    """In spite of MKL, whose sums follow sizes and alignment, and of vectorized loops."""
    norm = "rms" if features == 65 else "layer"
    options = EVERYTHING if norm == "layer" else ("norm_weight", "bias", "residual")
    options = {"norm": norm, "options": options, "activation": activation}
    inputs = make_inputs((64, features), channels, dtype, int8=int8, **options)
    whole = norm_linear(**inputs)
    for rows in ([63], [5, 0], list(range(8)), list(range(30))[::-1]):
        taken = {name: inputs[name][rows] for name in ("x", "residual")}
        assert_equal(norm_linear(**{**inputs, **taken}), whole[rows])


@variants
@pytest.mark.parametrize(("rows", "features"), [(1, 1536), (7, 130), (65, 130)])
def test_a_packed_weight_is_as_accurate_as_products_row_by_row(rows, features, variant):
    inputs = make_inputs((rows, features), 300, torch.float32, **VARIANTS[variant])
    residual = inputs.pop("residual", torch.zeros(rows, 300))
    with torch.no_grad():
        exact = by_modules(**widened(inputs), residual=residual.double())

    def alone():
        rows = zip(inputs["x"], residual, strict=True)
        return torch.cat(
            [by_modules(**{**inputs, "x": x[None]}, residual=r[None]) for x, r in rows]
        )

    plain, modeled = plain_and_modeled(alone)
    packed = {**inputs, "weight": pack_weight(inputs["weight"]), "residual": residual}
    assert_within_budget(norm_linear(**packed), plain, exact, modeled)
    with reference():
        assert_within_budget(norm_linear(**packed), plain, exact, modeled)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize(
    ("features", "channels", "activation"),
    [(384, 1536, "gelu_tanh"), (1536, 384, None), (64, 1100, "swiglu"), (33, 19, "gelu")],
)
def test_with_a_packed_weight_a_row_has_the_same_bits_in_any_batch(
    features, channels, activation, count
):
    options = {"norm": "layer", "options": ("bias", "residual"), "activation": activation}
    inputs = make_inputs((64, features), channels, torch.float32, **options)
    with threads(count):
        inputs["weight"] = pack_weight(inputs["weight"])
        whole = norm_linear(**inputs)
        for rows in (*range(1, 18), 33, 63):
            taken = {name: inputs[name][64 - rows :] for name in ("x", "residual")}
            assert_equal(norm_linear(**{**inputs, **taken}), whole[64 - rows :])


def test_what_is_not_packed():
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int8):
        weight = torch.ones(3, 4, dtype=dtype)
        assert pack_weight(weight) is weight
    with pytest.raises(ValueError, match="weight must have shape"):
        pack_weight(torch.ones(3))
    with pytest.raises(ValueError, match="weight must have shape"):
        pack_weight(torch.ones(0, 3))


def test_a_onednn_whose_rows_depend_on_their_batch_gets_no_packed_weight(monkeypatch):
    monkeypatch.setattr(cpu, "_packing_keeps_rows", lambda *shape: False)
    weight = torch.ones(3, 4)
    assert pack_weight(weight) is weight


def test_a_packed_weight_has_no_gradient():
    weight = pack_weight(torch.ones(3, 4, requires_grad=True))
    x = torch.ones(2, 4, requires_grad=True)
    with torch.no_grad():
        assert_equal(norm_linear(x, weight), torch.full((2, 3), 4.0))
    if weight.layout == torch._mkldnn:
        with pytest.raises(ValueError, match="x requires grad, but a packed weight"):
            norm_linear(x, weight)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("features", "channels", "activation"),
    [(384, 512, "gelu"), (1537, 33, None), (64, 1100, "swiglu"), (1, 1, None)],
)
def test_on_the_cpu_batches_of_many_sizes_agree(
    features, channels, activation, count, transposed, product
):
    options = {"norm": "rms", "options": ("bias", "residual"), "activation": activation}
    inputs = make_inputs((64, features), channels, torch.float32, **options)
    if transposed:
        inputs["weight"] = inputs["weight"].t().contiguous().t()
    with threads(count):
        whole = norm_linear(**inputs)
        for rows in (*range(1, 18), 33, 63):
            taken = {name: inputs[name][64 - rows :] for name in ("x", "residual")}
            assert_equal(norm_linear(**{**inputs, **taken}), whole[64 - rows :])


@pytest.mark.parametrize("features", [384, 1536, 3072])
@pytest.mark.parametrize("rows", [1, 8])
def test_long_sums_on_the_cpu_are_as_accurate_as_those_of_pytorch(rows, features, product):
    inputs = make_inputs((rows, features), 1536, torch.float32)
    exact = by_modules(**widened(inputs))
    plain, modeled = plain_and_modeled(lambda: by_modules(**inputs))
    assert_within_budget(norm_linear(**inputs), plain, exact, modeled)


@pytest.mark.parametrize("strides", ["transposed", "every other", "expanded", "shifted"])
@pytest.mark.parametrize("int8", [False, True])
def test_weights_of_any_strides(int8, strides, product):
    inputs = make_inputs((5, 40), 24, torch.float32, int8=int8, activation="gelu")
    weight = inputs["weight"]
    viewed = {
        "transposed": lambda: weight.t().contiguous().t(),
        "every other": lambda: weight.repeat_interleave(2, 0).repeat(1, 2)[::2, :40],
        "expanded": lambda: weight[:1].expand(24, 40),
        "shifted": lambda: torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(24, 40),
    }[strides]()
    expected = norm_linear(**{**inputs, "weight": viewed.contiguous()})
    torch.testing.assert_close(norm_linear(**{**inputs, "weight": viewed}), expected)


def test_no_wide_copy_of_the_weight_is_made(monkeypatch):
    """The CPU casts an int8 or half weight in parts of 512 KiB."""
    inputs = make_inputs((2, 256), 2000, torch.bfloat16, int8=True)
    sizes = []
    to = torch.Tensor.to

    def recording(tensor, *args, **kwargs):
        out = to(tensor, *args, **kwargs)
        if tensor.dtype == torch.int8:
            sizes.append(out.nbytes)
        return out

    monkeypatch.setattr(torch.Tensor, "to", recording)
    norm_linear(**inputs)
    assert len(sizes) == math.ceil(2000 / 512) and max(sizes) <= 2**19


def test_half_types_meet_in_float32():
    """Norm weights, bias and residual of another dtype than x."""
    inputs = make_inputs((5, 40), 24, torch.bfloat16, norm="layer", options=EVERYTHING)
    mixed = {n: v.float() if n in EVERYTHING else v for n, v in inputs.items()}
    assert_equal(norm_linear(**mixed), norm_linear(**inputs))


# What is refused ----------------------------------------------------------------------------------
X, W, V = normals(2, 8), normals(6, 8), normals(8)
W8, S = torch.zeros(6, 8, dtype=torch.int8), torch.ones(6)

WRONG = [
    (TypeError, ("x", "NoneType"), {"x": None}),
    (TypeError, ("x", "int64"), {"x": X.long()}),
    (ValueError, ("x", "(..., 8)", "(2, 7)"), {"x": X[:, :7]}),
    (ValueError, ("x", "(..., 8)", "()"), {"x": torch.zeros(())}),
    (TypeError, ("weight", "NoneType"), {"weight": None}),
    (TypeError, ("weight", "float16"), {"weight": W.half()}),
    (TypeError, ("weight", "uint8"), {"weight": W8.to(torch.uint8)}),
    (ValueError, ("weight", "(N, K)", "(8,)"), {"weight": V}),
    (ValueError, ("weight", "(0, 8)"), {"weight": W[:0]}),
    (ValueError, ("weight", "(6, 0)"), {"weight": W[:, :0], "x": X[:, :0]}),
    (ValueError, ("weight", "(2N, K)", "(5, 8)"), {"weight": W[:5], "activation": "swiglu"}),
    (ValueError, ("weight", "cpu", "meta"), {"weight": W.to("meta")}),
    (ValueError, ("norm", "'batch'"), {"norm": "batch"}),
    (ValueError, ("activation", "'relu'"), {"activation": "relu"}),
    (ValueError, ("eps", "-1"), {"eps": -1}),
    (ValueError, ("eps", "nan"), {"eps": float("nan")}),
    (TypeError, ("eps", "None"), {"eps": None}),
    (ValueError, ("norm_weight", "without a norm"), {"norm_weight": V}),
    (ValueError, ("norm_weight", "(8,)", "(7,)"), {"norm": "rms", "norm_weight": V[:7]}),
    (TypeError, ("norm_weight", "int64"), {"norm": "rms", "norm_weight": V.long()}),
    (ValueError, ("norm_bias", "'layer'"), {"norm": "rms", "norm_bias": V}),
    (ValueError, ("norm_bias", "cpu", "meta"), {"norm": "layer", "norm_bias": V.to("meta")}),
    (ValueError, ("bias", "(6,)", "(8,)"), {"bias": V}),
    (ValueError, ("bias", "(6,)", "(3,)"), {"bias": V[:3], "activation": "swiglu"}),
    (ValueError, ("residual", "(2, 6)", "(2, 8)"), {"residual": X}),
    (ValueError, ("residual", "(2, 3)", "(2, 6)"), {"residual": X[:, :6], "activation": "swiglu"}),
    (TypeError, ("residual", "list"), {"residual": [1.0]}),
    (ValueError, ("scales", "int8"), {"weight": W8}),
    (ValueError, ("scales", "None"), {"scales": S}),
    (ValueError, ("scales", "(6,)", "(5,)"), {"weight": W8, "scales": S[:5]}),
    (TypeError, ("scales", "float16"), {"weight": W8, "scales": S.half()}),
    (TypeError, ("counters", "float32"), {"counters": V}),
    (ValueError, ("counters", "at least 1", "(0,)"), {"counters": torch.zeros(0).int()}),
    (ValueError, ("counters", "zero", "2"), {"counters": torch.tensor([1, 0, 3]).int()}),
    (ValueError, ("x", "requires grad", "counters"), {
        "x": X.clone().requires_grad_(), "counters": torch.zeros(1).int(),
    }),
    (ValueError, ("scales", "requires grad"), {
        "weight": W8, "scales": S.clone().requires_grad_(),
    }),
]  # fmt: skip


@pytest.mark.parametrize(("error", "words", "changed"), WRONG)
def test_wrong_arguments(error, words, changed):
    call = Sample("wrong", norm_linear, {"x": X, "weight": W})
    assert_refused(call.replace(**changed), error, *words)


# Launch configuration -----------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_splits_cover_the_features_and_programs_the_gpu(dtype):
    for channels in (1, 16, 768, 2047, 2048, 8191, 8192, 32000):
        for features in (1, 64, 511, 768, 1023, 1024, 3072, 11008):
            config = _launch_config(channels, features, dtype, None)
            splits, split = config["SPLITS"], config["SPLIT"]
            assert (splits - 1) * split < features <= splits * split
            assert split % config["BLOCK_K"] == 0 and 1 <= splits <= 8
            programs = math.ceil(channels / config["BLOCK_N"])
            assert splits == 1 or (programs < 128 and split >= 384)


def test_swiglu_has_twice_the_rows():
    wide = _launch_config(8192, 768, torch.bfloat16, None)
    assert _launch_config(4096, 768, torch.bfloat16, "swiglu") == wide


# Kernels ------------------------------------------------------------------------------------------
def call_of(inputs, device="cpu"):
    names = ("x", "weight", "scales", "norm_weight", "norm_bias", "bias", "residual", "norm",
             "activation")  # fmt: skip
    call = OpCall(OPS["norm_linear"], (*(inputs.get(name) for name in names), 1e-5))
    return call.map(lambda t: t.to(device))


def check(inputs, device):
    """Values within the budget, and the same whatever the order of the programs."""
    call = call_of(inputs, device)
    results = kernel_results(call, order_seed=1)
    assert_kernels_agree(call, results)
    assert_equal(kernel_results(call, order_seed=2), results)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("rows", "channels", "features"),
    [(1, 1, 1), (15, 15, 63), (16, 16, 64), (17, 17, 65), (33, 33, 127), (64, 32, 128),
     (2, 40, 129), (5, 24, 200)],
)  # fmt: skip
def test_sizes_around_a_block(rows, channels, features, dtype, device):
    for variant in ("layer, gelu", "rms, swiglu"):
        check(make_inputs((rows, features), channels, dtype, **VARIANTS[variant]), device)


@variants
@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_variant(dtype, int8, device, variant):
    check(make_inputs((9, 144), 40, dtype, int8=int8, **VARIANTS[variant]), device)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("variant", ["layer, gelu", "rms, swiglu"])
@pytest.mark.parametrize(("rows", "features"), [(1, 1024), (17, 1601)])
def test_splits_are_merged(rows, features, variant, dtype, device):
    inputs = make_inputs((rows, features), 9, dtype, **VARIANTS[variant])
    assert _launch_config(9, features, dtype, inputs.get("activation"))["SPLITS"] > 1
    check(inputs, device)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_counters_are_found_and_left_at_zero(device):
    """One after another, calls of other shapes share them."""
    counters = torch.zeros(6, dtype=torch.int32, device=device)
    for rows, features in ((1, 1024), (33, 1601), (1, 1024)):
        inputs = make_inputs((rows, features), 19, torch.bfloat16, device, options=("bias",))
        assert _launch_config(19, features, torch.bfloat16, None)["SPLITS"] > 1
        with kernels(device, order_seed=rows):
            assert_equal(norm_linear(**inputs, counters=counters), norm_linear(**inputs))
        assert not counters.any()


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", [None, "swiglu"])
def test_many_channels_have_wider_tiles(activation, dtype, device):
    channels = 4101 if activation else 8197
    assert _launch_config(channels, 40, dtype, activation)["BLOCK_N"] == 32
    options = {"options": ("bias",)}
    call = call_of(make_inputs((2, 40), channels, dtype, activation=activation, **options), device)
    assert_kernels_agree(call, kernel_results(call))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_values_that_norms_fail_on(norm, dtype, device):
    for x in values((20, 150), dtype=dtype).values():
        inputs = make_inputs((20, 150), 24, dtype, norm=norm, options=("norm_weight",))
        check({**inputs, "x": x}, device)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("features", [140, pytest.param(1601, marks=pytest.mark.slow)])
@pytest.mark.parametrize("int8", [False, True])
def test_a_row_has_the_same_bits_in_any_batch(int8, features, dtype, device):
    """Alone, permuted, among 2 to 34 rows, and beside rows that are not numbers."""
    options = {"norm": "layer", "activation": "swiglu", "options": EVERYTHING}
    inputs = make_inputs((34, features), 20, dtype, int8=int8, **options)

    def run(rows, order_seed):
        taken = {name: inputs[name][rows] for name in ("x", "residual")}
        (out,) = kernel_results(call_of({**inputs, **taken}, device), order_seed=order_seed)
        return out

    whole = run(list(range(34)), 0)
    for seed, rows in enumerate(([21], [33, 5], list(range(10, 27))[::-1])):
        assert_equal(run(rows, seed), whole[rows])
    inputs["x"][[3, 30]] = torch.tensor([[float("nan")], [float("inf")]], dtype=dtype)
    spoilt = run(list(range(34)), 1)
    assert spoilt[[3, 30]].isnan().all()
    others = [i for i in range(34) if i not in (3, 30)]
    assert_equal(spoilt[others], whole[others])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("int8", [False, True])
def test_many_rows_go_to_cublas(int8, dtype):
    options = {"norm": "rms", "activation": "swiglu", "options": ("norm_weight", "bias")}
    call = call_of(make_inputs((65, 640), 100, dtype, int8=int8, **options), "cuda")
    assert_kernels_agree(call, call.run())


@pytest.mark.offline
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_half_types_are_multiplied_by_tensor_cores(arch):
    """By mma.sync on every architecture: sixteen rows are too few for wgmma and tcgen05."""
    for launch in one_of_each_dtype(LAUNCHES["norm_linear"]()):
        (report,) = compile_launch(launch, arch)
        assert report.matrix == ("" if "float32" in launch.label else "HMMA"), launch.label
