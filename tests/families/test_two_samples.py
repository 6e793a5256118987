"""Samples of every family on the eight Gaussians, against the truth.

The models in tests/data/eight_gaussians are those of `cgm compare --task eight_gaussians --seconds
120`, in half precision.
"""

from pathlib import Path

import pytest
import torch

from cgm.checkpoints import load_model, sampling_preset
from cgm.data import load_task
from cgm.evaluation.ground_truth import gaussian_scores
from cgm.studies.contests import CONTESTS

CONTEST = CONTESTS["eight_gaussians"]
FOLDER = Path(__file__).parents[1] / "data" / "eight_gaussians"
# The two coordinates of a point are independent in these, and in the truth they are not.
CANNOT = {"gaussian_regression", "mixture_density", "quantized_classifier"}


@pytest.mark.parametrize("entry", CONTEST.entries, ids=lambda entry: entry.family)
def test_samples_of_the_eight_gaussians_are_told_from_true_ones_only_where_they_must(entry):
    model = load_model(FOLDER / entry.family, expected_family=entry.family)
    points = model.sample(CONTEST.rows, seed=0, **sampling_preset(FOLDER / entry.family))
    true = load_task("eight_gaussians", "test").batch(torch.arange(CONTEST.rows))["y"]
    scores = gaussian_scores(points, true)
    if entry.family in CANNOT:
        assert scores["p-value"] < 0.02 and scores["on a Gaussian"] < 0.6
    else:
        assert scores["p-value"] > 0.05
        assert scores["on a Gaussian"] > 0.7 and scores["least share"] > 0.6
