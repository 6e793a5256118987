"""guided_step and guided_step_: the affine step, its gradients, its noise, what it refuses."""

import math
from collections.abc import Iterator

import pytest
import torch

from cgkernels import guided_step, guided_step_
from cgkernels.library import OPS
from cgkernels.ops.guided_step import TABLE_COLUMNS, launch
from cgkernels.random import normal
from tests.support import (
    FLOATS,
    KERNEL_DEVICES,
    OpCall,
    Sample,
    assert_equal,
    assert_kernels_are_accurate,
    assert_refused,
    kernel_results,
    kernels,
    normal_of,
    normals,
)

LAUNCHERS = {
    "guided_step_fwd": launch._launch_fwd,
    "guided_step_bwd": launch._launch_bwd,
    "guided_step_": launch._launch_inplace,
}

SHAPE = (3, 2, 5, 9)


def make_table(steps=4, *, dtype=torch.float32, device="cpu", noise=False):
    """Distinct coefficients in every place; no clipping in row 0, and in the others to [-1, 1]."""
    table = 0.5 * normals(steps, 12, dtype=torch.float64, seed=99)
    table[:, 7] = torch.linspace(0.3, 0.6, steps) if noise else 0
    table[:, 8:10] = torch.tensor([-1.0, 1.0])
    table[0, 8:10] = torch.tensor([-torch.inf, torch.inf])
    table[:, 10:] = torch.tensor([-4.0, -1.0])
    return table.to(device, torch.float64 if dtype == torch.float64 else torch.float32)


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def make(*names, shape=SHAPE, dtype=dtype, **format):
        data = (normals(*shape, dtype=dtype, device=device, seed=i) for i in range(len(names)))
        return {name: t.contiguous(**format) for name, t in zip(names, data, strict=True)}

    def sample(label, fn=guided_step, per_row=(), mutates=(), noise=False, **inputs):
        wanted = () if mutates else ("x", "cond", "uncond", "h1", "h2")
        events = ("x", "cond", "uncond", "log_variance", "h1", "h2", "twin")
        return Sample(
            label,
            fn,
            {"table": make_table(dtype=dtype, device=device, noise=noise), "step": 1, **inputs},
            tuple(name for name in wanted if name in inputs),
            (*(name for name in events if name in inputs), *per_row),
            mutates,
        )

    integers = torch.tensor([2, 0, 3], device=device)
    index = torch.tensor([5, 2**40 + 1, 7], device=device)
    seed = torch.tensor(11, device=device)
    scale = torch.tensor([1.5, -0.5, 3.0], device=device)
    last = {"memory_format": torch.channels_last}

    yield sample("plain", **make("x", "cond"))
    yield sample("guided", **make("x", "cond", "uncond"), scale=3.0, return_x0=True)
    doubled = {**make("x"), **make("cond", shape=(6, *SHAPE[1:]))}
    yield sample("doubled", **doubled, step=integers, scale=scale, per_row=("step", "scale"))
    noisy = {"noise": True, "seed": seed, "index": index, "per_row": ("index",)}
    yield sample("noise", **make("x", "cond", "uncond"), scale=scale[0], **noisy)
    yield sample("learned variance", **make("x", "cond", "log_variance"), **noisy, return_x0=True)
    yield sample("history", **make("x", "cond", "h1", "h2"), step=integers[1], return_x0=True)
    everything = make("x", "cond", "uncond", "log_variance", "h1", "h2", **last)
    yield sample("channels_last", **everything, **noisy, scale=1.5, return_x0=True)
    wide = normals(3, 4, 5, 9, dtype=dtype, device=device)
    views = {
        "x": wide[:, 1:3],
        "cond": wide.transpose(2, 3).contiguous().transpose(2, 3)[:, :2],
        "uncond": wide[:1, 2:].expand(SHAPE),
        "h1": wide[:, ::2, :, :],
    }
    yield sample("views", **views, scale=2.0)
    other = torch.float16 if dtype == torch.float32 else torch.float32
    mixed = {**make("x"), **make("cond", "uncond", dtype=other)}
    yield sample("network in another dtype", **mixed, scale=2.0, seed=3, noise=True)
    yield sample("vectors", **make("x", "cond", shape=(3, 7)), seed=3, noise=True)
    yield sample("numbers", **make("x", "cond", shape=(3,)), seed=3, noise=True)
    yield sample("empty batch", **make("x", "cond", "uncond", shape=(0, *SHAPE[1:])), seed=3)

    yield sample("in place", guided_step_, **make("x", "cond"), mutates=("x",))
    buffer = normals(6, 5, 5, 9, dtype=dtype, device=device, seed=7)
    halves = {"x": buffer[:3, :2], "twin": buffer[3:, :2], **make("cond", "uncond")}
    written = {"fn": guided_step_, "mutates": ("x", "twin")}
    yield sample("in place, twin", **halves, **written, **noisy, scale=2.0)
    buffer = buffer.contiguous(**last)
    halves = {"x": buffer[:3, 1:3], "twin": buffer[3:, 1:3], **make("cond", "h1", "h2")}
    written = {"fn": guided_step_, "mutates": ("x", "twin", "h1", "h2")}
    yield sample("in place, history", **halves, **written)
    written = {"fn": guided_step_, "mutates": ("x", "h1")}
    yield sample("in place, one before", **make("x", "cond", "h1"), **written)


