"""The cases under pytest-benchmark: `pytest benchmarks`, with all of its options.

    pytest benchmarks -k guided_step --benchmark-json out.json

A case is compared with float64 before any of its providers is timed. On a GPU a timed round waits
for the device at its end, so that its time is that of the work, host included; `benchmarks.run`
tells the two apart. What is not installed, or needs a GPU, is skipped with the reason.
"""

from functools import cache

import pytest
import torch

from benchmarks.harness.case import Case, Inputs
from benchmarks.suites import cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_ROUNDS, _WARM_UPS = 20, 2


def _first_of_each() -> list[Case]:
    """The most important size and dtype of each op and model; the others are for the table."""
    found: dict[tuple[str, str], Case] = {}
    for case in cases("all", DEVICE):
        found.setdefault((case.name, case.variant), case)
    return list(found.values())


_CASES = _first_of_each()


@cache
def judged_inputs(number: int) -> list[Inputs]:
    """Inputs on which ours was found right."""
    case = _CASES[number]
    sets = case.sets(DEVICE)
    case.gate(sets)
    return sets


@pytest.mark.parametrize(
    ("number", "provider"),
    [
        pytest.param(number, provider, id=f"{case}, {provider}")
        for number, case in enumerate(_CASES)
        for provider in case.providers
    ],
)
def test_case(benchmark, number, provider):
    case = _CASES[number]
    missing = case.providers[provider].missing(DEVICE)
    if missing:
        pytest.skip(f"{provider}: {missing}")
    torch.compiler.reset()
    calls = case.providers[provider].build(judged_inputs(number))
    turn = iter(range(10**9))

    def call():
        calls[next(turn) % len(calls)]()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = str(case)
    benchmark.extra_info["items"] = case.items
    benchmark.pedantic(call, rounds=_ROUNDS, warmup_rounds=_WARM_UPS, iterations=1)
