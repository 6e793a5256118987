"""Measures of generated pictures.

class_accuracy   share of pictures that a classifier, trained on real ones, puts in the asked class

`python -m cgm.evaluation FOLDER` makes that classifier: it trains for some minutes on one core and
writes the checkpoint that ships as cgm/data/checkpoints/fashion_classifier.
"""

import dataclasses
import functools
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from cgm.checkpoints import load_model, save_model, shipped
from cgm.data import load_task
from cgm.data.dataset import to_float
from cgm.families import make_model
from cgm.networks.classifier import Classifier, ClassifierConfig
from cgm.training import TrainingConfig, describe_data, train

CHECKPOINT = "fashion_classifier"
RECIPE = TrainingConfig(
    steps=3000,
    batch_size=64,
    learning_rate=3e-3,
    warmup=100,
    weight_decay=0.05,
    ema_decay=0.995,
    save_every=3000,
    log_every=100,
    threads=1,
)


@functools.cache
def load_classifier() -> Classifier:
    """The shipped classifier of the ten classes of clothes, on the CPU."""
    model = load_model(shipped(CHECKPOINT), expected_family=Classifier.family)
    assert isinstance(model, Classifier)
    return model


@torch.no_grad()
def class_accuracy(pictures: Tensor, labels: Tensor) -> float:
    """Share of pictures (N, 1, 28, 28), uint8 or in [-1, 1], that are put in class labels (N,)."""
    model = load_classifier()
    shape = (len(labels), *model.config.event_shape)
    if pictures.shape != shape or len(labels) == 0:
        raise ValueError(f"pictures must be {shape} with N > 0, got {tuple(pictures.shape)}")
    pictures = to_float(pictures).to("cpu", torch.float32)
    right = [
        model(part).argmax(1) == truth
        for part, truth in zip(pictures.split(500), labels.cpu().split(500), strict=True)
    ]
    return torch.cat(right).double().mean().item()


@functools.cache
def held_out_accuracy() -> float:
    """`class_accuracy` of the 1,000 real pictures that no model is trained on, to compare with."""
    dataset = load_task("class_to_image", "test")
    assert dataset.cond is not None
    return class_accuracy(dataset.y, dataset.cond)


def train_classifier(out: str | Path, config: TrainingConfig = RECIPE) -> None:
    """Trains the classifier on the 9,000 training pictures; writes its checkpoint in float16."""
    dataset = load_task("class_to_image")
    model = make_model(Classifier, ClassifierConfig(), seed=config.seed)
    with tempfile.TemporaryDirectory() as folder:
        average = train(model, dataset, config, folder)
    metadata = {"data": describe_data(dataset), "training": dataclasses.asdict(config)}
    save_model(out, average, metadata, dtype=torch.float16)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m cgm.evaluation FOLDER")
    train_classifier(sys.argv[1])
