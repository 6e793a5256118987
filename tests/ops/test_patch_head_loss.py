"""patch_head_loss: the last layer of a patch discriminator, its loss, and their derivatives."""

import math
from collections.abc import Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import cgkernels
from cgkernels import patch_head_loss, patch_loss
from cgkernels.ops import patch_head_loss as op
from cgkernels.ops.patch_head_loss import LOSSES, PATCH_TARGETS
from cgkernels.testing import assert_within_budget, plain_and_modeled, values
from tests.support import (
    FLOATS,
    KERNEL_DEVICES,
    Sample,
    assert_accurate,
    assert_equal,
    assert_refused,
    kernels,
    normals,
)

LAUNCHERS = {"patch_head_loss": op._launch}

ALL = list(product(LOSSES, PATCH_TARGETS))


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    """Of multiples of powers of two, whose logits are exact: losses are too few for statistics.

    The bias keeps the logits off the kinks of the hinge.
    """

    def sample(label, x, *, kernel=4, bias=True, loss="vanilla", target="real", **options):
        weight = normals(1, x.shape[1], kernel, kernel, dtype=dtype, device=device, seed=1)
        inputs = {
            "x": x,
            "weight": weight.mul(16 / (kernel * x.shape[1] ** 0.5)).round() / 16,
            "loss": loss, "target": target, **options,
        }  # fmt: skip
        if bias:
            inputs["bias"] = torch.full((1,), 5 / 64, dtype=dtype, device=device)
        floats = ("x", "weight", *(["bias"] if bias else []))
        return Sample(label, patch_head_loss, inputs, floats, ("x",))

    def data(*shape):
        return normals(*shape, dtype=dtype, device=device).mul(2).round() / 2

    x = data(3, 5, 6, 7)
    for loss, target in (("lsgan", "real"), ("nonsaturating", "fake"), ("vanilla", "generator"),
                         ("hinge", "real"), ("hinge", "fake"), ("hinge", "generator"),
                         ("wgan", "fake")):  # fmt: skip
        yield sample(f"{loss} {target}", x, loss=loss, target=target)
    yield sample("patch map", x, loss=None, target=None)
    last = data(3, 32, 9, 8).contiguous(memory_format=torch.channels_last)
    yield sample("channels_last", last, loss="lsgan", target="fake")
    yield sample("3 x 3, no bias", data(2, 33, 9, 8), kernel=3, bias=False, loss="lsgan")
    yield sample("1 x 1", data(2, 5, 9, 8), kernel=1, padding=0)
    yield sample("1 x 1, patch map", data(2, 5, 9, 8), kernel=1, padding=0, loss=None, target=None)
    yield sample("no padding", x, padding=0, loss="lsgan")
    yield sample("wide padding", x, padding=3, loss="lsgan")
    yield sample("slice", data(3, 9, 6, 7)[:, 2:7, :, ::2], loss="lsgan")
    yield sample("expanded", data(1, 5, 7, 6).transpose(2, 3).expand(3, 5, 6, 7))
    yield sample("one patch", data(2, 3, 2, 2), target="generator")
    yield sample("empty batch", x[:0])
    yield sample("empty batch, patch map", x[:0], loss=None, target=None)


# The definition -----------------------------------------------------------------------------------
LOGITS = torch.tensor([[2.0, -1.0], [0.5, 0.0]])

# log(1 + e^z) at z = -2, 1, -0.5, 0 (for -d) and z = 2, -1, 0.5, 0 (for d).
SOFTPLUS_MINUS = [[0.1269280110, 1.3132616875], [0.4740769842, 0.6931471806]]
SOFTPLUS_PLUS = [[2.1269280110, 0.3132616875], [0.9740769842, 0.6931471806]]
MINUS, PLUS = [[-2.0, 1.0], [-0.5, 0.0]], [[2.0, -1.0], [0.5, 0.0]]

