"""conv2d_stats: a convolution, and mean and variance of its result over the pixels."""

import math
from collections.abc import Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from benchmarks.ops import LAUNCHES
from cgkernels.library import OPS
from cgkernels.ops import conv2d_stats as op
from cgkernels.ops.conv2d_stats import conv2d_stats
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
    normals,
    one_of_each_dtype,
)

LAUNCHERS = {"conv2d_stats": op._launch}

LAST = torch.channels_last
OPTIONS = list(product(op.KERNELS, op.STRIDES, op.PADDINGS))  # (k, stride, padding)

options = pytest.mark.parametrize(
    ("kernel", "stride", "padding"), OPTIONS, ids=["k{} s{} p{}".format(*o) for o in OPTIONS]
)


def make_inputs(shape, channels, kernel, stride, padding, dtype, device="cpu", *, last=True):
    features = shape[1]
    x = normals(*shape, seed=1)
    weight = normals(channels, features, kernel, kernel, seed=2) / kernel / math.sqrt(features)
    made = {"x": x.to(device, dtype), "weight": weight.to(device, dtype)}
    if last:
        made = {name: t.contiguous(memory_format=LAST) for name, t in made.items()}
    return {**made, "stride": stride, "padding": padding}


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def sample(label, shape, channels, *options, **layout):
        return sample_of(label, make_inputs(shape, channels, *options, dtype, device, **layout))

    def sample_of(label, inputs):
        return Sample(label, conv2d_stats, inputs, ("x", "weight"), ("x",))

    yield sample("k4 s2 p1", (3, 5, 10, 8), 33, 4, 2, 1)
    yield sample("k4 s1 p1, more than a tile", (3, 5, 11, 9), 30, 4, 1, 1)
    yield sample("k4 s2 p2, odd, contiguous", (3, 6, 7, 9), 30, 4, 2, 2, last=False)
    yield sample("k3 s1 p1", (3, 17, 5, 6), 30, 3, 1, 1)
    yield sample("k3 s2 p0", (3, 4, 9, 7), 30, 3, 2, 0)
    yield sample("k1", (3, 20, 4, 5), 30, 1, 1, 0)
    yield sample("one input, one pixel", (3, 1, 3, 3), 90, 3, 1, 0)
    views = make_inputs((3, 6, 6, 5), 30, 3, 1, 1, dtype, device)
    wide = normals(60, 6, 3, 3, dtype=dtype, device=device, seed=3) / 8
    yield sample_of("views", {
        **views, "weight": wide[::2],
        "x": normals(3, 6, 6, 10, dtype=dtype, device=device)[..., ::2],
    })  # fmt: skip
    yield sample("empty batch", (0, 5, 6, 6), 30, 3, 1, 1)


# The definition -----------------------------------------------------------------------------------
def by_modules(x, weight, *, stride, padding):
    """What one would write with PyTorch, in the dtype of x; the statistics of what is stored.

    Without torch.var_mean, which sums float32 in float64 on a CPU.
    """
    y = F.conv2d(x, weight, None, stride, padding)
    return y, *stats_of(y.to(torch.promote_types(y.dtype, torch.float32)))


def stats_of(y):
    mean = y.mean((2, 3))
    return mean, (y - mean[..., None, None]).square().mean((2, 3))


def widened(inputs):
    return {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}


def assert_accurate(inputs, run=conv2d_stats):
    """y, mean and var, each judged alone."""
    ours, exact = run(**inputs), by_modules(**widened(inputs))
    plain, modeled = plain_and_modeled(lambda: by_modules(**inputs))
    for one, same, true, model in zip(ours, plain, exact, modeled, strict=True):
        assert_within_budget(one, same, true, model)
    return ours


@options
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_it_is_what_the_modules_compute(dtype, kernel, stride, padding):
    inputs = make_inputs((4, 19, 13, 10), 70, kernel, stride, padding, dtype)
    y, mean, var = assert_accurate(inputs)
    assert y.dtype == dtype and mean.dtype == var.dtype == torch.float32
    assert y.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("images", [1, 3, 16])
def test_batches(images, dtype):
    assert_accurate(make_inputs((images, 64, 16, 12), 300, 4, 2, 1, dtype))


def gradients_of(run, inputs, weights):
    """Gradients of x and weight of y, mean and var, each times weights."""
    leaves = [inputs[name].detach().clone().requires_grad_() for name in ("x", "weight")]
    outputs = run(**{**inputs, "x": leaves[0], "weight": leaves[1]})
    terms = [(out * w.to(out.dtype)).sum() for out, w in zip(outputs, weights, strict=True) if
             w is not None]  # fmt: skip
    return torch.autograd.grad(sum(terms), leaves)


