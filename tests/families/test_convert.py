"""Published checkpoints of pix2pix and CycleGAN: from their files to a model that draws."""

import dataclasses
import json
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cgm.checkpoints import load_model, read_tensors
from cgm.cli import main
from cgm.families.convert import convert_published
from cgm.families.cyclegan import CycleGAN
from cgm.families.gan import Pix2Pix
from cgm.networks.patch_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from cgm.networks.resnet_generator import ResnetGenerator, ResnetGeneratorConfig
from cgm.networks.unet_generator import UNetGenerator, UNetGeneratorConfig


def unet(seed=0, **changes):
    downs = changes.get("downs", 6)
    sizes = {"in_channels": 1, "downs": downs, "width": 2, "dropout": downs >= 6}
    return seeded(seed, UNetGenerator, UNetGeneratorConfig(**{**sizes, **changes}))


def resnet(seed=0, **changes):
    sizes = {"blocks": 2, "width": 2}
    return seeded(seed, ResnetGenerator, ResnetGeneratorConfig(**{**sizes, **changes}))


def discriminator(seed=0, **changes):
    config = {"in_channels": 4, "patch": 34, "width": 3, "norm": "batch"}
    return seeded(seed, PatchDiscriminator, PatchDiscriminatorConfig(**{**config, **changes}))


def seeded(seed, make, config):
    """A network that differs from its initial weights everywhere, running statistics included."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = make(config)
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return network.eval()


def publish(folder, **networks):
    """Their files; returns the first one's."""
    for name, network in networks.items():
        torch.save(network.state_dict(), folder / f"latest_net_{name}.pth")
    return folder / f"latest_net_{next(iter(networks))}.pth"


def images(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def assert_same(network: nn.Module, other: nn.Module) -> None:
    state, others = network.state_dict(), other.state_dict()
    assert state.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in state.items())


@pytest.fixture
def cgm(capsys):
    """Runs a command line: exit code, stdout, stderr."""

    def run(*words):
        capsys.readouterr()
        return main([*map(str, words)]), *capsys.readouterr()

    return run


# pix2pix ------------------------------------------------------------------------------------------
def test_pix2pix_from_its_files_to_an_image(cgm, tmp_path):
    network, judge = unet(), discriminator()
    file = publish(tmp_path, G=network, D=judge)
    out = tmp_path / "model"
    code, printed, err = cgm("convert", file, out, "--size", 64)
    assert code == 0 and err == ""
    lines = printed.splitlines()
    assert lines[:2] == ["generator: latest_net_G.pth", "discriminator: latest_net_D.pth"]
    assert json.loads((out / "config.json").read_text())["converted"] == {
        "generator": "latest_net_G.pth", "discriminator": "latest_net_D.pth",
    }  # fmt: skip
    model = load_model(out)
    assert isinstance(model, Pix2Pix) and model.config.generator == "unet"
    assert model.config.event_shape == (3, 64, 64) and model.config.cond_shape == (1, 64, 64)
    assert model.config.dropout and (model.config.patch, model.config.depth) == (34, 6)
    assert_same(model.generator, network)
    assert_same(model.discriminator, judge)
    cond = images(2, 1, 64, 64)
    drawn = model.sample(cond=cond, seed=3, index=torch.tensor([5, 6]))
    torch.testing.assert_close(drawn, network(cond, seed=3, index=torch.tensor([5, 6])))
    torch.testing.assert_close(model.sample(cond=cond, dropout=False), network(cond))

    # The printed command draws, of a gray image as the network reads it: v / 127.5 - 1.
    levels = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    Image.fromarray(levels).save(tmp_path / "an image.png")
    command = shlex.split(lines[-1].replace("IMAGE", f"'{tmp_path}/an image.png'"))
    array = tmp_path / "a.safetensors"
    more = ("--n", 1, "--no-dropout", "--out", tmp_path / "a.png", "--save-array", array)
    code, _, err = cgm(*command[1:], *more)
    assert command[:2] == ["cgm", "sample"] and code == 0 and err == ""
    cond = torch.from_numpy(levels).float()[None, None] / 127.5 - 1
    torch.testing.assert_close(read_tensors(array)[0]["samples"][0], network(cond))


def test_dropout_is_a_flag(tmp_path):
    file = publish(tmp_path, G=unet())
    assert not convert_published(file, size=64, dropout=False)[0].config.dropout
    assert not convert_published(publish(tmp_path, G=unet(downs=3)), size=8)[0].config.dropout
    # Of residual blocks the file tells.
    file = publish(tmp_path, G=resnet(dropout=True))
    assert convert_published(file, size=16, dropout=False)[0].config.dropout


def test_without_a_discriminator_it_starts_anew(cgm, tmp_path):
    network = resnet(in_channels=1)
    file = publish(tmp_path, G=network)
    # The file of another epoch is not its discriminator's.
    torch.save(discriminator().state_dict(), tmp_path / "5_net_D.pth")
    code, printed, _ = cgm("convert", file, tmp_path / "model", "--size", 20)
    assert code == 0 and "discriminator: no file: initial weights" in printed
    info = json.loads((tmp_path / "model" / "config.json").read_text())
    assert info["converted"]["discriminator"] == "no file: initial weights"
    model = load_model(tmp_path / "model")
    assert model.config.generator == "resnet" and model.config.norm == "instance"
    assert model.config.patch == 70 and model.config.depth == 2
    cond = images(1, 1, 20, 20)
    torch.testing.assert_close(model.sample(cond=cond), network(cond))


