"""What each op is measured on and what it launches: one file an op, under the op's own name."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator

from cgkernels.testing import Launch

LAUNCHES: dict[str, Callable[[], Iterator[Launch]]] = {}
"""What each registered op can launch: dtypes, layouts, branches of its launch configuration."""

for _module in pkgutil.iter_modules(__path__):
    LAUNCHES |= importlib.import_module(f"{__name__}.{_module.name}").LAUNCHES


def source_of(op: str) -> str:
    """The module of `cgkernels` that defines a registered op."""
    return LAUNCHES[op].__module__.replace("benchmarks.", "cgkernels.", 1)
