"""How samples compare with real images: of models that return what we know."""

import math
import sys
import types

import pytest
import torch
from PIL import Image
from torch import nn

from cgm.data import Dataset, load_task
from cgm.evaluation import sample_quality
from cgm.evaluation.classifier import load_classifier
from cgm.evaluation.features import ClassifierFeatures, InceptionFeatures, Pixels, load_features
from cgm.evaluation.likelihood import evaluate
from cgm.evaluation.metrics import (
    Kept,
    Memorization,
    Moments,
    PrecisionRecall,
    choose,
    frechet_distance,
    kernel_distance,
    standardize,
)
from cgm.evaluation.sample_quality import MEASURES, against_real, check_measures, write_nearest
from cgm.model import Model


def of_rows(dataset, rows):
    batch = dataset.batch(rows)
    return Dataset(dataset.name, batch["y"], batch["cond"], dataset.cond_kind, dataset.num_classes)


@pytest.fixture(scope="module")
def data():
    """Few of the shipped images: training, held out, and others that no one has seen."""
    training, test = load_task("class_to_image"), load_task("class_to_image", "test")
    parts = (training, 600), (test, 200)
    rest = test.batch(torch.arange(400, 1000))["y"]
    return *(of_rows(dataset, torch.arange(n)) for dataset, n in parts), rest


class Returns(Model):
    """A model whose sample of number i is image i."""

    def __init__(self, images):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.images, self.calls = images, []

    def sample(self, n=None, *, cond=None, seed, index=None, steps=1):
        if index is None:
            index = torch.arange(len(cond))
        if n is not None and cond is not None:
            index = index + torch.arange(n)[:, None] * 2**32
        self.calls.append((index.clone(), cond, seed, steps))
        rows, draws = index % 2**32, index // 2**32
        return self.images[(rows + 200 * draws) % len(self.images)]


def values(found):
    """{name: value}, with what it is of."""
    named, of = {}, ""
    for measure in found:
        of = of if measure.name.startswith("...") else measure.name
        named[measure.name if of == measure.name else f"{of} {measure.name}"] = measure
    return named


