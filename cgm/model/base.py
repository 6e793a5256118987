"""The protocol of all families: `loss`, `sample`, and how likely a y is."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cgkernels.checks import (
    as_index,
    as_row_values,
    as_seed,
    check_shape,
    readable,
    say_noise_is_repeated,
)
from cgkernels.rows import compute_dtype
from cgm.model.config import solver_options

# What a model says of how likely a y is: its logarithm, a bound below that, or minus an energy.
Density = Literal["exact", "bound", "energy"]


@dataclass(frozen=True)
class Step:
    """One phase of a training step, for `_loss`."""

    phase: str
    seed: int | Tensor
    index: Tensor  # (B,) int64
    shared: dict[str, Tensor]  # what the phases of one step have in common

    def draw_once(self, name: str, draw: Callable[[], Tensor]) -> Tensor:
        """What `draw` gives, drawn by the first phase that asks for this name."""
        if name not in self.shared:
            self.shared[name] = draw()
        return self.shared[name]


@dataclass(frozen=True)
class Draws:
    """Samples to be drawn, for `_draw`: N of B conditions, those of one draw together.

    Sample i is of condition i mod B.
    """

    cond: Tensor | None  # (B, ...); None: no condition, B = 1
    seed: Tensor  # (1,) int64
    index: Tensor  # (N,) int64
    guidance: Tensor | None = None  # (N,) where each condition has its own

    @property
    def rows(self) -> int:
        """B."""
        return 1 if self.cond is None else len(self.cond)

    @property
    def draws(self) -> int:
        """N / B."""
        return len(self.index) // self.rows

    def repeat(self, of_conditions: Tensor) -> Tensor:
        """(N, ...) of (B, ...): what belongs to a condition, for each of its samples."""
        return of_conditions.repeat(self.draws, *[1] * (of_conditions.dim() - 1))


class PreciseBuffers(nn.Module):
    """A module whose own floating buffers stay float32 where its parameters are cast to 16 bits.

    Tables of constants, and state that many small steps add up in.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PreciseBuffers":
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            kept = before[name]
            if buffer is None or kept is None or not buffer.is_floating_point():
                continue
            if buffer.dtype != compute_dtype(buffer):
                self._buffers[name] = kept.to(buffer.device, compute_dtype(buffer))
        return self