def test_other_names_and_old_files(tmp_path):
    network = resnet()
    old = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    for name, module in network.named_modules():
        if isinstance(module, nn.InstanceNorm2d):
            old[f"module.{name}.running_mean"] = torch.zeros(module.num_features)
            old[f"module.{name}.running_var"] = torch.ones(module.num_features)
    torch.save(old, tmp_path / "horse.pth")
    model, sources = convert_published(tmp_path / "horse.pth", size=16)
    assert_same(model.generator, network)
    assert sources["generator"] == "horse.pth"


# CycleGAN -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("judges", ["", "A", "AB"])
@pytest.mark.parametrize("make", [resnet, unet])
def test_cyclegan(tmp_path, make, judges):
    norm = {"norm": "instance"}
    sizes = {"in_channels": 3, "downs": 3} if make is unet else {}
    networks = {"G_A": make(1, **sizes, **norm), "G_B": make(2, **sizes, **norm)}
    for side in judges:
        networks[f"D_{side}"] = discriminator(ord(side), in_channels=3, **norm)
    model, sources = convert_published(publish(tmp_path, **networks), size=16)
    assert isinstance(model, CycleGAN)
    assert model.config.identity_weight == 0.5
    for side in "AB":
        assert_same(getattr(model, f"generator_{side.lower()}"), networks[f"G_{side}"])
        assert sources[f"generator_{side.lower()}"] == f"latest_net_G_{side}.pth"
        name = f"discriminator_{side.lower()}"
        if side in judges:
            assert_same(getattr(model, name), networks[f"D_{side}"])
            assert sources[name] == f"latest_net_D_{side}.pth"
        else:
            assert sources[name] == "no file: initial weights"
    x = images(2, 3, 16, 16)
    torch.testing.assert_close(model.sample(cond=x), networks["G_A"](x))
    torch.testing.assert_close(model.sample(cond=x, way="back"), networks["G_B"](x))


