"""PatchGAN discriminators: a map of scores, one for each patch of the image.

    h <- leaky_relu(norm(conv(h)))   with 4 x 4 convolutions: n of stride 2, then one of stride 1;
    map = conv(h)                    stride 1, one channel.    First block: no norm.

Patch    16, 34, 70, 142, 286 pixels for n = 1 .. 5; a patch of 1 has three 1 x 1 convolutions.
Shapes   x (B, C_x, H, W), y (B, C_y, H, W) or None -> (B, 1, h, w); no sigmoid.
Names    of parameters as in the published discriminators of pix2pix, CycleGAN and VQGAN.
Source   Isola et al., arXiv:1611.07004; Wang et al., arXiv:1711.11585 (features); Esser et
         al., arXiv:2012.09841 (ActNorm); Miyato et al., arXiv:1802.05957 (spectral norm).
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

import cgkernels
from cgm.model import Config, Count
from cgm.networks.layers import (
    check_image,
    conv_before_norm,
    fold_norm,
    has_bias,
    init_normal,
    is_plain,
    is_unhooked,
    new_norm,
    norm_act,
    pack_conv,
    weight_of,
)

# Convolutions of stride 2 by patch.
PATCHES = {1: 0, 16: 1, 34: 2, 70: 3, 142: 4, 286: 5}


@dataclass(frozen=True)
class PatchDiscriminatorConfig(Config):
    """Sizes and kinds of the parts."""

    # Channels of x and y together.
    in_channels: Count = 6
    # Side of the square of pixels that one score sees.
    patch: Literal[1, 16, 34, 70, 142, 286] = 70
    # Channels of the first block; they double with each further one, up to eight times as many.
    width: Count = 64
    # Normalization; actnorm is an affine map that the first batch initializes.
    norm: Literal["batch", "instance", "none", "actnorm"] = "batch"
    # Weights divided by their largest singular value.
    spectral_norm: bool = False


class PatchDiscriminator(nn.Module):
    """Scores of all patches.

    Parameters are `net.*` for a patch of 1, else `model.*`; `load_state_dict` takes the `main.*` of
    VQGAN too. With spectral norm the estimate of the singular vectors moves at each forward in
    training.
    """

    def __init__(self, config: PatchDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        geometry, width = _geometry(config), config.width
        doublings = [min(2**i, 8) for i in range(len(geometry) - 1)]
        channels = [config.in_channels, *(width * times for times in doublings), 1]
        self.last, self._channels = len(geometry) - 1, channels
        layers = nn.ModuleDict()
        for i, (kernel, stride, padding) in enumerate(geometry):
            bias = has_bias(config.norm) if 0 < i < self.last or config.patch == 1 else True
            conv, norm = _published_numbers(i)
            layers[conv] = nn.Conv2d(
                channels[i], channels[i + 1], kernel, stride, padding, bias=bias or i == 0
            )
            if i < self.last:
                layers[norm] = new_norm(config.norm if i else "none", channels[i + 1])
        init_normal(layers)
        if config.spectral_norm:
            for layer in layers.values():
                if isinstance(layer, nn.Conv2d):
                    nn.utils.spectral_norm(layer)
        self.add_module("net" if config.patch == 1 else "model", layers)
        self.register_load_state_dict_pre_hook(_accept_main)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: the weight that spectral norm made last still has the graph of its making."""
        for module in self.modules():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, SpectralNorm):
                    setattr(module, hook.name, getattr(module, hook.name).detach())
        return super().__getstate__()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The map (B, 1, h, w) of x (B, C_x, H, W), or of the pair with y (B, C_y, H, W).

        Raises:
            ValueError: channels are not those of the config, x and y do not fit, or a side is too
                small for one patch of the map.
        """
        return self._head(self._trunk(x, y))

    def features(self, x: Tensor, y: Tensor | None = None) -> list[Tensor]:
        """What every block gives, after its activation, and the map as the last; as `forward`."""
        kept: list[Tensor] = []
        out = self._head(self._trunk(x, y, kept))
        return [*kept, out]

    def row_losses(self, x: Tensor, y: Tensor | None = None, *, loss: str, target: str) -> Tensor:
        """The mean of `cgkernels.patch_loss` over the patches of each pair, (B,); as `forward`.

        The last layer and the loss are one op, which writes no map; where a hook waits for one, it
        is made.
        """
        if not is_unhooked(self):
            return _mean_loss(self(x, y), loss, target)
        return self._head(self._trunk(x, y), loss, target)

    @torch.no_grad()
    def freeze(self, x: Tensor, y: Tensor | None = None) -> "PatchDiscriminator":
        """A twin with the weights of now, made ready to judge images of the sizes of x and y.

        Batch norm in evaluation is folded into the convolution before it,

            W' = s W,  b' = s (b - mean) + beta   with   s = gamma / sqrt(var + eps),

        spectral norm into its weight; on a CPU weights lie as oneDNN reads them. It has no
        gradients, and does not follow changes of this network. Arguments and errors as of
        `forward`; ValueError in training mode.
        """
        if self.training:
            raise ValueError("network must be in evaluation mode")
        _check_pair(x, y, self.config.in_channels, _least_side(self.config))
        twin = copy.deepcopy(self).requires_grad_(False)
        layers, sides = twin._layers(), x.shape[2:]
        for i, (kernel, stride, padding) in enumerate(_geometry(self.config)):
            place, after = _published_numbers(i)
            norm = layers[after] if i < self.last else nn.Identity()
            channels = self._channels[i]
            conv, norm = fold_norm(layers[place], norm)
            if i < self.last:
                layers[after] = norm
            # The ops of the first and of the last layer take weights as they are.
            inner = 0 < i < self.last
            layers[place] = pack_conv(conv, (len(x), channels, *sides)) if inner else conv
            sides = torch.Size((n + 2 * padding - kernel) // stride + 1 for n in sides)
        return twin

    def _head(self, h: Tensor, loss: str | None = None, target: str | None = None) -> Tensor:
        conv = self._conv(self.last)
        if not _fits_op(conv) or conv.stride != (1, 1):
            out = conv(h)
            return out if loss is None or target is None else _mean_loss(out, loss, target)
        bias = None if conv.bias is None else conv.bias.to(h.dtype)
        return cgkernels.patch_head_loss(  # under autocast h is narrower than the parameters
            h, weight_of(conv).to(h.dtype), bias,
            loss=loss, target=target, padding=int(conv.padding[0]),
        )  # fmt: skip

    def _trunk(self, x: Tensor, y: Tensor | None, kept: list[Tensor] | None = None) -> Tensor:
        """What the last layer looks at; what each block gives is added to `kept`."""
        _check_pair(x, y, self.config.in_channels, _least_side(self.config))
        h = self._first(x, y)
        for i in range(self.last):
            if i:
                norm = self._layers()[_published_numbers(i)[1]]
                h = norm_act(conv_before_norm(self._conv(i), norm, h), norm, "leaky_relu")
            if kept is not None:
                kept.append(h)
        return h

    def _first(self, x: Tensor, y: Tensor | None) -> Tensor:
        """The first block: both images are read where they are."""
        conv, device, dtype = self._conv(0), x.device.type, x.dtype
        norm = self._layers()[_published_numbers(0)[1]]  # none, which only a hook may tell
        if not _fits_op(conv) or not is_plain(norm):
            return norm_act(conv(x if y is None else torch.cat([x, y], 1)), norm, "leaky_relu")
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        y, bias = (None if t is None else t.to(dtype) for t in (y, conv.bias))
        return cgkernels.pair_conv2d(
            x.to(dtype), y, weight_of(conv).to(dtype), bias,
            stride=conv.stride[0], padding=int(conv.padding[0]), slope=0.2,
        )  # fmt: skip

    def _conv(self, i: int) -> nn.Conv2d:
        return self._layers()[_published_numbers(i)[0]]

    def _layers(self) -> Any:
        return self.net if self.config.patch == 1 else self.model


def _fits_op(conv: nn.Conv2d) -> bool:
    """Whether the ops of the first and of the last layer do all that a call of conv does."""
    return (
        is_plain(conv, weight_hooks=True)
        and not isinstance(conv.padding, str)
        and conv.padding_mode == "zeros"
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and len({*conv.padding}) == len({*conv.stride}) == len({*conv.kernel_size}) == 1
    )


def _mean_loss(out: Tensor, loss: str, target: str) -> Tensor:
    return cgkernels.patch_loss(out, loss, target).flatten(1).mean(1)


def accept_main(state: dict[str, Any], prefix: str = "") -> None:
    """Renames the `main.*` of VQGAN, below the prefix, to `model.*`."""
    theirs, ours = f"{prefix}main.", f"{prefix}model."
    for key in [key for key in state if key.startswith(theirs)]:
        state[ours + key.removeprefix(theirs)] = state.pop(key)


def _accept_main(_module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    accept_main(state, prefix)


def _geometry(config: PatchDiscriminatorConfig) -> list[tuple[int, int, int]]:
    """Kernel, stride and padding of each convolution."""
    if config.patch == 1:
        return [(1, 1, 0)] * 3
    return [(4, 2, 1)] * PATCHES[config.patch] + [(4, 1, 1)] * 2


def fitting_patches(side: int) -> list[int]:
    """The patches that images of this side have a score for."""
    return [p for p in PATCHES if _least_side(PatchDiscriminatorConfig(patch=p)) <= side]  # type: ignore[arg-type]


def _least_side(config: PatchDiscriminatorConfig) -> int:
    """Smallest side of an image that gives a score."""
    side = 1
    for kernel, stride, padding in reversed(_geometry(config)):
        side = (side - 1) * stride + kernel - 2 * padding
    return side


def _published_numbers(i: int) -> tuple[str, str]:
    """Published numbers of convolution i and its normalization; activations have numbers too."""
    conv = max(3 * i - 1, 0)
    return str(conv), str(conv + 1)


def _check_pair(x: Tensor, y: Tensor | None, channels: int, least: int) -> None:
    """Raise unless these are images, or pairs, that fit."""
    if y is None:
        return check_image("x", x, channels, least)
    check_image("x", x, None, least)
    check_image("y", y, None, least)
    if (len(y), *y.shape[2:]) != (len(x), *x.shape[2:]):
        raise ValueError(
            f"y must have the shape of x {tuple(x.shape)}, channels apart, got {tuple(y.shape)}"
        )
    if x.shape[1] + y.shape[1] != channels:
        raise ValueError(
            f"x and y must have {channels} channels together, got {x.shape[1]} and {y.shape[1]}"
        )
