"""pix2pix, the class-conditional GAN and CycleGAN: objectives by hand, samples, training."""

import math
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cgkernels
from cgm.data import Dataset
from cgm.families.cyclegan import CycleGAN, CycleGANConfig
from cgm.families.gan import ConditionalGAN, GANConfig, Pix2Pix, Pix2PixConfig
from cgm.families.gan_losses import ImagePool, gradient_penalty, gradient_square, row_loss
from cgm.model import make_model
from cgm.networks.patch_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from cgm.training import TrainingConfig, train
from tests.support import assert_equal

SMALL = {
    "event_shape": (1, 16, 16), "cond_shape": (2, 16, 16), "generator": "resnet", "depth": 1,
    "width": 4, "norm": "instance", "patch": 16, "discriminator_width": 4,
}  # fmt: skip
SAME = {**SMALL, "cond_shape": (1, 16, 16)}


def small_pix2pix(**changes) -> Pix2Pix:
    return make_model(Pix2Pix, Pix2PixConfig(**{**SMALL, **changes}), seed=1)


def small_gan(**changes) -> ConditionalGAN:
    config = {"event_shape": (1, 8, 8), "cond_kind": "class", "num_classes": 3, "patch": 16}
    sizes = {"latents": 5, "width": 4, "discriminator_width": 4}
    return make_model(ConditionalGAN, GANConfig(**{**config, **sizes, **changes}), seed=1)


def small_cyclegan(**changes) -> CycleGAN:
    return make_model(CycleGAN, CycleGANConfig(**{**SAME, "pool": 3, **changes}), seed=1)


def images(rows: int, channels: int = 1, side: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, channels, side, side, generator=generator) * 2 - 1


FAMILIES = {
    "pix2pix": (small_pix2pix, lambda n: (images(n), images(n, 2, seed=1))),
    "gan": (small_gan, lambda n: (images(n, side=8), torch.arange(n) % 3)),
    "gan of images": (
        lambda: small_gan(cond_kind="image", num_classes=0, cond_shape=(2, 8, 8), depth=2),
        lambda n: (images(n, side=8), images(n, 2, 8, seed=1)),
    ),
    "cyclegan": (small_cyclegan, lambda n: (images(n), images(n, seed=1))),
}
families = pytest.mark.parametrize("family", FAMILIES)


# Objectives ---------------------------------------------------------------------------------------
class Fixed(nn.Module):
    """Gives what it is told for images whose first value is this."""

    def __init__(self, answers: dict[float, Tensor]) -> None:
        super().__init__()
        self.answers = answers
        self.config = SimpleNamespace(patch=1)

    def forward(self, *images: Tensor, **noise: object) -> Tensor:
        firsts = images[-1][:, 0, 0, 0].tolist()
        return torch.stack([self.answers[round(first, 4)] for first in firsts])

    def row_losses(self, *images: Tensor, loss: str, target: str) -> Tensor:
        return cgkernels.patch_loss(self(*images), loss, target).flatten(1).mean(1)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# (loss, target): the mean over the patches [[0, 1], [2, -3]].
MEANS = {
    ("lsgan", "real"): (1 + 0 + 1 + 16) / 4,
    ("lsgan", "fake"): (0 + 1 + 4 + 9) / 4,
    ("lsgan", "generator"): (1 + 0 + 1 + 16) / 4,
    ("hinge", "real"): (1 + 0 + 0 + 4) / 4,
    ("hinge", "fake"): (1 + 2 + 3 + 0) / 4,
    ("hinge", "generator"): -(0 + 1 + 2 - 3) / 4,
    ("wgan", "real"): -(0 + 1 + 2 - 3) / 4,
    ("wgan", "fake"): (0 + 1 + 2 - 3) / 4,
    ("wgan", "generator"): -(0 + 1 + 2 - 3) / 4,
    ("vanilla", "real"): sum(softplus(-d) for d in (0, 1, 2, -3)) / 4,
    ("vanilla", "fake"): sum(softplus(d) for d in (0, 1, 2, -3)) / 4,
    ("vanilla", "generator"): sum(softplus(-d) for d in (0, 1, 2, -3)) / 4,
}
MAP = torch.tensor([[[0.0, 1.0], [2.0, -3.0]]])


