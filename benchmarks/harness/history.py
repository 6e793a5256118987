"""The newest rows of each case in a folder of results, and which of them are stale."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.records import OK, OURS, Row, read, version_of

_POSSIBLE = 0.95  # share of the floor that a time on a GPU must reach


@dataclass(frozen=True)
class Run:
    """A file of results."""

    name: str
    environment: dict[str, str]
    rows: list[Row]

    @property
    def age(self) -> tuple[str, ...]:
        """Sorts runs, the oldest first."""
        return self.environment["date"], self.environment.get("time", ""), self.name

    @property
    def cuda(self) -> bool:
        return "cuda" in self.environment


@dataclass(frozen=True)
class Measured:
    """Rows that belong together, of one run: the providers of a case, or the sizes of a sweep."""

    run: Run
    rows: list[Row]

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def title(self) -> str:
        shown = ", ".join(p for p in (self.first.variant, self.first.size, self.first.dtype) if p)
        return shown + ", **stale**" * self.stale

    @property
    def times(self) -> dict[str, float]:
        """Median by provider."""
        return {row.provider: row.p50 for row in self.rows if row.p50 is not None}

    @property
    def stale(self) -> bool:
        return any(not row.source or row.version != version_of(row.source) for row in self.rows)

    def impossible(self, row: Row) -> bool:
        """Whether a time is less than it can be. Caches explain that on a CPU, not on a GPU."""
        times = [time for time in (row.p50, row.graph) if time is not None]
        return self.run.cuda and bool(times) and min(times) < _POSSIBLE * (row.floor or 0.0)

    @property
    def speed_up(self) -> tuple[float, str] | None:
        """Time of the strongest baseline over ours, and its name; None where that says nothing."""
        others = self.times
        ours = others.pop(OURS, None)
        if ours is None or not others or self.stale or any(map(self.impossible, self.rows)):
            return None
        strongest = min(others, key=others.__getitem__)
        return others[strongest] / ours, strongest


def load(results: Path) -> list[Run]:
    """The runs in a folder, the newest first.

    Raises:
        ValueError: a file is damaged; the message names it.
    """
    runs = []
    for file in results.glob("*.csv"):
        environment, rows = read(file)
        for name in ("device", "date", "commit"):
            if name not in environment:
                raise ValueError(f"{file}: has no line '# {name}: ...'")
        for number, row in enumerate(rows):
            if row.status == OK and not row.p50:
                raise ValueError(f"{file}: row {number + 1} is damaged: it has no time")
        runs.append(Run(file.name, environment, rows))
    return sorted(runs, key=lambda run: run.age, reverse=True)


def newest(runs: Sequence[Run]) -> list[Measured]:
    """Each case and sweep of a device, from the first of these runs that has it."""
    found: dict[tuple[str, ...], Measured] = {}
    for run in runs:
        together: dict[tuple[str, ...], list[Row]] = defaultdict(list)
        for row in run.rows:
            sweep = row.suite, row.case, row.variant, row.extent, row.dtype
            together[sweep if row.suite == "growth" else row.key[:-1]].append(row)
        for key, rows in together.items():
            found.setdefault(key, Measured(run, rows))
    return list(found.values())
