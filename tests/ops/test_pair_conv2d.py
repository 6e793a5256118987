"""pair_conv2d: the first layer of a conditional discriminator, and its derivatives."""

import math
from collections.abc import Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import cgkernels
from cgkernels import pair_conv2d
from cgkernels.ops import pair_conv2d as op
from cgkernels.testing import assert_within_budget, layouts, plain_and_modeled, values
from tests.support import (
    FLOATS,
    KERNEL_DEVICES,
    Sample,
    assert_accurate,
    assert_equal,
    assert_kernels_are_accurate,
    assert_refused,
    kernels,
    normals,
)

LAUNCHERS = {"pair_conv2d": op._launch}


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def sample(label, x, y, outputs=5, kernel=4, bias=True, **options):
        channels = x.shape[1] + (0 if y is None else y.shape[1])
        weight = data(outputs, channels, kernel, kernel, seed=2) / (kernel * channels**0.5)
        inputs = {"x": x, "y": y, "weight": weight, **options}
        if bias:
            inputs["bias"] = data(outputs, seed=3)
        floats = tuple(
            name for name in ("x", "y", "weight", "bias") if inputs.get(name) is not None
        )
        return Sample(label, pair_conv2d, inputs, floats, ("x",) if y is None else ("x", "y"))

    def data(*shape, seed=0):
        return normals(*shape, dtype=dtype, device=device, seed=seed)

    x, y = data(3, 3, 6, 8), data(3, 2, 6, 8, seed=1)
    yield sample("pair", x, y)
    yield sample("one image", x, None)
    yield sample("no bias, no slope", x, y, bias=False, slope=1.0)
    yield sample("relu", x, y, slope=0)
    yield sample("stride 1", x, y, stride=1)
    yield sample("3 x 3, odd size", data(3, 1, 7, 5), data(3, 4, 7, 5, seed=1), kernel=3)
    yield sample("1 x 1, stride 1", x, y, kernel=1, stride=1, padding=0)
    yield sample("1 x 1, stride 2", x, y, outputs=1, kernel=1, padding=0)
    yield sample("wide padding", x, y, padding=3)
    yield sample("no padding", x, y, padding=0, outputs=17)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, y)]
    yield sample("channels_last and contiguous", last[0], y)
    yield sample("slices", data(3, 5, 6, 16)[:, 1:4, :, ::2], last[1][:, :1])
    yield sample("expanded", x.transpose(2, 3).contiguous().transpose(2, 3), y[:1].expand_as(y))
    yield sample("one pixel", data(2, 3, 2, 2), data(2, 3, 2, 2, seed=1))
    yield sample("empty batch", x[:0], y[:0])


# The definition -----------------------------------------------------------------------------------
@pytest.mark.parametrize("slope", [0.2, 1.0, 0.0])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 4])
def test_it_is_the_convolution_of_both(kernel, stride, slope):
    x, y = normals(2, 3, 9, 8), normals(2, 2, 9, 8, seed=1)
    weight, bias = normals(7, 5, kernel, kernel, seed=2), normals(7, seed=3)
    options = {"stride": stride, "padding": kernel // 3}
    z = F.conv2d(torch.cat([x, y], 1), weight, bias, **options)
    expected = torch.where(z > 0, z, slope * z)
    out = pair_conv2d(x, y, weight, bias, slope=slope, **options)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last)
    alone = F.conv2d(x, weight[:, :3], None, **options)
    out = pair_conv2d(x, None, weight[:, :3], slope=slope, **options)
    torch.testing.assert_close(out, torch.where(alone > 0, alone, slope * alone))


def test_by_hand():
    """A window of 1 x 1 over both: 2 x - 3 y + 1, and a tenth of what is negative."""
    x, y = torch.tensor([1.0, 4.0]).view(1, 1, 1, 2), torch.tensor([2.0, 1.0]).view(1, 1, 1, 2)
    weight, bias = torch.tensor([2.0, -3.0]).view(1, 2, 1, 1), torch.tensor([1.0])
    out = pair_conv2d(x, y, weight, bias, stride=1, padding=0, slope=0.1)
    # 2 - 6 + 1 = -3, a tenth is -0.3; 8 - 3 + 1 = 6
    torch.testing.assert_close(out, torch.tensor([-0.3, 6.0]).view(1, 1, 1, 2))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("kernel", "stride", "slope"), [(4, 2, 0.2), (3, 1, 0.2), (1, 1, 1.0)])
