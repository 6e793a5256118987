"""Variational autoencoders: p(y | cond) of a latent vector z, and the plain autoencoder before it.

    p(y | x) = int p(y | z, x) p(z | x) dz          x the condition, q(z | x, y) the encoder
    loss     = (-log p(y | z, x) + beta KL(q(z | x, y) | p(z | x))) / (C H W),    z from q
    elbo     = log 1 / K sum_k p(y | z_k, x) p(z_k | x) / q(z_k | x, y) <= log p(y | x),  K draws

The prior p(z | x) is the standard normal one, or one that a network makes of x. The decoder is a
U-Net from the condition to the image, which z modulates.

Source   Kingma, Welling, arXiv:1312.6114; conditions and learned priors: Sohn et al., "Learning
         structured output representation using deep conditional generative models", NIPS 2015;
         beta: Higgins et al., "beta-VAE", ICLR 2017; free bits and the discretized logistic:
         Kingma et al., arXiv:1606.04934; the bound of K draws: Burda et al., arXiv:1509.00519; one
         learned standard deviation: Rybkin et al., arXiv:2006.13202.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cgkernels
from cgkernels.random import STREAM_LATENTS, STREAM_SAMPLER, uniform
from cgkernels.rows import compute_dtype
from cgm.model import (
    Config,
    Count,
    Density,
    Draws,
    Interval,
    Model,
    NotNegative,
    Positive,
    PreciseBuffers,
    Step,
)
from cgm.networks.residual import (
    ConditionPlanes,
    ResidualConfig,
    ResidualEncoder,
    ResidualUNet,
)

_LOG_2PI = math.log(2 * math.pi)

Prior = tuple[Tensor, Tensor] | tuple[None, None]  # mean and log variance; None: standard normal


# Config -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LatentConfig(ResidualConfig):
    """What is generated from what, and the two networks."""

    # Numbers of the latent vector z.
    latents: Count = 16
    # Make z of means over all places of the image: where something is does not get into it.
    pooled: bool = False


@dataclass(frozen=True)
class VAEConfig(LatentConfig):
    """What is generated from what, the networks, the distributions and the objective."""

    # Prior of z: the standard normal one whatever the condition, or learned, made of it.
    prior: Literal["standard", "learned"] = "standard"
    # Distribution of y given z. bernoulli takes y in [-1, 1] for probabilities (y + 1) / 2;
    # discretized_logistic takes it for one of `levels`.
    likelihood: Literal["gaussian", "bernoulli", "discretized_logistic"] = "gaussian"
    # Standard deviation of the Gaussian, scale of the logistic; y is in [-1, 1].
    scale: Positive = 0.1
    # Learn that number, one for all pixels; `scale` is where it starts.
    learn_scale: bool = False
    # Values that y can have, evenly spaced from -1 to 1.
    levels: Annotated[int, Interval(2, ends="[)")] = 256
    # Weight of the divergence in the loss; with 1 the loss is the bound.
    beta: NotNegative = 1.0
    # Nats of divergence that each number of z has for nothing, so that it does not fall silent.
    free_bits: NotNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior == "learned" and self.cond_kind == "none":
            raise ValueError("prior must be standard without a condition, got learned")
        if self.learn_scale and self.likelihood == "bernoulli":
            raise ValueError("learn_scale must be False for bernoulli, which has no scale")


@dataclass(frozen=True)
class VAESampling(Config):
    """How an image is drawn."""

    # Factor of the spread of z around the middle of its prior; less than 1 is less varied.
    truncation: NotNegative = 1.0
    # Draw from p(y | z) instead of taking its mean: the samples of the model itself, but of a
    # image they are noisy.
    noise: bool = False


# Likelihoods --------------------------------------------------------------------------------------
# Each: log_prob(out, y) -> (B,) nats of what the decoder says, mean(out), and draw(out, ...); but
# for mean in float32 at least.
class GaussianLikelihood(PreciseBuffers):
    """N(out, scale^2) for each value."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.log_scale = _log_scale(config)

    def log_prob(self, out: Tensor, y: Tensor) -> Tensor:
        """A density with respect to y."""
        log_scale = self.log_scale.to(out.dtype)
        error = (y - out) * (-log_scale).exp()
        return -(0.5 * (error.square() + _LOG_2PI) + log_scale).flatten(1).sum(1)

    def mean(self, out: Tensor) -> Tensor:
        """Of y."""
        return out

    def draw(self, out: Tensor, seed: Tensor, index: Tensor) -> Tensor:
        """A sample of each row, by the noise of its number."""
        noise = cgkernels.philox_normal(
            tuple(out.shape), seed=seed, index=index, step=0, stream=STREAM_SAMPLER, dtype=out.dtype
        )
        return out + self.log_scale.to(out.dtype).exp() * noise


