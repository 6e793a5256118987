"""Samplers against the formulas of their papers, on data for which every moment is known."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cgkernels import guided_step, random
from cgkernels.samplers import (
    PREDICTIONS,
    SAMPLERS,
    SCHEDULES,
    SPACINGS,
    Schedule,
    make_schedule,
    make_table,
)

pytestmark = pytest.mark.filterwarnings("ignore:steps = .* starts at timestep")

# Every sampler, with the options that change its formula.
CASES = {
    "ddpm-small": ("ddpm", {}),
    "ddpm-large": ("ddpm", {"variance": "fixed_large"}),
    "ddpm-learned": ("ddpm", {"variance": "learned_range"}),
    "ddim-0": ("ddim", {}),
    "ddim-0.5": ("ddim", {"eta": 0.5}),
    "ddim-1": ("ddim", {"eta": 1.0}),
    "ddim-1-clipped": ("ddim", {"eta": 1.0, "clipped_epsilon": True}),
    "ddim-stride": ("ddim", {"eta": 0.5, "constant_stride": True}),
    "ddim-alpha": ("ddim", {"eta": 0.5, "set_alpha_to_one": False}),
    "euler": ("euler", {}),
    "euler_ancestral": ("euler_ancestral", {}),
    "dpmpp_2m": ("dpmpp_2m", {}),
}
LOG_VARIANCE = -0.3  # what the network says of the learned range, from -1 to 1


# What the samplers are checked against


class Gaussian:
    """Data x0 ~ N(mean, std^2), for each pixel, and their exact denoiser."""

    def __init__(self, mean, std):
        self.mean, self.std = np.asarray(mean), np.asarray(std)

    def epsilon(self, x, level, one=1.0):
        """E[z | x]; instead of numbers, x and one (which is 1) may be rows of coefficients."""
        variance = level * self.std**2 + 1 - level
        return math.sqrt(1 - level) / variance * (x - math.sqrt(level) * self.mean * one)


DATA = Gaussian([0.3, -0.7, 0.1, 0.0], [0.5, 0.2, 1.3, 0.05])
UNCONDITIONAL = Gaussian([-0.2, 0.1, 0.4, 0.6], [0.8, 0.7, 1.0, 0.3])


def network_output(prediction, level, x, eps):
    """What a network of this prediction type gives where it finds the noise eps in x."""
    alpha, sigma = math.sqrt(level), math.sqrt(1 - level)
    if prediction == "epsilon":
        return eps
    x0 = (x - sigma * eps) / alpha
    return x0 if prediction == "x0" else alpha * eps - sigma * x0


def apply(row, x, e, h1=None):
    """One row of a table without its noise: x' and x0."""
    quiet = row.clone()
    quiet[7] = 0
    x, e = torch.from_numpy(x), torch.from_numpy(e)
    h1 = None if h1 is None else torch.from_numpy(h1)
    x, x0 = guided_step(x, e, table=quiet[None], step=0, h1=h1, return_x0=True)
    return x.numpy(), x0.numpy()


def noise_variance(row):
    """The variance of the noise of one row."""
    b5, log_var_min, log_var_max = row[[7, 10, 11]].tolist()
    fraction = (LOG_VARIANCE + 1) / 2
    return b5**2 * math.exp(log_var_min + fraction * (log_var_max - log_var_min))


