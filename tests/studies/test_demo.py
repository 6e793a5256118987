"""The demo, with a model too small to draw anything, and once as it ships."""

import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

import cgm.evaluation.classifier
from cgkernels.library import using_reference
from cgm.checkpoints import load_model, sampling_preset, save_model, shipped
from cgm.cli import main
from cgm.data import load_task, to_float
from cgm.evaluation.ground_truth import color_scores
from cgm.families.autoregressive import AutoregressiveConfig, ConditionalTransformer
from cgm.families.diffusion import ConditionalDiffusion, DiffusionConfig
from cgm.families.gan import Pix2Pix, Pix2PixConfig
from cgm.families.regression import LeastSquares, LeastSquaresConfig
from cgm.model import make_model
from cgm.studies import demo as study
from cgm.studies.demo import CHECKPOINT, LIBRARY, PLAIN, demo


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    config = DiffusionConfig(
        cond_kind="class",
        num_classes=10,
        width=8,
        heads=2,
        width_multipliers=(1,),
        blocks=1,
        patch=4,
    )
    preset = {"sampling": {**sampling_preset(shipped(CHECKPOINT)), "steps": 3}}
    save_model(tmp_path / "tiny", make_model(ConditionalDiffusion, config), preset)
    lower = AutoregressiveConfig(
        event_shape=(1, 14, 28), cond_kind="image", cond_shape=(1, 14, 28), levels=2, depth=1,
        width=8, heads=1, hidden=8,
    )  # fmt: skip
    save_model(tmp_path / "completing", make_model(ConditionalTransformer, lower))
    edges = Pix2PixConfig(
        event_shape=(1, 28, 28), cond_shape=(1, 28, 28), generator="resnet", depth=1, width=4,
        patch=1, norm="instance", discriminator_width=4,
    )  # fmt: skip
    save_model(tmp_path / "translating", make_model(Pix2Pix, edges))
    colors = LeastSquaresConfig(
        event_shape=(2, 28, 28), cond_kind="image", cond_shape=(1, 28, 28), width=4, depth=1
    )
    save_model(tmp_path / "coloring", make_model(LeastSquares, colors))
    monkeypatch.setattr(study, "drawable_names", lambda: ["colorize_least_squares", "other"])
    folders = {
        "colorize_least_squares": "coloring",
        study.CHECKPOINT: "tiny",
        study.COMPLETING: "completing",
        study.TRANSLATING: "translating",
    }
    monkeypatch.setattr(study, "shipped", lambda name: tmp_path / folders[name])
    monkeypatch.setattr(study, "class_accuracy", lambda images, labels: 0.25)
    monkeypatch.setattr(study, "held_out_accuracy", lambda: 0.75)
    return load_model(tmp_path / "tiny")


def first_of_each_class() -> torch.Tensor:
    real = load_task("class_to_image", "test")
    return torch.stack([real.y[real.cond == label][0] for label in range(10)])


@pytest.fixture
def ways(monkeypatch):
    """Way and steps of each call of sample."""
    calls = []
    sample = ConditionalDiffusion.sample

    def recorded(self, *args, **kwargs):
        calls.append((PLAIN if using_reference() else LIBRARY, kwargs["steps"]))
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(ConditionalDiffusion, "sample", recorded)
    return calls


