"""A sample that has no distribution is NaN or an error, never an image that looks like one."""

import math

import pytest
import torch

from cgm.model import FAMILIES
from tests.families.test_precision import devices, lively
from tests.families.test_protocol import CONDS, STEPS, every, images, kinds_of, made

# family, kind, fields of its config, solver options: ways to draw that could pass over a NaN
VARIANTS = [
    ("diffusion", "class", {"learned_variance": True}, {"sampler": "ddpm", "guidance": 2.0}),
    ("diffusion", "none", {}, {"sampler": "dpmpp_2m"}),
    ("flow", "none", {"levels": 0}, {}),
    ("least_squares", "class", {"error": "l1"}, {}),
    ("mixture_density", "class", {}, {"temperature": 0.0}),
    ("mixture_density", "none", {}, {"temperature": 0.5}),
    ("pix2pix", "image", {"norm": "batch"}, {}),
    ("pix2pix", "image", {"norm": "none"}, {}),
    ("pix2pix", "image", {"generator": "resnet", "depth": 1, "dropout": True}, {}),
    ("quantized_classifier", "class", {}, {"temperature": 0.0}),
    ("quantized_classifier", "none", {}, {"temperature": 0.5}),
    ("vae", "class", {"prior": "learned"}, {"noise": True}),
    ("vae", "image", {"likelihood": "bernoulli"}, {}),
    ("vae", "image", {"likelihood": "bernoulli"}, {"noise": True}),
    ("vae", "none", {"likelihood": "discretized_logistic"}, {}),
    ("vae", "none", {"likelihood": "discretized_logistic", "learn_scale": True}, {"noise": True}),
]
CASES = [(f, k, {}, STEPS.get(f, {})) for f in FAMILIES for k in kinds_of(f)] + [
    (f, k, fields, STEPS.get(f, {}) | options) for f, k, fields, options in VARIANTS
]
cases = pytest.mark.parametrize(("family", "kind", "fields", "options"), CASES)


@cases
@devices
def test_nan_weights_never_give_an_image(family, kind, fields, options, device):
    model = lively(family, kind, **fields).to(device)
    if model.sampling_config is None:
        return
    cond = None if CONDS[kind] is None else CONDS[kind].to(device)
    clean, spoiled = model.sample(2, cond=cond, seed=1, **options), 0
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        with torch.no_grad():
            place = (0,) * tensor.dim()
            first = tensor[place].clone()
            tensor[place] = math.nan
            drawn = model.sample(2, cond=cond, seed=1, **options)
            tensor[place] = first
        kept = (drawn - clean).abs() < 1e-4  # of another class, or by no way from this weight
        assert (kept | drawn.isnan()).all()
        spoiled += not kept.all()
    assert spoiled


@pytest.mark.parametrize("kind", ["none", "class"])
def test_nan_weights_never_give_a_prediction(kind):
    for family in ("quantized_classifier", "mixture_density", "gaussian_regression"):
        model = lively(family, kind)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(math.nan)
        assert model.predict(cond=CONDS[kind]).isnan().all()
        if family == "quantized_classifier":
            for temperature in (0.0, 0.5):
                assert model.predict(cond=CONDS[kind], temperature=temperature).isnan().all()


@every
def test_nan_weights_never_give_a_likelihood(family, kind):
    model, cond = lively(family, kind), CONDS[kind]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    for phase in model.phases:
        assert model.loss(images, cond=cond, phase=phase, seed=0)["total"].isnan().all()
    names = {"exact": ("log_prob",), "bound": ("elbo",), "energy": ("energy",), None: ()}
    for name in names[model.density]:
        assert getattr(model, name)(images, cond=cond).isnan().all()


def test_classes_that_were_never_seen_have_probability_0_and_are_no_nan():
    model = made("quantized_classifier", "none")
    model.fit(images.clamp(0.6, 1.0))  # only the last of four bins
    for temperature in (0.0, 0.5, 1.0):
        assert model.sample(5, temperature=temperature).unique().numel() == 1