@pytest.mark.parametrize(("loss", "target"), MEANS)
def test_the_loss_of_a_row_is_the_mean_over_its_patches(loss, target):
    judge = Fixed({0.0: MAP, 1.0: MAP + 1})
    y = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    rows = row_loss(judge, None, y, loss, target)
    assert rows.shape == (2,) and rows[0].item() == pytest.approx(MEANS[loss, target])
    if loss == "vanilla":
        assert_equal(row_loss(judge, y, y, "nonsaturating", target), rows)


@pytest.mark.parametrize("patch", [1, 16])
@pytest.mark.parametrize("spectral_norm", [False, True])
def test_the_losses_of_a_discriminator_are_those_of_its_map(patch, spectral_norm):
    torch.manual_seed(0)
    config = PatchDiscriminatorConfig(3, patch, 4, "instance", spectral_norm)
    discriminator = PatchDiscriminator(config).eval()
    x, y = images(3, 2), images(3, 1, seed=1)
    for loss, target in MEANS:
        expected = cgkernels.patch_loss(discriminator(x, y), loss, target).flatten(1).mean(1)
        torch.testing.assert_close(row_loss(discriminator, x, y, loss, target), expected)


def test_pix2pix_by_hand():
    model = small_pix2pix(loss="lsgan", l1_weight=10.0, dropout=False)
    y, cond = torch.full((1, 1, 16, 16), 0.25), torch.zeros(1, 2, 16, 16)
    model.generator = Fixed({0.0: torch.full((1, 16, 16), -0.5)})
    model.discriminator = Fixed({0.25: MAP, -0.5: 2 * MAP})
    values = model.loss(y, cond=cond, phase="discriminator", seed=0)
    # real: the mean of (d - 1)^2; fake: of (2 d)^2.
    assert {n: v.item() for n, v in values.items()} == pytest.approx(
        {"real": 18 / 4, "fake": 4 * 14 / 4, "total": (18 / 4 + 14) / 2}
    )
    values = model.loss(y, cond=cond, phase="generator", seed=0)
    # (2 d - 1)^2 is 1, 1, 9, 49; every value is off by 0.75.
    assert {n: v.item() for n, v in values.items()} == pytest.approx(
        {"adversarial": 60 / 4, "l1": 0.75, "total": 15 + 10 * 0.75}
    )


def test_cyclegan_by_hand():
    model = small_cyclegan(cycle_weight=4.0, identity_weight=0.5)
    full = {v: torch.full((1, 16, 16), v) for v in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)}
    y, cond = full[0.2][None], full[0.1][None]
    model.generator_a = Fixed({0.1: full[0.3], 0.4: full[0.5], 0.2: full[0.6]})
    model.generator_b = Fixed({0.2: full[0.4], 0.3: full[0.3], 0.1: full[0.4]})
    model.discriminator_a = Fixed({0.2: MAP, 0.3: 2 * MAP})
    model.discriminator_b = Fixed({0.1: 0 * MAP, 0.4: MAP})
    values = model.eval().loss(y, cond=cond, phase="generator", seed=0)
    # x = 0.1 -> 0.3 -> 0.3 and y = 0.2 -> 0.4 -> 0.5; identity: y -> 0.6, x -> 0.4.
    expected = {
        "adversarial_a": 15, "adversarial_b": 4.5, "cycle_a": 0.2, "cycle_b": 0.3, "identity": 0.7
    }  # fmt: skip
    total = 15 + 4.5 + 4 * 0.5 + 4 * 0.5 * 0.7
    assert {n: v.item() for n, v in values.items()} == pytest.approx({**expected, "total": total})
    values = model.loss(y, cond=cond, phase="discriminator", seed=0)
    expected = {"real_a": 4.5, "fake_a": 14, "real_b": 1, "fake_b": 3.5}
    total = (4.5 + 14) / 2 + (1 + 3.5) / 2
    assert {n: v.item() for n, v in values.items()} == pytest.approx({**expected, "total": total})


def test_the_gan_by_hand():
    model = small_gan(loss="hinge", r1_weight=0.0)
    y = torch.full((1, 1, 8, 8), 0.25)
    model.generator = Fixed({})
    model._generate = lambda *args: torch.full((1, 1, 8, 8), -0.5)
    model.discriminator = Fixed({0.25: MAP, -0.5: MAP})
    cond = torch.tensor([2])
    values = model.loss(y, cond=cond, phase="discriminator", seed=0)
    assert values["total"].item() == pytest.approx((5 / 4 + 6 / 4) / 2)
    assert model.loss(y, cond=cond, phase="generator", seed=0)["total"].item() == 0


