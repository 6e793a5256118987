"""The energy-based model: Langevin steps, contrastive divergence, log Z, samples, training."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cgkernels
from cgkernels.random import STREAM_INITIAL, STREAM_SAMPLER, normal
from cgm.checkpoints import load_model, save_model
from cgm.data import Dataset
from cgm.families.energy import Chains, ConditionalEBM, EnergyConfig
from cgm.model import make_model
from cgm.sampling.langevin import annealed_weights, langevin, with_gradient
from cgm.training import TrainingConfig, train
from tests.support import assert_equal

TINY = EnergyConfig(
    event_shape=(1, 4, 6),
    width=4,
    depth=2,
    hidden=8,
    temperature=0.002,
    step_size=0.05,
    chain_steps=3,
    chains=8,
    renewal=0.25,
)
KINDS = {
    "none": TINY,
    "class": dataclasses.replace(TINY, cond_kind="class", num_classes=3),
    "image": dataclasses.replace(TINY, cond_kind="image", cond_shape=(2, 4, 6)),
}
kinds = pytest.mark.parametrize("kind", KINDS)
# A point of the plane.
POINT = EnergyConfig(
    event_shape=(2, 1, 1), patch=1, depth=1, width=8, hidden=16, temperature=0.5, step_size=0.1,
    bound=10.0, start_std=1.0,
)  # fmt: skip


def model(config: EnergyConfig, seed: int = 0) -> ConditionalEBM:
    return make_model(ConditionalEBM, config, seed=seed).eval()


def conditions(kind: str, rows: int) -> Tensor | None:
    if kind == "none":
        return None
    return (
        normal((rows, 2, 4, 6), seed=9, step=0, stream=6)
        if kind == "image"
        else torch.arange(rows) % 3
    )


def images(rows: int, seed: int = 5) -> Tensor:
    return normal((rows, *TINY.event_shape), seed=seed, step=0, stream=6).clamp(-1, 1)


def points(*rows: tuple[float, float]) -> Tensor:
    return torch.tensor(rows).view(-1, 2, 1, 1)


MATRIX = torch.tensor([[2.0, 0.9], [0.9, 1.0]])


def quadratic(y: Tensor) -> Tensor:
    """E = y^T A y / 2."""
    flat = y.flatten(1)
    return (flat @ MATRIX.to(flat) * flat).sum(1) / 2


class Squares(nn.Module):
    """k |y|^2 / 2 of the first channels of x, in place of a network."""

    def __init__(self, k: float, channels: int) -> None:
        super().__init__()
        self.k, self.channels = nn.Parameter(torch.tensor(k)), channels

    def forward(self, x: Tensor) -> Tensor:
        return self.k * x[:, : self.channels].square().flatten(1).sum(1) / 2


# Langevin steps -----------------------------------------------------------------------------------
def test_the_covariance_of_a_quadratic_energy():
    """Its stationary covariance is known with its error of the step, which is no small one here."""
    n, a, t = 6000, 0.3, 0.5
    y = langevin(
        quadratic, torch.zeros(n, 2, 1, 1), steps=60, step_size=a, temperature=t, seed=3
    ).flatten(1)
    expected = t * torch.linalg.inv(MATRIX - a / 2 * MATRIX @ MATRIX)
    found = y.T @ y / n
    variances = expected.diagonal()
    error = ((variances[:, None] * variances + expected.square()) / n).sqrt()
    assert ((found - expected).abs() < 4 * error).all()
    # And so many chains would tell it from that of a step of 0.
    limit = t * torch.linalg.inv(MATRIX)
    assert ((found - limit).abs() > 4 * error).any()


def test_steps_by_hand():
    y, a, t, bound = images(3), 0.4, 0.02, 0.5
    weight = 3 * images(1, seed=6)
    index = torch.tensor([4, 7, 2**32])
    expected = y
    for step in range(3):
        z = normal(tuple(y.shape), seed=8, index=index, step=step, stream=STREAM_SAMPLER)
        expected = (expected - a * weight).clamp(-bound, bound) + math.sqrt(2 * a * t) * z
    linear = lambda y: (y * weight).flatten(1).sum(1)  # noqa: E731
    options: dict[str, Any] = {"step_size": a, "temperature": t, "bound": bound}
    found = langevin(linear, y, steps=3, seed=8, index=index, **options)
    torch.testing.assert_close(found, expected)
    assert_equal(langevin(linear, y, steps=0, seed=8, **options), y)
    cold = langevin(linear, y, steps=1, seed=8, **{**options, "temperature": 0.0})
    torch.testing.assert_close(cold, (y - a * weight).clamp(-bound, bound))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -1}, "steps must be an int of at least 0"),
        ({"step_size": 0.0}, "step_size must be positive"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"bound": 0.0}, "bound must be positive"),
    ],
)
def test_wrong_steps(changes, message):
    with pytest.raises(ValueError, match=message):
        langevin(quadratic, points((0, 0)), **{"steps": 1, "step_size": 0.1, "seed": 0, **changes})


# log Z --------------------------------------------------------------------------------------------
def mean_weight(weights: Tensor) -> tuple[float, float]:
    """log of the mean of the weights, and its standard error."""
    shares = weights.softmax(0)
    error = (len(weights) * shares.square().sum() - 1).clamp(min=0).div(len(weights)).sqrt()
    return (weights.logsumexp(0) - math.log(len(weights))).item(), error.item()


@pytest.mark.parametrize("std", [0.7, 2.0])
def test_log_z_of_a_quadratic_energy(std):
    weights = annealed_weights(
        quadratic, (400, 2, 1, 1), std=std, temperatures=60, step_size=0.2, seed=1
    )
    found, error = mean_weight(weights)
    expected = math.log(2 * math.pi) - 0.5 * math.log(torch.linalg.det(MATRIX).item())
    assert error < 0.05 and abs(found - expected) < 4 * error
    again = annealed_weights(
        quadratic, (2, 2, 1, 1), std=std, temperatures=60, step_size=0.2, seed=1,
        index=torch.tensor([7, 3]),
    )  # fmt: skip
    torch.testing.assert_close(again, weights[[7, 3]])


def test_many_small_changes_add_up():
    """Of an energy that is the start's, but for 100 nats, there are 2,000 in 2,000 sums."""

    def energy(y: Tensor) -> Tensor:
        return y.flatten(1).square().sum(1) / 2 + 100

    weights = annealed_weights(energy, (3, 1, 1, 1), temperatures=2000, step_size=0.1, seed=1)
    expected = torch.full((3,), 0.5 * math.log(2 * math.pi) - 100)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)


