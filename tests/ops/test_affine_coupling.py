"""affine_coupling: masks by hand, the inverse, determinants by autograd, and the kernels' sums."""

from collections.abc import Iterator

import pytest
import torch

from cgkernels import affine_coupling
from cgkernels.library import OPS
from cgkernels.ops import affine_coupling as op
from tests.support import (
    KERNEL_DEVICES,
    OpCall,
    Sample,
    assert_equal,
    assert_kernels_are_accurate,
    assert_refused,
    kernel_results,
    kernels,
    normals,
)

LAUNCHERS = {"affine_coupling_fwd": op._launch_fwd, "affine_coupling_bwd": op._launch_bwd}

SHAPE = (3, 4, 5, 9)


def params_for(y, mask, *, additive=False, seed=1):
    start, stop = op._channel_range(y.shape[1], mask)
    shape = (y.shape[0], (stop - start) * (1 if additive else 2), *y.shape[2:])
    # Not around 0: of a sum that cancels, a few values say nothing of its accuracy.
    return normals(*shape, dtype=y.dtype, device=y.device, seed=seed) + 0.5


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def sample(label, y, mask, params=None, **options):
        if params is None:
            params = params_for(y, mask, additive=options.get("additive", False))
        inputs = {"y": y, "params": params, "mask": mask, **options}
        return Sample(label, affine_coupling, inputs, ("y", "params"), ("y", "params"))

    def data(*shape, seed=0):
        return normals(*shape, dtype=dtype, device=device, seed=seed)

    def last(t):
        return t.contiguous(memory_format=torch.channels_last)

    y = data(*SHAPE)
    yield sample("first", y, "first", limit=1.5)
    yield sample("last, inverse", y, "last", inverse=True)
    yield sample("even", y, "even")
    yield sample("odd, inverse, even height", data(3, 2, 6, 7), "odd", inverse=True)
    yield sample("additive, inverse", y, "odd", additive=True, inverse=True)
    params = params_for(y, "first")
    yield sample("channels_last", last(y), "first", last(params))
    yield sample("odd, channels_last, inverse", last(y), "odd", inverse=True)
    yield sample("params in channels_last", y, "first", last(params), inverse=True)
    views = data(3, 7, 5, 9)[:, 1:4], (data(1, 4, 9, 5) + 0.5).transpose(2, 3).expand(SHAPE)
    yield sample("views, three channels", views[0], "last", views[1])
    yield sample("vectors", data(9, 3), "last")
    yield sample("empty batch", y[:0], "even")


# The definition -----------------------------------------------------------------------------------
def test_masks_by_hand():
    y = torch.arange(1.0, 9.0).view(1, 2, 2, 2)
    ones = torch.ones(1, 2, 2, 2)
    moved = {
        "first": [[[11, 12], [13, 14]], [[5, 6], [7, 8]]],
        "last": [[[1, 2], [3, 4]], [[15, 16], [17, 18]]],
        "even": [[[11, 2], [3, 14]], [[15, 6], [7, 18]]],
        "odd": [[[1, 12], [13, 4]], [[5, 16], [17, 8]]],
    }
    for mask in op.MASKS:
        shift = 10 * (ones[:, :1] if mask in ("first", "last") else ones)
        out, logdet = affine_coupling(y, shift, mask=mask, additive=True)
        assert out[0].tolist() == moved[mask] and logdet.tolist() == [0]
    raw = torch.full((1, 1, 2, 2), 0.5)
    out, logdet = affine_coupling(y, torch.cat([raw, 10 * raw], 1), mask="last", limit=3.0)
    log_scale = 3 * torch.tanh(torch.tensor(0.5 / 3))
    torch.testing.assert_close(out[:, 1], y[:, 1] * log_scale.exp() + 5)
    assert_equal(out[:, 0], y[:, 0])
    torch.testing.assert_close(logdet, 4 * log_scale[None])


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("mask", op.MASKS)
def test_the_inverse_gives_y_back(mask, additive):
    y = normals(4, 3, 7, 6)
    params = 3 * params_for(y, mask, additive=additive)
    out, logdet = affine_coupling(y, params, mask=mask, additive=additive)
    back, back_logdet = affine_coupling(out, params, mask=mask, additive=additive, inverse=True)
    assert (back - y).abs().max() < 1e-5 and (out - y).abs().max() > 1
    assert_equal(back_logdet, -logdet)
    assert logdet.any() != additive


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("mask", op.MASKS)
def test_the_determinant_is_that_of_the_jacobian(mask, inverse):
    y = normals(1, 3, 2, 3, dtype=torch.float64)
    params = params_for(y, mask)
    run = lambda y: affine_coupling(y, params, mask=mask, inverse=inverse)  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(lambda y: run(y)[0], y).view(18, 18)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1][None], run(y)[1])


def test_the_scale_is_bounded():
    y, raw = torch.ones(1, 2), torch.tensor([[1e9, 0.0], [-1e9, 0.0]])
    for limit, sign in ((0.5, 0), (80.0, 1)):
        out, logdet = affine_coupling(y, raw[sign, None], mask="last", limit=limit)
        bound = torch.tensor([-limit if sign else limit])
        torch.testing.assert_close(logdet, bound)
        torch.testing.assert_close(out[:, 1], bound.exp())


def spoiled_results(device, inverse):
    """Results and gradients with params as they are, and with NaN where they are not used."""
    y = normals(2, 2, 4, 5, device=device)
    params = params_for(y, "odd")
    spoiled = params.clone()
    spoiled[:, :, (torch.arange(4)[:, None] + torch.arange(5)) % 2 == 0] = float("nan")
    for given in (params, spoiled):
        given.requires_grad_()
        out, logdet = affine_coupling(y, given, mask="odd", inverse=inverse)
        (gradient,) = torch.autograd.grad(out.sum() + logdet.sum(), given)
        yield out.detach(), logdet.detach(), gradient


