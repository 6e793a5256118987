"""Argument errors, in words: what a public function got, and what fits.

The checks of shapes, dtypes and devices never touch data. Values are checked only where that waits
for no device: Python numbers, and tensors on the CPU outside a trace.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cgkernels.rows import compute_dtype

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32)


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise unless value is one of these."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless tensor has exactly this shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def check_rows(name: str, tensor: Tensor) -> None:
    """Raise unless tensor has a batch dimension."""
    if tensor.dim() == 0:
        raise ValueError(f"{name} must have shape (B, ...), got a tensor without dimensions")


def check_float(**tensors: Tensor) -> None:
    """Raise unless each is float32, float16 or bfloat16; float64 passes on the CPU."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype in FLOATS:
            continue
        if tensor.dtype != torch.float64 or tensor.is_cuda:
            raise TypeError(
                f"{name} must be float32, float16 or bfloat16 (float64 on the CPU only), "
                f"got {tensor.dtype} on {tensor.device}"
            )


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
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def as_seed(
    seed: int | Tensor, device: torch.device | str | None
) -> tuple[Tensor, torch.device | str | None]:
    """A seed as an int64 tensor (), and the device: that of a tensor seed unless one is given."""
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ValueError(
                f"seed must be an int or a one-element int64 tensor, got {seed.dtype} of shape "
                f"{tuple(seed.shape)}"
            )
        check_device("seed", seed, device)
        return seed.reshape(()), seed.device
    if isinstance(seed, bool) or not isinstance(seed, int | torch.SymInt):
        raise TypeError(f"seed must be an int or a one-element int64 tensor, got {seed!r}")
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed must fit in 64 bits, got {seed}")
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
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        raise TypeError(f"index must be an int64 tensor, got {_dtype_of(index)}")
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
    if isinstance(step, bool) or not isinstance(step, int | torch.SymInt):
        raise TypeError(f"{name} must be an int or an integer tensor, got {step!r}")
    if not least <= step < limit:
        raise ValueError(f"{name} must be in [{least}, {limit}), got {step}")
    return torch.full((), step, dtype=torch.int64, device=device).expand(rows)


def check_integers(
    name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, low: int, high: int
) -> None:
    """Raise unless int32 or int64 of this shape on this device, in [low, high] where readable."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {_dtype_of(tensor)}")
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


def check_counters(counters: Tensor, least: int, device: torch.device) -> None:
    """Raise unless these can count the programs of a launch: int32 zeros side by side."""
    if not isinstance(counters, Tensor) or counters.dtype != torch.int32:
        raise TypeError(f"counters must be an int32 tensor, got {_dtype_of(counters)}")
    if counters.dim() != 1 or counters.shape[0] < least or not counters.is_contiguous():
        raise ValueError(
            f"counters must have shape (at least {least},), contiguous, got "
            f"{tuple(counters.shape)} with strides {counters.stride()}"
        )
    check_device("counters", counters, device)
    if readable(counters) and bool(counters.any()):
        raise ValueError(f"counters must be zero, got {int(counters.count_nonzero())} that are not")


def check_writable(**tensors: Tensor) -> None:
    """Raise where two elements of a tensor share memory: writing them has no defined result."""
    for name, tensor in tensors.items():
        if any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(
                f"{name} must not be expanded, it is written; got strides {tensor.stride()}"
            )


def as_row_values(name: str, value: float | Tensor, rows: int, like: Tensor) -> Tensor:
    """A number or a tensor () or (B,) as a tensor (B,) of at least float32, without NaN."""
    dtype = compute_dtype(like)
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a number or a floating tensor, got {value.dtype}")
        if value.dim() > 0:
            check_shape(name, value, (rows,))
        check_device(name, value, like.device)
        if readable(value) and not bool(value.isfinite().all()):
            raise ValueError(f"{name} must be finite, got {value.tolist()}")
        return value.to(dtype).expand(rows)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number or a floating tensor, got {value!r}")
    if not -math.inf < value < math.inf:  # math.isfinite cannot be traced
        raise ValueError(f"{name} must be finite, got {value}")
    return torch.full((), value, dtype=dtype, device=like.device).expand(rows)


def check_attention(window: int | None, softcap: float | None, scale: float) -> None:
    """Raise unless these options of attention make sense."""
    if window is not None and (isinstance(window, bool) or window < 1):
        raise ValueError(f"window must be a positive number of tokens, got {window}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")


def _extremes(tensor: Tensor) -> tuple[int, int]:
    """The smallest and the largest of integers on the CPU."""
    if tensor.numel() > 64:
        return tuple(int(v) for v in tensor.aminmax())  # type: ignore[return-value]
    values = tensor.flatten().tolist()  # of a few, sooner than a reduction
    return min(values), max(values)


def _dtype_of(value: object) -> str:
    """The dtype of a tensor, the type of anything else."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
