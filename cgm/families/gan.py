"""Conditional GANs: pix2pix, from an image to an image; and one that draws latent vectors.

    discriminator:  (L(D(x, y), real) + L(D(x, G(x, z)), fake)) / 2  [+ R1 / 2 |dD / dy|^2]
                    [+ W (|dD / du| - 1)^2 between y and G(x, z)]
    generator:      L(D(x, G(x, z)), generator)  [+ lambda |y - G(x, z)|_1]

L is the mean of `cgkernels.patch_loss` over the patches of an image, |.|_1 the mean over its
values, x the condition. Neither the discriminator nor its gradient is averaged over rows.

Source   Goodfellow et al., arXiv:1406.2661; Mirza, Osindero, arXiv:1411.1784; pix2pix: Isola et
         al., arXiv:1611.07004; R1: Mescheder et al., arXiv:1801.04406; W: Gulrajani et
         al., arXiv:1704.00028; hinge: Lim, Ye, arXiv:1705.02894.
"""

import dataclasses
import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cgkernels.random import STREAM_LATENTS, STREAM_TRAINING, normal, uniform
from cgm.families.gan_losses import (
    IMAGE_TO_IMAGE_TRAINING,
    AdversarialModel,
    ImageToImageConfig,
    Loss,
    channels_last,
    discriminator_loss,
    image_generator,
    mean_distance,
    row_loss,
    usual_depth,
)
from cgm.model import Config, Count, Depth, Draws, ImageConfig, NotNegative, Step
from cgm.networks.patch_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from cgm.networks.residual import ConditionPlanes, ResidualUNet

DROPOUT_DEPTH = 6  # of a U-Net: below there are no blocks that have it


# pix2pix ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pix2PixConfig(ImageToImageConfig):
    """What is generated from what, the two networks, and the objective."""

    # Dropout in the generator, its only noise: without it a condition has one image. A U-Net has
    # it from depth 6 on, for sides that are multiples of 64; the config of a model says if it has.
    dropout: bool = True
    # Weight lambda of the distance to the true image.
    l1_weight: NotNegative = 100.0
    # Weight of the R1 penalty on the discriminator, which excludes batch norm; 0: none.
    r1_weight: NotNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r1_weight and self.norm == "batch":
            raise ValueError("norm must not be batch with r1_weight: rows would depend on another")


@dataclass(frozen=True)
class Pix2PixSampling(Config):
    """How an image is drawn."""

    # Keep the dropout on: without it all draws of a condition are one.
    dropout: bool = True


