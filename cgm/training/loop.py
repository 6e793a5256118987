"""The loop, and the state that it keeps: see `cgm.training`."""

import contextlib
import copy
import dataclasses
import functools
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn

from cgm.checkpoints import (
    check_weights,
    describe_model,
    is_vacant,
    load_weights,
    read_tensors,
    save_model,
    write_tensors,
)
from cgm.data import Dataset, epoch_order
from cgm.model import Model, config_from_dict
from cgm.training.config import RESUME_FREE, TrainingConfig, learning_rate
from cgm.training.lock import locked
from cgm.training.progress import Display, Log, duration, fixed_arithmetic, interruptible

if TYPE_CHECKING:
    from cgm.viz.sample_page import Sheets, Shown

STATE_FILE, LOG_FILE = "training.safetensors", "log.csv"
_SIGPIPE = 13  # which Windows has not
_SLOW = 30.0  # seconds of a step that are said beforehand


class TrainingInterrupted(Exception):
    """A signal, or nobody reads the progress: the step was finished and everything saved.

    A command line exits with 128 + signal: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP, and 141
    (SIGPIPE) where the output was closed.
    """

    def __init__(self, out: Path, step: int, steps: int, signal: int) -> None:
        super().__init__(out, step, steps, signal)  # so that it can be pickled
        self.out, self.step, self.steps, self.signal = out, step, steps, signal

    def __str__(self) -> str:
        return (
            f"interrupted after step {self.step} of {self.steps}, which is saved in {self.out}; "
            "the same command with --resume continues there"
        )


def train(
    model: Model,
    dataset: Dataset,
    config: TrainingConfig,
    out: str | Path,
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    on_step: Callable[[int, Model], None] | None = None,
    console: Console | None = None,
    shown: "Shown | None" = None,
    sampling: Mapping[str, Any] | None = None,
) -> Model:
    """Trains the model in place and returns its average, on the device and in evaluation mode.

    Args:
        model: made by `cgm.model.make_model` with config.seed for a run that can be repeated.
        out: folder of the run; must be empty or absent, or with resume hold a run of the same
            model, data and config, of which the fields in RESUME_FREE may differ.
        on_step: called after each step with the number of finished steps and the average.
        console: where progress goes; bars on a terminal, plain lines elsewhere.
        shown: what the sheets show, default the first rows of the data (see `cgm.viz.sample_page`).
        sampling: the checkpoint's preset (see `cgm.checkpoints`); the sheets are drawn without it.

    Raises:
        ValueError: an argument does not fit; nothing was written.
        FloatingPointError: a loss or gradient is not finite. The weights were not touched by that
            step or a later one, and the last checkpoint stays.
        TrainingInterrupted: Ctrl-C, SIGTERM or SIGHUP in the main thread, or the console's output
            was closed. A second signal, while the step finishes, ends at once: KeyboardInterrupt or
            SystemExit.
    """
    out = Path(out)
    run = _Run(model.to(device).train(), dataset, config, torch.device(device), sampling)
    names, slow = run.rehearse()
    sheets = None
    if config.sheet_every:
        from cgm.viz.sample_page import (  # matplotlib, for those who want images
            Sheets,
            first_rows,
        )

        sheets = Sheets(run.average, shown or first_rows(dataset), out)
    if resume and not (out / STATE_FILE).exists():
        raise ValueError(f"out must hold a run to resume, got {out}: there is no {STATE_FILE}")
    if not resume and out.exists() and not (out.is_dir() and is_vacant(out)):
        raise ValueError(f"out must be an empty folder, or resume given, got {out}")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(out))
        except OSError as error:
            raise ValueError(f"out must be a folder to write to, got {out}: {error}") from error
        return _steps(run, out, names, slow, sheets, resume, on_step, console)