# The definition -----------------------------------------------------------------------------------
EVENT = (3, 4, 4)


def inputs(*names, batch=3, dtype=torch.float32, device="cpu", shape=EVENT):
    return {
        name: normals(batch, *shape, dtype=dtype, device=device, seed=i)
        for i, name in enumerate(names)
    }


def one_row(**coefficients):
    """A table with one row: the coefficients given, 0 elsewhere, no clipping."""
    columns = {"clip_min": -torch.inf, "clip_max": torch.inf, **coefficients}
    return torch.tensor([[columns.get(name, 0.0) for name in TABLE_COLUMNS]])


def test_each_column_multiplies_its_own_term():
    data = inputs("x", "cond", "uncond", "h1", "h2")
    x, c, u, h1, h2 = data.values()
    e = u + 1.5 * (c - u)
    clipped = {"clip_min": -0.5, "clip_max": 0.75, "b1": 2.0}
    z = normal(x.shape, seed=7, step=0, stream=1)
    for coefficients, expected in (
        ({"b0": 2.0}, 2 * x),
        ({"b1": 2.0, "a0": 3.0}, 6 * x),
        ({"b1": 2.0, "a1": 3.0}, 2 * (3 * e)),
        ({**clipped, "a0": 1.0}, 2 * x.clamp(-0.5, 0.75)),
        ({"b2": 2.0}, 2 * h1),
        ({"b3": 2.0}, 2 * h2),
        ({"b4": 2.0}, 2 * e),
        ({"b5": 2.0}, 2 * z),
    ):
        out = guided_step(**data, table=one_row(**coefficients), step=0, scale=1.5, seed=7)
        assert_equal(out, expected)


def test_x0_is_the_clipped_prediction():
    data = inputs("x", "cond")
    table = one_row(a0=2.0, a1=-1.0, clip_min=-1.0, clip_max=1.0)
    out, x0 = guided_step(**data, table=table, step=0, return_x0=True)
    assert_equal(x0, (2 * data["x"] - data["cond"]).clamp(-1, 1))
    assert_equal(out, torch.zeros_like(out))


@pytest.mark.parametrize(("v", "log_variance"), [(-1.0, -4.0), (1.0, -1.0), (0.0, -2.5)])
def test_learned_variance_moves_between_the_two_of_the_table(v, log_variance):
    data = inputs("x", "cond")
    table = one_row(b5=1.0, log_var_min=-4.0, log_var_max=-1.0)
    learned = torch.full_like(data["x"], v)
    noise = guided_step(**data, table=table, step=0, seed=2, log_variance=learned)
    z = normal(data["x"].shape, seed=2, step=0, stream=1)
    torch.testing.assert_close(noise, math.exp(0.5 * log_variance) * z)


