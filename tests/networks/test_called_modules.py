"""What users put onto layers acts wherever the layer does: hooks, parametrizations, adapters.

Each layer of each network in turn is changed so that it gives twice as much, and the network must
give what it gives with doubled weights, or what plain modules give.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from benchmarks.models.plain_networks import PlainDiscriminator, PlainPixel, PlainResnet, PlainUNet
from cgm.families.flow import ConditionalFlow
from cgm.networks.layers import is_plain
from cgm.networks.residual import ResidualEncoder, ResidualUNet
from cgm.networks.unet import UNet
from cgm.sampling.patch_scorer import PatchScorer, patch_scores
from tests.families.test_precision import lively
from tests.networks.test_patch_networks import discriminator, images, resnet, seeded, unet

LEAVES = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm)


class Adapter(nn.Module):
    """A wrapper without a weight of its own, as LoRA's: base(x) + base(x)."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.factor = base, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.base(x)
        return h + self.factor * h


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def hooked(network: nn.Module, name: str) -> None:
    network.get_submodule(name).register_forward_hook(lambda module, args, out: 2 * out)


def wrapped(network: nn.Module, name: str) -> None:
    parent, _, last = name.rpartition(".")
    network.get_submodule(parent)._modules[last] = Adapter(network.get_submodule(name))


def patched(network: nn.Module, name: str) -> None:
    layer = network.get_submodule(name)
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def subclassed(network: nn.Module, name: str) -> None:
    layer = network.get_submodule(name)
    kind = type(layer)

    class Doubled(kind):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer.__class__ = Doubled


def parametrized(network: nn.Module, name: str) -> None:
    layer = network.get_submodule(name)
    for parameter in ("weight", "bias"):
        if getattr(layer, parameter, None) is not None:
            parametrize.register_parametrization(layer, parameter, Twice())


CHANGES = (hooked, wrapped, patched, subclassed, parametrized)
NETWORKS = {
    **{f"patch_{kind}": (lambda k=kind: discriminator(patch=16, norm=k),
                         lambda k=kind: PlainDiscriminator(1, k, 4), (20, 18))
       for kind in ("batch", "instance", "none")},
    "pixel": (lambda: discriminator(patch=1), lambda: PlainPixel("batch", 4), (9, 7)),
    **{f"unet_{kind}": (lambda k=kind: unet(norm=k), lambda k=kind: PlainUNet(3, k, 4), (16, 8))
       for kind in ("batch", "instance", "none")},
    **{f"resnet_{kind}": (lambda k=kind: resnet(norm=k), lambda k=kind: PlainResnet(2, k, 4),
                          (12, 9))
       for kind in ("batch", "instance")},
}  # fmt: skip


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_layer_of_the_published_networks_is_called(kind, change, train):
    make, make_plain, size = NETWORKS[kind]
    ours = make()
    leaves = [name for name, module in ours.named_modules() if isinstance(module, LEAVES)]
    state, x = ours.state_dict(), images(2, 3, *size)
    plain_network = make_plain()
    for name in leaves:
        network, plain = make().train(train), copy.deepcopy(plain_network).train(train)
        network.load_state_dict(state)
        plain.load_state_dict(state)
        if change is parametrized and getattr(network.get_submodule(name), "weight", None) is None:
            continue
        change(network, name)
        change(plain, name)
        with torch.no_grad():
            again = network(x)
            expected = plain(x)
        torch.testing.assert_close(again, expected)
        found = network(x)
        if not train:  # the running statistics of a second call are others
            torch.testing.assert_close(found, expected)
        found.sum().backward()
        layer = network.get_submodule(name)
        assert all(p.grad is not None for p in layer.parameters() if p.requires_grad) or (
            kind.endswith("instance") and not train  # a bias that is taken off has none
        )


