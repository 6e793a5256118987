"""How a command ends that is told to, or that nobody reads any more, and the streams it has."""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

SIGPIPE = 13  # which Windows has not
_AGAIN = 0.05  # seconds from a signal that comes at a bad moment to the next try


@contextlib.contextmanager
def ending_by_signals() -> Iterator[None]:
    """Ctrl-C is KeyboardInterrupt, SIGTERM and SIGHUP are SystemExit with 128 and their number.

    What was begun is put away. While something is imported they wait: what they raise there may be
    taken for a package that is missing, and the command would go on without it.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if _importing(frame):
            again = threading.Timer(_AGAIN, signal.raise_signal, [number])
            again.daemon = True
            again.start()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            usual = (signal.SIG_DFL, signal.default_int_handler)
            if number is not None and signal.getsignal(number) in usual:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def mend_streams() -> None:
    """Closed ones (`>&-`) go nowhere, and what a stream cannot encode is escaped."""
    for name in ("stdin", "stdout", "stderr"):  # in the order of their numbers, which are free
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def discard_stdout() -> None:
    """What is left to be written goes nowhere, as Python would otherwise complain of at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def tell(message: str) -> None:
    """A line on stderr, if somebody reads it."""
    with contextlib.suppress(OSError):
        print(f"cgm: {' '.join(message.split())}", file=sys.stderr, flush=True)