class BernoulliLikelihood(nn.Module):
    """y = 1 with probability 1 / (1 + exp(-out)), else -1; between them the cross-entropy."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()

    def log_prob(self, out: Tensor, y: Tensor) -> Tensor:
        """A probability if all y are -1 or 1."""
        share = (y + 1) / 2
        # Of F.binary_cross_entropy_with_logits a likely value has no gradient: sigmoid(out) - 1.
        logs = share * F.logsigmoid(out) + (1 - share) * F.logsigmoid(-out)
        return logs.flatten(1).sum(1)

    def mean(self, out: Tensor) -> Tensor:
        """Of y."""
        return torch.tanh(out / 2)

    def draw(self, out: Tensor, seed: Tensor, index: Tensor) -> Tensor:
        """A sample of each row, by the noise of its number."""
        u, share = _uniform(out, seed, index), out.sigmoid()
        drawn = torch.where(u < share, 1.0, -1.0).to(out.dtype)
        return torch.where(share.isnan(), share, drawn)  # which compares as false


class LogisticLikelihood(PreciseBuffers):
    """The share of a logistic density around out that is nearest to a value, for each value.

    Values v_0 = -1 .. v_n = 1 have the borders between them in the middle, and the outermost none
    beyond: P(v_i) = S(b_i) - S(a_i), a, b = (v_i -+ 1 / n - out) / scale and S(x) = 1 / (1 + e^-x).
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.gaps = config.levels - 1
        self.log_scale = _log_scale(config)

    def log_prob(self, out: Tensor, y: Tensor) -> Tensor:
        """The probability of the values nearest to y.

        S(b) - S(a) = S(b) S(-a) (1 - exp(a - b)), which loses no digits wherever y is; in float64,
        for the borders of a narrow density and the slopes of a wide one.
        """
        number = ((y + 1) / 2 * self.gaps).round().clamp(0, self.gaps).double()
        dtype, out, per_scale = out.dtype, out.double(), (-self.log_scale.double()).exp()
        middle = (2 * number / self.gaps - 1 - out) * per_scale
        half = per_scale / self.gaps
        below, above = F.logsigmoid(middle + half), F.logsigmoid(half - middle)
        # The outermost reach to infinity.
        inside = below + above + torch.log(-torch.expm1(-2 * half))
        logs = torch.where(number == 0, below, torch.where(number == self.gaps, above, inside))
        return logs.flatten(1).sum(1).to(dtype)

    def mean(self, out: Tensor) -> Tensor:
        """Of the density, as far as there are values."""
        return out.clamp(-1, 1)

    def draw(self, out: Tensor, seed: Tensor, index: Tensor) -> Tensor:
        """A sample of each row, by the noise of its number."""
        y = out + self.log_scale.to(out.dtype).exp() * _uniform(out, seed, index).logit()
        number = ((y + 1) / 2 * self.gaps).round().clamp(0, self.gaps)
        return 2 * number / self.gaps - 1


_LIKELIHOODS: dict[str, Any] = {
    "gaussian": GaussianLikelihood,
    "bernoulli": BernoulliLikelihood,
    "discretized_logistic": LogisticLikelihood,
}


Likelihood = GaussianLikelihood | BernoulliLikelihood | LogisticLikelihood


def _log_scale(config: VAEConfig) -> Tensor:
    log_scale = math.log(config.scale)
    if config.learn_scale:
        return nn.Parameter(torch.tensor(log_scale))
    return nn.Buffer(torch.tensor(log_scale, dtype=torch.float32))


def _uniform(like: Tensor, seed: Tensor, index: Tensor) -> Tensor:
    return uniform(
        tuple(like.shape), seed=seed, index=index, step=0, stream=STREAM_SAMPLER, dtype=like.dtype
    )