def test_chains_keep_the_density_whatever_the_step():
    """Of steps so long that without Metropolis's rule they would leave for infinity."""
    weights = annealed_weights(quadratic, (2000, 2, 1, 1), temperatures=30, step_size=0.9, seed=2)
    found, error = mean_weight(weights)
    expected = math.log(2 * math.pi) - 0.5 * math.log(torch.linalg.det(MATRIX).item())
    assert error < 0.05 and abs(found - expected) < 4 * error


def test_log_z_of_a_model_is_that_of_a_sum_over_the_plane():
    config = dataclasses.replace(POINT, cond_kind="class", num_classes=2, temperature=0.05)
    m = model(config)
    side = torch.linspace(-8, 8, 321)
    plane = torch.cartesian_prod(side, side).view(-1, 2, 1, 1)
    cond = torch.tensor([0, 1])
    with torch.no_grad():
        m.planes.learned.mul_(20)  # classes of different energies
        sums = [
            (-m.energy(plane, cond=torch.full((len(plane),), c))).logsumexp(0)
            + 2 * math.log(side[1] - side[0])
            for c in (0, 1)
        ]
    found = m.log_partition(cond=cond, chains=300, temperatures=40, step_size=0.3, seed=3)
    assert found.shape == (2,) and abs(sums[0] - sums[1]) > 0.05
    torch.testing.assert_close(found, torch.stack(sums), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="chains must be an int of at least 1"):
        m.log_partition(cond=cond, chains=0)


