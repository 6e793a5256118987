"""Conditional energy-based model: p(y | cond) up to a constant, sampled by Langevin steps.

    p(y | cond) = exp(-E(y, cond)) / Z(cond)
    E = f / T                f = network(y, cond) + T / (2 r^2) |y|^2
    sampling                 y <- clamp(y - a df/dy, -bound, bound) + sqrt(2 a T) z
    loss                     f(y + s z, cond) - f(y~, cond~)
                             + w (f(y + s z, cond)^2 + f(y~, cond~)^2)

The loss is contrastive divergence: its first two terms have the gradient of -T log p where y~ is a
sample. y~ is where a chain of Langevin steps has come to which began at noise r z and has gone on
from one training step to the next, with the condition that it began with: a buffer keeps the
chains. The last term of f is the normal density of that noise: a network of 0 has it as its
samples, directions that the network does not look at keep it, and there is a Z, whatever the
network is.

Nothing here is an exact likelihood. `energy` is -log p up to a constant of each condition, in which
two candidates can be compared, `log_ratio`; `log_partition` estimates log Z of tiny cases.

Source   contrastive divergence: Hinton, "Training products of experts by minimizing contrastive
         divergence", 2002; chains that persist: Tieleman, ICML 2008; Langevin steps, buffer and
         the weight w: Du, Mordatch, arXiv:1903.08689; noise on the data: Nijkamp et al.,
         arXiv:1903.12370.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cgkernels
from cgkernels.checks import check_shape
from cgkernels.random import STREAM_INITIAL, STREAM_POOL, STREAM_TRAINING, uniform
from cgkernels.rows import compute_dtype
from cgm.model import (
    Config,
    Count,
    Density,
    Depth,
    Draws,
    ImageConfig,
    Interval,
    Model,
    Natural,
    NotNegative,
    Positive,
    PreciseBuffers,
    Step,
)
from cgm.networks.layers import space_to_depth
from cgm.networks.residual import ConditionPlanes
from cgm.sampling.langevin import annealed_weights, langevin


# Config -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class EnergyConfig(ImageConfig):
    """What is generated from what, the network, and the chains that it learns from."""

    # Channels at full resolution; twice as many at each resolution below.
    width: Count = 16
    # Resolutions, each half of the one above, rounded up.
    depth: Depth = 3
    # Units of the layer that sees the whole image.
    hidden: Count = 128
    # Side of the squares of pixels that enter the network as one; 1 where sides are odd.
    patch: Count = 2

    # Temperature T: the density is exp(-f / T). The more values an image has, the less it should
    # be: f does not grow with them.
    temperature: Positive = 2e-4
    # Length a of a Langevin step: a step adds noise of the variance 2 a T.
    step_size: Positive = 5.0
    # Langevin steps of the chains in a training step.
    chain_steps: Count = 10
    # Standard deviation r of the noise that chains begin with.
    start_std: Positive = 0.5
    # What a step leads to is clamped to [-bound, bound].
    bound: Positive = 2.0
    # Chains that are kept from one training step to the next; 0: all begin anew.
    chains: Natural = 512
    # Share of them that begin anew when their turn comes.
    renewal: Annotated[float, Interval(0, 1)] = 0.05
    # Standard deviation s of the noise on the data.
    data_noise: NotNegative = 0.1
    # Weight w of the squares of f, which keep it near 0.
    square_weight: NotNegative = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(n % self.patch for n in self.event_shape[1:]):
            raise ValueError(
                f"patch must divide height and width {self.event_shape[1:]}, as 1 does, "
                f"got {self.patch}"
            )


@dataclass(frozen=True)
class EnergySampling(Config):
    """How `ConditionalEBM.sample` draws."""

    # Langevin steps. A chain of the training lives chain_steps / renewal of them on average, and of
    # what comes later training knows less.
    steps: Natural = 300
    # Length of a step; 0: that of the training.
    step_size: NotNegative = 0.0
    # Temperature as a multiple of the model's: below 1 samples are more likely, and less varied.
    temperature: NotNegative = 1.0
    # On a GPU, replay one captured step instead of launching every kernel.
    graph: bool = True


# Network ------------------------------------------------------------------------------------------
class EnergyNetwork(nn.Module):
    """One number of an image: residual blocks, each after the first at half the resolution.

    It is the sum of one number of each place of each resolution, divided by the root of the number
    of places, and of one of all places of the last. So a value has its own part in the energy, and
    a force of its own: through a layer that knows the whole image alone it learns that slowly.
    Without normalization: a norm would take off what tells an image from a stronger one, and of a
    single pixel all there is. SiLU throughout, so that there is a gradient everywhere.

    Args:
        in_channels: of x.
        sides: (H, W) of x.
        width: channels at full resolution; twice as many at each resolution below.
        depth: resolutions, each half of the one above, rounded up.
        hidden: units of the layer that sees all of the last resolution.
        patch: side of the squares of pixels that enter as one; must divide the sides.
    """

    def __init__(
        self,
        in_channels: int,
        sides: tuple[int, int],
        *,
        width: int,
        depth: int,
        hidden: int,
        patch: int,
    ) -> None:
        super().__init__()
        self.patch = patch
        widths = [width * 2**level for level in range(depth)]
        self.conv_in = nn.Conv2d(in_channels * patch**2, width, 3, padding=1)
        self.down = nn.ModuleList(
            _Block(widths[max(level - 1, 0)], widths[level]) for level in range(depth)
        )
        height, wide = (-(-side // patch // 2 ** (depth - 1)) for side in sides)
        self.places = nn.ModuleList(nn.Conv2d(n, 1, 1) for n in [width, *widths])
        self.dense = nn.Linear(widths[-1] * height * wide, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B,) of x (B, in_channels, H, W), float32 at least: it is a large sum."""
        h = space_to_depth(x, self.patch).contiguous(memory_format=torch.channels_last)
        features = [self.conv_in(h)]
        for level, block in enumerate(self.down):
            h = features[-1]
            features.append(block(F.avg_pool2d(h, 2, ceil_mode=True) if level else h))
        features = [F.silu(h) for h in features]
        total = self.out(F.silu(self.dense(features[-1].flatten(1))))[:, 0]
        total = total.to(compute_dtype(total))
        for place, h in zip(self.places, features, strict=True):
            parts = place(h).flatten(1).to(total.dtype)
            total = total + parts.sum(1) / math.sqrt(math.prod(h.shape[2:]))
        return total