# Networks -----------------------------------------------------------------------------------------
class LatentModel(Model):
    """What both models have: planes of the condition, an encoder to numbers, a decoder from them.

    features: numbers that the encoder gives.
    """

    def __init__(self, config: LatentConfig, features: int) -> None:
        super().__init__()
        self.config = config
        channels = config.event_shape[0]
        self.planes = ConditionPlanes(config)
        self.encoder = self._encoder(channels + self.planes.planes, features)
        self.decoder = ResidualUNet(
            self.planes.planes,
            channels,
            width=config.width,
            depth=config.depth,
            blocks=config.blocks,
            features=config.latents,
            start_at_zero=False,  # or the decoder is deaf to z, which would fall silent
        )

    def _encoder(self, in_channels: int, features: int) -> ResidualEncoder:
        config = self.config
        return ResidualEncoder(
            in_channels, config.event_shape[1:], features, width=config.width,
            depth=config.depth, pooled=config.pooled,
        )  # fmt: skip

    def _encode_image(self, y: Tensor, planes: Tensor) -> Tensor:
        return self.encoder(torch.cat([y, planes], 1))

    def _check_latents(self, z: Tensor, cond: Tensor | None) -> None:
        self._check_image("z", z, None, (self.config.latents,), bounded=False)
        self.check_cond(cond, len(z))