def test_log_z_of_a_model_without_condition():
    m = model(POINT)
    m.network = Squares(3 * POINT.temperature, 2)
    found = m.log_partition(chains=200, temperatures=40, step_size=0.2)
    assert found.item() == pytest.approx(math.log(2 * math.pi / 4), abs=0.03)


# Energy -------------------------------------------------------------------------------------------
@kinds
def test_energy_and_ratio(kind):
    m, y, cond = model(KINDS[kind]), images(3), conditions(kind, 3)
    other = images(3, seed=6)
    energy = m.energy(y, cond=cond)
    assert energy.shape == (3,)
    some = m.energy(y[[2]], cond=None if cond is None else cond[[2]])
    torch.testing.assert_close(some, energy[[2]])
    ratio = m.log_ratio(y, other, cond=cond)
    torch.testing.assert_close(ratio, m.energy(other, cond=cond) - energy)
    # What the network gives counts 1 / T times, the density of the start once.
    with torch.no_grad():
        m.network.out.bias.add_(TINY.temperature)
    torch.testing.assert_close(m.energy(y, cond=cond), energy + 1)
    m.network = Squares(0.0, 1)
    reference = y.square().flatten(1).sum(1) / (2 * TINY.start_std**2)
    torch.testing.assert_close(m.energy(y, cond=cond), reference)
    with pytest.raises(NotImplementedError, match="it has energy"):
        m.log_prob(y, cond=cond)
    with pytest.raises(ValueError, match="y_b must have shape"):
        m.log_ratio(y, other[:2], cond=cond)


@pytest.mark.parametrize("config", [TINY, POINT])
def test_the_energy_has_a_gradient_everywhere(config):
    m = model(config)
    y = normal((5, *config.event_shape), seed=1, step=0, stream=6)
    for scale in (0.0, 1.0, 100.0):
        _, force = with_gradient(lambda y: m.energy(y), scale * y)
        assert force.isfinite().all() and (force.flatten(1).abs().amax(1) > 1e-4).all()
    assert all(p.grad is None for p in m.parameters())


# Loss ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_gradient_of_contrastive_divergence(weight):
    """Of f = k |y|^2 / 2 and the start's density: what a chain comes to is linear in its noise."""
    k, a, t = 0.7, 0.1, 0.05
    config = dataclasses.replace(
        TINY, temperature=t, step_size=a, square_weight=weight, chain_steps=4, bound=100.0
    )
    m, y, index = model(config), images(3), torch.tensor([3, 0, 5])
    m.network = Squares(k, 1)
    total = k + t / config.start_std**2
    losses = m.loss(y, seed=2, index=index)
    draws: dict[str, Any] = {"seed": 2, "index": index}
    real = y + config.data_noise * normal(tuple(y.shape), step=0, stream=3, **draws)
    drawn = config.start_std * normal(tuple(y.shape), step=0, stream=STREAM_INITIAL, **draws)
    for step in range(4):
        z = normal(tuple(y.shape), step=step, stream=STREAM_SAMPLER, **draws)
        drawn = (1 - a * total) * drawn + math.sqrt(2 * a * t) * z
    # dE / dk is half the sum of squares.
    there, here = (x.square().flatten(1).sum(1) / 2 for x in (drawn, real))
    torch.testing.assert_close(losses["real"], total * here)
    torch.testing.assert_close(losses["drawn"], total * there)
    expected = here - there + 2 * weight * total * (here.square() + there.square())
    for row in range(3):
        (found,) = torch.autograd.grad(losses["total"][row], m.network.k, retain_graph=True)
        torch.testing.assert_close(found, expected[row])


