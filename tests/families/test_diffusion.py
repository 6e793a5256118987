"""Conditional diffusion: loss, sampling, and that a sample depends on (seed, index) only."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import cgkernels
from cgkernels.random import normal
from cgkernels.samplers import SAMPLERS
from cgm.families.diffusion import (
    ConditionalDiffusion,
    DiffusionConfig,
    SamplingConfig,
    _log_discretized_normal,
)
from cgm.model import make_model

TINY = DiffusionConfig(event_shape=(1, 4, 6), width=8, blocks=1, heads=2, timesteps=100)
KINDS = {
    "none": TINY,
    "class": dataclasses.replace(TINY, cond_kind="class", num_classes=3),
    "image": dataclasses.replace(TINY, cond_kind="image", cond_shape=(2, 4, 6)),
    "tokens": dataclasses.replace(TINY, cond_kind="tokens", num_classes=5, cond_shape=(3,)),
}


def model(config: DiffusionConfig, seed: int = 0) -> ConditionalDiffusion:
    made = make_model(ConditionalDiffusion, config, seed=seed)
    # The zero start of residual branches and of the output would hide every dependence.
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            if not parameter.any():
                parameter.copy_(0.1 * normal((1, *parameter.shape), seed=i, step=0, stream=6)[0])
    return made.eval()


def conditions(kind: str, rows: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "image":
        return normal((rows, 2, 4, 6), seed=9, step=0, stream=6)
    if kind == "class":
        return torch.arange(rows) % 3
    return torch.tensor([[0, 1, 5], [2, 3, 4], [4, 4, 0], [1, 0, 2]])[:rows]


def images(rows: int, config: DiffusionConfig = TINY) -> Tensor:
    return normal((rows, *config.event_shape), seed=5, step=0, stream=6).clamp(-1, 1)


# Loss ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_a_row_does_not_depend_on_its_batch(kind):
    m, y, cond = model(KINDS[kind]), images(4), conditions(kind, 4)
    together = m.loss(y, cond=cond, seed=3)["total"]
    assert together.shape == (4,) and (together > 0).all()
    rows = torch.tensor([2, 0])
    some = m.loss(y[rows], cond=None if cond is None else cond[rows], seed=3, index=rows)["total"]
    torch.testing.assert_close(some, together[rows])
    assert not torch.equal(m.loss(y, cond=cond, seed=4)["total"], together)


def test_loss_is_that_of_the_formula():
    m, y = model(KINDS["none"]), images(3)
    index = torch.arange(3)
    draws = {"seed": 8, "index": index}
    t = (cgkernels.random.uniform((3,), step=1, stream=3, **draws) * 100).long()
    alpha, sigma = m.noise_table[t].T[..., None, None, None]
    z = normal((3, *TINY.event_shape), step=0, stream=3, **draws)
    film = m.unet.time_film(t)
    prediction = m.unet(alpha * y + sigma * z, film)
    expected = (prediction - (alpha * z - sigma * y)).square().mean((1, 2, 3)) * m.loss_weights[t]
    torch.testing.assert_close(m.loss(y, seed=8)["total"], expected)


def test_learns_four_images():
    config = dataclasses.replace(KINDS["class"], num_classes=4, cond_dropout=0.0, width=16)
    m = make_model(ConditionalDiffusion, config, seed=1)
    y, cond = torch.sign(images(4)), torch.arange(4)
    optimizer = torch.optim.Adam(m.parameters(), lr=5e-3)
    for step in range(120):
        index = torch.arange(32) + 32 * step
        loss = m.loss(y.repeat(8, 1, 1, 1), cond=cond.repeat(8), seed=1, index=index)
        optimizer.zero_grad()
        loss["total"].mean().backward()
        optimizer.step()
    samples = m.sample(8, cond=cond, seed=2, steps=20)
    right = (samples.sign() == y).float().mean()
    shuffled = (samples.sign() == y.roll(1, 0)).float().mean()
    assert right > 0.9 > 0.7 > shuffled


def test_condition_is_dropped_at_the_stated_rate():
    config = dataclasses.replace(KINDS["class"], cond_dropout=0.3)
    m, seen = model(config), []
    m.unet.classes.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    m.loss(images(4).repeat(500, 1, 1, 1), cond=torch.zeros(2000, dtype=torch.int64), seed=0)
    dropped = (seen[0] == config.num_classes).float().mean()
    assert abs(dropped - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 2000)


def test_learned_variance_is_learned_from_the_bound_alone():
    config = dataclasses.replace(TINY, learned_variance=True, prediction="epsilon")
    m, y = model(config), images(8)
    parts = m.loss(y, seed=0)
    expected = parts["denoising"] + config.bound_weight * config.timesteps * parts["bound"]
    torch.testing.assert_close(parts["total"], expected)
    out = m.unet.conv_out  # rows 0..3 (one patch of 2 x 2) predict, rows 4..7 are the variance
    parts["bound"].sum().backward()
    assert not out.weight.grad[:4].any() and out.weight.grad[4:].any()


def test_bound_of_the_right_prediction_is_the_entropy_gap():
    """At t > 0 a perfect mean and the smaller variance give KL 0; the larger one gives more."""
    config = dataclasses.replace(TINY, learned_variance=True, prediction="x0")
    m, y = model(config), images(2)
    t = torch.tensor([40, 70])
    x_t, _ = cgkernels.add_noise(y, table=m.noise_table, t=t, seed=0)
    small, large = -torch.ones_like(y), torch.ones_like(y)
    torch.testing.assert_close(m._bound(y, x_t, y, small, t), torch.zeros(2), atol=1e-6, rtol=0)
    assert (m._bound(y, x_t, y, large, t) > 1e-5).all()
    assert (m._bound(y, x_t, -y, small, t) > m._bound(y, x_t, y, small, t)).all()


def test_the_bound_keeps_its_digits_where_both_variances_are_nearly_one():
    """At the last of 1,000 timesteps they differ by 8e-7 of themselves."""
    config = dataclasses.replace(
        TINY, learned_variance=True, prediction="x0", schedule="linear", timesteps=1000
    )
    m, y = model(config), images(3)
    levels, t = m.schedule.alphas_cumprod, torch.tensor([999, 900, 500])
    gap = np.log((1 - levels[t]) / (1 - levels[t - 1]))
    exact = (gap**2 / 2 - gap**3 / 6 + gap**4 / 24) / 2 / math.log(2)
    found = m._bound(y, torch.zeros_like(y), y, torch.ones_like(y), t)
    torch.testing.assert_close(found.double(), torch.from_numpy(exact), rtol=1e-6, atol=0)


def exact_bin(y: float, mean: float, log_variance: float) -> tuple[float, float, float]:
    """log P of the bin, and its derivatives in mean and log_variance, by tails in float64."""
    sd = math.exp(log_variance / 2)
    a, b = (y - 1 / 255 - mean) / sd, (y + 1 / 255 - mean) / sd
    a, b = -math.inf if y == -1 else a, math.inf if y == 1 else b
    side = -1 if a + b > 0 else 1  # the bin, or its mirror image, is in the lower tail
    low, high = (a, b) if side == 1 else (-b, -a)
    mass = (math.erfc(-high / math.sqrt(2)) - math.erfc(-low / math.sqrt(2))) / 2
    density = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) / mass for x in (low, high)]
    moment = [0.0 if math.isinf(x) else x * d for x, d in zip((low, high), density, strict=True)]
    return math.log(mass), side * (density[0] - density[1]) / sd, (moment[0] - moment[1]) / 2


@pytest.mark.parametrize("sd", [0.0005, 0.0124, 0.05, 0.5, 3.8, 4.1, 300.0])
def test_the_likelihood_of_a_bin_has_the_right_tails(sd):
    """To 30 standard deviations, in narrow and in wide bins, and in the unbounded outermost."""
    log_variance = float(torch.tensor(2 * math.log(sd)))
    cases = [
        (y, float(torch.tensor(y - offset)))
        for y in (-1.0, -0.5, 0.25, 1.0)
        for offset in (0, 0.1 * sd, 1.0 * sd, 5.6 * sd, 13 * sd, 30 * sd, -2 * sd, -29 * sd)
    ]
    exact = torch.tensor([exact_bin(*case, log_variance) for case in cases], dtype=torch.float64)
    y, mean = torch.tensor(cases).T
    mean, variance = mean.requires_grad_(), torch.full((len(y),), log_variance, requires_grad=True)
    logs = _log_discretized_normal(y, mean, variance)
    slopes = torch.autograd.grad(logs.sum(), (mean, variance))
    for found, expected in zip((logs, *slopes), exact.T, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-6)


def test_the_likelihood_of_a_bin_5_sigma_away_goes_on():
    """It was cut off at 1e-12, where it had no gradient."""
    mean = torch.tensor(-0.28, requires_grad=True)
    log_variance = torch.tensor(2 * math.log(0.05))
    log_prob = _log_discretized_normal(torch.zeros(()), mean, log_variance)
    log_prob.backward()
    assert log_prob.item() == pytest.approx(-18.4204, abs=1e-4)
    assert mean.grad.item() == pytest.approx(5.6 / 0.05, rel=0.01)


def test_the_likelihood_of_a_bin_has_a_gradient_however_narrow_or_wide_the_density_is():
    log_variance = torch.tensor([-60.0, 100.0, 600.0], requires_grad=True)
    mean = torch.full((3,), 0.3, requires_grad=True)
    logs = _log_discretized_normal(torch.zeros(3), mean, log_variance)
    slopes = torch.autograd.grad(logs.sum(), (mean, log_variance))
    assert all(slope.isfinite().all() for slope in slopes)
    # The density of the middle: -log_variance / 2 but for constants.
    torch.testing.assert_close(slopes[1][1:], torch.tensor([-0.5, -0.5]))


# Sampling -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_depends_on_seed_and_index_only(kind, sampler):
    m, cond = model(KINDS[kind]), conditions(kind, 4)
    options = {"sampler": sampler, "steps": 3, "seed": 7, "guidance": 1 if cond is None else 2.5}
    if cond is None:
        together = m.sample(4, **options)
        some = m.sample(2, index=torch.tensor([2, 0]) * 2**32, **options)
        more = m.sample(7, **options)[:4]
    else:
        together = m.sample(cond=cond, **options)
        some = m.sample(cond=cond[[2, 0]], index=torch.tensor([2, 0]), **options)
        more = m.sample(3, cond=cond, **options)[0]
    assert together.shape == (4, *TINY.event_shape)
    torch.testing.assert_close(some, together[[2, 0]])
    torch.testing.assert_close(more, together)
    assert torch.equal(m.sample(cond=cond, **options) if kind != "none" else m.sample(4, **options),
                       together)  # fmt: skip
    other = {**options, "seed": 8}
    assert not torch.allclose(m.sample(None if kind != "none" else 4, cond=cond, **other), together)


@pytest.mark.parametrize("kind", ["class", "image", "tokens"])
def test_draws(kind):
    m, cond = model(KINDS[kind]), conditions(kind, 2)
    out = m.sample(3, cond=cond, steps=2)
    assert out.shape == (3, 2, *TINY.event_shape)
    draw = m.sample(cond=cond, steps=2, index=torch.tensor([0, 1]) + 2 * 2**32)
    torch.testing.assert_close(out[2], draw)
    assert not torch.allclose(out[0], out[1])


@pytest.mark.parametrize("kind", ["class", "image", "tokens"])
def test_the_condition_and_guidance_have_an_effect(kind):
    m, cond = model(KINDS[kind]), conditions(kind, 3)
    plain = m.sample(cond=cond, steps=3)
    guided = m.sample(cond=cond, steps=3, guidance=3.0)
    swapped = m.sample(cond=cond.flip(0), steps=3)
    assert not torch.allclose(plain, guided) and not torch.allclose(plain[0], swapped[0])
    # Weight 0 on the condition is the model without one.
    without = m.sample(3, steps=3, index=torch.arange(3))
    torch.testing.assert_close(m.sample(cond=cond, steps=3, guidance=0.0), without)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_plain_pytorch_agrees(sampler):
    m, cond = model(KINDS["class"]), torch.tensor([0, 1, 2])
    options = {"cond": cond, "sampler": sampler, "steps": 4, "guidance": 2.0}
    ours = m.sample(**options)
    with cgkernels.reference():
        torch.testing.assert_close(m.sample(**options), ours)


def test_learned_variance_changes_the_noise_of_ddpm_only():
    config = dataclasses.replace(TINY, learned_variance=True)
    m = model(config)
    for sampler, same in (("ddpm", False), ("ddim", True)):
        before = m.sample(2, sampler=sampler, steps=4)
        out = m.unet.conv_out
        with torch.no_grad():
            saved = out.bias.clone()
            out.bias[4:] += 1  # the variance half of one patch
        after = m.sample(2, sampler=sampler, steps=4)
        with torch.no_grad():
            out.bias.copy_(saved)
        assert torch.allclose(before, after) == same


def test_exact_denoiser_of_gaussian_data_gives_its_moments():
    """The whole loop on pixels N(mu, s^2): samples have that mean and standard deviation."""
    config = DiffusionConfig(event_shape=(1, 2, 2), width=8, heads=2, blocks=1, patch=1)
    m = model(config)
    mu = torch.tensor([[0.5, -0.5], [0.0, 0.25]])
    s = torch.tensor([[0.3, 0.2], [0.5, 0.25]])
    timesteps = m.noise_table

    class Exact(torch.nn.Module):
        """v of the posterior mean; the FiLM vector carries the timestep."""

        def time_film(self, t):
            return t[:, None].float()

        def forward(self, x, film, context=None):
            alpha, sigma = timesteps[film[:, 0].long()].T[..., None, None, None]
            y = mu + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (x - alpha * mu)
            return (alpha * x - y) / sigma

    m.unet = Exact()
    for options in ({"sampler": "ddim"}, {"sampler": "ddim", "eta": 1.0}, {"sampler": "dpmpp_2m"}):
        y = m.sample(8_000, steps=200, clip=False, **options)
        assert (y.mean(0)[0] - mu).abs().max() < 4 * 0.5 / math.sqrt(8_000) + 2e-3, options
        assert ((y.std(0)[0] / s) - 1).abs().max() < 0.05, options


def test_no_draws_and_no_rows():
    m = model(KINDS["class"])
    assert m.sample(0, cond=torch.tensor([0, 1]), steps=2).shape == (0, 2, *TINY.event_shape)
    empty = torch.empty(0, dtype=torch.int64)
    assert m.sample(2, cond=empty, steps=2).shape == (2, 0, *TINY.event_shape)
    assert model(TINY).sample(0, steps=2).shape == (0, *TINY.event_shape)


def test_samples_keep_no_memory_of_each_other():
    m = model(KINDS["class"])
    first = m.sample(cond=torch.tensor([0]), steps=2)
    kept = first.clone()
    m.sample(cond=torch.tensor([1]), steps=2, seed=1)
    assert torch.equal(first, kept) and not first.requires_grad


# Errors -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kind, arguments, error, name",
    [
        ("class", {}, ValueError, "n must be given"),
        ("class", {"n": 2, "guidance": 2.0}, ValueError, "guidance"),
        ("class", {"n": -1, "cond": torch.tensor([0])}, ValueError, "n must"),
        ("class", {"n": 1.5, "cond": torch.tensor([0])}, ValueError, "n must"),
        ("class", {"cond": torch.tensor([3])}, ValueError, "cond"),
        ("class", {"cond": torch.tensor([-1])}, ValueError, "cond"),
        ("class", {"cond": torch.tensor([0.0])}, TypeError, "cond"),
        ("class", {"cond": torch.tensor([[0]])}, ValueError, "cond"),
        ("image", {"cond": torch.zeros(1, 1, 4, 6)}, ValueError, "cond"),
        ("image", {"cond": torch.zeros(1, 2, 4, 6, dtype=torch.int64)}, TypeError, "cond"),
        ("tokens", {"cond": torch.tensor([[0, 1]])}, ValueError, "cond"),
        ("tokens", {"cond": torch.tensor([[0, 1, 6]])}, ValueError, "cond"),
        ("none", {"n": 1, "cond": torch.tensor([0])}, TypeError, "cond"),
        ("none", {"n": 1, "index": torch.tensor([0, 1])}, ValueError, "index"),
        ("none", {"n": 1, "index": torch.tensor([0.0])}, TypeError, "index"),
        ("none", {"n": 1, "seed": 0.5}, TypeError, "seed"),
        ("none", {"n": 1, "steps": 0}, ValueError, "steps"),
        ("none", {"n": 1, "steps": 101}, ValueError, "steps"),
        ("none", {"n": 1, "sampler": "heun"}, ValueError, "sampler"),
        ("none", {"n": 1, "guidance": math.nan}, ValueError, "guidance"),
        ("none", {"n": 1, "temperature": 1.0}, TypeError, "temperature.*guidance"),
    ],
)
def test_wrong_arguments_of_sample(kind, arguments, error, name):
    with pytest.raises(error, match=name):
        model(KINDS[kind]).sample(**arguments)


def test_wrong_arguments_of_loss():
    m = model(KINDS["class"])
    with pytest.raises(ValueError, match="y must have shape"):
        m.loss(torch.zeros(2, 1, 4, 4), cond=torch.tensor([0, 1]), seed=0)
    with pytest.raises(ValueError, match="cond must have shape"):
        m.loss(images(2), cond=torch.tensor([0]), seed=0)
    with pytest.raises(ValueError, match="phase"):
        m.loss(images(1), cond=torch.tensor([0]), phase="generator", seed=0)
    certain = model(dataclasses.replace(KINDS["class"], cond_dropout=0.0))
    for call in (lambda: certain.loss(images(1), seed=0), lambda: certain.sample(1)):
        with pytest.raises(ValueError, match="cond must be given"):
            call()
    with pytest.raises(ValueError, match="guidance"):
        certain.sample(cond=torch.tensor([0]), guidance=2.0)


def test_no_exact_density():
    with pytest.raises(NotImplementedError, match="log_prob"):
        model(TINY).log_prob(images(1))


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"event_shape": (1, 5, 6)}, "patch"),
        ({"event_shape": (4, 6)}, "event_shape"),
        ({"cond_kind": "class"}, "num_classes"),
        ({"cond_kind": "image", "cond_shape": (1, 4, 4)}, "cond_shape"),
        ({"cond_kind": "tokens", "num_classes": 3}, "cond_shape"),
        ({"cond_dropout": 1.0}, "cond_dropout"),
        ({"patch": 0}, "patch"),
        ({"blocks": 0}, "blocks"),
        ({"width": 0}, "width"),
        ({"width_multipliers": ()}, "width_multipliers"),
        ({"width_multipliers": (1, 0)}, "width_multipliers"),
        ({"attention_depth": 3}, "attention_depth"),
        ({"heads": 3}, "heads"),
        ({"prediction": "epsilon", "zero_terminal_snr": True}, "prediction"),
        ({"schedule": "exp"}, "linear"),
        ({"prediction": "flow"}, "prediction"),
    ],
)
def test_wrong_configs(changes, name):
    with pytest.raises(ValueError, match=name):
        ConditionalDiffusion(dataclasses.replace(TINY, **changes))


# GPU ----------------------------------------------------------------------------------------------
@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_graph_equals_eager_bitwise(kind, sampler):
    m = model(KINDS[kind]).cuda()
    cond = conditions(kind, 4)
    options = {"cond": None if cond is None else cond.cuda(), "sampler": sampler, "steps": 5}
    n = 4 if cond is None else 2
    for seed in (0, 1):
        eager = m.sample(n, seed=seed, graph=False, **options)
        assert torch.equal(m.sample(n, seed=seed, graph=True, **options), eager)


@pytest.mark.cuda
@pytest.mark.parametrize("graph", [False, True])
def test_the_loop_waits_for_nothing(graph):
    """No synchronization in the loop; the set-up before it may copy from the host."""
    from cgm.families.diffusion import _Run
    from cgm.sampling.cuda_graph import capture

    m = model(KINDS["class"]).cuda()
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    options = SamplingConfig(sampler="ddpm", steps=5, guidance=2.0)
    with torch.no_grad():
        run = _Run(m, torch.arange(3).cuda(), torch.arange(3).cuda(), seed, options)
        run._start()
        step = capture(run._step, run.index.device) if graph else run._step
        step()
        run._start()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(options.steps):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(run.x, m.sample(cond=torch.arange(3).cuda(), sampler="ddpm", steps=5,
                                       guidance=2.0))  # fmt: skip


@pytest.mark.cuda
def test_gpu_gives_the_image_of_the_cpu():
    m, cond = model(KINDS["class"]), torch.arange(3)
    on_cpu = m.sample(2, cond=cond, sampler="ddpm", steps=10, guidance=2.0)
    on_gpu = m.cuda().sample(2, cond=cond.cuda(), sampler="ddpm", steps=10, guidance=2.0)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-3, rtol=1e-3)