class _Block(nn.Module):
    """skip(x) + conv(silu(conv(silu(x))))."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.conv2(F.silu(self.conv1(F.silu(x))))


class Chains(PreciseBuffers):
    """Chains that wait for their next training step, each with its condition, in turn.

    A training step takes the B that have waited longest. What is kept is state of the training, in
    its checkpoint and not in that of the model.
    """

    def __init__(self, config: EnergyConfig) -> None:
        super().__init__()
        self.size, self.renewal = config.chains, config.renewal
        dtype = torch.int64 if config.cond_kind == "class" else torch.float32
        cond = torch.zeros(self.size, *config.cond_shape, dtype=dtype)
        y = torch.zeros(self.size, *config.event_shape, dtype=torch.float32)
        self.y = nn.Buffer(y, persistent=False)
        self.cond = nn.Buffer(cond, persistent=False)
        self.count = nn.Buffer(torch.zeros((), dtype=torch.int64), persistent=False)

    def take(
        self, start: Tensor, cond: Tensor | None, *, seed: int | Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Slots (B,), y (B, *event) and conditions (B, ...) of the next chains.

        Where there is no chain yet, and for a share of the others, it is a new one: `start` with
        its condition. Which ones depends on (seed, index).
        """
        rows = len(start)
        if rows > self.size:
            raise ValueError(f"chains must be at least the batch of {rows}, got {self.size}")
        turn = self.count + torch.arange(rows, device=start.device)
        slots = turn % self.size
        u = uniform((rows,), seed=seed, index=index, step=0, stream=STREAM_POOL)
        new = (turn < self.size) | (u < self.renewal)
        y = torch.where(new.view(-1, 1, 1, 1), start, self.y[slots].to(start.dtype))
        if cond is not None:
            which = new.view(-1, *(1,) * (cond.dim() - 1))
            cond = torch.where(which, cond, self.cond[slots].to(cond.dtype))
        return slots, y, cond

    def put(self, slots: Tensor, y: Tensor, cond: Tensor | None) -> None:
        """Keeps the chains, and the conditions, of slots from `take`."""
        self.y.index_copy_(0, slots, y.to(self.y.dtype))
        if cond is not None:
            self.cond.index_copy_(0, slots, cond.to(self.cond.dtype))
        self.count.add_(len(slots))