@kinds
def test_loss_of_a_row_does_not_depend_on_its_batch(kind):
    m, y, cond = model(KINDS[kind]), images(4), conditions(kind, 4)
    together = m.loss(y, cond=cond, seed=3)
    assert all(part.shape == (4,) for part in together.values())
    assert int(m.chains.count) == 0
    rows = torch.tensor([2, 0])
    some = m.loss(y[rows], cond=None if cond is None else cond[rows], seed=3, index=rows)
    torch.testing.assert_close(some["total"], together["total"][rows])
    assert not torch.equal(m.loss(y, cond=cond, seed=4)["total"], together["total"])


@kinds
def test_chains_go_on_in_training(kind):
    config = dataclasses.replace(KINDS[kind], chains=4, renewal=0.0)
    m, y, cond = model(config).train(), images(4), conditions(kind, 4)
    m.loss(y, cond=cond, seed=3)
    came_to = m.chains.y.clone()
    swapped = None if cond is None else cond.flip(0)
    index = torch.arange(4) + 2**32
    m.loss(y, cond=swapped, seed=3, index=index)
    # With the conditions of then, whatever the batch has now.
    planes = m.planes(cond, 4)
    expected = langevin(
        lambda y: m._network_energy(y, planes), came_to, steps=config.chain_steps,
        step_size=config.step_size, temperature=config.temperature, seed=3, index=index,
    )  # fmt: skip
    torch.testing.assert_close(m.chains.y, expected)
    assert not any("chains" in name for name in m.state_dict())


# Chains -------------------------------------------------------------------------------------------
def numbers(first: int, count: int) -> Tensor:
    return torch.arange(float(first), first + count).view(-1, 1, 1, 1)


def chains(size: int, renewal: float) -> Chains:
    config = EnergyConfig(
        event_shape=(1, 1, 1), patch=1, cond_kind="class", num_classes=10**6, chains=size,
        renewal=renewal,
    )  # fmt: skip
    return Chains(config)


def exchange(kept: Chains, first: int, count: int, seed: int = 0) -> Tensor:
    """What is taken where these numbers stand for new chains; it is put back as it is."""
    index = torch.arange(first, first + count)
    start = numbers(first, count)
    places, y, cond = kept.take(start, index, seed=seed, index=index)
    assert_equal(y.flatten().long(), cond)
    kept.put(places, y, cond)
    return y.flatten().long()


def test_chains_come_in_turn():
    kept = chains(5, 0.0)
    found = torch.cat([exchange(kept, first, 3) for first in range(0, 30, 3)])
    assert_equal(found, torch.arange(30) % 5)


def test_the_share_that_begins_anew():
    kept = chains(10, 0.2)
    found = torch.cat([exchange(kept, first, 8) for first in range(0, 1200, 8)])
    new = (found == torch.arange(1200))[10:].double().mean().item()
    assert abs(new - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 1190)
    one_by_one = chains(10, 0.2)
    assert_equal(torch.cat([exchange(one_by_one, i, 1) for i in range(60)]), found[:60])
    other = chains(10, 0.2)
    assert not torch.equal(torch.cat([exchange(other, i, 8, 1) for i in range(0, 80, 8)]),
                           found[:80])  # fmt: skip


def test_more_rows_than_chains():
    with pytest.raises(ValueError, match="chains must be at least the batch of 6, got 5"):
        exchange(chains(5, 0.0), 0, 6)