def test_the_noise_is_numbered_by_sample_and_row_of_the_table():
    data = inputs("x", "cond")
    table = torch.cat([one_row(b5=1.0)] * 5)
    index, step = torch.tensor([4, 2**33, 0]), torch.tensor([4, 0, 2])
    out = guided_step(**data, table=table, step=step, seed=2, index=index)
    assert_equal(out, normal(out.shape, seed=2, index=index, step=step, stream=1))


def test_without_a_seed_there_is_no_noise_and_the_index_does_not_matter():
    data, table = inputs("x", "cond"), make_table()
    with_seed = guided_step(**data, table=table, step=1, seed=5)
    assert_equal(guided_step(**data, table=table, step=1, index=torch.arange(3)), with_seed)


def test_one_doubled_batch_is_two_pointers():
    data, table = inputs("x", "cond", "uncond"), make_table()
    doubled = {"x": data["x"], "cond": torch.cat([data["uncond"], data["cond"]])}
    two = guided_step(**data, table=table, step=2, scale=2.5)
    assert_equal(guided_step(**doubled, table=table, step=2, scale=2.5), two)


def test_scale_one_is_the_conditional_output_and_zero_the_unconditional():
    data, table = inputs("x", "cond", "uncond"), make_table()
    for scale, name in ((1.0, "cond"), (0.0, "uncond")):
        out = guided_step(**data, table=table, step=0, scale=scale)
        alone = guided_step(data["x"], data[name], table=table, step=0)
        torch.testing.assert_close(out, alone)


def test_a_shared_scale_or_step_is_one_for_each_row():
    data, table = inputs("x", "cond", "uncond"), make_table()
    expected = guided_step(**data, table=table, step=2, scale=2.5)
    for step in (torch.tensor(2), torch.tensor(2, dtype=torch.int32), torch.full((3,), 2)):
        for scale in (torch.tensor(2.5), torch.full((3,), 2.5), torch.tensor(2.5).double()):
            assert_equal(guided_step(**data, table=table, step=step, scale=scale), expected)
    assert_equal(
        guided_step(**data, table=table, step=2, scale=3),
        guided_step(**data, table=table, step=2, scale=3.0),
    )


def test_steps_and_scales_of_rows_are_those_of_each_row_alone():
    data, table = inputs("x", "cond", "uncond"), make_table(noise=True)
    steps, scales = [3, 0, 2], [1.0, -2.0, 4.0]
    out = guided_step(
        **data, table=table, step=torch.tensor(steps), scale=torch.tensor(scales), seed=1
    )
    for i in range(3):
        row = {name: t[i : i + 1] for name, t in data.items()}
        alone = guided_step(
            **row, table=table, step=steps[i], scale=scales[i], seed=1, index=torch.tensor([i])
        )
        assert_equal(out[i : i + 1], alone)


def test_the_network_may_have_another_dtype():
    data, table = inputs("x", "cond", "uncond"), make_table()
    half = {name: t.bfloat16() for name, t in data.items()}
    out = guided_step(data["x"], half["cond"], half["uncond"], table=table, step=1, scale=2.0)
    wide = half["cond"].float(), half["uncond"].float()
    assert out.dtype == torch.float32
    assert_equal(out, guided_step(data["x"], *wide, table=table, step=1, scale=2.0))
    out = guided_step(half["x"], *wide, table=table, step=1, scale=2.0)
    assert out.dtype == torch.bfloat16


def test_in_place_is_the_same_step_and_moves_the_history():
    data, table = inputs("x", "cond", "uncond", "h1", "h2", "twin"), make_table(noise=True)
    twin = data.pop("twin")
    options = {"table": table, "step": 1, "scale": 2.0, "seed": 3}
    expected, x0 = guided_step(**data, **options, return_x0=True)
    before = {name: t.clone() for name, t in data.items()}
    assert guided_step_(**data, **options, twin=twin) is data["x"]
    assert_equal([data["x"], twin, data["h1"], data["h2"]], [expected, expected, x0, before["h1"]])
    assert_equal([data["cond"], data["uncond"]], [before["cond"], before["uncond"]])