@pytest.mark.parametrize("change", CHANGES)
def test_every_way_to_judge_calls_every_layer(change):
    leaves = [n for n, m in discriminator(patch=16).named_modules() if isinstance(m, LEAVES)]
    x = images(2, 3, 20, 18)
    for name in leaves:
        network = discriminator(patch=16).eval()
        change(network, name)
        out = network(x)
        torch.testing.assert_close(network.features(x)[-1], out)
        losses = network.row_losses(x, loss="lsgan", target="fake")
        torch.testing.assert_close(losses, out.square().flatten(1).mean(1))
        torch.testing.assert_close(network.freeze(x)(x), out)
        torch.testing.assert_close(PatchScorer(network, x)(x), out.detach())
        scores = patch_scores(network, x, loss="lsgan", target="fake")
        torch.testing.assert_close(scores, losses.detach())


def test_a_hook_on_a_whole_network_acts_in_all_it_is_used_for():
    network, x = discriminator(patch=16).eval(), images(2, 3, 20, 18)
    expected = (2 * network(x)).square().flatten(1).mean(1)
    network.register_forward_hook(lambda module, args, out: 2 * out)
    torch.testing.assert_close(network.row_losses(x, loss="lsgan", target="fake"), expected)


def test_hooks_on_parts_of_networks_act():
    x = images(2, 3, 16, 8)
    for network, name in ((unet(), "model.model.1"), (resnet(), "model.10")):
        network.eval()
        with torch.no_grad():
            before = network(x)
            network.get_submodule(name).register_forward_hook(lambda module, args, out: 0 * out)
            without = network(x)
        assert not torch.allclose(before, without)
        torch.testing.assert_close(network(x), without)


