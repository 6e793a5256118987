"""`cgm compare`: families on one task, trained for the same time and scored alike."""

import csv
import dataclasses
import json

import pytest
import torch
from PIL import Image
from rich.console import Console

from cgm.checkpoints import load_model
from cgm.data import TASKS, load_task
from cgm.model import config_class, family_class
from cgm.studies import compare as module
from cgm.studies.compare import compare, run_entry
from cgm.studies.contests import CONTESTS, Entry, entry_config
from cgm.training import TrainingConfig

TINY = {
    "diffusion": Entry(
        "diffusion",
        {"width": 8, "width_multipliers": (1,), "attention_depth": 0, "patch": 1},
        {"batch_size": 8},
        {"steps": 2},
    ),
    "gan": Entry("gan", {"patch": 1, "depth": 1, "latents": 2, "width": 4}, {"batch_size": 8}),
}


@pytest.fixture
def small(monkeypatch):
    """The contest of the eight Gaussians, with tiny networks and few points."""
    contest = dataclasses.replace(
        CONTESTS["eight_gaussians"], rows=20, entries=tuple(TINY.values())
    )
    monkeypatch.setitem(CONTESTS, "eight_gaussians", contest)
    return contest


def test_every_entry_fits_its_task():
    assert set(CONTESTS) <= set(TASKS)
    for task, contest in CONTESTS.items():
        dataset = load_task(task, "test")
        assert contest.rows <= len(dataset)
        assert len({entry.family for entry in contest.entries}) == len(contest.entries)
        for entry in contest.entries:
            model_class = family_class(entry.family)
            config = entry_config(entry, dataset)
            assert isinstance(config, config_class(model_class))
            TrainingConfig(**{**model_class.training_defaults, **entry.training})
            model_class.sampling_config(**entry.solver)


@pytest.mark.slow
def test_a_comparison_trains_once_and_then_loads(small, tmp_path):
    console = Console(record=True, width=120)
    results = compare("eight_gaussians", tmp_path, seconds=0.3, console=console)
    assert [result.family for result in results] == ["diffusion", "gan"]
    for result in results:
        # Each for about so long, whatever a step of it costs.
        assert 0.05 < result.training_seconds < 6 and result.steps >= 1
        model = load_model(tmp_path / result.family, expected_family=result.family)
        assert result.parameters == sum(p.numel() for p in model.parameters())
        assert result.samples_per_second > 0 and 0 < result.scores["p-value"] <= 1
    with (tmp_path / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["family"] for row in rows] == ["diffusion", "gan"]
    assert float(rows[0]["on a Gaussian"]) == round(results[0].scores["on a Gaussian"], 3)
    text = console.export_text()
    assert "least share" in text and "samples/s" in text and "20" in text
    with Image.open(tmp_path / "compare.png") as image:
        assert image.width > 3 * 64
    weights = (tmp_path / "gan" / "model.safetensors").read_bytes()
    again = run_entry("eight_gaussians", small, TINY["gan"], tmp_path / "gan", 0.3, "cpu")
    assert (tmp_path / "gan" / "model.safetensors").read_bytes() == weights
    assert again.scores == results[1].scores and again.steps == results[1].steps


def test_an_interrupted_training_leaves_nothing_that_passes_for_a_result(
    small, tmp_path, monkeypatch
):
    def stops(*args, **kwargs):
        (tmp_path / "gan.partial").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_train", stops)
    with pytest.raises(KeyboardInterrupt):
        run_entry("eight_gaussians", small, TINY["gan"], tmp_path / "gan", 1.0, "cpu")
    assert not (tmp_path / "gan").exists()
    monkeypatch.undo()
    result = run_entry("eight_gaussians", small, TINY["gan"], tmp_path / "gan", 0.1, "cpu")
    assert result.family == "gan"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gan"]


def test_what_does_not_fit_is_refused_before_anything_is_trained(small, tmp_path):
    for arguments, options, words in (
        (("paint", tmp_path), {}, "task must be one of colorize"),
        (("eight_gaussians", tmp_path), {"seconds": 0.0}, "seconds must be positive"),
        (
            ("eight_gaussians", tmp_path),
            {"families": ["vase"]},
            "families must be one of diff",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            compare(*arguments, **options)
    (tmp_path / "gan").mkdir()
    with pytest.raises(ValueError, match="is something else"):
        compare("eight_gaussians", tmp_path)
    (tmp_path / "gan" / "result.json").write_text(json.dumps({"seconds": 2.0}))
    with pytest.raises(ValueError, match="trained for 2 seconds, not 60"):
        compare("eight_gaussians", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gan"]


@pytest.mark.parametrize("task", CONTESTS)
def test_the_truth_scores_best_of_all(task):
    """Scores are worth what they say of the true rows themselves."""
    contest = CONTESTS[task]
    held_out = load_task(task, "test").batch(torch.arange(contest.rows))
    true = load_task(task, "test" if held_out["cond"] is not None else "train")
    y = held_out["y"] if held_out["cond"] is not None else true.y[: contest.rows]
    scores = contest.score(torch.stack([y] * min(contest.draws, 2)), held_out)
    expected = {"p-value": 0.05, "least share": 0.5, "on a Gaussian": 0.96, "on its moon": 0.98,
                "chroma": 0.999, "consistency": 0.999, "right speed": 0.95,
                "in the class": 0.85}  # fmt: skip
    zero = {"best of n": 1e-6, "error": 1e-6} if "error" in scores else {}
    checked = [name for name in expected if name in scores]
    assert checked or zero
    assert all(scores[name] > expected[name] for name in checked)
    assert all(scores[name] < most for name, most in zero.items())
