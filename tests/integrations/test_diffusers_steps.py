"""Every table against the scheduler of diffusers that it stands for, step by step, in float64.

diffusers makes its noise levels in float32, and most of its schedulers cast to float32 within a
step. Here they are given float64 levels, and a `torch` whose float32 is float64.
"""

from itertools import product

import numpy as np
import pytest
import torch

from cgkernels import guided_step, random
from cgkernels.samplers import (
    PREDICTIONS,
    SPACINGS,
    VARIANCES,
    Schedule,
    make_schedule,
    make_table,
)
from tests.support import Peer

pytestmark = pytest.mark.peers("diffusers")

diffusers = Peer("diffusers")

SEED = 11
SHAPE = (2, 3, 4, 4)
STEPS = (1, 2, 10, 15)  # DPM-Solver of diffusers tells fewer than 15 steps from more
NAMES = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
CLASSES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}


def predictions_of(*samplers, of=PREDICTIONS):
    """Samplers with the predictions that diffusers implements for them."""
    return pytest.mark.parametrize(
        ("sampler", "prediction"),
        [pair for pair in product(samplers, of) if pair != ("euler_ancestral", "x0")],
    )


class Float64Torch:
    """torch with another float32."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def scheduler_of(sampler, schedule, table, prediction, spacing, **config):
    """The scheduler of diffusers for a table, with our noise levels in float64."""
    scheduler = getattr(diffusers, CLASSES[sampler])(
        num_train_timesteps=schedule.num_timesteps,
        prediction_type=NAMES[prediction],
        timestep_spacing=spacing,
        **config,
    )
    scheduler.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod)
    one = torch.ones((), dtype=torch.float64)
    if sampler == "ddpm":
        scheduler.one = one
    if sampler == "ddim":
        first = scheduler.alphas_cumprod[0]
        scheduler.final_alpha_cumprod = one if scheduler.config.set_alpha_to_one else first
    scheduler.set_timesteps(len(table.table))
    np.testing.assert_allclose(scheduler.timesteps, table.timesteps, rtol=0, atol=1e-4)
    if hasattr(scheduler, "sigmas"):
        levels = schedule.alphas_cumprod
        ratio = np.interp(table.timesteps, np.arange(levels.size), np.sqrt((1 - levels) / levels))
        sigmas = torch.from_numpy(np.append(ratio, 0.0))
        np.testing.assert_allclose(scheduler.sigmas, sigmas, rtol=1e-6)
        scheduler.sigmas = sigmas
    return scheduler


def network(x, outputs):
    """Stands for a trained network: it is not linear, and of the size of its targets."""
    parts = [(1.7 * x + 0.3 * i).sin() * (0.9 + 0.3 * i) for i in range(outputs)]
    return torch.cat(parts, dim=1)


def assert_close(actual, expected, tolerance):
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


def compare(scheduler, table, monkeypatch, *, learned=False, **options):
    """Run both from the same noise, with the same noise in every step."""
    last = len(table.table) - 1
    # Euler's methods of diffusers subtract states of the size of sigma / alpha, here up to 2e4
    tolerance = 1e-10 if "Euler" in type(scheduler).__name__ else 1e-12

    def noise_of(i):
        z = random.normal(
            SHAPE, seed=SEED, step=i, stream=random.STREAM_SAMPLER, dtype=torch.float64
        )
        return z if i < last else 0 * z  # our last step adds none

    module = type(scheduler).__module__
    monkeypatch.setattr(f"{module}.torch", Float64Torch())
    z = random.normal(SHAPE, seed=SEED, step=0, stream=random.STREAM_INITIAL, dtype=torch.float64)
    x, theirs = table.initial_scale * z, scheduler.init_noise_sigma * z
    history = torch.zeros_like(x)
    for i, t in enumerate(scheduler.timesteps):
        # Euler's methods of diffusers keep x / alpha and scale it for the network
        scaled = scheduler.scale_model_input(theirs, t)
        assert_close(x, scaled, tolerance)
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *a, i=i, **k: noise_of(i))
        if "eta" in options:
            options["eta"] = options["eta"] if i < last else 0.0
        theirs, *their_x0 = scheduler.step(
            network(scaled, 1 + learned), t, theirs, return_dict=False, **options
        )
        output, *log_variance = network(x, 1 + learned).chunk(1 + learned, dim=1)
        x, x0 = guided_step(
            x,
            output,
            table=table.table,
            step=i,
            log_variance=log_variance[0] if learned else None,
            h1=history if table.history else None,
            seed=SEED if table.stochastic else None,
            return_x0=True,
        )
        history = x0
        if their_x0:
            assert_close(x0, their_x0[0], tolerance)
    assert_close(x, theirs, tolerance)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm(prediction, spacing, variance, monkeypatch):
    for name, steps, clip in product(("linear", "cosine", "sigmoid"), STEPS, (None, 0.7)):
        schedule = make_schedule(name)
        table = make_table(
            "ddpm",
            schedule,
            steps=steps,
            prediction=prediction,
            spacing=spacing,
            clip=clip and (-clip, clip),
            variance=variance,
        )
        scheduler = scheduler_of(
            "ddpm",
            schedule,
            table,
            prediction,
            spacing,
            variance_type=variance,
            clip_sample=clip is not None,
            clip_sample_range=clip or 1.0,
        )
        compare(scheduler, table, monkeypatch, learned=variance == "learned_range")


@pytest.mark.parametrize("clipped_epsilon", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim(prediction, spacing, eta, clipped_epsilon, monkeypatch):
    for steps, clip, to_one in product(STEPS, (None, 1.0), (True, False)):
        schedule = make_schedule("scaled_linear")
        offset = int(spacing == "leading" and not to_one)
        table = make_table(
            "ddim",
            schedule,
            steps=steps,
            prediction=prediction,
            spacing=spacing,
            steps_offset=offset,
            clip=clip and (-clip, clip),
            eta=eta,
            set_alpha_to_one=to_one,
            constant_stride=True,
            clipped_epsilon=clipped_epsilon,
        )
        scheduler = scheduler_of(
            "ddim",
            schedule,
            table,
            prediction,
            spacing,
            steps_offset=offset,
            clip_sample=clip is not None,
            set_alpha_to_one=to_one,
        )
        compare(scheduler, table, monkeypatch, eta=eta, use_clipped_model_output=clipped_epsilon)


@pytest.mark.parametrize("spacing", SPACINGS)
@predictions_of("euler", "euler_ancestral", "dpmpp_2m")
def test_euler_and_dpm_solver(sampler, prediction, spacing, monkeypatch):
    for name, steps in product(("linear", "scaled_linear", "cosine"), STEPS):
        schedule = make_schedule(name)
        offset = int(spacing == "leading")
        table = make_table(
            sampler,
            schedule,
            steps=steps,
            prediction=prediction,
            spacing=spacing,
            steps_offset=offset,
        )
        scheduler = scheduler_of(sampler, schedule, table, prediction, spacing, steps_offset=offset)
        compare(scheduler, table, monkeypatch)


@predictions_of(*CLASSES, of=("x0", "v"))
def test_zero_terminal_snr(sampler, prediction, monkeypatch):
    schedule = make_schedule("scaled_linear", zero_terminal_snr=True)
    if sampler in ("ddpm", "ddim"):
        config = {"clip_sample": False}
    else:
        # the others end at this level in diffusers, because they need a finite sigma / alpha
        schedule, config = Schedule(np.append(schedule.alphas_cumprod[:-1], 2.0**-24)), {}
    options = {"constant_stride": True} if sampler == "ddim" else {}
    for steps in STEPS:
        table = make_table(sampler, schedule, steps=steps, prediction=prediction, **options)
        scheduler = scheduler_of(sampler, schedule, table, prediction, "trailing", **config)
        compare(scheduler, table, monkeypatch)


@pytest.mark.parametrize("total", [1000, 777])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", CLASSES)
def test_timesteps(sampler, spacing, total):
    schedule = make_schedule("linear", total)
    scheduler = getattr(diffusers, CLASSES[sampler])(
        num_train_timesteps=total, timestep_spacing=spacing
    )
    for steps in range(1, total, 11):
        scheduler.set_timesteps(steps)
        # for some numbers of steps diffusers' trailing has one timestep too many, which is -1
        expected = [t for t in scheduler.timesteps.tolist() if t != -1]
        table = make_table(sampler, schedule, steps=steps, spacing=spacing)
        assert table.timesteps.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_schedules(name, zero_terminal_snr):
    """Noise levels within the error of diffusers' float32."""
    ranges = {"scaled_linear": (0.00085, 0.012)}
    first, last = ranges.get(name, (1e-4, 0.02))
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2" if name == "cosine" else name,
        beta_start=first,
        beta_end=last,
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    schedule = make_schedule(name, zero_terminal_snr=zero_terminal_snr)
    theirs = scheduler.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(1 - schedule.alphas_cumprod, 1 - theirs, rtol=1e-3, atol=1e-6)
