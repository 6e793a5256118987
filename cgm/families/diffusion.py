"""Conditional diffusion: a denoiser p(y | cond), trained by noise prediction, sampled by solvers.

    x_t = alpha_t y + sigma_t z       loss = weight_t mean((network(x_t, t, cond) - target)^2)

Condition: class ids, an image concatenated to the input, tokens by cross-attention, or none.
Source   DDPM arXiv:2006.11239; v prediction arXiv:2202.00512; classifier-free guidance
         arXiv:2207.12598; learned variance arXiv:2102.09672; min-SNR weights arXiv:2303.09556.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

import cgkernels
from cgkernels.functions import expm1_minus, log_ndtr
from cgkernels.random import (
    STREAM_CONDITION_DROPOUT,
    STREAM_INITIAL,
    STREAM_TRAINING,
    uniform,
)
from cgkernels.samplers import make_schedule, make_table, x0_coefficients
from cgm.model import (
    Config,
    Count,
    Draws,
    GuidedConfig,
    Interval,
    Model,
    Natural,
    NotNegative,
    Step,
)
from cgm.networks.unet import KeysValues, UNet
from cgm.sampling.cuda_graph import capture


# Config -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class DiffusionConfig(GuidedConfig):
    """What is generated from what, the network, and what it learns."""

    # Channels of the U-Net at full resolution.
    width: Count = 32
    # Channels at each resolution as a multiple of `width`; each is half of the one above.
    width_multipliers: tuple[Count, ...] = (1, 2)
    # Residual blocks of a resolution.
    blocks: Count = 2
    # Self-attention (and cross-attention to tokens) in this many of the lowest resolutions.
    attention_depth: Natural = 1
    # Attention heads.
    heads: Count = 4
    # Side of the squares of pixels that enter the U-Net as one.
    patch: Count = 2

    # Timesteps of the noise schedule.
    timesteps: Annotated[int, Interval(1, 2**20)] = 1000
    # Noise schedule.
    schedule: Literal["linear", "scaled_linear", "cosine", "sigmoid"] = "cosine"
    # Shift the schedule so that its last timestep is noise alone.
    zero_terminal_snr: bool = False
    # What the network predicts.
    prediction: Literal["epsilon", "x0", "v"] = "v"
    # Weight of each timestep in the loss.
    weighting: Literal["none", "min_snr"] = "min_snr"
    # Predict the variance of the steps too, for the sampler ddpm.
    learned_variance: bool = False
    # Weight of the variational bound, from which the variance is learned.
    bound_weight: NotNegative = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.width_multipliers:
            raise ValueError("width_multipliers must have a number for each resolution, got ()")
        if self.attention_depth > len(self.width_multipliers):
            raise ValueError(
                f"attention_depth must be from 0 to {len(self.width_multipliers)}, the number of "
                f"width_multipliers, got {self.attention_depth}"
            )
        if any(n % self.patch for n in self.event_shape[1:]):
            raise ValueError(
                f"patch must divide height and width {self.event_shape[1:]}, as 1 does, "
                f"got {self.patch}"
            )
        if self.prediction == "epsilon" and self.zero_terminal_snr:
            raise ValueError("prediction must be x0 or v with zero_terminal_snr, got epsilon")


@dataclass(frozen=True)
class SamplingConfig(Config):
    """How `ConditionalDiffusion.sample` solves."""

    # Solver.
    sampler: Literal["ddpm", "ddim", "euler", "euler_ancestral", "dpmpp_2m"] = "ddim"
    # Number of steps, each one call of the network.
    steps: Count = 50
    # Guidance scale s of u + s (c - u); 1 is the plain conditional model and half the work.
    guidance: float = 1.0
    # Which of the training timesteps are used.
    spacing: Literal["leading", "linspace", "trailing"] = "trailing"
    # Noise of ddim: 0 is deterministic, 1 as much as ddpm.
    eta: Annotated[float, Interval(0, 1)] = 0.0
    # Variance of ddpm; a model with a learned variance uses that one.
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small"
    # Clip each prediction of y to the range of the data, [-1, 1].
    clip: bool = True
    # On a GPU, replay one captured step instead of launching every kernel.
    graph: bool = True


# Model --------------------------------------------------------------------------------------------
class ConditionalDiffusion(Model):
    """Diffusion model of p(y | cond); `loss` and `sample` follow the protocol of all families."""

    family: ClassVar[str] = "diffusion"
    sampling_config: ClassVar[type[SamplingConfig]] = SamplingConfig

    noise_table: Tensor  # (T, 2): alpha_t, sigma_t
    loss_weights: Tensor  # (T,)
    bound_table: Tensor  # (T, 6), with a learned variance

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.event_shape[0]
        tokens = config.cond_kind == "tokens"
        self.unet = UNet(
            in_channels=channels + (config.cond_shape[0] if config.cond_kind == "image" else 0),
            out_channels=channels * (2 if config.learned_variance else 1),
            width=config.width,
            width_multipliers=tuple(config.width_multipliers),
            blocks=config.blocks,
            attention_depth=config.attention_depth,
            heads=config.heads,
            patch=config.patch,
            num_classes=config.num_classes if config.cond_kind == "class" else 0,
            vocabulary=config.num_classes if tokens else 0,
            token_length=config.cond_shape[0] if tokens else 0,
        )
        self.schedule = make_schedule(
            config.schedule, config.timesteps, zero_terminal_snr=config.zero_terminal_snr
        )
        weights = self.schedule.loss_weights(config.prediction, config.weighting)
        self.register_buffer("noise_table", self.schedule.training_table(), persistent=False)
        self.register_buffer("loss_weights", weights, persistent=False)
        if config.learned_variance:
            bound = _bound_table(self.schedule.alphas_cumprod, config.prediction)
            self.register_buffer("bound_table", bound, persistent=False)

    # Loss -----------------------------------------------------------------------------------------
    def _loss(self, y: Tensor, cond: Tensor | None, step: Step) -> dict[str, Tensor]:
        """Denoising loss of each example at one random timestep.

        Noise, timestep and condition dropout are random. Returns {"total", "denoising"}, with a
        learned variance also "bound", in bits per dimension.
        """
        config, rows = self.config, len(y)
        draws: dict[str, Any] = {"seed": step.seed, "index": step.index}
        u = uniform((rows,), step=1, stream=STREAM_TRAINING, dtype=torch.float32, **draws)
        t = (u * config.timesteps).long()
        noise: dict[str, Any] = {
            "table": self.noise_table, "t": t, "target": config.prediction, **draws
        }  # fmt: skip
        x_t, _ = cgkernels.add_noise(y, **noise)
        null = self._null_cond(rows)
        if cond is None:
            cond = null
        elif null is not None and config.cond_dropout > 0:
            u = uniform((rows,), step=0, stream=STREAM_CONDITION_DROPOUT, **draws)
            drop = (u < config.cond_dropout).view(-1, *(1,) * (cond.dim() - 1))
            cond = torch.where(drop, null, cond)
        ids = {"class": "classes", "tokens": "tokens"}.get(config.cond_kind)
        seen = torch.cat([x_t, cond], 1) if cond is not None and ids is None else x_t
        out = self.unet(seen, t=t, **({} if ids is None else {ids: cond}))
        prediction = out[:, : y.shape[1]]
        denoising = cgkernels.diffusion_loss(prediction, y, weight=self.loss_weights[t], **noise)
        parts = {"total": denoising, "denoising": denoising}
        if config.learned_variance:
            bound = self._bound(y, x_t, prediction.detach(), out[:, y.shape[1] :], t)
            parts["bound"] = bound
            parts["total"] = denoising + config.bound_weight * config.timesteps * bound
        return parts

    def _bound(self, y: Tensor, x_t: Tensor, prediction: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """The term of timestep t of the variational bound, bits per dimension, (B,).

        KL(q(x_{t-1} | x_t, y) || p(x_{t-1} | x_t)), at t = 0 the discretized -log p(y | x_0).
        arXiv:2102.09672, section 3.1.
        """
        y, x_t, prediction, v = (a.float() for a in (y, x_t, prediction, v))
        a0, a1, from_y, from_x, log_small, log_ratio = self.bound_table[t].T[..., None, None, None]
        y_hat = (a0 * x_t + a1 * prediction).clamp(-1, 1)
        excess = (v + 1) / 2 * log_ratio  # of the logarithm of the variance over the true one
        log_variance = log_small + excess
        distance = from_y * (y - y_hat)  # between the two means
        mean = from_y * y_hat + from_x * x_t
        kl = 0.5 * (expm1_minus(-excess) + distance.square() * (-log_variance).exp())
        nll = -_log_discretized_normal(y, mean, log_variance)
        terms = torch.where((t == 0)[:, None, None, None], nll, kl)
        return terms.flatten(1).mean(1) / math.log(2)

    # Sampling -------------------------------------------------------------------------------------
    def _guidance(self, options: SamplingConfig) -> float:
        return options.guidance

    def _draw(self, draws: Draws, options: SamplingConfig) -> Tensor:
        """In [-1, 1]."""
        return _Run(self, draws, options).solve()

    # Conditions -----------------------------------------------------------------------------------
    def _null_cond(self, rows: int) -> Tensor | None:
        """What stands for "no condition": the id after the last, or an empty image."""
        config, device = self.config, self.noise_table.device
        if config.cond_kind == "none":
            return None
        if config.cond_kind == "image":
            return torch.zeros(rows, *config.cond_shape, dtype=self.dtype, device=device)
        return torch.full((rows, *config.cond_shape), config.num_classes, device=device)

    def _encode(
        self, cond: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, list[KeysValues] | None]:
        """What the U-Net needs of a condition: FiLM part, image, context of the tokens."""
        if cond is None:
            return None, None, None
        if self.config.cond_kind == "class":
            return self.unet.class_film(cond), None, None
        if self.config.cond_kind == "image":
            return None, cond, None
        return None, None, self.unet.token_context(cond)

    def _highest_id(self) -> int:
        return self.config.num_classes - (self.config.cond_kind == "class")  # tokens may be padded


class _Run:
    """One run of a solver: tensors that stay where they are, so that a step can be a CUDA graph.

    The network's input is one buffer: with guidance its first half is unconditional, its second
    conditional; of its channels the first are the state, the rest a condition image that stays.
    """

    def __init__(self, model: ConditionalDiffusion, draws: Draws, options: SamplingConfig) -> None:
        cond, index = draws.cond, draws.index
        config, device, rows = model.config, index.device, index.shape[0]
        learned = config.learned_variance and options.sampler == "ddpm"
        plan = make_table(
            options.sampler,
            model.schedule,
            steps=options.steps,
            prediction=config.prediction,
            spacing=options.spacing,
            clip=(-1.0, 1.0) if options.clip else None,
            eta=options.eta,
            variance="learned_range" if learned else options.variance,
        )
        self.unet, self.options, self.learned = model.unet, options, learned
        self.dtype = model.dtype
        self.channels = config.event_shape[0]
        self.guided = draws.guidance is not None or options.guidance != 1
        # The state of a float64 model is float64, of any other float32.
        dtype = torch.float64 if model.noise_table.dtype == torch.float64 else torch.float32
        if draws.guidance is None:
            self.scale = torch.full((), float(options.guidance), dtype=dtype, device=device)
        else:
            self.scale = draws.guidance.to(dtype)
        self.index = index
        self.seed = draws.seed
        self.table = plan.table.to(device, dtype)
        self.noise_seed = self.seed if plan.stochastic else None
        self.initial_scale = plan.initial_scale
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)

        # Everything that does not change from step to step is made here, in one batch.
        self.time = self.unet.time_film(plan.timesteps.to(device))
        batch = model._null_cond(rows) if cond is None else cond
        conditions = 0 if batch is None else batch.shape[0]
        order = torch.arange(rows, device=device) % max(1, conditions)  # one condition, many draws
        null = model._null_cond(conditions)
        if self.guided and batch is not None and null is not None:
            batch = torch.cat([null, batch])
            order = torch.cat([order, conditions + order])
        film, image, context = model._encode(batch)
        film = None if film is None else film[order]
        image = None if image is None else image[order]
        self.context = None if context is None else [(k[order], v[order]) for k, v in context]
        total = rows * (1 + self.guided)
        self.cond_film = self.time.new_zeros(1, self.time.shape[1]) if film is None else film
        state = torch.empty(total, *config.event_shape, dtype=dtype, device=device)
        self.input = state if image is None else torch.cat([state, image], 1)
        self.x = self.input[:rows, : self.channels]
        self.twin = self.input[rows:, : self.channels] if self.guided else None
        self.history = torch.zeros_like(state[:rows]) if plan.history else None

    def solve(self) -> Tensor:
        """Run all steps and return the state."""
        step: Callable[[], None] = self._step
        if self.options.graph and self.index.is_cuda:
            self._start()
            step = capture(self._step, self.index.device)
        self._start()
        for _ in range(self.options.steps):
            step()
        return self.x.clone()

    def _start(self) -> None:
        z = cgkernels.philox_normal(
            tuple(self.x.shape),
            seed=self.seed,
            index=self.index,
            step=0,
            stream=STREAM_INITIAL,
            dtype=self.x.dtype,
        )
        self.x.copy_(z * self.initial_scale)
        if self.twin is not None:
            self.twin.copy_(self.x)
        if self.history is not None:
            self.history.zero_()
        self.counter.zero_()

    def _step(self) -> None:
        film = self.time.index_select(0, self.counter) + self.cond_film
        film = film.expand(self.input.shape[0], -1)
        out = self.unet(self.input.to(self.dtype), film, self.context)
        rows = self.x.shape[0]
        cgkernels.guided_step_(
            self.x,
            out[:, : self.channels],
            table=self.table,
            step=self.counter[0],
            scale=self.scale,
            log_variance=out[-rows:, self.channels :] if self.learned else None,
            h1=self.history,
            seed=self.noise_seed,
            index=self.index if self.noise_seed is not None else None,
            twin=self.twin,
        )
        self.counter.add_(1)


# Learned variance ---------------------------------------------------------------------------------
def _bound_table(alphas_cumprod: np.ndarray, prediction: str) -> Tensor:
    """(T, 6) float32: y = a0 x_t + a1 prediction; of q(x_{t-1} | x_t, y) factors and logarithms.

    The last four are the factors of y and of x_t in its mean, log beta~ and log (beta / beta~).
    """
    before = np.append(1.0, alphas_cumprod[:-1])
    beta = 1 - alphas_cumprod / before
    small = (1 - before) / (1 - alphas_cumprod) * beta
    if len(small) > 1:
        small[0] = small[1]  # it is 0, and its step is the discretized likelihood
    columns = (
        *x0_coefficients(prediction, np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)),
        np.sqrt(before) * beta / (1 - alphas_cumprod),
        np.sqrt(alphas_cumprod / before) * (1 - before) / (1 - alphas_cumprod),
        np.log(small),
        np.log(beta / small),
    )
    return torch.from_numpy(np.stack(columns, 1)).float()


def _log_discretized_normal(y: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability of the bin of width 2 / 255 around y; the outermost bins are unbounded.

    In float64, and by logarithms of the tail in which the bin lies: log P = log Phi(b) +
    log(1 - Phi(a) / Phi(b)) with a, b its borders or, above the mean, -b, -a. A bin that is narrow
    for the density has that of its middle, (b - a) phi(m) (1 + (b - a)^2 (m^2 - 1) / 24).
    """
    out = y.dtype
    y, mean, log_variance = y.double(), mean.double(), log_variance.double()
    scale = (-0.5 * log_variance).exp()
    middle, half = (y - mean) * scale, scale / 255
    narrow = half < 1e-3
    # Of the form that is not taken no gradient: it may be of a difference of 0, or of infinity.
    wide, flat = torch.where(narrow, 1.0, half), torch.where(narrow, middle, 0.0)
    near = log_ndtr(wide - middle.abs())
    far = log_ndtr(-wide - middle.abs())
    inside = near + (-torch.expm1(far - near)).log()
    width = math.log(2 / 255 / math.sqrt(2 * math.pi)) - 0.5 * log_variance
    density = width + half.clamp(max=1e-3).square() * (flat.square() - 1) / 6 - flat.square() / 2
    logs = torch.where(narrow, density, inside)
    logs = torch.where(y > 0.999, log_ndtr(half - middle), logs)
    return torch.where(y < -0.999, log_ndtr(half + middle), logs).to(out)