def test_in_place_without_history_or_twin():
    data, table = inputs("x", "cond", "h1"), make_table()
    h1 = data.pop("h1")
    expected = guided_step(**data, table=table, step=1)
    expected_with_h1, x0 = guided_step(**data, h1=h1, table=table, step=1, return_x0=True)
    x = data["x"].clone()
    assert_equal(guided_step_(x, data["cond"], table=table, step=1), expected)
    x = data["x"].clone()
    assert_equal(guided_step_(x, data["cond"], h1=h1, table=table, step=1), expected_with_h1)
    assert_equal(h1, x0)


def test_x_and_twin_are_halves_of_one_network_input():
    """What stands beside them, the condition, stays."""
    data, table = inputs("x", "cond", "uncond"), make_table()
    network_input = normals(6, 5, 4, 4, seed=8)
    network_input[:3, :3] = network_input[3:, :3] = data["x"]
    condition = network_input[:, 3:].clone()
    halves = {"x": network_input[:3, :3], "twin": network_input[3:, :3]}
    guided_step_(halves["x"], data["cond"], data["uncond"], table=table, step=1,
                 twin=halves["twin"])  # fmt: skip
    expected = guided_step(**data, table=table, step=1)
    assert_equal(network_input, torch.cat([expected.repeat(2, 1, 1, 1), condition], 1))


def test_what_is_not_a_number_stays_so():
    """Clipping hides nothing."""
    data, table = inputs("x", "cond"), make_table()
    data["x"][1, 0, 0, 0] = torch.nan
    for value in guided_step(**data, table=table, step=1, return_x0=True):
        assert value.isnan().nonzero().tolist() == [[1, 0, 0, 0]]


def test_no_gradient_passes_where_x0_was_clipped():
    data = inputs("x", "cond")
    x = data["x"].requires_grad_()
    table = one_row(a0=1.0, b1=3.0, clip_min=-0.5, clip_max=0.5)
    out = guided_step(x, data["cond"], table=table, step=0)
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert_equal(dx, 3.0 * (x.detach().abs() <= 0.5))


# What is refused ----------------------------------------------------------------------------------
X, ON_META = torch.zeros(3, *EVENT), torch.zeros(3, *EVENT, device="meta")
INT64 = torch.zeros(3, dtype=torch.int64)
TABLE = make_table()
NAN = float("nan")

