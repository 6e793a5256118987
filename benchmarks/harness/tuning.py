"""How an op declares what `benchmarks.tune` sweeps: a function of sizes, and what it may return."""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

from benchmarks.harness.ceilings import Call
from cgkernels import rows

Config = dict[str, Any]


@dataclass(frozen=True)
class Tunable:
    """A function that launches take their configuration from, called as module.name(...).

    Its first argument is a size, the others tell kinds of launches apart. candidates gives what it
    may return for these arguments.
    """

    module: ModuleType
    name: str
    candidates: Callable[..., Iterator[Config]]

    @property
    def function(self) -> Callable[..., Config]:
        return getattr(self.module, self.name)

    @contextlib.contextmanager
    def switched(self) -> Iterator["Switch"]:
        """Inside, launches ask the switch."""
        switch = Switch(self.function)
        with mock.patch.object(self.module, self.name, switch):
            yield switch


@dataclass
class Switch:
    """Stands in for a function: returns the chosen configuration, else what the function does."""

    function: Callable[..., Config]
    config: Config | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)  # arguments, while none is chosen

    def __call__(self, *args: Any, **kwargs: Any) -> Config:
        if self.config is not None:
            return dict(self.config)
        self.asked.append(dict(inspect.signature(self.function).bind(*args, **kwargs).arguments))
        return self.function(*args, **kwargs)

    def call(self, config: Config, call: Call) -> object:
        """The call under a configuration."""
        self.config = config
        return call()


def row_blocks(numel: int, dense: bool) -> Iterator[Config]:
    """2 to 32 elements a thread; of blocks larger than a row only the smallest."""
    for block in (256, 512, 1024, 2048, 4096):
        if block > 256 and block >= 2 * numel:
            return
        for warps in (1, 2, 4, 8):
            if 2 <= block // (32 * warps) <= 32:
                yield {"BLOCK": block, "num_warps": warps}


def early(sizes: Config, too: bool) -> Iterator[Config]:
    """Programs that start when the launch before ends; of some sizes also those that do so early.

    Before sm_90 the latter do not compile, and are dropped.
    """
    for pdl in (False, True) if too else (False,):
        yield {**sizes, "PDL": pdl}


ROWS = Tunable(rows, "row_block", row_blocks)
"""What elementwise ops over rows share."""


def tuned(launcher: Callable[..., Any], candidates: Callable[..., Iterator[Config]]) -> Tunable:
    """Of the function `_launch_config` beside a launcher, which asks it."""
    return Tunable(sys.modules[launcher.__module__], "_launch_config", candidates)
