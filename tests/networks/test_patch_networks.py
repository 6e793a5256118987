"""Image-to-image networks: names and values as published, patches, memory formats, loading."""

import contextlib
import math
import os
import re
import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cgkernels
from benchmarks.models.plain_networks import PlainDiscriminator, PlainPixel, PlainResnet, PlainUNet
from cgm.networks import layers
from cgm.networks.patch_discriminator import (
    PATCHES,
    PatchDiscriminator,
    PatchDiscriminatorConfig,
)
from cgm.networks.published import load_published, network_of
from cgm.networks.resnet_generator import ResnetGenerator, ResnetGeneratorConfig
from cgm.networks.unet_generator import UNetGenerator, UNetGeneratorConfig

NORMS = ("batch", "instance", "none")
LAST = torch.channels_last


def images(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).clamp(-1, 1)


def seeded(make, *, lively: bool = True):
    """The module of make(), with weights that let every layer act if lively."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make()
        for name, tensor in network.state_dict().items() if lively else ():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.dim() == 4:
                tensor.normal_(0, 1.3 / tensor[0].numel() ** 0.5)
            elif tensor.is_floating_point() and not name.endswith(("weight_u", "weight_v")):
                tensor.normal_(0.1, 0.5)
        return network


def discriminator(**changes) -> PatchDiscriminator:
    options = {"in_channels": 3, "width": 4, **changes}
    return seeded(lambda: PatchDiscriminator(PatchDiscriminatorConfig(**options)))


def unet(**changes) -> UNetGenerator:
    options = {"downs": 3, "width": 4, "dropout": changes.get("downs", 0) >= 6, **changes}
    return seeded(lambda: UNetGenerator(UNetGeneratorConfig(**options)))


def resnet(**changes) -> ResnetGenerator:
    options = {"blocks": 2, "width": 4, **changes}
    return seeded(lambda: ResnetGenerator(ResnetGeneratorConfig(**options)))


def on_meta(make) -> nn.Module:
    with torch.device("meta"):
        return make()


# Ours and plain modules ---------------------------------------------------------------------------
# name: ours, plain, shape of an image
PAIRS = {
    "pixel": (lambda kind: discriminator(patch=1, norm=kind), lambda k: PlainPixel(k, 4), (9, 7)),
    **{
        f"patch{patch}": (
            lambda kind, patch=patch: discriminator(patch=patch, norm=kind),
            lambda kind, n=n: PlainDiscriminator(n, kind, 4),
            (100, 97) if n == 5 else (61, 50),
        )
        for patch, n in PATCHES.items()
        if n
    },
    "unet": (lambda kind: unet(norm=kind), lambda k: PlainUNet(3, k, 4), (16, 24)),
    "unet6": (
        lambda kind: unet(downs=6, norm=kind),
        lambda kind: PlainUNet(6, kind, 4, dropout=True),
        (64, 128),
    ),
    "resnet": (lambda kind: resnet(norm=kind), lambda kind: PlainResnet(2, kind, 4), (20, 13)),
    "resnet_dropout": (
        lambda kind: resnet(norm=kind, dropout=True),
        lambda kind: PlainResnet(2, kind, 4, dropout=True),
        (20, 13),
    ),
}
pairs = pytest.mark.parametrize("pair", PAIRS)
norms = pytest.mark.parametrize("kind", NORMS)


@pairs
@norms
def test_names_and_values_are_the_published_ones(pair, kind):
    make, make_plain, size = PAIRS[pair]
    network, plain = make(kind), make_plain(kind)
    assert list(network.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(network.state_dict())
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # its noise is another
    x = images(2, 3, *size)
    for train in (False, True):
        out, expected = network.train(train)(x), plain.train(train)(x.clone())
        if out.shape[1] == 3:  # what tanh saturates would hide differences
            assert out.std() > 0.01 and (out.abs() < 0.9).float().mean() > 0.1
        torch.testing.assert_close(out, expected)
    for name, buffer in network.named_buffers():  # running statistics moved alike
        torch.testing.assert_close(buffer, plain.get_buffer(name))


def test_names_of_the_discriminators():
    batch = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    pair = ["weight", "bias"]

    def names(prefix, places):
        return [f"{prefix}.{place}.{name}" for place, kinds in places for name in kinds]

    w = ["weight"]
    assert list(discriminator().state_dict()) == names(
        "model", [(0, pair), (2, w), (3, batch), (5, w), (6, batch), (8, w), (9, batch), (11, pair)]
    )
    assert list(discriminator(norm="instance").state_dict()) == names(
        "model", [(i, pair) for i in (0, 2, 5, 8, 11)]
    )
    assert list(discriminator(patch=1).state_dict()) == names(
        "net", [(0, pair), (2, w), (3, batch), (5, w)]
    )
    assert list(discriminator(patch=1, norm="instance").state_dict()) == names(
        "net", [(i, pair) for i in (0, 2, 5)]
    )


def test_names_of_the_generators():
    nine = on_meta(lambda: ResnetGenerator(ResnetGeneratorConfig()))
    places = [f"model.{i}" for i in (1, 4, 7)]
    places += [f"model.{i}.conv_block.{j}" for i in range(10, 19) for j in (1, 5)]
    places += [f"model.{i}" for i in (19, 22, 26)]
    keys = [f"{place}.{name}" for place in places for name in ("weight", "bias")]
    assert list(nine.state_dict()) == keys and len(keys) == 48
    with_dropout = on_meta(lambda: ResnetGenerator(ResnetGeneratorConfig(dropout=True)))
    assert list(with_dropout.state_dict()) == [
        key.replace("conv_block.5", "conv_block.6") for key in keys
    ]
    keys = list(on_meta(lambda: UNetGenerator(UNetGeneratorConfig())).state_dict())
    assert len(keys) == 82
    assert keys[:3] == [
        "model.model.0.weight", "model.model.1.model.1.weight", "model.model.1.model.2.weight",
    ]  # fmt: skip
    assert keys[-2:] == ["model.model.3.weight", "model.model.3.bias"]
    assert "model.model.1.model.3.model.1.weight" in keys
    without = UNetGeneratorConfig(dropout=False)
    assert list(on_meta(lambda: UNetGenerator(without)).state_dict()) == keys


@pytest.mark.parametrize(
    "config, parameters",
    [
        (PatchDiscriminatorConfig(patch=16), 139_585),
        (PatchDiscriminatorConfig(patch=34), 666_433),
        (PatchDiscriminatorConfig(patch=70), 2_768_705),
        (PatchDiscriminatorConfig(patch=142), 6_964_033),
        (PatchDiscriminatorConfig(patch=286), 11_159_361),
        (UNetGeneratorConfig(), 54_413_955),
        (ResnetGeneratorConfig(), 11_378_179),
    ],
)
def test_number_of_parameters(config, parameters):
    name = type(config).__name__.removesuffix("Config")
    kind = {"PatchDiscriminator": PatchDiscriminator, "UNetGenerator": UNetGenerator}.get(
        name, ResnetGenerator
    )
    network = on_meta(lambda: kind(config))
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_initial_weights():
    network = seeded(
        lambda: PatchDiscriminator(PatchDiscriminatorConfig(width=16)), lively=False
    ).model
    weight, norm = network["8"].weight, network["9"].weight
    assert abs(weight.std() - 0.02) < 2e-4 and abs(weight.mean()) < 2e-4
    assert abs(norm.mean() - 1) < 0.01 and 0.015 < norm.std() < 0.025
    assert not network["0"].bias.any() and not network["9"].bias.any()


# Patches ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("patch", PATCHES)
def test_patch_is_what_one_score_sees(patch):
    network = discriminator(patch=patch, width=1, norm="none").double()
    side = 2 * patch + 98
    for height, width in ((side, 97), (97, side)):
        x = images(1, 3, height, width, dtype=torch.float64).requires_grad_()
        out = network(x)
        (gradient,) = torch.autograd.grad(out[0, 0, out.shape[2] // 2, out.shape[3] // 2], x)
        along = 3 if height == 97 else 2
        seen = gradient.abs().sum(dim=(0, 1, 5 - along)).nonzero()
        assert seen.max() - seen.min() + 1 == patch
        assert seen.min() > 0 and seen.max() < side - 1  # not cut off by the border


@pytest.mark.parametrize(
    "patch, side", [(1, 256), (16, 126), (34, 62), (70, 30), (142, 14), (286, 6)]
)
def test_size_of_the_map(patch, side):
    network = discriminator(patch=patch, width=1)
    assert network(images(1, 3, 256, 256)).shape == (1, 1, side, side)


@pytest.mark.parametrize("patch, least", [(1, 1), (16, 6), (34, 12), (70, 24), (286, 96)])
def test_smallest_image(patch, least):
    network = discriminator(patch=patch, norm="instance" if patch > 1 else "none")
    assert network(images(1, 3, least, least)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=f"x must .* of at least {least}"):
        network(images(1, 3, least, least - 1))


# Pairs, features ----------------------------------------------------------------------------------
@pytest.mark.parametrize("patch", (1, 34))
def test_a_pair_is_one_image_of_both(patch):
    network = discriminator(patch=patch, in_channels=5)
    x, y = images(2, 2, 20, 17), images(2, 3, 20, 17, seed=2)
    assert torch.equal(network(x, y), network(torch.cat([x, y], 1)))


@pytest.mark.parametrize("patch", PATCHES)
def test_features(patch):
    network = discriminator(patch=patch, in_channels=5, norm="instance")
    x, y = images(2, 2, 100, 97), images(2, 3, 100, 97, seed=2)
    *features, scores = network.features(x, y)
    assert torch.equal(scores, network(x, y))
    assert len(features) == (2 if patch == 1 else PATCHES[patch] + 1)
    conv = network.net["0"] if patch == 1 else network.model["0"]
    expected = F.leaky_relu(conv(torch.cat([x, y], 1)), 0.2)
    torch.testing.assert_close(features[0], expected)


# Layers -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", (*NORMS, "actnorm"))
@pytest.mark.parametrize("activation", (None, "relu", "leaky_relu"))
@pytest.mark.parametrize("last", (False, True))
def test_norm_act(kind, activation, last):
    x, residual = images(2, 3, 5, 4), images(2, 3, 7, 6, seed=2)[:, :, 1:-1, 1:-1]
    x = x.contiguous(memory_format=LAST) if last else x
    norm = layers.new_norm(kind, 3)
    same = layers.new_norm(kind, 3)
    h = same(x)
    act = {None: lambda t: t, "relu": F.relu, "leaky_relu": lambda t: F.leaky_relu(t, 0.1)}
    expected = F.pad(act[activation](h) + residual, (2, 2, 2, 2), mode="reflect")
    out = layers.norm_act(x, norm, activation, slope=0.1, residual=residual, pad=2)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous(memory_format=LAST if last else torch.contiguous_format)
    for mine, theirs in zip(norm.buffers(), same.buffers(), strict=True):  # running statistics
        torch.testing.assert_close(mine, theirs)


def skip_in_place(x, up, norm, up_norm):
    """What goes down and what goes up, of one level of a U-Net."""
    whole = torch.full((x.shape[0], x.shape[1] + up.shape[1], *x.shape[2:]), torch.nan).to(x)
    left, right = whole.split((x.shape[1], up.shape[1]), dim=1)
    h, skip = layers.norm_leaky_relu_and_relu_(left, x, norm)
    together = layers.join_channels(whole, skip, layers.norm_relu_(right, up, up_norm))
    assert together.data_ptr() == whole.data_ptr() and not whole.isnan().any()
    return h, together


def skip_by_cat(x, up, norm, up_norm):
    h = norm(x)
    return F.leaky_relu(h, 0.2), torch.cat([F.relu(h), F.relu(up_norm(up))], dim=1)


@norms
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("plain", (True, False))
def test_a_skip_written_in_place_is_that_of_cat(kind, training, plain):
    """Values, running statistics, gradients and second derivatives; twice through one graph."""
    found = []
    for make in (skip_in_place, skip_by_cat):
        x, up = (images(2, c, 5, 4, seed=c, dtype=torch.float64) for c in (3, 2))
        norms = [layers.new_norm(kind, c).double().train(training) for c in (3, 2)]
        inputs = [t.requires_grad_() for t in (x, up, *norms[0].parameters())]
        with cgkernels.reference() if plain else contextlib.nullcontext():
            outputs = make(x, up, *norms)
            dys = [images(*y.shape, seed=9, dtype=y.dtype) for y in outputs]
            first = torch.autograd.grad(outputs, inputs, dys, retain_graph=True)
            again = torch.autograd.grad(outputs, inputs, dys, create_graph=True)
            penalty = sum(g.square().sum() for g in again)
            second = torch.autograd.grad(penalty, x) if penalty.requires_grad else ()
        kept = [b for norm in norms for b in norm.buffers()]
        found.append((*outputs, *first, *again, *second, *kept))
    torch.testing.assert_close(*found)


@norms
def test_a_unet_joins_without_copies(kind, monkeypatch):
    network, x = unet(downs=6, norm=kind), images(2, 3, 64, 64)
    monkeypatch.setattr(torch, "cat", lambda *_: pytest.fail("copies"))
    network(x, seed=1).square().sum().backward()


def test_spectral_norm():
    network = discriminator(patch=34, norm="instance", spectral_norm=True)
    names = {re.sub(r".*\.", "", name) for name in network.state_dict()}
    assert names == {"weight_orig", "weight_u", "weight_v", "bias"}
    x = images(2, 3, 20, 17)
    for _ in range(100):
        network(x)
    network.eval()
    before = {name: t.clone() for name, t in network.state_dict().items()}
    network(x)
    for place in ("0", "2", "5", "8"):
        weight = network.model[place].weight.detach()
        assert torch.linalg.matrix_norm(weight.flatten(1), 2) == pytest.approx(1, abs=0.01)
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())


def test_actnorm_takes_the_first_batch_of_training():
    norm = layers.ActNorm(3)
    x = images(4, 3, 6, 5) * torch.tensor([1.0, 3.0, 0.1])[:, None, None] + 2
    assert torch.equal(norm.eval()(x), x) and not norm.initialized
    out = norm.train()(x)
    std, mean = torch.std_mean(out, dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(3), atol=1e-4, rtol=0)
    before = norm.loc.clone(), norm.scale.clone()
    norm(x + 5)
    assert torch.equal(norm.loc, before[0]) and torch.equal(norm.scale, before[1])
    # Weights that are loaded say themselves whether they are initialized.
    fresh = layers.ActNorm(3)
    fresh.load_state_dict(norm.state_dict())
    assert torch.equal(fresh(x + 5), norm(x + 5))
    norm.load_state_dict(layers.ActNorm(3).state_dict())
    torch.testing.assert_close(norm(x), out)
    with pytest.raises(ValueError, match="x must hold two values"):
        layers.ActNorm(3)(x[:1, :, :1, :1])


def test_actnorm_waits_for_the_device_once(monkeypatch):
    norm, x = layers.ActNorm(3), images(2, 3, 4, 4)
    norm(x)
    monkeypatch.setattr(Tensor, "item", lambda _: pytest.fail("waits"))
    norm(x)
    norm.eval()(x)


def test_actnorm_in_a_discriminator():
    network = discriminator(norm="actnorm")
    assert [name for name in network.state_dict() if name.startswith(("model.2.", "model.3."))] == [
        "model.2.weight", "model.2.bias", "model.3.loc", "model.3.scale", "model.3.initialized",
    ]  # fmt: skip
    network(images(2, 3, 40, 40))
    assert all(network.model[place].initialized for place in ("3", "6", "9"))


# Any image --------------------------------------------------------------------------------------
NETWORKS = {
    "pixel": lambda kind: discriminator(patch=1, norm=kind),
    "patch": lambda kind: discriminator(patch=34, norm=kind),
    "unet": lambda kind: unet(norm=kind),
    "unet6": lambda kind: unet(downs=6, norm=kind),
    "resnet": lambda kind: resnet(norm=kind),
    "resnet_dropout": lambda kind: resnet(norm=kind, dropout=True),
}
networks = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


def seed_of(network) -> dict[str, int]:
    """A seed, for a network that takes one."""
    return {} if isinstance(network, PatchDiscriminator) else {"seed": 3}


@networks
@norms
def test_channels_last_stays(make, kind):
    network = make(kind)
    x = images(2, 3, 64, 64)
    out = network(x, **seed_of(network))
    last = network(x.contiguous(memory_format=LAST), **seed_of(network))
    assert out.is_contiguous()
    assert last.is_contiguous(memory_format=LAST)
    torch.testing.assert_close(last, out)
    if isinstance(network, PatchDiscriminator):
        for h in network.features(x.contiguous(memory_format=LAST)):
            assert h.is_contiguous(memory_format=LAST)


@networks
@norms
def test_every_parameter_acts(make, kind):
    network = make(kind)
    x = images(2, 3, 64, 64)
    network(x, **seed_of(network)).square().sum().backward()
    idle = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias before an instance norm is taken off again.
    biases = [n for n, _ in network.named_parameters() if n.endswith("bias")]
    assert set(idle) <= set(biases if kind == "instance" else [])


@networks
@norms
def test_without_gradients_the_image_is_the_same(make, kind):
    """Though both halves of a skip are then written into one buffer."""
    network, x = make(kind).eval(), images(2, 3, 64, 64)
    for given in (x, x.contiguous(memory_format=LAST)):
        with torch.no_grad():
            drawn = network(given, **seed_of(network))
        torch.testing.assert_close(drawn, network(given, **seed_of(network)))
        assert drawn.stride() == network(given, **seed_of(network)).stride()


def test_empty_batches_pass():
    for network in (discriminator(patch=34), unet(), resnet()):
        assert network(images(0, 3, 24, 16)).shape[0] == 0


def test_a_penalty_on_gradients():
    network = discriminator(patch=34, norm="instance")
    x = images(2, 3, 24, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert all(p.grad is not None for n, p in network.named_parameters() if n.endswith("weight"))


@pytest.mark.parametrize("size, out", [((5, 6), (8, 8)), ((16, 9), (16, 12)), ((20, 24), (20, 24))])
def test_resnet_rounds_sides_up(size, out):
    assert resnet()(images(1, 3, *size)).shape == (1, 3, *out)


@pytest.mark.parametrize("downs", (2, 5, 7))
def test_unet_takes_multiples(downs):
    network, side = unet(downs=downs, width=1, out_channels=2), 2**downs
    assert network(images(2, 3, side, 2 * side)).shape == (2, 2, side, 2 * side)
    with pytest.raises(ValueError, match=f"x must have sides of multiples of {side}"):
        network(images(2, 3, side, side + 1))


# Dropout ------------------------------------------------------------------------------------------
def test_dropout_depends_on_seed_and_index_alone():
    x = torch.ones(3, 4, 5, 6)
    index = torch.tensor([7, 2**40, 1])
    out = layers.dropout(x, seed=3, index=index, layer=2)
    assert set(out.unique().tolist()) == {0.0, 2.0}
    for row in range(3):
        alone = layers.dropout(x[:1], seed=3, index=index[row : row + 1], layer=2)
        assert torch.equal(alone[0], out[row])
    last = layers.dropout(x.contiguous(memory_format=LAST), seed=3, index=index, layer=2)
    assert torch.equal(last, out) and last.is_contiguous(memory_format=LAST)
    others = [
        layers.dropout(x, seed=4, index=index, layer=2),
        layers.dropout(x, seed=3, index=index + 1, layer=2),
        layers.dropout(x, seed=3, index=index, layer=3),
    ]
    for other in others:
        assert 0.3 < (other == out).float().mean() < 0.7
    many = layers.dropout(torch.ones(4, 10_000), seed=0, index=None, layer=0, p=0.25)
    assert (many == 0).float().mean() == pytest.approx(0.25, abs=0.01)
    assert many.max() == pytest.approx(4 / 3)


@pytest.mark.parametrize("network", [unet(downs=7, width=2), resnet(dropout=True)])
def test_images_depend_on_seed_and_index_alone(network):
    network = network.double().eval()
    x = images(3, 3, 128, 128, dtype=torch.float64)
    if isinstance(network, ResnetGenerator):
        x = x[:, :, :20, :13]
    index = torch.tensor([5, 2**33 + 1, 0])
    out = network(x, seed=1, index=index)
    assert torch.equal(out, network.train(False)(x, seed=torch.tensor(1), index=index))
    for row in range(3):
        alone = network(x[row : row + 1], seed=1, index=index[row : row + 1])
        torch.testing.assert_close(alone[0], out[row])
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(network(x[order], seed=1, index=index[order]), out[order])
    plain = network(x)
    for other in (plain, network(x, seed=2, index=index), network(x, seed=1)):
        assert not torch.allclose(other, out)
    assert torch.equal(network(x, index=index), plain)


def test_every_layer_drops_others(monkeypatch):
    dropped = []

    def record(h, *, layer, **noise):
        dropped.append((layer, tuple(h.shape)))
        return h

    monkeypatch.setattr("cgm.networks.unet_generator.dropout", record)
    monkeypatch.setattr("cgm.networks.resnet_generator.dropout", record)
    # Published: the three innermost but one of eight levels, all of eight times the width.
    unet(downs=8, width=1)(images(1, 3, 256, 256), seed=1)
    assert dropped == [(6, (1, 8, 4, 4)), (5, (1, 8, 8, 8)), (4, (1, 8, 16, 16))]
    dropped.clear()
    network, x = resnet(dropout=True), images(1, 3, 8, 8)
    torch.testing.assert_close(network(x, seed=1), network(x))  # record drops nothing
    assert dropped == [(0, (1, 16, 2, 2)), (1, (1, 16, 2, 2))]
    dropped.clear()
    for network in (unet(downs=6, dropout=False), resnet()):
        network(images(1, 3, 64, 64), seed=1)
    unet(downs=6)(images(1, 3, 64, 64))
    assert dropped == []


# Published files ----------------------------------------------------------------------------------
PUBLISHED = {
    **{
        f"{pair}-{kind}": (PAIRS[pair][0](kind), PAIRS[pair][2]) for pair in PAIRS for kind in NORMS
    },
    "actnorm": (discriminator(norm="actnorm"), (40, 30)),
    "spectral": (discriminator(norm="instance", spectral_norm=True), (40, 30)),
    "spectral-batch": (discriminator(patch=16, spectral_norm=True), (40, 30)),
    "spectral-pixel": (discriminator(patch=1, norm="none", spectral_norm=True), (4, 3)),
    "other-channels": (unet(in_channels=3, out_channels=2, width=6), (16, 8)),
}


def old_state(network: nn.Module) -> dict[str, Tensor]:
    """The state_dict as it would have been before PyTorch 0.4, of data parallel training."""
    state = {
        f"module.{name}": tensor
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    for name, module in network.named_modules():
        if isinstance(module, nn.InstanceNorm2d):
            state[f"module.{name}.running_mean"] = torch.zeros(module.num_features)
            state[f"module.{name}.running_var"] = torch.ones(module.num_features)
    return state


@pytest.mark.parametrize("old", (False, True))
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(name, old, tmp_path):
    network, size = PUBLISHED[name]
    file = tmp_path / "latest_net_G.pth"
    state = old_state(network) if old else network.state_dict()
    torch.save(state, file, _use_new_zipfile_serialization=not old)
    loaded = network_of(load_published(file))
    assert type(loaded) is type(network) and loaded.config == network.config
    assert not loaded.training
    x = images(2, 3, *size)
    assert torch.equal(loaded(x), network.eval()(x))


def test_loading_leaves_the_generator_alone():
    state = torch.random.get_rng_state()
    network_of(unet().state_dict())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_names_of_vqgan(tmp_path):
    network = discriminator(norm="actnorm")
    state = {
        name.replace("model.", "main.", 1): tensor for name, tensor in network.state_dict().items()
    }
    x = images(2, 3, 40, 30)
    file = tmp_path / "discriminator.pt"
    torch.save(state, file)
    assert torch.equal(network_of(load_published(file))(x), network.eval()(x))
    loss = nn.ModuleDict({"discriminator": seeded(lambda: PatchDiscriminator(network.config))})
    loss.load_state_dict({f"discriminator.{name}": tensor for name, tensor in state.items()})
    assert torch.equal(loss["discriminator"].eval()(x), network.eval()(x))


def test_dropout_of_a_unet_is_asked_for():
    state = unet(downs=6).state_dict()
    assert network_of(state).config.dropout and not network_of(state, dropout=False).config.dropout
    assert not network_of(unet(downs=5).state_dict()).config.dropout


class Harmful:
    def __init__(self, folder) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_files_that_run_code_are_refused(tmp_path):
    file, made = tmp_path / "net.pth", tmp_path / "made"
    for content in (Harmful(made), {"model.0.weight": Harmful(made)}, discriminator()):
        torch.save(content, file)
        with pytest.raises(ValueError, match=f"{re.escape(str(file))}: is damaged, or holds more"):
            load_published(file)
    assert not made.exists()


@pytest.mark.parametrize(
    "content, words",
    [
        ([torch.zeros(2)], "must be a dict of tensors, got list"),
        ({}, "must be a dict"),
        ({"state_dict": {"model.0.weight": torch.zeros(2)}}, "'state_dict' is a dict"),
        ({"model.0.weight": torch.zeros(2), "epoch": 3}, "'epoch' is a int"),
        ({0: torch.zeros(2)}, "0 is a Tensor"),
    ],
)
def test_other_contents_are_refused(content, words, tmp_path):
    file = tmp_path / "net.pth"
    torch.save(content, file)
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: .*{words}"):
        load_published(file)


def test_damaged_files_are_refused(tmp_path):
    file = tmp_path / "net.pth"
    torch.save(discriminator().state_dict(), file)
    whole = file.read_bytes()
    for content in (b"", b"no checkpoint", whole[:100], whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: is damaged"):
            load_published(file)
    with pytest.raises(ValueError, match=r"absent\.pth: cannot be read: No such file"):
        load_published(tmp_path / "absent.pth")


def test_archives_are_compared_with_their_checksums(tmp_path):
    """`torch.load` alone reads a changed weight without a word."""
    file = tmp_path / "net.pth"
    state = discriminator().state_dict()
    torch.save(state, file)
    whole = bytearray(file.read_bytes())
    place = whole.index(state["model.0.weight"].numpy().tobytes())
    whole[place] ^= 1
    file.write_bytes(whole)
    assert not torch.equal(torch.load(file)["model.0.weight"], state["model.0.weight"])
    with pytest.raises(ValueError, match=r"net\.pth: is damaged: the checksum of .* is wrong"):
        load_published(file)


def test_what_unpacks_to_more_is_refused(tmp_path):
    file, packed = tmp_path / "net.pth", tmp_path / "packed.pth"
    torch.save({"model.0.weight": torch.zeros(1000)}, file)
    with zipfile.ZipFile(file) as a, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as b:
        for name in a.namelist():
            b.writestr(name, a.read(name))
    with pytest.raises(ValueError, match=r"packed\.pth: must be as torch\.save wrote it"):
        load_published(packed)
    # Of one stored number a tensor of 2^60.
    torch.save({"model.0.weight": torch.zeros(1).expand(2**60)}, file)
    with pytest.raises(ValueError, match=r"model\.0\.weight must be dense"):
        load_published(file)
    file.unlink()
    for make, what in (
        (lambda: os.mkfifo(file), "pipe"), (lambda: file.symlink_to("/dev/zero"), "device")
    ):  # fmt: skip
        make()
        with pytest.raises(ValueError, match=rf"net\.pth: must be a file, is a .*{what}"):
            load_published(file)
        file.unlink()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model.3.extra": torch.zeros(1)}, r"1 are unexpected \['model\.3\.extra'\]"),
        ({"module.model.0.weight": torch.zeros(1)}, r"\['module\.model\.0\.weight'\]"),
        (
            {"model.0.weight": torch.full((8, 6, 4, 4), math.nan)},
            r"model\.0\.weight must be finite",
        ),
        ({"model.0.bias": torch.zeros(8).int()}, r"model\.0\.bias must be torch\.float32, got"),
        (
            {"model.11.weight": torch.zeros(1, 64, 3, 3)},
            r"model\.11\.weight must be \(1, 64, 4, 4\)",
        ),
        ({"model.0.weight": torch.zeros(1, 1, 1, 1).expand(2**30, 2**20, 4, 4)}, "size"),
    ],
)
def test_every_entry_is_used_or_refused_by_name(change, words):
    state = seeded(lambda: PatchDiscriminator(PatchDiscriminatorConfig(width=8))).state_dict()
    with pytest.raises(ValueError, match=rf"state of a PatchDiscriminator: .*{words}"):
        network_of({**state, **change})


def test_metadata_is_dropped(tmp_path):
    file = tmp_path / "net.pth"
    state = dict(discriminator().state_dict())
    torch.save({**state, "_metadata": {"": {"version": 1}}}, file)
    loaded = load_published(file)
    assert list(loaded) == list(state) and not hasattr(loaded, "_metadata")


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


@pytest.mark.parametrize(
    "state, words",
    [
        (without(unet().state_dict(), "model.model.3.bias"), "UNet.*1 tensors are missing.*l.3.bi"),
        (without(resnet().state_dict(), "model.11.conv_block.5.bias"), "Resnet.*11.conv_block.5.b"),
        (without(discriminator().state_dict(), "model.3.bias"), "Patch.*missing.*'model.3.bias'"),
        (
            {**resnet().state_dict(), "model.4.filt": torch.ones(2)},
            "1 are unexpected.*model.4.filt",
        ),
        (
            {**discriminator().state_dict(), "model.5.weight": torch.ones(9, 8, 4, 4)},
            r"model.5.weight must be \(16, 8, 4, 4\), got \(9, 8, 4, 4\)",
        ),
        (without(unet().state_dict(), "model.model.3.weight"), "no convolution model.model.3.wei"),
        (without(discriminator().state_dict(), "model.0.weight"), "no convolution model.0.weight"),
        (without(discriminator(patch=16).state_dict(), "model.2.weight"), "3 to 7 layers, got 2"),
        ({"encoder.weight": torch.ones(2)}, "patch discriminator.*it has encoder.weight"),
        ({"model.0.weight": torch.ones(2)}, "no convolution model.0.weight"),
        ({}, "has no convolution"),
    ],
)
def test_other_networks_are_refused(state, words):
    with pytest.raises(ValueError, match=f"^state .*{words}"):
        network_of(state)


# Impossible networks and inputs -------------------------------------------------------------------
@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: PatchDiscriminatorConfig(in_channels=0), "in_channels"),
        (lambda: PatchDiscriminatorConfig(width=-1), "width"),
        (lambda: PatchDiscriminatorConfig(patch=71), "patch must be one of 1, 16, .*got 71"),
        (lambda: PatchDiscriminatorConfig(norm="group"), "norm .*got 'group'"),
        (lambda: UNetGeneratorConfig(out_channels=0), "out_channels"),
        (lambda: UNetGeneratorConfig(downs=1), "downs must be at least 2, got 1"),
        (lambda: UNetGeneratorConfig(downs=5), "dropout must be False"),
        (lambda: UNetGeneratorConfig(norm="actnorm"), "norm"),
        (lambda: ResnetGeneratorConfig(blocks=0), "blocks"),
        (lambda: ResnetGeneratorConfig(norm="layer"), "norm"),
    ],
)
def test_impossible_configs(make, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        make()


def test_impossible_inputs():
    network = discriminator(in_channels=5, patch=16)
    x, y = images(2, 2, 9, 8), images(2, 3, 9, 8)
    for arguments, words in [
        ((x,), r"x must have shape \(B, 5, H, W\)"),
        ((x, x), "x and y must have 5 channels together, got 2 and 2"),
        ((x, y[:1]), "y must have the shape of x"),
        ((x, y[..., :-1]), "y must have the shape of x"),
        ((x, y[0]), r"y must have shape \(B, C, H, W\)"),
        ((x[0], y[0]), "x must have shape"),
    ]:
        with pytest.raises(ValueError, match=f"^{words}"):
            network(*arguments)
    for generator in (unet(), resnet()):
        with pytest.raises(ValueError, match=r"^x must have shape \(B, 3, H, W\)"):
            generator(x)
        with pytest.raises(TypeError, match=r"^x must be a floating tensor, got torch\.uint8"):
            generator(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"^x must .* H and W of at least 5"):
        resnet()(images(1, 3, 4, 8))