WRONG = [
    (ValueError, ("x", "(B, ...)"), {"x": torch.zeros(())}),
    (TypeError, ("x", "int64"), {"x": X.long()}),
    (TypeError, ("x", "NoneType"), {"x": None}),
    (TypeError, ("cond", "NoneType"), {"cond": None}),
    (TypeError, ("cond", "float"), {"cond": 1.0}),
    (TypeError, ("cond", "bool"), {"cond": X.bool()}),
    (ValueError, ("cond", "(3, 3, 4, 4)", "(3, 3, 4, 5)"), {"cond": torch.zeros(3, 3, 4, 5)}),
    (ValueError, ("cond", "(6, 3, 4, 4)"), {"cond": torch.zeros(6, *EVENT), "uncond": X}),
    (ValueError, ("cond", "cpu", "meta"), {"cond": ON_META}),
    *(
        case
        for name in ("uncond", "log_variance", "h1", "h2")
        for case in (
            (TypeError, (name, "int32"), {name: X.int()}),
            (ValueError, (name, "(3, 3, 4, 4)", "(1, 3, 4, 4)"), {name: X[:1]}),
            (ValueError, (name, "cpu", "meta"), {name: ON_META}),
        )
    ),
    (TypeError, ("table", "float16"), {"table": TABLE.half()}),
    (TypeError, ("table", "NoneType"), {"table": None}),
    (ValueError, ("table", "(rows, 12)", "(4, 11)"), {"table": TABLE[:, :11]}),
    (ValueError, ("table", "(rows, 12)", "(12,)"), {"table": TABLE[0]}),
    (ValueError, ("table", "(0, 12)"), {"table": TABLE[:0]}),
    (ValueError, ("table", "cpu", "meta"), {"table": TABLE.to("meta")}),
    (ValueError, ("table", "requires grad"), {"table": TABLE.clone().requires_grad_()}),
    (ValueError, ("step", "[0, 4)", "4"), {"step": 4}),
    (ValueError, ("step", "[0, 4)", "-1"), {"step": -1}),
    (ValueError, ("step", "[0, 4)", "from -1 to 4"), {"step": torch.tensor([4, 0, -1])}),
    (ValueError, ("step", "[0, 2)"), {"step": 2, "table": TABLE[:2]}),
    (ValueError, ("step", "(3,)", "(2,)"), {"step": INT64[:2]}),
    (ValueError, ("step", "cpu", "meta"), {"step": INT64.to("meta")}),
    (TypeError, ("step", "1.0"), {"step": 1.0}),
    (TypeError, ("step", "True"), {"step": True}),
    (TypeError, ("step", "float32"), {"step": torch.zeros(3)}),
    (ValueError, ("scale", "nan"), {"scale": NAN}),
    (ValueError, ("scale", "inf"), {"scale": float("inf")}),
    (ValueError, ("scale", "nan"), {"scale": torch.tensor([1.0, NAN, 2.0])}),
    (ValueError, ("scale", "(3,)", "(2,)"), {"scale": torch.ones(2)}),
    (ValueError, ("scale", "cpu", "meta"), {"scale": torch.ones(3, device="meta")}),
    (ValueError, ("scale", "requires grad"), {"scale": torch.ones(3, requires_grad=True)}),
    (TypeError, ("scale", "int64"), {"scale": INT64}),
    (TypeError, ("scale", "None"), {"scale": None}),
    (TypeError, ("scale", "'1'"), {"scale": "1"}),
    (ValueError, ("log_variance", "requires grad"), {"log_variance": X.clone().requires_grad_()}),
    (ValueError, ("seed", "b5"), {"table": make_table(noise=True)}),
    (TypeError, ("seed", "0.5"), {"seed": 0.5}),
    (ValueError, ("seed", "cpu", "meta"), {"seed": INT64.to("meta")[0]}),
    (TypeError, ("index", "int32"), {"seed": 1, "index": INT64.int()}),
    (ValueError, ("index", "(3,)", "(4,)"), {"seed": 1, "index": torch.arange(4)}),
    (ValueError, ("index", "cpu", "meta"), {"seed": 1, "index": INT64.to("meta")}),
]


@pytest.mark.parametrize("fn", [guided_step, guided_step_])
@pytest.mark.parametrize(("error", "words", "changed"), WRONG)
def test_wrong_arguments(fn, error, words, changed):
    call = Sample("wrong", fn, {**inputs("x", "cond"), "table": TABLE, "step": 1})
    if fn is guided_step_ and "h2" in changed:
        call = call.replace(h1=X)
    assert_refused(call.replace(**changed), error, *words)


@pytest.mark.parametrize(
    ("error", "words", "changed"),
    [
        (ValueError, ("h1", "h2"), {"h2": X}),
        (TypeError, ("twin", "int32"), {"twin": X.int()}),
        (ValueError, ("twin", "(3, 3, 4, 4)", "(1, 3, 4, 4)"), {"twin": X[:1]}),
        (ValueError, ("twin", "cpu", "meta"), {"twin": ON_META}),
        (ValueError, ("x", "expanded"), {"x": X[:1].expand(3, *EVENT)}),
        (ValueError, ("h1", "expanded"), {"h1": X[:1].expand(3, *EVENT)}),
        (ValueError, ("h2", "expanded"), {"h1": X, "h2": X[:, :1].expand(3, *EVENT)}),
        (ValueError, ("twin", "expanded"), {"twin": X[..., :1].expand(3, *EVENT)}),
        (ValueError, ("h2", "memory with h1"), {"h1": X, "h2": X}),
        (ValueError, ("twin", "memory with x"), {"x": X, "twin": X}),
        *(
            (ValueError, (name, "requires grad"), {"h1": X, name: X.clone().requires_grad_()})
            for name in ("x", "cond", "uncond", "h1", "h2", "twin")
        ),
    ],
)
def test_wrong_arguments_in_place(error, words, changed):
    call = Sample("wrong", guided_step_, {**inputs("x", "cond"), "table": TABLE, "step": 1})
    assert_refused(call.replace(**changed), error, *words)


