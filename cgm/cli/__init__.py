"""The command `cgm`: COMMANDS by name, each a module of this package with a function `run`.

A command is imported when it is called, and what it needs of torch and matplotlib when it runs:
`cgm --help` answers at once.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from cgm.cli.arguments import first_argument
from cgm.cli.signals import SIGPIPE, discard_stdout, ending_by_signals, mend_streams, tell


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

    0: done. 2: something that the user gave does not fit; stderr says what. 128 and the number of a
    signal: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP, 141 where nobody reads stdout any more.
    """
    argv = sys.argv[1:] if argv is None else argv
    mend_streams()
    try:
        with ending_by_signals(), warnings.catch_warnings():
            warnings.showwarning = _tell_warning  # type: ignore[assignment]
            _run(argv)
            sys.stdout.flush()  # a closed pipe shows now
        return 0
    except SystemExit as stop:  # after help, a signal, or what tyro says of a flag
        code = int(stop.code or 0)
        return 128 + SIGPIPE if code == 1 else code  # 1: a closed pipe, as rich meets it
    except KeyboardInterrupt as stop:
        tell(str(stop) or "interrupted")
        return 130
    except BrokenPipeError:
        discard_stdout()
        return 128 + SIGPIPE
    except (MemoryError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        tell(f"out of memory; fewer or smaller images, batches or networks need less: {error}")
        return 2
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        tell(str(error))
        return 2


def _run(argv: Sequence[str]) -> None:
    if argv and argv[0] in COMMANDS:
        importlib.import_module(f"cgm.cli.{argv[0]}").run(argv[1:])
    elif argv and argv[0] == "--version":
        from cgkernels import __version__

        print(f"cgm {__version__}")
    else:
        first_argument(argv, _usage())
        from cgkernels.checks import check_choice

        check_choice("COMMAND", argv[0], COMMANDS)


def _is_of_memory(error: Exception) -> bool:
    """PyTorch has a class of its own for GPUs only."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(part in str(error) for part in words)


def _tell_warning(message: Warning | str, category: type[Warning], *where: object) -> None:
    tell(str(message))


def _usage() -> str:
    lines = [f"  cgm {name + ' ' + c.argument:<20} {c.help}" for name, c in COMMANDS.items()]
    last = "With --help, each lists its options. cgm --version says which version this is."
    return "\n".join(["cgm COMMAND ...", "", *lines, "", last])