class Model(PreciseBuffers):
    """Base of all families; constructed as `Model(config)`, which draws the initial weights.

    A model owns no optimizer, device or log; `cgm.training.train` trains any of them. Its dtype may
    be float64, float32, bfloat16 or float16: networks compute in it, or as autocast says; tables,
    the states of samplers and sums of likelihoods are float32 at least. A family writes `_loss` and
    `_draw`, and of `log_prob`, `elbo` and `energy` what it has.
    """

    family: ClassVar[str]  # its name in FAMILIES
    phases: ClassVar[tuple[str, ...]] = ("model",)  # of one training step, in this order
    config: Any  # frozen dataclass; also the annotation of the constructor's argument `config`
    # Frozen dataclass: the solver options of `sample`; None: nothing can be drawn.
    sampling_config: ClassVar[type[Any] | None] = None
    # Samples are values drawn one after another: round-off changes nothing, or, if it tips one
    # over, all that follow.
    discrete: ClassVar[bool] = False
    # Rows of y and cond need not belong together.
    unpaired: ClassVar[bool] = False
    # There is an `int8`.
    has_int8: ClassVar[bool] = False
    # Fields of `cgm.training.TrainingConfig` that `cgm train` sets otherwise for this family.
    training_defaults: ClassVar[dict[str, Any]] = {}

    @property
    def device(self) -> torch.device:
        """Where its parameters and buffers are."""
        return self._first().device

    @property
    def dtype(self) -> torch.dtype:
        """That of its parameters and buffers."""
        return self._first().dtype

    def _first(self) -> Tensor:
        tensors = itertools.chain(self.parameters(), self.buffers())
        return next((t for t in tensors if t.is_floating_point()), torch.empty(0))

    @classmethod
    def sampling_options(cls) -> tuple[str, ...]:
        """Names of the solver options of `sample`; none where nothing can be drawn."""
        if cls.sampling_config is None:
            return ()
        return tuple(field.name for field in dataclasses.fields(cls.sampling_config))

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        """The parameters that a phase updates; no parameter is in two phases."""
        return list(self.parameters())

    def compile_networks(self, mode: str) -> None:
        """Puts what `sample` runs of the networks under torch.compile, in one of its modes."""
        for network in self.children():
            network.compile(mode=mode, dynamic=False)

    def int8(self) -> "Model":
        """A copy for sampling and likelihoods, with weights of 8 bits, if `has_int8`."""
        raise NotImplementedError(f"{type(self).__name__} has no weights of 8 bits")

    # Loss -----------------------------------------------------------------------------------------
    def loss(
        self,
        y: Tensor,
        *,
        cond: Tensor | None = None,
        phase: str | None = None,
        seed: int | Tensor,
        index: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The objective of each example; the `_loss` of a family says which.

        Args:
            y: (B, C, H, W) in [-1, 1], of the model's dtype and on its device, as is an image cond;
                on the CPU 8-bit values are refused.
            cond: (B,) class ids, (B, C, H, W) images or (B, M) tokens; None for a model without
                condition, or for p(y) where training drops conditions.
            phase: of `phases`; None: the first.
            seed: 64-bit int or one-element int64 tensor. It or index must change at every step of
                training, as in seed=step, or index = row + 2^32 epoch for rows of a data set; a
                warning says so, once, where an int comes again, without index, for other weights.
            index: (B,) int64, the number of each example; default 0 .. B - 1. What is random of an
                example depends on (seed, index) alone.
            shared: the same dict for each phase of a step, empty at first, for what they have in
                common; None: each phase draws for itself.

        Returns:
            {"total": (B,), and its parts, (B,) each}, float32 at least.

        Raises:
            ValueError, TypeError: an argument that does not fit, by name.
        """
        phase = self.phases[0] if phase is None else phase
        self.check_phase(phase)
        self.check_inputs(y, cond)
        if shared is not None and not isinstance(shared, dict):
            raise TypeError(f"shared must be a dict or None, got {type(shared).__name__}")
        if index is None:
            self._warn_of_repeated_noise(phase, seed)
        seed, _ = as_seed(seed, y.device)
        index = as_index(index, len(y), y.device)
        return self._loss(y, cond, Step(phase, seed, index, {} if shared is None else shared))

    def _warn_of_repeated_noise(self, phase: str, seed: int | Tensor) -> None:
        """Where weights were changed by a gradient of the same noise, to be changed by it again."""
        compiling = torch.compiler.is_compiling()
        if not isinstance(seed, int) or not torch.is_grad_enabled() or compiling:
            return
        weights = sum(p._version for p in self.phase_parameters(phase) if p.requires_grad)
        noise: dict[str, tuple[int, int]] = self.__dict__.setdefault("_trained_on", {})
        before, old_weights = noise.get(phase, (None, weights))
        if before == seed and old_weights != weights:
            say_noise_is_repeated(f"{type(self).__name__}.loss", seed)
        noise[phase] = seed, weights

    def forward(self, y: Tensor, **given: Any) -> dict[str, Tensor]:
        """`loss`, as what wraps a module calls it: `DistributedDataParallel`, `fully_shard`.

        A wrapper acts in its call alone, not in methods of what it wraps. Each process passes the
        rows that are its own with their index in the whole batch, and noise and gradients are those
        of the whole batch. Models of several phases need find_unused_parameters=True, and those
        that keep chains or pools (energy, cyclegan) broadcast_buffers=False.
        """
        return self.loss(y, **given)

    def _loss(self, y: Tensor, cond: Tensor | None, step: Step) -> dict[str, Tensor]:
        """`loss` of arguments that were checked."""
        raise NotImplementedError

    # Likelihood -----------------------------------------------------------------------------------
    @property
    def density(self) -> Density | None:
        """What the model says of how likely a y is."""
        return None

    def log_prob(self, y: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """Exact log p(y | cond) in nats, (B,); NotImplementedError of families that have none.

        It is float32 at least, as are all likelihoods, bounds and energies.
        """
        raise NotImplementedError(f"{type(self).__name__} has no exact log_prob; it has a loss")

    def elbo(
        self,
        y: Tensor,
        *,
        cond: Tensor | None = None,
        seed: int | Tensor = 0,
        index: Tensor | None = None,
    ) -> Tensor:
        """An estimate, by (seed, index), of a bound below log p(y | cond) in nats, (B,)."""
        raise NotImplementedError(f"{type(self).__name__} has no elbo")

    def energy(self, y: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """-log p(y | cond) in nats, up to a constant of each condition, (B,)."""
        raise NotImplementedError(f"{type(self).__name__} has no energy")

    def log_density(
        self, y: Tensor, *, cond: Tensor | None = None, seed: int | Tensor = 0
    ) -> Tensor:
        """log p(y | cond), or what the model has in its place, (B,): see `density`."""
        if self.density == "bound":
            return self.elbo(y, cond=cond, seed=seed)
        if self.density == "energy":
            return -self.energy(y, cond=cond)
        return self.log_prob(y, cond=cond)

    def bits_per_dimension(
        self,
        y: Tensor,
        *,
        cond: Tensor | None = None,
        seed: int | Tensor = 0,
        index: Tensor | None = None,
    ) -> Tensor:
        """(B,): -log_prob / (C H W ln 2), of a family whose log_prob is of probabilities."""
        nats = self.log_prob(y, cond=cond).double()
        return -nats / (math.prod(self.config.event_shape) * math.log(2))

    # Sampling -------------------------------------------------------------------------------------
    def sample(
        self,
        n: int | None = None,
        *,
        cond: Tensor | None = None,
        seed: int | Tensor = 0,
        index: Tensor | None = None,
        **solver: Any,
    ) -> Tensor:
        """Samples of p(y | cond); what they are of a family, its `_draw` says.

        Args:
            n: draws for each condition; None: one, without the leading dimension.
            cond: (B,) class ids, (B, C, H, W) images or (B, M) tokens; None for a model without
                condition, or for p(y) where training dropped conditions.
            seed: 64-bit int or one-element int64 tensor.
            index: (B,) int64, the number of each condition; default 0 .. B - 1. Its draw d has the
                number index + 2^32 d: to draw on, add that. Without cond (n,), the number of each
                sample, by default 2^32 d.
            solver: fields of `sampling_config`; guidance may be a floating tensor (B,), one scale
                for each condition.

        Returns:
            (B, C, H, W), or (n, B, C, H, W), or without cond (n, C, H, W). A sample depends on
            (seed, number of its condition, draw) and on nothing else: not on the default dtype and
            device. It has the dtype of the model, under autocast too, where a network rounds
            otherwise.

        Raises:
            ValueError, TypeError: an argument that does not fit, by name.
        """
        return self._sample(n, cond, seed, index, solver)

    @torch.no_grad()
    def _sample(
        self,
        n: int | None,
        cond: Tensor | None,
        seed: int | Tensor,
        index: Tensor | None,
        solver: dict[str, Any],
        **inputs: Any,
    ) -> Tensor:
        """`sample`; inputs: what `_draw` of a family takes besides."""
        if self.sampling_config is None:
            raise NotImplementedError(f"{type(self).__name__} has no sample; it has a loss")
        guidance = solver.get("guidance")
        if not isinstance(guidance, Tensor) or "guidance" not in self.sampling_options():
            guidance = None
        else:
            solver = {name: value for name, value in solver.items() if name != "guidance"}
        options = solver_options(self.sampling_config, solver)
        _check_float32(options)
        self._check_sampling(cond, options)
        self._check_guidance(cond, self._guidance(options) if guidance is None else guidance)
        rows = None if cond is None else len(cond)
        shape, index = number_samples(n, rows, index, self.device)
        event_shape = self._sample_shape(options)
        if index.numel() == 0:
            return torch.empty((*shape, *event_shape), dtype=self.dtype, device=self.device)
        if cond is not None and guidance is not None:
            guidance = as_row_values("guidance", guidance, len(cond), self._first())
            guidance = guidance.repeat(len(index) // len(cond))
        draws = Draws(cond, as_seed(seed, self.device)[0], index, guidance)
        drawn = self._draw(draws, options, **inputs).to(self.dtype)
        return drawn.contiguous().view(*shape, *event_shape)

    def _draw(self, draws: Draws, options: Any) -> Tensor:
        """(N, *event) of any dtype: `sample` of arguments that were checked."""
        raise NotImplementedError

    def _guidance(self, options: Any) -> float:
        """Of the solver options; 1: of a family without guidance."""
        return 1.0

    def _sample_shape(self, options: Any) -> tuple[int, ...]:
        """(C, H, W) of what is drawn."""
        return self.config.event_shape

    # What every loss and sample is given ----------------------------------------------------------
    def check_phase(self, phase: str) -> None:
        """ValueError for a phase that this model has not."""
        if phase not in self.phases:
            raise ValueError(f"phase must be one of {self.phases}, got {phase!r}")

    def check_inputs(self, y: Tensor, cond: Tensor | None) -> None:
        """`check_y`, and `check_cond` of as many conditions."""
        self.check_y(y)
        self.check_cond(cond, len(y))

    def check_y(self, y: Tensor, name: str = "y") -> None:
        """ValueError or TypeError unless y is (B, C, H, W) as in the config.

        It must have the dtype of the parameters, be where they are, and be finite.
        """
        self._check_image(name, y, None, self.config.event_shape)

    def check_cond(self, cond: Tensor | None, rows: int | None = None) -> None:
        """ValueError or TypeError unless cond is a condition of this model, for so many rows.

        An image is checked as y is; ids of classes and tokens are int64, and in range. None passes
        where the model has no condition, or learned p(y) too.
        """
        config = self.config
        if config.cond_kind == "none":
            if cond is not None:
                raise TypeError("cond must be None: this model has no condition")
        elif cond is None:
            if config.cond_dropout == 0:
                raise ValueError("cond must be given: this model was trained without dropping it")
        elif config.cond_kind == "image":
            self._check_image("cond", cond, rows, config.cond_shape)
        else:
            _check_rows("cond", cond, rows, config.cond_shape)
            if cond.dtype != torch.int64:
                raise TypeError(f"cond must be int64 ids, got {cond.dtype}")
            self._check_device("cond", cond)
            highest = self._highest_id()
            if readable(cond) and cond.numel() and not 0 <= cond.min() <= cond.max() <= highest:
                raise ValueError(
                    f"cond must be in [0, {highest}], got {int(cond.min())} to {int(cond.max())}"
                )

    def _check_sampling(self, cond: Tensor | None, options: Any) -> None:
        """`check_cond` of what `sample` is given, with its options."""
        self.check_cond(cond)

    def _check_guidance(self, cond: Tensor | None, guidance: float | Tensor) -> None:
        """A model can be guided if it learned without its condition too."""
        guided = isinstance(guidance, Tensor) or guidance != 1
        if guided and cond is None:
            raise ValueError(f"guidance must be 1 without cond, got {guidance}")
        if guided and self.config.cond_dropout == 0:
            raise ValueError(
                "guidance must be 1: this model was trained without dropping its condition"
            )

    def _highest_id(self) -> int:
        """The largest id of a class or token."""
        return self.config.num_classes - 1

    def _check_image(
        self,
        name: str,
        image: Tensor,
        rows: int | None,
        shape: tuple[int, ...],
        *,
        bounded: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        """bounded: in [-1, 1], no state or vector that may be anywhere. dtype: not the model's."""
        _check_rows(name, image, rows, shape)
        if image.dtype != (dtype or self.dtype):
            wanted = f"{self.dtype} as the model is" if dtype is None else dtype
            raise TypeError(f"{name} must be floating, {wanted}, got {image.dtype}")
        self._check_device(name, image)
        if not readable(image) or image.numel() == 0:
            return
        low, high = (bound.item() for bound in image.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):  # NaN is both where there is one
            raise ValueError(f"{name} must be finite, got values that are not")
        # Real numbers reach beyond [-1, 1], but so far, and without a value below 0, only bytes do.
        if bounded and math.prod(shape[1:]) > 1 and low >= 0 and high > 16:
            raise ValueError(
                f"{name} must be in [-1, 1], got values from {low:g} to {high:g}; of 8 bits it is "
                f"{name} / 127.5 - 1"
            )

    def _check_device(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.device:
            raise ValueError(
                f"{name} must be on {self.device} as the model is, got {tensor.device}"
            )


def _check_float32(options: Any) -> None:
    """Raise unless float32, in which samplers compute, holds the numbers among the options."""
    most = torch.finfo(torch.float32).max
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, int | float) and not -most <= value <= most:
            raise ValueError(f"{field.name} must be a number that float32 holds, got {value}")


def _check_rows(name: str, tensor: object, rows: int | None, shape: tuple[int, ...]) -> None:
    """Raise unless it is a tensor (rows, *shape); rows: None for any number."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() == 0:
        raise ValueError(f"{name} must have a row for each example, got a tensor without")
    if len(shape) == 3 and tensor.shape[1:] == (*shape[1:], shape[0]) != shape:
        raise ValueError(
            f"{name} must have its channels first, (B, C, H, W), got {tuple(tensor.shape)}; that "
            f"is {name}.permute(0, 3, 1, 2)"
        )
    check_shape(name, tensor, (len(tensor) if rows is None else rows, *shape))


def number_samples(
    n: int | None, rows: int | None, index: Tensor | None, device: torch.device
) -> tuple[list[int], Tensor]:
    """Leading shape of the result, and the number of each sample, (samples,).

    Sample (draw, row) has the number of its condition + 2^32 draw, so 2^32 + i is draw 1 of number
    i; without conditions, rows None, draws alone are numbered. Samples of one draw stand together.
    """
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 0):
        raise ValueError(f"n must be None or an int of at least 0, got {n!r}")
    if n is not None and n >= 2**31:
        raise ValueError(f"n must be below 2^31, the draws that are numbered, got {n}")
    if rows is None:
        if n is None:
            raise ValueError("n must be given without cond")
        if index is None:
            index = torch.arange(n, device=device) * 2**32
        shape, expected = [n], n
    else:
        if index is None:
            index = torch.arange(rows, device=device)
        shape, expected = [rows] if n is None else [n, rows], rows
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        raise TypeError(f"index must be an int64 tensor, got {index!r}")
    check_shape("index", index, (expected,))
    index = index.to(device)
    if rows is not None and n is not None:
        last = 2**63 - 1 - max(0, n - 1) * 2**32
        if readable(index) and bool((index > last).any()):
            raise ValueError(f"index must be at most {last} for {n} draws, got {int(index.max())}")
        draws = torch.arange(n, device=device)[:, None] * 2**32
        index = (draws + index).flatten()
    return shape, index