def test_penalties_of_a_linear_discriminator():
    """Its gradient is w / patches wherever one looks."""
    w = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    linear = lambda y: (y * w).sum((1, 2, 3), keepdim=True) * torch.ones(1, 1, 3, 3)  # noqa: E731
    y, fake = images(5, 2, 4), images(5, 2, 4, seed=1)
    square = gradient_square(linear, y)
    torch.testing.assert_close(square, w.square().sum().expand(5))
    penalty = gradient_penalty(linear, y, fake, share=torch.rand(5))
    torch.testing.assert_close(penalty, ((w.square().sum().sqrt() - 1) ** 2).expand(5))


def test_a_wgan_trains_with_the_gradient_penalty():
    y, cond = images(3, 1, 8), torch.tensor([0, 1, 2])
    loss = {"cond": cond, "phase": "discriminator", "index": torch.arange(3)}
    with_penalty = small_gan(loss="wgan", r1_weight=0.0, penalty_weight=10.0)
    values = with_penalty.loss(y, seed=0, **loss)
    without = small_gan(loss="wgan", r1_weight=0.0).loss(y, seed=0, **loss)
    torch.testing.assert_close(values["total"], without["total"] + 10 * values["penalty"])
    assert_equal(values["penalty"], with_penalty.loss(y, seed=0, **loss)["penalty"])
    assert (values["penalty"] != with_penalty.loss(y, seed=1, **loss)["penalty"]).all()
    values["total"].mean().backward()
    assert all(p.grad is not None for p in with_penalty.discriminator.parameters())


def test_the_penalty_is_taken_between_the_images():
    quadratic = lambda y: y.square().flatten(1).sum(1).view(-1, 1, 1, 1) / 2  # noqa: E731
    real, fake = images(3, 1, 4), images(3, 1, 4, seed=1)
    share = torch.tensor([0.0, 0.25, 1.0])
    place = fake + share.view(-1, 1, 1, 1) * (real - fake)
    expected = (place.flatten(1).norm(dim=1) - 1).square()
    torch.testing.assert_close(gradient_penalty(quadratic, real, fake, share=share), expected)


@pytest.mark.parametrize("family", ["pix2pix", "gan"])
def test_r1_reaches_the_discriminator(family):
    make, data = FAMILIES[family]
    y, cond = data(2)
    model, plain = make(r1_weight=3.0), make(r1_weight=0.0)
    values = model.loss(y, cond=cond, phase="discriminator", seed=0)
    without = plain.loss(y, cond=cond, phase="discriminator", seed=0)
    torch.testing.assert_close(values["total"], without["total"] + 1.5 * values["r1"])
    parameters = model.phase_parameters("discriminator")
    gradients = torch.autograd.grad(values["r1"].sum(), parameters, allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in gradients)


# Phases -------------------------------------------------------------------------------------------
@families
def test_each_phase_moves_its_own_parameters(family):
    make, data = FAMILIES[family]
    model = make().train()
    y, cond = data(2)
    parameters = {phase: model.phase_parameters(phase) for phase in model.phases}
    everything = [id(p) for group in parameters.values() for p in group]
    assert sorted(everything) == sorted(map(id, model.parameters()))
    values = model.loss(y, cond=cond, phase="discriminator", seed=0)
    assert all(v.shape == (2,) for v in values.values())
    gradients = torch.autograd.grad(
        values["total"].sum(), parameters["generator"], allow_unused=True, retain_graph=True
    )
    assert all(g is None for g in gradients)
    values = model.loss(y, cond=cond, phase="generator", seed=0)
    weights = [p for p in parameters["generator"] if p.dim() > 1]
    gradients = torch.autograd.grad(values["total"].sum(), weights)
    assert all(g.abs().max() > 0 for g in gradients)


@families
def test_phases_of_a_step_can_share_what_is_drawn(family):
    make, data = FAMILIES[family]
    y, cond = data(2)
    model, shared = make().eval(), {}
    for phase in model.phases:
        alone = model.loss(y, cond=cond, phase=phase, seed=3)
        together = model.loss(y, cond=cond, phase=phase, seed=3, shared=shared)
        for name, value in alone.items():
            assert_equal(together[name], value)
    assert shared


