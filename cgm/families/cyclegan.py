"""CycleGAN: from images of one kind to images of another, from examples without partners.

    generator:      L(D_y(F(x)), generator) + L(D_x(G(y)), generator)
                    + lambda (|G(F(x)) - x|_1 + |F(G(y)) - y|_1)
                    + lambda mu (|F(y) - y|_1 + |G(x) - x|_1)
    discriminator:  (L(D_y(y), real) + L(D_y(F(x)), fake)) / 2 + the same of D_x, x and G(y)

F makes y of the condition x, G makes x of y; L is the mean of `cgkernels.patch_loss` over patches,
|.|_1 the mean over values. Discriminators are shown about half images of earlier steps.

Source   Zhu et al., arXiv:1703.10593; least squares: Mao et al., arXiv:1611.04076; pool:
         Shrivastava et al., arXiv:1612.07828.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cgm.families.gan_losses import (
    IMAGE_TO_IMAGE_TRAINING,
    AdversarialModel,
    ImagePool,
    ImageToImageConfig,
    Loss,
    channels_last,
    discriminator_loss,
    image_generator,
    mean_distance,
    row_loss,
)
from cgm.model import Config, Draws, Natural, NotNegative, Step
from cgm.networks.patch_discriminator import PatchDiscriminator, PatchDiscriminatorConfig


# Config -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class CycleGANConfig(ImageToImageConfig):
    """What is generated from what, the four networks, and the objective."""

    # Generators: residual blocks, or a U-Net, for sides that are multiples of 2^depth.
    generator: Literal["unet", "resnet"] = "resnet"
    # Normalization in all networks.
    norm: Literal["batch", "instance", "none"] = "instance"
    # Loss of a patch.
    loss: Loss = "lsgan"
    # Weight of what the discriminators say.
    adversarial_weight: NotNegative = 1.0
    # Weight lambda of the way there and back.
    cycle_weight: NotNegative = 10.0
    # Weight mu, a factor of lambda, of leaving alone what is of the wanted kind.
    identity_weight: NotNegative = 0.5
    # Images of earlier steps that are kept for each discriminator; 0: none.
    pool: Natural = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.identity_weight and self.event_shape != self.cond_shape:
            raise ValueError(
                f"identity_weight must be 0 between images of different channels, "
                f"{self.cond_shape} and {self.event_shape}"
            )


@dataclass(frozen=True)
class CycleGANSampling(Config):
    """Which way."""

    # forward makes y of conditions, back makes conditions of y.
    way: Literal["forward", "back"] = "forward"


# Model --------------------------------------------------------------------------------------------
class CycleGAN(AdversarialModel):
    """Images from images, learned from two unrelated sets; `loss` and `sample` of all families.

    Names as published: generator_a makes y (kind B) of conditions (kind A) and discriminator_a
    judges it; generator_b and discriminator_b are those of the way back.
    """

    family: ClassVar[str] = "cyclegan"
    phases: ClassVar[tuple[str, ...]] = ("generator", "discriminator")
    sampling_config: ClassVar[type[CycleGANSampling]] = CycleGANSampling
    unpaired: ClassVar[bool] = True
    training_defaults: ClassVar[dict[str, Any]] = IMAGE_TO_IMAGE_TRAINING

    def __init__(self, config: CycleGANConfig) -> None:
        super().__init__()
        self.config = config
        a, b = config.cond_shape, config.event_shape
        self.generator_a = image_generator(config, a[0], b[0], dropout=False)
        self.generator_b = image_generator(config, b[0], a[0], dropout=False)

        def discriminator(shape: tuple[int, ...]) -> PatchDiscriminator:
            return PatchDiscriminator(
                PatchDiscriminatorConfig(
                    in_channels=shape[0],
                    patch=config.patch,
                    width=config.discriminator_width,
                    norm=config.norm,
                )
            )

        self.discriminator_a, self.discriminator_b = discriminator(b), discriminator(a)
        self.pool_a, self.pool_b = ImagePool(config.pool, b), ImagePool(config.pool, a)
        channels_last(self)

    def _loss(self, y: Tensor, cond: Tensor | None, step: Step) -> dict[str, Tensor]:
        """The objective of a phase, of each row; rows of y and cond need not belong together.

        In training mode the discriminators see images of the pool, drawn at random. Returns
        {"total", "adversarial_a", "adversarial_b", "cycle_a", "cycle_b"} and "identity" of the
        generators, and {"total", "real_a", "fake_a", "real_b", "fake_b"} of the discriminators.
        """
        assert cond is not None  # it was checked
        config = self.config
        cond, y = (t.contiguous(memory_format=torch.channels_last) for t in (cond, y))
        fake_y = step.draw_once("y", lambda: self.generator_a(cond))
        fake_cond = step.draw_once("cond", lambda: self.generator_b(y))
        if step.phase == "generator":
            return self._generator_loss(y, cond, fake_y, fake_cond)
        if self.training:
            noise: dict[str, Any] = {"seed": step.seed, "index": step.index}
            fake_y = self.pool_a.exchange(fake_y, step=0, **noise)
            fake_cond = self.pool_b.exchange(fake_cond, step=1, **noise)
        a = discriminator_loss(self.discriminator_a, None, y, fake_y, config.loss)
        b = discriminator_loss(self.discriminator_b, None, cond, fake_cond, config.loss)
        total = a.pop("total") + b.pop("total")
        return {
            "total": total,
            **{f"{name}_a": value for name, value in a.items()},
            **{f"{name}_b": value for name, value in b.items()},
        }

    def _generator_loss(
        self, y: Tensor, cond: Tensor, fake_y: Tensor, fake_cond: Tensor
    ) -> dict[str, Tensor]:
        config = self.config
        parts = {
            "adversarial_a": row_loss(self.discriminator_a, None, fake_y, config.loss, "generator"),
            "adversarial_b": row_loss(
                self.discriminator_b, None, fake_cond, config.loss, "generator"
            ),
            "cycle_a": mean_distance(self.generator_b(fake_y), cond),
            "cycle_b": mean_distance(self.generator_a(fake_cond), y),
        }
        total = config.adversarial_weight * (parts["adversarial_a"] + parts["adversarial_b"])
        total = total + config.cycle_weight * (parts["cycle_a"] + parts["cycle_b"])
        if config.identity_weight:
            same = mean_distance(self.generator_a(y), y) + mean_distance(
                self.generator_b(cond), cond
            )
            parts["identity"] = same
            total = total + config.cycle_weight * config.identity_weight * same
        return {"total": total, **parts}

    def _draw(self, draws: Draws, options: CycleGANSampling) -> Tensor:
        """In (-1, 1), all draws of a condition the same: there is no noise.

        With way="back" cond are images like y, of which conditions are made.
        """
        assert draws.cond is not None  # it was checked
        generator = self.generator_b if options.way == "back" else self.generator_a
        return draws.repeat(generator(draws.cond.contiguous(memory_format=torch.channels_last)))

    def _check_sampling(self, cond: Tensor | None, options: CycleGANSampling) -> None:
        if options.way == "forward" or cond is None:
            self.check_cond(cond)
        else:
            self.check_y(cond, "cond")

    def _sample_shape(self, options: CycleGANSampling) -> tuple[int, ...]:
        return self.config.cond_shape if options.way == "back" else self.config.event_shape
