"""instance_norm_act: norms of samples and of batches, and what follows them, with gradients."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import cgkernels
from cgkernels import instance_norm_act, instance_norm_act_
from cgkernels.library import OPS
from cgkernels.moments import MERGED_PARTS
from cgkernels.ops.instance_norm_act.launch import (
    _launch_bwd,
    _launch_config,
    _launch_fwd,
    _launch_inplace,
)
from cgkernels.ops.instance_norm_act.reference import ACTIVATIONS
from cgkernels.testing import assert_within_budget, layouts, plain_and_modeled
from tests.support import (
    KERNEL_DEVICES,
    Sample,
    assert_accurate,
    assert_equal,
    assert_refused,
    kernels,
    memory_of,
    normals,
)

LAUNCHERS = {
    "instance_norm_act_fwd": _launch_fwd,
    "instance_norm_act_bwd": _launch_bwd,
    "instance_norm_act_": _launch_inplace,
}

SHAPE = (3, 5, 6, 7)
DIFFERENTIABLE = ("x", "weight", "bias", "residual")
LAST = {"memory_format": torch.channels_last}


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def data(*shape, seed=10, dtype=dtype):  # other data than the gradients of the checks
        return normals(*(shape or SHAPE), dtype=dtype, device=device, seed=seed)

    def sample(label, x, fn=instance_norm_act, mutates=(), names=DIFFERENTIABLE, **inputs):
        inputs = {"x": x, **inputs}
        wanted = tuple(name for name in names if name in inputs)
        per_row = tuple(name for name in ("x", "residual", "out", "second") if name in inputs)
        if inputs.get("over_batch"):
            per_row = ()
        return Sample(label, fn, inputs, wanted, per_row, mutates)

    x, last, residual = data(), data().contiguous(**LAST), data(seed=1)
    affine = {"weight": data(5, seed=2), "bias": data(5, seed=3)}
    # Without a corner or a border the gradients of a sum would be nothing but rounding.
    yield sample("plain", x, activation="leaky_relu", return_stats=True)
    yield sample("channels_last, relu", last, activation="relu", return_stats=True)
    everything = {**affine, "activation": "leaky_relu", "residual": residual.contiguous(**LAST)}
    yield sample("affine, residual", last, **everything)
    yield sample("padded by 1", last, **everything, pad=1)
    yield sample("padded by 3", last, weight=affine["weight"], residual=residual, pad=3)
    yield sample("padded as wide as can be", data(2, 1, 4, 4), activation="relu", pad=3)
    yield sample("slope above 1", x, bias=affine["bias"], activation="leaky_relu", slope=1.5)
    batch = {"over_batch": True, "return_stats": True}
    yield sample("batch", last, **everything, **batch)
    small = x[:2, :, :4, :3].contiguous()
    yield sample("batch, padded", small, **affine, activation="relu", pad=2, **batch)
    yield sample("batch of numbers", data(6, 5, 1, 1), **affine, activation="relu", over_batch=True)
    wide = data(3, 9, 6, 7).contiguous(**LAST)
    views = {"residual": data(3, 5, 7, 6, seed=1).transpose(2, 3), "pad": 1}
    yield sample("views", wide[:, 2:7], **views)
    views = {"residual": data(1, 5, 3, 4, seed=1).expand(2, -1, -1, -1), "pad": 1}
    yield sample("expanded", data(2, 1, 3, 4).expand(-1, 5, -1, -1), **views)
    other = torch.float16 if dtype == torch.float32 else torch.float32
    mixed = {"weight": data(5, dtype=other), "residual": data(dtype=other, seed=1)}
    yield sample("parameters in another dtype", last, **mixed, activation="relu", pad=1)
    yield sample("one channel", data(3, 1, 6, 7), activation="leaky_relu")
    yield sample("many pixels", data(2, 3, 40, 33).contiguous(**LAST), activation="leaky_relu")
    yield sample("empty batch", x[:0], **affine, residual=residual[:0], pad=1)

    written = {"fn": instance_norm_act_, "mutates": ("out",)}
    buffer = data(3, 9, 8, 9, seed=4).contiguous(**LAST)
    yield sample("into a slice", last, out=buffer[:, 2:7], **everything, pad=1, **written)
    slanted = data(3, 5, 9, 8, seed=4).transpose(2, 3)
    without = {**written, "names": ()}
    yield sample("into a transposed tensor", x, out=slanted, activation="relu", pad=1, **without)
    yield sample("into an empty batch", x[:0], out=torch.empty_like(x[:0]), **without)
    both = {"activation": "leaky_relu", "second_activation": "relu"}
    both |= {"fn": instance_norm_act_, "mutates": ("out", "second")}
    skip = data(3, 10, 6, 7, seed=5).contiguous(**LAST)[:, :5]
    yield sample("a skip", last, out=torch.empty_like(last), second=skip, **both)
    padded = {**affine, "residual": residual, "out": buffer[:, 2:7], "second": slanted, "pad": 1}
    yield sample("a padded skip of the batch", last, **padded, **both, over_batch=True)


# The definition -----------------------------------------------------------------------------------
def composed(x, weight=None, bias=None, residual=None, *, activation=None, pad=0, over_batch=False):
    """What one would write without this op."""
    if weight is None and bias is not None:  # PyTorch's second derivative fails on that
        weight = torch.ones_like(bias)
    if over_batch:
        y = F.batch_norm(x, None, None, weight, bias, training=True)
    else:
        y = F.instance_norm(x, weight=weight, bias=bias)
    if activation == "relu":
        y = F.relu(y)
    elif activation == "leaky_relu":
        y = F.leaky_relu(y, 0.2)
    y = y if residual is None else y + residual
    return F.pad(y, (pad,) * 4, mode="reflect") if pad else y


@pytest.mark.parametrize("over_batch", [False, True])
@pytest.mark.parametrize("pad", [0, 1, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("names", [(), ("weight",), ("bias",), ("weight", "bias", "residual")])
def test_it_is_what_pytorch_composes(names, activation, pad, over_batch):
    """Values, gradients and second derivatives."""
    shapes = {"x": SHAPE, "weight": (5,), "bias": (5,), "residual": SHAPE}
    inputs = {
        name: normals(*shapes[name], dtype=torch.float64, seed=i).requires_grad_()
        for i, name in enumerate(("x", *names))
    }
    options = {"activation": activation, "pad": pad, "over_batch": over_batch}
    found = []
    for fn in (instance_norm_act, composed):
        y = fn(**inputs, **options)
        dy = normals(*y.shape, dtype=torch.float64, seed=9)
        first = torch.autograd.grad(y, list(inputs.values()), dy, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        found.append((y, *first, *torch.autograd.grad(penalty, inputs["x"])))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("over_batch", [False, True])
def test_statistics_are_those_of_running_averages(over_batch):
    x = 3 + 2 * normals(*SHAPE)
    _, mean, var = instance_norm_act(x, over_batch=over_batch, return_stats=True)
    axes = (0, 2, 3) if over_batch else (2, 3)
    torch.testing.assert_close((mean, var), (x.mean(axes), x.var(axes, correction=0)))
    if over_batch:
        norm = torch.nn.BatchNorm2d(5, momentum=1.0)
        norm(x)
        n = x.numel() // 5
        torch.testing.assert_close((mean, var * n / (n - 1)), (norm.running_mean, norm.running_var))


def test_statistics_have_no_gradient():
    x = normals(*SHAPE).requires_grad_()
    y, mean, var = instance_norm_act(x, return_stats=True)
    assert y.requires_grad and not mean.requires_grad and not var.requires_grad


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_relu_has_no_negative_zero(activation):
    y = instance_norm_act(normals(*SHAPE), activation=activation)
    assert not (y.signbit() & (y == 0)).any()


@pytest.mark.parametrize("pad", [0, 2])
@pytest.mark.parametrize("over_batch", [False, True])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_is_kept(format, over_batch, pad):
    x = normals(*SHAPE).contiguous(memory_format=format).requires_grad_()
    y = instance_norm_act(x, pad=pad, over_batch=over_batch)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.is_contiguous(memory_format=format) and dx.is_contiguous(memory_format=format)


def test_every_layout_gives_the_same_batch_norm():
    """What test_all_ops has for inputs with samples of their own."""
    x = normals(*SHAPE)
    expected = instance_norm_act(x, over_batch=True, pad=1, return_stats=True)
    for layout in layouts(x).values():
        results = instance_norm_act(layout, over_batch=True, pad=1, return_stats=True)
        torch.testing.assert_close(results, expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "shape", [(5, 3, 5, 7), (4, 1, 256, 256), (9, 64, 32, 32), (2, 3, 300, 250)]
)
def test_a_sample_has_the_same_bits_in_any_batch(shape, format, threads):
    """Its gradient, too."""
    x, dy = (normals(*shape, seed=i).contiguous(memory_format=format) for i in range(2))
    before = torch.get_num_threads()

    def run(rows):
        part = x[rows].requires_grad_()
        y = instance_norm_act(part, activation="leaky_relu")
        return y.detach(), *torch.autograd.grad(y, part, dy[rows])

    torch.set_num_threads(threads)
    try:
        whole = run(slice(None))
        for rows in (slice(1), slice(1, 2), slice(1, 3), slice(None, None, 2)):
            assert_equal(run(rows), tuple(t[rows] for t in whole))
    finally:
        torch.set_num_threads(before)


def test_only_the_slice_is_written():
    buffer = torch.full((2, 9, 6, 7), 7.0).contiguous(**LAST)
    x = normals(2, 4, 6, 7)
    _, mean, var = instance_norm_act_(buffer[:, 3:7], x, activation="relu")
    expected = instance_norm_act(x, activation="relu", return_stats=True)
    assert_equal((buffer[:, 3:7], mean, var), expected)
    assert (buffer[:, :3] == 7).all() and (buffer[:, 7:] == 7).all()


# Accuracy -----------------------------------------------------------------------------------------
def results_and_gradients(inputs, options):
    """y, and the gradients of all inputs for the gradient dy, which is one of them."""
    inputs = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    dy = inputs.pop("dy").detach()
    y = instance_norm_act(**inputs, **options)
    return y.detach(), *torch.autograd.grad(y, list(inputs.values()), dy)


def far_inputs(shape, dtype, offset):
    """x with this mean and a standard deviation of 1 that its dtype can tell apart."""
    n, c, h, w = shape
    inputs = {
        "x": offset + normals(*shape), "weight": 1 + normals(c, seed=1) / 4,
        "bias": normals(c, seed=2), "residual": normals(*shape, seed=3),
        "dy": normals(n, c, h + 2, w + 2, seed=4),
    }  # fmt: skip
    return {name: t.to(dtype) for name, t in inputs.items()}


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("over_batch", [False, True])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(8, 8), (33, 36)])
@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 1000), (torch.bfloat16, 1)])
def test_values_and_gradients(dtype, offset, size, format, over_batch, device):
    """Whole means and parts of them; no activation, whose corner magnifies rounding."""
    inputs = far_inputs((2, 4, *size), dtype, offset)
    inputs["x"] = inputs["x"].contiguous(memory_format=format)
    options = {"pad": 1, "over_batch": over_batch}
    with kernels(device):
        actual = results_and_gradients({n: t.to(device) for n, t in inputs.items()}, options)
    plain, modeled = plain_and_modeled(lambda: results_and_gradients(inputs, options))
    exact = results_and_gradients({n: t.double() for n, t in inputs.items()}, options)
    assert_accurate(actual, plain, exact, modeled)


@pytest.mark.parametrize("device", ["cpu", *KERNEL_DEVICES])
@pytest.mark.parametrize("over_batch", [False, True])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(16, 16), (48, 50)])
def test_a_large_mean_costs_the_variance_nothing(size, format, over_batch, device, request):
    """1000 standard deviations leave float32 four digits of each value, and all of the variance."""
    x = (1000 + normals(2, 4, *size)).contiguous(memory_format=format)
    launched = request.node.get_closest_marker("kernel") or device == "cuda"
    with kernels(device) if launched else contextlib.nullcontext():
        _, *got = instance_norm_act(x.to(device), over_batch=over_batch, return_stats=True)
    axes = (0, 2, 3) if over_batch else (2, 3)
    mean, var = (t.cpu().double() for t in got)
    torch.testing.assert_close(var, x.double().var(axes, correction=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(mean, x.double().mean(axes), rtol=2.4e-7, atol=0)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("pad", [0, 1])
def test_the_gradients_of_an_empty_batch_are_zero(pad, activation, create_graph, reference):
    leaves = [t.requires_grad_() for t in (normals(0, 5, 4, 4), normals(5), normals(5))]
    with cgkernels.reference() if reference else contextlib.nullcontext():
        y = instance_norm_act(*leaves, activation=activation, pad=pad, over_batch=True)
        gradients = torch.autograd.grad(y.sum(), leaves, create_graph=create_graph)
    assert_equal(gradients, tuple(torch.zeros_like(t) for t in leaves))


# What is refused ----------------------------------------------------------------------------------
X = normals(2, 3, 4, 5)
VECTOR, META = torch.ones(3), torch.ones(3, device="meta")
NAN, INF = float("nan"), float("inf")
OUT = torch.zeros_like(X)

WRONG = [
    (TypeError, ("x", "NoneType"), {"x": None}),
    (TypeError, ("x", "int64"), {"x": X.long()}),
    (ValueError, ("x", "(N, C, H, W)", "(3, 4, 5)"), {"x": X[0]}),
    (ValueError, ("x", "(N, C, H, W)", "(2, 0, 4, 5)"), {"x": X[:, :0]}),
    (ValueError, ("x", "(N, C, H, W)", "(2, 3, 0, 5)"), {"x": X[:, :, :0]}),
    (ValueError, ("x", "more than one value", "(2, 3, 1, 1)"), {"x": X[:, :, :1, :1]}),
    (
        ValueError,
        ("x", "more than one value", "(1, 3, 1, 1)"),
        {"x": X[:1, :, :1, :1], "over_batch": True},
    ),
    (ValueError, ("weight", "(3,)", "(4,)"), {"weight": torch.ones(4)}),
    (TypeError, ("weight", "bool"), {"weight": VECTOR.bool()}),
    (ValueError, ("weight", "cpu", "meta"), {"weight": META}),
    (ValueError, ("bias", "(3,)", "(1, 3)"), {"bias": VECTOR[None]}),
    (TypeError, ("bias", "float"), {"bias": 1.0}),
    (ValueError, ("bias", "cpu", "meta"), {"bias": META}),
    (ValueError, ("residual", "(2, 3, 4, 5)", "(1, 3, 4, 5)"), {"residual": X[:1]}),
    (TypeError, ("residual", "int64"), {"residual": X.long()}),
    (ValueError, ("residual", "cpu", "meta"), {"residual": X.to("meta")}),
    (ValueError, ("eps", "-1"), {"eps": -1.0}),
    (ValueError, ("eps", "nan"), {"eps": NAN}),
    (TypeError, ("eps", "True"), {"eps": True}),
    (ValueError, ("activation", "'gelu'"), {"activation": "gelu"}),
    (ValueError, ("slope", "inf"), {"slope": INF, "activation": "leaky_relu"}),
    (ValueError, ("slope", "nan"), {"slope": NAN, "activation": "leaky_relu"}),
    (TypeError, ("slope", "'0.2'"), {"slope": "0.2", "activation": "leaky_relu"}),
    (ValueError, ("slope", "leaky_relu", "0.1"), {"slope": 0.1}),
    (ValueError, ("slope", "leaky_relu", "0.1"), {"slope": 0.1, "activation": "relu"}),
    (TypeError, ("over_batch", "no"), {"over_batch": "no"}),
    (TypeError, ("return_stats", "1"), {"return_stats": 1}),
    (ValueError, ("pad", "-1"), {"pad": -1}),
    (ValueError, ("pad", "0 to 3", "got 4"), {"pad": 4}),
    (TypeError, ("pad", "1.0"), {"pad": 1.0}),
    (TypeError, ("pad", "True"), {"pad": True}),
]

WRONG_OUT = [
    (TypeError, ("out", "NoneType"), {"out": None}),
    (TypeError, ("out", "float32", "float16"), {"out": X.half()}),
    (ValueError, ("out", "(2, 3, 4, 5)", "(2, 4, 4, 5)"), {"out": torch.ones(2, 4, 4, 5)}),
    (ValueError, ("out", "(2, 3, 6, 7)", "(2, 3, 4, 5)"), {"pad": 1}),
    (ValueError, ("out", "cpu", "meta"), {"out": X.to("meta")}),
    (ValueError, ("out", "expanded"), {"out": torch.ones(2, 1, 4, 5).expand(2, 3, 4, 5)}),
    (ValueError, ("out", "written"), {"out": X.clone().requires_grad_()}),
    (TypeError, ("second", "float32", "float16"), {"second": X.half()}),
    (ValueError, ("second", "(2, 3, 4, 5)", "(3, 4, 5)"), {"second": X[0]}),
    (ValueError, ("second", "written"), {"second": X.clone().requires_grad_()}),
    (ValueError, ("second", "second_activation"), {"second_activation": "relu"}),
    (
        ValueError,
        ("second_activation", "'tanh'"),
        {"second": X.clone(), "second_activation": "tanh"},
    ),
    (ValueError, ("second", "memory with out"), {"out": OUT, "second": OUT}),
]


@pytest.mark.parametrize(("error", "words", "changed"), WRONG)
def test_wrong_arguments(error, words, changed):
    call = Sample("wrong", instance_norm_act, {"x": X})
    assert_refused(call.replace(**changed), error, *words)


@pytest.mark.parametrize(("error", "words", "changed"), [*WRONG[1:3], *WRONG_OUT])
def test_wrong_arguments_in_place(error, words, changed):
    call = Sample("wrong", instance_norm_act_, {"out": torch.zeros_like(X), "x": X})
    assert_refused(call.replace(**changed), error, *words)


# Kernels ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_activations_of_what_is_not_finite(activation, device):
    x = normals(2, 4, 3, 5, device=device)
    bias = torch.tensor([-torch.inf, torch.inf, torch.nan, 0], device=device)
    with kernels(device):
        out = instance_norm_act(x, bias=bias, activation=activation).cpu()
    expected = instance_norm_act(x.cpu(), bias=bias.cpu(), activation=activation)
    torch.testing.assert_close(out, expected, equal_nan=True)
    assert (out[:, 0] == (0 if activation == "relu" else -torch.inf)).all()
    assert (out[:, 1] == torch.inf).all() and out[:, 2].isnan().all()


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("over_batch", [False, True])
@pytest.mark.parametrize("size", [(1, 2), (5, 13), (32, 32), (25, 41), (47, 48)])
def test_sizes_around_a_tile_and_a_part(size, over_batch, format, device):
    """Channels around a tile, too; a last part of one pixel (25 x 41 = 4 x 256 + 1)."""
    results = []
    for channels in (1, 31, 33) if format == torch.channels_last else (1, 5):
        x = 1 + normals(2 if size[0] > 1 else 80, channels, *size)
        x = x.contiguous(memory_format=format)
        options = {"activation": "leaky_relu", "over_batch": over_batch}
        with kernels(device):
            actual = instance_norm_act(x.to(device), **options)
        plain, modeled = plain_and_modeled(
            lambda x=x, options=options: instance_norm_act(x, **options)
        )
        results.append([actual, plain, instance_norm_act(x.double(), **options), modeled])
    assert_within_budget(*zip(*results, strict=True))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(6, 7), (33, 36)])
def test_a_sample_has_one_result(size, format, device):
    """Alone, in a batch, permuted, in any order of the programs; its gradient, too."""
    x, dy = (
        normals(3, 4, *size, device=device, seed=i).contiguous(memory_format=format)
        for i in range(2)
    )

    def run(rows, order_seed=0):
        part = x[rows].contiguous(memory_format=format).requires_grad_()
        with kernels(device, order_seed=order_seed):
            y = instance_norm_act(part, activation="relu")
            return y.detach(), *torch.autograd.grad(y, part, dy[rows])

    whole = run([0, 1, 2])
    for rows in ([1], [2, 1, 0]):
        assert_equal(run(rows, order_seed=1), tuple(out[rows] for out in whole))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernels_write_only_the_slice(device):
    buffer = torch.full((2, 9, 6, 7), 7.0, device=device).contiguous(**LAST)
    x = normals(2, 4, 6, 7, device=device)
    with kernels(device):
        instance_norm_act_(buffer[:, 3:7], x, activation="relu")
        expected = instance_norm_act(x, activation="relu")
    assert_equal(buffer[:, 3:7], expected)
    rest = memory_of(buffer).view(2, 6, 7, 9)
    assert (rest[..., :3] == 7).all() and (rest[..., 7:] == 7).all()


def test_the_split_does_not_depend_on_the_batch():
    for pixels in (1, 1024, 1025, 256 * 256, 256 * 256 + 1, 2**24):
        config = _launch_config(pixels, 64, True)
        assert config["split"] % config["BLOCK_P"] == 0
        assert -(-pixels // config["split"]) <= MERGED_PARTS
        assert config["WHOLE"] == (pixels <= 1024)
    assert set(LAUNCHERS) <= set(OPS)