@pytest.mark.parametrize("inverse", [False, True])
def test_params_that_a_checkerboard_does_not_touch_may_be_anything(inverse):
    clean, spoiled = spoiled_results("cpu", inverse)
    assert_equal(spoiled, clean)
    assert not clean[2][:, :, 0, 0].any()


# What is refused ----------------------------------------------------------------------------------
Y, PARAMS = normals(3, 4, 5, 6), normals(3, 4, 5, 6, seed=1)

WRONG = [
    (ValueError, ("mask", "first, last, even, odd", "'left'"), {"mask": "left"}),
    (ValueError, ("limit", "above 0", "0.0"), {"limit": 0.0}),
    (ValueError, ("limit", "at most 80", "81"), {"limit": 81}),
    (TypeError, ("limit", "number", "None"), {"limit": None}),
    (TypeError, ("additive", "1"), {"additive": 1}),
    (TypeError, ("inverse", "None"), {"inverse": None}),
    (TypeError, ("y", "int64"), {"y": Y.long()}),
    (TypeError, ("y", "list"), {"y": [1.0]}),
    (TypeError, ("params", "NoneType"), {"params": None}),
    (ValueError, ("y", "at least 2", "(3, 1, 5, 6)"), {"y": Y[:, :1]}),
    (ValueError, ("y", "(B, C, ...)", "(3,)"), {"y": Y[:, 0, 0, 0]}),
    (ValueError, ("y", "(B, C, H, W)", "(3, 4, 5)"), {"y": Y[..., 0], "mask": "odd"}),
    (ValueError, ("params", "(3, 8, 5, 6)", "(3, 4, 5, 6)"), {"mask": "even"}),
    (ValueError, ("params", "(3, 2, 5, 6)", "(3, 4, 5, 6)"), {"additive": True}),
    (ValueError, ("params", "(3, 4, 5, 6)", "(2, 4, 5, 6)"), {"params": PARAMS[:2]}),
    (ValueError, ("params", "cpu", "meta"), {"params": PARAMS.to("meta")}),
]


@pytest.mark.parametrize(("error", "words", "changed"), WRONG)
def test_wrong_arguments(error, words, changed):
    call = Sample("wrong", affine_coupling, {"y": Y, "params": PARAMS, "mask": "first"})
    assert_refused(call.replace(**changed), error, *words)


# Kernels ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("pixels", [1, 255, 512, 2048, 2049, 4 * 1024 + 5])
def test_sizes_around_a_block_and_a_program(pixels, device):
    """Of 2 channels: the border of the mask, of a block and of a program in all positions."""
    y = normals(2, 2, pixels, device=device)
    sample = Sample("", affine_coupling, {"y": y, "params": params_for(y, "last"), "mask": "last"})
    assert_kernels_are_accurate(sample, device)
    assert_kernels_are_accurate(sample.replace(mask="first", inverse=True), device)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("mask", ["last", "odd"])
def test_a_sum_of_many_programs_does_not_depend_on_their_order(mask, device):
    """Nor on the batch: the last program of a row adds up the sums of all, in their order."""
    y = normals(3, 2, 64, 65, device=device)
    params = params_for(y, mask)
    results = {}
    for rows in ([0, 1, 2], [2, 0], [1]):
        with kernels(device, order_seed=len(rows)):
            out, logdet = affine_coupling(y[rows], params[rows], mask=mask)
        results[len(rows)] = out
        for row, value, image in zip(rows, logdet, out, strict=True):
            assert_equal((value, image), results.setdefault(("row", row), (value, image)))
    exact = op.affine_coupling_ref(y.cpu().double(), params.cpu().double(), mask, 2.0, False, False)
    logdets = torch.stack([results["row", row][0] for row in range(3)]).cpu().double()
    assert (logdets - exact[1]).abs().max() < 1e-6 * exact[1].abs().max() + 1e-4


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)]
)
def test_dtypes_may_differ(dtypes, device):
    """As under autocast: each tensor keeps its own, and so does each gradient."""
    y = normals(2, 4, 6, 6, dtype=dtypes[0], device=device)
    params = normals(2, 8, 6, 6, dtype=dtypes[1], device=device, seed=1)
    call = OpCall(OPS["affine_coupling_fwd"], (y, params, "even", 2.0, False, False))
    out, logdet = kernel_results(call)
    assert (out.dtype, logdet.dtype) == (dtypes[0], torch.float32)
    wide = op.affine_coupling_ref(y.float(), params.float(), "even", 2.0, False, False)
    torch.testing.assert_close(out, wide[0].to(out))
    gradients = (out, logdet, y, params, "even", 2.0, False, False)
    dy, dparams = kernel_results(OpCall(OPS["affine_coupling_bwd"], gradients))
    assert (dy.dtype, dparams.dtype) == dtypes
    for got, true in zip((dy, dparams), op.affine_coupling_bwd_ref(*gradients), strict=True):
        torch.testing.assert_close(got, true)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("inverse", [False, True])
def test_kernels_do_not_look_outside_a_checkerboard(inverse, device):
    with kernels(device):
        clean, spoiled = spoiled_results(device, inverse)
    assert_equal(spoiled, clean)


@pytest.mark.parametrize("dense", [True, False])
def test_few_programs_a_row(dense):
    for numel in (1, 784, 4096, 4097, 2**20, 2**24, 2**31):
        config = op._launch_config(numel, dense)
        assert config["SPLIT"] % config["BLOCK"] == 0
        assert -(-numel // config["SPLIT"]) <= 1024
    assert op._launch_config(2048, dense)["SPLIT"] >= 2048
