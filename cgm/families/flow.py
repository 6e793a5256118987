"""Conditional normalizing flow: y is an invertible function of standard normal numbers z.

    log p(y | cond) = sum of log N(z; 0, 1) + log |det dz/dy|,    z = f(y; cond)

f goes down scales. A scale halves the sides, four pixels becoming four channels; takes some steps,
each a normalization and a linear map of the channels of a pixel and a coupling, whose network sees
the channels that stay and the condition; and gives half of its channels to z, after one coupling
more that makes them standard normal given the others: their learned prior. The last gives all.

Images have `levels` gray levels, and a density must not grow on them without bound: it is that of
    x = 2 (v + u) / levels - 1,   v = 0 .. levels - 1 the value,  u uniform in [0, 1)
in [-1, 1], and log P(v) >= E_u log p(x) - D log(levels / 2) for the D numbers of an image.

Source   NICE arXiv:1410.8516; RealNVP arXiv:1605.08803 (scales, coupling); Glow arXiv:1807.03039
         (ActNorm, 1x1 convolutions as P L U); dequantization and its bound: Theis et al.,
         arXiv:1511.01844; conditional coupling: Ardizzone et al., arXiv:1907.02392.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cgkernels
from cgkernels.library import using_reference
from cgkernels.random import STREAM_LATENTS, STREAM_TRAINING, uniform
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
    NotNegative,
    Step,
)
from cgm.networks.layers import (
    ActNorm,
    depth_to_space,
    full_precision,
    has_own_hooks,
    space_to_depth,
)
from cgm.networks.residual import ConditionPlanes, ResidualUNet
from cgm.sampling.cuda_graph import capture


# Config -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class FlowConfig(ImageConfig):
    """What is generated from what, the scales and their networks, and what is done to the data."""

    # Steps of each scale, the finest first; a scale halves the sides where both are even.
    steps: tuple[Count, ...] = (2, 4)
    # Channels of the network of a coupling, twice as many at each of its resolutions below.
    width: Annotated[int, Interval(4, ends="[)")] = 32
    # Resolutions of the network of a coupling, as far as the sides allow.
    depth: Depth = 2
    # Residual blocks of a resolution, on the way down and again on the way up.
    blocks: Count = 1
    # Couplings only shift, and the volume changes by the maps of the channels and by priors alone.
    additive: bool = False
    # Bound of |log s| of a coupling.
    limit: Annotated[float, Interval(0, 80, "(]")] = 2.0
    # Values that y can have, evenly spaced from -1 to 1; 0: any real number.
    levels: Annotated[int, Interval(0, 65536)] = 256
    # Standard deviation of normal noise on the data of real numbers; samples have it too.
    noise: NotNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.steps:
            raise ValueError("steps must be positive, one number a scale, got ()")
        if self.levels == 1:
            raise ValueError("levels must be 0 or from 2 to 65536, got 1")
        if self.noise and self.levels:
            raise ValueError(
                f"noise is for real numbers, levels 0: those of images have noise of their own, "
                f"got noise {self.noise} and levels {self.levels}"
            )


@dataclass(frozen=True)
class FlowSampling(Config):
    """How a sample is drawn."""

    # Factor of the latent numbers; less than 1 is nearer to the usual image, and less varied.
    temperature: NotNegative = 1.0
    # On a GPU, replay a captured call instead of launching every kernel; one is kept for the last
    # number of samples.
    graph: bool = True


# Layers -------------------------------------------------------------------------------------------
class ChannelMap(nn.Module):
    """W (scale (x + loc)) for the channels of each pixel: ActNorm and a 1x1 convolution.

    W = P L (U + diag(s)) with a fixed permutation P, L and U triangular with diagonals of 1 and 0:
    its determinant is the product of s. It begins as a rotation. It computes in the dtype of x,
    which is float32 or more whatever that of the parameters: what rounds x is not invertible.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _FirstBatchNorm(channels)
        # These are not for 16 bits, which the default dtype may be.
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float32))[0]
        parts, dtype = torch.linalg.lu(rotation), torch.get_default_dtype()
        permutation, lower, upper = (part.to(dtype) for part in parts)
        diagonal = upper.diagonal()
        self.permutation, self.sign = nn.Buffer(permutation), nn.Buffer(diagonal.sign())
        self.lower, self.upper = nn.Parameter(lower.tril(-1)), nn.Parameter(upper.triu(1))
        self.log_diagonal = nn.Parameter(diagonal.abs().log())

    def forward(self, x: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor | None]:
        """The map of x (B, C, H, W) and the logarithm of its determinant, (); or the inverse alone.

        Raises:
            ValueError: something is hooked onto norm, of which there is no inverse.
        """
        if type(self.norm).forward is not ActNorm.forward or has_own_hooks(self.norm):
            raise ValueError("norm must be an ActNorm without hooks: else it has no known inverse")
        with full_precision(x):
            if inverse:
                return self._inverse(x), None
            permutation, lower, upper = self._factors(x.dtype)
            weight = permutation @ lower @ upper
            out = F.conv2d(self.norm(x), weight[:, :, None, None])
            log_scale, log_diagonal = self.norm.scale.to(x.dtype).abs().log(), self.log_diagonal
            logdet = log_scale.sum() + log_diagonal.to(x.dtype).sum()
            return out, x.shape[2] * x.shape[3] * logdet

    def _inverse(self, x: Tensor) -> Tensor:
        """What is mapped to x, by one convolution."""
        permutation, lower, upper = self._factors(x.dtype)
        weight = torch.linalg.solve_triangular(
            lower, permutation.T, upper=False, unitriangular=True
        )
        weight = torch.linalg.solve_triangular(upper, weight, upper=True)
        weight = weight[:, :, None, None] / self.norm.scale.to(x.dtype).view(-1, 1, 1, 1)
        return F.conv2d(x, weight, -self.norm.loc.to(x.dtype).flatten())

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        permutation, sign, lower, upper, log_diagonal = (
            t.to(dtype)
            for t in (self.permutation, self.sign, self.lower, self.upper, self.log_diagonal)
        )
        eye = torch.eye(len(sign), dtype=dtype, device=sign.device)
        diagonal = sign * log_diagonal.exp()
        return permutation, lower.tril(-1) + eye, upper.triu(1) + diagonal.diag()


