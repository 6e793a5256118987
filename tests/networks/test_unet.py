"""The U-Net: shapes, where its FiLM vectors and tokens act, gradients to every parameter."""

import pytest
import torch
from torch import Tensor

from cgm.networks.unet import UNet


def network(**changes) -> UNet:
    options = {
        "in_channels": 3, "out_channels": 2, "width": 8, "width_multipliers": (1, 2), "blocks": 1,
        "attention_depth": 1, "heads": 2, "patch": 1,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = UNet(**(options | changes))
        for parameter in net.parameters():  # the zero start would hide what does not act
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return net


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(8, 8), (14, 28), (7, 5), (1, 1)])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 2, 3)])
def test_any_image_size(size, multipliers):
    net = network(width_multipliers=multipliers, blocks=2)
    out = net(inputs(2, 3, *size), net.time_film(torch.tensor([3, 900])))
    assert out.shape == (2, 2, *size)
    assert out.isfinite().all()


def test_patches():
    net = network(patch=2)
    assert net(inputs(2, 3, 14, 6), net.time_film(torch.tensor([0, 1]))).shape == (2, 2, 14, 6)


def test_starts_as_zero():
    with torch.random.fork_rng(devices=[]):
        net = UNet(
            in_channels=1, out_channels=1, width=8, width_multipliers=(1,), blocks=1,
            attention_depth=0, heads=1, patch=1,
        )  # fmt: skip
    assert not net(inputs(1, 1, 4, 4), net.time_film(torch.tensor([5]))).any()


def test_every_parameter_acts():
    net = network(num_classes=4, vocabulary=5, token_length=3)
    film = net.time_film(torch.tensor([3, 900])) + net.class_film(torch.tensor([1, 4]))
    context = net.token_context(torch.tensor([[0, 1, 5], [2, 3, 4]]))
    net(inputs(2, 3, 8, 8), film, context).square().sum().backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    # Keys get no gradient from their bias: it shifts all scores of a query alike.
    assert idle == []


def test_rows_do_not_mix():
    net = network(num_classes=4, vocabulary=5, token_length=3).eval()
    x, t = inputs(3, 3, 8, 8), torch.tensor([3, 900, 20])
    classes, tokens = torch.tensor([0, 1, 4]), torch.tensor([[0, 1, 5], [2, 3, 4], [0, 0, 0]])

    def run(rows):
        film = net.time_film(t[rows]) + net.class_film(classes[rows])
        return net(x[rows], film, net.token_context(tokens[rows]))

    together = run(torch.arange(3))
    for row in range(3):
        torch.testing.assert_close(run(torch.tensor([row]))[0], together[row])


def test_time_film_of_all_steps_at_once_equals_one_by_one():
    net = network()
    t = torch.arange(0, 1000, 100)
    films = net.time_film(t)
    for i in range(len(t)):
        torch.testing.assert_close(net.time_film(t[i : i + 1])[0], films[i])
    assert (films[0] - films[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"heads": 3}, "heads"),
        ({"width": 2}, "width"),
        ({"width": 7, "heads": 7}, "width"),
        ({"vocabulary": 4, "attention_depth": 0}, "attention_depth"),
    ],
)
def test_impossible_networks(changes, name):
    with pytest.raises(ValueError, match=name):
        network(**changes)
