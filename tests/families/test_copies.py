"""Models after use: copied, pickled, compiled, called; and gradients of each row."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from cgm.model import FAMILIES
from cgm.sampling.patch_scorer import PatchScorer
from tests.families.test_precision import lively
from tests.families.test_protocol import CONDS, STEPS, images, kinds_of
from tests.networks.test_patch_networks import discriminator, resnet, unet
from tests.networks.test_patch_networks import images as random_images


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = (copy.deepcopy, pickled, saved)


@pytest.mark.parametrize("made_of", COPIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_of_a_used_model_draw_the_same(family, made_of):
    kind = kinds_of(family)[-1]
    model, cond = lively(family, kind), CONDS[kind]
    for phase in model.phases:
        model.train().loss(images, cond=cond, phase=phase, seed=0)["total"].sum().backward()
    model.eval()

    def results(model):
        phase = model.phases[-1]
        found = [*model.loss(images, cond=cond, phase=phase, seed=1).values()]
        if model.sampling_config is not None:
            found.append(model.sample(2, cond=cond, seed=1, **STEPS.get(family, {})))
        return found

    expected = results(model)
    for value, right in zip(results(made_of(model)), expected, strict=True):
        assert torch.equal(value, right)
    model.compile_networks("default")  # nothing is compiled before a call
    for value, right in zip(results(made_of(model).eval()), expected, strict=True):
        assert torch.equal(value, right)


@pytest.mark.parametrize("made_of", COPIES)
def test_copies_of_used_networks(made_of):
    x = random_images(2, 3, 16, 16)
    networks = [
        unet(), resnet(), discriminator(patch=16), discriminator(patch=16, spectral_norm=True),
        discriminator(patch=16, norm="actnorm"), discriminator(patch=16).eval().freeze(x),
    ]  # fmt: skip
    for network in networks:
        if any(p.requires_grad for p in network.parameters()):
            network.train()(x).sum().backward()
        expected = network.eval()(x)
        assert torch.equal(made_of(network)(x), expected)
    network = discriminator(patch=16).eval()
    expected = network(x)
    scorer = PatchScorer(network, x)
    torch.testing.assert_close(scorer(x), expected)
    if made_of is copy.deepcopy:
        torch.testing.assert_close(copy.deepcopy(scorer)(x), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_called_is_its_loss(family):
    if family == "classifier":  # whose call gives logits
        return
    kind = kinds_of(family)[-1]
    model, cond = lively(family, kind), CONDS[kind]
    for phase in model.phases:
        found = model(images, cond=cond, phase=phase, seed=3)
        expected = model.loss(images, cond=cond, phase=phase, seed=3)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.equal(value, expected[name])


SLOW = ("autoregressive", "cyclegan", "diffusion", "energy", "flow")


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name in FAMILIES
        if name != "classifier"
    ],
)
def test_compiled_losses(family):
    kind = kinds_of(family)[-1]
    model, cond = lively(family, kind), CONDS[kind]
    for phase in model.phases:
        for call in (model, model.loss):
            torch._dynamo.reset()
            expected = gradients(model, model, phase, cond)
            compiled = torch.compile(call, backend="aot_eager")
            for found, right in zip(gradients(compiled, model, phase, cond), expected, strict=True):
                torch.testing.assert_close(found, right)


def gradients(call, model, phase, cond):
    model.zero_grad()
    total = call(images, cond=cond, phase=phase, seed=3)["total"]
    total.sum().backward()
    return [total.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


# Families whose losses have no op of which there is no gradient in torch.func.
BY_ROW = (
    "autoencoder", "autoregressive", "gaussian_regression", "least_squares", "mixture_density",
    "quantized_classifier",
)  # fmt: skip


@pytest.mark.parametrize("family", BY_ROW)
def test_gradients_of_each_row(family):
    kind = "class"
    model, cond = lively(family, kind), CONDS[kind]
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, y, cond, index):
        given = {"cond": cond[None], "seed": 0, "index": index[None]}
        return functional_call(model, parameters, (y[None],), given)["total"][0]

    index = torch.arange(len(images))
    found = vmap(grad(loss), in_dims=(None, 0, 0, 0))(parameters, images, cond, index)
    for row in range(len(images)):
        model.zero_grad()
        model.loss(images[row : row + 1], cond=cond[row : row + 1], seed=0)[
            "total"
        ].sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][row], parameter.grad, atol=1e-5, rtol=1e-4)
