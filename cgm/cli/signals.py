"""How a command ends that is told to, or that nobody reads any more."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

SIGPIPE = 13  # which Windows has not


@contextlib.contextmanager
def ending_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP are SystemExit with 128 and their number: what was begun is put away."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