class _FirstBatchNorm(ActNorm):
    """ActNorm that stays the identity where its first batch has no standard deviation."""

    def _without_deviation(self, x: Tensor) -> None:
        pass


class Coupling(nn.Module):
    """`cgkernels.affine_coupling` by a network of what stays and of the condition.

    x may be of more digits than the condition, which has the dtype of the network.

    Args:
        channels, sides: of x.
        planes: channels of the condition.
        number: of the coupling in its scale. Of one channel each turns to the other squares of a
            checkerboard; of more the last half is transformed.
        additive: shift only.
    """

    def __init__(
        self,
        config: FlowConfig,
        channels: int,
        sides: tuple[int, int],
        planes: int,
        *,
        number: int = 0,
        additive: bool = False,
    ) -> None:
        super().__init__()
        self.mask = "last" if channels > 1 else ("even", "odd")[number % 2]
        self.stay = channels // 2 if channels > 1 else 1
        touched = channels - self.stay if channels > 1 else 1
        self.additive, self.limit = additive, config.limit
        resolutions = max(1, min(config.depth, (min(sides) - 1).bit_length()))
        self.network = ResidualUNet(
            self.stay + planes, touched * (1 if additive else 2), width=config.width,
            depth=resolutions, blocks=config.blocks,
        )  # fmt: skip

    def forward(self, x: Tensor, planes: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """The coupling of x (B, C, H, W) or its inverse, and its log-determinant (B,)."""
        seen = x[:, : self.stay]
        if self.mask != "last":
            rows, columns = (torch.arange(n, device=x.device) for n in x.shape[2:])
            stays = (rows[:, None] + columns) % 2 == (1 if self.mask == "even" else 0)
            seen = seen * stays
        params = self.network(torch.cat([seen.to(planes.dtype), planes], 1))
        return cgkernels.affine_coupling(
            x, params, mask=self.mask, limit=self.limit, additive=self.additive, inverse=inverse
        )


class Scale(nn.Module):
    """Steps at one resolution, and the prior of the channels that end here.

    Args:
        channels, sides, planes: before the sides are halved.
        steps: their number.
        last: no channel ends here; all do after it.
    """

    def __init__(
        self,
        config: FlowConfig,
        channels: int,
        sides: tuple[int, int],
        planes: int,
        steps: int,
        *,
        last: bool,
    ) -> None:
        super().__init__()
        self.halves = not any(side % 2 for side in sides)
        if self.halves:
            channels, planes = 4 * channels, 4 * planes
            sides = (sides[0] // 2, sides[1] // 2)
        self.channels, self.sides, self.planes = channels, sides, planes
        self.maps = nn.ModuleList(ChannelMap(channels) for _ in range(steps))
        self.couplings = nn.ModuleList(
            Coupling(config, channels, sides, planes, number=i, additive=config.additive)
            for i in range(steps)
        )
        splits = not last and channels > 1
        self.prior = Coupling(config, channels, sides, planes) if splits else None
        self.kept = 0 if last else (channels // 2 if splits else channels)

    def squeeze(self, x: Tensor) -> Tensor:
        """x at the resolution of this scale."""
        return space_to_depth(x, 2) if self.halves else x

    def forward(self, x: Tensor, planes: Tensor, ended: Tensor | None = None) -> Any:
        """What goes on to the next scale, what ends here, and the log-determinant (B,).

        Given ended the other way: what became x and ended. Both are calls of the module, so that
        what is hooked onto it, shards of its weights for one, is there either way.
        """
        if ended is not None:
            return self._inverse(x, ended, planes)
        x = self.squeeze(x)
        logdet = x.new_zeros(len(x))
        for channel_map, coupling in self._steps():
            x, of_map = channel_map(x)
            x, of_coupling = coupling(x, planes)
            logdet = logdet + of_map + of_coupling
        if self.prior is not None:
            x, of_prior = self.prior(x, planes)
            logdet = logdet + of_prior
        return x[:, : self.kept], x[:, self.kept :], logdet

    def _inverse(self, x: Tensor, ended: Tensor, planes: Tensor) -> Tensor:
        x = torch.cat([x, ended], 1) if self.kept else ended
        if self.prior is not None:
            x, _ = self.prior(x, planes, inverse=True)
        for channel_map, coupling in reversed(self._steps()):
            x, _ = channel_map(coupling(x, planes, inverse=True)[0], inverse=True)
        return depth_to_space(x, 2) if self.halves else x

    def _steps(self) -> list[tuple[ChannelMap, Coupling]]:
        return cast(list, list(zip(self.maps, self.couplings, strict=True)))


# Model --------------------------------------------------------------------------------------------
class ConditionalFlow(Model):
    """A flow of images, or of points, given a condition; `loss`, `log_prob` and `sample`."""

    family: ClassVar[str] = "flow"
    sampling_config: ClassVar[type[FlowSampling]] = FlowSampling
    training_defaults: ClassVar[dict[str, Any]] = {"batch_size": 64}

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.planes = ConditionPlanes(config)
        channels, *sides = config.event_shape
        planes, shape = self.planes.planes, (channels, (sides[0], sides[1]))
        self.levels = nn.ModuleList()
        for number, steps in enumerate(config.steps, 1):
            scale = Scale(config, *shape, planes, steps, last=number == len(config.steps))
            self.levels.append(scale)
            planes, shape = scale.planes, (scale.kept, scale.sides)
        self.dimensions = math.prod(config.event_shape)

    def compile_networks(self, mode: str) -> None:
        """Puts the network of each coupling under torch.compile."""
        for module in self.modules():
            if isinstance(module, Coupling):
                module.network.compile(mode=mode, dynamic=False)

    # Likelihood -----------------------------------------------------------------------------------
    @property
    def density(self) -> Density:
        return "bound" if self.config.levels else "exact"

    def _loss(self, y: Tensor, cond: Tensor | None, step: Step) -> dict[str, Tensor]:
        """Minus the logarithm of the likelihood of y with its noise.

        Returns {"total": nats per dimension, "bits": bits per dimension}: bounds of those of the
        image, or, of real numbers, those of the density of y with its noise.
        """
        total = -self._noisy_log_prob(y, cond, step.seed, step.index) / self.dimensions
        return {"total": total, "bits": total / math.log(2)}

    @torch.no_grad()
    def log_prob(self, y: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """Exact log p(y | cond) in nats, (B,): the density of the flow at y itself.

        It is a density over [-1, 1], in the units of y, of what images become with their noise,
        and no probability; `elbo` bounds that of an image.
        """
        self.check_inputs(y, cond)
        return self._density_at(y, cond)

    @torch.no_grad()
    def elbo(
        self,
        y: Tensor,
        *,
        cond: Tensor | None = None,
        seed: int | Tensor = 0,
        index: Tensor | None = None,
    ) -> Tensor:
        """A bound below log P(y | cond) of images of `levels` values in nats, (B,).

        It is an unbiased estimate of the bound, by the noise of (seed, index).
        """
        if not self.config.levels:
            raise NotImplementedError("a flow of real numbers has a density: see log_prob")
        self.check_inputs(y, cond)
        return self._noisy_log_prob(y, cond, seed, index)

    def bits_per_dimension(
        self,
        y: Tensor,
        *,
        cond: Tensor | None = None,
        seed: int | Tensor = 0,
        index: Tensor | None = None,
    ) -> Tensor:
        """(B,): -elbo / (C H W ln 2); of real numbers -log_prob / (C H W ln 2), of any sign."""
        if self.config.levels:
            nats = self.elbo(y, cond=cond, seed=seed, index=index)
        else:
            nats = self.log_prob(y, cond=cond)
        return -nats / (self.dimensions * math.log(2))

    def _noisy_log_prob(
        self, y: Tensor, cond: Tensor | None, seed: int | Tensor, index: Tensor | None
    ) -> Tensor:
        """Of y with its noise: the bound of an image, the density of real numbers."""
        config, y = self.config, y.to(compute_dtype(y))
        draws: dict[str, Any] = {
            "seed": seed, "index": index, "step": 0, "stream": STREAM_TRAINING,
        }  # fmt: skip
        constant = 0.0
        if config.levels:
            v = ((y + 1) * ((config.levels - 1) / 2)).round().clamp(0, config.levels - 1)
            u = uniform(tuple(y.shape), dtype=y.dtype, device=y.device, **draws)
            y = (v + u) * (2 / config.levels) - 1
            constant = self.dimensions * math.log(config.levels / 2)
        elif config.noise:
            z = cgkernels.philox_normal(tuple(y.shape), dtype=y.dtype, device=y.device, **draws)
            y = y + config.noise * z
        return self._density_at(y, cond) - constant

    def _density_at(self, y: Tensor, cond: Tensor | None) -> Tensor:
        z, logdet = self._encode(y, self._planes(cond, len(y)))
        return logdet - (z.square().sum(1) + self.dimensions * math.log(2 * math.pi)) / 2

    # Both ways ------------------------------------------------------------------------------------
    @torch.no_grad()
    def encode(self, y: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The latent numbers z (B, C H W) of y (B, C, H, W), and log |det dz/dy| (B,).

        Both are float32 at least.
        """
        self.check_inputs(y, cond)
        return self._encode(y, self._planes(cond, len(y)))

    @torch.no_grad()
    def decode(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """The y (B, C, H, W) that has these latent numbers, (B, C H W)."""
        dtype = torch.promote_types(self.dtype, torch.float32)  # as `encode` gives it
        self._check_image("z", z, None, (self.dimensions,), bounded=False, dtype=dtype)
        self.check_cond(cond, len(z))
        return self._decode(z.to(compute_dtype(z)), self._planes(cond, len(z))).to(self.dtype)

    def _encode(self, y: Tensor, planes: list[Tensor]) -> tuple[Tensor, Tensor]:
        y = y.to(compute_dtype(y))
        parts, total = [], y.new_zeros(len(y))
        for scale, seen in zip(self._scales(), planes, strict=True):
            y, ended, logdet = scale(y, seen)
            parts.append(ended.flatten(1))
            total = total + logdet
        return torch.cat(parts, 1), total

    def _decode(self, z: Tensor, planes: list[Tensor]) -> Tensor:
        shapes = [(scale.channels - scale.kept, *scale.sides) for scale in self._scales()]
        parts = z.split([math.prod(shape) for shape in shapes], 1)
        x = z
        for scale, part, shape, seen in reversed(
            list(zip(self._scales(), parts, shapes, planes, strict=True))
        ):
            x = scale(x, seen, part.unflatten(1, shape))
        return x

    def _planes(self, cond: Tensor | None, rows: int) -> list[Tensor]:
        """The planes of the conditions at the resolution of each scale."""
        planes, found = self.planes(cond, rows), []
        for scale in self._scales():
            planes = scale.squeeze(planes)
            found.append(planes)
        return found

    def _scales(self) -> list[Scale]:
        return cast(list[Scale], list(self.levels))

    # Sampling -------------------------------------------------------------------------------------
    def _draw(self, draws: Draws, options: FlowSampling) -> Tensor:
        """Of images within [-1, 1]; of real numbers with their noise."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        temperature = torch.full((), options.temperature, dtype=dtype, device=self.device)
        inputs = [draws.seed, draws.index, temperature]
        inputs += [] if draws.cond is None else [draws.cond]
        replaying = options.graph and self.device.type == "cuda"
        return (self._replay if replaying else self._generate)(*inputs)

    def _generate(
        self, seed: Tensor, index: Tensor, temperature: Tensor, cond: Tensor | None = None
    ) -> Tensor:
        """A sample for each index: those of one draw stand together, in the order of cond."""
        rows = 1 if cond is None else len(cond)
        planes = self._planes(cond, rows)
        z = temperature * cgkernels.philox_normal(
            (len(index), self.dimensions), seed=seed, index=index, step=0, stream=STREAM_LATENTS,
            dtype=temperature.dtype, device=index.device,
        )  # fmt: skip
        y = self._decode(z, [p.repeat(len(index) // rows, 1, 1, 1) for p in planes])
        return y.clamp(-1, 1) if self.config.levels else y

    def _replay(self, *inputs: Tensor) -> Tensor:
        """`_generate` as a CUDA graph, kept for calls of the same sizes on the same weights."""
        key = (
            [(t.shape, t.dtype) for t in inputs],
            [t.data_ptr() for t in (*self.parameters(), *self.buffers())],
            torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), using_reference(),
        )  # fmt: skip
        kept = _GRAPHS.get(self)
        if kept is None or kept.key != key:
            _GRAPHS.pop(self, None)  # its memory is free before more is taken
            kept = _GRAPHS[self] = _Graph(self, key, inputs)
        return kept.run(inputs)


class _Graph:
    """One captured `_generate`, on tensors of its own."""

    def __init__(self, model: ConditionalFlow, key: Any, inputs: tuple[Tensor, ...]) -> None:
        self.key, self.inputs = key, [t.clone() for t in inputs]
        self.out = inputs[2].new_empty(len(inputs[1]), *model.config.event_shape)

        def draw() -> None:
            self.out.copy_(model._generate(*self.inputs))

        self.replay = capture(draw, inputs[1].device)

    def run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.replay()
        return self.out.clone()


# Beside the models, of which there can be copies; of a graph there can be none.
_GRAPHS: WeakKeyDictionary[ConditionalFlow, _Graph] = WeakKeyDictionary()