class PublishedBlock(nn.Module):
    """A residual block as it is published, of this padding_type; batch norm, no dropout."""

    def __init__(self, width, padding):
        super().__init__()
        pad = {"reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d}.get(padding)

        def half():
            conv = nn.Conv2d(width, width, 3, padding=0 if pad else 1, bias=False)
            return *([pad(1)] if pad else []), conv, nn.BatchNorm2d(width)

        self.conv_block = nn.Sequential(*half(), nn.ReLU(), *half())

    def forward(self, x):
        return x + self.conv_block(x)


def published_resnet(padding):
    """The published generator of two blocks, written out."""

    def norm_relu(n):
        return nn.BatchNorm2d(n), nn.ReLU()

    layers = [
        nn.ReflectionPad2d(3), nn.Conv2d(3, 2, 7, bias=False), *norm_relu(2),
        nn.Conv2d(2, 4, 3, 2, 1, bias=False), *norm_relu(4),
        nn.Conv2d(4, 8, 3, 2, 1, bias=False), *norm_relu(8),
        PublishedBlock(8, padding), PublishedBlock(8, padding),
        nn.ConvTranspose2d(8, 4, 3, 2, 1, 1, bias=False), *norm_relu(4),
        nn.ConvTranspose2d(4, 2, 3, 2, 1, 1, bias=False), *norm_relu(2),
        nn.ReflectionPad2d(3), nn.Conv2d(2, 3, 7), nn.Tanh(),
    ]  # fmt: skip

    class Published(nn.Module):
        def __init__(self, _):
            super().__init__()
            self.model = nn.Sequential(*layers)

        def forward(self, x):
            return self.model(x)

    network = seeded(0, Published, None)
    network.model[-2].weight.data /= 50  # where tanh has not yet come to its ends
    return network


@pytest.mark.parametrize("padding", ["reflect", "replicate", "zero"])
def test_a_file_does_not_tell_its_padding(cgm, tmp_path, padding):
    network = published_resnet(padding)
    file = publish(tmp_path, G=network)
    asked = () if padding == "zero" else ("--padding", padding)
    code, out, err = cgm("convert", file, tmp_path / "model", "--size", 16, *asked)
    assert code == 0, err
    assert (f"assumed: {padding} padding" in out) == (padding != "zero")
    assert "assumed: images of 16 pixels" in out and "assumed: batch norms" in out
    model, x = load_model(tmp_path / "model"), images(2, 3, 16, 16)
    expected = network(x)
    torch.testing.assert_close(model.sample(cond=x), expected, rtol=1e-4, atol=1e-5)
    if padding == "replicate":  # otherwise it comes out wrong
        other = convert_published(file, size=16)[0].sample(cond=x)
        assert (other - expected).abs().max() > 0.01
    with pytest.raises(ValueError, match="padding must be one of reflect, replicate, got 'zero'"):
        convert_published(file, size=16, padding="zero")


def test_cyclegan_between_different_channels(tmp_path):
    networks = {
        "G_A": resnet(1, in_channels=1), "G_B": resnet(2, out_channels=1),
        "D_A": discriminator(3, in_channels=3, norm="instance"),
        "D_B": discriminator(4, in_channels=1, norm="instance"),
    }  # fmt: skip
    model, _ = convert_published(publish(tmp_path, **networks), size=16)
    assert model.config.cond_shape == (1, 16, 16) and model.config.event_shape == (3, 16, 16)
    assert model.config.identity_weight == 0
    assert_same(model.discriminator_b, networks["D_B"])


# Errors -------------------------------------------------------------------------------------------
def half(network):
    """The network without some of its tensors."""
    state = dict(list(network.state_dict().items())[:-2])
    network.state_dict = lambda: state
    return network


INSTANCE = {"in_channels": 3, "norm": "instance"}


@pytest.mark.parametrize(
    "networks, words",
    [
        ({"D": discriminator()}, "latest_net_D.pth: must be of a generator, holds a PatchDiscr"),
        ({"G": discriminator()}, "latest_net_G.pth: must be of a generator"),
        ({"G": half(unet())}, "latest_net_G.pth: state must be of a .*has no convolution"),
        ({"G": nn.Linear(2, 2)}, "latest_net_G.pth: state must be of a patch discriminator"),
        ({"G": nn.Identity()}, "latest_net_G.pth: must be a dict of tensors"),
        ({"G": unet(), "D": unet()}, "latest_net_D.pth: must be of a discriminator, holds a UNet"),
        ({"G": unet(), "D": discriminator(in_channels=6)}, "must be for 4 channels with norm"),
        ({"G": unet(), "D": discriminator(norm="none")}, "is for 4 with norm none"),
        ({"G": unet(), "D": discriminator(spectral_norm=True)}, "norm batch, spectral norm"),
        ({"G": unet(downs=7)}, "size must fit the network: .* multiples of 128"),
        ({"G_A": resnet()}, "latest_net_G_B.pth: is missing: a CycleGAN has it"),
        ({"G_B": resnet()}, "is for the way back; convert latest_net_G_A.pth"),
        ({"G_A": resnet(), "G_B": resnet(blocks=3)}, "latest_net_G_B.pth: must be ResnetGen"),
        ({"G_A": resnet(dropout=True), "G_B": resnet()}, "latest_net_G_A.pth: has dropout"),
        (
            {
                "G_A": resnet(), "G_B": resnet(), "D_A": discriminator(**INSTANCE),
                "D_B": discriminator(**INSTANCE, patch=16),
            },
            "latest_net_D_B.pth: must be of the size of latest_net_D_A.pth",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(cgm, tmp_path, networks, words):
    file = publish(tmp_path, **networks)
    before = sorted(tmp_path.iterdir())
    code, out, err = cgm("convert", file, tmp_path / "model", "--size", 64)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert re.search(words, err), err
    assert sorted(tmp_path.iterdir()) == before


def test_other_files_sizes_and_folders(cgm, tmp_path):
    file = publish(tmp_path, G=resnet())
    (tmp_path / "latest.pth").write_bytes(b"no checkpoint")
    torch.save({"state_dict": resnet().state_dict()}, tmp_path / "lightning.pth")
    torch.save(resnet(), tmp_path / "pickled.pth")
    for words, message in (
        ((tmp_path / "no_net_G.pth", tmp_path / "x"), "no_net_G.pth: cannot be read: No such file"),
        ((tmp_path / "latest.pth", tmp_path / "x"), "latest.pth: is damaged"),
        ((tmp_path / "lightning.pth", tmp_path / "x"), "'state_dict' is a"),
        ((tmp_path / "pickled.pth", tmp_path / "x"), "holds more than tensors"),
        ((tmp_path, tmp_path / "x"), "must be a file, is a folder"),
        ((file, tmp_path), "OUT must be an empty folder"),
        ((file, tmp_path / "latest.pth"), "OUT must be an empty folder"),
        ((file, tmp_path / "x", "--size", 0), "size must be a positive whole number"),
        ((file, tmp_path / "x", "--size", 18), "multiples of 4"),
    ):
        code, out, err = cgm("convert", *words)
        assert code == 2 and out == "" and err.count("\n") == 1 and message in err, err
        assert not (tmp_path / "x").exists()


def test_a_converted_model_can_learn_on(tmp_path):
    """Its loss is the objective of its config, with the weights of the files."""
    networks = {"G": resnet(in_channels=1, norm="batch"), "D": discriminator()}
    model, _ = convert_published(publish(tmp_path, **networks), size=16)
    y, cond = images(2, 3, 16, 16), images(2, 1, 16, 16)
    losses = model.loss(y, cond=cond, phase="generator", seed=0)
    drawn = networks["G"](cond)
    torch.testing.assert_close(losses["l1"], (drawn - y).abs().mean((1, 2, 3)))
    assert dataclasses.asdict(model.config)["loss"] == "vanilla"