# Samples ------------------------------------------------------------------------------------------
@kinds
def test_a_sample_depends_on_seed_and_index_only(kind):
    m, cond = model(KINDS[kind]), conditions(kind, 4)
    options: dict[str, Any] = {"steps": 3, "seed": 7}
    if cond is None:
        together = m.sample(4, **options)
        some = m.sample(2, index=torch.tensor([2, 0]) * 2**32, **options)
        more = m.sample(7, **options)[:4]
        again = m.sample(4, **options)
        other = m.sample(4, **{**options, "seed": 8})
    else:
        together = m.sample(cond=cond, **options)
        some = m.sample(cond=cond[[2, 0]], index=torch.tensor([2, 0]), **options)
        several = m.sample(3, cond=cond, **options)
        assert several.shape == (3, 4, *TINY.event_shape)
        assert not torch.allclose(several[1], several[0])
        more = several[0]
        again = m.sample(cond=cond, **options)
        other = m.sample(cond=cond, **{**options, "seed": 8})
        assert m.sample(cond=cond[:0]).shape == (0, *TINY.event_shape)
    assert together.shape == (4, *TINY.event_shape)
    torch.testing.assert_close(some, together[[2, 0]])
    torch.testing.assert_close(more, together)
    assert_equal(again, together)
    assert not torch.allclose(other, together)
    with cgkernels.reference():
        n = 4 if cond is None else None
        torch.testing.assert_close(m.sample(n, cond=cond, **options), together)


def test_where_chains_begin():
    m, cond = model(KINDS["image"]), conditions("image", 2)
    z = normal((2, *TINY.event_shape), seed=3, step=0, stream=STREAM_INITIAL)
    assert_equal(m.sample(cond=cond, steps=0, seed=3), TINY.start_std * z)
    start = images(2)
    assert_equal(m.sample(2, cond=cond, steps=0, start=start), torch.stack([start, start]))
    assert not torch.equal(*m.sample(2, cond=cond, steps=2, start=start))
    with pytest.raises(ValueError, match="start must have shape"):
        m.sample(2, cond=cond, start=start[:1])


def test_options_of_samples():
    m = model(TINY)
    cold = m.sample(2, steps=2, temperature=0.0)
    planes = m.planes(None, 2)
    y = m.sample(2, steps=0)
    for _ in range(2):
        _, force = with_gradient(lambda y: m._network_energy(y, planes), y)
        y = (y - TINY.step_size * force).clamp(-TINY.bound, TINY.bound)
    torch.testing.assert_close(cold, y)
    warm = langevin(
        lambda y: m._network_energy(y, planes), m.sample(2, steps=0), steps=2, step_size=0.2,
        temperature=3 * TINY.temperature, bound=TINY.bound, seed=0, index=torch.arange(2) * 2**32,
    )  # fmt: skip
    torch.testing.assert_close(m.sample(2, steps=2, step_size=0.2, temperature=3.0), warm)
    far = m.sample(2, start=torch.full((2, *TINY.event_shape), 9.0), steps=1, temperature=0.0)
    assert (far == TINY.bound).all()


def test_sampling_leaves_no_gradients_and_needs_none():
    m, cond = model(KINDS["class"]), conditions("class", 2)
    expected = m.sample(cond=cond, steps=2)
    assert all(p.grad is None for p in m.parameters()) and not expected.requires_grad
    with torch.inference_mode():
        assert_equal(m.sample(cond=cond.clone(), steps=2), expected)


@kinds
def test_save_and_load(tmp_path, kind):
    m, cond = model(KINDS[kind]), conditions(kind, 2)
    save_model(tmp_path, m)
    loaded = load_model(tmp_path, expected_family="energy")
    n = 2 if cond is None else None
    assert_equal(loaded.sample(n, cond=cond, steps=2), m.sample(n, cond=cond, steps=2))


# Errors -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 4}, "patch must divide"),
        ({"width": 0}, "width must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"step_size": math.inf}, "step_size must be positive"),
        ({"data_noise": -0.1}, "data_noise must not be negative"),
        ({"chains": -1}, "chains must not be negative"),
        ({"renewal": 1.5}, r"renewal must be in \[0, 1\]"),
        ({"cond_kind": "class"}, "num_classes must be positive"),
    ],
)
def test_wrong_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_wrong_arguments():
    m, y, cond = model(KINDS["class"]), images(2), conditions("class", 2)
    with pytest.raises(ValueError, match="phase must be one of"):
        m.loss(y, cond=cond, phase="generator", seed=0)
    with pytest.raises(ValueError, match="y must have shape"):
        m.loss(y[:, :, :3], cond=cond, seed=0)
    with pytest.raises(ValueError, match=r"cond must be in \[0, 2\]"):
        m.loss(y, cond=cond + 2, seed=0)
    with pytest.raises(ValueError, match="cond must be given"):
        m.energy(y)
    with pytest.raises(TypeError, match="guidance is no option of sample"):
        m.sample(cond=cond, guidance=2.0)
    with pytest.raises(ValueError, match="step_size must not be negative"):
        m.sample(cond=cond, step_size=-1.0)
    with pytest.raises(ValueError, match="cond must be given"):
        m.sample(2)


