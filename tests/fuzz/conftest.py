import hypothesis
import pytest


@pytest.fixture
def fuzz(request):
    """Runs a function of hypothesis strategies with this test's share of `--fuzz` calls."""
    sharing = sum("fuzz" in item.fixturenames for item in request.session.items)
    cases = max(1, request.config.getoption("--fuzz") // sharing)

    def run(check):
        hypothesis.settings(
            max_examples=cases,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )(check)()

    return run
