"""Regression: densities by hand, closed-form fits, samples, and what a mean cannot say."""

import dataclasses
import io
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch import distributions as dist

import cgkernels
from cgkernels.random import normal, uniform
from cgm.checkpoints import load_model, save_model
from cgm.data import PINK, TEAL, Dataset, load_task
from cgm.data.quantization import from_bins, to_bins, to_palette
from cgm.families.quantized_classifier import (
    QuantizedClassifier,
    QuantizedClassifierConfig,
    palette_of,
)
from cgm.families.regression import (
    GaussianConfig,
    GaussianRegression,
    LeastSquares,
    LeastSquaresConfig,
    MixtureConfig,
    MixtureDensity,
    Regression,
)
from cgm.model import make_model
from cgm.training import TrainingConfig, train
from tests.support import Peer, assert_equal

pytestmark = pytest.mark.filterwarnings("ignore:LeastSquares predicts one y:UserWarning")

SHAPE = (2, 4, 6)
PALETTE = ((0.0, 0.0), (0.5, -0.5), (-1.0, 0.25))
FAMILIES = {
    "least squares": (LeastSquares, LeastSquaresConfig, {}),
    "normal": (LeastSquares, LeastSquaresConfig, {"sigma": 0.3}),
    "Laplace": (LeastSquares, LeastSquaresConfig, {"sigma": 0.3, "error": "l1"}),
    "Gaussian": (GaussianRegression, GaussianConfig, {}),
    "mixture": (MixtureDensity, MixtureConfig, {"components": 3}),
    "bins": (QuantizedClassifier, QuantizedClassifierConfig, {"levels": 5}),
    "palette": (QuantizedClassifier, QuantizedClassifierConfig, {"palette": PALETTE}),
}
CONDITIONS = {
    "none": {},
    "class": {"cond_kind": "class", "num_classes": 3},
    "image": {"cond_kind": "image", "cond_shape": (1, 4, 6)},
}
DENSITIES = [name for name in FAMILIES if name != "least squares"]
families = pytest.mark.parametrize("family", FAMILIES)
densities = pytest.mark.parametrize("family", DENSITIES)
kinds = pytest.mark.parametrize("kind", CONDITIONS)


def new(family: str, kind: str = "none", event_shape=SHAPE, **changes) -> Regression:
    model_class, config_class, options = FAMILIES[family]
    sizes = {"width": 8, "depth": 2}
    options = {"event_shape": event_shape, **sizes, **CONDITIONS[kind], **options, **changes}
    return make_model(model_class, config_class(**options), seed=1).eval()


def small(*args, **kwargs) -> Regression:
    """With weights large enough that everything matters to the result."""
    model = new(*args, **kwargs)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.dim() > 1:
                parameter += 0.3 * normal((1, *parameter.shape), seed=i, step=0, stream=6)[0]
    return model


def conditions(kind: str, rows: int) -> Tensor | None:
    if kind == "none":
        return None
    return torch.arange(rows) % 3 if kind == "class" else images(rows, (1, 4, 6), seed=7)


def images(rows: int, shape=SHAPE, seed: int = 0) -> Tensor:
    return 2 * uniform((rows, *shape), seed=seed, step=0, stream=6) - 1


def set_table(model: Regression, *parameters: Tensor) -> Regression:
    """An unconditional model with these parameters, (outputs, H, W) or broadcast to it, each."""
    with torch.no_grad():
        for i, values in enumerate(parameters):
            model.table[0, i] = values
    return model