BY_HAND = {
    ("lsgan", "real"): [[1.0, 4.0], [0.25, 1.0]],  # (2-1)^2, (-1-1)^2, (0.5-1)^2, (0-1)^2
    ("lsgan", "fake"): [[4.0, 1.0], [0.25, 0.0]],  # 2^2, (-1)^2, 0.5^2, 0^2
    ("lsgan", "generator"): [[1.0, 4.0], [0.25, 1.0]],  # as real
    ("vanilla", "real"): SOFTPLUS_MINUS,
    ("vanilla", "fake"): SOFTPLUS_PLUS,
    ("vanilla", "generator"): SOFTPLUS_MINUS,
    ("nonsaturating", "real"): SOFTPLUS_MINUS,
    ("nonsaturating", "fake"): SOFTPLUS_PLUS,
    ("nonsaturating", "generator"): SOFTPLUS_MINUS,
    ("hinge", "real"): [[0.0, 2.0], [0.5, 1.0]],  # relu of 1-2, 1+1, 1-0.5, 1-0
    ("hinge", "fake"): [[3.0, 0.0], [1.5, 1.0]],  # relu of 1+2, 1-1, 1+0.5, 1+0
    ("hinge", "generator"): MINUS,
    ("wgan", "real"): MINUS,
    ("wgan", "fake"): PLUS,
    ("wgan", "generator"): MINUS,
}

# The sums of the four, divided by four.
MEANS = {
    ("lsgan", "real"): 6.25 / 4,
    ("lsgan", "fake"): 5.25 / 4,
    ("lsgan", "generator"): 6.25 / 4,
    ("vanilla", "real"): 2.6074138633 / 4,
    ("vanilla", "fake"): 4.1074138633 / 4,
    ("vanilla", "generator"): 2.6074138633 / 4,
    ("nonsaturating", "real"): 2.6074138633 / 4,
    ("nonsaturating", "fake"): 4.1074138633 / 4,
    ("nonsaturating", "generator"): 2.6074138633 / 4,
    ("hinge", "real"): 3.5 / 4,
    ("hinge", "fake"): 5.5 / 4,
    ("hinge", "generator"): -1.5 / 4,
    ("wgan", "real"): -1.5 / 4,
    ("wgan", "fake"): 1.5 / 4,
    ("wgan", "generator"): -1.5 / 4,
}


def identity_layer(dtype=torch.float32, device="cpu"):
    """An image whose logits are LOGITS: the first channel counts once, the second not at all."""
    x = torch.stack([LOGITS, torch.full((2, 2), 9.0)])[None]
    weight = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    return {"x": x.to(device, dtype), "weight": weight.to(device, dtype), "padding": 0}


@pytest.mark.parametrize(("loss", "target"), ALL)
def test_losses_are_those_computed_by_hand(loss, target):
    expected = torch.tensor(BY_HAND[loss, target])
    torch.testing.assert_close(patch_loss(LOGITS, loss, target), expected, rtol=1e-6, atol=1e-7)
    mean = patch_head_loss(**identity_layer(), loss=loss, target=target)
    torch.testing.assert_close(mean, torch.tensor([MEANS[loss, target]]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize(("loss", "target"), ALL)
def test_the_kernel_computes_what_is_computed_by_hand(loss, target, device):
    with kernels(device):
        mean = patch_head_loss(**identity_layer(device=device), loss=loss, target=target)
    expected = torch.tensor([MEANS[loss, target]])
    torch.testing.assert_close(mean.cpu(), expected, rtol=1e-6, atol=1e-7)


def test_the_layer_is_the_convolution():
    x, weight, bias = normals(2, 3, 7, 9), normals(1, 3, 4, 4, seed=1), normals(1, seed=2)
    logits = F.conv2d(x, weight, bias, padding=1)
    ours = patch_head_loss(x, weight, bias, loss=None, target=None)
    torch.testing.assert_close(ours, logits)
    loss = patch_head_loss(x, weight, bias, loss="hinge", target="real")
    torch.testing.assert_close(loss, F.relu(1 - logits).mean((1, 2, 3)))
    cross = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction="none")
    torch.testing.assert_close(patch_loss(logits, "vanilla", "real"), cross)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_dtypes(dtype):
    given = {"x": normals(2, 3, 5, 5, dtype=dtype), "weight": normals(1, 3, 4, 4, dtype=dtype)}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert patch_head_loss(**given, loss="lsgan", target="real").dtype == wide
    assert patch_head_loss(**given, loss=None, target=None).dtype == dtype
    assert patch_loss(given["x"], "lsgan", "real").dtype == wide


@pytest.mark.parametrize(("loss", "target"), ALL)
def test_derivatives_are_those_of_the_losses(loss, target):
    """The formulas for the first and second derivatives against autograd's."""
    logits = (3 * normals(4, 1, 5, 5)).double().requires_grad_()
    total = patch_loss(logits, loss, target).mean((1, 2, 3)).sum()
    (by_autograd,) = torch.autograd.grad(total, logits, create_graph=True)
    torch.testing.assert_close(op._dlogits_ref(logits, loss, target), by_autograd)


@pytest.mark.parametrize("target", PATCH_TARGETS)
def test_large_logits_are_no_problem(target):
    logits = torch.tensor([-1e4, -90.0, 90.0, 1e4])
    loss = patch_loss(logits, "vanilla", target)
    expected = F.relu(logits if target == "fake" else -logits)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-38)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("loss", "target"), [*ALL, (None, None)])