# Kernels ------------------------------------------------------------------------------------------
ALL = ("x", "cond", "uncond", "log_variance", "h1", "h2")


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("numel", [1, 127, 128, 129, 1023, 1024, 1025, 2 * 1024 + 7])
def test_sizes_around_a_block(numel, dtype, device):
    options = {
        "table": make_table(device=device, noise=True),
        "step": torch.tensor([3, 0], device=device),
        "scale": torch.tensor([1.5, 4.0], device=device),
        "seed": 1,
        "return_x0": True,
    }
    data = inputs(*ALL, batch=2, shape=(numel,), dtype=dtype, device=device)
    assert_kernels_are_accurate(Sample("", guided_step, {**data, **options}), device)


def mixed_layouts(device, dtype=torch.bfloat16):
    """x, cond, uncond, h1 and h2 in five layouts, float32 and another dtype."""
    wide = normals(3, 7, 4, 6, device=device, seed=5)
    last = wide.contiguous(memory_format=torch.channels_last)
    return {
        "x": last[:, 2:5],
        "cond": wide[:, 1:4].to(dtype),
        "uncond": wide.to(dtype).transpose(2, 3).contiguous().transpose(2, 3)[:, 4:],
        "h1": wide[:, ::3],
        "h2": last[:1, :3].expand(3, 3, 4, 6),
    }


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_mixed_layouts_and_dtypes(device):
    options = {"table": make_table(device=device, noise=True), "step": 2, "scale": 3.0, "seed": 1}
    data = mixed_layouts(device)
    assert_kernels_are_accurate(Sample("", guided_step, {**data, **options}), device)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slices", "transposed"])
