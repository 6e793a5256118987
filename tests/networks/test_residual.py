"""The residual networks that families share."""

import pytest
import torch

from cgm.model import ImageConfig
from cgm.networks.residual import ConditionPlanes, ResidualEncoder, ResidualUNet

CONFIGS = {
    "none": ImageConfig((2, 1, 1)),
    "class": ImageConfig((1, 7, 12), "class", 5),
    "image": ImageConfig((2, 9, 8), "image", 0, (3, 9, 8)),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_networks_take_any_condition_and_any_sides(kind):
    config = CONFIGS[kind]
    cond = {"none": None, "class": torch.tensor([4, 0, 4]), "image": torch.randn(3, 3, 9, 8)}[kind]
    planes = ConditionPlanes(config)
    x = planes(cond, 3)
    assert x.shape == (3, planes.planes, *config.event_shape[1:])
    if kind == "class":
        assert torch.equal(x[0], x[2]) and not torch.equal(x[0], x[1])
    depth = 1 if config.event_shape[1] == 1 else 3
    unet = ResidualUNet(planes.planes, 7, width=8, depth=depth, blocks=2, start_at_zero=False)
    encoder = ResidualEncoder(planes.planes, config.event_shape[1:], 4, width=8, depth=depth)
    assert unet(x).shape == (3, 7, *config.event_shape[1:])
    assert encoder(x).shape == (3, 4)


def test_a_vector_modulates_every_block_of_the_unet():
    unet = ResidualUNet(3, 2, width=8, depth=2, features=5, start_at_zero=False)
    x, vector = torch.randn(2, 3, 6, 6), torch.randn(2, 5)
    assert unet.film is not None and sum(unet.film_sizes) == unet.film.out_features
    drawn = [unet(x, vector), unet(x, vector + 1)]
    assert not torch.allclose(*drawn)
    drawn[0].sum().backward()
    parts = unet.film.weight.grad.split(unet.film_sizes)
    assert all(part.abs().sum() > 0 for part in parts)


def test_an_untrained_unet_predicts_zero():
    unet = ResidualUNet(3, 2, width=8, depth=2)
    assert not unet(torch.randn(2, 3, 5, 5)).any()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"event_shape": (28, 28)}, "event_shape"),
        ({"cond_kind": "text"}, "cond_kind"),
        ({"cond_kind": "class"}, "num_classes"),
        ({"num_classes": 3}, "num_classes"),
        ({"cond_kind": "image", "cond_shape": (1, 14, 28)}, "cond_shape"),
        ({"cond_shape": (1, 28, 28)}, "cond_shape"),
    ],
)
def test_a_config_that_does_not_fit_says_what_is_wrong(changed, named):
    with pytest.raises(ValueError, match=named):
        ImageConfig(**changed)
