"""The classifier that generated pictures are judged by: shipped, small, right, and made again."""

import dataclasses
import runpy
import sys

import pytest
import torch
import torch.nn.functional as F

from cgm.checkpoints import load_model, read_config, shipped
from cgm.data import Dataset, load_task
from cgm.evaluation import likelihood as evaluation
from cgm.evaluation.classifier import Classifier, ClassifierConfig
from cgm.evaluation.likelihood import (
    bits_per_dimension,
    class_accuracy,
    evaluate,
    held_out_accuracy,
    load_classifier,
    train_classifier,
)
from cgm.families.autoregressive import AutoregressiveConfig, ConditionalTransformer, dequantize
from cgm.families.diffusion import ConditionalDiffusion, DiffusionConfig
from cgm.families.gan import Pix2Pix, Pix2PixConfig
from cgm.model import make_model
from cgm.training import TrainingConfig, train


@pytest.fixture(scope="module")
def held_out():
    dataset = load_task("class_to_image", "test")
    return dataset.y, dataset.cond


def test_shipped_classifier():
    folder = shipped(evaluation.CHECKPOINT)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 200_000
    assert TrainingConfig(**read_config(folder)["training"]) == evaluation.RECIPE
    assert held_out_accuracy() >= 0.88
    assert load_classifier() is load_classifier()