@pytest.mark.parametrize("pair", [True, False])
def test_values_and_gradients_are_accurate(pair, kernel, stride, slope, dtype):
    """Against float64 and plain PyTorch in the same dtype."""
    shapes = [(4, 3, 20, 20), (4, 4, 20, 20), (40, 7, kernel, kernel), (300,)]
    shapes[2] = (300, 7 if pair else 3, kernel, kernel)
    inputs = [normals(*shape, seed=i) for i, shape in enumerate(shapes)]
    inputs[2] /= kernel * math.sqrt(7)
    inputs = [t.to(dtype) for t in inputs]
    if not pair:
        del inputs[1]
    options = {"stride": stride, "padding": kernel // 3, "slope": slope}

    def run(inputs):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = pair_conv2d(*leaves if pair else (leaves[0], None, *leaves[1:]), **options)
        seed = normals(*out.shape, seed=5).to(out)
        return out.detach(), *torch.autograd.grad(out, leaves, seed)

    actual = run(inputs)
    with cgkernels.reference():
        plain, modeled = plain_and_modeled(lambda: run(inputs))
        exact = run([t.double() for t in inputs])
    for got, same, true, model in zip(actual, plain, exact, modeled, strict=True):
        assert_within_budget(got, same, true, model)


def test_gradient_penalties():
    """The norm of the gradient in an image, differentiated in the weights."""
    shapes = [(3, 3, 8, 8), (3, 2, 8, 8), (6, 5, 4, 4), (6,)]
    inputs = [normals(*shape, seed=i) for i, shape in enumerate(shapes)]

    def run():
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = pair_conv2d(*leaves)
        dx, dy = torch.autograd.grad(out.square().sum(), leaves[:2], create_graph=True)
        penalty = (dx.square().sum((1, 2, 3)) + dy.square().sum((1, 2, 3))).mean()
        return torch.autograd.grad(penalty, leaves)

    ours = run()
    with cgkernels.reference():
        torch.testing.assert_close(ours, run(), rtol=1e-4, atol=1e-3)
    assert all(g.abs().max() > 0 for g in ours)


def test_only_what_is_asked_for_is_computed():
    shapes = [(2, 3, 5, 5), (2, 2, 5, 5), (4, 5, 4, 4), (4,)]
    inputs = [normals(*shape, seed=i) for i, shape in enumerate(shapes)]
    out = pair_conv2d(*inputs)
    for wanted in product((True, False), repeat=4):
        found = op.pair_conv2d_bwd_ref(wanted, torch.ones_like(out), out, *inputs, 2, 1, 0.2)
        assert tuple(g is not None for g in found) == wanted


@pytest.mark.parametrize("kernel", [1, 3, 4])
@pytest.mark.parametrize(("channels", "outputs"), [((3, 3), 64), ((1, 2), 3), ((8, 5), 1)])
def test_an_image_has_one_result(channels, outputs, kernel):
    """On the CPU, whatever its place in the batch and in memory."""
    weight = normals(outputs, sum(channels), kernel, kernel, seed=2)
    for height, width in ((4, 3), (11, 6), (16, 32)):
        x, y = (normals(4, c, height, width, seed=i) for i, c in enumerate(channels))
        options = {"weight": weight, "padding": kernel // 3}
        whole = pair_conv2d(x, y, **options)
        for rows in ([0], [3], [2, 1], [3, 2, 1, 0]):
            assert_equal(pair_conv2d(x[rows], y[rows], **options), whole[rows])
        assert_equal(pair_conv2d(x[1:2], y[1:2], **options), whole[1:2])


# What is refused ----------------------------------------------------------------------------------
X, Y, W = normals(2, 3, 5, 6), normals(2, 2, 5, 6), normals(7, 5, 4, 4)

WRONG = [
    (TypeError, ("x", "int64"), {"x": X.long()}),
    (TypeError, ("x", "NoneType"), {"x": None}),
    (ValueError, ("x", "(N, Cx, H, W)", "(3, 5, 6)"), {"x": X[0]}),
    (ValueError, ("x", "(2, 0, 5, 6)"), {"x": X[:, :0]}),
    (ValueError, ("x", "at least 2"), {"x": X[:, :, :1], "y": Y[:, :, :1]}),
    (ValueError, ("x", "at least 4"), {"x": X[..., :3], "y": Y[..., :3], "padding": 0}),
    (TypeError, ("y", "list"), {"y": [1.0]}),
    (TypeError, ("y", "float16", "float32"), {"y": Y.half()}),
    (ValueError, ("y", "(2, Cy, 5, 6)", "(1, 2, 5, 6)"), {"y": Y[:1]}),
    (ValueError, ("y", "(2, Cy, 5, 6)", "(2, 2, 5, 5)"), {"y": Y[..., :5]}),
    (ValueError, ("y", "(2, 2, 5)"), {"y": Y[..., 0]}),
    (ValueError, ("y", "(2, 0, 5, 6)"), {"y": Y[:, :0]}),
    (ValueError, ("y", "cpu", "meta"), {"y": Y.to("meta")}),
    (TypeError, ("weight", "NoneType"), {"weight": None}),
    (TypeError, ("weight", "bfloat16", "float32"), {"weight": W.bfloat16()}),
    (ValueError, ("weight", "(O, 5, k, k)", "(7, 4, 4, 4)"), {"weight": W[:, :4]}),
    (ValueError, ("weight", "(O, 3, k, k)", "(7, 5, 4, 4)"), {"y": None}),
    (ValueError, ("weight", "k = 1, 3 or 4", "(7, 5, 2, 2)"), {"weight": W[..., :2, :2]}),
    (ValueError, ("weight", "(7, 5, 3, 4)"), {"weight": W[:, :, :3]}),
    (ValueError, ("weight", "(0, 5, 4, 4)"), {"weight": W[:0]}),
    (ValueError, ("weight", "()"), {"weight": torch.ones(())}),
    (ValueError, ("weight", "cpu", "meta"), {"weight": W.to("meta")}),
    (TypeError, ("bias", "float"), {"bias": 1.0}),
    (TypeError, ("bias", "float16", "float32"), {"bias": torch.ones(7).half()}),
    (ValueError, ("bias", "(7,)", "(5,)"), {"bias": torch.ones(5)}),
    (ValueError, ("bias", "cpu", "meta"), {"bias": torch.ones(7, device="meta")}),
    (ValueError, ("stride", "1, 2", "3"), {"stride": 3}),
    (ValueError, ("stride", "True"), {"stride": True}),
    (ValueError, ("stride", "(2, 2)"), {"stride": (2, 2)}),
    (ValueError, ("padding", "from 0 to 3", "4"), {"padding": 4}),
    (ValueError, ("padding", "-1"), {"padding": -1}),
    (TypeError, ("padding", "1.0"), {"padding": 1.0}),
    (ValueError, ("slope", "-0.2"), {"slope": -0.2}),
    (ValueError, ("slope", "nan"), {"slope": float("nan")}),
    (TypeError, ("slope", "None"), {"slope": None}),
]


@pytest.mark.parametrize(("error", "words", "changed"), WRONG)
def test_wrong_arguments(error, words, changed):
    call = Sample("wrong", pair_conv2d, {"x": X, "y": Y, "weight": W, "bias": None})
    assert_refused(call.replace(**changed), error, *words)


# Kernels ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("channels", "outputs", "height", "width", "kernel", "stride"),
    [
        ((1, 1), 15, 1, 1, 1, 1), ((3, 3), 16, 8, 8, 1, 1), ((2, 1), 17, 8, 16, 3, 1),
        ((3, 3), 64, 16, 32, 4, 2), ((1, 3), 65, 10, 14, 4, 1), ((9, 2), 3, 17, 19, 4, 2),
    ],
)  # fmt: skip
def test_sizes_around_a_tile(channels, outputs, height, width, kernel, stride, dtype, device):
    """Pixels, outputs and features below, at and above a block."""
    images = [
        normals(2, c, height, width, dtype=dtype, device=device, seed=i)
        for i, c in enumerate(channels)
    ]
    shape = outputs, sum(channels), kernel, kernel
    inputs = {
        "x": images[0], "y": images[1], "padding": min(1, kernel - 1), "stride": stride,
        "weight": normals(*shape, dtype=dtype, device=device, seed=2) / (kernel * 2),
        "bias": normals(outputs, dtype=dtype, device=device, seed=3),
    }  # fmt: skip
    assert_kernels_are_accurate(Sample("", pair_conv2d, inputs), device)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("kind", ["normal", "small", "large", "integers"])
def test_kinds_of_values(kind, device):
    """Each image in a layout of its own; NaN between the elements of slices is never read."""
    x, y = (values((2, 3, 6, 12), seed=i)[kind] for i in range(2))
    weight = normals(16, 6, 4, 4, seed=2) / 8
    if kind == "integers":
        weight = weight.sign()
    with cgkernels.reference():
        plain, modeled = plain_and_modeled(lambda: pair_conv2d(x, y, weight))
        exact = pair_conv2d(x.double(), y.double(), weight.double())
    for given in zip(layouts(x).values(), list(layouts(y).values())[::-1], strict=True):
        with kernels(device):
            out = pair_conv2d(*(t.to(device) for t in (*given, weight)))
        assert_accurate([out], [plain], [exact], [modeled])


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_image_of_the_kernel_has_one_result(dtype, device):
    """Alone, in a batch, permuted, in any order of the programs."""
    x, y = (normals(4, 3, 22, 20, dtype=dtype, device=device, seed=i) for i in range(2))
    weight = normals(70, 6, 4, 4, dtype=dtype, device=device, seed=2) / 9

    def run(rows, order_seed=0):
        with kernels(device, order_seed=order_seed):
            return pair_conv2d(x[rows], y[rows], weight)

    whole = run([0, 1, 2, 3])
    for rows in ([2], [3, 2, 1, 0]):
        assert_equal(run(rows, order_seed=1), whole[rows])


@pytest.mark.parametrize("features", [1, 16, 48, 144, 576])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_more_than_four_warps(features, dtype):
    """With eight, Triton has miscompiled such loops."""
    for outputs in (1, 64, 100, 512):
        assert op._launch_config(features, outputs, dtype)["num_warps"] <= 4