# Variational --------------------------------------------------------------------------------------
class ConditionalVAE(LatentModel):
    """Images of any condition, or of none; `loss`, `elbo` and `sample` of all families."""

    family: ClassVar[str] = "vae"
    sampling_config: ClassVar[type[VAESampling]] = VAESampling
    training_defaults: ClassVar[dict[str, Any]] = {"batch_size": 64}

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config, 2 * config.latents)
        self.prior = None
        if config.prior == "learned":
            self.prior = self._encoder(self.planes.planes, 2 * config.latents)
        self.likelihood: Likelihood = _LIKELIHOODS[config.likelihood](config)

    # Loss -----------------------------------------------------------------------------------------
    @property
    def density(self) -> Density:
        return "bound"

    def _loss(self, y: Tensor, cond: Tensor | None, step: Step) -> dict[str, Tensor]:
        """(reconstruction + beta kl) / (C H W) of each example, by one draw of z.

        The draw is random. Returns {"total", "reconstruction": -log p(y | z, x), "kl": with free
        bits in the place of less}, the two parts in nats of the whole image.
        """
        config, planes = self.config, self.planes(cond, len(y))
        mean, log_variance = self._encode_image(y, planes).chunk(2, 1)
        prior_mean, prior_log_variance = self._prior(planes)
        z, kl = cgkernels.sample_and_kl(
            mean, log_variance, prior_mean=prior_mean, prior_log_variance=prior_log_variance,
            seed=step.seed, index=step.index, step=0, free_bits=config.free_bits,
        )  # fmt: skip
        reconstruction = -self.likelihood.log_prob(
            _at_least_float32(self.decoder(planes, z)), _at_least_float32(y)
        )
        total = (reconstruction + config.beta * kl) / math.prod(config.event_shape)
        return {"total": total, "reconstruction": reconstruction, "kl": kl}

    @torch.no_grad()
    def elbo(
        self,
        y: Tensor,
        *,
        cond: Tensor | None = None,
        seed: int | Tensor = 0,
        index: Tensor | None = None,
        draws: int = 1,
    ) -> Tensor:
        """A lower bound of log p(y | cond) in nats, (B,), of so many draws of z.

        Each is a random number, a function of (seed, index), whose expectation is below log p; the
        bound of more draws is closer. With one draw the divergence is exact instead of drawn.
        Without beta and free bits, which belong to the loss.
        """
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise ValueError(f"draws must be an int of at least 1, got {draws!r}")
        self.check_inputs(y, cond)
        planes = self.planes(cond, len(y))
        mean, log_variance = self._encode_image(y, planes).chunk(2, 1)
        prior_mean, prior_log_variance = self._prior(planes)
        logs = []
        for draw in range(draws):
            z, kl = cgkernels.sample_and_kl(
                mean, log_variance, prior_mean=prior_mean, prior_log_variance=prior_log_variance,
                seed=seed, index=index, step=draw,
            )  # fmt: skip
            log_weight = self.likelihood.log_prob(
                _at_least_float32(self.decoder(planes, z)), _at_least_float32(y)
            )
            if draws == 1:
                return log_weight - kl
            prior = _log_normal(z, prior_mean, prior_log_variance)
            logs.append(log_weight + prior - _log_normal(z, mean, log_variance))
        return torch.stack(logs).logsumexp(0) - math.log(draws)

    def log_prob(self, y: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """NotImplementedError: what there is, is a bound."""
        raise NotImplementedError(
            "ConditionalVAE has no exact log_prob; it has elbo, a bound below it"
        )

    # Latent vectors -------------------------------------------------------------------------------
    @torch.no_grad()
    def encode(self, y: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z | x, y), both (B, latents)."""
        self.check_inputs(y, cond)
        mean, log_variance = self._encode_image(y, self.planes(cond, len(y))).chunk(2, 1)
        return mean.to(self.dtype), log_variance.to(self.dtype)

    @torch.no_grad()
    def decode(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """The mean of p(y | z, x), (B, C, H, W), of z (B, latents)."""
        self._check_latents(z, cond)
        return self.likelihood.mean(self.decoder(self.planes(cond, len(z)), z)).to(self.dtype)

    def _prior(self, planes: Tensor) -> Prior:
        if self.prior is None:
            return None, None
        mean, log_variance = self.prior(planes).chunk(2, 1)
        return mean, log_variance

    # Sampling -------------------------------------------------------------------------------------
    def _draw(self, draws: Draws, options: VAESampling) -> Tensor:
        """The prior's network runs once for each condition."""
        z = options.truncation * cgkernels.philox_normal(
            (len(draws.index), self.config.latents), seed=draws.seed, index=draws.index, step=0,
            stream=STREAM_LATENTS, dtype=self.dtype,
        )  # fmt: skip
        planes = self.planes(draws.cond, draws.rows)
        mean, log_variance = self._prior(planes)
        if mean is not None:
            assert log_variance is not None
            z = draws.repeat(mean) + draws.repeat((0.5 * log_variance).exp()) * z
        out, likelihood = self.decoder(draws.repeat(planes), z), self.likelihood
        if options.noise:
            return likelihood.draw(_at_least_float32(out), draws.seed, draws.index)
        return likelihood.mean(out)


def _at_least_float32(t: Tensor) -> Tensor:
    """At least float32: under autocast networks give less, and a likelihood is a large sum."""
    return t.to(compute_dtype(t))


def _log_normal(z: Tensor, mean: Tensor | None, log_variance: Tensor | None) -> Tensor:
    """log N(z; mean, exp(log_variance)), (B,); None: standard normal."""
    z = _at_least_float32(z)
    if mean is None or log_variance is None:
        return -0.5 * (z.square() + _LOG_2PI).sum(1)
    log_variance = _at_least_float32(log_variance)
    error = (z - mean).square() * (-log_variance).exp()
    return -0.5 * (error + log_variance + _LOG_2PI).sum(1)


# Plain --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class AutoencoderConfig(LatentConfig):
    """What is encoded, given what, and the two networks."""


class Autoencoder(LatentModel):
    """The ancestor: y to z and back. It knows no distribution of z, so nothing can be drawn."""

    family: ClassVar[str] = "autoencoder"

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config, config.latents)

    def _loss(self, y: Tensor, cond: Tensor | None, step: Step) -> dict[str, Tensor]:
        """{"total"}: the mean squared error of each y (B, C, H, W); nothing in it is random."""
        planes = self.planes(cond, len(y))
        error = _at_least_float32(self.decoder(planes, self._encode_image(y, planes))) - y
        return {"total": error.square().flatten(1).mean(1)}

    @torch.no_grad()
    def encode(self, y: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """z (B, latents) of y (B, C, H, W)."""
        self.check_inputs(y, cond)
        return self._encode_image(y, self.planes(cond, len(y))).to(self.dtype)

    @torch.no_grad()
    def decode(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """y (B, C, H, W) of z (B, latents)."""
        self._check_latents(z, cond)
        return self.decoder(self.planes(cond, len(z)), z).to(self.dtype)

    def reconstruct(self, y: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """What is left of y (B, C, H, W) after it was z."""
        return self.decode(self.encode(y, cond=cond), cond=cond)

    def log_prob(self, y: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """NotImplementedError: it is no model of a distribution."""
        raise NotImplementedError("Autoencoder has no log_prob; it has reconstruct and a loss")

    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        """NotImplementedError: there is nothing to draw z from."""
        raise NotImplementedError("Autoencoder has no sample; it has reconstruct, and vae draws")
