"""One trainer in a folder at a time."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".training.lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder, which is made if need be, as long as the block runs.

    The lock file has the number of the process that holds it. The lock itself is one of the
    operating system, which ends with its process, however that ends: what a killed one left behind
    is taken over.

    Raises:
        ValueError: another process holds it, or another run of this one.
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK_FILE
    with contextlib.ExitStack() as stack:
        while True:
            opened = stack.enter_context(file.open("a+", encoding="utf-8"))
            if not _lock(opened.fileno()):
                opened.seek(0)
                raise ValueError(
                    f"out must not be in use, got {folder}: process "
                    f"{opened.read().strip() or 'unknown'} trains there"
                )
            # The one who held it may just have removed it: then it locks nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(opened.fileno()), file.stat()):
                    break
        opened.truncate(0)
        opened.write(f"{os.getpid()}\n")
        opened.flush()
        stack.callback(file.unlink, missing_ok=True)
        yield


def _lock(number: int) -> bool:
    """Whether the open file could be locked."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)  # others: a file system without locks
    return True