# Protocol -----------------------------------------------------------------------------------------
@families
@kinds
def test_shapes(family, kind):
    model, y, cond = small(family, kind), images(4), conditions(kind, 4)
    values = model.loss(y, cond=cond, seed=0)
    assert all(value.shape == (4,) and value.isfinite().all() for value in values.values())
    assert model.predict(cond=cond).shape == (4 if cond is not None else 1, *SHAPE)
    shape = (3, *SHAPE) if cond is None else (3, 4, *SHAPE)
    assert model.sample(3, cond=cond).shape == shape
    if cond is not None:
        assert model.sample(cond=cond).shape == (4, *SHAPE)
        assert model.sample(2, cond=cond[:0]).shape == (2, 0, *SHAPE)
        assert not torch.allclose(model.predict(cond=cond)[0], model.predict(cond=cond)[1])
    assert model.loss(y[:0], cond=cond if cond is None else cond[:0], seed=0)["total"].shape == (0,)


@densities
@kinds
def test_the_loss_is_the_log_prob_of_each_dimension(family, kind):
    model, y, cond = small(family, kind), images(4), conditions(kind, 4)
    log_prob = model.log_prob(y, cond=cond)
    values = model.loss(y, cond=cond, seed=0)
    if isinstance(model, LeastSquares):  # up to the scale and a constant
        error = (model.predict(cond=cond) - y).flatten(1)
        torch.testing.assert_close(values["squared"], error.square().mean(1))
        torch.testing.assert_close(values["absolute"], error.abs().mean(1))
        chosen = "squared" if family == "normal" else "absolute"
        assert_equal(values["total"], values[chosen])
        order = values["total"].argsort()
        assert_equal(log_prob.argsort(descending=True), order)
        return
    torch.testing.assert_close(values["total"], -log_prob / 48)
    if "bits" in values:
        torch.testing.assert_close(values["bits"], -log_prob / (48 * math.log(2)))
    else:
        error = (model.predict(cond=cond) - y).flatten(1).square().mean(1)
        torch.testing.assert_close(values["squared"], error)


@families
@kinds
def test_a_sample_depends_on_seed_and_index_alone(family, kind):
    model, cond = small(family, kind), conditions(kind, 4)
    rows = torch.tensor([2, 0])
    if cond is None:
        together = model.sample(4, seed=7)
        assert_equal(model.sample(2, seed=7, index=rows * 2**32), together[rows])
        assert_equal(model.sample(9, seed=7)[:4], together)
        other = model.sample(4, seed=8)
    else:
        together = model.sample(cond=cond, seed=7)
        several = model.sample(3, cond=cond, seed=7)
        torch.testing.assert_close(several[0], together)
        alone = model.sample(cond=cond[rows], seed=7, index=rows + 2 * 2**32)
        torch.testing.assert_close(alone, several[2, rows])
        other = model.sample(cond=cond, seed=8)
    assert_equal(model.sample(4 if cond is None else None, cond=cond, seed=7), together)
    assert torch.equal(other, together) == (family == "least squares")


@families
def test_plain_pytorch_agrees(family):
    model, cond = small(family, "image"), conditions("image", 3)
    drawn = model.sample(2, cond=cond, seed=3)
    values = model.loss(images(3), cond=cond, seed=0)
    with cgkernels.reference():
        torch.testing.assert_close(model.sample(2, cond=cond, seed=3), drawn)
        torch.testing.assert_close(model.loss(images(3), cond=cond, seed=0), values)


@families
def test_saved_and_loaded_it_draws_the_same_bits(family, tmp_path):
    model = small(family, "class")
    save_model(tmp_path, model)
    loaded = load_model(tmp_path, expected_family=model.family)
    cond = torch.tensor([2, 0])
    assert loaded.config == model.config
    assert_equal(loaded.sample(3, cond=cond, seed=1), model.sample(3, cond=cond, seed=1))


@families
def test_a_point_of_the_plane(family):
    for kind in ("none", "class"):
        model, cond = small(family, kind, event_shape=(2, 1, 1)), conditions(kind, 3)
        assert model.sample(3, cond=cond)[0].shape == (2, 1, 1) if cond is None else (3, 2, 1, 1)
        assert model.loss(images(3, (2, 1, 1)), cond=cond, seed=0)["total"].shape == (3,)