def test_values_and_gradients_are_accurate(loss, target, dtype):
    """Against float64 and plain PyTorch in the same dtype, of many images and a real width."""
    shapes = {"x": (64, 40, 8, 9), "weight": (1, 40, 4, 4), "bias": (1,)}
    inputs = {name: normals(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    inputs["weight"] /= math.sqrt(640)
    inputs = {name: t.to(dtype) for name, t in inputs.items()}

    def run(inputs):
        leaves = [t.clone().requires_grad_() for t in inputs.values()]
        result = patch_head_loss(*leaves, loss=loss, target=target)
        seed = normals(*result.shape, seed=5).to(result)
        return result.detach(), *torch.autograd.grad(result, leaves, seed)

    actual = run(inputs)
    with cgkernels.reference():
        plain, modeled = plain_and_modeled(lambda: run(inputs))
        exact = run({name: t.double() for name, t in inputs.items()})
    for got, same, true, model in zip(actual, plain, exact, modeled, strict=True):
        if true.numel() >= 256:
            assert_within_budget(got, same, true, model)
        else:
            assert_accurate([got], [same], [true], [model])


@pytest.mark.parametrize(
    ("loss", "target"), [("lsgan", "real"), ("vanilla", "fake"), ("hinge", "real"), (None, None)]
)
def test_gradient_penalties(loss, target):
    """R1 and its like: the norm of the gradient in x, differentiated in the weights."""
    inputs = (normals(3, 5, 8, 9), normals(1, 5, 4, 4, seed=1) / 9, normals(1, seed=2))

    def run():
        leaves = [t.clone().requires_grad_() for t in inputs]
        result = patch_head_loss(*leaves, loss=loss, target=target)
        (dx,) = torch.autograd.grad(result.sum(), leaves[:1], create_graph=True)
        penalty = dx.square().sum((1, 2, 3)).mean()
        return torch.autograd.grad(penalty, leaves, allow_unused=True, materialize_grads=True)

    ours = run()
    with cgkernels.reference():
        torch.testing.assert_close(ours, run())
    assert ours[1].abs().max() > 0


def test_only_what_is_asked_for_is_computed():
    x, weight = normals(2, 3, 5, 5), normals(1, 3, 4, 4, seed=1)
    args = (torch.ones(2), None, x, weight, None, "lsgan", "real", 1)
    for wanted in product((True, False), (True, False), (False,)):
        found = op.patch_head_loss_bwd_ref(wanted, *args)
        assert tuple(g is not None for g in found) == wanted


@pytest.mark.parametrize("kernel", [1, 3, 4])
@pytest.mark.parametrize("channels", [1, 5, 16, 33, 64])
def test_an_image_has_one_loss(channels, kernel):
    """On the CPU, whatever its place in memory."""
    weight = normals(1, channels, kernel, kernel, seed=1)
    for height, width in ((4, 3), (7, 5), (12, 11), (31, 31)):
        x = normals(4, channels, height, width)
        options = {"weight": weight, "loss": None, "target": None, "padding": kernel // 3}
        whole = patch_head_loss(x, **options)
        for rows in ([0], [1], [3], [2, 1], [3, 2, 1, 0]):
            assert_equal(patch_head_loss(x[rows], **options), whole[rows])
            assert_equal(patch_head_loss(x[rows[0] : rows[0] + 1], **options), whole[rows[:1]])


# What is refused ----------------------------------------------------------------------------------
X, W = normals(2, 3, 5, 6), normals(1, 3, 4, 4)

WRONG = [
    (TypeError, ("x", "int64"), {"x": X.long()}),
    (TypeError, ("x", "list"), {"x": [1.0]}),
    (ValueError, ("x", "(N, C, H, W)", "(3, 5, 6)"), {"x": X[0]}),
    (ValueError, ("x", "(2, 0, 5, 6)"), {"x": X[:, :0], "weight": W[:, :0]}),
    (ValueError, ("x", "at least 2", "(2, 3, 1, 6)"), {"x": X[:, :, :1]}),
    (ValueError, ("x", "at least 4", "(2, 3, 5, 3)"), {"x": X[..., :3], "padding": 0}),
    (TypeError, ("weight", "NoneType"), {"weight": None}),
    (TypeError, ("weight", "float16", "float32"), {"weight": W.half()}),
    (ValueError, ("weight", "(1, 3, k, k)", "(2, 3, 4, 4)"), {"weight": W.expand(2, 3, 4, 4)}),
    (ValueError, ("weight", "(1, 3, k, k)", "(1, 2, 4, 4)"), {"weight": W[:, :2]}),
    (ValueError, ("weight", "k = 1, 3 or 4", "(1, 3, 2, 2)"), {"weight": W[..., :2, :2]}),
    (ValueError, ("weight", "(1, 3, 3, 4)"), {"weight": W[:, :, :3]}),
    (ValueError, ("weight", "()"), {"weight": torch.ones(())}),
    (ValueError, ("weight", "cpu", "meta"), {"weight": W.to("meta")}),
    (TypeError, ("bias", "float"), {"bias": 1.0}),
    (TypeError, ("bias", "bfloat16", "float32"), {"bias": torch.ones(1).bfloat16()}),
    (ValueError, ("bias", "(1,)", "(3,)"), {"bias": torch.ones(3)}),
    (ValueError, ("bias", "cpu", "meta"), {"bias": torch.ones(1, device="meta")}),
    (ValueError, ("padding", "0 to 3", "4"), {"padding": 4}),
    (ValueError, ("padding", "0 to 0", "1"), {"padding": 1, "weight": W[..., :1, :1]}),
    (ValueError, ("padding", "-1"), {"padding": -1}),
    (TypeError, ("padding", "True"), {"padding": True}),
    (TypeError, ("padding", "(1, 1)"), {"padding": (1, 1)}),
    (ValueError, ("loss", "lsgan", "'mse'"), {"loss": "mse"}),
    (ValueError, ("target", "real, fake, generator", "'true'"), {"target": "true"}),
    (ValueError, ("target", "None"), {"target": None}),
    (ValueError, ("target", "without a loss", "'real'"), {"loss": None}),
]


@pytest.mark.parametrize(("error", "words", "changed"), WRONG)
def test_wrong_arguments(error, words, changed):
    inputs = {"x": X, "weight": W, "bias": None, "loss": "lsgan", "target": "real"}
    call = Sample("wrong", patch_head_loss, inputs)
    assert_refused(call.replace(**changed), error, *words)


@pytest.mark.parametrize(
    ("error", "words", "changed"),
    [
        (TypeError, ("logits", "float"), {"logits": 1.0}),
        (ValueError, ("loss", "None"), {"loss": None}),
        (ValueError, ("target", "'both'"), {"target": "both"}),
    ],
)
def test_wrong_arguments_of_patch_loss(error, words, changed):
    inputs = {"logits": LOGITS, "loss": "lsgan", "target": "real"}
    assert_refused(Sample("wrong", patch_loss, inputs).replace(**changed), error, *words)


# Kernels ------------------------------------------------------------------------------------------
def results_and_gradients(x, weight, bias, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    result = patch_head_loss(*leaves, **options)
    seed = normals(*result.shape, seed=5).to(result)
    return result.detach(), *torch.autograd.grad(result, leaves, seed)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("channels", "height", "width", "kernel"),
    [(1, 1, 1, 1), (31, 7, 9, 3), (32, 8, 8, 4), (65, 5, 13, 4), (129, 4, 16, 3), (3, 34, 36, 4)],
)
def test_sizes_around_a_tile(channels, height, width, kernel, dtype, device):
    """Channels and pixels below, at and above a block; more patches than a block in the last."""
    inputs = [
        normals(2, channels, height, width), normals(1, channels, kernel, kernel, seed=1),
        normals(1, seed=2),
    ]  # fmt: skip
    inputs[1] /= kernel * math.sqrt(channels)
    inputs = [t.to(dtype) for t in inputs]
    for loss, target in (("vanilla", "fake"), (None, None)):
        options = {"loss": loss, "target": target, "padding": min(1, kernel - 1)}
        with kernels(device):
            actual = results_and_gradients(*(t.to(device) for t in inputs), **options)
        plain, modeled = plain_and_modeled(
            lambda options=options: results_and_gradients(*inputs, **options)
        )
        exact = results_and_gradients(*(t.double() for t in inputs), **options)
        assert_accurate(actual[:1], plain[:1], exact[:1], modeled[:1])
        if device == "cpu":
            assert_accurate(actual[1:], plain[1:], exact[1:], modeled[1:])


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("kind", ["normal", "small", "large", "integers"])
def test_kinds_of_values(kind, device):
    x = values((2, 20, 6, 20), seed=1)[kind]
    weight = normals(1, 20, 4, 4) / 16
    if kind == "integers":
        weight = weight.sign()
    for loss, target in (("hinge", "real"), ("vanilla", "real"), (None, None)):
        options = {"loss": loss, "target": target}
        with kernels(device):
            actual = patch_head_loss(x.to(device), weight.to(device), **options)
        with cgkernels.reference():
            plain, modeled = plain_and_modeled(
                lambda options=options: patch_head_loss(x, weight, **options)
            )
            exact = patch_head_loss(x.double(), weight.double(), **options)
        assert_accurate([actual], [plain], [exact], [modeled])


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_the_softplus_of_the_kernel_is_precise(device):
    """Losses of a discriminator that is sure are small, and no less precise."""
    logits = torch.linspace(-30, 30, 601)
    given = {"x": logits.view(-1, 1, 1, 1), "weight": torch.ones(1, 1, 1, 1)}
    given = {name: t.to(device) for name, t in given.items()}
    with kernels(device):
        loss = patch_head_loss(**given, padding=0, loss="vanilla", target="fake")
    exact = torch.log1p(logits.double().exp())
    # What the argument of an exponential function is rounded by grows with it.
    bound = 4 * torch.finfo(torch.float32).eps * exact * (1 + logits.double().abs())
    assert ((loss.cpu().double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_image_of_the_kernel_has_one_loss(dtype, device):
    """Alone, in a batch, permuted, in any order of the programs; and one gradient."""
    x = normals(4, 20, 13, 12, dtype=dtype, device=device)
    weight = normals(1, 20, 4, 4, dtype=dtype, device=device, seed=1) / 16
    for loss, target in (("vanilla", "fake"), (None, None)):

        def run(rows, order_seed=0, loss=loss, target=target):
            with kernels(device, order_seed=order_seed):
                return op._launch(x[rows], weight, None, loss, target, 1)

        whole = run([0, 1, 2, 3])
        for rows in ([2], [3, 2, 1, 0]):
            found = run(rows, order_seed=1)
            assert_equal(found, tuple(out[rows] if out.numel() else out for out in whole))


def test_autocast_does_not_reach_into_the_op():
    x, weight = normals(2, 20, 9, 9, dtype=torch.bfloat16), normals(1, 20, 4, 4, seed=1) / 16
    weight = weight.bfloat16()
    for loss, target in (("lsgan", "real"), (None, None)):
        found = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                found.append(patch_head_loss(x, weight, loss=loss, target=target))
        assert_equal(found[1], found[0])
        assert found[1].dtype == (torch.bfloat16 if loss is None else torch.float32)
