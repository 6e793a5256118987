"""What the commands share of reading their arguments.

The options of a command are a dataclass, of which tyro makes the flags; the comment of a field is
its help. A config that is known only when the first argument is read is a parameter of that class.
"""

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

Device = Annotated[
    str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: cuda if present)")
]


def parse(options: Any, *configs: type, prog: str, args: Sequence[str]) -> Any:
    """The options, with these configs for the parameters of their class."""
    return tyro.cli(options[configs] if configs else options, prog=prog, args=args)


def with_defaults(config: type, defaults: Mapping[str, Any]) -> type:
    """The config with other defaults."""
    hints = typing.get_type_hints(config, include_extras=True)

    # A class statement: of a class without source tyro finds no comments, its parents' neither.
    class Options(config):  # type: ignore[valid-type, misc]
        __doc__ = config.__doc__
        __annotations__ = {name: hints[name] for name in defaults}

    for name, value in defaults.items():
        setattr(Options, name, value)
    return dataclass(frozen=True)(Options)