def test_class_accuracy(held_out):
    pictures, labels = held_out
    accuracy = held_out_accuracy()
    assert class_accuracy(pictures.float() / 127.5 - 1, labels) == pytest.approx(accuracy)
    assert class_accuracy(pictures, (labels + 1) % 10) < 0.1
    right = [class_accuracy(pictures[labels == c], labels[labels == c]) for c in range(10)]
    assert sum(right) / 10 == pytest.approx(accuracy)
    assert class_accuracy(torch.full((20, 1, 28, 28), -1.0), torch.arange(20) // 2) == 0.1


@pytest.mark.parametrize("shape, n", [((4, 28, 28), 4), ((4, 1, 28, 28), 3), ((0, 1, 28, 28), 0)])
def test_class_accuracy_errors(shape, n):
    with pytest.raises(ValueError, match=r"pictures must be \(\d, 1, 28, 28\) with N > 0, got"):
        class_accuracy(torch.zeros(shape), torch.zeros(n, dtype=torch.int64))


def test_recipe_gives_the_same_bytes_each_time(tmp_path):
    config = dataclasses.replace(evaluation.RECIPE, steps=3, batch_size=8)
    files = []
    for name in ("a", "b"):
        torch.manual_seed(len(files))
        train_classifier(tmp_path / name, config)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_command_line_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cgm.evaluation.likelihood"])
    with pytest.raises(SystemExit, match=r"^usage: python -m cgm\.evaluation FOLDER$"):
        runpy.run_module("cgm.evaluation.likelihood", run_name="__main__")


# The network --------------------------------------------------------------------------------------
def test_augmentation_shifts_and_mirrors(held_out):
    pictures = held_out[0][:200].float() / 127.5 - 1
    reach = 1
    model = Classifier(ClassifierConfig(shift=reach))
    index = torch.arange(200) + 2**40
    augmented = model._augment(pictures, 3, index)
    padded = F.pad(pictures, (reach,) * 4, value=-1.0)
    places = range(2 * reach + 1)
    variants = [padded[:, :, i : i + 28, j : j + 28] for i in places for j in places]
    variants += [variant.flip(3) for variant in variants]
    found = torch.stack([(v == augmented).flatten(1).all(1) for v in variants])
    assert found.any(0).all()
    counts = (found & (found.sum(0) == 1)).sum(1)
    assert (counts > 0).all(), "every shift, both ways round"
    alone = model._augment(pictures[7:8], 3, index[7:8])
    assert torch.equal(alone, augmented[7:8])


def test_without_augmentation(held_out):
    pictures, labels = held_out[0][:8].float() / 127.5 - 1, held_out[1][:8]
    model = Classifier(ClassifierConfig(shift=0, mirror=False, label_smoothing=0.0))
    assert torch.equal(model._augment(pictures, 0, None), pictures)
    loss = model.loss(pictures, cond=labels, seed=0)
    torch.testing.assert_close(
        loss["total"], -model(pictures).log_softmax(1)[torch.arange(8), labels]
    )
    assert torch.equal(loss["error"], (model(pictures).argmax(1) != labels).float())
    with pytest.raises(ValueError, match="cond must be given"):
        model.loss(pictures, seed=0)


def test_other_sizes():
    config = ClassifierConfig(event_shape=(3, 20, 33), num_classes=4, width=(8, 16), pools=1)
    model = Classifier(config)
    loss = model.loss(torch.zeros(2, 3, 20, 33), cond=torch.tensor([0, 3]), seed=1)
    assert loss["total"].shape == (2,) and model(torch.zeros(0, 3, 20, 33)).shape == (0, 4)


# Likelihood ---------------------------------------------------------------------------------------
def stripes(rows, seed=0):
    """Pictures of four values in stripes, with noise, whose condition is the phase."""
    generator = torch.Generator().manual_seed(seed)
    phase = torch.randint(4, (rows,), generator=generator)
    value = (torch.arange(16) + phase[:, None]) % 4
    noise = torch.rand(rows, 16, generator=generator) < 0.1
    value = torch.where(noise, torch.randint(4, (rows, 16), generator=generator), value)
    pictures = ((dequantize(value, 4, (1, 4, 4)) + 1) * 127.5).round().to(torch.uint8)
    return Dataset("stripes", pictures, phase, "class", 4)


def untrained():
    config = AutoregressiveConfig(
        event_shape=(1, 4, 4), cond_kind="class", num_classes=4, levels=4, depth=2, width=32,
        heads=2, hidden=64,
    )  # fmt: skip
    return make_model(ConditionalTransformer, config).eval()


def test_bits_per_dimension_is_minus_log_prob():
    model, data = untrained(), stripes(120)
    batch = data.batch(torch.arange(120))
    bits = bits_per_dimension(model, batch["y"], batch["cond"])
    nats = -model.log_prob(batch["y"], cond=batch["cond"]).double()
    torch.testing.assert_close(bits, nats / (16 * torch.tensor(2.0).double().log()))
    assert abs(bits.mean() - 2) < 0.2  # four values, nothing learned


def test_training_lowers_the_bits_and_uses_the_condition(tmp_path):
    held_out = stripes(200, seed=1)
    before = {m.name: m for m in evaluate(untrained(), held_out, rows=100)}
    training = TrainingConfig(
        steps=250, batch_size=32, learning_rate=3e-3, warmup=20, ema_decay=0.9, threads=1
    )
    model = train(untrained(), stripes(1000), training, tmp_path)
    after = {m.name: m for m in evaluate(model, held_out, rows=100)}
    bits = "bits per dimension, held out"
    assert after[bits].value < before[bits].value - 0.5
    assert after[bits].error > 0 and after[bits].rows == 100
    assert after["... given another's condition"].value > after[bits].value + 0.02
    own, other = "bits per dimension, samples", "... drawn given another's condition"
    assert after[own].value < after[other].value - 0.02
    lost = after["... of 8 bits, what is lost"]
    assert abs(lost.value) < 0.05
    assert after["... with weights of 8 bits"].value == pytest.approx(
        after[bits].value + lost.value
    )


def test_class_accuracy_of_samples(monkeypatch):
    drawn = []

    def sample(self, n=None, *, cond, seed, steps):
        drawn.append((seed, steps))
        real = load_task("class_to_image", "test")
        return real.batch(torch.arange(len(cond)))["y"]

    monkeypatch.setattr(ConditionalDiffusion, "sample", sample)
    config = DiffusionConfig(cond_kind="class", num_classes=10, width=8, heads=2)
    model = make_model(ConditionalDiffusion, config)
    held_out = load_task("class_to_image", "test")
    samples, real = evaluate(model, held_out, rows=300, seed=4, steps=5)
    assert drawn == [(4, 5)] and samples.rows == 300 and samples.error is None
    assert samples.value == class_accuracy(held_out.y[:300], held_out.cond[:300])
    assert real.value == held_out_accuracy()
    with pytest.raises(ValueError, match="rows must be from 2 to 1000, got 1001"):
        evaluate(model, held_out, rows=1001)
    with pytest.raises(ValueError, match="model must have likelihoods, make pictures"):
        evaluate(model, stripes(10), rows=5)


def test_distances_of_pictures_made_of_pictures(monkeypatch):
    """Of a model that answers with the condition itself."""
    monkeypatch.setattr(Pix2Pix, "sample", lambda self, n, *, cond, seed, **solver: cond)
    shape = {"event_shape": (1, 4, 4), "cond_shape": (1, 4, 4), "generator": "resnet"}
    model = make_model(Pix2Pix, Pix2PixConfig(**shape, depth=1, width=4, patch=1))
    y = torch.stack([torch.full((1, 4, 4), v) for v in (0.0, 0.5, 1.0)])
    own, other = evaluate(model, Dataset("greys", y, y - 0.25, "image"), rows=3)
    assert (own.name, own.value, own.rows) == ("mean absolute error", pytest.approx(0.25), 3)
    # y - roll(y) + 0.25 is -0.75, 0.75 and 0.75.
    assert (other.name, other.value) == ("... of another's", pytest.approx(0.75))


@torch.no_grad()
def test_shipped_model_knows_lower_halves_by_their_upper_ones():
    model = load_model(shipped("complete_autoregressive"))
    found = {m.name: m.value for m in evaluate(model, load_task("complete", "test"), rows=24)}
    assert found["bits per dimension, held out"] < 1.3  # of at most 4
    assert found["... given another's condition"] > found["bits per dimension, held out"] + 0.05
    own, other = "bits per dimension, samples", "... drawn given another's condition"
    assert found[other] > found[own] + 0.05
