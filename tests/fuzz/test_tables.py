"""Made-up schedules and samplers: tables hold what the formulas say, or are refused by name."""

import math
import warnings

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cgkernels.samplers import (
    PREDICTIONS,
    SAMPLERS,
    SCHEDULES,
    SPACINGS,
    VARIANCES,
    WEIGHTINGS,
    Schedule,
    make_schedule,
    make_table,
)
from tests.fuzz import call

ANYTHING = st.sampled_from(
    [None, "x", True, 2.5, -1, 0, math.nan, math.inf, -math.inf, 1e308, 2**70, [1], (1, 2), b"x"]
)


def mostly(right):
    return st.one_of(right, right, right, right, right, right, ANYTHING)


schedules = st.fixed_dictionaries(
    {"name": mostly(st.sampled_from(SCHEDULES)), "num_timesteps": mostly(st.integers(1, 1500))},
    optional={
        "beta_start": mostly(st.floats(1e-8, 0.5)),
        "beta_end": mostly(st.floats(1e-6, 0.999)),
        "zero_terminal_snr": mostly(st.booleans()),
    },
)
tables = st.fixed_dictionaries(
    {"sampler": mostly(st.sampled_from(SAMPLERS)), "share": mostly(st.floats(0, 1))},
    optional={
        "prediction": mostly(st.sampled_from(PREDICTIONS)),
        "spacing": mostly(st.sampled_from(SPACINGS)),
        "steps_offset": mostly(st.integers(-2, 5)),
        "clip": mostly(st.sampled_from([None, (-1.0, 1.0), (0, 2)])),
        "eta": mostly(st.floats(0, 1)),
        "variance": mostly(st.sampled_from(VARIANCES)),
        "set_alpha_to_one": mostly(st.booleans()),
        "constant_stride": mostly(st.booleans()),
        "clipped_epsilon": mostly(st.booleans()),
    },
)


def assert_is_schedule(schedule: Schedule) -> None:
    levels = schedule.alphas_cumprod
    assert levels.dtype == np.float64 and np.isfinite(levels).all()
    assert (np.diff(levels) < 0).all() and 0 <= levels[-1] <= levels[0] < 1
    alpha, sigma = schedule.training_table().double().T
    assert (alpha**2 + sigma**2 - 1).abs().max() <= 2**-22


def test_schedules(fuzz):
    @given(schedules)
    def check(arguments):
        schedule = call(make_schedule, arguments)
        if schedule is not None:
            assert_is_schedule(schedule)
            assert schedule.num_timesteps == arguments["num_timesteps"]

    fuzz(check)


def test_weights_of_the_loss(fuzz):
    @given(
        st.integers(1, 300), st.booleans(), mostly(st.sampled_from(PREDICTIONS)),
        mostly(st.sampled_from(WEIGHTINGS)), mostly(st.floats(1e-3, 1e3)),
    )  # fmt: skip
    def check(total, zero, prediction, weighting, gamma):
        schedule = make_schedule("cosine", total + zero, zero_terminal_snr=zero)
        arguments = {"prediction": prediction, "weighting": weighting, "gamma": gamma}
        weights = call(schedule.loss_weights, arguments)
        if weights is None:
            return
        levels = schedule.alphas_cumprod
        # Of the squared error of x0: that of epsilon is 1 / snr of it, that of v 1 / (snr + 1).
        snr = levels / (1 - levels)
        of_x0 = np.minimum(snr, gamma)
        with np.errstate(divide="ignore", invalid="ignore"):
            exact = {
                "x0": of_x0, "v": of_x0 / (snr + 1), "epsilon": np.where(snr, of_x0 / snr, 1),
            }[prediction]  # fmt: skip
        exact = np.ones_like(snr) if weighting == "none" else exact
        np.testing.assert_allclose(weights.double().numpy(), exact, rtol=1e-6, atol=0)

    fuzz(check)


def test_tables_of_samplers(fuzz):
    @given(schedules, tables)
    def check(schedule, arguments):
        arguments = dict(arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule = call(make_schedule, schedule) or make_schedule()
            share, total = arguments.pop("share"), schedule.num_timesteps
            right = isinstance(share, float) and 0 <= share <= 1
            steps = 1 + int(share * (total - 1)) if right else share
            made = call(make_table, {**arguments, "schedule": schedule, "steps": steps})
        if made is None:
            return
        assert made.timesteps.shape == (steps,) and made.table.shape == (steps, 12)
        timesteps, columns = made.timesteps.double().numpy(), made.table.numpy().T
        assert (np.diff(timesteps) < 0).all() and 0 <= timesteps[-1] <= timesteps[0] < total
        assert 0 < made.initial_scale <= 1
        clips = columns[8:10]
        assert np.isfinite(np.delete(columns, (8, 9), 0)).all() and (clips[0] < clips[1]).all()
        # A known x0 and epsilon go to the next level: x' = alpha' x0 + d epsilon, and with the
        # variance of the noise, where it is that of the marginals, alpha'^2 + d^2 + s^2 = 1.
        if arguments.get("variance", "fixed_small") != "fixed_small" or (
            arguments.get("constant_stride") or arguments["sampler"] == "dpmpp_2m"
        ):
            return
        if (timesteps % 1).any():  # Euler's methods interpolate sigma / alpha
            return
        now = schedule.alphas_cumprod[timesteps.astype(int)]
        last = 1.0 if arguments.get("set_alpha_to_one", True) else schedule.alphas_cumprod[0]
        after = np.append(now[1:], last)
        alpha, sigma = np.sqrt(now), np.sqrt(1 - now)
        output = {
            "epsilon": (0 * alpha, 0 * alpha + 1),
            "x0": (0 * alpha + 1, 0 * alpha),
            "v": (-sigma, alpha),
        }[arguments.get("prediction", "epsilon")]
        a0, a1, b0, b1, _, _, b4, b5 = columns[:8]
        moved = []
        for x0, epsilon in ((1.0, 0.0), (0.0, 1.0)):
            x, e = alpha * x0 + sigma * epsilon, output[0] * x0 + output[1] * epsilon
            clean = a0 * x + a1 * e
            np.testing.assert_allclose(clean, x0, rtol=0, atol=1e-12 / alpha.clip(1e-300).min())
            moved.append(b0 * x + b1 * x0 + b4 * e)
        np.testing.assert_allclose(moved[0], np.sqrt(after), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(moved[1] ** 2 + b5**2, 1 - after, rtol=1e-7, atol=1e-12)

    fuzz(check)