# Training -----------------------------------------------------------------------------------------
def test_a_resumed_run_goes_on_with_the_same_bits(tmp_path):
    dataset = Dataset("random", images(6), conditions("image", 6), "image")

    def run(folder, steps, resume=False):
        config = TrainingConfig(steps=steps, batch_size=3, save_every=4, decay="constant")
        m = model(KINDS["image"])
        train(m, dataset, config, tmp_path / folder, resume=resume)
        return m

    whole = run("whole", 8)
    run("parts", 4)
    parts = run("parts", 8, resume=True)
    for name, tensor in whole.named_parameters():
        assert_equal(parts.get_parameter(name), tensor)
    for name, tensor in whole.chains.named_buffers():
        assert_equal(parts.chains.get_buffer(name), tensor)
    assert int(whole.chains.count) == 24


def test_learns_four_images(tmp_path):
    config = EnergyConfig(
        event_shape=(1, 4, 4), cond_kind="class", num_classes=4, depth=1, hidden=32,
        temperature=0.002, step_size=0.25, chain_steps=8, chains=32,
    )  # fmt: skip
    y, cond = torch.sign(normal((4, 1, 4, 4), seed=5, step=0, stream=6)), torch.arange(4)
    m = make_model(ConditionalEBM, config, seed=1)
    dataset = Dataset("four", y.repeat(4, 1, 1, 1), cond.repeat(4), "class", num_classes=4)
    training = TrainingConfig(
        steps=120, batch_size=16, learning_rate=8e-3, warmup=0, beta1=0.5, beta2=0.9, ema_decay=0.9
    )
    average = train(m, dataset, training, tmp_path / "run")
    samples = average.sample(8, cond=cond, seed=2, steps=60)
    right = (samples.sign() == y).float().mean()
    shuffled = (samples.sign() == y.roll(1, 0)).float().mean()
    assert right > 0.85 > 0.7 > shuffled
    assert (average.log_ratio(y, y.roll(1, 0), cond=cond) > 0).all()


# GPU ----------------------------------------------------------------------------------------------
@pytest.mark.cuda
@kinds
def test_graph_equals_eager_bitwise(kind):
    m, cond = model(KINDS[kind]).cuda(), conditions(kind, 4)
    cond = None if cond is None else cond.cuda()
    n = 4 if cond is None else 2
    for seed in (0, 1):
        options = {"cond": cond, "seed": seed, "steps": 5}
        assert_equal(m.sample(n, graph=True, **options), m.sample(n, graph=False, **options))


@pytest.mark.cuda
def test_the_loop_waits_for_nothing():
    m = model(TINY).cuda()
    planes = m.planes(None, 3)
    options: dict[str, Any] = {"steps": 4, "step_size": 0.1, "temperature": 0.1}
    start = torch.zeros(3, *TINY.event_shape, device="cuda")
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    index = torch.arange(3, device="cuda")

    def energy(y: Tensor) -> Tensor:
        torch.cuda.set_sync_debug_mode("error")  # from the first step on; before it tables are made
        return m._network_energy(y, planes)

    try:
        langevin(energy, start, seed=seed, index=index, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_gpu_gives_the_image_of_the_cpu():
    m, cond = model(KINDS["image"]), conditions("image", 3)
    on_cpu = m.sample(2, cond=cond, steps=10)
    on_gpu = m.cuda().sample(2, cond=cond.cuda(), steps=10)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-3, rtol=1e-3)