def levels_of(schedule, table, options):
    """A at each timestep of a table, and A after each of its steps."""
    levels, t = schedule.alphas_cumprod, table.timesteps.numpy()
    if t.dtype == np.int64:
        now = levels[t]
    else:
        now = 1 / (1 + np.interp(t, np.arange(levels.size), np.sqrt(1 / levels - 1)) ** 2)
    final = 1.0 if options.get("set_alpha_to_one", True) else levels[0]
    if not options.get("constant_stride", False):
        return now, [*now[1:], final]
    previous = [int(s) - levels.size // len(t) for s in t]
    return now, [levels[s] if s >= 0 else final for s in previous]


def published_step(sampler, options, x, eps, x0_before, before, now, after, is_last):
    """One step as the papers write it: the mean of x', its variance, and x0.

    before, now, after: A at the previous timestep, at this one and at the next one.
    """
    alpha, sigma = math.sqrt(now), math.sqrt(1 - now)
    x0 = (x - sigma * eps) / alpha
    if sampler == "ddpm":  # arXiv:2006.11239, equation 7; arXiv:2102.09672, equation 15
        beta = 1 - now / after
        mean = math.sqrt(after) * beta / (1 - now) * x0
        mean = mean + math.sqrt(1 - beta) * (1 - after) / (1 - now) * x
        if is_last:
            return mean, 0.0, x0
        small, large = (1 - after) / (1 - now) * beta, beta
        v = (LOG_VARIANCE + 1) / 2
        between = math.exp(v * math.log(large) + (1 - v) * math.log(small))
        variances = {"fixed_small": small, "fixed_large": large, "learned_range": between}
        return mean, variances[options.get("variance", "fixed_small")], x0
    if sampler == "ddim":  # arXiv:2010.02502, equations 12 and 16
        eta = 0.0 if is_last else options.get("eta", 0.0)
        variance = eta**2 * (1 - after) / (1 - now) * (1 - now / after)
        return math.sqrt(after) * x0 + math.sqrt(1 - after - variance) * eps, variance, x0
    if sampler == "dpmpp_2m":  # arXiv:2211.01095, algorithm 2
        if is_last:
            return x0, 0.0, x0
        lambda_now, lambda_after = (0.5 * math.log(a / (1 - a)) for a in (now, after))
        h = lambda_after - lambda_now
        denoised = x0
        if x0_before is not None:
            r = (lambda_now - 0.5 * math.log(before / (1 - before))) / h
            denoised = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
        mean = math.sqrt(1 - after) / sigma * x - math.sqrt(after) * math.expm1(-h) * denoised
        return mean, 0.0, x0
    # Euler's methods: the state is x / alpha, its noise level sigma / alpha
    level, level_after, up = sigma / alpha, math.sqrt(1 / after - 1), 0.0
    if sampler == "euler_ancestral":
        up = math.sqrt(level_after**2 * (level**2 - level_after**2) / level**2)
    down = math.sqrt(level_after**2 - up**2)
    state = x / alpha
    state = state + (state - x0) / level * (down - level)
    return math.sqrt(after) * state, after * up**2, x0


def moments(step, schedule, table, options, scale=None, data=DATA, start=None):
    """Mean and variance of every pixel after every step of a sampler on Gaussian data.

    x is linear in z (the start), 1, and n, a normal number that stands for all noise added so far.
    It is carried as these three coefficients. step(i, x, eps, x0_before, before, now, after) gives
    those of x' without the new noise, the variance of the new noise, and those of x0.
    """
    now, after = levels_of(schedule, table, options)
    mean, std = (0.0, table.initial_scale) if start is None else start
    x = np.stack([np.full(4, std), np.full(4, mean), np.zeros(4)])
    one = np.array([0.0, 1.0, 0.0])[:, None]
    x0_before, before, found = None, None, []
    for i in range(len(now)):
        cond, uncond = data.epsilon(x, now[i], one), UNCONDITIONAL.epsilon(x, now[i], one)
        eps = cond if scale is None else uncond + scale * (cond - uncond)
        x, variance, x0_before = step(i, x, eps, x0_before, before, now[i], after[i])
        x[2] = np.sqrt(x[2] ** 2 + variance)
        before = now[i]
        found.append((x[1], x[0] ** 2 + x[2] ** 2))
    return np.array(found)


def moments_of_table(schedule, table, prediction, options, **problem):
    def step(i, x, eps, x0_before, before, now, after):
        e = network_output(prediction, now, x, eps)
        x, x0 = apply(table.table[i], x, e, x0_before if table.history else None)
        return x, noise_variance(table.table[i]), x0

    return moments(step, schedule, table, options, **problem)


def moments_of_paper(schedule, table, sampler, options, **problem):
    def step(i, *state):
        return published_step(sampler, options, *state, is_last=i == len(table.table) - 1)

    return moments(step, schedule, table, options, **problem)


# Gaussian data


@pytest.mark.parametrize("scale", [None, 3.0], ids=["plain", "guided"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("case", CASES)
def test_moments_after_every_step_are_those_of_the_paper(case, prediction, spacing, scale):
    sampler, options = CASES[case]
    for name, steps in [("linear", 1), ("linear", 2), ("scaled_linear", 13), ("cosine", 30)]:
        schedule = make_schedule(name)
        table = make_table(
            sampler, schedule, steps=steps, prediction=prediction, spacing=spacing, **options
        )
        actual = moments_of_table(schedule, table, prediction, options, scale=scale)
        expected = moments_of_paper(schedule, table, sampler, options, scale=scale)
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("ddpm-large", "ddpm-learned")])
def test_many_steps_reach_the_data(case):
    sampler, options = CASES[case]
    schedule = make_schedule()
    table = make_table(sampler, schedule, steps=1000, **options)
    mean, variance = moments_of_table(schedule, table, "epsilon", options)[-1]
    np.testing.assert_allclose(mean, DATA.mean, atol=0.01)
    np.testing.assert_allclose(np.sqrt(variance), DATA.std, rtol=0.02, atol=0.005)


def test_fixed_large_keeps_standard_normal_data():
    """For x0 ~ N(0, 1) every x_t is N(0, 1), and fixed_large is the true variance of a step."""
    schedule = make_schedule()
    table = make_table("ddpm", schedule, steps=50, variance="fixed_large")
    found = moments_of_table(schedule, table, "epsilon", {}, data=Gaussian(np.zeros(4), np.ones(4)))
    np.testing.assert_allclose(found[:-1, 0], 0, atol=1e-12)
    np.testing.assert_allclose(found[:-1, 1], 1, rtol=1e-12)


EXACT = [c for c in CASES if c not in ("ddpm-large", "ddpm-learned", "ddim-stride")]


@settings(max_examples=60)
@given(
    case=st.sampled_from(EXACT),
    prediction=st.sampled_from(PREDICTIONS),
    spacing=st.sampled_from(SPACINGS),
    name=st.sampled_from(SCHEDULES),
    total=st.integers(2, 100),
    fraction=st.floats(0, 1),
)
def test_a_single_image_has_its_exact_distribution_at_every_level(
    case, prediction, spacing, name, total, fraction
):
    """If all data are one image, steps of any size lead from N(alpha x0, sigma^2) to the next."""
    sampler, options = CASES[case]
    schedule = make_schedule(name, total)
    table = make_table(
        sampler,
        schedule,
        steps=1 + int(fraction * (total - 2)),
        prediction=prediction,
        spacing=spacing,
        **options,
    )
    now, after = levels_of(schedule, table, options)
    image = Gaussian([0.9, -0.5, 0.0, 0.2], np.zeros(4))
    start = (math.sqrt(now[0]) * image.mean, math.sqrt(1 - now[0]))
    found = moments_of_table(schedule, table, prediction, options, data=image, start=start)
    for (mean, variance), level in zip(found, after, strict=True):
        np.testing.assert_allclose(mean, math.sqrt(level) * image.mean, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(variance, 1 - level, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", ["ddpm-learned", "ddim-1", "euler_ancestral"])
def test_samples_have_the_moments_of_the_paper(case):
    """Monte Carlo: guided, stochastic sampling with the noise of the noise contract."""
    sampler, options = CASES[case]
    schedule, n = make_schedule(), 50_000
    table = make_table(sampler, schedule, steps=10, prediction="v", **options)
    now, _ = levels_of(schedule, table, options)
    x = random.normal(
        (n, 4), seed=7, step=0, stream=random.STREAM_INITIAL, dtype=torch.float64
    ).numpy()
    x = x * table.initial_scale
    log_variance = torch.full((n, 4), LOG_VARIANCE) if case == "ddpm-learned" else None
    for i in range(len(now)):
        cond, uncond = (
            torch.from_numpy(network_output("v", now[i], x, data.epsilon(x, now[i])))
            for data in (DATA, UNCONDITIONAL)
        )
        x = guided_step(
            torch.from_numpy(x), cond, uncond, table=table.table, step=i, scale=3.0,
            log_variance=log_variance, seed=7,
        ).numpy()  # fmt: skip
    mean, variance = moments_of_paper(schedule, table, sampler, options, scale=3.0)[-1]
    assert (np.abs(x.mean(0) - mean) / np.sqrt(variance / n) < 4).all()
    assert (np.abs(x.var(0) - variance) / (variance * math.sqrt(2 / n)) < 4).all()


# Order of convergence


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("euler", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence(sampler, order, prediction):
    """On Gaussian data the probability-flow ODE leads from x at A = a to, at A = b,

        sqrt(b) mean + sqrt(q(b) / q(a)) (x - sqrt(a) mean),    q(a) = a std^2 + 1 - a.

    The error is taken at a timestep that all numbers of steps visit.
    """
    total = 8000
    schedule = make_schedule("linear", total, beta_start=0.1 / total, beta_end=20 / total)
    shared = total // 10 - 1
    a, b = schedule.alphas_cumprod[[total - 1, shared]].tolist()
    growth = np.sqrt((b * DATA.std**2 + 1 - b) / (a * DATA.std**2 + 1 - a))
    start = np.array([1.0, -0.5, 2.0, 0.3])
    exact = math.sqrt(b) * DATA.mean + growth * (start - math.sqrt(a) * DATA.mean)
    numbers, errors = [50, 100, 200, 400], []
    for steps in numbers:
        table = make_table(sampler, schedule, steps=steps, prediction=prediction)
        now, _ = levels_of(schedule, table, {})
        x, x0 = start, None
        for i in range(table.timesteps.tolist().index(shared)):
            e = network_output(prediction, now[i], x, DATA.epsilon(x, now[i]))
            x, x0 = apply(table.table[i], x, e, x0)
        errors.append(np.abs(x - exact).max())
    slope = np.polyfit(np.log(numbers), np.log(errors), 1)[0]
    assert slope == pytest.approx(-order, abs=0.05)


# Relations between samplers


def same_steps(first, second):
    x, e = np.random.default_rng(0).standard_normal((2, 1000))
    for row, other in zip(first.table, second.table, strict=True):
        np.testing.assert_allclose(apply(row, x, e)[0], apply(other, x, e)[0], atol=1e-9)
        assert noise_variance(row) == pytest.approx(noise_variance(other), rel=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_samplers_that_are_the_same_without_a_clip(prediction):
    schedule = make_schedule()

    def table(sampler, **options):
        return make_table(sampler, schedule, steps=20, prediction=prediction, **options)

    same_steps(table("ddim"), table("ddim", clipped_epsilon=True))
    same_steps(table("ddim"), table("euler"))
    same_steps(table("ddim", eta=1.0), table("ddpm"))
    same_steps(table("ddim", eta=1.0), table("euler_ancestral"))


@pytest.mark.parametrize("clipped_epsilon", [False, True])
def test_clipped_steps_of_ddim(clipped_epsilon):
    schedule = make_schedule()
    options = {"clip": (-1.0, 0.5), "clipped_epsilon": clipped_epsilon}
    table = make_table("ddim", schedule, steps=4, **options)
    now, after = levels_of(schedule, table, {})
    x, e = np.array([0.3, 1.0, -2.0]), np.array([0.1, -2.0, 1.0])
    for row, a, b in zip(table.table, now, after, strict=True):
        x0 = np.clip((x - math.sqrt(1 - a) * e) / math.sqrt(a), -1.0, 0.5)
        eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a) if clipped_epsilon else e
        expected = math.sqrt(b) * x0 + math.sqrt(1 - b) * eps
        actual, clipped = apply(row, x, e)
        np.testing.assert_allclose(clipped, x0, rtol=1e-12)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


# Tables


@settings(max_examples=200)
@given(
    case=st.sampled_from(list(CASES)),
    prediction=st.sampled_from(PREDICTIONS),
    spacing=st.sampled_from(SPACINGS),
    name=st.sampled_from(SCHEDULES),
    zero_terminal_snr=st.booleans(),
    total=st.integers(2, 2000),
    fraction=st.floats(0, 1),
    clip=st.sampled_from([None, (-1.0, 1.0)]),
)
def test_tables_are_finite(
    case, prediction, spacing, name, zero_terminal_snr, total, fraction, clip
):
    sampler, options = CASES[case]
    if zero_terminal_snr and prediction == "epsilon":
        prediction = "v"
    table = make_table(
        sampler,
        make_schedule(name, total, zero_terminal_snr=zero_terminal_snr),
        steps=1 + int(fraction * (total - 2)),
        prediction=prediction,
        spacing=spacing,
        clip=clip,
        **options,
    )
    steps = len(table.table)
    assert table.table.shape == (steps, 12) and table.table.dtype == torch.float64
    assert table.timesteps.shape == (steps,)
    assert (table.timesteps.diff() < 0).all()
    assert table.timesteps[-1] >= 0 and table.timesteps[0] < total
    rounded = table.table.float()
    assert rounded[:, [0, 1, 2, 3, 4, 5, 6, 7, 10, 11]].isfinite().all()
    low, high = clip or (-math.inf, math.inf)
    assert (rounded[:, 8] == low).all() and (rounded[:, 9] == high).all()
    assert table.table[-1, 7] == 0
    assert table.stochastic == bool(table.table[:, 7].any())
    assert table.history == (1 if sampler == "dpmpp_2m" and steps > 2 else 0)
    assert table.table[0, 4] == 0
    assert 0 < table.initial_scale <= 1


def test_timesteps():
    schedule = make_schedule()

    def timesteps(sampler, spacing, **options):
        table = make_table(sampler, schedule, steps=5, spacing=spacing, **options)
        return table.timesteps.tolist()

    for sampler in ("ddpm", "ddim"):
        assert timesteps(sampler, "leading") == [800, 600, 400, 200, 0]
        assert timesteps(sampler, "leading", steps_offset=1) == [801, 601, 401, 201, 1]
        assert timesteps(sampler, "linspace") == [999, 749, 500, 250, 0]
    assert timesteps("dpmpp_2m", "leading") == [830, 664, 498, 332, 166]
    assert timesteps("dpmpp_2m", "linspace") == [999, 799, 599, 400, 200]
    assert timesteps("euler", "linspace") == [999, 749.25, 499.5, 249.75, 0]
    for sampler in SAMPLERS:
        assert timesteps(sampler, "trailing") == [999, 799, 599, 399, 199]
        table = make_table(sampler, schedule, steps=1000)
        assert table.timesteps.tolist() == list(range(999, -1, -1))


def gaussian_samples(steps, spacing, mean=0.3, std=0.5):
    """Mean and standard deviation of ddim's samples with the exact denoiser of N(mean, std^2)."""
    schedule = make_schedule("cosine")
    made = make_table(
        "ddim", schedule, steps=steps, spacing=spacing, prediction="x0", clipped_epsilon=True
    )
    levels = schedule.alphas_cumprod[made.timesteps.numpy()]
    center, spread = 0.0, 1.0
    for (b0, b1), a in zip(made.table[:, 2:4].tolist(), levels, strict=True):
        share = math.sqrt(a) * std**2 / (a * std**2 + 1 - a)  # of x in x0; x0 is linear in x
        center = b0 * center + b1 * (mean + share * (center - math.sqrt(a) * mean))
        spread = (b0 + b1 * share) * spread
    return center, spread


def test_a_loop_that_starts_low_is_warned_of_and_off():
    """T = 1,000: 334 steps of leading spacing have a stride of 2 and start at 666."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steps in (100, 333, 500, 1000):
            assert gaussian_samples(steps, "leading") == pytest.approx((0.3, 0.5), abs=0.03)
        assert gaussian_samples(334, "trailing") == pytest.approx((0.3, 0.5), abs=0.005)
    words = "starts at timestep 666 .* trailing, or 333 or 500 steps"
    with pytest.warns(UserWarning, match=words):
        assert gaussian_samples(334, "leading") == pytest.approx((0.218, 0.552), abs=0.001)


@pytest.mark.parametrize(
    ("sampler", "spacing", "steps", "words"),
    [
        ("ddpm", "leading", 400, "timestep 798 .* trailing, or 333 or 500 steps"),
        ("ddim", "leading", 1, "timestep 0 .* trailing, or 18 steps"),
        ("ddim", "linspace", 1, "timestep 0 .* trailing, or 2 steps"),
        ("euler", "linspace", 1, "timestep 0 .* trailing, or 2 steps"),
        ("dpmpp_2m", "leading", 500, "timestep 500 .* trailing, or 499 or 999 steps"),
        ("dpmpp_2m", "linspace", 1, None),
        ("ddim", "leading", 30, None),
        ("ddpm", "trailing", 1, None),
    ],
)
def test_which_loops_start_low(sampler, spacing, steps, words):
    schedule = make_schedule("cosine")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_table(sampler, schedule, steps=steps, spacing=spacing)
    assert [re.search(words, str(w.message)) is not None for w in caught] == [True] * bool(words)


def test_initial_scale():
    schedule = make_schedule()
    sigma = math.sqrt(1 - schedule.alphas_cumprod[-1])
    assert make_table("euler", schedule, steps=5).initial_scale == pytest.approx(sigma, rel=1e-15)
    assert make_table("euler", schedule, steps=5, spacing="leading").initial_scale == 1
    assert make_table("ddim", schedule, steps=5).initial_scale == 1


def test_zero_terminal_snr():
    """The first step from pure noise: the network's x0 plus the noise that is left."""
    schedule = make_schedule(zero_terminal_snr=True)
    for sampler in ("ddim", "euler", "dpmpp_2m"):
        table = make_table(sampler, schedule, steps=10, prediction="v")
        after = schedule.alphas_cumprod[table.timesteps[1]]
        x_next, x0 = apply(table.table[0], np.array([0.7]), np.array([0.2]))
        assert x0 == pytest.approx(-0.2, rel=1e-12)
        expected = math.sqrt(after) * -0.2 + math.sqrt(1 - after) * 0.7
        assert x_next == pytest.approx(expected, rel=1e-12)
        with pytest.raises(ValueError, match="prediction must be x0 or v"):
            make_table(sampler, schedule, steps=10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "ddmp"}, "sampler must be one of ddpm, ddim, euler"),
        ({"prediction": "sample"}, "prediction must be one of epsilon, x0, v"),
        ({"spacing": "even"}, "spacing must be one of leading, linspace, trailing"),
        ({"variance": "small"}, "variance must be one of fixed_small"),
        ({"steps": 0}, "steps must be an int from 1 to 1000"),
        ({"steps": 1001}, "steps must be an int from 1 to 1000"),
        ({"sampler": "dpmpp_2m", "steps": 1000, "spacing": "leading"}, "steps must be below 1000"),
        ({"sampler": "dpmpp_2m", "steps": 1000, "spacing": "linspace"}, "steps must be below 1000"),
        ({"spacing": "leading", "steps_offset": 200}, "steps_offset must keep .* 200 to 1100"),
        ({"spacing": "leading", "steps_offset": -1}, "steps_offset must be an int of at least 0"),
        ({"steps_offset": 1}, "steps_offset must be 0 for trailing, got 1"),
        ({"eta": 1.5}, "eta must be a number"),
        ({"eta": math.nan}, "eta must be a number"),
        ({"clip": (1.0, -1.0)}, "clip must be"),
        ({"clip": (math.nan, 1.0)}, "clip must be"),
        ({"sampler": "ddpm", "eta": 1.0}, "eta must be 0.0 for ddpm, got 1.0"),
        ({"variance": "fixed_large"}, "variance must be 'fixed_small' for ddim"),
        ({"sampler": "euler", "clipped_epsilon": True}, "clipped_epsilon must be False for euler"),
        ({"sampler": "euler", "constant_stride": True}, "constant_stride must be False for euler"),
        ({"sampler": "ddpm", "set_alpha_to_one": False}, "set_alpha_to_one must be True for ddpm"),
    ],
)
def test_wrong_arguments(arguments, message):
    arguments = {"sampler": "ddim", "steps": 10, **arguments}
    with pytest.raises(ValueError, match=message):
        make_table(schedule=make_schedule(), **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": 2.5}, {"steps": "x"}, {"steps": True}, {"steps": math.nan}, {"steps": None},
        {"spacing": "leading", "steps_offset": 0.5}, {"eta": "x"}, {"eta": None}, {"eta": True},
        {"clip": 1.0}, {"clip": (1, 2, 3)}, {"clip": ("a", "b")}, {"set_alpha_to_one": 1},
        {"constant_stride": None}, {"clipped_epsilon": "no"}, {"schedule": None},
        {"schedule": "linear"},
    ],
)  # fmt: skip
def test_arguments_of_another_type(arguments):
    with pytest.raises(TypeError, match=f"^{list(arguments)[-1]} must be "):
        make_table(**{"sampler": "ddim", "steps": 10, "schedule": make_schedule(), **arguments})