# What is measured ---------------------------------------------------------------------------------
def test_held_out_images_and_copies(data):
    """Copies win the Frechet distance; the memorization test tells them, and passes the others."""
    training, held_out, rest = data
    copied = training.y[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    found, names = {}, ("fd", "precision_recall", "memorization", "birthday")
    for name, images in (("real", rest), ("copies", copied)):
        result = against_real(
            Returns(images),
            training,
            held_out,
            ClassifierFeatures(),
            samples=300,
            measures=names,
        )
        found[name] = values(result.measures)
    real, copies = found["real"], found["copies"]
    assert copies["FD-classifier"].value < real["FD-classifier"].value
    assert copies["precision"].value > 0.75 and copies["recall"].value > 0.75
    for space in ("pixels", "classifier"):
        z = f"memorization z, {space}"
        assert copies[z].value < -10 and abs(real[z].value) < 3
        assert copies[z + " ... below 1 % quantile"].value == 1
        nearer = z + " ... nearer to training"
        assert copies[nearer].value == 1 and copies[nearer].floor == 600 / 800
        assert real[nearer].value == pytest.approx(0.75, abs=0.08)
    # Duplicates are looked for in whole batches, as many as are held out.
    assert {name for name, m in real.items() if m.rows != 300} == {
        name for name in real if name.startswith("duplicate")
    }


def test_the_measures_are_those_of_the_features(data):
    training, held_out, rest = data
    extractor = ClassifierFeatures()
    model = Returns(rest)
    result = against_real(model, training, held_out, extractor, samples=230, seed=5, steps=3)
    found = values(result.measures)
    # Image 200 is draw 1 of row 0.
    assert torch.equal(result.samples, rest[:200])
    assert torch.cat([call[0] for call in model.calls]).tolist() == [
        *range(200),
        *(row + 2**32 for row in range(30)),
    ]
    assert all(call[2:] == (5, 3) for call in model.calls)
    assert torch.equal(model.calls[1][1], held_out.cond[:30])

    real, ours, floor = (extractor(y).double() for y in (training.y, rest[:230], held_out.y))
    meters = []
    for rows in (real, ours, floor):
        meters.append(Moments())
        meters[-1].add(rows)
    fd = found["FD-classifier"]
    assert fd.value == pytest.approx(frechet_distance(meters[0], meters[1]))
    assert fd.floor == pytest.approx(frechet_distance(meters[0], meters[2]))
    assert (fd.rows, fd.reference, fd.floor_rows) == (230, 600, 200)
    kid = kernel_distance(
        standardize(real, meters[0]), standardize(ours, meters[0]), subsets=20, size=230, seed=5
    )
    assert found["KID-classifier"].value == pytest.approx(kid[0])
    assert found["KID-classifier ... sd over 20 subsets"].value == pytest.approx(kid[1])
    balls = PrecisionRecall(real[choose(600, 230, 5)])
    balls.add(ours)
    for name, value in balls.result()._asdict().items():
        assert found[name].value == pytest.approx(value) and found[name].reference == 230
    copying = Memorization(training.y.flatten(1), held_out.y.flatten(1))
    copying.add(rest[:230].flatten(1))
    assert found["memorization z, pixels"].value == pytest.approx(copying.result().z)
    assert found["IS-classifier"].value < 10 and found["IS-classifier"].floor_rows == 200


def test_duplicates(data):
    """A model with 40 images: each equals one in 40."""
    training, held_out, rest = data
    ids = torch.randint(40, (1000,), generator=torch.Generator().manual_seed(0))
    found = against_real(
        Returns(rest[ids]), training, held_out, Pixels(), samples=800, measures=("birthday",)
    )
    share, support = found.measures
    assert support.name == "... support, 1 / sum p^2"
    assert support.value == pytest.approx(40, rel=0.2) and share.value == 1 / support.value
    assert support.rows == 800 and share.floor < share.value / 10


def test_diversity_in_a_class(data):
    """1 of real images, more of samples of any class, 0 if all are one."""
    training, held_out, rest = data
    found = []
    for images in (held_out.batch(torch.arange(200))["y"], rest, rest[:1]):
        model = Returns(images)
        found += against_real(
            model, training, held_out, Pixels(), samples=200, measures=("conditions",)
        ).measures
    right, mixed, collapsed = found
    assert right.value == right.floor == pytest.approx(1, abs=0.1) and right.error > 0
    assert mixed.value > 1.2 and collapsed.value == 0


def test_samples_for_one_condition():
    """Draws y + 1, y + 2, y - 0.5, y + 4 of 16 values: distances 4, 8, 2, 16."""
    y = torch.arange(-15.0, 15)[:, None, None, None].expand(30, 1, 4, 4) * 10
    offsets = torch.tensor([1, 2, -0.5, 4]).repeat_interleave(200)
    samples = torch.cat([y, y[:1].expand(170, 1, 4, 4)]).repeat(4, 1, 1, 1)
    model = Returns(samples + offsets[:, None, None, None])
    pairs = Dataset("pairs", y, y, "image")
    found = values(against_real(model, pairs, pairs, Pixels(), samples=20).measures)
    assert found["distance to the real y"].value == pytest.approx(4)
    assert found["distance to the real y ... best of 4 samples"].value == pytest.approx(2)
    apart = 4 * (1 + 1.5 + 3 + 2.5 + 2 + 4.5) / 6
    assert found["distance of two samples"].value == pytest.approx(apart)
    assert not any("nearer" in name for name in found), "samples are near the y of their condition"


def test_parts_and_memory(data, monkeypatch):
    training, held_out, rest = data
    names = "fd", "memorization", "precision_recall"
    once = against_real(Returns(rest), training, held_out, Pixels(), samples=200, measures=names)
    monkeypatch.setattr(sample_quality, "_AT_ONCE", 37)
    parts = against_real(Returns(rest), training, held_out, Pixels(), samples=200, measures=names)
    for one, other in zip(once.measures, parts.measures, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-6) and one.name == other.name
    assert torch.equal(once.closest.nearest, parts.closest.nearest)
    assert torch.equal(once.first.samples, parts.first.samples)
    kept = []
    monkeypatch.setattr(sample_quality, "_HELD", 25)
    add = Kept.add
    monkeypatch.setattr(Kept, "add", lambda self, rows: (add(self, rows), kept.append(self.rows)))
    against_real(Returns(rest), training, held_out, Pixels(), samples=700, measures=("kid",))
    assert max(map(len, kept)) == 25


def test_samples_drawn_before_are_not_drawn_again(data):
    _, held_out, _ = data
    shipped_task = load_task("class_to_image", "test")
    with pytest.raises(ValueError, match=r"samples must have shape \(30, 1, 28, 28\)"):
        evaluate(Returns(held_out.y), shipped_task, rows=30, samples=held_out.y[:20])
    model = Returns(held_out.y)
    found = evaluate(
        model, shipped_task, rows=30, samples=shipped_task.batch(torch.arange(30))["y"]
    )
    assert model.calls == [] and found[0].value > 0.7


# The image ----------------------------------------------------------------------------------------
def test_nearest_neighbors_as_an_image(data, tmp_path):
    training, held_out, rest = data
    images = rest.clone()
    images[150:153] = training.y[77:80]
    result = against_real(
        Returns(images), training, held_out, Pixels(), samples=200, measures=("memorization",)
    )
    assert result.closest.nearest[:3].tolist() == [77, 78, 79]
    assert result.closest.conditions[:3].tolist() == [150, 151, 152]
    assert torch.equal(result.closest.samples[:3], training.y[77:80])
    assert torch.equal(result.first.samples, images[:8])
    every = (images[:8, None] - training.y).flatten(2).norm(dim=2)
    assert torch.equal(result.first.nearest, every.argmin(1))
    write_nearest(tmp_path / "a.png", result, training, held_out)
    assert Image.open(tmp_path / "a.png").height > 8 * 64


def test_images_of_the_tasks(tmp_path):
    """Colors are shown on their luminance, lower halves below the upper ones."""
    sizes = {}
    for task in ("colorize", "complete"):
        parts = [of_rows(load_task(task, split), torch.arange(40)) for split in ("train", "test")]
        model = Returns(parts[1].y)
        result = against_real(model, *parts, Pixels(), samples=20, measures=("memorization",))
        file = tmp_path / f"{task}.png"
        write_nearest(file, result, *parts, stacked=task == "complete")
        sizes[task] = Image.open(file).size
    assert sizes["complete"] == sizes["colorize"]


# Features -----------------------------------------------------------------------------------------
def test_features(data):
    images = data[2][:5]
    classifier = load_features(None, (1, 28, 28))
    model = load_classifier()
    assert classifier.name == "classifier" and len(classifier.fingerprint) == 8
    features = classifier(images)
    assert features.shape == (5, 648)
    with torch.no_grad():
        torch.testing.assert_close(classifier.probabilities(features), model(images).softmax(1))
    pixels = load_features(None, (2, 28, 28))
    assert pixels.name == "pixels" and pixels.probabilities(features) is None
    assert torch.equal(pixels(images), images.flatten(1))


class FakeInception(nn.Module):
    """Takes what torchmetrics' takes."""

    def __init__(self, name, features_list):
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return x.float().flatten(1)[:, :2048]


@pytest.fixture
def torchmetrics(monkeypatch):
    fake = types.ModuleType("torchmetrics.image.fid")
    fake.NoTrainInceptionV3 = FakeInception
    for name in ("torchmetrics", "torchmetrics.image"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", fake)
    return fake


def test_inception_is_given_levels_in_three_channels(torchmetrics, data):
    extractor = load_features("inception", (1, 28, 28))
    assert isinstance(extractor, InceptionFeatures)
    images = data[2][:3]
    levels = ((images + 1) * 127.5).round()
    features = extractor(images * 1.0000001)
    assert torch.equal(features, levels.expand(-1, 3, -1, -1).flatten(1)[:, :2048])
    assert extractor(torch.full((1, 1, 28, 28), 1.2)).max() == 255
    probabilities = extractor.probabilities(features / 255)
    assert probabilities.shape == (3, 1008)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))
    training, held_out, rest = data
    found = values(
        against_real(
            Returns(rest), training, held_out, extractor, samples=20, measures=("kid",)
        ).measures
    )
    assert "KID" in found


