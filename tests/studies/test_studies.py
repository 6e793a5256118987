"""What parts of the families are for, as numbers of small trainings and of a shipped model.

Study 1  Isola et al., arXiv:1611.07004, section 4.4: what a patch of r pixels can tell apart.
Study 2  Zhu et al., arXiv:1703.10593, section 5.1.2: what each part of the objective is for.
Study 3  Torralba, Isola, Freeman, "Foundations of Computer Vision", chapter 34: a latent vector
         holds what the condition does not tell, and nothing else.
Study 4  Hinton, Salakhutdinov, Science 313, 2006: a few numbers of a network keep more of an image
         than as many principal components.
"""

import functools
import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from cgm.checkpoints import load_model, shipped
from cgm.data import Dataset, load_task, synthetic, to_float
from cgm.evaluation import ground_truth
from cgm.evaluation.out_of_distribution import auroc
from cgm.families.cyclegan import CycleGAN, CycleGANConfig
from cgm.families.gan_losses import row_loss
from cgm.model import make_model
from cgm.networks.patch_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from cgm.training import TrainingConfig, train


@functools.cache
def clothes(split: str) -> Tensor:
    """The shipped images (N, 1, 28, 28) in [-1, 1]."""
    return to_float(load_task("class_to_image", split).y)


# What a patch can see -----------------------------------------------------------------------------
def shuffled(images: Tensor, block: int, generator: torch.Generator) -> Tensor:
    """Their blocks of so many pixels a side in another order, each image in its own."""
    blocks = F.unfold(images, block, stride=block)
    orders = [torch.randperm(blocks.shape[2], generator=generator) for _ in images]
    blocks = torch.stack([one[:, order] for one, order in zip(blocks, orders, strict=True)])
    return F.fold(blocks, images.shape[2:], block, stride=block)