def test_without_a_sigma_all_samples_are_one_and_it_says_so_once():
    model, cond = small("least squares", "class"), conditions("class", 2)
    with pytest.warns(UserWarning, match="all samples of it are equal") as told:
        drawn = model.sample(3, cond=cond)
    assert told[0].filename == __file__
    for one in drawn:
        assert_equal(one, model.predict(cond=cond))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.sample(cond=cond)
    with pytest.raises(NotImplementedError, match="log_prob only with a sigma; it has predict"):
        model.log_prob(images(2), cond=cond)


# Densities ----------------------------------------------------------------------------------------
def softplus(x: Tensor) -> Tensor:
    return x.exp().log1p()


def exact(model: Regression) -> dist.Distribution:
    """The distribution of each output of an unconditional model, by other formulas than its own."""
    table, config = model.table.detach()[0], model.config
    if isinstance(model, LeastSquares):
        if config.error == "l1":
            return dist.Laplace(table[0], config.sigma / math.sqrt(2))
        return dist.Normal(table[0], config.sigma)
    if isinstance(model, GaussianRegression):
        return dist.Normal(table[0], config.min_sigma + softplus(table[1]))
    last = table.movedim(0, -1)
    if isinstance(model, QuantizedClassifier):
        return dist.Categorical(logits=last)
    logits, mean, width = last.chunk(3, -1)
    parts = dist.Normal(mean, config.min_sigma + softplus(width))
    return dist.MixtureSameFamily(dist.Categorical(logits=logits), parts)


@densities
def test_log_prob_is_that_of_torch_distributions(family):
    model, y = small(family).double(), 1.5 * images(5).double()
    value = y
    if isinstance(model, QuantizedClassifier):
        value = model._classes(y)
    terms = exact(model).log_prob(value)
    torch.testing.assert_close(model.log_prob(y), terms.flatten(1).sum(1))


@pytest.mark.peers("scipy")
def test_the_mixture_is_that_of_scipy():
    scipy_stats, special = Peer("scipy.stats"), Peer("scipy.special")
    model, y = small("mixture").double(), 3 * images(5).double()
    logits, mean, width = model.table.detach()[0].chunk(3)
    sigma = model.config.min_sigma + special.softplus(width.numpy())
    terms = special.log_softmax(logits.numpy(), 0)[:, None] + scipy_stats.norm.logpdf(
        y[None].numpy(), mean.numpy()[:, None], sigma[:, None]
    )
    expected = special.logsumexp(terms, 0).sum((1, 2, 3))
    torch.testing.assert_close(model.log_prob(y), torch.from_numpy(expected))


def test_the_mixture_is_stable_far_from_all_components():
    model = small("mixture", event_shape=(1, 1, 1))
    set_table(model, *torch.tensor([0.0, -500, 300, -0.5, 0, 0.5, -80, 0, -80]))
    y = torch.tensor([-1e4, -0.5, 0.0, 0.5, 1e4]).view(5, 1, 1, 1)
    values = model.loss(y, cond=None, seed=0)["total"]
    assert values.isfinite().all()
    torch.testing.assert_close(values[3].item(), math.log(0.02) + 0.5 * math.log(2 * math.pi))
    values.sum().backward()
    assert model.table.grad.isfinite().all() and model.table.grad.any()


@pytest.mark.parametrize("family", ["normal", "Laplace", "Gaussian", "mixture"])
def test_densities_integrate_to_one(family):
    model = small(family, event_shape=(1, 1, 1)).double()
    y = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    mass = torch.trapezoid(model.log_prob(y.view(-1, 1, 1, 1)).exp(), y)
    assert abs(mass - 1) < 1e-6


def test_masses_sum_to_one():
    for family, values in (("bins", from_bins(torch.arange(5), 5)), ("palette", PALETTE)):
        model = small(family, event_shape=(2, 1, 1))
        pairs = torch.cartesian_prod(values, values) if family == "bins" else torch.tensor(values)
        mass = model.log_prob(pairs.view(-1, 2, 1, 1)).exp().sum()
        torch.testing.assert_close(mass, torch.tensor(1.0))