def test_spectral_and_weight_norm_of_either_kind():
    x = images(2, 3, 20, 18)
    for norm in ("batch", "instance", "none"):
        for make in (
            nn.utils.spectral_norm, parametrizations.spectral_norm, parametrizations.weight_norm
        ):  # fmt: skip
            network = discriminator(patch=16, norm=norm).eval()
            plain = PlainDiscriminator(1, norm, 4).eval()
            plain.load_state_dict(network.state_dict())
            for one in (network, plain):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(3)  # of the singular vectors
                    for module in list(one.modules()):
                        if isinstance(module, nn.Conv2d):
                            make(module)
            expected = plain(x)
            torch.testing.assert_close(network(x), expected, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(network.freeze(x)(x), expected, atol=1e-3, rtol=1e-3)
            assert not any(is_plain(m) for m in network.modules() if isinstance(m, nn.Conv2d))


def test_other_geometries_and_norms_of_replaced_layers():
    x = images(2, 3, 16, 8)
    other = [
        lambda: nn.BatchNorm2d(8, momentum=None), lambda: nn.BatchNorm2d(8, affine=False),
        lambda: nn.BatchNorm2d(8, track_running_stats=False), lambda: nn.GroupNorm(2, 8),
        lambda: nn.InstanceNorm2d(8, affine=True),
        lambda: nn.InstanceNorm2d(8, track_running_stats=True),
    ]  # fmt: skip
    for make in other:
        for train in (True, False):
            network, plain = discriminator(patch=16), PlainDiscriminator(1, "batch", 4)
            plain.load_state_dict(network.state_dict())
            network.model["3"], plain.model[3] = make(), make()
            for _ in range(2):
                found, expected = network.train(train)(x), plain.train(train)(x)
                torch.testing.assert_close(found, expected)
            if not train:
                torch.testing.assert_close(network.freeze(x)(x), expected)
    for place, options in (("0", {"padding_mode": "reflect"}), ("2", {"groups": 2, "bias": False})):
        network = discriminator(patch=16, norm="instance")
        plain = PlainDiscriminator(1, "instance", 4)
        plain.load_state_dict(network.state_dict())
        old = network.model[place]
        new = seeded(lambda old=old, options=options: nn.Conv2d(
            old.in_channels, old.out_channels, 4, old.stride, 1, **options
        ))  # fmt: skip
        network.model[place] = plain.model[int(place)] = new
        torch.testing.assert_close(network.eval()(x), plain.eval()(x))
        torch.testing.assert_close(network.freeze(x)(x), plain(x))


# Networks that call their modules -----------------------------------------------------------------
RESIDUAL = {
    "unet": (lambda: UNet(
        in_channels=1, out_channels=1, width=8, width_multipliers=(1, 2), blocks=1,
        attention_depth=1, heads=2, patch=2, num_classes=3,
    ), lambda network, x: network(
        x, network.time_film(torch.tensor([1, 7])) + network.class_film(torch.tensor([0, 2]))
    )),
    "tokens": (lambda: UNet(
        in_channels=1, out_channels=1, width=8, width_multipliers=(1,), blocks=1,
        attention_depth=1, heads=2, patch=2, vocabulary=3, token_length=2,
    ), lambda network, x: network(
        x, network.time_film(torch.tensor([1, 7])),
        network.token_context(torch.tensor([[0, 1], [2, 0]])),
    )),
    "residual": (
        lambda: ResidualUNet(1, 1, width=4, depth=2, features=2),
        lambda network, x: network(x, x.flatten(1)[:, :2]),
    ),
    "encoder": (lambda: ResidualEncoder(1, (8, 8), 3, width=4, depth=2), lambda n, x: n(x)),
}  # fmt: skip


@pytest.mark.parametrize("kind", RESIDUAL)
def test_every_layer_of_the_residual_networks_is_called(kind):
    make, call = RESIDUAL[kind]
    x = images(2, 1, 8, 8)
    names = [n for n, m in make().named_modules() if isinstance(m, (*LEAVES, nn.Embedding))]
    for name in names:
        results = []
        for change in (hooked, wrapped, patched, subclassed):
            network = seeded(make)
            change(network, name)
            results.append(call(network, x))
        assert not torch.equal(results[0], call(seeded(make), x))
        for result in results[1:]:
            torch.testing.assert_close(result, results[0])


def test_a_flow_acts_through_its_modules_both_ways():
    model: ConditionalFlow = lively("flow", "class")
    cond, y = torch.tensor([0, 2]), images(2, 1, 8, 8)
    seen = []
    for name, module in model.named_modules():
        if name.startswith("levels.0") and not name.endswith("norm") and "network." not in name:
            module.register_forward_hook(lambda module, args, out, name=name: seen.append(name))
    z, _ = model.encode(y, cond=cond)
    forward = sorted({name for name in seen if "." in name})
    seen.clear()
    torch.testing.assert_close(model.decode(z, cond=cond), y, atol=1e-4, rtol=1e-4)
    assert forward == sorted({name for name in seen if "." in name})
    assert len(forward) >= 3
    handle = model.levels[0].maps[0].norm.register_forward_hook(lambda module, args, out: 2 * out)
    for call in (lambda: model.log_prob(y, cond=cond), lambda: model.sample(cond=cond)):
        with pytest.raises(ValueError, match=r"^norm must be an ActNorm without hooks"):
            call()
    handle.remove()
    parametrize.register_parametrization(model.levels[0].maps[0].norm, "scale", Twice())
    z, _ = model.encode(y, cond=cond)
    torch.testing.assert_close(model.decode(z, cond=cond), y, atol=1e-4, rtol=1e-4)


def test_what_is_plain():
    assert is_plain(nn.Conv2d(2, 2, 1))
    traced = torch.compile(lambda layer: is_plain(layer), backend="eager", fullgraph=True)
    assert traced(nn.Conv2d(2, 2, 1))
    assert is_plain(nn.BatchNorm2d(2))
    for change in (hooked, wrapped, patched, subclassed, parametrized):
        network = nn.Sequential(nn.Conv2d(2, 2, 1))
        change(network, "0")
        assert not is_plain(network[0])
    backward = nn.Conv2d(2, 2, 1)
    backward.register_full_backward_hook(lambda *args: None)
    assert not is_plain(backward)
    assert not is_plain(nn.Sequential())
    layer = nn.Conv2d(2, 2, 1)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert not is_plain(layer)
    finally:
        handle.remove()
    assert is_plain(layer)