@functools.cache
def told_apart(patch: int, block: int) -> float:
    """AUC of the mean score, images never seen against their shuffled copies."""
    config = PatchDiscriminatorConfig(
        in_channels=1, patch=patch, width=8, norm="none" if patch == 1 else "instance"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        discriminator = PatchDiscriminator(config)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-3, (0.5, 0.99))
    seen, unseen = (
        F.interpolate(clothes(split)[:: len(clothes(split)) // n], size=(64, 64), mode="bilinear")
        for split, n in (("train", 600), ("test", 200))
    )
    for _ in range(100):
        real = seen[torch.randint(len(seen), (8,), generator=generator)]
        fake = shuffled(real, block, generator)
        loss = row_loss(discriminator, None, real, "vanilla", "real")
        loss = loss + row_loss(discriminator, None, fake, "vanilla", "fake")
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    with torch.no_grad():
        pair = (unseen, shuffled(unseen, block, generator))
        return auroc(*(discriminator(images).flatten(1).mean(1) for images in pair))


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("block", [slow(1), 8, slow(32)])
def test_a_patch_of_one_pixel_sees_no_order(block):
    assert 0.45 < told_apart(1, block) < 0.55


@pytest.mark.parametrize("patch", [16, slow(34), slow(70)])
@pytest.mark.parametrize("block", [slow(1), 8])
def test_patches_see_texture_that_is_broken(patch, block):
    assert told_apart(patch, block) > 0.95


@pytest.mark.slow
def test_layout_takes_large_patches():
    seen = [told_apart(patch, 32) for patch in (1, 16, 34, 70)]
    assert seen == sorted(seen) and seen[-1] > seen[1] + 0.005


# What the objective of CycleGAN is for ------------------------------------------------------------
def hidden(images: Tensor) -> Tensor:
    """What happened to the images of kind B: a negative, a little less bright."""
    return -0.8 * images


def error_to_the_hidden_pair(folder, **weights: float) -> float:
    """Mean squared error of images never seen, after a training without pairs."""
    small = F.adaptive_avg_pool2d(clothes("train"), 8)
    data = Dataset("unpaired", hidden(small[1::2]), small[::2].contiguous(), "image", paired=False)
    config = CycleGANConfig(
        event_shape=(1, 8, 8), cond_shape=(1, 8, 8), generator="unet", depth=2, width=16,
        norm="none", patch=16, discriminator_width=16, identity_weight=0.0, pool=0, **weights,
    )  # fmt: skip
    model = make_model(CycleGAN, config, seed=1)
    training = TrainingConfig(
        steps=400, batch_size=16, learning_rate=2e-3, beta1=0.5, warmup=0, decay="late_linear",
        gradient_clip=math.inf, ema_decay=0.0,
    )  # fmt: skip
    model = train(model, data, training, folder, console=Console(file=io.StringIO()))
    unseen = F.adaptive_avg_pool2d(clothes("test")[:200], 8)
    return (model.sample(cond=unseen) - hidden(unseen)).square().mean().item()


@pytest.mark.slow
def test_unpaired_translation_takes_both_parts_of_the_objective(tmp_path):
    full = error_to_the_hidden_pair(tmp_path / "full")
    adversarial = error_to_the_hidden_pair(tmp_path / "adversarial", cycle_weight=0.0)
    cycle = error_to_the_hidden_pair(tmp_path / "cycle", adversarial_weight=0.0)
    unseen = hidden(F.adaptive_avg_pool2d(clothes("test")[:200], 8))
    mean_image = (unseen - unseen.mean(0)).square().mean().item()
    assert full < adversarial / 5
    # There and back works by any way: this one is worse than always answering the mean.
    assert cycle > mean_image > full


# What a latent vector holds -----------------------------------------------------------------------
@pytest.fixture(scope="module")
def balls():
    """Balls that no model saw, and that meet no wall."""
    drawn = synthetic.balls("test")
    free = ~drawn.bounced
    parts = {name: getattr(drawn, name)[free] for name in ("before", "after")}
    return parts, {n: getattr(drawn, n)[free] for n in ("velocity", "position", "color")}


def test_the_latent_vector_is_the_velocity_and_nothing_else(balls):
    frames, truths = balls
    model: Any = load_model(shipped("bouncing_ball_vae"))
    mean, _ = model.encode(frames["after"], cond=frames["before"])
    found = {name: ground_truth.r_squared(mean, value) for name, value in truths.items()}
    assert found["velocity"] > 0.9 and found["position"] < 0.1 and found["color"] < 0.1
    # The same regression finds each of these where it is.
    where = ground_truth.centroids(frames["before"])
    assert ground_truth.r_squared(where, truths["position"]) > 0.99
    light = (frames["before"] + 1).amax((2, 3))
    assert ground_truth.r_squared(light / light.sum(1, keepdim=True), truths["color"]) > 0.5


def test_samples_of_the_next_frame_are_whole_balls_that_moved(balls):
    """Not the faint ring around the ball that is the mean of all of them."""
    frames, truths = balls
    model = load_model(shipped("bouncing_ball_vae"))
    before, position = frames["before"][:200], truths["position"][:200]
    scores = ground_truth.ball_scores(model.sample(4, cond=before, seed=0), before, position)
    assert scores["peak"] > 0.8 and scores["right speed"] > 0.6


# What sixteen numbers keep ------------------------------------------------------------------------
def test_the_autoencoder_keeps_more_than_as_many_principal_components():
    model: Any = load_model(shipped("class_to_image_autoencoder"))
    seen, held_out = load_task("class_to_image"), load_task("class_to_image", "test")
    batch = held_out.batch(torch.arange(300))
    y, cond = batch["y"], batch["cond"]
    pixels = seen.batch(torch.arange(len(seen)))["y"].flatten(1)
    mean = pixels.mean(0)
    axes = torch.linalg.eigh((pixels - mean).T @ (pixels - mean)).eigenvectors[:, -16:]
    rest = y.flatten(1) - mean
    linear = (rest - rest @ axes @ axes.T).square().mean()
    kept = (model.reconstruct(y, cond=cond) - y).square().mean()
    assert model.config.latents == 16 and kept < 0.8 * linear
    # The class tells it a part: another image's class costs something.
    assert (model.reconstruct(y, cond=cond.roll(1)) - y).square().mean() > kept