# Samples ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["normal", "Laplace", "Gaussian", "mixture"])
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_samples_follow_the_density(family, temperature):
    """Kolmogorov-Smirnov, for each output; a quarter of the temperature halves sigma."""
    n = 3000
    model = small(family, event_shape=(2, 2, 3)).double()
    drawn = model.sample(n, seed=5, temperature=temperature).sort(0).values
    if temperature != 1:
        model = _sharpened(model, temperature)
    cdf = exact(model).cdf(drawn)
    steps = torch.arange(n + 1).view(-1, 1, 1, 1) / n
    distance = torch.maximum((steps[1:] - cdf).amax(0), (cdf - steps[:-1]).amax(0))
    assert distance.max() < 2.1 / math.sqrt(n)  # exceeded by one output in 3,000
    # Outputs are independent: so are their ranks.
    ranks = exact(model).cdf(model.sample(n, seed=6)).flatten(1) if temperature == 1 else None
    if ranks is not None:
        correlation = torch.corrcoef(ranks.T) - torch.eye(12)
        assert correlation.abs().max() < 4.5 / math.sqrt(n)


def _sharpened(model: Regression, temperature: float) -> Regression:
    """The model whose densities are those of this one to the power 1 / temperature."""
    if isinstance(model, LeastSquares):
        power = 1 if model.config.error == "l1" else 0.5
        config = dataclasses.replace(model.config, sigma=model.config.sigma * temperature**power)
        made = LeastSquares(config).double()
        return set_table(made, *model.table.detach()[0])
    config = dataclasses.replace(model.config, min_sigma=1e-9)
    made = type(model)(config).double()
    table = model.table.detach()[0].clone()
    count = len(table) // 3 if isinstance(model, MixtureDensity) else 1
    sigma = model.config.min_sigma + softplus(table[-count:])
    table[-count:] = (sigma * math.sqrt(temperature) - 1e-9).expm1().log()
    if count > 1:
        table[:count] /= temperature
    return set_table(made, *table)


