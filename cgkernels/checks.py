"""Argument errors, in words: what a public function got, and what fits.

The checks of shapes, dtypes and devices never touch data. Values are checked only where that waits
for no device: Python numbers, and tensors on the CPU outside a trace.
"""

import difflib
import math
import sys
import warnings
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from cgkernels.memory import Memory, overlaps_itself
from cgkernels.rows import compute_dtype

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32)
LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raise unless value is one of these names or integers."""
    known = isinstance(value, str | int | None) and not isinstance(value, bool)
    if not known or value not in choices:
        words = ", ".join(map(repr if None in choices else str, choices))
        raise ValueError(
            f"{name} must be one of {words}, got {_shown(value)}{did_you_mean(value, choices)}"
        )


def did_you_mean(value: object, choices: Iterable[object]) -> str:
    """The end of an error message: the choice that looks like the value, if there is one."""
    by_lower = {str(choice).lower(): str(choice) for choice in choices}
    close = difflib.get_close_matches(str(value).lower(), by_lower, 1)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""


def check_flag(**flags: bool) -> None:
    """Raise unless each is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {_shown(value)}")


def check_int(name: str, value: int, low: int, high: int | None = None) -> None:
    """Raise unless value is an int from low to high."""
    known = _is_int(value)
    if known and value >= low and (high is None or value <= high):
        return
    # No sooner: in a trace words make constants of sizes that may vary.
    words = f"an int of at least {low}" if high is None else f"an int from {low} to {high}"
    raise (ValueError if known else TypeError)(f"{name} must be {words}, got {_shown(value)}")


def check_number(name: str, value: float, low: float = -LARGEST, high: float = LARGEST) -> None:
    """Raise unless value is a Python number from low to high; what float32 holds, by default."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and low <= value <= high and _fits(value):
        return
    words = {0.0: "that is not negative", SMALLEST: "above 0", -LARGEST: "that is finite"}[low]
    end = " in float32" if high == LARGEST else f" and at most {high}"
    error = ValueError if number else TypeError
    raise error(f"{name} must be a number {words}{end}, got {_shown(value)}")


def check_tensor(name: str, value: object) -> None:
    """Raise unless value is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested one" if value.is_nested else value.layout
        raise TypeError(f"{name} must be a dense tensor, got {kind}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless tensor has exactly this shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def check_sizes(name: str, shape: Sequence[int]) -> None:
    """Raise unless these are the sizes of a batch and of what a sample is."""
    if not isinstance(shape, tuple | list) or not all(map(_is_int, shape)):
        raise TypeError(f"{name} must be a tuple of ints (B, *event), got {shape!r}")
    if len(shape) == 0 or any(size < 0 for size in shape):
        raise ValueError(f"{name} must be (B, *event) of sizes from 0 on, got {tuple(shape)}")


def check_rows(name: str, tensor: Tensor) -> None:
    """Raise unless tensor has a batch dimension."""
    if tensor.dim() == 0:
        raise ValueError(f"{name} must have shape (B, ...), got a tensor without dimensions")


def check_float(**tensors: Tensor) -> None:
    """Raise unless each is float32, float16 or bfloat16; float64 passes on the CPU."""
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
        if tensor.dtype in FLOATS:
            continue
        if tensor.dtype != torch.float64 or tensor.is_cuda:
            raise TypeError(
                f"{name} must be float32, float16 or bfloat16 (float64 on the CPU only), "
                f"got {tensor.dtype} on {tensor.device}"
            )


def check_dtype(dtype: torch.dtype, dtypes: Sequence[torch.dtype]) -> None:
    """Raise unless dtype is one of these."""
    if not isinstance(dtype, torch.dtype) or dtype not in dtypes:
        names = ", ".join(str(known).removeprefix("torch.") for known in dtypes)
        raise TypeError(f"dtype must be one of {names}, got {dtype}")


def check_table(table: Tensor, columns: int) -> None:
    """Raise unless table is a non-empty float32 (rows, columns); float64 passes on the CPU."""
    if table.dim() != 2 or table.shape[1] != columns or table.shape[0] == 0:
        raise ValueError(
            f"table must have shape (rows, {columns}) with rows > 0, got {tuple(table.shape)}"
        )
    if table.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"table must be float32 (float64 on the CPU), got {table.dtype}")


def check_noise_size(name: str, shape: tuple[int, ...]) -> None:
    """Raise where a sample has more elements than the noise contract can number."""
    if math.prod(shape[1:]) > 2**34:
        raise ValueError(f"{name} must have at most 2^34 elements a sample, got {tuple(shape)}")


def check_same_device(**tensors: Tensor) -> None:
    """Raise unless all tensors are on the device of the first."""
    (first, expected), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != expected.device:
            raise ValueError(
                f"{name} must be on the device of {first}, {expected.device}, got {tensor.device}"
            )