def test_inception_that_is_not_here(monkeypatch, torchmetrics):
    def no_weights(*args):
        raise OSError("no network")

    torchmetrics.NoTrainInceptionV3 = no_weights
    with pytest.raises(OSError, match="the weights of inception could not be downloaded: no netw"):
        load_features("inception", (3, 8, 8))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ValueError, match=r"inception needs torchmetrics\[image\], pip install"):
        load_features("inception", (3, 8, 8))


@pytest.mark.parametrize(
    "name, shape, words",
    [
        (
            "faces",
            (1, 28, 28),
            "features must be one of classifier, pixels, inception, got 'faces'",
        ),
        ("classifier", (3, 28, 28), "features must be pixels for y"),
        ("inception", (2, 28, 28), "features must be pixels for y"),
    ],
)
def test_features_that_do_not_fit(name, shape, words):
    with pytest.raises(ValueError, match=words):
        load_features(name, shape)


# Errors -------------------------------------------------------------------------------------------
def test_measures_that_do_not_fit(data):
    training, held_out, rest = data
    assert check_measures(None, held_out, ClassifierFeatures()) == MEASURES
    none = Dataset("images", rest)
    assert set(MEASURES) - set(check_measures(None, none, Pixels())) == {
        "inception_score",
        "conditions",
    }
    for names, words in (
        (("fid",), r"measures must be one of inception_score, fd, .*, got 'fid'"),
        (("inception_score",), "inception_score: it needs class probabilities, which pixels"),
    ):
        with pytest.raises(ValueError, match=words):
            against_real(Returns(rest), training, held_out, Pixels(), measures=names)
    with pytest.raises(ValueError, match="conditions: it needs classes or pairs of images"):
        against_real(Returns(rest), none, none, Pixels(), measures=("conditions",))
    with pytest.raises(ValueError, match="samples must be at least 20, got 19"):
        against_real(Returns(rest), training, held_out, Pixels(), samples=19)
    with pytest.raises(ValueError, match="must be finite"):
        against_real(Returns(rest * math.nan), training, held_out, Pixels(), measures=("fd",))


def test_a_model_without_condition(data):
    rest = data[2]
    model = Returns(rest[:200].repeat(4, 1, 1, 1))
    some = Dataset("images", rest[200:])
    model.sample = lambda n, seed, index: rest[index // 2**32]
    found = against_real(
        model, some, Dataset("more", rest[-50:]), Pixels(), samples=60, measures=("fd",)
    )
    assert torch.equal(found.samples, rest[:50]) and found.measures[0].rows == 60
