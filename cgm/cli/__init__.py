"""The command `cgm`: COMMANDS by name, each a module of this package with a function `run`.

A command is imported when it is called, and what it needs of torch and matplotlib when it runs:
`cgm --help` answers at once.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from cgm.cli.arguments import first_argument


class Command(NamedTuple):
    """A subcommand: what is given before the options, and a line of help."""

    argument: str
    help: str


COMMANDS = {
    "train": Command("FAMILY", "train a model on a task or on your own images"),
    "sample": Command("CHECKPOINT", "draw from a trained model, or from a shipped one"),
    "evaluate": Command("CHECKPOINT", "measure a model on images that it never saw"),
    "convert": Command("FILE OUT", "use a published checkpoint of pix2pix or CycleGAN"),
    "demo": Command("", "draw clothes; how fast and how good they come, in a minute"),
    "compare": Command("", "all families on one task, under one budget"),
    "bench": Command("", "samples per second: fused, plain and compiled"),
    "info": Command("", "versions, GPU, how each op runs here, shipped checkpoints"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns its exit code.

    0: done. 2: something that the user gave does not fit; stderr says what. 130: Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in COMMANDS:
            importlib.import_module(f"cgm.cli.{argv[0]}").run(argv[1:])
            return 0
        if argv and argv[0] == "--version":
            from cgkernels import __version__

            print(f"cgm {__version__}")
            return 0
        first_argument(argv, _usage())
        raise ValueError(f"COMMAND must be one of {', '.join(COMMANDS)}, got {argv[0]!r}")
    except SystemExit as stop:  # after help, or what tyro says of a flag
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        print(f"cgm: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"cgm: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _usage() -> str:
    lines = [f"  cgm {name + ' ' + c.argument:<20} {c.help}" for name, c in COMMANDS.items()]
    last = "With --help, each lists its options. cgm --version says which version this is."
    return "\n".join(["cgm COMMAND ...", "", *lines, "", last])
