"""Noise schedules, and samplers as tables of coefficients, made once in float64 on the host.

    x_t = alpha_t x0 + sigma_t z      alpha_t = sqrt(A_t), sigma_t = sqrt(1 - A_t)

at the timesteps t = 0 .. T - 1, where A_t is the product of 1 - beta_i over i <= t. A step leads
from t to the next timestep n; after the last step A_n = 1. With eps = (x - alpha_t x0) / sigma_t
each sampler is a case of

    x' = alpha_n x0 + d eps + s z
    s = eta sigma_n / sigma_t sqrt(1 - A_t / A_n)      d = sqrt(sigma_n^2 - s^2)

    ddpm             eta = 1, then s^2 replaced by the variance that is asked for;
                     arXiv:2006.11239, 2102.09672
    ddim             eta from 0 to 1; arXiv:2010.02502
    euler            eta = 0: Euler's method on d(x / alpha) = eps d(sigma / alpha);
                     arXiv:2206.00364
    euler_ancestral  eta = 1: an Euler step to a lower level than n, then noise up to n;
                     github.com/crowsonkb/k-diffusion
    dpmpp_2m         eta = 0: x' = sigma_n / sigma_t x + w (x0 + k (x0 - previous x0)) with
                     w = alpha_n - alpha_t sigma_n / sigma_t, k = h / (2 previous h),
                     h = log(alpha_n / sigma_n) - log(alpha_t / sigma_t), and k = 0 in the first
                     and the last step; arXiv:2211.01095, algorithm 2

Euler's methods are usually written for the state x / alpha, which has to be scaled before it
enters the network. Here the state is x for every sampler, and enters the network as it is.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cgkernels.checks import (
    SMALLEST,
    check_choice,
    check_flag,
    check_int,
    check_number,
)

SCHEDULES = ("linear", "scaled_linear", "cosine", "sigmoid")
SAMPLERS = ("ddpm", "ddim", "euler", "euler_ancestral", "dpmpp_2m")
PREDICTIONS = ("epsilon", "x0", "v")
SPACINGS = ("leading", "linspace", "trailing")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
WEIGHTINGS = ("none", "min_snr")

_EULER = ("euler", "euler_ancestral")
_BETA_RANGES = {"linear": (1e-4, 0.02), "scaled_linear": (8.5e-4, 0.012), "sigmoid": (1e-4, 0.02)}

# Above this share of the data in x at the first timestep, beside that at the last one of training,
# a loop that starts from noise alone is off by as much of the mean.
_MOST_SHARE_LEFT = 0.1

_MOST_TIMESTEPS = 2**24  # steps that the noise contract can number

_Array = npt.NDArray[np.float64]


# Schedules


@dataclass(frozen=True, eq=False)
class Schedule:
    """The noise levels of T training timesteps.

    Raises ValueError or TypeError unless A_t falls strictly, from below 1 to 0 or above.
    """

    alphas_cumprod: _Array  # A_t, (T,) float64

    def __post_init__(self) -> None:
        levels = self.alphas_cumprod
        if not isinstance(levels, np.ndarray):
            raise TypeError(f"alphas_cumprod must be an array, got {type(levels).__name__}")
        if levels.ndim != 1 or levels.size == 0 or levels.dtype != np.float64:
            raise ValueError(
                f"alphas_cumprod must be (T,) float64, got {levels.shape} {levels.dtype}"
            )
        if not (levels[0] < 1 and levels[-1] >= 0 and (np.diff(levels) < 0).all()):
            raise ValueError("alphas_cumprod must fall strictly, from below 1 to 0 or above")

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.alphas_cumprod.size

    def training_table(self) -> Tensor:
        """(T, 2) float32: alpha_t and sigma_t, for cgkernels.add_noise and diffusion_loss."""
        levels = self.alphas_cumprod
        return torch.from_numpy(np.sqrt(np.stack([levels, 1 - levels], axis=1))).float()

    def loss_weights(
        self, prediction: str = "epsilon", weighting: str = "none", gamma: float = 5.0
    ) -> Tensor:
        """(T,) float32: the weight of the squared error of the prediction at each timestep.

        none     1
        min_snr  min(snr, gamma) for the error of x0, where snr = A_t / (1 - A_t): that is
                 min(1, gamma / snr) for epsilon and min(snr, gamma) / (snr + 1) for v. At
                 snr = 0 (zero terminal SNR) it is 0 for x0, 1 for epsilon and 0 for v.
                 arXiv:2303.09556
        """
        check_choice("prediction", prediction, PREDICTIONS)
        check_choice("weighting", weighting, WEIGHTINGS)
        check_number("gamma", gamma, SMALLEST)
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        if weighting == "none":
            weights = np.ones_like(snr)
        elif prediction == "epsilon":
            weights = gamma / np.maximum(snr, gamma)
        elif prediction == "x0":
            weights = np.minimum(snr, gamma)
        else:
            weights = np.minimum(snr, gamma) / (snr + 1)
        return torch.from_numpy(weights).float()


def make_schedule(
    name: str = "linear",
    num_timesteps: int = 1000,
    *,
    beta_start: float | None = None,
    beta_end: float | None = None,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """Schedule of T = num_timesteps from the name of its betas and their first and last value.

    linear         beta in equal steps; 1e-4 to 0.02 by default. arXiv:2006.11239
    scaled_linear  sqrt(beta) in equal steps; 8.5e-4 to 0.012 by default. arXiv:2112.10752
    cosine         beta_i = min(1 - f((i + 1) / T) / f(i / T), 0.999) with
                   f(u) = cos((u + 0.008) / 1.008 pi / 2)^2; takes no beta_start and beta_end.
                   arXiv:2102.09672; "squaredcos_cap_v2" in diffusers
    sigmoid        beta = beta_start + (beta_end - beta_start) / (1 + exp(-u)), u from -6 to 6 in
                   equal steps; 1e-4 to 0.02 by default. arXiv:2203.02923; "sigmoid" in diffusers'
                   DDPM, but not the sigmoid of arXiv:2212.11972, which is one of A

    zero_terminal_snr shifts and scales sqrt(A) so that it ends at 0 and its first entry stays.
    arXiv:2305.08891, algorithm 1
    """
    check_choice("name", name, SCHEDULES)
    check_flag(zero_terminal_snr=zero_terminal_snr)
    check_int("num_timesteps", num_timesteps, 1 + zero_terminal_snr, _MOST_TIMESTEPS)
    if name == "cosine":
        if beta_start is not None or beta_end is not None:
            raise ValueError(
                f"cosine takes no beta_start and beta_end, got {beta_start} and {beta_end}"
            )
        u = np.arange(num_timesteps + 1) / num_timesteps
        f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    else:
        first = _BETA_RANGES[name][0] if beta_start is None else beta_start
        last = _BETA_RANGES[name][1] if beta_end is None else beta_end
        check_number("beta_start", first)
        check_number("beta_end", last)
        if not 0 < first <= last < 1:
            raise ValueError(f"beta_start and beta_end must rise in (0, 1), got {first} and {last}")
        if name == "linear":
            betas = np.linspace(first, last, num_timesteps)
        elif name == "scaled_linear":
            betas = np.linspace(first**0.5, last**0.5, num_timesteps) ** 2
        else:
            betas = first + (last - first) / (1 + np.exp(-np.linspace(-6, 6, num_timesteps)))
    levels = np.cumprod(1 - betas)
    if not (levels[0] < 1 and (np.diff(levels) < 0).all()):
        raise ValueError(
            f"num_timesteps must be fewer, or beta_start and beta_end other ones, for levels that "
            f"float64 tells apart, got {num_timesteps} timesteps of {name}"
        )
    if zero_terminal_snr:
        root = np.sqrt(levels)
        levels = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return Schedule(levels)


# Samplers


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """What a sampling loop of S steps needs, on the CPU."""

    timesteps: Tensor  # (S,) for the network: int64, or float64 where Euler's methods interpolate
    table: Tensor  # (S, 12) float64: the columns of cgkernels.guided_step
    initial_scale: float  # the loop starts from x = initial_scale z
    history: int  # the number of earlier x0 that the steps read: 0 or 1
    stochastic: bool  # whether any step adds noise


def make_table(
    sampler: str,
    schedule: Schedule,
    *,
    steps: int,
    prediction: str = "epsilon",
    spacing: str = "trailing",
    steps_offset: int = 0,
    clip: tuple[float, float] | None = None,
    eta: float = 0.0,
    variance: str = "fixed_small",
    set_alpha_to_one: bool = True,
    constant_stride: bool = False,
    clipped_epsilon: bool = False,
) -> SamplerTable:
    """Table of a sampler; formulas and sources are at the head of this file.

    sampler           ddpm, ddim, euler, euler_ancestral or dpmpp_2m
    steps             S, from 1 to T; to T - 1 for dpmpp_2m with leading or linspace
    prediction        the network's output: epsilon (the z of x_t), x0, or v = alpha z - sigma x0
    spacing           which S of the T timesteps, i = 0 .. S - 1 (arXiv:2305.08891, table 2):
                        leading   i (T // S) + steps_offset
                        linspace  S points from 0 to T - 1, rounded; Euler's methods interpolate
                                  sigma / alpha linearly in t instead of rounding
                        trailing  round(T - i T / S) - 1
                      for leading and linspace dpmpp_2m makes S + 1 points and drops the lowest
    clip              (lowest, highest) of x0, or None
    eta               ddim only: from 0, deterministic, to 1, as much noise as ddpm
    variance          ddpm only, with beta = 1 - A_t / A_n:
                        fixed_small    beta sigma_n^2 / sigma_t^2
                        fixed_large    beta
                        learned_range  between these two, on a logarithmic scale, by the second
                                       output of the network (log_variance of guided_step)
    set_alpha_to_one  ddim only: if False, A after the last step is A_0 instead of 1
    constant_stride   ddim only: if True, n = t - T // S, as in diffusers, which is not always the
                      next timestep of linspace and trailing
    clipped_epsilon   ddim only: if True, eps follows from the clipped x0, as in all other
                      samplers; if False, from x and the network's output, as in diffusers

    The last step adds no noise. A loop starts from noise alone: where the first timestep lies
    well below the last one of training, as with leading where S does not divide T or is small,
    samples are off (arXiv:2305.08891), and a warning says which steps fit. Raises ValueError or
    TypeError for an argument that does not fit, by name: for steps or timesteps outside of the
    schedule, for an option that the sampler does not take, and for epsilon prediction at a timestep
    with alpha_t = 0 in float32, where epsilon says nothing about x0.
    """
    check_choice("sampler", sampler, SAMPLERS)
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a Schedule, got {type(schedule).__name__}")
    check_choice("prediction", prediction, PREDICTIONS)
    check_choice("spacing", spacing, SPACINGS)
    check_choice("variance", variance, VARIANCES)
    _check_options(sampler, "ddpm", variance=(variance, "fixed_small"))
    _check_options(
        sampler,
        "ddim",
        eta=(eta, 0.0),
        set_alpha_to_one=(set_alpha_to_one, True),
        constant_stride=(constant_stride, False),
        clipped_epsilon=(clipped_epsilon, False),
    )
    check_number("eta", eta, 0, 1)
    check_flag(
        set_alpha_to_one=set_alpha_to_one, constant_stride=constant_stride,
        clipped_epsilon=clipped_epsilon,
    )  # fmt: skip
    check_int("steps", steps, 1, schedule.num_timesteps)
    check_int("steps_offset", steps_offset, 0)
    if clip is not None:
        pair = isinstance(clip, tuple | list) and len(clip) == 2
        if not pair or not all(isinstance(end, int | float) for end in clip):
            raise TypeError(f"clip must be (lowest, highest) or None, got {clip!r}")
        if not clip[0] < clip[1]:
            raise ValueError(f"clip must be (lowest, highest) or None, got {clip!r}")
    if steps_offset != 0 and spacing != "leading":
        raise ValueError(f"steps_offset must be 0 for {spacing}, got {steps_offset}")

    t = _timesteps(sampler, schedule.num_timesteps, steps, spacing, steps_offset)
    _warn_of_low_start(sampler, schedule, steps, spacing, steps_offset)
    now, after = _levels(schedule.alphas_cumprod, t, set_alpha_to_one, constant_stride)
    if prediction == "epsilon" and np.sqrt(now[0]) < np.finfo(np.float32).tiny:
        raise ValueError(
            f"prediction must be x0 or v where A_t = 0 (zero terminal SNR, t = {t[0]}), got epsilon"
        )
    alpha, alpha_next = np.sqrt(now), np.sqrt(after)
    sigma, sigma_next = np.sqrt(1 - now), np.sqrt(1 - after)
    beta = 1 - now / after
    etas = np.full(steps, 1.0 if sampler in ("ddpm", "euler_ancestral") else eta)
    etas[-1] = 0
    std = etas * sigma_next / sigma * np.sqrt(beta)
    # sqrt(sigma_next^2 - std^2), rearranged so that nothing cancels
    drift = sigma_next / sigma * np.sqrt((1 - etas**2) * beta + now * (1 - after) / after)

    table = np.zeros((steps, 12))
    a0, a1, b0, b1, b2, _, b4, b5, clip_min, clip_max, log_var_min, log_var_max = table.T
    a0[:], a1[:] = x0_coefficients(prediction, alpha, sigma)
    clip_min[:], clip_max[:] = clip or (-np.inf, np.inf)
    if sampler == "ddim" and not clipped_epsilon:
        c0, c1 = _epsilon_from(prediction, alpha, sigma)
        b0[:], b1[:], b4[:] = drift * c0, alpha_next, drift * c1
    else:
        b0[:], b1[:] = drift / sigma, alpha_next - drift * alpha / sigma
    if sampler == "dpmpp_2m":
        k = _extrapolation(now)
        b1[:], b2[:] = (1 + k) * b1, -k * b1
    b5[:] = std
    if variance == "fixed_large":
        b5[:-1] = np.sqrt(beta[:-1])
    elif variance == "learned_range":
        b5[:-1] = 1
        # the smaller variance is 0 in the last step, which does not use it
        log_var_min[:] = np.log(np.maximum((sigma_next / sigma) ** 2 * beta, 1e-20))
        log_var_max[:] = np.log(np.maximum(beta, 1e-20))

    # As in diffusers: Euler's methods start from sigma z, except for leading timesteps, which
    # start lower, where x0 has a noticeable share of the variance
    noise_alone = sampler in _EULER and spacing != "leading"
    return SamplerTable(
        timesteps=torch.from_numpy(t),
        table=torch.from_numpy(table),
        initial_scale=float(sigma[0]) if noise_alone else 1.0,
        history=int(b2.any()),
        stochastic=bool(b5.any()),
    )


def _points(sampler: str, steps: int, spacing: str) -> int:
    """Timesteps that are made, of which dpmpp_2m may drop the lowest."""
    return steps + 1 if sampler == "dpmpp_2m" and spacing != "trailing" else steps


def _timesteps(sampler: str, total: int, steps: int, spacing: str, offset: int) -> npt.NDArray[Any]:
    """The timesteps (S,), from the noisiest down."""
    count = _points(sampler, steps, spacing)
    t: npt.NDArray[Any]
    if spacing == "leading":
        t = np.arange(count)[::-1] * (total // count) + offset
    elif spacing == "linspace":
        t = np.linspace(0, total - 1, count)[::-1].copy()
        if sampler in _EULER:
            return t
    else:
        t = np.arange(total, 0, -total / count).round() - 1
    # drops the lowest point of dpmpp_2m, and the one too many that arange may make by rounding
    t = t[:steps].round().astype(np.int64)
    if (np.diff(t) >= 0).any():
        raise ValueError(f"steps must be below {total} for {sampler} with {spacing}, got {steps}")
    if t[0] >= total or t[-1] < 0:
        raise ValueError(
            f"steps_offset must keep the timesteps, {t[-1]} to {t[0]}, within 0 to {total - 1}, "
            f"got {offset}"
        )
    return t


def _warn_of_low_start(
    sampler: str, schedule: Schedule, steps: int, spacing: str, offset: int
) -> None:
    """A warning, if the first timestep is well below T - 1, of which numbers of steps fit.

    It is so if another step of the same stride would fit, or much more of the data is left in x.
    """
    total, share = schedule.num_timesteps, np.sqrt(schedule.alphas_cumprod)

    def first(steps: int) -> int:
        return int(_timesteps(sampler, total, steps, spacing, offset)[0])

    def fits(steps: int) -> bool:
        try:
            highest = first(steps)
        except ValueError:  # beyond the schedule
            return False
        stride = total // _points(sampler, steps, spacing)
        ends = spacing != "leading" or highest + 2 * stride > total
        return ends and bool(share[highest] <= share[-1] + _MOST_SHARE_LEFT)

    if fits(steps):
        return
    fewer = next(filter(fits, range(steps - 1, 0, -1)), None)
    more = next(filter(fits, range(steps + 1, total + 1)), None)
    nearest = " or ".join(str(n) for n in (fewer, more) if n)
    warnings.warn(
        f"steps = {steps} with {spacing} spacing starts at timestep {first(steps)} of 0 to "
        f"{total - 1}, where x still has {share[first(steps)]:.2g} of the data, but the loop "
        f"starts from noise alone: samples are off by as much. What fits is spacing trailing"
        + (f", or {nearest} steps" if nearest else ""),
        stacklevel=3,
    )


def _levels(
    levels: _Array, t: npt.NDArray[Any], set_alpha_to_one: bool, constant_stride: bool
) -> tuple[_Array, _Array]:
    """A at the timesteps, and A after each of their steps: (S,) both."""
    final = 1.0 if set_alpha_to_one else levels[0]
    if t.dtype == np.float64:
        with np.errstate(divide="ignore"):  # sigma / alpha is infinite at zero terminal SNR
            ratio = np.interp(t, np.arange(levels.size), np.sqrt((1 - levels) / levels))
        now = 1 / (1 + ratio**2)
    else:
        now = levels[t]
    if constant_stride:
        previous = t - levels.size // t.size
        return now, np.where(previous < 0, final, levels[np.maximum(previous, 0)])
    return now, np.append(now[1:], final)


def x0_coefficients(prediction: str, alpha: _Array, sigma: _Array) -> tuple[_Array, _Array]:
    """(c0, c1) of x0 = c0 x + c1 e for the network's output e."""
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "x0":
        return np.zeros_like(alpha), np.ones_like(alpha)
    return alpha, -sigma


def _epsilon_from(prediction: str, alpha: _Array, sigma: _Array) -> tuple[_Array, _Array]:
    """(c0, c1) of eps = c0 x + c1 e for the network's output e."""
    if prediction == "epsilon":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction == "x0":
        return 1 / sigma, -alpha / sigma
    return sigma, alpha


def _extrapolation(levels: _Array) -> _Array:
    """k of dpmpp_2m for each step."""
    with np.errstate(divide="ignore"):  # minus infinity at zero terminal SNR gives k = 0, the limit
        h = np.diff(0.5 * np.log(levels / (1 - levels)))
    k = np.zeros_like(levels)
    k[1:-1] = h[1:] / (2 * h[:-1])
    return k


def _check_options(sampler: str, owner: str, **options: tuple[object, object]) -> None:
    """Each option is (value, default); only its owner may have another value."""
    for option, (value, default) in options.items():
        if sampler != owner and value != default:
            raise ValueError(f"{option} must be {default!r} for {sampler}, got {value!r}")
