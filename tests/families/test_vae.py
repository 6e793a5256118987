"""The VAE: bounds against exact densities, likelihoods, samples, training; the autoencoder."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

import cgkernels
from cgm.checkpoints import load_model, save_model
from cgm.data import Dataset
from cgm.families.vae import Autoencoder, AutoencoderConfig, ConditionalVAE, VAEConfig
from cgm.model import make_model
from cgm.training import TrainingConfig, train
from tests.support import assert_equal

SIZES = {"event_shape": (2, 6, 7), "latents": 3, "width": 4, "depth": 2}
KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "class": {"cond_kind": "class", "num_classes": 3},
    "image": {"cond_kind": "image", "cond_shape": (1, 6, 7)},
}
LIKELIHOODS = ("gaussian", "bernoulli", "discretized_logistic")
kinds = pytest.mark.parametrize("kind", KINDS)


def vae(kind="image", **changes) -> ConditionalVAE:
    config = VAEConfig(**{**SIZES, **KINDS[kind], **changes})
    return make_model(ConditionalVAE, config, seed=1).eval()


def autoencoder(kind="image", **changes) -> Autoencoder:
    config = AutoencoderConfig(**{**SIZES, **KINDS[kind], **changes})
    return make_model(Autoencoder, config, seed=1).eval()


def images(rows: int, channels: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, channels, 6, 7, generator=generator) * 2 - 1


def conditions(kind: str, rows: int) -> Tensor | None:
    return {
        "none": None,
        "class": torch.arange(rows) % 3,
        "image": images(rows, 1, seed=1),
    }[kind]


# The bound ----------------------------------------------------------------------------------------
SIGMA = 0.7


class Linear(nn.Module):
    """mean = matrix y + offset of the first channels of an image, and a log variance."""

    def __init__(self, matrix: Tensor, offset: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.matrix, self.offset, self.variance = matrix, offset, variance

    def forward(self, image: Tensor) -> Tensor:
        y = image[:, : self.matrix.shape[1], 0, 0]
        mean = y @ self.matrix.T + self.offset
        return torch.cat([mean, self.variance.log().expand_as(mean)], 1)


class LinearDecoder(nn.Module):
    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, planes: Tensor, z: Tensor) -> Tensor:
        return (z @ self.matrix.T)[:, :, None, None]


def linear_gaussian(learned: bool) -> tuple[ConditionalVAE, MultivariateNormal]:
    """y = W z + 0.7 noise with its exact posterior as encoder, and p(y).

    The columns of W are orthogonal, so that z is independent given y, as q takes it to be.
    """
    generator = torch.Generator().manual_seed(3)
    q, _ = torch.linalg.qr(torch.randn(4, 2, generator=generator, dtype=torch.float64))
    w = q * torch.tensor([1.5, 0.4], dtype=torch.float64)
    kind = KINDS["class"] if learned else {}
    sizes = {"event_shape": (4, 1, 1), "latents": 2, "width": 4, "depth": 1, "scale": SIGMA}
    prior: Any = {"prior": "learned"} if learned else {}
    model = make_model(ConditionalVAE, VAEConfig(**sizes, **kind, **prior), seed=0).double()
    middle, spread = torch.zeros(2).double(), torch.ones(2).double()
    if learned:
        middle, spread = torch.tensor([0.5, -2.0]).double(), torch.tensor([0.3, 2.0]).double()
        model.prior = Linear(torch.zeros(2, 4).double(), middle, spread)
    variance = 1 / (1 / spread + w.square().sum(0) / SIGMA**2)
    model.encoder = Linear(variance[:, None] * w.T / SIGMA**2, variance * middle / spread, variance)
    model.decoder = LinearDecoder(w)
    covariance = w @ spread.diag() @ w.T + SIGMA**2 * torch.eye(4)
    return model.eval(), MultivariateNormal(w @ middle, covariance)


def data_of(truth: MultivariateNormal, rows: int) -> tuple[Tensor, Tensor]:
    noise = torch.randn(rows, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    y = truth.mean + noise @ truth.scale_tril.T
    return y[:, :, None, None], truth.log_prob(y)


@pytest.mark.parametrize("learned", [False, True])
def test_the_bound_is_tight_at_the_posterior(learned):
    model, truth = linear_gaussian(learned)
    y, exact = data_of(truth, 5)
    cond = torch.zeros(5, dtype=torch.int64) if learned else None
    # Every weight is p(y), whatever z is.
    torch.testing.assert_close(model.elbo(y, cond=cond, draws=3), exact)
    # By one draw, with the exact divergence, it is so in expectation.
    many = 20_000
    y, cond = y[:1].expand(many, -1, -1, -1), None if cond is None else cond[:1].expand(many)
    bound = model.elbo(y, cond=cond, index=torch.arange(many))
    assert abs(bound.mean() - exact[0]) < 5 * bound.std() / math.sqrt(many)


@pytest.mark.parametrize("learned", [False, True])
def test_the_bound_is_below_the_density_and_rises_with_the_draws(learned):
    model, truth = linear_gaussian(learned)
    model.encoder.offset = model.encoder.offset + 0.4
    model.encoder.variance = model.encoder.variance * 1.5
    y, exact = data_of(truth, 4000)
    cond = torch.zeros(len(y), dtype=torch.int64) if learned else None
    gaps = [(model.elbo(y, cond=cond, draws=n) - exact).mean().item() for n in (1, 3, 20, 200)]
    assert gaps == sorted(gaps) and gaps[0] < -0.3 and -0.01 < gaps[-1] < 0.002


def test_the_loss_is_the_bound():
    model, cond = vae(), conditions("image", 3)
    y = images(3)
    values = model.loss(y, cond=cond, seed=4)
    assert values.keys() == {"total", "reconstruction", "kl"}
    assert all(v.shape == (3,) for v in values.values())
    torch.testing.assert_close(84 * values["total"], values["reconstruction"] + values["kl"])
    torch.testing.assert_close(-84 * values["total"], model.elbo(y, cond=cond, seed=4))
    heavy = vae(beta=3.0, free_bits=0.8)
    weighted = heavy.loss(y, cond=cond, seed=4)
    assert (weighted["kl"] >= 3 * 0.8).all() and (weighted["kl"] > values["kl"]).all()
    torch.testing.assert_close(weighted["reconstruction"], values["reconstruction"])
    torch.testing.assert_close(
        84 * weighted["total"], weighted["reconstruction"] + 3 * weighted["kl"]
    )
    assert_equal(heavy.elbo(y, cond=cond, seed=4), model.elbo(y, cond=cond, seed=4))


@pytest.mark.parametrize("draws", [1, 3])
def test_a_bound_depends_on_seed_and_index_alone(draws):
    model, y, cond = vae(prior="learned"), images(4), conditions("image", 4)
    assert cond is not None
    index = torch.tensor([5, 2**33, 0, 1])
    whole = model.elbo(y, cond=cond, seed=3, index=index, draws=draws)
    for rows in ([1], [3, 0]):
        some = model.elbo(y[rows], cond=cond[rows], seed=3, index=index[rows], draws=draws)
        torch.testing.assert_close(some, whole[rows])
    assert not torch.allclose(model.elbo(y, cond=cond, seed=4, index=index, draws=draws), whole)
    loss = model.loss(y, cond=cond, seed=3, index=index)["total"]
    alone = model.loss(y[2:3], cond=cond[2:3], seed=3, index=index[2:3])["total"]
    torch.testing.assert_close(alone, loss[2:3])


# Likelihoods --------------------------------------------------------------------------------------
def likelihood(name: str, **changes) -> Any:
    return vae("none", likelihood=name, **changes).double().likelihood


def test_the_gaussian_is_that_of_torch_distributions():
    out, y = images(2).double(), images(2, seed=1).double()
    expected = Normal(out, 0.3).log_prob(y).sum((1, 2, 3))
    torch.testing.assert_close(likelihood("gaussian", scale=0.3).log_prob(out, y), expected)


@pytest.mark.parametrize("values", [2, 5, 256])
@pytest.mark.parametrize("scale", [1e-3, 0.1, 20.0])
def test_the_discretized_logistic_is_a_distribution(values, scale):
    """However narrow, and wherever it is; and nowhere does it lose its gradient."""
    judge = likelihood("discretized_logistic", levels=values, scale=scale)
    y = torch.linspace(-1, 1, values, dtype=torch.float64).view(-1, 1, 1, 1)
    for middle in (-3.0, -1.0, 0.123, 0.9, 40.0):
        out = torch.full_like(y, middle).requires_grad_()
        log_probs = judge.log_prob(out, y)
        torch.testing.assert_close(log_probs.exp().sum(), torch.ones(()).double())
        (gradient,) = torch.autograd.grad(log_probs.sum(), out)
        assert log_probs.isfinite().all() and gradient.isfinite().all()
    inner = y[1:-1]  # by the definition, where that is accurate
    if len(inner):
        gap, out = 1 / (values - 1), torch.full_like(inner, 0.123)
        share = ((inner + gap - out) / scale).sigmoid() - ((inner - gap - out) / scale).sigmoid()
        fine = (share > 1e-6)[:, 0, 0, 0]
        torch.testing.assert_close(judge.log_prob(out, inner)[fine], share.log()[fine, 0, 0, 0])


@pytest.mark.parametrize("scale", [1e-4, 0.01, 1.0, 1e4])
def test_the_discretized_logistic_keeps_its_digits_in_float32(scale):
    """Narrow, wide, and far away: values and slopes are those of float64."""
    y = torch.linspace(-1, 1, 256).view(-1, 1, 1, 1)
    for out in (y + 1e-3, y.flip(0), torch.full_like(y, 0.3)):
        assert_digits_are_kept(likelihood("discretized_logistic", scale=scale), out, y)


def test_bernoulli_keeps_its_digits_in_float32():
    """A value that is nearly certain still has a slope, sigmoid(out) - 1 has none."""
    out = torch.tensor([-80.0, -20.0, -1.0, 0.0, 1.0, 20.0, 80.0]).view(-1, 1, 1, 1)
    for value in (-1.0, 1.0):
        assert_digits_are_kept(likelihood("bernoulli"), out, torch.full_like(out, value))


def assert_digits_are_kept(judge, out, y):
    found, exact = [], []
    for results, dtype in ((found, torch.float32), (exact, torch.float64)):
        given = out.to(dtype).requires_grad_()
        logs = judge.to(dtype).log_prob(given, y.to(dtype))
        results += [logs.double(), *(g.double() for g in torch.autograd.grad(logs.sum(), given))]
    torch.testing.assert_close(found, exact, rtol=2e-6, atol=1e-37)


def test_bernoulli_is_a_distribution():
    judge, out = likelihood("bernoulli"), torch.tensor([-2.0, 0.3, 30.0]).view(3, 1, 1, 1).double()
    both = [judge.log_prob(out, torch.full_like(out, y)).exp() for y in (-1.0, 1.0)]
    torch.testing.assert_close(sum(both), torch.ones(3).double())
    torch.testing.assert_close(both[1] - both[0], judge.mean(out)[:, 0, 0, 0])


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_draws_are_of_the_likelihood(name):
    """Their frequencies, or moments, are those that log_prob says."""
    judge, many = likelihood(name, levels=5, scale=0.3), 50_000
    out = torch.full((many, 1, 1, 1), 0.4, dtype=torch.float64)
    y = judge.draw(out, torch.tensor(7), torch.arange(many))[:, 0, 0, 0]
    if name == "gaussian":
        assert abs(y.mean() - 0.4) < 5 * 0.3 / math.sqrt(many)
        assert abs(y.std() / 0.3 - 1) < 5 / math.sqrt(2 * many)
        return
    values = torch.tensor([-1.0, 1.0] if name == "bernoulli" else [-1.0, -0.5, 0.0, 0.5, 1.0])
    shares = torch.stack([(y == v).double().mean() for v in values])
    assert shares.sum() == 1
    expected = judge.log_prob(out[: len(values)], values.double().view(-1, 1, 1, 1)).exp()
    assert ((shares - expected).abs() < 5 * (expected / many).sqrt()).all()


@pytest.mark.parametrize("name", ["gaussian", "discretized_logistic"])
def test_the_scale_is_learned_if_asked_for(name):
    y = images(2)
    fixed, learned = (vae("none", likelihood=name, learn_scale=b) for b in (False, True))
    assert len(list(learned.parameters())) == len(list(fixed.parameters())) + 1
    total = learned.loss(y, seed=0)["total"]
    torch.testing.assert_close(total, fixed.loss(y, seed=0)["total"])
    (gradient,) = torch.autograd.grad(total.sum(), learned.likelihood.log_scale)
    assert gradient < 0  # 0.1 is too narrow for what an untrained decoder says


# Samples ------------------------------------------------------------------------------------------
@kinds
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_sample_depends_on_seed_and_index_alone(kind, name):
    prior: Any = "standard" if kind == "none" else "learned"
    model, cond = vae(kind, likelihood=name, prior=prior), conditions(kind, 3)
    for noise in (False, True):
        if cond is None:
            drawn = model.sample(4, seed=4, noise=noise)
            assert drawn.shape == (4, 2, 6, 7)
            torch.testing.assert_close(model.sample(2, seed=4, noise=noise), drawn[:2])
            alone = model.sample(1, seed=4, index=torch.tensor([3 * 2**32]), noise=noise)
            torch.testing.assert_close(alone, drawn[3:])
            continue
        drawn = model.sample(2, cond=cond, seed=4, noise=noise)
        assert drawn.shape == (2, 3, 2, 6, 7) and not torch.equal(drawn[0], drawn[1])
        torch.testing.assert_close(model.sample(cond=cond, seed=4, noise=noise), drawn[0])
        index = torch.tensor([2 + 2**32])
        alone = model.sample(cond=cond[2:], seed=4, index=index, noise=noise)
        torch.testing.assert_close(alone, drawn[1, 2:])
        backwards = model.sample(
            cond=cond.flip(0), seed=4, index=torch.arange(3).flip(0), noise=noise
        )
        torch.testing.assert_close(backwards.flip(0), drawn[0])
        assert not torch.equal(model.sample(cond=cond, seed=5, noise=noise), drawn[0])
        assert model.sample(cond=cond[:0]).shape == (0, 2, 6, 7)


def test_noise_and_truncation():
    model, cond = vae(prior="learned"), conditions("image", 2)
    still = model.sample(2, cond=cond, truncation=0.0)
    torch.testing.assert_close(still[0], still[1])
    assert model.prior is not None
    middle = model.prior(cond).chunk(2, 1)[0]
    torch.testing.assert_close(still[0], model.decode(middle, cond=cond))
    noisy = model.sample(cond=cond, noise=True) - model.sample(cond=cond)
    assert 0.08 < noisy.std() < 0.12  # of the likelihood
    values = vae(likelihood="discretized_logistic", levels=3).sample(cond=cond, noise=True)
    assert set(values.unique().tolist()) <= {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("kind", ["none", "class"])
def test_points_of_the_plane(kind):
    sizes = {"event_shape": (2, 1, 1), "depth": 1, "width": 8}
    model, cond = vae(kind, **sizes, learn_scale=True), conditions(kind, 4)
    y = torch.randn(4, 2, 1, 1)
    assert model.loss(y, cond=cond, seed=0)["total"].isfinite().all()
    assert model.elbo(y, cond=cond, draws=2).shape == (4,)
    drawn = model.sample(3, cond=cond, noise=True)
    assert drawn.shape == ((3, 2, 1, 1) if cond is None else (3, 4, 2, 1, 1))


def test_a_pooled_code_does_not_know_where():
    """What moves in condition and image alike keeps its z, and z moves with it when decoded."""
    sizes: Any = {"event_shape": (1, 16, 16), "cond_shape": (1, 16, 16), "depth": 1}
    blob = images(2, 1)[:, :, :3, :3]

    def placed(what: Tensor, row: int, column: int) -> Tensor:
        image = torch.full((1, 1, 16, 16), -1.0)
        image[0, 0, row : row + 3, column : column + 3] = what
        return image

    model = vae(**sizes, pooled=True)
    cond, y = placed(blob[0], 5, 5), placed(blob[1], 6, 7)
    moved = placed(blob[0], 8, 6), placed(blob[1], 9, 8)
    codes = model.encode(y, cond=cond)
    torch.testing.assert_close(model.encode(moved[1], cond=moved[0]), codes)
    other = model.encode(placed(blob[1], 6, 5), cond=cond)
    assert not torch.allclose(other[0], codes[0], rtol=1e-3)
    flat = vae(**sizes)
    apart = [flat.encode(a, cond=b)[0] for a, b in ((y, cond), (moved[1], moved[0]))]
    assert not torch.allclose(*apart, rtol=1e-3)


# Errors -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": 0}, "latents must be positive, got 0"),
        ({"width": 3}, "width must be at least 4, got 3"),
        ({"prior": "flat"}, "prior must be one of standard, learned, got 'flat'"),
        ({"prior": "learned"}, "prior must be standard without a condition"),
        ({"likelihood": "normal"}, "likelihood must be one of gaussian, bernoulli, discretized"),
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
        ({"likelihood": "bernoulli", "learn_scale": True}, "learn_scale must be False for bern"),
        ({"levels": 1}, "levels must be at least 2, got 1"),
        ({"beta": -1.0}, "beta must not be negative, got -1.0"),
        ({"free_bits": math.nan}, "free_bits must not be negative, got nan"),
        ({"cond_kind": "class"}, "num_classes must be positive"),
    ],
)
def test_wrong_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig(**changes)


@pytest.mark.parametrize("make", [vae, autoencoder])
def test_wrong_arguments(make):
    model, y = make("class"), images(2)
    cond = torch.tensor([0, 2])
    bad = y.clone()
    bad[1, 0, 0, 0] = math.nan
    for wrong, error, message in (
        ({"y": y[:, :1]}, ValueError, "y must have shape"),
        ({"y": y.double().long()}, TypeError, "y must be floating"),
        ({"y": bad}, ValueError, "y must be finite"),
        ({"cond": torch.tensor([0, 3])}, ValueError, r"cond must be in \[0, 2\], got 0 to 3"),
        ({"cond": None}, ValueError, "cond must be given"),
        ({"cond": y}, ValueError, "cond must have shape"),
        ({"phase": "generator"}, ValueError, "phase must be one of"),
    ):
        with pytest.raises(error, match=message):
            model.loss(**{"y": y, "cond": cond, "seed": 0, **wrong})
    with pytest.raises(ValueError, match="z must have shape"):
        model.decode(torch.zeros(2, 4), cond=cond)


def test_what_there_is_not():
    model, y, cond = vae(), images(2), conditions("image", 2)
    with pytest.raises(NotImplementedError, match="it has elbo"):
        model.log_prob(y, cond=cond)
    with pytest.raises(ValueError, match="draws must be an int of at least 1, got 0"):
        model.elbo(y, cond=cond, draws=0)
    with pytest.raises(TypeError, match="steps is no option of sample; it has truncation, noise"):
        model.sample(cond=cond, steps=3)
    with pytest.raises(ValueError, match="truncation must not be negative, got -1"):
        model.sample(cond=cond, truncation=-1.0)
    plain = autoencoder()
    for asked in (plain.sample, lambda cond: plain.log_prob(y, cond=cond)):
        with pytest.raises(NotImplementedError, match="it has reconstruct"):
            asked(cond=cond)


# Training -----------------------------------------------------------------------------------------
def fit(model, dataset: Dataset, folder, steps=100, rate=1e-2) -> Any:
    config = TrainingConfig(
        steps=steps, batch_size=len(dataset), learning_rate=rate, warmup=10, log_every=50,
        ema_decay=0.0,
    )  # fmt: skip
    return train(model, dataset, config, folder)


def test_it_overfits_four_images(tmp_path):
    """Of two classes: each is drawn as one of its own."""
    y, cond = images(4), torch.tensor([0, 0, 1, 1])
    data = Dataset("four", y, cond, "class", 3)
    model = fit(vae("class", width=8, scale=0.05).train(), data, tmp_path / "run")
    drawn = model.sample(20, cond=torch.tensor([0, 1]), seed=3)
    distances = (drawn[:, :, None] - y).square().mean((3, 4, 5)).sqrt()  # (20, 2, 4)
    nearest, which = distances.min(2)
    assert nearest.median() < 0.25  # two images are 0.8 apart
    assert {n.item() for n in which[:, 0].unique()} == {0, 1}
    assert {n.item() for n in which[:, 1].unique()} == {2, 3}
    mean, _ = model.encode(y, cond=cond)
    assert (model.decode(mean, cond=cond) - y).square().mean().sqrt() < 0.05
    right, wrong = (model.elbo(y, cond=c, draws=5).mean() for c in (cond, 1 - cond))
    assert right > wrong + 10
    save_model(tmp_path / "saved", model)
    loaded = load_model(tmp_path / "saved", expected_family="vae")
    assert_equal(loaded.sample(3, cond=cond, seed=1), model.sample(3, cond=cond, seed=1))


def test_the_autoencoder_overfits_four_images(tmp_path):
    y, cond = images(4), conditions("image", 4)
    model = autoencoder(width=8).train()
    model = fit(model, Dataset("four", y, cond, "image"), tmp_path / "run")
    assert (model.reconstruct(y, cond=cond) - y).square().mean().sqrt() < 0.1
    save_model(tmp_path / "saved", model)
    loaded = load_model(tmp_path / "saved", expected_family="autoencoder")
    assert_equal(loaded.encode(y, cond=cond), model.encode(y, cond=cond))


@pytest.mark.parametrize("prior", ["standard", "learned"])
def test_fused_and_plain_agree(prior):
    """Some steps of training, the bound and samples, by the ops and in plain PyTorch."""
    y, cond = images(4), conditions("image", 4)
    found = []
    for plain in (False, True):
        model = vae(prior=prior, free_bits=0.1).train()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        curve = []
        with cgkernels.reference() if plain else torch.enable_grad():
            for step in range(6):
                total = model.loss(y, cond=cond, seed=step)["total"].mean()
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
                curve.append(total.detach())
            bound = model.elbo(y, cond=cond, draws=2)
            found.append((torch.stack(curve), bound, model.sample(cond=cond, noise=True)))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_autocast_learns_alike():
    y, cond = images(4), conditions("image", 4)
    totals = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values = vae(prior="learned").loss(y, cond=cond, seed=0)
        assert all(v.dtype == torch.float32 for v in values.values())
        totals.append(values["total"].detach())
    torch.testing.assert_close(*totals, rtol=0.03, atol=0.03)


@pytest.mark.cuda
@kinds
def test_samples_on_a_gpu(kind):
    """As on the CPU, and without waiting for the device."""
    prior: Any = "standard" if kind == "none" else "learned"
    model, cond = vae(kind, prior=prior), conditions(kind, 3)
    expected = model.sample(3, cond=cond, noise=True)
    model, cond = model.cuda(), None if cond is None else cond.cuda()
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    model.sample(3, cond=cond, seed=seed, noise=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = model.sample(3, cond=cond, seed=seed, noise=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(drawn.cpu(), expected, rtol=1e-3, atol=1e-3)
