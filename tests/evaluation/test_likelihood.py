"""Likelihoods and distances of models, and what their samples are classified as."""

import pytest
import torch

from cgm.checkpoints import load_model, shipped
from cgm.data import Dataset, load_task
from cgm.evaluation.classifier import class_accuracy, held_out_accuracy
from cgm.evaluation.likelihood import bits_per_dimension, evaluate
from cgm.families.autoregressive import AutoregressiveConfig, ConditionalTransformer, dequantize
from cgm.families.diffusion import ConditionalDiffusion, DiffusionConfig
from cgm.families.gan import Pix2Pix, Pix2PixConfig
from cgm.model import make_model
from cgm.training import TrainingConfig, train


def stripes(rows, seed=0):
    """Images of four values in stripes, with noise, whose condition is the phase."""
    generator = torch.Generator().manual_seed(seed)
    phase = torch.randint(4, (rows,), generator=generator)
    value = (torch.arange(16) + phase[:, None]) % 4
    noise = torch.rand(rows, 16, generator=generator) < 0.1
    value = torch.where(noise, torch.randint(4, (rows, 16), generator=generator), value)
    images = ((dequantize(value, 4, (1, 4, 4)) + 1) * 127.5).round().to(torch.uint8)
    return Dataset("stripes", images, phase, "class", 4)


def untrained():
    config = AutoregressiveConfig(
        event_shape=(1, 4, 4), cond_kind="class", num_classes=4, levels=4, depth=2, width=32,
        heads=2, hidden=64,
    )  # fmt: skip
    return make_model(ConditionalTransformer, config).eval()


def test_bits_per_dimension_is_minus_log_prob():
    model, data = untrained(), stripes(120)
    batch = data.batch(torch.arange(120))
    bits = bits_per_dimension(model, batch["y"], batch["cond"])
    nats = -model.log_prob(batch["y"], cond=batch["cond"]).double()
    torch.testing.assert_close(bits, nats / (16 * torch.tensor(2.0).double().log()))
    assert abs(bits.mean() - 2) < 0.2  # four values, nothing learned


def test_training_lowers_the_bits_and_uses_the_condition(tmp_path):
    held_out = stripes(200, seed=1)
    before = {m.name: m for m in evaluate(untrained(), held_out, rows=100)}
    training = TrainingConfig(
        steps=250, batch_size=32, learning_rate=3e-3, warmup=20, ema_decay=0.9, threads=1
    )
    model = train(untrained(), stripes(1000), training, tmp_path)
    after = {m.name: m for m in evaluate(model, held_out, rows=100)}
    bits = "bits per dimension, held out"
    assert after[bits].value < before[bits].value - 0.5
    assert after[bits].error > 0 and after[bits].rows == 100
    assert after["... given another's condition"].value > after[bits].value + 0.02
    own, other = "bits per dimension, samples", "... drawn given another's condition"
    assert after[own].value < after[other].value - 0.02
    lost = after["... of 8 bits, what is lost"]
    assert abs(lost.value) < 0.05
    assert after["... with weights of 8 bits"].value == pytest.approx(
        after[bits].value + lost.value
    )


def test_class_accuracy_of_samples(monkeypatch):
    drawn = []

    def sample(self, n=None, *, cond, seed, steps):
        drawn.append((seed, steps))
        real = load_task("class_to_image", "test")
        return real.batch(torch.arange(len(cond)))["y"]

    monkeypatch.setattr(ConditionalDiffusion, "sample", sample)
    config = DiffusionConfig(cond_kind="class", num_classes=10, width=8, heads=2)
    model = make_model(ConditionalDiffusion, config)
    held_out = load_task("class_to_image", "test")
    samples, real = evaluate(model, held_out, rows=300, seed=4, steps=5)
    assert drawn == [(4, 5)] and samples.rows == 300 and samples.error is None
    assert samples.value == class_accuracy(held_out.y[:300], held_out.cond[:300])
    assert real.value == held_out_accuracy()
    with pytest.raises(ValueError, match="rows must be from 2 to 1000, got 1001"):
        evaluate(model, held_out, rows=1001)
    with pytest.raises(ValueError, match="model must have likelihoods, make images"):
        evaluate(model, stripes(10), rows=5)


def test_distances_of_images_made_of_images(monkeypatch):
    """Of a model that answers with the condition itself."""
    monkeypatch.setattr(Pix2Pix, "sample", lambda self, n, *, cond, seed, **solver: cond)
    shape = {"event_shape": (1, 4, 4), "cond_shape": (1, 4, 4), "generator": "resnet"}
    model = make_model(Pix2Pix, Pix2PixConfig(**shape, depth=1, width=4, patch=1))
    y = torch.stack([torch.full((1, 4, 4), v) for v in (0.0, 0.5, 1.0)])
    own, other = evaluate(model, Dataset("grays", y, y - 0.25, "image"), rows=3)
    assert (own.name, own.value, own.rows) == ("mean absolute error", pytest.approx(0.25), 3)
    # y - roll(y) + 0.25 is -0.75, 0.75 and 0.75.
    assert (other.name, other.value) == ("... of another's", pytest.approx(0.75))


@pytest.mark.slow
@torch.no_grad()
def test_shipped_model_knows_lower_halves_by_their_upper_ones():
    model = load_model(shipped("complete_autoregressive"))
    found = {m.name: m.value for m in evaluate(model, load_task("complete", "test"), rows=24)}
    assert found["bits per dimension, held out"] < 1.3  # of at most 4
    assert found["... given another's condition"] > found["bits per dimension, held out"] + 0.05
    own, other = "bits per dimension, samples", "... drawn given another's condition"
    assert found[other] > found[own] + 0.05
