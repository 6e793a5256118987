"""The classifier that generated images are judged by: shipped, small, right, and made again."""

import dataclasses
import runpy
import sys

import pytest
import torch
import torch.nn.functional as F

from cgm.checkpoints import read_config, shipped
from cgm.data import load_task
from cgm.evaluation.classifier import (
    CHECKPOINT,
    RECIPE,
    Classifier,
    ClassifierConfig,
    class_accuracy,
    held_out_accuracy,
    load_classifier,
    train_classifier,
)
from cgm.training import TrainingConfig


@pytest.fixture(scope="module")
def held_out():
    dataset = load_task("class_to_image", "test")
    return dataset.y, dataset.cond


def test_shipped_classifier():
    folder = shipped(CHECKPOINT)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 200_000
    assert TrainingConfig(**read_config(folder)["training"]) == RECIPE
    assert held_out_accuracy() >= 0.88
    assert load_classifier() is load_classifier()


def test_class_accuracy(held_out):
    images, labels = held_out
    accuracy = held_out_accuracy()
    assert class_accuracy(images.float() / 127.5 - 1, labels) == pytest.approx(accuracy)
    assert class_accuracy(images, (labels + 1) % 10) < 0.1
    right = [class_accuracy(images[labels == c], labels[labels == c]) for c in range(10)]
    assert sum(right) / 10 == pytest.approx(accuracy)
    assert class_accuracy(torch.full((20, 1, 28, 28), -1.0), torch.arange(20) // 2) == 0.1


@pytest.mark.parametrize("shape, n", [((4, 28, 28), 4), ((4, 1, 28, 28), 3), ((0, 1, 28, 28), 0)])
def test_class_accuracy_errors(shape, n):
    with pytest.raises(ValueError, match=r"images must be \(\d, 1, 28, 28\) with N > 0, got"):
        class_accuracy(torch.zeros(shape), torch.zeros(n, dtype=torch.int64))


def test_recipe_gives_the_same_bytes_each_time(tmp_path):
    config = dataclasses.replace(RECIPE, steps=3, batch_size=8)
    files = []
    for name in ("a", "b"):
        torch.manual_seed(len(files))
        train_classifier(tmp_path / name, config)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_command_line_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cgm.evaluation.classifier"])
    with pytest.raises(SystemExit, match=r"^usage: python -m cgm\.evaluation\.classifier FOLDER$"):
        runpy.run_module("cgm.evaluation.classifier", run_name="__main__")


# The network --------------------------------------------------------------------------------------
def test_augmentation_shifts_and_mirrors(held_out):
    images = held_out[0][:200].float() / 127.5 - 1
    reach = 1
    model = Classifier(ClassifierConfig(shift=reach))
    index = torch.arange(200) + 2**40
    augmented = model._augment(images, 3, index)
    padded = F.pad(images, (reach,) * 4, value=-1.0)
    places = range(2 * reach + 1)
    variants = [padded[:, :, i : i + 28, j : j + 28] for i in places for j in places]
    variants += [variant.flip(3) for variant in variants]
    found = torch.stack([(v == augmented).flatten(1).all(1) for v in variants])
    assert found.any(0).all()
    counts = (found & (found.sum(0) == 1)).sum(1)
    assert (counts > 0).all(), "every shift, both ways round"
    alone = model._augment(images[7:8], 3, index[7:8])
    assert torch.equal(alone, augmented[7:8])


def test_without_augmentation(held_out):
    images, labels = held_out[0][:8].float() / 127.5 - 1, held_out[1][:8]
    model = Classifier(ClassifierConfig(shift=0, mirror=False, label_smoothing=0.0))
    assert torch.equal(model._augment(images, 0, None), images)
    loss = model.loss(images, cond=labels, seed=0)
    torch.testing.assert_close(
        loss["total"], -model(images).log_softmax(1)[torch.arange(8), labels]
    )
    assert torch.equal(loss["error"], (model(images).argmax(1) != labels).float())
    with pytest.raises(ValueError, match="cond must be given"):
        model.loss(images, seed=0)


def test_other_sizes():
    config = ClassifierConfig(event_shape=(3, 20, 33), num_classes=4, width=(8, 16), pools=1)
    model = Classifier(config)
    loss = model.loss(torch.zeros(2, 3, 20, 33), cond=torch.tensor([0, 3]), seed=1)
    assert loss["total"].shape == (2,) and model(torch.zeros(0, 3, 20, 33)).shape == (0, 4)
