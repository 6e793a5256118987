"""Trained image-to-image networks of others: from a file to the network that it holds.

    network = network_of(load_published("latest_net_G.pth"))

Files    a bare state_dict as torch.save wrote it, with the names of pix2pix, CycleGAN and VQGAN.
Source   the networks are those of arXiv:1611.07004, arXiv:1703.10593 and arXiv:2012.09841.
"""

import functools
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor, nn

from cgm.checkpoints import check_file, network_with
from cgm.networks.patch_discriminator import (
    PATCHES,
    PatchDiscriminator,
    PatchDiscriminatorConfig,
    accept_main,
)
from cgm.networks.resnet_generator import ResnetGenerator, ResnetGeneratorConfig
from cgm.networks.unet_generator import UNetGenerator, UNetGeneratorConfig

_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


def load_published(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU, under the names that today's modules have.

    Names lose the `module.` of data parallel training. Running statistics of instance norms, which
    files of 2018 and before have, are dropped, as the published code does: an image is normalized
    by its own. Batch norms from before PyTorch 0.4 gain their counters.

    The archives that PyTorch writes since 1.6 carry checksums, which are compared; older files have
    none, and a value that changed there shows only if it is not finite.

    Raises:
        ValueError: the file cannot be read, is damaged, would run code, or holds anything but one
            dict of tensors. The message names the file.
    """
    check_file(path)
    try:
        with Path(path).open("rb") as file:
            _check_archive(file, path)
            loaded = _tensors_of(file, path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(f"{path}: must be a dict of tensors, got {type(loaded).__name__}")
    state = {name: value for name, value in loaded.items() if name != "_metadata"}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: must be a dict of tensors, but {name!r} is a {type(value).__name__}"
            )
        if value.layout != torch.strided or value.untyped_storage().nbytes() < value.nbytes:
            raise ValueError(f"{path}: {name} must be dense, holds fewer values than its shape")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    for name in [name for name in state if name.endswith(".running_mean")]:
        norm = name.removesuffix("running_mean")
        if f"{norm}weight" in state:  # a batch norm
            state.setdefault(f"{norm}num_batches_tracked", torch.tensor(0))
        else:
            for running in _RUNNING:
                state.pop(norm + running, None)
    return state


def _check_archive(file: BinaryIO, path: str | Path) -> None:
    """Compares the checksums, which `torch.load` passes over; of an older file there are none."""
    if file.read(4) == b"PK\3\4":
        try:
            with zipfile.ZipFile(file) as archive:
                # Nothing that PyTorch wrote unpacks to more than it is.
                stored = all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())
                damaged = archive.testzip() if stored else None
        except Exception as error:  # a damaged file can raise anything
            raise ValueError(f"{path}: is damaged: {error}") from error
        if not stored:
            raise ValueError(f"{path}: must be as torch.save wrote it, is a compressed archive")
        if damaged is not None:
            raise ValueError(f"{path}: is damaged: the checksum of {damaged} is wrong")
    file.seek(0)


def _tensors_of(file: BinaryIO, path: str | Path) -> Any:
    try:
        # Only tensors and containers are unpickled: no file can run code.
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{path}: is damaged, or holds more than tensors, so not read") from error


def network_of(
    state: Mapping[str, Tensor],
    *,
    dropout: bool = True,
    padding: Literal["reflect", "replicate"] = "reflect",
) -> nn.Module:
    """The network whose parameters these are, with them, in evaluation mode.

    A PatchDiscriminator, a UNetGenerator or a ResnetGenerator, its config read from names and
    shapes. pix2pix itself samples in training mode, with batch norms that see the batch.

    Args:
        state: as of `load_published`.
        dropout: whether a U-Net has it where one of its size can; its parameters do not tell.
        padding: border in the blocks of a ResNet that is not of zeros; its parameters do not tell.

    Raises:
        ValueError: the names are of no such network, or tensors are missing, are left over or have
            another shape than in the network that they resemble. The message names them.
    """
    state = dict(state)
    accept_main(state)
    make: Callable[[], nn.Module]
    if "model.model.0.weight" in state:
        kind, make = "UNetGenerator", functools.partial(UNetGenerator, _unet(state, dropout))
    elif any(".conv_block." in name for name in state):
        kind, make = "ResnetGenerator", functools.partial(ResnetGenerator, _resnet(state, padding))
    else:
        kind = "PatchDiscriminator"
        make = functools.partial(PatchDiscriminator, _discriminator(state))
    where = f"state of a {kind}"
    with torch.random.fork_rng(devices=[]):  # the initial weights are of no interest
        return network_with(make, state, where, config=where).eval()


def _unet(state: Mapping[str, Tensor], dropout: bool) -> UNetGeneratorConfig:
    inner, downs = "model.model.1.model.", 2
    while f"{inner}3.model.1.weight" in state:
        inner, downs = f"{inner}3.model.", downs + 1
    width, in_channels = _shape(state, "model.model.0.weight")
    return UNetGeneratorConfig(
        in_channels=in_channels,
        out_channels=_shape(state, "model.model.3.weight")[1],
        downs=downs,
        width=width,
        norm=_norm(state, "model.model.0.bias"),
        dropout=dropout and downs >= 6,
    )


def _resnet(
    state: Mapping[str, Tensor], padding: Literal["reflect", "replicate"]
) -> ResnetGeneratorConfig:
    blocks = len({name.split(".")[1] for name in state if ".conv_block." in name})
    width, in_channels = _shape(state, "model.1.weight")
    # A border of zeros has no number of its own. Without dropout this one is a normalization.
    zero = "model.10.conv_block.0.weight" in state
    second = state.get(f"model.10.conv_block.{4 if zero else 6}.weight")
    return ResnetGeneratorConfig(
        in_channels=in_channels,
        out_channels=_shape(state, f"model.{17 + blocks}.weight")[0],
        blocks=blocks,
        width=width,
        norm=_norm(state, "model.1.bias"),
        dropout=second is not None and second.dim() == 4,
        padding="zero" if zero else padding,
    )


def _discriminator(state: Mapping[str, Tensor]) -> PatchDiscriminatorConfig:
    prefix = "net" if any(name.startswith("net.") for name in state) else "model"
    spectral = f"{prefix}.0.weight_orig" in state
    weight = "weight_orig" if spectral else "weight"
    width, in_channels = _shape(state, f"{prefix}.0.{weight}")
    numbered = re.compile(rf"{prefix}\.\d+\.{weight}")
    convs = sum(bool(numbered.fullmatch(name)) and t.dim() == 4 for name, t in state.items())
    patches = {n + 2: patch for patch, n in PATCHES.items() if patch > 1}
    if prefix == "model" and convs not in patches:
        raise ValueError(f"state must have {min(patches)} to {max(patches)} layers, got {convs}")
    actnorm = f"{prefix}.3.loc" in state
    return PatchDiscriminatorConfig(
        in_channels=in_channels,
        patch=patches[convs] if prefix == "model" else 1,  # type: ignore[arg-type]
        width=width,
        norm="actnorm" if actnorm else _norm(state, f"{prefix}.2.bias"),
        spectral_norm=spectral,
    )


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Of the weight of a convolution: (out, in), or (in, out) if transposed."""
    if name not in state or state[name].dim() != 4:
        raise ValueError(
            "state must be of a patch discriminator, a U-Net or a ResNet generator, but has no "
            f"convolution {name}; it has {', '.join(list(state)[:4])}, ..."
        )
    return state[name].shape[0], state[name].shape[1]


def _norm(state: Mapping[str, Tensor], bias: str) -> Literal["batch", "instance", "none"]:
    """The normalization of a network; `bias` is one that a convolution before instance norm has."""
    if any(name.endswith("running_mean") for name in state):
        return "batch"
    return "instance" if bias in state else "none"