def _steps(
    run: "_Run",
    out: Path,
    names: list[str],
    slow: str,
    sheets: "Sheets | None",
    resume: bool,
    on_step: Callable[[int, Model], None] | None,
    console: Console | None,
) -> Model:
    """`train` in a folder that is locked."""
    config = run.config
    if resume:
        run.load(out)
    elif not is_vacant(out):  # another run came first, and has ended
        raise ValueError(f"out must be an empty folder, or resume given, got {out}")
    try:
        run.save(out)  # what cannot be written shows now, not after an hour
        log = Log(out / LOG_FILE, ["step", "seconds", "learning_rate", *names], run.step)
    except OSError as error:
        raise ValueError(f"out must be a folder to write to, got {out}: {error}") from error
    with (
        fixed_arithmetic(config.threads),
        interruptible() as signals,
        Display(config, run.step, console or Console()) as display,
    ):
        if slow:
            display.print_line(slow)
        while run.step < config.steps:
            rate = learning_rate(config, run.step)
            run.train_step(rate)
            step = run.step
            # Looking at a loss waits for the device: on a GPU only when there is a line to write.
            if step % config.log_every == 0 or run.device.type == "cpu":
                run.check(out)
            if on_step is not None:
                on_step(step, run.average)
            logging = step % config.log_every == 0
            if display.closed:
                signals.append(_SIGPIPE)
            stop = bool(signals) and step < config.steps
            last = step == config.steps
            saving = stop or last or step % config.save_every == 0
            drawing = sheets is not None and (last or step % config.sheet_every == 0)
            if saving or drawing or logging:
                values = run.fetch_means()
                display.line(step, values[0])
                with run.saved_where_writing_fails(out):
                    log.write([step, log.seconds + display.seconds, rate, *values])
            elif display.due(step):
                display.line(step, run.loss())
            display.advance(step)
            if saving:
                run.save(out)
            if sheets is not None and drawing:
                run.copy_buffers()
                with run.saved_where_writing_fails(out):
                    sheets.write(step)
            if stop:
                raise TrainingInterrupted(out, step, config.steps, signals[0])
    return run.average


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """What config.json says of the data; the checksum tells other data of the same shape."""
    crc = 0
    for tensor in (dataset.y, dataset.cond):
        if tensor is not None:
            crc = zlib.crc32(tensor.contiguous().numpy().data, crc)
    size = tuple(dataset.y.shape[2:])
    augmentation = {"size": size, "crop": dataset.crop, "flip": dataset.flip}
    return {
        "name": dataset.name,
        "rows": len(dataset),
        "event_shape": dataset.event_shape,
        "cond_kind": dataset.cond_kind,
        "cond_shape": dataset.cond_shape,
        "num_classes": dataset.num_classes,
        "class_names": dataset.class_names,
        # None, as of runs from before there was any: they can be resumed.
        "augmentation": augmentation if dataset.augmented else None,
        "crc32": crc,
    }