@pytest.mark.parametrize("family", ["bins", "palette"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_classes_are_drawn_with_their_probabilities(family, temperature):
    n = 4000
    model = small(family)
    with torch.no_grad():
        model.table[0, 1] = -torch.inf
    classes = model._classes(model.sample(n, seed=5, temperature=temperature))
    share = (model.table.detach()[0] / temperature).softmax(0)
    counts = F.one_hot(classes, len(share)).sum(0).movedim(-1, 0)
    assert not counts[1].any()
    kept = [i for i in range(len(share)) if i != 1]
    square = ((counts - n * share).square() / (n * share))[kept].sum(0)
    freedom = len(kept) - 1
    assert square.max() < freedom + 5 * math.sqrt(2 * freedom) + 12
    assert abs(square.mean() - freedom) < 4 * math.sqrt(2 * freedom / square.numel())
    same = F.one_hot(classes.flatten(1), len(share)).double()
    joint = torch.einsum("nak,nbk->ab", same, same) / n
    alone = share.flatten(1).double()
    expected = alone.T @ alone
    expected.fill_diagonal_(1)
    assert (joint - expected).abs().max() < 5 / math.sqrt(4 * n)


@pytest.mark.parametrize("temperature", [0.0, 1e-30])
@densities
def test_the_coldest_sample_is_the_likeliest(family, temperature):
    model = small(family)
    drawn = model.sample(2, temperature=temperature)
    if isinstance(model, MixtureDensity):
        logits, mean, _ = model.table.detach()[0].chunk(3)
        expected = mean.gather(0, logits.argmax(0, keepdim=True))[0]
    elif isinstance(model, QuantizedClassifier):
        expected = model.predict(temperature=temperature)[0]
        assert_equal(model._classes(expected[None])[0], model.table[0].argmax(0))
    else:
        expected = model.predict()[0]
    for one in drawn:
        torch.testing.assert_close(one, expected)


def test_the_annealed_mean_by_hand():
    model = small("bins", event_shape=(1, 1, 1), levels=2)
    low, high = from_bins(torch.arange(2), 2).tolist()
    set_table(model, torch.tensor(0.0), torch.tensor(math.log(3)))
    assert model.predict().item() == pytest.approx((low + 3 * high) / 4)
    assert model.predict(temperature=0.5).item() == pytest.approx((low + 9 * high) / 10)
    assert model.predict(temperature=0.0).item() == pytest.approx(high)
    model = small("palette", event_shape=(2, 1, 1))
    set_table(model, *torch.tensor([1.0, 2, 4]).log())
    expected = (torch.tensor([1.0, 4, 16]) / 21) @ torch.tensor(PALETTE)
    torch.testing.assert_close(model.predict(temperature=0.5).flatten(), expected)


def test_the_mean_of_a_mixture_by_hand():
    model = small("mixture", event_shape=(1, 1, 1), components=2)
    set_table(model, *torch.tensor([0.0, math.log(3), -1.0, 1.0, 0.0, 0.0]))
    assert model.predict().item() == pytest.approx(0.5)


# Closed forms -------------------------------------------------------------------------------------
def test_the_fit_of_a_gaussian_is_mean_and_variance():
    y = 0.3 * normal((50, *SHAPE), seed=3, step=0, stream=6) + 5
    y[:, 0, 0, 0] = 0.25  # always the same
    model = small("Gaussian").double()
    model.fit(y)
    variance = y.double().var(0, correction=0)
    variance[0, 0, 0] = (model.config.min_sigma + 1e-6) ** 2
    torch.testing.assert_close(model.predict()[0], y.double().mean(0))
    torch.testing.assert_close(model.variance()[0], variance)
    # Nothing is likelier.
    model.loss(y.double(), seed=0)["total"].mean().backward()
    slope = model.table.grad.clone()
    assert 0 < slope[0, 1, 0, 0, 0] < 1e-4  # held back by min_sigma
    slope[0, :, 0, 0, 0] = 0
    assert slope.abs().max() < 1e-12


@pytest.mark.parametrize("family", ["bins", "palette"])
def test_the_fit_of_a_classifier_is_the_share_of_each_class(family):
    y = images(60).double()
    model = small(family).double()
    model.fit(y)
    classes = model._classes(y)
    share = F.one_hot(classes, len(model.values)).double().mean(0).movedim(-1, 0)
    torch.testing.assert_close(model.table.detach()[0].exp(), share)
    model.loss(y, seed=0)["total"].mean().backward()
    assert model.table.grad.abs().max() < 1e-12
    model.fit(y[:1], smoothing=0.5)
    k = len(model.values)
    once = F.one_hot(classes[0], k).movedim(-1, 0)
    expected = (once.double() + 0.5) / (1 + 0.5 * k)
    torch.testing.assert_close(model.table.detach()[0].exp(), expected)
    model.fit(y[:1])
    assert model.log_prob(y[:1]).item() == 0 and model.log_prob(y[1:2]).item() == -math.inf
    assert_equal(model._classes(model.sample(5)), model._classes(y[:1]).expand(5, -1, -1, -1))


@pytest.mark.parametrize("family", ["Gaussian", "bins", "palette"])
def test_a_fit_takes_batches_of_any_size(family):
    y = images(2500)
    tables = []
    for data in (y, Dataset("some", y), iter(y.split(7)), (y[2000:], y[:0], y[:2000])):
        model = small(family).double()
        model.fit(data)
        tables.append(model.table.detach())
    for table in tables[1:]:
        torch.testing.assert_close(table, tables[0])


@pytest.mark.parametrize("family", ["Gaussian", "bins"])
def test_training_tends_to_the_fit(family, tmp_path):
    y = (images(64, (1, 1, 2)) + torch.tensor([-0.1, 0.2])).clamp(-1, 1)
    fitted, trained = (small(family, event_shape=(1, 1, 2)) for _ in range(2))
    fitted.fit(y)
    training = TrainingConfig(
        steps=200, batch_size=64, learning_rate=0.2, warmup=0, ema_decay=0.0, threads=1
    )
    console = Console(file=io.StringIO())
    trained = train(trained, Dataset("points", y), training, tmp_path / "run", console=console)
    best, found = (m.loss(y, seed=0)["total"].mean().item() for m in (fitted, trained))
    assert best - 1e-6 < found < best + 1e-3
    torch.testing.assert_close(trained.predict(), fitted.predict(), atol=0.01, rtol=0)


# Two dimensions -----------------------------------------------------------------------------------
ANGLES = torch.arange(8) * (math.pi / 4)
CENTERS = 0.7 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


def eight_gaussians(n: int, seed: int) -> Tensor:
    which = (8 * uniform((n,), seed=seed, step=0, stream=6)).long()
    return (CENTERS[which] + 0.05 * normal((n, 2), seed=seed, step=1, stream=6)).view(n, 2, 1, 1)


def energy_p_value(a: Tensor, b: Tensor) -> float:
    """Share of random divisions of the points into two halves that differ as much."""
    both = torch.cat([a, b]).flatten(1).double()
    distances = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist")
    halves = torch.ones(200, len(both), dtype=torch.float64)
    halves[:, len(a) :] = -1
    order = uniform((199, len(both)), seed=0, step=0, stream=6).argsort(1)
    halves[1:] = halves[1:].gather(1, order)
    energy = -((halves @ distances) * halves).sum(1)
    return (energy >= energy[0]).double().mean().item()


def test_a_palette_draws_eight_gaussians_and_values_one_by_one_cannot():
    seen, unseen = eight_gaussians(20_000, 1), eight_gaussians(600, 2)
    joint = small("palette", event_shape=(2, 1, 1), palette=palette_of(seen, 0.03))
    each = small("bins", event_shape=(2, 1, 1), levels=128)
    near = {}
    for name, model in (("truth", None), ("joint", joint), ("each", each)):
        drawn = eight_gaussians(600, 4)
        if model is not None:
            model.fit(seen)
            drawn = model.sample(600, seed=3)
        assert (energy_p_value(drawn, unseen) > 0.05) == (name != "each")
        for channel in range(2):  # one alone is right all the same
            assert energy_p_value(drawn[:, channel], unseen[:, channel]) > 0.05
        to_centers = torch.cdist(drawn.flatten(1), CENTERS)
        near[name] = (to_centers.amin(1) < 0.15).double().mean().item()
    assert near["joint"] > near["truth"] - 0.02
    assert near["each"] < 0.5


def test_the_colors_of_a_palette():
    found = palette_of(Dataset("some", load_task("colorize").y[::100].contiguous()), 0.1)
    torch.testing.assert_close(torch.tensor(found), torch.tensor([TEAL, (0.0, 0.0), PINK]))
    y, palette = images(3), torch.tensor(PALETTE)
    distances = (y[:, None] - palette[:, :, None, None]).square().sum(2)
    assert_equal(to_palette(y, palette), distances.argmin(1))
    exactly = palette.T[None, :, None]  # (1, 2, 1, K)
    assert to_palette(exactly, palette).tolist() == [[[0, 1, 2]]]
    with pytest.raises(ValueError, match="spacing must be positive"):
        palette_of(y, 0.0)
    with pytest.raises(ValueError, match="data must be finite and spacing not too small"):
        palette_of(y, 1e-12)
    with pytest.raises(ValueError, match=r"data must be \(N, 2, H, W\)"):
        palette_of(images(2, (3, 4, 4)), 0.1)


def test_bins_of_any_shape():
    values = from_bins(torch.arange(16), 16)
    assert_equal(to_bins(values.view(4, 2, 2), 16), torch.arange(16).view(4, 2, 2))
    assert_equal(to_bins(torch.tensor([-3.0, 3.0]), 7), torch.tensor([0, 6]))


# Training -----------------------------------------------------------------------------------------
def trained(model: Regression, y: Tensor, cond: Tensor, steps: int, batch: int) -> Regression:
    """By Adam on some rows after others, at a rate that falls to 0."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step in range(steps):
        rows = torch.arange(step * batch, (step + 1) * batch) % len(y)
        loss = model.loss(y[rows], cond=cond[rows], seed=0)["total"].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return model


@densities
def test_learns_four_images_by_their_classes(family):
    values = torch.tensor(PALETTE)[(3 * uniform((4, 4, 6), seed=2, step=0, stream=6)).long()]
    y, cond = values.movedim(3, 1).contiguous(), torch.arange(4)
    changes = {"sigma": 0.1} if family in ("normal", "Laplace") else {}
    model = new(family, "class", num_classes=4, depth=1, **changes)
    model = trained(model, y, cond, 150, 4)
    drawn = model.sample(5, cond=cond, seed=1)
    right = ((drawn - y).abs() < 0.25).double().mean()
    shuffled = ((drawn - y.roll(1, 0)).abs() < 0.25).double().mean()
    assert right > 0.9 > 0.6 > shuffled
    swapped = model.log_prob(y, cond=cond.roll(1))
    assert (model.log_prob(y, cond=cond) > swapped + 5).all()


def shirts(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """y in one of two colors, +-0.8 on a square and 0 around it; the luminance; the square."""
    u = uniform((rows, 3), seed=seed, step=0, stream=6)
    corner = (3 * u[:, :2]).long()
    places = torch.arange(8)
    down, across = ((places >= c[:, None]) & (places < c[:, None] + 6) for c in corner.T)
    mask = down[:, None, :, None] & across[:, None, None, :]
    color = torch.where(u[:, 2] < 0.5, -0.8, 0.8).view(-1, 1, 1, 1)
    return mask * color, mask * 1.4 - 0.7, mask


@pytest.mark.parametrize("family", ["least squares", "Gaussian", "mixture", "bins"])
def test_of_two_answers_it_gives_a_mean_or_speckles(family):
    """Torralba, Isola, Freeman, Foundations of Computer Vision, section 34.2.1."""
    y, cond, _ = shirts(6400, 1)
    model = new(family, "image", (1, 8, 8), cond_shape=(1, 8, 8), depth=1)
    model = trained(model, y, cond, 100, 64)
    _, cond, mask = shirts(100, 2)

    def over_shirt(values: Tensor) -> float:
        return ((values * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))).abs().mean().item()

    gray = model.predict(cond=cond) / 0.8
    assert over_shirt(gray.abs()) < 0.05
    assert gray[~mask].abs().mean() < 0.05
    if family == "least squares":
        return
    drawn = model.sample(cond=cond, seed=2) / 0.8
    assert over_shirt(drawn.sign()) < 0.3
    if family != "Gaussian":  # the width of which is right, its two ends are not
        assert abs(over_shirt(drawn.abs()) - 1) < 0.1
    assert drawn[~mask].abs().mean() < 0.15


# Errors -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (LeastSquaresConfig, {"width": 3}, "width must be at least 4"),
        (LeastSquaresConfig, {"depth": 0}, "depth must be positive"),
        (LeastSquaresConfig, {"error": "l3"}, "error must be one of l2, l1"),
        (LeastSquaresConfig, {"sigma": -1.0}, "sigma must not be negative"),
        (LeastSquaresConfig, {"cond_kind": "class"}, "num_classes must be positive"),
        (GaussianConfig, {"min_sigma": 0.0}, "min_sigma must be positive"),
        (MixtureConfig, {"components": 0}, "components must be positive"),
        (MixtureConfig, {"min_sigma": math.nan}, "min_sigma must be positive"),
        (QuantizedClassifierConfig, {"levels": 257}, "levels must be from 2 to 256"),
        (
            QuantizedClassifierConfig,
            {"palette": PALETTE},
            r"palette must be \(\) but for two channels",
        ),
        (
            QuantizedClassifierConfig,
            {"event_shape": SHAPE, "palette": (*PALETTE, (0.0, math.inf))},
            "palette must be finite",
        ),
        (
            QuantizedClassifierConfig,
            {"event_shape": SHAPE, "palette": ((0.0, 0.0), (0.0, 0.0))},
            "palette must have two colors or more, all different",
        ),
    ],
)
def test_wrong_configs(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@families
def test_wrong_arguments(family):
    model, y, cond = small(family, "class"), images(2), torch.tensor([0, 2])
    with pytest.raises(ValueError, match="phase must be one of"):
        model.loss(y, cond=cond, phase="generator", seed=0)
    with pytest.raises(ValueError, match="y must have shape"):
        model.loss(y[:, :, :3], cond=cond, seed=0)
    with pytest.raises(TypeError, match="y must be floating"):
        model.loss(y.long(), cond=cond, seed=0)
    y[1, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="y must be finite"):
        model.loss(y, cond=cond, seed=0)
    with pytest.raises(ValueError, match="cond must be given"):
        model.loss(images(2), seed=0)
    with pytest.raises(ValueError, match=r"cond must be in \[0, 2\]"):
        model.loss(images(2), cond=cond + 1, seed=0)
    with pytest.raises(ValueError, match="cond must be given"):
        model.sample(2)
    with pytest.raises(ValueError, match="cond must be given"):
        model.predict()
    with pytest.raises(TypeError, match="steps is no option of sample; it has temperature"):
        model.sample(cond=cond, steps=3)
    with pytest.raises(ValueError, match="temperature must not be negative"):
        model.sample(cond=cond, temperature=-1.0)
    with pytest.raises(TypeError, match="cond must be None"):
        small(family).sample(2, cond=cond)


@pytest.mark.parametrize("family", ["Gaussian", "bins"])
def test_wrong_fits(family):
    with pytest.raises(ValueError, match="cond_kind must be none for a fit, got class"):
        small(family, "class").fit(images(2))
    with pytest.raises(ValueError, match="data must have a row"):
        small(family).fit([])
    with pytest.raises(ValueError, match="y must be finite"):
        small(family).fit(images(2) * math.nan)
    with pytest.raises(ValueError, match="y must have shape"):
        small(family).fit([images(2, (1, 4, 6))])
    if family == "bins":
        with pytest.raises(ValueError, match="smoothing must not be negative"):
            small(family).fit(images(2), smoothing=-1.0)
        with pytest.raises(ValueError, match="temperature must not be negative"):
            small(family).predict(temperature=math.inf)


# GPU ----------------------------------------------------------------------------------------------
@pytest.mark.cuda
@families
@kinds
def test_gpu_gives_the_image_of_the_cpu(family, kind):
    model, cond = small(family, kind), conditions(kind, 3)
    on_cpu = model.sample(2, cond=cond, seed=3)
    on_gpu = model.cuda().sample(2, cond=None if cond is None else cond.cuda(), seed=3)
    near = (on_gpu.cpu() - on_cpu).abs() < 1e-3
    # Round-off may tip a draw from one class, or component, to another.
    assert near.double().mean() > (0.99 if family in ("mixture", "bins", "palette") else 0.9999)


def test_bits_are_those_of_images_of_256_values():
    """The probabilities of all values of a pixel sum to 1, by a density as by bins."""
    values = (torch.arange(256) / 127.5 - 1).view(256, 1, 1, 1)
    gaussian = GaussianRegression(GaussianConfig((1, 1, 1)))
    gaussian.fit(0.2 * torch.randn(1000, 1, 1, 1))
    classifier = QuantizedClassifier(QuantizedClassifierConfig((1, 1, 1), levels=256))
    for model in (gaussian, classifier):
        total = (-model.bits_per_dimension(values) * math.log(2)).exp().sum().item()
        assert total == pytest.approx(1, abs=1e-3)
