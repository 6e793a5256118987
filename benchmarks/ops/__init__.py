"""What each op is measured on, what it launches and how it is tuned: one file an op, by its name.

A file defines CASES, and where the op has kernels of ours LAUNCHES and TUNABLE.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator

from benchmarks.harness.case import OpCase
from benchmarks.harness.tuning import Tunable
from cgkernels.testing import Launch

CASES: dict[str, list[OpCase]] = {}
"""How each op is measured."""

LAUNCHES: dict[str, Callable[[], Iterator[Launch]]] = {}
"""What each registered op can launch: dtypes, layouts, branches of its launch configuration."""

TUNABLES: dict[str, Tunable] = {}
"""The function that each op takes its launch configuration from."""

for _info in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_info.name}")
    CASES[_info.name] = _module.CASES
    if hasattr(_module, "LAUNCHES"):
        LAUNCHES |= _module.LAUNCHES
        TUNABLES[_info.name] = _module.TUNABLE


def source_of(op: str) -> str:
    """The module of `cgkernels` that defines a registered op."""
    return LAUNCHES[op].__module__.replace("benchmarks.", "cgkernels.", 1)
