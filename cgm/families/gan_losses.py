"""What families with a discriminator share: objectives of rows, penalties, the image pool.

Source   penalties: Gulrajani et al., arXiv:1704.00028 (WGAN-GP); Mescheder et al., arXiv:1801.04406
         (R1). Pool: Shrivastava et al., arXiv:1612.07828.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cgkernels.random import STREAM_POOL, uniform
from cgkernels.rows import compute_dtype
from cgm.model import Count, ImageConfig, Model, Natural
from cgm.networks.patch_discriminator import PatchDiscriminator, fitting_patches
from cgm.networks.resnet_generator import Padding, ResnetGenerator, ResnetGeneratorConfig
from cgm.networks.unet_generator import UNetGenerator, UNetGeneratorConfig

Loss = Literal["lsgan", "vanilla", "hinge", "nonsaturating", "wgan"]
Target = Literal["real", "fake", "generator"]


# The training that is published for both.
IMAGE_TO_IMAGE_TRAINING: dict[str, Any] = {
    "batch_size": 1, "learning_rate": 2e-4, "beta1": 0.5, "warmup": 0, "decay": "late_linear",
    "gradient_clip": float("inf"), "ema_decay": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class ImageToImageConfig(ImageConfig):
    """What models from images to images share: what is made of what, and the networks."""

    # Shape (C, H, W) of what is generated.
    event_shape: tuple[Count, Count, Count] = (3, 256, 256)
    # Kind of condition: images.
    cond_kind: Literal["image"] = "image"
    # Shape (C, H, W) of one condition, with the sides of event_shape.
    cond_shape: tuple[Count, Count, Count] = (3, 256, 256)

    # Generator: a U-Net, for sides that are multiples of 2^depth, or residual blocks.
    generator: Literal["unet", "resnet"] = "unet"
    # Resolutions of the U-Net, or residual blocks; 0: as many as the sides allow, up to 8 for 256
    # pixels, or 9 blocks for 256 pixels and 6 for fewer.
    depth: Natural = 0
    # Channels of the first layer of a generator.
    width: Count = 64
    # Normalization in all networks.
    norm: Literal["batch", "instance", "none"] = "batch"
    # Border of the convolutions in the residual blocks.
    padding: Padding = "reflect"
    # Side of the patches that a discriminator judges.
    patch: Literal[1, 16, 34, 70, 142, 286] = 70
    # Channels of the first layer of a discriminator.
    discriminator_width: Count = 64
    # Loss of a patch.
    loss: Loss = "vanilla"

    def __post_init__(self) -> None:
        super().__post_init__()
        sides = self.event_shape[1:]
        # No side is a multiple of more than 2^62.
        unit = 2 ** min(max(self.depth, 2), 62) if self.generator == "unet" else 4
        if any(side % unit for side in sides):
            raise ValueError(
                f"event_shape must have sides that are multiples of {unit} for this generator and "
                f"depth, got {self.event_shape}"
            )


class AdversarialModel(Model):
    """A model whose parts are named after the phase that trains them."""

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        """Of the discriminators or of the generators."""
        self.check_phase(phase)
        parts = [part for name, part in self.named_children() if name.startswith(phase)]
        return [parameter for part in parts for parameter in part.parameters()]


def discriminator_loss(
    discriminator: PatchDiscriminator,
    x: Tensor | None,
    real: Tensor,
    fake: Tensor,
    loss: Loss,
    *,
    r1_weight: float = 0.0,
    penalty_weight: float = 0.0,
    share: Tensor | None = None,
) -> dict[str, Tensor]:
    """{"total", "real", "fake"}, with penalties "r1", "penalty": (B,) each, of images (B, C, H, W).

    penalty_weight: of `gradient_penalty`, which needs share (B,).
    """
    parts = {
        "real": row_loss(discriminator, x, real, loss, "real"),
        "fake": row_loss(discriminator, x, fake.detach(), loss, "fake"),
    }
    total = (parts["real"] + parts["fake"]) / 2
    if r1_weight:
        parts["r1"] = gradient_square(lambda y: discriminator(*_pair(x, y)), real)
        total = total + r1_weight / 2 * parts["r1"]
    if penalty_weight:
        assert share is not None
        parts["penalty"] = gradient_penalty(
            lambda y: discriminator(*_pair(x, y)), real, fake.detach(), share=share
        )
        total = total + penalty_weight * parts["penalty"]
    return {"total": total, **parts}


def row_loss(
    discriminator: PatchDiscriminator, x: Tensor | None, y: Tensor, loss: Loss, target: Target
) -> Tensor:
    """What the discriminator says of images y, beside their conditions x if there are: (B,)."""
    height, width = y.shape[2:]
    fitting = fitting_patches(min(height, width))
    if (patch := discriminator.config.patch) not in fitting:
        raise ValueError(
            f"patch must be {'one of ' if len(fitting) > 1 else ''}{', '.join(map(str, fitting))} "
            f"for images of {height} x {width} pixels, got {patch}"
        )
    return discriminator.row_losses(*_pair(x, y), loss=loss, target=target)


def mean_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of each row, (B,), in float32 at least."""
    difference = a - b
    return difference.to(compute_dtype(difference)).abs().flatten(1).mean(1)