# Model --------------------------------------------------------------------------------------------
class ConditionalEBM(Model):
    """Energy-based model of p(y | cond); `loss` and `sample` as of all families."""

    family: ClassVar[str] = "energy"
    sampling_config: ClassVar[type[EnergySampling]] = EnergySampling
    training_defaults: ClassVar[dict[str, Any]] = {
        "batch_size": 32, "beta1": 0.5, "beta2": 0.9, "warmup": 0, "ema_decay": 0.99,
    }  # fmt: skip

    def __init__(self, config: EnergyConfig) -> None:
        super().__init__()
        self.config = config
        self.planes = ConditionPlanes(config)
        self.network = EnergyNetwork(
            config.event_shape[0] + self.planes.planes,
            config.event_shape[1:],
            width=config.width,
            depth=config.depth,
            hidden=config.hidden,
            patch=config.patch,
        )
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.chains = Chains(config)

    # Energy ---------------------------------------------------------------------------------------
    @property
    def density(self) -> Density:
        return "energy"

    def energy(self, y: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """-log p(y | cond) in nats, up to a constant of each condition, (B,); differentiable.

        y is (B, C, H, W).

        Raises:
            ValueError, TypeError: an argument that does not fit, by name.
        """
        self.check_inputs(y, cond)
        return self._network_energy(y, self.planes(cond, len(y))) / self.config.temperature

    def log_ratio(self, y_a: Tensor, y_b: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """log p(y_a | cond) - log p(y_b | cond) of two candidates, exact, (B,) nats."""
        self.check_y(y_a, "y_a")
        self.check_y(y_b, "y_b")
        check_shape("y_b", y_b, tuple(y_a.shape))
        return self.energy(y_b, cond=cond) - self.energy(y_a, cond=cond)

    @torch.no_grad()
    def log_partition(
        self,
        *,
        cond: Tensor | None = None,
        chains: int = 256,
        std: float = 1.0,
        temperatures: int = 1000,
        steps: int = 1,
        step_size: float = 1e-3,
        seed: int | Tensor = 0,
    ) -> Tensor:
        """Estimates of log Z in log p(y | cond) = -energy - log Z, (B,); (1,) without condition.

        The mean of so many `annealed_weights` for each condition. Z itself has no bias, its
        logarithm a small one. For tiny cases: beyond some ten numbers an image, a handful of
        chains has all the weight, and the estimate is too low.

        step_size: of a density: a of `sample` corresponds to a T.
        """
        if isinstance(chains, bool) or not isinstance(chains, int) or chains < 1:
            raise ValueError(f"chains must be an int of at least 1, got {chains!r}")
        self.check_cond(cond)
        rows = 1 if cond is None else len(cond)
        planes = self.planes(cond, rows).repeat(chains, 1, 1, 1)
        device = planes.device
        index = torch.arange(rows, device=device)
        index = (torch.arange(chains, device=device)[:, None] * 2**32 + index).flatten()
        weights = annealed_weights(
            lambda y: self._network_energy(y, planes) / self.config.temperature,
            (chains * rows, *self.config.event_shape),
            std=std, temperatures=temperatures, steps=steps, step_size=step_size, seed=seed,
            index=index, device=device,
        )  # fmt: skip
        return weights.view(chains, rows).logsumexp(0) - math.log(chains)

    def log_prob(self, y: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """NotImplementedError: Z is not known."""
        raise NotImplementedError(
            "ConditionalEBM has no exact log_prob; it has energy, which is -log p up to a "
            "constant, log_ratio of two candidates, and log_partition, an estimate for tiny cases"
        )

    def _network_energy(self, y: Tensor, planes: Tensor) -> Tensor:
        """f (B,), float32 at least."""
        config, y = self.config, y.to(compute_dtype(y))
        reference = y.flatten(1).square().sum(1) * (0.5 * config.temperature / config.start_std**2)
        seen = torch.cat([y, planes.to(y.dtype)], 1).to(self.dtype)
        return self.network(seen).to(y.dtype) + reference

    # Loss -----------------------------------------------------------------------------------------
    def _loss(self, y: Tensor, cond: Tensor | None, step: Step) -> dict[str, Tensor]:
        """Contrastive divergence of each row, against a chain that is moved on for it.

        Noise, and which chains begin anew, are random. In training mode the chains are those of the
        buffer; in evaluation mode, or without one, they begin at noise with the conditions of y.
        Returns {"total", "real", "drawn"}: "real" is f of y with its noise, "drawn" f of where the
        chain has come to.
        """
        config, rows, y = self.config, len(y), y.to(compute_dtype(y))
        seed, index = step.seed, step.index
        draws: dict[str, Any] = {"seed": seed, "index": index, "dtype": y.dtype}
        shape = tuple(y.shape)
        noisy = y
        if config.data_noise:
            z = cgkernels.philox_normal(shape, step=0, stream=STREAM_TRAINING, **draws)
            noisy = y + config.data_noise * z
        with torch.no_grad():
            start = cgkernels.philox_normal(shape, step=0, stream=STREAM_INITIAL, **draws)
            start, chain_cond = config.start_std * start, cond
            kept = self.training and self.chains.size > 0
            if kept:
                slots, start, chain_cond = self.chains.take(start, cond, seed=seed, index=index)
            planes = self.planes(chain_cond, rows)
            drawn = langevin(
                lambda y: self._network_energy(y, planes), start, steps=config.chain_steps,
                step_size=config.step_size, temperature=config.temperature, bound=config.bound,
                seed=seed, index=index,
            )  # fmt: skip
            if kept:
                self.chains.put(slots, drawn, chain_cond)
        planes = torch.cat([self.planes(cond, rows), self.planes(chain_cond, rows)])
        real, fake = self._network_energy(torch.cat([noisy, drawn]), planes).chunk(2)
        total = real - fake + config.square_weight * (real.square() + fake.square())
        return {"total": total, "real": real, "drawn": fake}

    # Sampling -------------------------------------------------------------------------------------
    @torch.inference_mode(False)
    def sample(
        self,
        n: int | None = None,
        *,
        cond: Tensor | None = None,
        seed: int | Tensor = 0,
        index: Tensor | None = None,
        start: Tensor | None = None,
        **solver: Any,
    ) -> Tensor:
        """Samples of p(y | cond), as of all families.

        start: (B, C, H, W), from where the chains of each condition begin, all its draws at the
        same place; without cond (n, C, H, W). Default: at noise of the standard deviation that
        training begins them with, of (seed, index) like all other noise.
        """
        return self._sample(n, cond, seed, index, solver, start=start)

    def _draw(self, draws: Draws, options: EnergySampling, start: Tensor | None = None) -> Tensor:
        """Where Langevin steps have come to, not clamped to [-1, 1]."""
        config, total = self.config, len(draws.index)
        if start is None:
            z = cgkernels.philox_normal(
                (total, *config.event_shape), seed=draws.seed, index=draws.index, step=0,
                stream=STREAM_INITIAL, dtype=torch.promote_types(self.dtype, torch.float32),
            )  # fmt: skip
            start = config.start_std * z
        else:
            conditions = total if draws.cond is None else draws.rows
            self._check_image("start", start, conditions, config.event_shape, bounded=False)
            start = start.to(compute_dtype(start)).repeat(total // conditions, 1, 1, 1)
        planes = draws.repeat(self.planes(draws.cond, draws.rows))
        return langevin(
            lambda y: self._network_energy(y, planes), start, steps=options.steps,
            step_size=options.step_size or config.step_size,
            temperature=options.temperature * config.temperature, bound=config.bound,
            seed=draws.seed, index=draws.index, graph=options.graph,
        )  # fmt: skip
