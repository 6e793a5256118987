"""Regression: every value of y by itself, from the parameters of its distribution given cond.

    p(y | cond) = prod_i p(y_i | parameters_i(cond))

LeastSquares         the middle of each value alone, by squared or absolute error
GaussianRegression   N(mu, sigma^2) for each value
MixtureDensity       sum_k w_k N(mu_k, sigma_k^2) for each value

`cgm.families.quantized_classifier` is the fourth: classes of each value or pixel.

Given the condition the values are independent: of several right answers a sample takes one here and
another there, and the mean lies between all of them. Without a condition no network is needed: the
parameters are learned themselves, and `fit` finds the best ones in one pass over the data.

Source   variance as a second output: Nix, Weigend, "Estimating the mean and variance of the target
         probability distribution", 1994; mixtures: Bishop, "Mixture density networks", 1994, their
         temperature: Ha, Eck, arXiv:1704.03477.
"""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cgkernels
from cgkernels.random import STREAM_INITIAL, uniform
from cgkernels.rows import compute_dtype
from cgm.data import Dataset
from cgm.model import Config, Count, Density, Draws, Model, NotNegative, Positive, Step
from cgm.networks.residual import ConditionPlanes, ResidualConfig, ResidualUNet

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_LEAST_EXCESS = 1e-6  # of a fitted sigma over min_sigma, which softplus only comes near
_ROWS_AT_ONCE = 1024
_STEP_CHOICE, _STEP_VALUE = 0, 1  # of the noise: which component, or class; where around it


# Config -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class RegressionSampling(Config):
    """How a sample is drawn."""

    # Below 1 sharpens what is drawn from: each distribution to the power 1 / temperature, of a
    # mixture its weights and each of its parts; 0 takes the likeliest (of a mixture, part) alone.
    temperature: NotNegative = 1.0


# What all have ------------------------------------------------------------------------------------
def _normal(draws: Draws, like: Tensor) -> Tensor:
    """Noise (draws, B, *event) for parameters (B, *event)."""
    z = cgkernels.philox_normal(
        (len(draws.index), *like.shape[1:]), seed=draws.seed, index=draws.index, step=_STEP_VALUE,
        stream=STREAM_INITIAL, dtype=like.dtype,
    )  # fmt: skip
    return z.unflatten(0, (-1, draws.rows))


def _uniform(draws: Draws, shape: torch.Size, dtype: torch.dtype, step: int) -> Tensor:
    """Noise (draws, B, *shape)."""
    u = uniform(
        (len(draws.index), *shape), seed=draws.seed, index=draws.index, step=step,
        stream=STREAM_INITIAL, dtype=dtype,
    )  # fmt: skip
    return u.unflatten(0, (-1, draws.rows))


