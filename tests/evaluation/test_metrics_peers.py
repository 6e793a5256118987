"""The measures beside torchmetrics, prdc and scipy, on the same random features."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cgm.evaluation.metrics import (
    InceptionScore,
    Memorization,
    Moments,
    PrecisionRecall,
    best_of_n,
    diversity,
    frechet_distance,
    kernel_distance,
    nearest,
)
from tests.support import Peer

fid = Peer("torchmetrics.image.fid")
inception = Peer("torchmetrics.image.inception")
kid = Peer("torchmetrics.image.kid")
linalg = Peer("scipy.linalg")
distance = Peer("scipy.spatial.distance")
stats = Peer("scipy.stats")
prdc = Peer("prdc")
pytestmark = [
    pytest.mark.peers("torchmetrics", "scipy", "prdc"),
    pytest.mark.filterwarnings("ignore:Metric `.*` will save all extracted:UserWarning"),
]


class Flat(nn.Module):
    """Features that are the images themselves; torchmetrics asks it for their number."""

    num_features = 16

    def forward(self, images):
        return images.flatten(1)


@pytest.fixture(scope="module")
def features():
    """Real and generated rows that differ in mean, scale and correlation."""
    real, generated = (
        np.random.default_rng(i).standard_normal((n, 16)) for i, n in enumerate((300, 250))
    )
    mix = np.random.default_rng(2).standard_normal((16, 16)) / 8
    return torch.from_numpy(real).float(), torch.from_numpy(
        generated @ (np.eye(16) + mix) + 0.2
    ).float()


def moments(rows):
    found = Moments()
    for part in rows.split(77):
        found.add(part)
    return found


def result(meter, rows):
    for part in rows.split(77):
        meter.add(part)
    return meter.result()


def as_images(rows):
    return rows.reshape(-1, 1, 4, 4)


def test_frechet_distance(features):
    real, generated = features
    ours = frechet_distance(moments(real), moments(generated))
    metric = fid.FrechetInceptionDistance(Flat(), normalize=True, input_img_size=(1, 4, 4))
    metric.set_dtype(torch.float64)
    metric.update(as_images(real), real=True)
    metric.update(as_images(generated), real=False)
    assert ours == pytest.approx(metric.compute().item(), rel=1e-4)
    covariances = [np.cov(rows.double().numpy(), rowvar=False) for rows in features]
    apart = (real.double().mean(0) - generated.double().mean(0)).square().sum().item()
    shared = np.trace(linalg.sqrtm(covariances[0] @ covariances[1])).real
    expected = apart + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * shared
    assert ours == pytest.approx(expected, rel=1e-9)


def test_kernel_distance(features):
    """Of subsets that hold all rows, in whatever order: torchmetrics draws its own."""
    real, generated = (rows[:250] for rows in features)
    metric = kid.KernelInceptionDistance(Flat(), subsets=2, subset_size=250)
    metric.update(as_images(real), real=True)
    metric.update(as_images(generated), real=False)
    ours, deviation = kernel_distance(real, generated, subsets=2, size=250)
    assert ours == pytest.approx(metric.compute()[0].item(), rel=1e-4) and deviation < 1e-12


def test_kernel_distance_of_subsets(features):
    """The mean over many subsets, of which each library draws others."""
    real, generated = features
    metric = kid.KernelInceptionDistance(Flat(), subsets=200, subset_size=100)
    metric.update(as_images(real), real=True)
    metric.update(as_images(generated), real=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mean, deviation = (v.item() for v in metric.compute())
    ours = kernel_distance(real, generated, subsets=200, size=100)
    assert abs(ours[0] - mean) < 3 * deviation * math.sqrt(2 / 200)
    assert ours[1] == pytest.approx(deviation, rel=0.2)


@pytest.mark.parametrize("splits", [2, 10])
def test_inception_score(features, splits):
    """With the rows in the order that torchmetrics' permutation makes our splits of."""
    logits = features[0] * 2
    score = InceptionScore(splits)
    split = score._split_of(torch.arange(len(logits)))
    metric = inception.InceptionScore(Flat(), splits=splits)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        place = torch.randperm(len(logits)).argsort()
        metric.update(as_images(logits[split.argsort(stable=True)][place]))
        torch.manual_seed(0)
        mean, deviation = (v.item() for v in metric.compute())
    ours = result(score, logits.softmax(1))
    assert ours[0] == pytest.approx(mean, rel=1e-4)
    # Theirs is the deviation of a sample.
    assert ours[1] == pytest.approx(deviation * math.sqrt(1 - 1 / splits), rel=1e-4)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_recall_density_coverage(features, k):
    """prdc has one k, and < throughout: of random features there are no ties."""
    ours = result(PrecisionRecall(features[0], k=k, density_k=k), features[1])
    theirs = prdc.compute_prdc(features[0].double().numpy(), features[1].double().numpy(), k)
    assert ours._asdict() == pytest.approx(theirs, rel=1e-9)


def test_memorization(features):
    """scipy's U and one-sided p; it corrects for ties, of which there are none."""
    training, unseen, generated = features[0][:150], features[0][150:], features[1]
    z = result(Memorization(training, unseen), generated).z
    far = [distance.cdist(rows.double(), training.double()).min(1) for rows in (generated, unseen)]
    theirs = stats.mannwhitneyu(*far, alternative="less", method="asymptotic", use_continuity=False)
    n, m = len(generated), len(unseen)
    assert z == pytest.approx(
        (theirs.statistic - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12), rel=1e-9
    )
    assert stats.norm.cdf(z) == pytest.approx(theirs.pvalue, rel=1e-6)


def test_nearest(features):
    every = distance.cdist(features[1].double(), features[0].double())
    found = nearest(features[1], features[0])
    np.testing.assert_allclose(found[0], every.min(1), rtol=1e-9)
    np.testing.assert_array_equal(found[1], every.argmin(1))


def test_diversity_and_best_of_n(features):
    rows = features[0].double().numpy()
    assert diversity(features[0]) == pytest.approx(distance.pdist(rows).mean(), rel=1e-9)
    expected = np.minimum.accumulate(rows, 0).mean(1)
    np.testing.assert_allclose(best_of_n(features[0]), expected, rtol=1e-9)
