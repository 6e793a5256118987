"""Published pix2pix and CycleGAN checkpoints as models of ours.

file                   beside it                                        becomes
PREFIXnet_G_A.pth      PREFIXnet_G_B.pth; PREFIXnet_D_A.pth and _D_B    CycleGAN
PREFIXnet_G.pth        PREFIXnet_D.pth                                  Pix2Pix
any other              -                                                Pix2Pix

Discriminators may be missing; those get initial weights. What a file cannot tell is asked for, the
side of the images, the dropout of a U-Net and the border in the blocks of a ResNet, or has its
default: the objective, which only further training needs. `assumed` says it in words.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

from torch import nn

from cgkernels.checks import check_choice
from cgm.families.cyclegan import CycleGAN, CycleGANConfig
from cgm.families.gan import Pix2Pix, Pix2PixConfig
from cgm.model import Model, make_model
from cgm.networks.patch_discriminator import PatchDiscriminator
from cgm.networks.published import load_published, network_of
from cgm.networks.resnet_generator import ResnetGenerator
from cgm.networks.unet_generator import UNetGenerator

Generator = UNetGenerator | ResnetGenerator
Border = Literal["reflect", "replicate"]


def convert_published(
    file: str | Path,
    *,
    size: int = 256,
    dropout: bool = True,
    padding: Border = "reflect",
) -> tuple[Model, dict[str, str]]:
    """The model of a generator's file, and in words where each of its networks comes from.

    Args:
        file: of a generator, as above; read without running code.
        size: side of the images in pixels.
        dropout: whether a U-Net for pix2pix has it; its parameters do not tell.
        padding: border in the blocks of a ResNet, unless it is of zeros; its parameters do not
            tell.

    Raises:
        ValueError: a file cannot be read, is no such network or does not fit the others, the other
            generator of a CycleGAN is missing, or the size does not fit. The message names the
            file.
    """
    file = Path(file)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be a positive whole number of pixels, got {size!r}")
    check_choice("padding", padding, ("reflect", "replicate"))
    named = re.fullmatch(r"(.*)net_(G|G_A|G_B)\.pth", file.name)
    prefix, part = named.groups() if named else ("", "")
    if part == "G_B":
        raise ValueError(f"{file}: is for the way back; convert {prefix}net_G_A.pth beside it")
    if part == "G_A":
        sides = {s: file.with_name(f"{prefix}net_D_{s.upper()}.pth") for s in "ab"}
        return _cyclegan(file, file.with_name(f"{prefix}net_G_B.pth"), sides, size, padding)
    judge = file.with_name(f"{prefix}net_D.pth") if named else None
    return _pix2pix(file, judge, size, dropout, padding)


def assumed(model: Model) -> list[str]:
    """What a converted model is that its file does not tell, and how that is asked for."""
    config = model.config
    words = [f"images of {config.event_shape[1]} pixels a side (size)"]
    if config.generator == "resnet" and config.padding != "zero":
        words.append(f"{config.padding} padding in the blocks of the ResNet (padding)")
    if config.generator == "unet" and isinstance(config, Pix2PixConfig) and config.depth >= 6:
        words.append(f"a U-Net {'with' if config.dropout else 'without'} dropout (dropout)")
    if config.norm == "batch":
        words.append("batch norms that use the statistics of the file, not those of the batch")
    return words


def _pix2pix(
    file: Path, discriminator_file: Path | None, size: int, dropout: bool, padding: Border
) -> tuple[Model, dict[str, str]]:
    generator = _generator(file, dropout, padding)
    fields = _fields(generator, size) | {"dropout": generator.config.dropout}
    channels = generator.config.in_channels + generator.config.out_channels
    networks: dict[str, tuple[nn.Module, Path]] = {"generator": (generator, file)}
    if discriminator_file is not None and discriminator_file.exists():
        discriminator = _discriminator(discriminator_file, generator, channels)
        networks["discriminator"] = discriminator, discriminator_file
        fields |= {
            "patch": discriminator.config.patch,
            "discriminator_width": discriminator.config.width,
        }
    return _model(Pix2Pix, Pix2PixConfig, fields, networks)


def _cyclegan(
    file: Path,
    backward_file: Path,
    discriminator_files: dict[str, Path],
    size: int,
    padding: Border,
) -> tuple[Model, dict[str, str]]:
    if not backward_file.exists():
        raise ValueError(f"{backward_file}: is missing: a CycleGAN has it beside {file.name}")
    forward = _generator(file, False, padding)
    backward = _generator(backward_file, False, padding)
    for generator, of in ((forward, file), (backward, backward_file)):
        if generator.config.dropout:
            raise ValueError(f"{of}: has dropout, which a CycleGAN has not here")
    a, b = forward.config.in_channels, forward.config.out_channels
    mirrored = dataclasses.replace(forward.config, in_channels=b, out_channels=a)
    if backward.config != mirrored:
        raise ValueError(
            f"{backward_file}: must be {mirrored} to fit {file.name}, got {backward.config}"
        )
    fields = _fields(forward, size)
    if a != b:
        fields["identity_weight"] = 0.0  # no image is of both kinds
    networks: dict[str, tuple[nn.Module, Path]] = {
        "generator_a": (forward, file), "generator_b": (backward, backward_file)
    }  # fmt: skip
    channels_of = {"a": b, "b": a}
    for side, discriminator_file in discriminator_files.items():
        if not discriminator_file.exists():
            continue
        discriminator = _discriminator(discriminator_file, forward, channels_of[side])
        found = {
            "patch": discriminator.config.patch,
            "discriminator_width": discriminator.config.width,
        }
        if fields.keys() & found.keys() and fields != fields | found:
            raise ValueError(
                f"{discriminator_file}: must be of the size of {discriminator_files['a'].name}"
            )
        fields |= found
        networks[f"discriminator_{side}"] = discriminator, discriminator_file
    return _model(CycleGAN, CycleGANConfig, fields, networks)


def _model(
    family: type[Model],
    config_class: type[Any],
    fields: dict[str, Any],
    networks: dict[str, tuple[nn.Module, Path]],
) -> tuple[Model, dict[str, str]]:
    try:
        config = config_class(**fields)
    except ValueError as error:
        raise ValueError(f"size must fit the network: {error}") from error
    model = make_model(family, config)
    sources = {}
    for name, network in model.named_children():
        if name in networks:
            network.load_state_dict(networks[name][0].state_dict())
            sources[name] = networks[name][1].name
        elif isinstance(network, PatchDiscriminator):
            sources[name] = "no file: initial weights"
    return model.eval(), sources


def _fields(generator: Generator, size: int) -> dict[str, Any]:
    """Of the config of a model."""
    config = generator.config
    return {
        "event_shape": (config.out_channels, size, size),
        "cond_shape": (config.in_channels, size, size),
        "width": config.width,
        "norm": config.norm,
        **(
            {"generator": "unet", "depth": generator.config.downs}
            if isinstance(generator, UNetGenerator)
            else {
                "generator": "resnet",
                "depth": generator.config.blocks,
                "padding": generator.config.padding,
            }
        ),
    }


def _network(file: Path, dropout: bool, padding: Border) -> nn.Module:
    state = load_published(file)
    try:
        return network_of(state, dropout=dropout, padding=padding)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _generator(file: Path, dropout: bool, padding: Border) -> Generator:
    network = _network(file, dropout, padding)
    if not isinstance(network, Generator):
        raise ValueError(f"{file}: must be of a generator, holds a {type(network).__name__}")
    return network


def _discriminator(file: Path, generator: Generator, channels: int) -> PatchDiscriminator:
    """One that judges so many channels, normalized as the generator is."""
    network = _network(file, False, "reflect")
    if not isinstance(network, PatchDiscriminator):
        raise ValueError(f"{file}: must be of a discriminator, holds a {type(network).__name__}")
    got, norm = network.config, generator.config.norm
    if (got.in_channels, got.norm, got.spectral_norm) != (channels, norm, False):
        spectral = ", spectral norm" if got.spectral_norm else ""
        raise ValueError(
            f"{file}: must be for {channels} channels with norm {norm} to fit the generator, "
            f"is for {got.in_channels} with norm {got.norm}{spectral}; without this file the "
            "discriminator gets initial weights"
        )
    return network