class Pix2Pix(AdversarialModel):
    """Images from images; `loss` and `sample` of all families."""

    family: ClassVar[str] = "pix2pix"
    phases: ClassVar[tuple[str, ...]] = ("discriminator", "generator")
    sampling_config: ClassVar[type[Pix2PixSampling]] = Pix2PixSampling
    training_defaults: ClassVar[dict[str, Any]] = IMAGE_TO_IMAGE_TRAINING

    def __init__(self, config: Pix2PixConfig) -> None:
        super().__init__()
        depth = usual_depth(config)
        if config.dropout and config.generator == "unet" and depth < DROPOUT_DEPTH:
            height, width = config.event_shape[1:]
            warnings.warn(
                f"this model of {height} x {width} pixels has no dropout, so all draws of a "
                f"condition are one: its U-Net has depth {depth}, and dropout needs "
                f"{DROPOUT_DEPTH}, with sides that are multiples of {2**DROPOUT_DEPTH}; "
                "generator resnet has it for others",
                stacklevel=2,
            )
            config = dataclasses.replace(config, dropout=False)
        self.config = config
        self.generator = image_generator(
            config, config.cond_shape[0], config.event_shape[0], dropout=config.dropout
        )
        self.discriminator = PatchDiscriminator(
            PatchDiscriminatorConfig(
                in_channels=config.cond_shape[0] + config.event_shape[0],
                patch=config.patch,
                width=config.discriminator_width,
                norm=config.norm,
            )
        )
        channels_last(self)

    def _loss(self, y: Tensor, cond: Tensor | None, step: Step) -> dict[str, Tensor]:
        """The objective of a phase, of each row.

        The dropout is random. Returns {"total", "real", "fake"} of the discriminator, with a
        penalty also "r1"; and {"total", "adversarial", "l1"} of the generator.
        """
        assert cond is not None  # it was checked
        cond, y = (t.contiguous(memory_format=torch.channels_last) for t in (cond, y))
        config = self.config

        def draw() -> Tensor:
            seed = step.seed if config.dropout else None
            return self.generator(cond, seed=seed, index=step.index)

        fake = step.draw_once("fake", draw)
        if step.phase == "generator":
            adversarial = row_loss(self.discriminator, cond, fake, config.loss, "generator")
            l1 = mean_distance(fake, y)
            total = adversarial + config.l1_weight * l1
            return {"total": total, "adversarial": adversarial, "l1": l1}
        return discriminator_loss(
            self.discriminator, cond, y, fake, config.loss, r1_weight=config.r1_weight
        )

    def _draw(self, draws: Draws, options: Pix2PixSampling) -> Tensor:
        """In (-1, 1).

        Of a model in evaluation mode: batch norm in training mode looks at the whole batch.
        """
        assert draws.cond is not None  # it was checked
        cond = draws.cond.contiguous(memory_format=torch.channels_last)
        if options.dropout and self.config.dropout:
            return self.generator(draws.repeat(cond), seed=draws.seed, index=draws.index)
        return draws.repeat(self.generator(cond))  # all draws are one


# With latent vectors ------------------------------------------------------------------------------
@dataclass(frozen=True)
class GANConfig(ImageConfig):
    """What is generated from what, the two networks, and the objective."""

    # Numbers of the latent vector z.
    latents: Count = 64
    # Channels of the last hidden layer of the generator.
    width: Count = 32
    # Resolutions of a generator from images, or of sides that are no multiples of 4.
    depth: Depth = 3
    # Side of the patches that the discriminator judges.
    patch: Literal[1, 16, 34, 70, 142, 286] = 34
    # Channels of its first layer.
    discriminator_width: Count = 32
    # Loss of a patch.
    loss: Loss = "nonsaturating"
    # Weight of the R1 penalty on the discriminator; 0: none.
    r1_weight: NotNegative = 1.0
    # Weight of the WGAN-GP penalty on the discriminator, 10 as published with loss wgan; 0: none.
    penalty_weight: NotNegative = 0.0


@dataclass(frozen=True)
class GANSampling(Config):
    """How an image is drawn."""

    # Factor of the latent vector; less than 1 is nearer to the usual image, and less varied.
    truncation: NotNegative = 1.0


