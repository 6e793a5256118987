"""What the commands share of reading their arguments, and of saying what is wrong with them.

The options of a command are a dataclass, of which tyro makes the flags; the comment of a field is
its help. A config that is known only when the first argument is read is a parameter of that class.
"""

import contextlib
import dataclasses
import re
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

Device = Annotated[
    str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: cuda if present)")
]


def parse(options: Any, *configs: type, prog: str, args: Sequence[str]) -> Any:
    """The options, with these configs for the parameters of their class."""
    return tyro.cli(options[configs] if configs else options, prog=prog, args=args)


# Configs as flags ---------------------------------------------------------------------------------
def as_flags(
    config: type, defaults: Mapping[str, Any] | None = None, hidden: Collection[str] = ()
) -> type:
    """The config with other defaults and without the hidden fields, not checked: see `checked`."""
    defaults = defaults or {}
    hints = typing.get_type_hints(config, include_extras=True)
    flags: dict[str, Any] = {name: hints[name] for name in defaults}
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        if field.name in hidden:
            flags[field.name] = tyro.conf.Suppress[hint]  # type: ignore[misc, valid-type]
        elif _is_choice_of_words(hint) and field.default is not dataclasses.MISSING:
            choices = "|".join(typing.get_args(hint))
            flags[field.name] = Annotated[str, tyro.conf.arg(metavar=f"{{{choices}}}")]

    # A class statement: of a class without source tyro finds no comments, its parents' neither.
    class Options(config):  # type: ignore[valid-type, misc]
        __doc__ = config.__doc__
        __annotations__ = flags

        def __post_init__(self) -> None:
            pass

    for name, value in defaults.items():
        setattr(Options, name, value)
    return dataclass(frozen=True)(Options)


def _is_choice_of_words(hint: Any) -> bool:
    return typing.get_origin(hint) is Literal and all(
        isinstance(choice, str) for choice in typing.get_args(hint)
    )


def checked(config: type, options: Any, prefix: str = "", **given: Any) -> Any:
    """The config of options that `as_flags` made of it, with what is given; errors name flags."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(config)} | given
    with naming_flags(_flags(options, prefix)):
        return config(**values)


# Errors -------------------------------------------------------------------------------------------
@contextlib.contextmanager
def naming_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """Errors that come out of the block say the flag where they say the name of an argument."""
    try:
        yield
    except (ValueError, TypeError) as error:
        text = in_flags(str(error), flags)
        raise (TypeError if isinstance(error, TypeError) else ValueError)(text) from error


def in_flags(text: str, flags: Mapping[str, str]) -> str:
    """A message of the library in the words of the command line.

    The name that it begins with is replaced, and those that are no words: training.steps.
    """

    def flag(match: re.Match[str]) -> str:
        name = match[0]
        plain = name.isalpha() and match.start() > 0
        return name if plain else flags.get(name, name)

    # Not within a path, a flag or a value in quotes.
    return re.sub(r"(?<![\w/.'\"=-])[A-Za-z_][\w.]*\w(?![\w/'\":=-])|^n(?= )", flag, text)


def flags_of(options: Any) -> dict[str, str]:
    """The flag of each option, by the name of the argument; those of the command itself first.

    Fields of a config are also found under the name of the config: training.steps.
    """
    found: dict[str, str] = {}
    for field in dataclasses.fields(options):
        if dataclasses.is_dataclass(value := getattr(options, field.name)):
            prefix = "" if field.name == "solver" else f"{field.name}."
            of_config = _flags(value, prefix)
            found |= {name: flag for name, flag in of_config.items() if name not in found}
            found |= {f"{field.name}.{name}": flag for name, flag in of_config.items()}
            found |= {f"{field.name}.config.{name}": flag for name, flag in of_config.items()}
    return found | _flags(options)


def _flags(options: Any, prefix: str = "") -> dict[str, str]:
    names = (field.name for field in dataclasses.fields(options))
    return {name: f"--{prefix}{name.replace('_', '-')}" for name in names}
