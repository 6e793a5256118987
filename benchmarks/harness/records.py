"""Rows of results, and the CSV files that they are kept in.

A file is one run: lines `# name: value` of its environment, then a header and the rows, each
written to disk as it comes. A file is never appended to. Every row carries the version of the code
that it measured, so that a later reader can tell which rows are stale.
"""

import ast
import csv
import dataclasses
import hashlib
import importlib.util
import io
import os
import re
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

OURS = "cgkernels"
OK = "ok"


@dataclass(frozen=True)
class Row:
    """One provider on one case. Times are microseconds of one call; None is not measured.

    status: "ok", or why there is no time: "not installed", "needs CUDA", "out of time", "failed:
    ...". The fields from p20 to peak are those of `cgkernels.timing.Timing`. floor, bound: the
    least time that the ceilings of the device allow, and what sets it. of_floor: floor / p50, where
    1 is the best that can be. items: samples, or elements, that a call makes. extent: what a sweep
    of growth varies, its value and the exponent that time may grow with. source, version: the
    module that defines what was measured, and the hash of its code then (`version_of`).
    """

    suite: str
    case: str
    variant: str
    size: str
    label: str
    dtype: str
    provider: str
    status: str
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    n: int | None = None
    low: float | None = None
    high: float | None = None
    host: float | None = None
    wall: float | None = None
    graph: float | None = None
    graph_error: str = ""
    launch_bound: bool | None = None
    syncs: int | None = None
    peak: int | None = None
    sets: int | None = None
    compile_s: float | None = None
    floor: float | None = None
    bound: str = ""
    of_floor: float | None = None
    items: int | None = None
    bytes: int | None = None
    flops: int | None = None
    extent: str = ""
    extent_value: int | None = None
    extent_limit: float | None = None
    source: str = ""
    version: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What is compared between two files."""
        return self.suite, self.case, self.variant, self.size, self.dtype, self.provider


class Writer:
    """Writes a new file of results; it exists from the first row on."""

    def __init__(self, folder: Path, environment: Mapping[str, Any]) -> None:
        """Raises ValueError where the folder cannot be made."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out must be a folder, got {folder}: {error.strerror}") from error
        parts = (environment[name] for name in ("device", "date", "commit"))
        name = "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", str(part)).strip("-") for part in parts)
        self.file, number = folder / f"{name}.csv", 1
        while self.file.exists():
            number += 1
            self.file = folder / f"{name}_{number}.csv"
        self.environment = environment

    def write(self, row: Row) -> None:
        """Adds a row, and waits until it is on the disk."""
        new = not self.file.exists()
        with self.file.open("a", newline="", encoding="utf-8") as opened:
            if new:
                for name, value in self.environment.items():
                    opened.write(f"# {name}: {' '.join(str(value).split())}\n")
            writer = csv.DictWriter(opened, [field.name for field in dataclasses.fields(Row)])
            if new:
                writer.writeheader()
            writer.writerow({n: _text(v) for n, v in dataclasses.asdict(row).items()})
            opened.flush()
            os.fsync(opened.fileno())


def read(file: Path) -> tuple[dict[str, str], list[Row]]:
    """Environment and rows of a file; ValueError, which names the file, if it is none of ours."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    environment = {}
    while lines and lines[0].startswith("# "):
        name, _, value = lines.pop(0)[2:].partition(": ")
        environment[name] = value
    names = [field.name for field in dataclasses.fields(Row)]
    reader = csv.DictReader(lines)
    if reader.fieldnames is None or not set(names[:8]) <= set(reader.fieldnames):
        raise ValueError(f"{file}: is no file of results: it has no columns {', '.join(names[:8])}")
    hints = typing.get_type_hints(Row)
    rows = []
    for number, line in enumerate(reader):
        try:
            if None in line or None in line.values():
                raise ValueError("it has not as many values as the header has names")
            known = {n: _value(hints[n], line[n]) for n in names if n in line}
            rows.append(Row(**known))
        except (KeyError, TypeError, ValueError) as error:  # a line cut off, say
            raise ValueError(f"{file}: row {number + 1} is damaged: {error}") from error
    return environment, rows


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else " ".join(str(value).split())


def _value(hint: Any, text: str) -> Any:
    optional = isinstance(hint, types.UnionType)
    kind = typing.get_args(hint)[0] if optional else hint
    if text == "" and optional:
        return None
    if kind is bool:
        return {"True": True, "False": False}[text]
    return kind(text)


# Versions -----------------------------------------------------------------------------------------
@cache
def version_of(module: str) -> str:
    """Hash of the code of a module and of what it imports of this project.

    Comments, docstrings and formatting do not count.
    """
    digest = hashlib.sha256()
    for name in sorted(_closure(module)):
        digest.update(f"{name}\n{_code(name)}\n".encode())
    return digest.hexdigest()[:12]


def _closure(module: str) -> set[str]:
    found: set[str] = set()
    waiting = {module}
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= {other for other in _imported(name) if other not in found and _source(other)}
    return found


def _imported(module: str) -> Iterator[str]:
    """Modules of this project that a module imports."""
    for node in ast.walk(ast.parse(_source(module))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name for name in inner if _source(name)]
            if len(names) < len(inner):
                names.append(node.module)
        yield from (name for name in names if name.split(".")[0] in ("cgkernels", "cgm"))


@cache
def _source(module: str) -> str:
    """Source of a module; empty for a name that is none."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a name inside a module
        return ""
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return ""
    return Path(spec.origin).read_text(encoding="utf-8")


@cache
def _code(module: str) -> str:
    """Source without docstrings, comments and space: the same text on every version of Python."""
    source = _source(module)
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            text = body[0].value
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                last = text.end_lineno or text.lineno
                lines[text.lineno - 1 : last] = [""] * (last - text.lineno + 1)
    return "".join("".join(lines).split())
