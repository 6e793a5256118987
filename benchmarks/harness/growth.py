"""How time grows with size: exponents of the sweeps of the suite growth."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy

from benchmarks.harness.records import OK, Row

TOLERANCE = 0.5  # for noise, and for caches that a larger size falls out of; a wrong loop adds 1


@dataclass(frozen=True)
class Fit:
    """time ~ extent^exponent, from the sizes where work outweighs what every call costs."""

    case: str
    variant: str
    extent: str
    dtype: str
    sizes: tuple[int, ...]
    times: tuple[float, ...]
    exponent: float
    limit: float

    @property
    def too_fast(self) -> bool:
        """Whether it grows faster than it must."""
        return self.exponent > self.limit + TOLERANCE


def fits(rows: Iterable[Row]) -> list[Fit]:
    """The exponent of each sweep with three sizes or more.

    Least squares in logarithms over the upper half of the sizes, at least three: below, the cost of
    a call hides the growth.
    """
    sweeps: dict[tuple[str, ...], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row.suite == "growth" and row.status == OK and row.extent_value is not None:
            key = (row.case, row.variant, row.extent, row.dtype, row.provider)
            sweeps[key][row.extent_value] = row
    found = []
    for (case, variant, extent, dtype, _), sweep in sweeps.items():
        sizes = sorted(sweep)
        if len(sizes) < 3:
            continue
        times = [sweep[size].p50 or math.nan for size in sizes]
        first = min(len(sizes) // 2, len(sizes) - 3)
        logs = numpy.log(sizes[first:]), numpy.log(times[first:])
        exponent = float(numpy.polyfit(*logs, 1)[0])
        limit = sweep[sizes[0]].extent_limit or math.inf
        found.append(Fit(case, variant, extent, dtype, tuple(sizes), tuple(times), exponent, limit))
    return found
