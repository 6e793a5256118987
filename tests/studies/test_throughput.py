"""cgm bench: the three ways draw the same samples, and what is written says how fast."""

import csv
import itertools
import time

import pytest
import torch
from PIL import Image
from rich.console import Console

import cgkernels
from cgm.evaluation.execution import compiled_copy, conditions, difference_of, model_call
from cgm.families.autoregressive import AutoregressiveConfig, ConditionalTransformer
from cgm.families.diffusion import ConditionalDiffusion, DiffusionConfig
from cgm.model import make_model
from cgm.studies import throughput as module
from cgm.studies.throughput import bench

CHECKPOINT = "class_to_image_diffusion"

SMALL = {"event_shape": (1, 8, 8), "width": 8, "width_multipliers": (1,), "blocks": 1, "heads": 2}
CONDITIONS = {
    "none": {},
    "class": {"num_classes": 3},
    "image": {"cond_shape": (2, 8, 8)},
    "tokens": {"num_classes": 5, "cond_shape": (4,)},
}


def small(kind, **changes):
    config = DiffusionConfig(**SMALL, cond_kind=kind, **CONDITIONS[kind], **changes)
    return make_model(ConditionalDiffusion, config).eval()


@pytest.fixture
def tiny(monkeypatch):
    """A model that takes no time in place of the shipped one."""
    monkeypatch.setattr(module, "load_model", lambda path, device: small("class").to(device))
    return Console(width=150)


@pytest.mark.parametrize("kind", CONDITIONS)
def test_ways_draw_the_same_for_every_kind_of_condition(kind):
    model = small(kind)
    cond = conditions(model, 3)
    drawn = {
        way: model_call(model, way, cond, rows=3, steps=2)()
        for way in ("fused", "plain", "compiled")
    }
    assert drawn["fused"].shape == (3, 1, 8, 8)
    assert torch.equal(drawn["fused"], drawn["plain"])
    assert torch.equal(drawn["compiled"], drawn["plain"])  # whose networks are not compiled here
    again = conditions(model, 3)
    assert (cond is None) == (kind == "none") and (cond is None or torch.equal(cond, again))


def test_plain_is_plain(monkeypatch):
    """Only the fused way may reach the ops."""
    model, seen = small("none"), []
    step = cgkernels.guided_step_
    monkeypatch.setattr(
        cgkernels,
        "guided_step_",
        lambda *a, **k: seen.append(cgkernels.library.using_reference()) or step(*a, **k),
    )
    model_call(model, "fused", None, rows=1, steps=1)()
    model_call(model, "plain", None, rows=1, steps=1)()
    assert seen == [False, True]


def test_the_compiled_copy_is_another_model():
    model = small("none")
    twin = compiled_copy(model)
    assert all(network._compiled_call_impl is not None for network in twin.children())
    assert all(network._compiled_call_impl is None for network in model.children())


def test_table_and_files(tmp_path, tiny, capsys):
    names = [CHECKPOINT]
    ways = ["plain", "fused"]
    results = bench(tmp_path, models=names, ways=ways, rows=4, seconds=0.05, console=tiny)
    out = capsys.readouterr().out
    assert [(r.model, r.way) for r in results] == list(itertools.product(names, ways))
    assert all(r.status == "ok" and r.p20 <= r.p50 <= r.p80 and r.difference == 0 for r in results)
    assert results[0].ratio == 1 and 0.2 < results[1].ratio < 5
    assert "plain" in out and "fused" in out and "Samples per second on CPU" in out
    with (tmp_path / "bench.csv").open() as opened:
        rows = list(csv.DictReader(opened))
    assert [float(row["p50"]) for row in rows] == [r.p50 for r in results]
    image = Image.open(tmp_path / "bench.png")
    assert image.width > 300 and len(image.getcolors(10**6)) > 10


def test_rates_are_samples_a_second(tmp_path, tiny, monkeypatch):
    """A call of four samples in 20 ms is 200 a second."""
    slow = torch.zeros(4, 1, 8, 8)
    monkeypatch.setattr(
        module, "model_call", lambda *a, **k: lambda: time.sleep(0.02) or slow.clone()
    )
    (result,) = bench(
        tmp_path, models=[CHECKPOINT], ways=["plain"], rows=4, seconds=0.05, console=tiny
    )
    assert 100 < result.p50 <= 200


def test_a_way_that_fails_is_a_row(tmp_path, tiny, monkeypatch, capsys):
    def no_compiler(model, mode="default"):
        raise RuntimeError("no C++ compiler was found\nmore")

    monkeypatch.setattr(module, "compiled_copy", no_compiler)
    fused, compiled = bench(
        tmp_path,
        models=[CHECKPOINT],
        ways=["fused", "compiled"],
        rows=1,
        seconds=0.01,
        console=tiny,
    )
    assert compiled.status == "failed: RuntimeError: no C++ compiler was found"
    assert fused.status == "ok" and fused.ratio is None and compiled.p50 is None
    assert "no C++ compiler" in capsys.readouterr().out


def test_a_way_that_draws_something_else_is_refused(tmp_path, tiny, monkeypatch):
    step = cgkernels.guided_step_

    def wrong(x, *args, **options):
        step(x, *args, **options)
        return x.add_(0 if cgkernels.library.using_reference() else 0.1)

    monkeypatch.setattr(cgkernels, "guided_step_", wrong)
    with pytest.raises(RuntimeError, match=r"fused: differs from plain by [\d.]+ of \[-1, 1\]"):
        bench(tmp_path, ways=["fused"], rows=1, seconds=0.01, console=tiny)
    assert not list(tmp_path.iterdir())


def test_one_discrete_sample_in_four_may_differ():
    continuous, discrete = small("none"), small("none")
    discrete.discrete = True
    expected = torch.zeros(8, 1, 2, 2)
    found = expected.clone()
    found[3, 0, 1, 1], found[6, 0, 0, 1] = -1, 0.5
    assert difference_of(continuous, found, expected) == 1
    assert difference_of(discrete, found, expected) == 0
    found[0] = 0.25
    assert difference_of(discrete, found, expected) == 0.25
    assert difference_of(discrete, found[3:4], expected[:1]) == 1


def test_the_token_step_is_what_is_compiled():
    config = AutoregressiveConfig(event_shape=(1, 2, 3), depth=1, width=8, heads=1, hidden=8)
    model = make_model(ConditionalTransformer, config).eval()
    twin = compiled_copy(model)
    assert twin.transformer.step is not model.transformer.step
    assert "step" in vars(twin.transformer) and "step" not in vars(model.transformer)
    drawn = [
        model_call(of, way, None, rows=3)()
        for of, way in ((model, "fused"), (model, "plain"), (twin, "compiled"))
    ]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"models": ["gpt"]},
            "complete_autoregressive, edges_to_image_pix2pix, got 'gpt'",
        ),
        ({"ways": ["quick"]}, "ways must be one of fused, plain, compiled, got 'quick'"),
        ({"ways": []}, "ways must be of fused, plain, compiled, got none"),
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"seconds": 0.0}, "seconds must be positive"),
        ({"seconds": float("inf")}, "seconds must be positive"),
    ],
)
def test_user_errors(options, words, tmp_path):
    with pytest.raises(ValueError) as caught:
        bench(tmp_path, **options)
    assert words in str(caught.value) and not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out must be a folder to write to"):
        bench(tmp_path / "file" / "folder")