def test_in_place_kernels_are_the_functional_ones(layout, device):
    """On parts of persistent buffers, too; of transposed ones, which take copies."""
    data = inputs("x", "cond", "uncond", "h1", "h2", device=device)
    options = {"table": make_table(device=device, noise=True), "step": 1, "scale": 2.0, "seed": 3}
    with kernels(device):
        expected, x0 = guided_step(**data, **options, return_x0=True)
    h1 = data["h1"].clone()
    buffer = normals(6, 5, 4, 4, device=device, seed=9)
    if layout == "channels_last":
        buffer = buffer.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        buffer = buffer.transpose(2, 3)
    if layout != "contiguous":
        before = buffer.clone()
        before[:, :3] = expected.repeat(2, 1, 1, 1)
        x, twin = buffer[:3, :3], buffer[3:, :3]
        x.copy_(data["x"])
        data["x"] = x
    else:
        twin = torch.empty_like(data["x"])
    with kernels(device, order_seed=1):
        guided_step_(**data, **options, twin=twin)
    results = [data["x"], twin, data["h1"], data["h2"]]
    assert_equal(results, [expected, expected, x0, h1])
    if layout != "contiguous":
        assert_equal(buffer, before)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernels_take_guidance_in_every_form(device):
    """One doubled batch or two pointers; scales and steps shared or of each row."""
    data = inputs("x", "cond", "uncond", device=device)
    table = make_table(device=device, noise=True)
    doubled = {"x": data["x"], "cond": torch.cat([data["uncond"], data["cond"]])}
    twos = torch.full((3,), 2, device=device)
    with kernels(device):
        expected = guided_step(**data, table=table, step=2, scale=2.0, seed=1)
        assert_equal(guided_step(**doubled, table=table, step=2, scale=2.0, seed=1), expected)
        for step, scale in ((twos, 2.0), (twos[0], twos[0].float()), (2, twos.float())):
            assert_equal(guided_step(**data, table=table, step=step, scale=scale, seed=1), expected)
    options = {"table": table, "step": 2, "scale": 2.0, "seed": 1}
    assert_kernels_are_accurate(Sample("", guided_step, {**data, **options}), device)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_a_sample_has_one_result(device):
    """Alone, in a batch, permuted, with its own step and scale; its noise in any memory format."""
    data = inputs("x", "cond", "uncond", "h1", batch=4, shape=(3, 20, 18), device=device)
    index = torch.tensor([7, 2**35, 0, 1], device=device)
    step = torch.tensor([0, 1, 3, 2], device=device)
    scale = torch.tensor([1.0, 2.0, 3.0, -1.0], device=device)
    table = make_table(device=device, noise=True)
    only_noise = torch.zeros_like(table)
    only_noise[:, 7] = 1

    def run(rows, table, format=torch.contiguous_format):
        some = {name: t[rows].contiguous(memory_format=format) for name, t in data.items()}
        numbers = {"index": index[rows], "step": step[rows], "scale": scale[rows]}
        with kernels(device):
            return guided_step(**some, **numbers, table=table, seed=5)

    whole = run([0, 1, 2, 3], table)
    for rows in ([2], [3, 2, 1, 0]):
        assert_equal(run(rows, table), whole[rows])
    noise = run([0, 1, 2, 3], only_noise)
    assert_equal(run([2, 1], only_noise, torch.channels_last), noise[[2, 1]])


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("outside", [-1, 4, 2**40])
def test_a_step_outside_the_table_is_not_a_number(outside, device):
    """On a GPU nobody can refuse it without waiting; it must not look like a result."""
    data = inputs("x", "cond", device=device)
    step = torch.tensor([1, outside, 3], device=device)
    table = make_table(device=device)
    with kernels(device):
        good = guided_step(**data, table=table, step=step.clamp(0, 3))
    args = (*data.values(), None, table, step, torch.ones(3, device=device))
    out, x0 = kernel_results(OpCall(OPS["guided_step_fwd"], (*args, *[None] * 5, True)))
    assert out[1].isnan().all() and x0[1].isnan().all()
    assert_equal(out[::2], good[::2])


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernels_keep_what_is_not_a_number(device):
    data = inputs("x", "cond", device=device)
    data["x"][1, 0, 0, 0] = torch.nan
    with kernels(device):
        results = guided_step(**data, table=make_table(device=device), step=1, return_x0=True)
    for value in results:
        assert value.isnan().nonzero().tolist() == [[1, 0, 0, 0]]


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(1, 2**31 + 1031), (5, 2**29 + 1), (3, 2, 2**14, 2**15)])
def test_more_than_2_31_elements(shape):
    if torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        pytest.skip("needs 20 GB")
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    cond = torch.empty_like(x).normal_()
    options = {"table": make_table(device="cuda"), "step": 1}
    tails = [t.flatten(1)[-1:, -4000:].clone() for t in (x, cond)]
    expected = guided_step(*tails, **options)
    assert_equal(guided_step(x, cond, **options).flatten(1)[-1:, -4000:], expected)
    only_noise = one_row(b5=1.0).cuda()
    guided_step_(x, cond, table=only_noise, step=0, seed=6)
    element = torch.arange(x[0].numel() - 4000, x[0].numel())
    exact = normal_of(element, seed=6, index=shape[0] - 1, step=0, stream=1)
    torch.testing.assert_close(x.flatten(1)[-1, -4000:].cpu().double(), exact, rtol=2**-8, atol=0)


@pytest.mark.cuda
def test_a_loop_in_a_graph_is_the_eager_loop():
    """Replays follow the seed tensor, and the whole loop waits for nothing."""
    table, seed = make_table(8, device="cuda", noise=True), torch.tensor(1, device="cuda")
    data = inputs("x", "cond", "uncond", "h1", "h2", device="cuda")
    start = {name: t.clone() for name, t in data.items()}

    def loop(seed):
        for name in ("x", "h1", "h2"):
            data[name].copy_(start[name])
        for step in range(8):
            guided_step_(**data, table=table, step=step, scale=2.0, seed=seed)

    loop(seed)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop(seed)
    for value in (1, 2, -3):
        seed.fill_(value)
        graph.replay()
        replayed = data["x"].clone()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loop(value)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_equal(data["x"], replayed)
