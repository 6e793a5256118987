"""What the image-to-image networks share: normalization with all that follows it, and dropout.

Source   instance norm: Ulyanov et al., arXiv:1607.08022; ActNorm: Kingma, Dhariwal,
         arXiv:1807.03039, as the discriminator of VQGAN uses it, arXiv:2012.09841.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

import cgkernels
from cgkernels.random import STREAM_DROPOUT, uniform

Norm = Literal["batch", "instance", "none"]
Activation = Literal["relu", "leaky_relu"]

# Layers whose weights may be used in the place of a call.
_PLAIN = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d, nn.Identity)


# What may be bypassed -----------------------------------------------------------------------------
def is_plain(module: nn.Module, *, weight_hooks: bool = False) -> bool:
    """Whether a call of this layer is what its class and its parameters say, and nothing more.

    If not, it is to be called: it is an adapter, a subclass, parametrized, sharded, or has hooks.
    weight_hooks: those of `torch.nn.utils.spectral_norm` and `weight_norm` are allowed, which make
    its weight before each forward: see `weight_of`.
    """
    return type(module) in _PLAIN and is_unhooked(module, weight_hooks=weight_hooks)


def is_unhooked(module: nn.Module, *, weight_hooks: bool = False) -> bool:
    """Whether a call of this module is its forward and nothing more; weight_hooks as above."""
    return not has_own_hooks(module, weight_hooks=weight_hooks) and not _has_any_global_hook()


def has_own_hooks(module: nn.Module, *, weight_hooks: bool = False) -> bool:
    """Whether something was added to a call of this module, and not of all as profilers do."""
    before = module._forward_pre_hooks  # whose values() are true in a trace, however few
    if len(before) and not (
        weight_hooks and all(isinstance(h, SpectralNorm | WeightNorm) for h in before.values())
    ):
        return True
    return bool(
        module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


# Normalizations -----------------------------------------------------------------------------------
class ActNorm(nn.Module):
    """scale (x + loc) for each channel of x (B, C, H, W).

    The first forward in training sets both so that its batch comes out with mean 0 and standard
    deviation 1; that one must hold at least two values a channel, or it is a ValueError. Where
    `torch.distributed` is initialized the batch is that of all processes, which must all come here;
    `fully_shard` is for later, as it keeps no values that a forward sets.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.initialized = nn.Buffer(torch.tensor(0, dtype=torch.uint8))
        self._known_initialized = (
            False  # reading the buffer waits for the device: once, not at every forward
        )
        self.register_load_state_dict_post_hook(_forget_initialized)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), in the memory format of x."""
        if self.training and not self._known_initialized:
            if not self.initialized.item():
                self._initialize(x)
            self._known_initialized = True
        return self.scale * (x + self.loc)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        count = x.numel() // x.shape[1]
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several:
            count, mean, std = _moments_of_all(x)
        if count < 2:
            return self._without_deviation(x)
        if not several:
            std, mean = torch.std_mean(x, dim=(0, 2, 3), keepdim=True)
        self.loc.copy_(-mean)
        self.scale.copy_(1 / (std + 1e-6))
        self.initialized.fill_(1)

    def _without_deviation(self, x: Tensor) -> None:
        raise ValueError(f"x must hold two values a channel or more, got {tuple(x.shape)}")


def _moments_of_all(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Values a channel of x (B, C, H, W) of all processes, their mean and standard deviation."""
    x = x.double()
    count = x.new_tensor([x.numel() // x.shape[1]])
    total = x.sum((0, 2, 3))
    for part in (count, total):
        dist.all_reduce(part)
    mean = (total / count)[:, None, None]
    square = (x - mean).square().sum((0, 2, 3))
    dist.all_reduce(square)
    return int(count), mean, (square / (count - 1)).sqrt()[:, None, None]


def _forget_initialized(module: nn.Module, _keys: object) -> None:
    assert isinstance(module, ActNorm)
    module._known_initialized = False


def new_norm(kind: Literal[Norm, "actnorm"], channels: int) -> nn.Module:
    """A normalization as published: batch norm is affine and tracks, instance norm does neither."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels)
    return ActNorm(channels) if kind == "actnorm" else nn.Identity()


def has_bias(kind: Literal[Norm, "actnorm"]) -> bool:
    """Whether a convolution before this normalization has a bias in the published networks."""
    return kind in ("instance", "actnorm")


def norm_act(
    x: Tensor,
    norm: nn.Module,
    activation: Activation | None = None,
    *,
    slope: float = 0.2,
    residual: Tensor | None = None,
    pad: int = 0,
) -> Tensor:
    """activation(norm(x)) + residual, reflected at the border.

    Args:
        x: (B, C, H, W).
        norm: one of `new_norm`. Batch norm takes the statistics of the batch in training, which it
            adds to the running ones, and those in evaluation; instance norm always its own.
        activation: leaky_relu has this slope below 0.
        residual: (B, C, H, W), of any strides.
        pad: width of the border.

    Returns:
        (B, C, H + 2 pad, W + 2 pad), channels_last if x is.
    """
    if _uses_batch_stats(norm):
        options: dict[str, Any] = {"slope": slope} if activation == "leaky_relu" else {}
        options |= {"activation": activation, "residual": residual, "pad": pad}
        return _norm_with_stats(norm, x, **options)[0]
    h = norm(x)
    if activation is not None:
        h = F.relu(h) if activation == "relu" else F.leaky_relu(h, slope)
    if residual is not None:
        h = h + residual
    return F.pad(h, (pad,) * 4, mode="reflect") if pad else h


def norm_relu_(out: Tensor, x: Tensor, norm: nn.Module) -> Tensor:
    """relu(norm(x)), written into out: some channels of a tensor for `join_channels`.

    The result has the gradients; out stays without.
    """
    if _uses_batch_stats(norm):
        return _norm_with_stats(norm, x, out, activation="relu")[0]
    return _relu_(out, norm(x))


def norm_leaky_relu_and_relu_(
    out: Tensor, x: Tensor, norm: nn.Module, slope: float = 0.2
) -> tuple[Tensor, Tensor]:
    """leaky_relu(norm(x)) of this slope, and relu(norm(x)), which is written into out.

    One pass where norm takes the statistics of x; gradients as of `norm_relu_`.
    """
    if _uses_batch_stats(norm):
        first = torch.empty_like(x, memory_format=memory_format(x))
        options: dict[str, Any] = {"second": out, "second_activation": "relu", "slope": slope}
        y, second = _norm_with_stats(norm, x, first, activation="leaky_relu", **options)
        return y, second
    h = norm(x)
    return F.leaky_relu(h, slope), _relu_(out, h)


def space_to_depth(x: Tensor, factor: int) -> Tensor:
    """`F.pixel_unshuffle` of batches of any size: it gives an empty one back as it is."""
    if len(x):
        return F.pixel_unshuffle(x, factor)
    _, channels, height, width = x.shape
    return x.reshape(0, channels * factor**2, height // factor, width // factor)


def depth_to_space(x: Tensor, factor: int) -> Tensor:
    """`F.pixel_shuffle` of batches of any size: of an empty one it has no gradient."""
    if len(x):
        return F.pixel_shuffle(x, factor)
    _, channels, height, width = x.shape
    return x.reshape(0, channels // factor**2, height * factor, width * factor)


def join_channels(whole: Tensor, *parts: Tensor) -> Tensor:
    """cat(parts, dim=1), where that is written already: nothing is copied, either way."""
    return _JoinChannels.apply(whole, *parts) if torch.is_grad_enabled() else whole


class _JoinChannels(torch.autograd.Function):
    @staticmethod
    def forward(whole: Tensor, *parts: Tensor) -> Tensor:
        return whole.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.channels = [part.shape[1] for part in inputs[1:]]

    @staticmethod
    def backward(ctx: Any, dwhole: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *dwhole.split(ctx.channels, dim=1)


def _uses_batch_stats(norm: nn.Module) -> bool:
    """Whether norm takes statistics of what it gets, and does what our op does."""
    if not is_plain(norm):
        return False
    if isinstance(norm, nn.InstanceNorm2d):
        return not norm.track_running_stats
    if not isinstance(norm, nn.BatchNorm2d):
        return False
    return norm.training and norm.track_running_stats and norm.momentum is not None


def _norm_with_stats(
    norm: Any, x: Tensor, out: Tensor | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """What instance_norm_act makes, or writes into out, with what the norm says and keeps."""
    batch = isinstance(norm, nn.BatchNorm2d)
    given: dict[str, Any] = {"eps": norm.eps, "over_batch": batch, **options}
    if out is None:
        given["return_stats"] = True
        *ys, mean, var = cgkernels.instance_norm_act(x, norm.weight, norm.bias, **given)
    else:
        *ys, mean, var = cgkernels.instance_norm_act_(out, x, norm.weight, norm.bias, **given)
    if batch:
        n = x.numel() // x.shape[1]
        with torch.no_grad():
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_(var.to(norm.running_var.dtype) * (n / (n - 1)), norm.momentum)
            norm.num_batches_tracked.add_(1)
    return tuple(ys)


def _relu_(out: Tensor, h: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.clamp_min(h, 0, out=out)
    y = F.relu(h)
    out.copy_(y.detach())
    return y


def conv_before_norm(conv: nn.Conv2d | nn.ConvTranspose2d, norm: nn.Module, x: Tensor) -> Tensor:
    """conv(x), without a bias that the norm after it would take off again: a pass less."""
    if not _takes_off_bias(norm) or not is_plain(conv, weight_hooks=True) or conv.bias is None:
        return conv(x)
    weight = weight_of(conv)
    if isinstance(conv, nn.ConvTranspose2d):
        return F.conv_transpose2d(
            x, weight, None, conv.stride, conv.padding, conv.output_padding,  # type: ignore[arg-type]
            conv.groups, conv.dilation,
        )  # fmt: skip
    return conv._conv_forward(x, weight, None)


def _takes_off_bias(norm: nn.Module) -> bool:
    """Whether a number added to all pixels of a channel is nothing to this norm."""
    return isinstance(norm, nn.InstanceNorm2d) and not norm.affine and _uses_batch_stats(norm)


def weight_of(conv: nn.Conv2d | nn.ConvTranspose2d) -> Tensor:
    """The weight as `conv.forward` would take it: with spectral norm a hook makes it.

    conv: one that `is_plain` with weight_hooks.
    """
    for hook in conv._forward_pre_hooks.values():
        hook(conv, ())
    return conv.weight


def fold_norm(conv: nn.Conv2d, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    """norm(conv(x)) as a convolution and what is to follow it; norm is in evaluation mode.

    Batch norm is in the convolution. What a hook makes of the weight is its weight, and a bias that
    norm takes off is left out. Both are as they were where conv is not plain.
    """
    if not is_plain(conv, weight_hooks=True):
        return conv, norm
    weight, bias = weight_of(conv), conv.bias
    if isinstance(norm, nn.BatchNorm2d) and is_plain(norm) and _is_affine_map(norm):
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = -norm.running_mean if bias is None else bias - norm.running_mean
        weight, bias = weight * scale[:, None, None, None], scale * shift + norm.bias
        norm = nn.Identity()
    elif _takes_off_bias(norm):
        bias = None
    made = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,  # type: ignore[arg-type]
        conv.dilation, conv.groups, bias is not None, conv.padding_mode, device="meta",  # type: ignore[arg-type]
    )  # fmt: skip
    made.weight = nn.Parameter(weight.detach(), requires_grad=False)
    made.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return made, norm


def _is_affine_map(norm: nn.BatchNorm2d) -> bool:
    return norm.affine and norm.track_running_stats and not norm.training


class PackedConv2d(nn.Module):
    """A convolution whose weight lies as oneDNN reads it: float32 on a CPU, without gradients."""

    def __init__(self, conv: nn.Conv2d, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.bias = conv.bias
        self.geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        self.shape = list(shape)
        self.weight = self._pack(conv.weight.detach())

    def _pack(self, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, self.shape)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: what is packed has no memory that could be copied."""
        return {**super().__getstate__(), "weight": self.weight.to_dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.weight = self._pack(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """conv(x)."""
        return torch.ops.mkldnn._convolution_pointwise(
            x.float(), self.weight, self.bias, *self.geometry, "none", [], ""
        )


def pack_conv(conv: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """A `PackedConv2d` for x of this shape where there is one, else conv itself."""
    if not is_plain(conv) or not isinstance(conv, nn.Conv2d) or conv.padding_mode != "zeros":
        return conv
    weight, padding = conv.weight, conv.padding
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32
    fits = (
        fits
        and not isinstance(padding, str)
        and conv.groups == 1
        and torch.backends.mkldnn.is_available()
    )
    return PackedConv2d(conv, shape) if fits else conv


def dropout(
    x: Tensor, *, seed: int | Tensor, index: Tensor | None, layer: int, p: float = 0.5
) -> Tensor:
    """x (B, *event) with a share p of its values 0, the others divided by 1 - p.

    Which ones depends on (seed, index, layer) alone: layer is the step of the noise.
    """
    u = uniform(
        tuple(x.shape), seed=seed, index=index, step=layer, stream=STREAM_DROPOUT, device=x.device
    )
    return x * ((u >= p).to(x.dtype) / (1 - p))


def init_normal(network: nn.Module) -> None:
    """Weights of convolutions normal(0, 0.02), of batch norms normal(1, 0.02); biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
            nn.init.normal_(module.weight, float(isinstance(module, nn.BatchNorm2d)), 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def full_precision(x: Tensor) -> torch.autocast:
    """Autocast off where x is: for what must not be rounded to 16 bits."""
    return torch.autocast(x.device.type, enabled=False)


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last for a (B, C, H, W) that is, and is not contiguous as well."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def check_image(name: str, x: Tensor, channels: int | None, least: int = 1) -> None:
    """Raise unless x is a floating (B, channels, H, W) with sides of at least `least`.

    channels: None for any number.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating tensor, got {got}")
    fits = x.dim() == 4 and channels in (None, x.shape[1])
    if not fits or min(x.shape[2:]) < least:
        raise ValueError(
            f"{name} must have shape (B, {channels or 'C'}, H, W) with H and W of at least "
            f"{least}, got {tuple(x.shape)}"
        )
