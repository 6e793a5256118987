import collections

import hypothesis
import pytest


@pytest.fixture
def fuzz(request):
    """Runs a function of hypothesis strategies with this test's share of `--fuzz` calls.

    Files have equal shares, and so have the tests of a file.
    """
    items = (item for item in request.session.items if "fuzz" in item.fixturenames)
    tests = collections.Counter(item.module.__name__ for item in items)
    sharing = max(1, len(tests)) * max(1, tests[request.module.__name__])
    cases = max(1, request.config.getoption("--fuzz") // sharing)

    def run(check):
        hypothesis.settings(
            max_examples=cases,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )(check)()

    return run