@pytest.mark.parametrize("family", ["pix2pix", "gan"])
def test_the_loss_depends_on_seed_and_index(family):
    make, data = FAMILIES[family]
    y, cond = data(3)
    model = make().eval()
    kwargs = {"phase": "generator", "seed": 5}
    whole = model.loss(y, cond=cond, **kwargs)["total"]
    assert_equal(model.loss(y, cond=cond, **kwargs)["total"], whole)
    alone = model.loss(y[1:2], cond=cond[1:2], index=torch.tensor([1]), **kwargs)["total"]
    torch.testing.assert_close(alone, whole[1:2])
    other = model.loss(y, cond=cond, phase="generator", seed=6)["total"]
    assert not torch.equal(other, whole)


# Samples ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["pix2pix", "gan"])
def test_a_sample_depends_on_seed_and_index_alone(family):
    make, data = FAMILIES[family]
    cond = data(3)[1]
    model = make().eval()
    one = model.sample(cond=cond, seed=4)
    assert one.shape == (3, *model.config.event_shape) and one.abs().max() <= 1
    several = model.sample(2, cond=cond, seed=4)
    assert several.shape == (2, *one.shape)
    torch.testing.assert_close(several[0], one)
    assert not torch.equal(several[1], one)
    index = torch.tensor([2 + 2**32])
    alone = model.sample(cond=cond[2:], seed=4, index=index)
    torch.testing.assert_close(alone, several[1, 2:])
    assert not torch.equal(model.sample(cond=cond, seed=5), one)
    assert model.sample(cond=cond[:0]).shape == (0, *one.shape[1:])


def test_without_dropout_all_draws_are_one():
    cond = images(2, 2)
    model = small_pix2pix().eval()
    drawn = model.sample(3, cond=cond, dropout=False)
    assert_equal(drawn[0], drawn[2])
    assert not torch.equal(model.sample(cond=cond), drawn[0])
    plain = small_pix2pix(dropout=False).eval()
    assert_equal(plain.sample(2, cond=cond)[1], plain.sample(cond=cond))


def test_a_gan_without_a_condition():
    model = small_gan(cond_kind="none", num_classes=0).eval()
    drawn = model.sample(4, seed=1)
    assert drawn.shape == (4, 1, 8, 8)
    torch.testing.assert_close(model.sample(6, seed=1)[:4], drawn)
    still = model.sample(2, truncation=0.0)
    torch.testing.assert_close(still[0], still[1])
    assert model.loss(images(2, side=8), phase="generator", seed=0)["total"].shape == (2,)


def test_the_class_has_an_effect():
    model = small_gan().eval()
    drawn = model.sample(cond=torch.tensor([0, 1]), index=torch.zeros(2, dtype=torch.int64))
    assert not torch.allclose(drawn[0], drawn[1])


def test_cyclegan_goes_both_ways():
    model = small_cyclegan(cond_shape=(2, 16, 16), identity_weight=0.0).eval()
    a, b = images(2, 2), images(2, 1)
    assert_equal(model.sample(cond=a), model.generator_a(a).detach())
    assert_equal(model.sample(cond=b, way="back"), model.generator_b(b).detach())
    assert model.sample(3, cond=a).shape == (3, 2, 1, 16, 16)


# Errors -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (Pix2PixConfig, {"cond_shape": (1, 8, 16)}, "cond_shape must have the sides"),
        (Pix2PixConfig, {"generator": "unet", "depth": 5}, "event_shape must have sides"),
        (Pix2PixConfig, {"depth": -1}, "depth must not be negative"),
        (Pix2PixConfig, {"event_shape": (1, 18, 18), "cond_shape": (1, 18, 18)}, "multiples of 4"),
        (Pix2PixConfig, {"patch": 20}, "patch must be one of"),
        (Pix2PixConfig, {"loss": "mse"}, "loss must be one of"),
        (Pix2PixConfig, {"l1_weight": -1.0}, "l1_weight must not be negative"),
        (Pix2PixConfig, {"norm": "batch", "r1_weight": 1.0}, "norm must not be batch"),
        (Pix2PixConfig, {"cond_kind": "class"}, "cond_kind must be image"),
        (CycleGANConfig, {"cond_shape": (2, 16, 16)}, "identity_weight must be 0"),
        (CycleGANConfig, {"pool": -1}, "pool must not be negative"),
    ],
)
def test_wrong_configs(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**{**SAME, **changes})