@pytest.mark.parametrize("of", ["y", "mean", "var", "y, mean, var"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", [(4, 2, 1), (3, 1, 1), (4, 1, 2), (1, 2, 0)], ids=str)
def test_gradients_are_those_of_the_modules(case, dtype, of):
    inputs = make_inputs((3, 19, 11, 12), 40, *case, dtype)
    weights = [
        normals(*out.shape, dtype=out.dtype, seed=5 + i) if name in of else None
        for i, (name, out) in enumerate(
            zip(("y", "mean", "var"), by_modules(**inputs), strict=True)
        )
    ]
    ours = gradients_of(conv2d_stats, inputs, weights)
    exact = gradients_of(by_modules, widened(inputs), weights)
    plain, modeled = plain_and_modeled(lambda: gradients_of(by_modules, inputs, weights))
    for one, same, true, model in zip(ours, plain, exact, modeled, strict=True):
        assert_within_budget(one, same, true, model)


def test_only_gradients_that_are_wanted():
    inputs = make_inputs((2, 5, 8, 8), 6, 3, 1, 1, torch.float32)
    for name in ("x", "weight"):
        leaf = inputs[name].clone().requires_grad_()
        y, mean, _ = conv2d_stats(**{**inputs, name: leaf})
        (y.sum() + mean.sum()).backward()
        assert leaf.grad.shape == leaf.shape


def test_an_instance_norm_by_its_statistics_has_the_gradients_of_pytorch():
    inputs = make_inputs((3, 6, 12, 10), 17, 4, 2, 1, torch.float64)

    def ours(x, weight, **options):
        y, mean, var = conv2d_stats(x, weight, **options)
        return ((y - mean[..., None, None]) * torch.rsqrt(var[..., None, None] + 1e-5),)

    def plain(x, weight, **options):
        return (F.instance_norm(by_modules(x, weight, **options)[0]),)

    weights = [normals(3, 17, 6, 5, dtype=torch.float64)]
    expected = gradients_of(plain, inputs, weights)
    torch.testing.assert_close(gradients_of(ours, inputs, weights), expected)


def offset_inputs(dtype, shape=(3, 16, 12, 12), channels=100):
    """Mean 100 times the deviation: one input that is constant, added with a weight of 100."""
    inputs = make_inputs(shape, channels, 1, 1, 0, dtype)
    inputs["x"][:, 0], inputs["weight"][:, 0] = 1, 100
    return inputs


def test_a_large_mean_costs_no_digits():
    """Of what is stored: in half types rounding alone makes much of this variance."""
    _, mean, var = assert_accurate(offset_inputs(torch.float32))
    assert (mean.abs() / var.sqrt()).median() > 80


def assert_statistics_of_the_rounded(y, mean, var):
    exact_mean, exact_var = stats_of(y.double())
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_statistics_are_those_of_the_rounded_result(dtype):
    assert_statistics_of_the_rounded(*conv2d_stats(**offset_inputs(dtype)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("shape", "channels"), [((9, 5, 9, 8), 7), ((9, 64, 16, 16), 32), ((9, 3, 40, 40), 16)]
)
def test_on_the_cpu_an_image_has_the_same_bits_in_any_batch(shape, channels, dtype):
    """One image of few values alone is what PyTorch computes in another way."""
    for case in OPTIONS:
        inputs = make_inputs(shape, channels, *case, dtype)
        whole = conv2d_stats(**inputs)
        for rows in ([4], [8, 0], [2, 1, 0], list(range(8))):
            found = conv2d_stats(**{**inputs, "x": inputs["x"][rows]})
            assert_equal(found, tuple(t[rows] for t in whole))


def test_saved_tensors_can_be_used_twice():
    inputs = make_inputs((2, 4, 6, 6), 5, 3, 1, 1, torch.float32)
    x = inputs["x"].requires_grad_()
    y, _, var = conv2d_stats(**inputs)
    loss = y.square().sum() + var.sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert_equal(torch.autograd.grad(loss, x), first)


# What is refused ----------------------------------------------------------------------------------
X, W = normals(2, 5, 6, 7), normals(3, 5, 4, 4)

WRONG = [
    (TypeError, ("x", "NoneType"), {"x": None}),
    (TypeError, ("x", "int64"), {"x": X.long()}),
    (ValueError, ("x", "(N, 5, H, W)", "(2, 4, 6, 7)"), {"x": X[:, :4]}),
    (ValueError, ("x", "(N, 5, H, W)", "(5, 6, 7)"), {"x": X[0]}),
    (ValueError, ("x", "at least 4", "(2, 5, 3, 7)"), {"x": X[:, :, :3], "padding": 0}),
    (ValueError, ("x", "at least 2", "(2, 5, 6, 1)"), {"x": X[..., :1]}),
    (ValueError, ("x", "at least 1", "(2, 5, 0, 7)"), {"x": X[:, :, :0], "padding": 2}),
    (TypeError, ("weight", "list"), {"weight": [1.0]}),
    (TypeError, ("weight", "float32", "float16"), {"weight": W.half()}),
    (ValueError, ("weight", "cpu", "meta"), {"weight": W.to("meta")}),
    (ValueError, ("weight", "(O, C, k, k)", "(3, 5, 4)"), {"weight": W[..., 0]}),
    (ValueError, ("weight", "not empty", "(0, 5, 4, 4)"), {"weight": W[:0]}),
    (ValueError, ("weight", "not empty", "(3, 0, 4, 4)"), {"weight": W[:, :0]}),
    (ValueError, ("weight", "k of (1, 3, 4)", "(3, 5, 2, 2)"), {"weight": W[..., :2, :2]}),
    (ValueError, ("weight", "k of (1, 3, 4)", "(3, 5, 4, 3)"), {"weight": W[..., :3]}),
    (ValueError, ("stride", "1, 2", "3"), {"stride": 3}),
    (ValueError, ("stride", "1, 2", "(2, 2)"), {"stride": (2, 2)}),
    (ValueError, ("stride", "1, 2", "True"), {"stride": True}),
    (ValueError, ("padding", "0, 1, 2", "3"), {"padding": 3}),
    (ValueError, ("padding", "0, 1, 2", "'same'"), {"padding": "same"}),
]


@pytest.mark.parametrize(("error", "words", "changed"), WRONG)
def test_wrong_arguments(error, words, changed):
    call = Sample("wrong", conv2d_stats, {"x": X, "weight": W, "stride": 1, "padding": 1})
    assert_refused(call.replace(**changed), error, *words)


# Launch configuration -----------------------------------------------------------------------------
def test_eight_warps_are_never_launched():
    """Triton miscompiles a loop whose counter is split by // and % (triton#1254)."""
    for channels, features, dtype in product((1, 16, 64, 128, 512), (1, 3, 16, 35, 256), FLOATS):
        for pixels in (1, 961, 4096, 65536):
            config = op._launch_config(pixels, channels, features, dtype)
            assert config["num_warps"] <= 4
            assert config["BLOCK_N"] >= 16 and config["BLOCK_K"] >= 16  # what tl.dot takes


def test_tiles_are_wide_where_an_image_fills_the_gpu():
    assert op._launch_config(4096, 256, 256, torch.bfloat16)["BLOCK_N"] == 128
    assert op._launch_config(961, 512, 256, torch.bfloat16)["BLOCK_N"] == 64
    assert op._launch_config(4096, 256, 256, torch.float32)["BLOCK_N"] == 64


# Kernels ------------------------------------------------------------------------------------------
def call_of(inputs, device="cpu"):
    names = ("x", "weight", "stride", "padding")
    return OpCall(OPS["conv2d_stats"], tuple(inputs[n] for n in names)).map(lambda t: t.to(device))


def check(inputs, device):
    """Values within the budget, and the same whatever the order of the programs."""
    call = call_of(inputs, device)
    results = kernel_results(call, order_seed=1)
    assert_kernels_agree(call, results)
    assert_equal(kernel_results(call, order_seed=2), results)


@options
@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_option(dtype, device, kernel, stride, padding):
    check(make_inputs((2, 5, 9, 10), 20, kernel, stride, padding, dtype), device)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("features", "channels", "height", "width"),
    [(1, 1, 1, 1), (16, 16, 8, 8), (15, 63, 7, 9), (17, 64, 5, 13), (64, 65, 8, 8),
     (80, 33, 13, 10)],
)  # fmt: skip
def test_sizes_around_a_block(features, channels, height, width, dtype, device):
    check(make_inputs((2, features, height, width), channels, 3, 1, 1, dtype), device)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_wide_tiles(dtype, device, monkeypatch):
    """As of a large image, of a small one: the interpreter is slow."""
    config = op._launch_config(2**16, 256, 40, dtype)
    assert config["BLOCK_N"] == 128
    monkeypatch.setattr(op, "_launch_config", lambda *sizes: config)
    check(make_inputs((2, 40, 10, 9), 140, 4, 2, 1, dtype), device)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_many_tiles_are_merged(device):
    """More than a block of the kernel that merges takes at once."""
    pixels = 64 * 17 + 3
    check(make_inputs((2, 2, pixels, 1), 35, 1, 1, 0, torch.float32), device)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_strides(dtype, device):
    inputs = make_inputs((2, 5, 6, 7), 8, 4, 1, 2, dtype, last=False)
    expected = kernel_results(call_of(inputs, device))
    x, weight = inputs["x"], inputs["weight"]
    for same_x, same_weight in (
        (x.repeat_interleave(2, 3)[..., ::2], weight.mT.contiguous().mT),
        (x.contiguous(memory_format=LAST), weight.contiguous(memory_format=LAST)),
    ):
        found = kernel_results(call_of({**inputs, "x": same_x, "weight": same_weight}, device))
        assert_equal(found, expected)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernels_keep_the_digits_beside_a_large_mean(device):
    """Statistics of three tiles, of what the kernel itself made of y."""
    inputs = offset_inputs(torch.float32, (3, 16, 13, 11), 90)
    y, *stats = (t.cpu() for t in kernel_results(call_of(inputs, device)))
    assert (y.abs() > 1).all()  # there is one
    plain, modeled = plain_and_modeled(lambda: stats_of(y))
    for one, same, true, model in zip(stats, plain, stats_of(y.double()), modeled, strict=True):
        assert_within_budget(one, same, true, model)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_statistics_of_kernels_are_those_of_the_rounded_result(dtype, device):
    results = kernel_results(call_of(offset_inputs(dtype, (2, 16, 9, 10), 20), device))
    assert_statistics_of_the_rounded(*(t.cpu() for t in results))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_that_sums_fail_on(dtype, device):
    for x in values((2, 6, 9, 9), dtype=dtype).values():
        check({**make_inputs((2, 6, 9, 9), 20, 3, 1, 1, dtype), "x": x}, device)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_image_has_the_same_bits_in_any_batch(dtype, device):
    """Alone, permuted, among 3 and 16, and beside images that are not numbers."""
    inputs = make_inputs((16, 6, 9, 10), 18, 3, 1, 1, dtype)

    def run(rows, order_seed):
        return kernel_results(
            call_of({**inputs, "x": inputs["x"][rows]}, device), order_seed=order_seed
        )

    whole = run(list(range(16)), 0)
    for seed, rows in enumerate(([11], [15], [7, 0, 3])):
        for part, all_of_them in zip(run(rows, seed), whole, strict=True):
            assert torch.equal(part, all_of_them[rows])
    inputs["x"][[3, 9]] = torch.tensor([float("nan"), float("inf")], dtype=dtype)[
        :, None, None, None
    ]
    others = [i for i in range(16) if i not in (3, 9)]
    for part, all_of_them in zip(run(list(range(16)), 1), whole, strict=True):
        assert part[[3, 9]].isnan().any(1).all() and torch.equal(part[others], all_of_them[others])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("of", ["y", "y, mean, var"])
def test_gradients_on_a_gpu(dtype, of):
    inputs = make_inputs((3, 32, 20, 18), 40, 4, 2, 1, dtype)
    weights = [
        normals(*out.shape, dtype=out.dtype, seed=5 + i) if name in of else None
        for i, (name, out) in enumerate(
            zip(("y", "mean", "var"), by_modules(**inputs), strict=True)
        )
    ]
    on_gpu = {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
    cuda_weights = [None if w is None else w.cuda() for w in weights]
    with torch.backends.cudnn.flags(allow_tf32=False):
        ours = gradients_of(conv2d_stats, on_gpu, cuda_weights)
    plain, modeled = plain_and_modeled(lambda: gradients_of(by_modules, inputs, weights))
    exact = gradients_of(by_modules, widened(inputs), weights)
    for one, same, true, model in zip(ours, plain, exact, modeled, strict=True):
        assert_within_budget(one, same, true, model)


@pytest.mark.offline
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_half_types_are_multiplied_by_tensor_cores(arch):
    for launch in one_of_each_dtype(LAUNCHES["conv2d_stats"]()):
        report, _ = compile_launch(launch, arch)
        assert bool(report.matrix) == ("float32" not in launch.label), launch.label
