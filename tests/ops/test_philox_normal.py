"""philox_normal: one definition of the noise for every batch, layout, dtype and device."""

from collections.abc import Iterator

import pytest
import torch

from cgkernels import philox_normal
from cgkernels.ops import philox_normal as op
from cgkernels.random import normal
from tests.support import (
    HALVES,
    KERNEL_DEVICES,
    Sample,
    assert_equal,
    assert_refused,
    in_ulp,
    kernels,
)

LAUNCHERS = {"philox_normal": op._launch_fwd}

SHAPE = (3, 2, 5, 9)


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def sample(label, shape=SHAPE, per_row=(), **inputs):
        inputs = {"shape": shape, "seed": 3, "step": 0, "dtype": dtype, "device": device, **inputs}
        return Sample(label, philox_normal, inputs, per_row=("shape", *per_row))

    index = torch.tensor([5, 2**40 + 1, -7], device=device)
    step = torch.tensor([0, 3, 2**24 - 1], device=device)
    one_step = torch.tensor(2, dtype=torch.int32, device=device)
    seed = torch.tensor([2**62 + 5], device=device)
    yield sample("plain")
    yield sample("indexed", index=index, seed=seed, step=4, stream=7, per_row=("index",))
    yield sample("step per row", step=step, index=index, stream=1, per_row=("step", "index"))
    yield sample("channels_last", memory_format=torch.channels_last, step=one_step)
    yield sample("vectors", shape=(3, 7), stream=255, seed=2**64 - 1)
    yield sample("numbers", shape=(3,))
    yield sample("volumes", shape=(3, 2, 2, 3, 5))
    yield sample("no elements", shape=(3, 0))
    yield sample("empty batch", shape=(0, 2, 5, 9), seed=seed)


# The definition -----------------------------------------------------------------------------------
def test_it_is_the_noise_of_the_contract():
    index, step = torch.tensor([3, 2**33]), torch.tensor([0, 9])
    z = philox_normal((2, 3, 4), seed=-5, index=index, step=step, stream=6)
    assert_equal(z, normal((2, 3, 4), seed=-5, index=index, step=step, stream=6))


def test_the_default_index_is_the_place_in_the_batch():
    explicit = philox_normal((3, 4), seed=1, index=torch.arange(3), step=0, stream=0)
    assert_equal(philox_normal((3, 4), seed=1, step=0), explicit)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_types_round_the_float32_noise(dtype):
    shape = (4, 2**14)
    assert_equal(
        philox_normal(shape, seed=1, step=0, dtype=dtype),
        philox_normal(shape, seed=1, step=0).to(dtype),
    )


def test_the_device_is_that_of_the_tensors_given():
    on_meta = torch.empty(2, dtype=torch.int64, device="meta")
    assert philox_normal((2, 3), seed=1, index=on_meta, step=0).device.type == "meta"
    assert philox_normal((2, 3), seed=on_meta[0], step=0).device.type == "meta"
    assert philox_normal((2, 3), seed=1, step=0, device="meta").device.type == "meta"
    assert philox_normal((2, 3), seed=1, step=0).device.type == "cpu"


INT64 = torch.zeros(3, dtype=torch.int64)
META = torch.zeros(3, dtype=torch.int64, device="meta")
LAST = torch.channels_last