def _pair(x: Tensor | None, y: Tensor) -> tuple[Tensor, ...]:
    return (y,) if x is None else (x, y)


def image_generator(
    config: ImageToImageConfig, channels: int, out: int, *, dropout: bool
) -> nn.Module:
    """The network from images of so many channels to images that a config asks for."""
    kind: dict[str, Any] = {"width": config.width, "norm": config.norm}
    kind["dropout"] = dropout
    depth = usual_depth(config)
    if config.generator == "unet":
        return UNetGenerator(UNetGeneratorConfig(channels, out, downs=depth, **kind))
    kind["padding"] = config.padding
    return ResnetGenerator(ResnetGeneratorConfig(channels, out, blocks=depth, **kind))


def usual_depth(config: ImageToImageConfig) -> int:
    """That of the config; for 0 the resolutions that sides allow, 8 at most, or 9 or 6 blocks."""
    if config.depth:
        return config.depth
    sides = config.event_shape[1:]
    if config.generator == "unet":
        return next(depth for depth in range(8, 0, -1) if not any(n % 2**depth for n in sides))
    return 9 if min(sides) >= 256 else 6


def channels_last(model: nn.Module) -> None:
    """Convolutions in the format in which they, and the norms between them, are fastest."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


# Penalties ----------------------------------------------------------------------------------------
@torch.compiler.disable  # which has no second derivatives
def gradient_square(discriminator: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """|d D(y) / dy|^2 of each row, D the mean score of its patches: (B, C, H, W) -> (B,).

    Rows must not depend on each other: no batch statistics in the discriminator.
    """
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        score = discriminator(y).flatten(1)
        score = score.to(compute_dtype(score)).mean(1).sum()
        (gradient,) = torch.autograd.grad(score, y, create_graph=True)
    return gradient.to(compute_dtype(gradient)).square().flatten(1).sum(1)


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    *,
    share: Tensor,
) -> Tensor:
    """WGAN-GP, (|d D / dy| - 1)^2 of each row, at share real + (1 - share) fake, share (B,)."""
    share = share[:, None, None, None]
    square = gradient_square(discriminator, fake + share * (real - fake))
    return ((square + 1e-16).sqrt() - 1).square()


# Pool ---------------------------------------------------------------------------------------------
class ImagePool(nn.Module):
    """The last images of a generator, for its discriminator: about half of them from before.

    Each image first fills the pool; then it is either used itself, or takes the place of one of
    the pool, which is used instead, with probability 1/2 each. What is drawn depends on (seed,
    index) of the image. The pool is state of the training, kept in its checkpoint.
    """

    def __init__(self, size: int, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.size = size
        self.images = nn.Buffer(torch.zeros(size, *event_shape), persistent=False)
        self.count = nn.Buffer(torch.zeros((), dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def exchange(self, fake: Tensor, *, seed: int | Tensor, index: Tensor, step: int = 0) -> Tensor:
        """Images (B, *event) to judge, of fake (B, *event); nothing waits for the device.

        step: of the noise, which tells several pools of a model apart.
        """
        if self.size == 0:
            return fake
        u = uniform((len(fake), 2), seed=seed, index=index, step=step, stream=STREAM_POOL)
        out = fake.clone()
        for row, image in enumerate(fake):
            full = self.count >= self.size
            place = (u[row, 0] * self.size).long().clamp(max=self.size - 1)
            place = torch.where(full, place, self.count.clamp(max=self.size - 1))[None]
            swap = full & (u[row, 1] < 0.5)
            old = self.images.index_select(0, place)[0]
            out[row] = torch.where(swap, old, image)
            stored = torch.where(swap | ~full, image, old)
            self.images.index_copy_(0, place, stored[None].to(self.images.dtype))
            self.count.add_(~full)
        return out
