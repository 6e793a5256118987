"""Models of cgm trained, sampled and scored from Python, without the command line.

Two families learn eight Gaussians on a circle from points alone: an autoregressive transformer,
which draws x and then y given x, and a mixture density, which draws both coordinates independently
and therefore cannot represent the circle. As the truth is known, a test can judge the samples: the
energy test asks whether drawn and true points have one distribution.

Prints for each family the p-value of that test, the smallest share of a Gaussian times 8 (of true
points: near 1) and the share of points that lie on a Gaussian (of true points: 0.989).
"""

import io
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from cgm.data import load_task
from cgm.evaluation.ground_truth import gaussian_scores
from cgm.families.autoregressive import AutoregressiveConfig, ConditionalTransformer
from cgm.families.regression import MixtureConfig, MixtureDensity
from cgm.model import make_model
from cgm.training import TrainingConfig, train

POINT = (2, 1, 1)  # a point of the plane as an image of one pixel with two channels
MODELS = {
    "autoregressive": (
        ConditionalTransformer,
        AutoregressiveConfig(
            event_shape=POINT, levels=64, width=32, heads=2, hidden=64, positions="learned"
        ),
    ),
    "mixture_density": (MixtureDensity, MixtureConfig(event_shape=POINT, width=16)),
}


def main(steps: int = 1000, points: int = 500) -> dict:
    """Trains, samples, scores and prints; returns the scores by family."""
    data = load_task("eight_gaussians")
    truth = load_task("eight_gaussians", "test").batch(torch.arange(points))["y"]
    training = TrainingConfig(
        steps=steps, batch_size=256, learning_rate=3e-3, warmup=50, ema_decay=0.99
    )
    found = {}
    for family, (model_class, config) in MODELS.items():
        model = make_model(model_class, config, seed=training.seed)
        with tempfile.TemporaryDirectory() as folder:  # name one to keep the model
            quiet = Console(file=io.StringIO())
            model = train(model, data, training, Path(folder) / family, console=quiet)
        samples = model.sample(points, seed=0)  # (points, 2, 1, 1)
        found[family] = gaussian_scores(samples, truth)
        print(f"{family}: " + ", ".join(f"{k} {v:.3f}" for k, v in found[family].items()))
    return found


if __name__ == "__main__":
    main()