class Regression(Model):
    """Base of the four: a U-Net, or a table without a condition, gives parameters of distributions.

    Its parameters of a row are (parameters, outputs, H, W).
    """

    sampling_config: ClassVar[type[RegressionSampling]] = RegressionSampling
    is_density: ClassVar[bool] = True  # log_prob is of real numbers, not of bins or colors

    def __init__(self, config: ResidualConfig, start: Tensor) -> None:
        """start: (parameters, outputs), what every pixel has before it is trained."""
        super().__init__()
        self.config = config
        self.dimensions = math.prod(config.event_shape)
        self.parameter_shape = (*start.shape, *config.event_shape[1:])
        if config.cond_kind == "none":
            self.table = nn.Parameter(start[None, :, :, None, None].repeat(
                1, 1, 1, *config.event_shape[1:]
            ))  # fmt: skip
            return
        self.planes = ConditionPlanes(config)
        self.unet = ResidualUNet(
            self.planes.planes,
            start.numel(),
            width=config.width,
            depth=config.depth,
            blocks=config.blocks,
        )
        assert self.unet.conv_out.bias is not None
        with torch.no_grad():
            self.unet.conv_out.bias.copy_(start.flatten())

    def _log_probs(self, parameters: Tensor, y: Tensor) -> Tensor:
        """Log density, or mass, (B, outputs, H, W) of y by parameters (B, *parameter_shape)."""
        raise NotImplementedError

    def _mean(self, parameters: Tensor) -> Tensor:
        """The point prediction (B, C, H, W)."""
        raise NotImplementedError

    def _draw_values(self, parameters: Tensor, draws: Draws, temperature: float) -> Tensor:
        """Samples (draws, B, C, H, W)."""
        raise NotImplementedError

    def _losses(self, parameters: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {
            "total": -self._log_probs(parameters, y).flatten(1).sum(1) / self.dimensions,
            "squared": _row_mean((self._mean(parameters) - y).square()),
        }

    # Protocol -------------------------------------------------------------------------------------
    @property
    def density(self) -> Density | None:
        return "exact"

    def _loss(self, y: Tensor, cond: Tensor | None, step: Step) -> dict[str, Tensor]:
        """-log p(y | cond) divided by C H W, in nats; nothing in it is random.

        Returns {"total", "squared": mean squared error of the mean}; of `LeastSquares` and
        `QuantizedClassifier` what they say.
        """
        return self._losses(self._distribution(cond, len(y)), y)

    @torch.no_grad()
    def log_prob(self, y: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """Exact log p(y | cond) in nats, (B,): a density with respect to y in [-1, 1].

        Of `QuantizedClassifier` it is the mass of the bins or colors that y falls into.
        """
        self.check_inputs(y, cond)
        return self._log_probs(self._distribution(cond, len(y)), y).flatten(1).sum(1)

    def bits_per_dimension(
        self,
        y: Tensor,
        *,
        cond: Tensor | None = None,
        seed: int | Tensor = 0,
        index: Tensor | None = None,
    ) -> Tensor:
        """(B,): -log2 P(y | cond) of an image of 256 values, divided by the number of its values.

        P is the density times the distance of two values, 2 / 255: densities of this family are
        wider than that. Nothing is random.
        """
        nats = self.log_prob(y, cond=cond)
        if self.is_density:
            nats = nats + self.dimensions * math.log(2 / 255)
        return -nats / (self.dimensions * math.log(2))

    @torch.no_grad()
    def predict(self, *, cond: Tensor | None = None) -> Tensor:
        """The mean of p(y | cond), a point prediction: (B, C, H, W), without cond (1, C, H, W).

        It has the least squared error, and of several right answers lies between all of them. Of
        `LeastSquares` with error l1 it is the median instead.
        """
        self.check_cond(cond)
        return self._mean(self._distribution(cond)).to(self.dtype)

    def _draw(self, draws: Draws, options: RegressionSampling) -> Tensor:
        """Every value by itself; densities reach beyond [-1, 1], and so do their samples.

        The network runs once for each condition.
        """
        parameters = self._distribution(draws.cond)
        return self._draw_values(parameters, draws, options.temperature).flatten(0, 1)

    def _distribution(self, cond: Tensor | None, rows: int | None = None) -> Tensor:
        """The parameters, (rows, *parameter_shape) in float32 at least; rows: without cond 1."""
        if rows is None:
            rows = 1 if cond is None else len(cond)
        if cond is None:
            return self.table.to(compute_dtype(self.table)).expand(rows, -1, -1, -1, -1)
        out = self.unet(self.planes(cond, rows)).view(rows, *self.parameter_shape)
        return out.to(compute_dtype(out))

    # Closed forms ---------------------------------------------------------------------------------
    def _to_fit(self, data: Dataset | Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """The y of the data, some rows at a time."""
        seen = 0
        for y in batches(data):
            if isinstance(y, Tensor) and y.is_floating_point():
                y = y.to(self.table)
            self.check_y(y)
            if len(y):
                seen += len(y)
                yield y
        if not seen:
            raise ValueError("data must have a row")

    def _check_fit(self) -> None:
        if self.config.cond_kind != "none":
            raise ValueError(f"cond_kind must be none for a fit, got {self.config.cond_kind}")


def batches(data: Dataset | Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """The y of a data set, or those of a tensor, some at a time; batches as they come."""
    if isinstance(data, Dataset):
        for rows in torch.arange(len(data)).split(_ROWS_AT_ONCE):
            yield data.batch(rows)["y"]
    else:
        yield from data.split(_ROWS_AT_ONCE) if isinstance(data, Tensor) else data


def _row_mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


def _normal_log_density(y: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    return -0.5 * ((y - mean) / sigma).square() - sigma.log() - _HALF_LOG_2PI


def anneal(logits: Tensor, dim: int, temperature: float) -> Tensor:
    """Probabilities along dim to the power 1 / temperature, normalized; however near 0 that is."""
    return ((logits - logits.amax(dim, keepdim=True)) / temperature).softmax(dim)


def choose(logits: Tensor, draws: Draws, temperature: float) -> Tensor:
    """A class of each of logits (B, K, *event), (B, *event, draws), by the inverse of the CDF.

    One uniform each, so that probabilities are right within a few 2^-24. -1 where logits are no
    distribution, as NaN are.
    """
    logits = logits.movedim(1, -1)
    if temperature == 0:
        return likeliest(logits, -1)[..., None].expand(*logits.shape[:-1], draws.draws)
    cdf = anneal(logits, -1, temperature).cumsum(-1)
    u = _uniform(draws, logits.shape[1:-1], logits.dtype, _STEP_CHOICE).movedim(0, -1)
    # The last entry need not be 1, and u < 1 stays below it.
    chosen = torch.searchsorted(cdf, (u * cdf[..., -1:]).contiguous(), right=True)
    return torch.where(cdf[..., -1:].isfinite(), chosen, -1)


def likeliest(logits: Tensor, dim: int) -> Tensor:
    """The class of the largest logit along dim; -1 where they are no distribution."""
    largest, chosen = logits.max(dim)
    return torch.where(largest.isfinite(), chosen, -1)


# Least squares ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LeastSquaresConfig(ResidualConfig):
    """What is generated from what, the network, and the error."""

    # Error to make small: l2, squared, whose best prediction is the mean; l1, absolute: the median.
    error: Literal["l2", "l1"] = "l2"
    # Standard deviation of the noise around the prediction, normal for l2, Laplace for l1, that
    # makes it a density; 0: none, so that all samples of a condition are one.
    sigma: NotNegative = 0.0


class LeastSquares(Regression):
    """A point prediction; `loss`, `predict` and `sample`, and with a sigma `log_prob`."""

    family: ClassVar[str] = "least_squares"

    def __init__(self, config: LeastSquaresConfig) -> None:
        super().__init__(config, torch.zeros(1, config.event_shape[0]))
        self._warned = False

    def _losses(self, parameters: Tensor, y: Tensor) -> dict[str, Tensor]:
        """{"total", "squared", "absolute"}: mean errors of a row; the total is the chosen one."""
        error = self._mean(parameters) - y
        parts = {"squared": _row_mean(error.square()), "absolute": _row_mean(error.abs())}
        return {"total": parts["squared" if self.config.error == "l2" else "absolute"], **parts}

    def _mean(self, parameters: Tensor) -> Tensor:
        return parameters[:, 0]

    @property
    def density(self) -> Density | None:
        return "exact" if self.config.sigma else None

    def log_prob(self, y: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """As of all, of a model with a sigma; NotImplementedError without one."""
        if self.config.sigma == 0:
            raise NotImplementedError(
                "LeastSquares has a log_prob only with a sigma; it has predict and a loss"
            )
        return super().log_prob(y, cond=cond)

    def _log_probs(self, parameters: Tensor, y: Tensor) -> Tensor:
        mean, sigma = self._mean(parameters), self.config.sigma
        if self.config.error == "l2":
            return _normal_log_density(y, mean, torch.full_like(mean[:1], sigma))
        width = sigma / math.sqrt(2)
        return -(y - mean).abs() / width - math.log(2 * width)

    def _draw_values(self, parameters: Tensor, draws: Draws, temperature: float) -> Tensor:
        mean, sigma = self._mean(parameters), self.config.sigma
        if sigma == 0:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    "LeastSquares predicts one y for a condition: all samples of it are equal",
                    stacklevel=6,
                )
            return mean.expand(draws.draws, *mean.shape)
        if self.config.error == "l2":
            return mean + sigma * math.sqrt(temperature) * _normal(draws, mean)
        u = _uniform(draws, mean.shape[1:], mean.dtype, _STEP_VALUE)
        laplace = torch.where(u < 0.5, (2 * u).log(), -(2 * (1 - u)).log())
        return mean + sigma / math.sqrt(2) * temperature * laplace


# Gaussian -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class GaussianConfig(ResidualConfig):
    """What is generated from what, the network, and the narrowest density."""

    # Smallest standard deviation: where y is always the same, the likelihood has no other bound.
    min_sigma: Positive = 0.02


class GaussianRegression(Regression):
    """A normal density for each value; `loss`, `log_prob`, `predict`, `variance` and `sample`.

    Its parameters are mu and r, with sigma = min_sigma + ln(1 + e^r).
    """

    family: ClassVar[str] = "gaussian_regression"

    def __init__(self, config: GaussianConfig) -> None:
        super().__init__(config, torch.zeros(2, config.event_shape[0]))

    @torch.no_grad()
    def variance(self, *, cond: Tensor | None = None) -> Tensor:
        """Of each value, (B, C, H, W); (1, C, H, W) of no condition."""
        self.check_cond(cond)
        parameters = self._distribution(cond)
        return self._sigma(parameters).square().to(self.dtype)

    @torch.no_grad()
    def fit(self, data: Dataset | Tensor | Iterable[Tensor]) -> None:
        """Maximum likelihood without a condition: the mean and variance of each value of the data.

        data: a data set; y (N, C, H, W); or batches of y, of which one at a time is held.
        """
        self._check_fit()
        count = 0
        mean = square = torch.zeros((), dtype=torch.float64, device=self.table.device)
        for y in self._to_fit(data):
            y, count = y.double(), count + len(y)
            # Chan et al., 1983: of two parts, the squares about the common mean.
            difference = y.mean(0) - mean
            square = square + (y - y.mean(0)).square().sum(0)
            square = square + difference.square() * (len(y) * (count - len(y)) / count)
            mean = mean + difference * (len(y) / count)
        excess = ((square / count).sqrt() - self.config.min_sigma).clamp(min=_LEAST_EXCESS)
        self.table.copy_(torch.stack([mean, excess + (-(-excess).expm1()).log()]))

    def _mean(self, parameters: Tensor) -> Tensor:
        return parameters[:, 0]

    def _sigma(self, parameters: Tensor) -> Tensor:
        return self.config.min_sigma + F.softplus(parameters[:, 1])

    def _log_probs(self, parameters: Tensor, y: Tensor) -> Tensor:
        return _normal_log_density(y, self._mean(parameters), self._sigma(parameters))

    def _draw_values(self, parameters: Tensor, draws: Draws, temperature: float) -> Tensor:
        mean, sigma = self._mean(parameters), self._sigma(parameters)
        return mean + math.sqrt(temperature) * sigma * _normal(draws, mean)


# Mixture ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class MixtureConfig(GaussianConfig):
    """What is generated from what, the network, and the mixture of each value."""

    # Normal densities of each value.
    components: Count = 5


class MixtureDensity(Regression):
    """A mixture of normal densities for each value; `loss`, `log_prob`, `predict` and `sample`.

    Its parameters are K logits of the weights, K means, and K r as of `GaussianRegression`. At the
    start the means lie evenly in [-1, 1]: equal components would stay equal.
    """

    family: ClassVar[str] = "mixture_density"

    def __init__(self, config: MixtureConfig) -> None:
        k = config.components
        means = (torch.arange(k) + 0.5) * (2 / k) - 1
        width = torch.full((k,), math.log(math.expm1(1 / k)))  # sigma = min_sigma + 1 / K
        start = torch.cat([torch.zeros(k), means, width])
        super().__init__(config, start[:, None].repeat(1, config.event_shape[0]))

    def _parts(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, means and sigmas, (B, K, C, H, W) each."""
        logits, mean, width = parameters.chunk(3, dim=1)
        return logits, mean, self.config.min_sigma + F.softplus(width)

    def _mean(self, parameters: Tensor) -> Tensor:
        logits, mean, _ = self._parts(parameters)
        return (logits.softmax(1) * mean).sum(1)

    def _log_probs(self, parameters: Tensor, y: Tensor) -> Tensor:
        logits, mean, sigma = self._parts(parameters)
        return (logits.log_softmax(1) + _normal_log_density(y[:, None], mean, sigma)).logsumexp(1)

    def _draw_values(self, parameters: Tensor, draws: Draws, temperature: float) -> Tensor:
        logits, *parts = self._parts(parameters)
        chosen = choose(logits, draws, temperature)
        mean, sigma = (
            t.movedim(1, -1).gather(-1, chosen.clamp(min=0)).movedim(-1, 0) for t in parts
        )
        mean = mean.masked_fill(chosen.movedim(-1, 0) < 0, math.nan)
        return mean + math.sqrt(temperature) * sigma * _normal(draws, mean[0])