@pytest.mark.parametrize(
    ("generator", "side", "depth"),
    [("unet", 256, 8), ("unet", 64, 6), ("unet", 28, 2), ("resnet", 128, 6), ("resnet", 256, 9)],
)
def test_the_usual_depth(generator, side, depth):
    sizes = {"width": 1, "discriminator_width": 1, "norm": "instance", "depth": 0}
    shape = (1, side, side)
    config = Pix2PixConfig(event_shape=shape, cond_shape=shape, generator=generator, **sizes)
    made: Any = Pix2Pix(config).generator.config
    assert (made.downs if generator == "unet" else made.blocks) == depth
    assert made.dropout == (generator == "resnet" or depth >= 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"event_shape": (10, 8)}, "event_shape must be"),
        ({"cond_kind": "class", "num_classes": 0}, "num_classes must be positive"),
        ({"cond_kind": "tokens"}, "cond_kind must be one of"),
        ({"depth": 0}, "depth must be positive"),
    ],
)
def test_wrong_gan_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        GANConfig(**changes)


@families
def test_wrong_arguments(family):
    make, data = FAMILIES[family]
    y, cond = data(2)
    model = make()
    with pytest.raises(ValueError, match="phase must be one of"):
        model.loss(y, cond=cond, phase="model", seed=0)
    with pytest.raises(ValueError, match="y must have shape"):
        model.loss(y[:, :, :4], cond=cond, seed=0)
    with pytest.raises(ValueError, match="cond must be given"):
        model.loss(y, seed=0)
    with pytest.raises(TypeError, match="steps is no option of sample"):
        model.sample(cond=cond, steps=3)
    with pytest.raises((ValueError, TypeError), match="cond must"):
        model.sample(cond=cond[..., None])
    with pytest.raises(ValueError, match="phase must be one of"):
        model.phase_parameters("model")


def test_wrong_options():
    with pytest.raises(ValueError, match="way must be one of forward, back"):
        small_cyclegan().sample(cond=images(1), way="BtoA")
    with pytest.raises(ValueError, match="truncation must not be negative"):
        small_gan().sample(cond=torch.tensor([0]), truncation=-1.0)


# Pool ---------------------------------------------------------------------------------------------
def test_the_pool_fills_first_and_then_gives_back_about_half():
    pool = ImagePool(10, (1, 1, 1))
    numbers = torch.arange(1.0, 2001).view(-1, 1, 1, 1)
    index = torch.arange(2000)
    parts = zip(numbers.split(4), index.split(4), strict=True)
    out = torch.cat([pool.exchange(n, seed=3, index=i) for n, i in parts])
    assert_equal(out[:10], numbers[:10])
    old = (out[10:] != numbers[10:]).float().mean()
    assert 0.45 < old < 0.55
    assert (out <= numbers).all() and len(out.unique()) > 1500
    # What is kept was never given away: each image of before comes back at most once.
    back = out[out != numbers]
    assert len(back.unique()) == len(back)
    # Places are drawn evenly: an image stays for 20 others on the average.
    age = (numbers[out != numbers] - back).mean()
    assert 15 < age < 25


def test_the_pool_depends_on_seed_and_index_alone():
    def run(seed, split):
        pool = ImagePool(3, (1, 1, 1))
        numbers = torch.arange(40.0).view(-1, 1, 1, 1)
        parts = zip(numbers.split(split), torch.arange(40).split(split), strict=True)
        return torch.cat([pool.exchange(n, seed=seed, index=i) for n, i in parts])

    assert_equal(run(1, 1), run(1, 8))
    assert not torch.equal(run(1, 1), run(2, 1))


def test_no_pool():
    fake = images(2)
    assert ImagePool(0, (1, 16, 16)).exchange(fake, seed=0, index=torch.arange(2)) is fake