def test_no_epsilon_where_float32_has_no_alpha():
    """Of it 1 / alpha is infinite in the float32 table that a loop runs on."""
    schedule = Schedule(np.array([0.9, 0.5, 1e-80]))
    with pytest.raises(ValueError, match="prediction must be x0 or v where A_t = 0"):
        make_table("ddim", schedule, steps=3)


# Schedules


def test_schedules_are_those_of_their_papers():
    total, first, last = 7, 0.01, 0.3
    part = [i / (total - 1) for i in range(total)]
    betas = {
        "linear": [first + p * (last - first) for p in part],
        "scaled_linear": [(first**0.5 + p * (last**0.5 - first**0.5)) ** 2 for p in part],
        "sigmoid": [first + (last - first) / (1 + math.exp(6 - 12 * p)) for p in part],
    }
    for name, values in betas.items():
        schedule = make_schedule(name, total, beta_start=first, beta_end=last)
        expected = [math.prod(1 - b for b in values[: i + 1]) for i in range(total)]
        np.testing.assert_allclose(schedule.alphas_cumprod, expected, rtol=1e-13)

    f = [math.cos((i / 50 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(51)]
    cosine = make_schedule("cosine", 50).alphas_cumprod
    np.testing.assert_allclose(cosine[:-1], np.array(f[1:-1]) / f[0], rtol=1e-12)
    assert cosine[-1] == pytest.approx(cosine[-2] * 0.001)  # beta is at most 0.999


@pytest.mark.parametrize("name", SCHEDULES)
def test_zero_terminal_snr_keeps_the_first_level(name):
    plain, rescaled = make_schedule(name), make_schedule(name, zero_terminal_snr=True)
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0], rel=1e-14)
    # sqrt(A) is rescaled linearly
    bend = np.diff(np.sqrt(rescaled.alphas_cumprod)) / np.diff(np.sqrt(plain.alphas_cumprod))
    np.testing.assert_allclose(bend, bend[0], rtol=1e-8)