class LatentGenerator(nn.Module):
    """An image from a vector: a linear layer, then twice a doubling of the sides.

    (B, D) -> (B, 4 width, H / 4, W / 4) -> (B, 2 width, H / 2, W / 2) -> (B, width, H, W) -> y
    """

    def __init__(self, features: int, event_shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        channels, height, wide = event_shape
        self.start = (4 * width, height // 4, wide // 4)
        self.linear = nn.Linear(features, 4 * width * (height // 4) * (wide // 4))
        sizes = (4 * width, 2 * width, width)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(nn.GroupNorm(8 if n % 8 == 0 else 1, n) for n in sizes)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """y (B, C, H, W) in (-1, 1) of z (B, D)."""
        h = self.linear(z).unflatten(1, self.start)
        h = h.contiguous(memory_format=torch.channels_last)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            h = conv(F.interpolate(F.relu(norm(h)), scale_factor=2.0))
        return torch.tanh(self.last(F.relu(self.norms[-1](h))))


class TranslatingGenerator(nn.Module):
    """An image from planes of a condition and a vector, which modulates a U-Net."""

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        self.planes = ConditionPlanes(config)
        self.unet = ResidualUNet(
            self.planes.planes,
            config.event_shape[0],
            width=config.width,
            depth=config.depth,
            features=config.latents,
            start_at_zero=False,
        )

    def forward(self, z: Tensor, cond: Tensor | None) -> Tensor:
        """y (B, C, H, W) in (-1, 1) of z (B, D) and a condition."""
        return torch.tanh(self.unet(self.planes(cond, len(z)), z))


class ConditionalGAN(AdversarialModel):
    """Images from any condition, or from none; `loss` and `sample` of all families.

    From images, and where the sides are no multiples of 4, a `TranslatingGenerator` makes them,
    else a `LatentGenerator`.
    """

    family: ClassVar[str] = "gan"
    phases: ClassVar[tuple[str, ...]] = ("discriminator", "generator")
    sampling_config: ClassVar[type[GANSampling]] = GANSampling
    training_defaults: ClassVar[dict[str, Any]] = {
        "batch_size": 64, "learning_rate": 2e-4, "beta1": 0.0, "beta2": 0.99, "warmup": 0,
        "decay": "late_linear", "gradient_clip": float("inf"),
    }  # fmt: skip

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        self.config = config
        features, channels = config.latents + config.num_classes, config.event_shape[0]
        self.generator: TranslatingGenerator | LatentGenerator
        if config.cond_kind == "image" or any(side % 4 for side in config.event_shape[1:]):
            self.generator = TranslatingGenerator(config)
        else:
            self.generator = LatentGenerator(features, config.event_shape, config.width)
        planes = config.cond_shape[0] if config.cond_kind == "image" else config.num_classes
        self.discriminator = PatchDiscriminator(
            PatchDiscriminatorConfig(
                in_channels=channels + planes,
                patch=config.patch,
                width=config.discriminator_width,
                norm="none",
            )
        )
        channels_last(self)

    def _loss(self, y: Tensor, cond: Tensor | None, step: Step) -> dict[str, Tensor]:
        """The objective of a phase, of each row.

        The latent vectors are random, and where the penalty is taken. Returns {"total", "real",
        "fake"} of the discriminator, with penalties also "r1" and "penalty"; {"total"} of the
        generator.
        """
        config = self.config
        y = y.contiguous(memory_format=torch.channels_last)
        planes = self._planes(cond)
        fake = step.draw_once("fake", lambda: self._generate(cond, step.seed, step.index, 1.0))
        if step.phase == "generator":
            return {"total": row_loss(self.discriminator, planes, fake, config.loss, "generator")}
        share = None
        if config.penalty_weight:
            share = uniform(
                (len(y),), seed=step.seed, index=step.index, step=0, stream=STREAM_TRAINING,
                dtype=y.dtype,
            )  # fmt: skip
        return discriminator_loss(
            self.discriminator, planes, y, fake, config.loss, r1_weight=config.r1_weight,
            penalty_weight=config.penalty_weight, share=share,
        )  # fmt: skip

    def _draw(self, draws: Draws, options: GANSampling) -> Tensor:
        """In (-1, 1)."""
        cond = None if draws.cond is None else draws.repeat(draws.cond)
        return self._generate(cond, draws.seed, draws.index, options.truncation)

    def _generate(
        self, cond: Tensor | None, seed: int | Tensor, index: Tensor, truncation: float
    ) -> Tensor:
        config = self.config
        z = truncation * normal(
            (len(index), config.latents), seed=seed, index=index, step=0, stream=STREAM_LATENTS,
            dtype=self.dtype, device=index.device,
        )  # fmt: skip
        if isinstance(self.generator, TranslatingGenerator):
            return self.generator(z, cond)
        if cond is not None:
            z = torch.cat([z, F.one_hot(cond, config.num_classes).to(z.dtype)], 1)
        return self.generator(z)

    def _planes(self, cond: Tensor | None) -> Tensor | None:
        """An image itself; a class as images, one of ones and the others of zeros."""
        if cond is None or self.config.cond_kind == "image":
            return cond
        hot = F.one_hot(cond, self.config.num_classes).to(self.dtype)
        return hot[:, :, None, None].expand(-1, -1, *self.config.event_shape[1:])