# Training -----------------------------------------------------------------------------------------
def squares(rows: int, side: int = 16) -> Dataset:
    """Filled squares from their outlines."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(1, side // 2, (rows, 2), generator=generator).tolist()
    filled = torch.full((rows, 1, side, side), -1.0)
    outline = filled.clone()
    for row, (top, left) in enumerate(corners):
        end = side // 2 - 2
        filled[row, 0, top : top + end, left : left + end] = 1
        outline[row] = filled[row]
        outline[row, 0, top + 1 : top + end - 1, left + 1 : left + end - 1] = -1
    return Dataset("squares", filled, outline, "image")


GAN_TRAINING = {"learning_rate": 2e-3, "beta1": 0.5, "warmup": 0, "decay": "late_linear"}


@pytest.mark.parametrize("loss", ["lsgan", pytest.param("vanilla", marks=pytest.mark.slow)])
def test_pix2pix_learns_to_fill_squares(tmp_path, loss):
    model = make_model(Pix2Pix, Pix2PixConfig(**{**SAME, "width": 8, "loss": loss}), seed=1)
    data = squares(32)
    training = TrainingConfig(
        steps=150, batch_size=8, log_every=30, ema_decay=0.0, gradient_clip=math.inf,
        **GAN_TRAINING,
    )  # fmt: skip
    train(model, data, training, tmp_path / "run")
    rows = [line.split(",") for line in (tmp_path / "run" / "log.csv").read_text().splitlines()]
    column = {name: [float(row[i]) for row in rows[1:]] for i, name in enumerate(rows[0])}
    l1 = column["generator/l1"]
    assert l1[-1] < 0.35 * l1[0]
    # The discriminator has neither won nor given up.
    judged = column["discriminator/total"][-1]
    undecided = {"lsgan": 0.25, "vanilla": math.log(2)}[loss]
    assert 0.01 * undecided < judged < 1.5 * undecided


def test_the_gan_learns_four_images_and_their_classes(tmp_path):
    y, cond = images(4, side=8).sign(), torch.arange(4)
    model = small_gan(num_classes=4, width=16, discriminator_width=16, r1_weight=0.1)
    data = Dataset("four", y.repeat(4, 1, 1, 1), cond.repeat(4), "class", num_classes=4)
    training = TrainingConfig(
        steps=150, batch_size=16, ema_decay=0.9, gradient_clip=math.inf, **GAN_TRAINING
    )
    samples = train(model, data, training, tmp_path / "run").sample(8, cond=cond, seed=2)
    right = (samples.sign() == y).float().mean()
    shuffled = (samples.sign() == y.roll(1, 0)).float().mean()
    assert right > 0.85 > 0.7 > shuffled


@pytest.mark.parametrize(("family", "pool"), [("pix2pix", 0), ("gan", 0), ("cyclegan", 3)])
def test_a_resumed_run_goes_on_with_the_same_bits(tmp_path, family, pool):
    make, data = FAMILIES[family]
    y, cond = data(6)
    kind = "class" if family == "gan" else "image"
    dataset = Dataset("random", y, cond, kind, num_classes=3 * (kind == "class"))

    def run(folder, steps, resume=False):
        options = GAN_TRAINING | {"decay": "constant"}  # others depend on the number of steps
        training = TrainingConfig(steps=steps, batch_size=2, save_every=4, **options)
        model = make()
        train(model, dataset, training, tmp_path / folder, resume=resume)
        return model

    whole = run("whole", 8)
    run("parts", 4)
    parts = run("parts", 8, resume=True)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b), name
    if pool:
        assert int(whole.pool_a.count) == pool
        assert_equal(parts.pool_a.images, whole.pool_a.images)
        assert not any("pool" in name for name in whole.state_dict())


def test_fused_and_plain_training_agree():
    """A few steps by the ops and in plain PyTorch."""
    y, cond = squares(4).batch(torch.arange(4)).values()
    curves = []
    for plain in (False, True):
        model = small_pix2pix(cond_shape=(1, 16, 16)).train()
        optimizers = [
            torch.optim.Adam(model.phase_parameters(phase), 1e-3, (0.5, 0.999))
            for phase in model.phases
        ]
        curve = []
        turns = product(range(6), zip(model.phases, optimizers, strict=True))
        for step, (phase, optimizer) in turns:
            with cgkernels.reference() if plain else torch.enable_grad():
                total = model.loss(y, cond=cond, phase=phase, seed=step)["total"].mean()
                optimizer.zero_grad()
                total.backward(inputs=model.phase_parameters(phase))
            optimizer.step()
            curve.append(total.item())
        curves.append(torch.tensor(curve))
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-3, atol=1e-4)