def test_draws_are_measured_in_turn_and_numbered_on(tiny, ways, tmp_path):
    text = io.StringIO()
    measured = demo(tmp_path, samples=60, timed=2, console=Console(file=text))
    order = [PLAIN, LIBRARY, LIBRARY, PLAIN, LIBRARY]
    assert ways[-5:] == [(way, 3) for way in order]
    assert all(steps == 2 for _, steps in ways[:-5])  # the warm-up
    assert {way for way, _ in ways[:-5]} == {PLAIN, LIBRARY}
    assert len(measured.rates[PLAIN]) == 2 and len(measured.rates[LIBRARY]) == 3
    assert measured.difference == 0  # on a CPU they are the same operations
    solver = {"sampler": "dpmpp_2m", "steps": 3, "guidance": 2.0}
    expected = tiny.sample(6, cond=torch.arange(10), seed=0, **solver)
    # Round-off: the network saw other batches.
    torch.testing.assert_close(measured.samples, expected, rtol=0, atol=1e-3)
    drawn = ("25.0% of 60 drawn", "25.0% of 40 completed", "25.0% of 20 made of edges")
    shares = (*drawn, "75.0% of 1000 real")
    for words in ("CPU", PLAIN, LIBRARY, *shares, "0.0e+00", "40 upper halves completed, "):
        assert words in text.getvalue()
    assert measured.completed.shape == (4, 10, 1, 28, 28) and measured.completions > 0
    assert measured.translated.shape == (2, 10, 1, 28, 28)
    lower = measured.completed[:, :, :, 14:]
    assert len(lower.unique()) == 2  # two levels, and different in each draw
    assert not torch.equal(lower[0], lower[1])
    upper = (to_float(first_of_each_class())[:, :, :14]).expand(4, -1, -1, -1, -1)
    assert torch.equal(measured.completed[:, :, :, :14], upper)
    assert Image.open(tmp_path / "demo.png").height > 10 * 28
    assert measured.colored.keys() == {"least_squares"}
    assert measured.colored["least_squares"].shape == (4, 6, 2, 28, 28)
    assert Image.open(tmp_path / "families.png").height > 6 * 28
    assert "6 garments, 4 draws each" in text.getvalue() and "consistency" in text.getvalue()


def test_time_limits_the_draws(tiny, ways, tmp_path):
    measured = demo(tmp_path, seconds=0.0, console=Console(file=io.StringIO()))
    assert [len(rates) for rates in measured.rates.values()] == [2, 4]
    assert measured.samples.shape == (8, 10, 1, 28, 28)


def test_visible_differences_are_no_result(tiny, tmp_path, monkeypatch):
    sample = ConditionalDiffusion.sample

    def wrong(self, *args, **kwargs):
        return sample(self, *args, **kwargs) + 0.01 * using_reference()

    monkeypatch.setattr(ConditionalDiffusion, "sample", wrong)
    with pytest.raises(RuntimeError, match=r"differ by 0\.01"):
        demo(tmp_path, seconds=0.0, console=Console(file=io.StringIO()))
    assert not (tmp_path / "demo.png").exists()


def test_command(tiny, tmp_path, monkeypatch, capsys):
    whole = study.demo
    monkeypatch.setattr(study, "demo", lambda *args, **kw: whole(*args, seconds=0.0, **kw))
    assert main(["demo", "--out", str(tmp_path), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "Samples per second" in out and "demo.png" in out
    assert re.search(rf"{LIBRARY}\s*│\s*[\d.e+]+\s*│\s*[\d.e+]+\s*│\s*[\d.e+]+\s*│\s*2 ", out)


@pytest.mark.slow
def test_shipped_model_draws_clothes(tmp_path):
    measured = demo(tmp_path, seconds=0.0, console=Console(file=io.StringIO()))
    labels = torch.arange(10).repeat(len(measured.samples))
    assert cgm.evaluation.classifier.class_accuracy(measured.samples.flatten(0, 1), labels) > 0.8
    completed = cgm.evaluation.classifier.class_accuracy(
        measured.completed.flatten(0, 1), torch.arange(10).repeat(len(measured.completed))
    )
    assert completed > 0.5
    assert (measured.translated - to_float(first_of_each_class())).abs().mean() < 0.2
    luminance = load_task("colorize", "test").batch(torch.arange(6))["cond"]
    scores = {name: color_scores(ab, luminance) for name, ab in measured.colored.items()}
    assert scores["least_squares"]["chroma"] < 0.05  # gray
    for family in ("mixture_density", "quantized_classifier"):  # speckled
        assert scores[family]["consistency"] < 0.3 and scores[family]["chroma"] > 0.9
    # One clean color.
    for family in ("vae", "autoregressive", "flow", "diffusion", "gan", "energy"):
        assert scores[family]["consistency"] > 0.95 and scores[family]["chroma"] > 0.9, family
        assert scores[family]["background"] < 0.2
    assert Path(tmp_path / "demo.png").exists()