@pytest.mark.parametrize(
    ("error", "words", "changed"),
    [
        (ValueError, ("shape", "()"), {"shape": ()}),
        (ValueError, ("shape", "(3, -2)"), {"shape": (3, -2)}),
        (ValueError, ("shape", "2^34"), {"shape": (3, 2**34 + 1)}),
        (TypeError, ("seed", "1.5"), {"seed": 1.5}),
        (TypeError, ("seed", "True"), {"seed": True}),
        (TypeError, ("seed", "None"), {"seed": None}),
        (ValueError, ("seed", "64 bits", str(2**64)), {"seed": 2**64}),
        (ValueError, ("seed", "64 bits"), {"seed": -(2**63) - 1}),
        (ValueError, ("seed", "float32"), {"seed": torch.zeros(())}),
        (ValueError, ("seed", "(3,)"), {"seed": INT64}),
        (ValueError, ("seed", "cpu", "meta"), {"seed": META[0]}),
        (TypeError, ("index", "float32"), {"index": torch.zeros(3)}),
        (TypeError, ("index", "int32"), {"index": INT64.int()}),
        (TypeError, ("index", "list"), {"index": [0, 1, 2]}),
        (ValueError, ("index", "(3,)", "(2,)"), {"index": INT64[:2]}),
        (ValueError, ("index", "(3,)", "()"), {"index": INT64[0]}),
        (ValueError, ("index", "cpu", "meta"), {"index": META}),
        (TypeError, ("step", "1.0"), {"step": 1.0}),
        (TypeError, ("step", "False"), {"step": False}),
        (TypeError, ("step", "float32"), {"step": torch.zeros(())}),
        (ValueError, ("step", "-1"), {"step": -1}),
        (ValueError, ("step", str(2**24)), {"step": 2**24}),
        (ValueError, ("step", str(2**24)), {"step": torch.tensor([0, 2**24, 1])}),
        (ValueError, ("step", "(3,)", "(2,)"), {"step": INT64[:2]}),
        (ValueError, ("step", "cpu", "meta"), {"step": META}),
        (ValueError, ("stream", "256"), {"stream": 256}),
        (ValueError, ("stream", "-1"), {"stream": -1}),
        (TypeError, ("stream", "True"), {"stream": True}),
        (TypeError, ("stream", "1.0"), {"stream": 1.0}),
        (TypeError, ("dtype", "int32"), {"dtype": torch.int32}),
        (ValueError, ("memory_format", "4-D"), {"memory_format": LAST, "shape": (3, 7)}),
        (ValueError, ("memory_format",), {"memory_format": torch.preserve_format}),
    ],
)
def test_wrong_arguments(error, words, changed):
    plain = next(samples(torch.float32, torch.device("cpu")))
    assert_refused(plain.replace(**changed), error, *words)


# Kernels ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("numel", [1, 3, 127, 128, 129, 1023, 1024, 1025, 3073])
def test_sizes_around_a_block(numel, device):
    with kernels(device):
        z = philox_normal((2, numel), seed=1, step=3, stream=2, device=device)
    exact = normal((2, numel), seed=1, step=3, stream=2, dtype=torch.float64)
    assert in_ulp(z, exact).max() <= 4


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_a_sample_has_one_noise(device):
    """Alone, in a batch, permuted, in either memory format, in any order of the programs."""
    shape, index = (5, 3, 11, 13), torch.tensor([7, 2**35, 0, -1, 1], device=device)
    step = torch.arange(5, device=device)

    def draw(rows, order_seed=0, **format):
        with kernels(device, order_seed=order_seed):
            return philox_normal(
                (len(rows), *shape[1:]), seed=9, index=index[rows], step=step[rows], **format
            )

    z = draw([0, 1, 2, 3, 4])
    assert_equal(draw([0, 1, 2, 3, 4], order_seed=1), z)
    assert_equal(draw([3]), z[3:4])
    assert_equal(draw([4, 1, 0]), z[[4, 1, 0]])
    last = draw([4, 1, 0], memory_format=torch.channels_last)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert_equal(last, z[[4, 1, 0]])
    with kernels(device):
        volumes = philox_normal((5, 3, 11, 1, 13), seed=9, index=index, step=step)
    assert_equal(volumes.view(shape), z)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_types_round_the_float32_noise_of_the_kernel(dtype, device):
    shape = (2, 3000)
    with kernels(device):
        z = philox_normal(shape, seed=1, step=0, device=device)
        assert_equal(philox_normal(shape, seed=1, step=0, device=device, dtype=dtype), z.to(dtype))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_the_tails_of_the_kernel(device):
    """Beyond 5.678, where Triton's own normals end; a draw found by a search of 1.3e9."""
    with kernels(device):
        z = philox_normal((1, 1024), seed=0, index=torch.tensor([854929], device=device), step=0)
    assert z[0, 957] == z.max() > 6.34


@pytest.mark.cuda
def test_a_graph_replays_with_another_seed():
    seed = torch.tensor(1, device="cuda")
    philox_normal((4, 1000), seed=seed, step=0)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = philox_normal((4, 1000), seed=seed, step=0)
    for value in (1, 2, -3):
        seed.fill_(value)
        graph.replay()
        assert_equal(z, philox_normal((4, 1000), seed=value, step=0, device="cuda"))


@pytest.mark.cuda
def test_float64_is_for_the_cpu():
    with pytest.raises(TypeError, match="float64"):
        philox_normal((2, 3), seed=1, step=0, device="cuda", dtype=torch.float64)
