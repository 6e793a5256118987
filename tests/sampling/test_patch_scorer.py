"""Scores of images: outputs, one graph for images of one shape."""

import copy
from unittest import mock

import pytest
import torch

import cgkernels
from cgkernels.testing import assert_within_budget, plain_and_modeled
from cgm.networks import patch_discriminator
from cgm.networks.patch_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from cgm.sampling.patch_scorer import PatchScorer, patch_scores
from tests.support import assert_equal

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def network(**changes) -> PatchDiscriminator:
    torch.manual_seed(0)
    config = {"in_channels": 3, "patch": 16, "width": 4, "norm": "instance", **changes}
    return PatchDiscriminator(PatchDiscriminatorConfig(**config)).eval()


def pair(rows=2, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, c, 20, 24, generator=generator) for c in (1, 2))
    return x.to(device), y.to(device)


def test_outputs():
    judge, (x, y) = network(), pair()
    scores = judge(x, y).detach()
    assert_equal(patch_scores(judge, x, y), scores)
    torch.testing.assert_close(patch_scores(judge, x, y, output="mean"), scores.mean((1, 2, 3)))
    features = patch_scores(judge, x, y, output="features")
    assert len(features) == 3 and torch.equal(features[-1], scores)
    both = torch.cat([x, y], 1)
    assert_equal(patch_scores(judge, both), scores)
    expected = cgkernels.patch_loss(scores, "hinge", "real").mean((1, 2, 3))
    losses = patch_scores(judge, x, y, loss="hinge", target="real")
    torch.testing.assert_close(losses, expected)
    assert not losses.requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [{}, {"output": "mean"}, {"output": "features"}, {"loss": "lsgan", "target": "fake"}],
    ids=["map", "mean", "features", "loss"],
)
def test_a_scorer_gives_the_scores_of_what_it_is_shown(device, options):
    judge = network().to(device)
    scorer = PatchScorer(judge, *pair(device=device), **options)
    for seed in (1, 2):
        x, y = pair(device=device, seed=seed)
        given, expected = scorer(x, y), patch_scores(judge, x, y, **options)
        torch.testing.assert_close(given, expected)
    kept = scorer(x, y)
    with torch.no_grad():
        judge.model["0"].weight.mul_(-2)  # not seen
    scorer(*pair(device=device, seed=3))
    torch.testing.assert_close(kept, expected)  # not overwritten
    torch.testing.assert_close(scorer(x, y), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("patch", [1, 34])
@pytest.mark.parametrize(
    "kind",
    [{"norm": "batch"}, {"norm": "instance"}, {"norm": "none", "spectral_norm": True},
     {"norm": "actnorm"}],
    ids=lambda kind: kind["norm"],
)  # fmt: skip
def test_frozen_networks_compute_the_same_with_other_weights(kind, patch, device):
    judge = network(patch=patch, **kind).to(device)
    for module in judge.modules():  # as after some training
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.uniform_(module.bias)
    wide, (x, y) = copy.deepcopy(judge).double(), pair(device=device)
    # A library may start a sum at the bias that folding made, beside which the terms are small.
    with mock.patch.object(patch_discriminator, "pack_conv", lambda conv, shape: conv):
        folded, wide_folded = judge.freeze(x, y), wide.freeze(x.double(), y.double())
    frozen = judge.freeze(x, y)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in frozen.modules())
    expected = wide.features(x.double(), y.double())
    torch.testing.assert_close(wide_folded.features(x.double(), y.double()), expected)
    plain = judge.features(x, y)
    _, modeled = plain_and_modeled(lambda: folded.features(x, y))
    for got, same, want, model in zip(frozen.features(x, y), plain, expected, modeled, strict=True):
        assert not got.requires_grad
        assert_within_budget(got, same.detach(), want.detach(), model.detach())
    half = judge.half() if device == "cuda" else None
    if half is not None:
        x, y = x.half(), y.half()
        torch.testing.assert_close(half.freeze(x, y)(x, y), half(x, y), rtol=0.02, atol=0.02)


def test_wrong_arguments():
    judge, (x, y) = network(), pair()
    for options, message in (
        ({"output": "logits"}, "output must be one of map, mean, features"),
        ({"loss": "hinge"}, "target must be given"),
        ({"target": "real"}, "loss must be given"),
        ({"output": "mean", "loss": "hinge", "target": "real"}, "output must be left out"),
        ({"loss": "l2", "target": "real"}, "loss must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            patch_scores(judge, x, y, **options)
    scorer = PatchScorer(judge, x, y)
    with pytest.raises(ValueError, match="y must be given"):
        scorer(x)
    with pytest.raises(ValueError, match=r"x must be torch.float32 \(2, 1, 20, 24\)"):
        scorer(x[:1], y)
    with pytest.raises(ValueError, match="y must be None"):
        PatchScorer(judge, torch.cat([x, y], 1))(torch.cat([x, y], 1), y)
    with pytest.raises(ValueError, match="network must be in evaluation mode"):
        PatchScorer(network().train(), x, y)