# State --------------------------------------------------------------------------------------------
class _Run:
    """Weights, their average, the optimizers, and the number of finished steps."""

    def __init__(
        self,
        model: Model,
        dataset: Dataset,
        config: TrainingConfig,
        device: torch.device,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.dataset, self.config, self.device = model, dataset, config, device
        # Of a model that draws nothing no preset: its absence is what says so.
        draws = model.sampling_config is not None
        self.preset = {"sampling": dict(sampling or {})} if draws else {}
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        self.parameters = {phase: model.phase_parameters(phase) for phase in model.phases}
        self.optimizers = {
            phase: _adamw(parameters, config) for phase, parameters in self.parameters.items()
        }
        self.order = functools.lru_cache(2)(functools.partial(epoch_order, len(dataset)))
        self.description = json.loads(
            json.dumps(
                {
                    "model": describe_model(model),
                    "data": describe_data(dataset),
                    "training": dataclasses.asdict(config),
                }
            )
        )
        self.step = 0
        self.latest = torch.empty(0)
        self.sums: Tensor | None = None
        self.summed = 0
        # Number of the first bad phase, counted from the start of the run; -1: none. It stays on
        # the device, where it makes the optimizers skip this update and every later one.
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def rehearse(self) -> tuple[list[str], str]:
        """One example through each phase of a copy shows wrong data, and how long a step takes.

        Returns the columns of the log, and what is to be said beforehand of slow steps.
        """
        size = self.config.batch_size
        for _ in range(2):  # a first call may be slow of itself
            start = time.perf_counter()
            names = self._rehearse()
            # Backward takes twice as long as forward. A GPU would have to be waited for.
            step = 3 * size * (time.perf_counter() - start)
            if step < _SLOW or self.device.type != "cpu":
                return names, ""
        return names, f"a step may take {duration(step)}, for {size} examples"

    def _rehearse(self) -> list[str]:
        batch, index = self.batch(0)
        names = []
        copied = copy.deepcopy(self.model)
        for phase in self.model.phases:
            one: Any = {name: None if t is None else t[:1] for name, t in batch.items()}
            losses = copied.loss(**one, phase=phase, seed=self.config.seed, index=index[:1])
            names += [f"{phase}/{name}" for name in [*losses, "gradient_norm"]]
        return names

    def batch(self, step: int) -> tuple[dict[str, Any], Tensor]:
        """The examples of a step, {"y", "cond"}, and their index.

        Step s takes the places s B .. (s + 1) B - 1 of all epochs one after another: no example is
        left out, whatever the batch size.
        """
        n, size = len(self.dataset), self.config.batch_size
        places = torch.arange(step * size, (step + 1) * size)
        parts, indices = [], []
        for epoch in range(step * size // n, ((step + 1) * size - 1) // n + 1):
            rows = self.order(self.config.seed, epoch)[places[places // n == epoch] % n]
            parts.append(self.dataset.batch(rows, epoch))
            indices.append(rows + epoch * 2**32)
        batch: dict[str, Any] = {"y": torch.cat([part["y"] for part in parts]), "cond": None}
        conds = [part["cond"] for part in parts if part["cond"] is not None]
        if conds:
            batch["cond"] = torch.cat(conds)
        index = torch.cat(indices)
        return {name: self._to_device(t) for name, t in batch.items()}, self._to_device(index)

    def _to_device(self, tensor: Any) -> Any:
        if tensor is not None and self.device.type == "cuda":
            tensor = tensor.pin_memory()  # from pinned memory the host need not wait
        return None if tensor is None else tensor.to(self.device, non_blocking=True)

    def train_step(self, rate: float) -> None:
        """One update in each phase, and one of the average."""
        batch, index = self.batch(self.step)
        values: list[Tensor] = []
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"
        )
        # What the phases of a step have in common, such as the images that are judged.
        shared: dict[str, Any] = {"shared": {}} if len(self.model.phases) > 1 else {}
        for number, phase in enumerate(self.model.phases):
            parameters, optimizer = self.parameters[phase], self.optimizers[phase]
            with autocast:
                losses = self.model.loss(
                    **batch, phase=phase, seed=self.config.seed, index=index, **shared
                )
            losses = {name: loss.float().mean() for name, loss in losses.items()}
            optimizer.zero_grad()
            losses["total"].backward(inputs=parameters)
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            nn.utils.clip_grads_with_norm_(parameters, self.config.gradient_clip, norm)
            bad = ~(losses["total"].isfinite() & norm.isfinite()) & (self.first_bad < 0)
            number += self.step * len(self.model.phases)
            self.first_bad = torch.where(bad, number, self.first_bad)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # The fused optimizer changes nothing where this is 1; gradient scaling uses it so.
            optimizer.found_inf = (self.first_bad >= 0).float()  # type: ignore[attr-defined]
            optimizer.step()
            values += [*(loss.detach() for loss in losses.values()), norm]
        self.step += 1
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        weights = [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(list(self.average.parameters()), weights, 1 - decay)
        self.latest = stacked = torch.stack(values)
        self.sums = stacked if self.sums is None else self.sums + stacked
        self.summed += 1

    def check(self, out: Path) -> None:
        """Raises FloatingPointError if a loss or gradient has not been finite."""
        if (number := int(self.first_bad)) >= 0:
            step, phase = divmod(number, len(self.model.phases))
            raise FloatingPointError(
                f"the loss or gradient of phase {self.model.phases[phase]} is not finite at step "
                f"{step + 1}; the last checkpoint stays in {out}"
            )

    def loss(self) -> float:
        """That of the last step."""
        return self.latest[0].item()

    def fetch_means(self) -> list[float]:
        """Losses and gradient norms, means over the steps since the last call."""
        assert self.sums is not None
        means = (self.sums / self.summed).tolist()
        self.sums, self.summed = None, 0
        return means

    def save(self, out: Path) -> None:
        """Writes the state to resume from, then the model to use; never one that is not finite."""
        self.check(out)
        tensors = {f"weights/{name}": t for name, t in self.model.state_dict().items()}
        tensors |= {f"average/{name}": t for name, t in self.average.named_parameters()}
        tensors |= {f"state/{name}": t for name, t in self._state().items()}
        for phase, name, parameter in self._named_parameters():
            for key, t in self.optimizers[phase].state.get(parameter, {}).items():
                tensors[f"optimizer/{phase}/{name}/{key}"] = t
        write_tensors(out / STATE_FILE, tensors, {"step": self.step, **self.description})
        self.copy_buffers()
        described = {name: self.description[name] for name in ("data", "training")}
        save_model(out, self.average, self.preset | described)

    @contextlib.contextmanager
    def saved_where_writing_fails(self, out: Path) -> Iterator[None]:
        """What is written beside the checkpoint may fail: the steps since the last one stay."""
        try:
            yield
        except OSError as error:
            self.save(out)
            raise ValueError(
                f"out must be a folder to write to, got {out}: {error}; step {self.step} is saved"
            ) from error

    def copy_buffers(self) -> None:
        """Gives the average the buffers of the model, such as statistics of batch norms."""
        for mine, averaged in zip(self.model.buffers(), self.average.buffers(), strict=True):
            averaged.copy_(mine)

    def load(self, out: Path) -> None:
        """The state that `save` wrote; ValueError if it is of another model, data set or config."""
        file = out / STATE_FILE
        tensors, info = read_tensors(file)
        now = {"step": info.get("step"), **self.description}
        changed = list(_differences(_grown(info, self.model.config), now))
        if changed:
            raise ValueError(
                f"{file}: is of another run: {'; '.join(changed)}; what may change on a resume is "
                f"{', '.join(f'training.{name}' for name in RESUME_FREE)}"
            )
        kinds = ("weights", "average", "state", "optimizer")
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            if part not in parts:
                raise ValueError(f"{file}: has {name}, which is none of {', '.join(kinds)}")
            parts[part][rest] = tensor
        load_weights(self.model, parts["weights"], file)
        # Of buffers there is no average.
        load_weights(self.average, {**parts["weights"], **parts["average"]}, file)
        check_weights(self._state(), parts["state"], file)
        for name, buffer in self._state().items():
            buffer.copy_(parts["state"][name])
        wanted: dict[str, Tensor] = {}  # of each parameter that had a gradient
        for phase, name, parameter in self._named_parameters():
            prefix = f"{phase}/{name}/"
            state = {
                key.removeprefix(prefix): _in_format_of(parameter, t.to(self.device))
                for key, t in parts["optimizer"].items()
                if key.startswith(prefix)
            }
            if state:
                self.optimizers[phase].state[parameter] = state
                moments = {f"{prefix}exp_avg": parameter, f"{prefix}exp_avg_sq": parameter}
                wanted |= {f"{prefix}step": torch.tensor(0.0), **moments}
        check_weights(wanted, parts["optimizer"], file)
        if not isinstance(step := info.get("step"), int) or step < 0:
            raise ValueError(f"{file}: step must be a whole number, got {step!r}")
        self.step = step
        if self.step > self.config.steps:
            raise ValueError(f"steps must be at least {self.step}, got {self.config.steps}: {file}")

    def _state(self) -> dict[str, Tensor]:
        """Buffers that are no part of the model to use, such as pools of images."""
        kept = self.model.state_dict().keys()
        return {name: t for name, t in self.model.named_buffers() if name not in kept}

    def _named_parameters(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for phase, parameters in self.parameters.items():
            for parameter in parameters:
                yield phase, names[id(parameter)], parameter


def _adamw(parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=True)


def _in_format_of(parameter: Tensor, state: Tensor) -> Tensor:
    """State of an optimizer, laid out as the parameter is: the fused one reads both as they lie."""
    if state.shape != parameter.shape:
        return state
    return torch.empty_like(parameter, dtype=state.dtype, requires_grad=False).copy_(state)


def _grown(description: dict[str, Any], config: Any) -> dict[str, Any]:
    """A saved description, with the defaults of fields that the config had not then."""
    saved: Any = description.get("model")
    try:
        grown = dataclasses.asdict(config_from_dict(type(config), saved["config"]))
    except (KeyError, TypeError, ValueError):
        return description
    return {**description, "model": {**saved, "config": json.loads(json.dumps(grown))}}


def _differences(saved: Any, now: Any, name: str = "") -> Iterator[str]:
    """Fields that differ, in words."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in sorted(saved.keys() | now.keys()):
            if not (name == "training" and key in RESUME_FREE):
                yield from _differences(
                    saved.get(key), now.get(key), f"{name}.{key}" if name else key
                )
    elif saved != now:
        yield f"{name} was {saved!r} and is now {now!r}"