def check_device(name: str, tensor: Tensor, device: torch.device | str | None) -> None:
    """Raise unless tensor is on this device; "cuda" is the current one, None any."""
    if device is None or tensor.device == device:
        return
    wanted = torch.device(device)
    index = wanted.index
    if index is None and wanted.type == "cuda" and torch.cuda.is_initialized():
        index = torch.cuda.current_device()
    alone = index is None or wanted.type == "cpu"  # there is one device of this type
    if tensor.device.type != wanted.type or (tensor.device.index != index and not alone):
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def check_no_grad(why: str, **values: object) -> None:
    """Raise if a gradient is asked for where there is none."""
    for name, value in values.items():
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad, but {why}")


def readable(tensor: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device or breaking a trace."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        # A subclass with a dispatch of its own, as a fake tensor, need not have any.
        and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def as_seed(
    seed: int | Tensor, device: torch.device | str | None
) -> tuple[Tensor, torch.device | str | None]:
    """A seed as an int64 tensor (), and the device: that of a tensor seed unless one is given."""
    if device is not None and not isinstance(device, torch.device):
        device = _as_device(device)
    if isinstance(seed, Tensor):
        check_tensor("seed", seed)
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ValueError(
                f"seed must be an int or a one-element int64 tensor, got {seed.dtype} of shape "
                f"{tuple(seed.shape)}"
            )
        check_device("seed", seed, device)
        return seed.reshape(()), seed.device
    if not _is_int(seed):
        raise TypeError(f"seed must be an int or a one-element int64 tensor, got {_shown(seed)}")
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed must fit in 64 bits, got {_shown(seed)}")
        seed = seed - 2**64 if seed >= 2**63 else seed
    # full, not tensor: a fill needs no copy from the host, which would wait for the device.
    return torch.full((), seed, dtype=torch.int64, device=device), device


def check_draws_differ() -> None:
    """Raise inside torch.func.vmap, where the numbers 0 .. B - 1 are those of every lane."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    levels = torch._C._functorch.get_interpreter_stack() or ()
    if any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels):
        raise ValueError(
            "index must be given inside torch.func.vmap, a number for each sample of each lane: "
            "all lanes would draw the same noise"
        )


def as_index(index: Tensor | None, rows: int, device: torch.device | str | None) -> Tensor:
    """The numbers of the samples, (B,) int64; 0 .. B - 1 by default."""
    if index is None:
        check_draws_differ()
        return torch.arange(rows, device=device)
    check_int64(index=index)
    check_shape("index", index, (rows,))
    check_device("index", index, device)
    return index


def as_step(
    name: str,
    step: int | Tensor,
    rows: int,
    device: torch.device | str | None,
    limit: int,
    least: int = 0,
) -> Tensor:
    """A step or timestep in [least, limit) as an int64 tensor (B,); a shared one is expanded."""
    if isinstance(step, Tensor):
        check_tensor(name, step)
        if step.dtype not in _INTEGERS:
            raise TypeError(f"{name} must be an int or an integer tensor, got {step.dtype}")
        if step.dim() > 0:
            check_shape(name, step, (rows,))
        check_device(name, step, device)
        if readable(step) and step.numel():
            low, high = _extremes(step)
            if low < least or high >= limit:
                raise ValueError(
                    f"{name} must be in [{least}, {limit}), got values from {low} to {high}"
                )
        return step.to(torch.int64).expand(rows)
    if not _is_int(step):
        raise TypeError(f"{name} must be an int or an integer tensor, got {_shown(step)}")
    if not least <= step < limit:
        raise ValueError(f"{name} must be in [{least}, {limit}), got {_shown(step)}")
    return torch.full((), step, dtype=torch.int64, device=device).expand(rows)


def check_integers(
    name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, low: int, high: int
) -> None:
    """Raise unless int32 or int64 of this shape on this device, in [low, high] where readable."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {_dtype_of(tensor)}")
    check_tensor(name, tensor)
    check_shape(name, tensor, shape)
    check_device(name, tensor, device)
    if readable(tensor) and tensor.numel():
        least, most = _extremes(tensor)
        if least < low or most > high:
            raise ValueError(
                f"{name} must be in [{low}, {high}], got values from {least} to {most}"
            )


