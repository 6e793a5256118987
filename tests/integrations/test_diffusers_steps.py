"""Every table against the scheduler of diffusers that it stands for, step by step.

diffusers makes its tables in float32; here it is given ours in float64, because its DDPM and DDIM
then compute in float64 throughout. Its other schedulers fall back to float32 inside of `step`.
"""

import numpy as np
import pytest
import torch

from cgkernels import guided_step, random
from cgm.samplers import (
    PREDICTIONS,
    SPACINGS,
    VARIANCES,
    Schedule,
    make_schedule,
    make_table,
)

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.peers

SEED = 11
SHAPE = (2, 3, 4, 4)
NAMES = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
FLOAT64, FLOAT32 = 1e-12, 2e-6


def scheduler_of(cls, schedule, steps, prediction, spacing, **config):
    """A scheduler of diffusers with our noise levels."""
    scheduler = getattr(diffusers, cls)(
        num_train_timesteps=schedule.num_timesteps,
        prediction_type=NAMES[prediction],
        timestep_spacing=spacing,
        **config,
    )
    scheduler.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod)
    one = torch.ones((), dtype=torch.float64)
    if cls == "DDPMScheduler":
        scheduler.one = one
    if cls == "DDIMScheduler":
        first = scheduler.alphas_cumprod[0]
        scheduler.final_alpha_cumprod = one if scheduler.config.set_alpha_to_one else first
    scheduler.set_timesteps(steps)
    return scheduler


def network(x, outputs):
    """Stands for a trained network: it is not linear, and of the size of its targets."""
    parts = [(1.7 * x + 0.3 * i).sin() * (0.9 + 0.3 * i) for i in range(outputs)]
    return torch.cat(parts, dim=1)


def assert_close(actual, expected, tolerance):
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


def compare(scheduler, table, tolerance, monkeypatch, *, learned=False, **options):
    """Run both from the same noise, with the same noise in every step."""
    last = len(scheduler.timesteps) - 1

    def noise_of(i):
        z = random.normal(
            SHAPE, seed=SEED, step=i, stream=random.STREAM_SAMPLER, dtype=torch.float64
        )
        return z if i < last else 0 * z  # our last step adds none

    module = type(scheduler).__module__
    z = random.normal(SHAPE, seed=SEED, stream=random.STREAM_INITIAL, dtype=torch.float64)
    x, theirs = table.initial_scale * z, scheduler.init_noise_sigma * z
    history = torch.zeros_like(x)
    assert len(table.table) == last + 1
    for i, t in enumerate(scheduler.timesteps):
        assert abs(float(t) - float(table.timesteps[i])) < 1e-4
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


STEPS = (1, 2, 10, 30)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm(prediction, spacing, variance, monkeypatch):
    for name in ("linear", "cosine", "sigmoid"):
        for steps in STEPS:
            for clip in (None, 1.0, 0.5):
                schedule = make_schedule(name)
                scheduler = scheduler_of(
                    "DDPMScheduler",
                    schedule,
                    steps,
                    prediction,
                    spacing,
                    variance_type=variance,
                    clip_sample=clip is not None,
                    clip_sample_range=clip or 1.0,
                )
                table = make_table(
                    "ddpm",
                    schedule,
                    steps=steps,
                    prediction=prediction,
                    spacing=spacing,
                    clip=clip and (-clip, clip),
                    variance=variance,
                )
                learned = variance == "learned_range"
                compare(scheduler, table, FLOAT64, monkeypatch, learned=learned)


@pytest.mark.parametrize("clipped_epsilon", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim(prediction, spacing, eta, clipped_epsilon, monkeypatch):
    for name in ("linear", "scaled_linear"):
        for steps in STEPS:
            for clip in (None, 1.0):
                for to_one, offset in ((True, 0), (False, int(spacing == "leading"))):
                    schedule = make_schedule(name)
                    scheduler = scheduler_of(
                        "DDIMScheduler",
                        schedule,
                        steps,
                        prediction,
                        spacing,
                        clip_sample=clip is not None,
                        set_alpha_to_one=to_one,
                        steps_offset=offset,
                    )
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
                    compare(
                        scheduler,
                        table,
                        FLOAT64,
                        monkeypatch,
                        eta=eta,
                        use_clipped_model_output=clipped_epsilon,
                    )


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("cls", ["DDPMScheduler", "DDIMScheduler"])
def test_zero_terminal_snr(cls, prediction, monkeypatch):
    schedule = make_schedule("scaled_linear", zero_terminal_snr=True)
    for steps in STEPS:
        scheduler = scheduler_of(cls, schedule, steps, prediction, "trailing", clip_sample=False)
        options = {"constant_stride": True} if cls == "DDIMScheduler" else {}
        table = make_table(cls[:4].lower(), schedule, steps=steps, prediction=prediction, **options)
        compare(scheduler, table, FLOAT64, monkeypatch)


SINGLE = {
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", SINGLE)
def test_float32_schedulers(sampler, prediction, spacing, monkeypatch):
    if sampler == "euler_ancestral" and prediction == "x0":
        pytest.skip("diffusers does not implement it")
    zero = make_schedule(zero_terminal_snr=True)
    schedules = [
        make_schedule("linear"),
        make_schedule("scaled_linear"),
        # these schedulers of diffusers end at A = 2^-24 where zero terminal SNR is asked for
        Schedule(np.append(zero.alphas_cumprod[:-1], 2.0**-24)),
    ]
    for schedule in schedules:
        for steps in (*STEPS, 14, 15):
            offset = int(spacing == "leading")
            scheduler = scheduler_of(
                SINGLE[sampler], schedule, steps, prediction, spacing, steps_offset=offset
            )
            table = make_table(
                sampler,
                schedule,
                steps=steps,
                prediction=prediction,
                spacing=spacing,
                steps_offset=offset,
            )
            compare(scheduler, table, FLOAT32, monkeypatch)


@pytest.mark.parametrize("total", [1000, 777])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("sampler", "cls"), [("ddim", "DDIMScheduler"), ("ddpm", "DDPMScheduler"), *SINGLE.items()]
)
def test_timesteps(sampler, cls, spacing, total):
    schedule = make_schedule("linear", total)
    scheduler = getattr(diffusers, cls)(num_train_timesteps=total, timestep_spacing=spacing)
    for steps in range(1, total, 7):
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
    np.testing.assert_allclose(1 - schedule.alphas_cumprod, 1 - theirs, rtol=1e-3)