def test_training_table():
    schedule = make_schedule("cosine")
    table = schedule.training_table()
    assert table.shape == (1000, 2) and table.dtype == torch.float32
    np.testing.assert_allclose(table[:, 0] ** 2, schedule.alphas_cumprod, rtol=1e-6)
    np.testing.assert_allclose(table[:, 1] ** 2, 1 - schedule.alphas_cumprod, rtol=1e-6)


def test_loss_weights():
    schedule = make_schedule(zero_terminal_snr=True)
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    weights = {p: schedule.loss_weights(p, "min_snr", gamma=5.0).numpy() for p in PREDICTIONS}
    np.testing.assert_allclose(weights["x0"], np.minimum(snr, 5), rtol=1e-6)
    # an error d of x0 is one of d alpha / sigma in epsilon and of d / sigma in v
    np.testing.assert_allclose(weights["epsilon"] * snr, weights["x0"], rtol=1e-6)
    np.testing.assert_allclose(weights["v"] * (snr + 1), weights["x0"], rtol=1e-6)
    assert [weights[p][-1] for p in PREDICTIONS] == [1, 0, 0]
    for prediction in PREDICTIONS:
        assert (schedule.loss_weights(prediction) == 1).all()
        assert schedule.loss_weights(prediction).shape == (1000,)
        assert schedule.loss_weights(prediction, "min_snr").dtype == torch.float32
    with pytest.raises(ValueError, match="weighting must be one of none, min_snr"):
        schedule.loss_weights("v", "snr")
    with pytest.raises(ValueError, match="prediction must be one of"):
        schedule.loss_weights("flow")
    with pytest.raises(ValueError, match="gamma must be a number above 0"):
        schedule.loss_weights("v", "min_snr", gamma=0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "squared"}, "name must be one of linear, scaled_linear, cosine, sigmoid"),
        ({"num_timesteps": 0}, "num_timesteps must be an int from 1 to"),
        ({"num_timesteps": 10.0}, "num_timesteps must be an int"),
        ({"num_timesteps": True}, "num_timesteps must be an int"),
        ({"num_timesteps": 1, "zero_terminal_snr": True}, "num_timesteps must be an int from 2 to"),
        ({"zero_terminal_snr": "no"}, "zero_terminal_snr must be True or False"),
        ({"beta_start": "0.1"}, "beta_start must be a number"),
        ({"beta_end": math.nan}, "beta_end must be a number"),
        ({"name": "cosine", "beta_start": 0.1}, "cosine takes no beta_start"),
        ({"beta_start": 0.0}, "beta_start and beta_end must rise"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start and beta_end must rise"),
    ],
)
def test_wrong_schedules(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_schedule(**arguments)


@pytest.mark.parametrize(
    "levels", [[0.5, 0.5], [1.0, 0.5], [0.5, -0.1], [0.5, math.nan], [], [[0.9, 0.5]]]
)
def test_wrong_levels(levels):
    with pytest.raises(ValueError, match="alphas_cumprod must"):
        Schedule(np.array(levels, dtype=np.float64))