def check_int64(**tensors: Tensor) -> None:
    """Raise unless each is an int64 tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor, got {_dtype_of(tensor)}")
        check_tensor(name, tensor)


def check_counters(counters: Tensor, least: int, device: torch.device) -> None:
    """Raise unless these can count the programs of a launch: int32 zeros side by side."""
    if not isinstance(counters, Tensor) or counters.dtype != torch.int32:
        raise TypeError(f"counters must be an int32 tensor, got {_dtype_of(counters)}")
    check_tensor("counters", counters)
    if counters.dim() != 1 or counters.shape[0] < least or not counters.is_contiguous():
        raise ValueError(
            f"counters must have shape (at least {least},), contiguous, got "
            f"{tuple(counters.shape)} with strides {counters.stride()}"
        )
    check_device("counters", counters, device)
    if readable(counters) and bool(counters.any()):
        raise ValueError(f"counters must be zero, got {int(counters.count_nonzero())} that are not")


def check_writable(written: Mapping[str, Tensor | None], read: Mapping[str, object]) -> None:
    """Raise unless these tensors can be written while the others are read.

    No two elements of a written tensor may share memory, nor one of them with another argument.
    Only addresses and strides are looked at; in a trace, which has no addresses, only strides.
    """
    tracing = torch.compiler.is_compiling()
    memories: dict[str, Memory] = {}
    for name, tensor in written.items():
        if tensor is None:
            continue
        if any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(
                f"{name} must not be expanded, it is written; got strides {tensor.stride()}"
            )
        if tracing:
            continue
        if overlaps_itself(tensor):
            raise ValueError(
                f"{name} must not overlap itself, it is written; got shape {tuple(tensor.shape)} "
                f"with strides {tensor.stride()}"
            )
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{name} must not be an inference tensor, it is written")
        _check_apart(name, tensor, memories)
        memories[name] = Memory(tensor)
    if not tracing:
        for name, value in read.items():
            if isinstance(value, Tensor):
                _check_apart(name, value, memories)


def _check_apart(name: str, tensor: Tensor, written: Mapping[str, Memory]) -> None:
    """Raise where tensor shares memory with one that is written."""
    for other, memory in written.items():
        if memory.meets(tensor):
            raise ValueError(f"{name} must not share memory with {other}, which is written")


def as_row_values(name: str, value: float | Tensor, rows: int, like: Tensor) -> Tensor:
    """A number or a tensor () or (B,) as a tensor (B,) of at least float32, without NaN."""
    dtype = compute_dtype(like)
    if isinstance(value, Tensor):
        check_tensor(name, value)
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a number or a floating tensor, got {value.dtype}")
        if value.dim() > 0:
            check_shape(name, value, (rows,))
        check_device(name, value, like.device)
        made = value.to(dtype)
        if readable(value) and not bool(made.isfinite().all()):
            raise ValueError(f"{name} must be finite, as {dtype}, too, got {value.tolist()}")
        return made.expand(rows)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number or a floating tensor, got {_shown(value)}")
    most = torch.finfo(dtype).max
    if not (-most <= value <= most and _fits(value)):
        raise ValueError(f"{name} must be finite, as {dtype}, too, got {_shown(value)}")
    return torch.full((), value, dtype=dtype, device=like.device).expand(rows)


def check_attention(window: int | None, softcap: float | None, scale: float) -> None:
    """Raise unless these options of attention make sense."""
    if window is not None:
        check_int("window", window, 1)
    if softcap is not None:
        check_number("softcap", softcap, SMALLEST)
    check_number("scale", scale)


# Noise that must change ---------------------------------------------------------------------------
_Place = tuple[str, str, int]
_seen: dict[_Place, tuple[int, weakref.ref[Tensor]]] | None = {}  # None: it was said


def warn_of_repeated_noise(
    name: str, seed: int | Tensor, index: Tensor | None, changing: Tensor
) -> None:
    """Warn, once, where a line of a program draws the noise of training with one seed again.

    For the public function `name`, where gradients are recorded. changing: what is a new tensor at
    each step of training. So two lines of a step may draw the same, and a comparison may, and a
    backward that computes its forward again (checkpointing).
    """
    if _seen is None or index is not None or not isinstance(seed, int):
        return
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() >= 0:
        return
    caller = sys._getframe(2)
    place = name, caller.f_code.co_filename, caller.f_lineno
    before, tensor = _seen.get(place, (None, None))
    if before == seed and tensor is not None and tensor() is not changing:
        say_noise_is_repeated(name, seed)
    else:
        _seen[place] = seed, weakref.ref(changing)


def say_noise_is_repeated(name: str, seed: int) -> None:
    """Warn of the caller's caller's caller, if that was not done before."""
    global _seen
    if _seen is not None:
        _seen = None
        warnings.warn(
            f"{name} draws the same noise again: seed is {seed} as before, and index is not given. "
            "In training one of them must change at every step: seed=step, or index=row + 2**32 * "
            "epoch. This is said once.",
            stacklevel=4,
        )


def _extremes(tensor: Tensor) -> tuple[int, int]:
    """The smallest and the largest of integers on the CPU."""
    if tensor.numel() > 64:
        return tuple(int(v) for v in tensor.aminmax())  # type: ignore[return-value]
    values = tensor.flatten().tolist()  # of a few, sooner than a reduction
    return min(values), max(values)


def _dtype_of(value: object) -> str:
    """The dtype of a tensor, the type of anything else."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _is_int(value: object) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def _fits(value: float) -> bool:
    """Whether PyTorch takes it: of integers those of 64 bits."""
    return not isinstance(value, int) or -(2**63) <= value < 2**63


def _shown(value: object) -> str:
    """A value as messages show it: Python refuses to write out integers of thousands of digits."""
    if isinstance(value, int) and abs(value) > 2**128:
        return f"an int of {value.bit_length()} bits"
    return repr(value)


def _as_device(device: object) -> torch.device:
    """A device of its name or number."""
    words = "device must be a torch.device or the name of one"
    if isinstance(device, bool) or not isinstance(device, str | int):
        raise TypeError(f"{words}, got {device!r}")
    try:
        return torch.device(device)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise ValueError(f"{words}, got {device!r}") from error
