"""Where a command writes to: found out before its work, and said afterwards."""

import tempfile
from collections.abc import Sequence
from pathlib import Path


def make_folder(name: str, folder: Path, what: str = "a folder") -> None:
    """Makes the folder, with those above it; ValueError, by name, if no file can be written to it.

    That is tried, as neither permissions nor a read-only disk can be told otherwise.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} must be {what} to write to, got {folder}: {error.strerror or error}"
        ) from error


def replaced(files: Sequence[Path]) -> str:
    """What is to be said of files that are there already, asked before they are written."""
    there = [file.name for file in files if file.exists()]
    return f" (in place of {', '.join(there)} from before)" if there else ""


def free_name(file: Path) -> Path:
    """The file, or the first of name-2, name-3 ... that is not there yet."""
    number, free = 1, file
    while free.exists():
        number += 1
        free = file.with_name(f"{file.stem}-{number}{file.suffix}")
    return free
