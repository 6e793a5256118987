"""Made-up calls of everything public: each gives the right result or a refusal in words.

`pytest tests/fuzz` makes 2,000 of them, `--fuzz N` any number, each time the same; a file alone
makes them all.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def bits(tensor: Tensor) -> bytes:
    """What the tensor holds, NaN and the sign of zero included."""
    plain = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return plain.flatten().view(torch.uint8).numpy().tobytes()


def call(function: Callable, arguments: Mapping[str, Any], names: tuple[str, ...] = ()) -> Any:
    """The result of function(**arguments), or None where it was refused as it should be.

    A refusal is a ValueError or TypeError that names an argument (of the function, or one of
    `names`), before a tensor was written. Anything else passes through and fails the test.
    """
    tensors = {name: t for name, t in arguments.items() if is_plain(t)}
    before = {name: bits(t) for name, t in tensors.items()}
    try:
        return function(**arguments)
    except (ValueError, TypeError) as error:
        known = {*inspect.signature(function).parameters, *names}
        assert any(name in str(error) for name in known), f"names no argument: {error!r}"
        written = [name for name, t in tensors.items() if bits(t) != before[name]]
        assert not written, f"wrote {written} before it raised {error!r}"
        return None


def is_plain(value: object) -> bool:
    """Whether it is a dense tensor of the CPU, whose values can be compared."""
    return (
        isinstance(value, Tensor)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and not (value.is_quantized or value.is_nested)
    )
