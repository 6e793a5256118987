"""What decides where a test can run, and what every test gets.

pytest                                   everything but the legs below
TRITON_INTERPRET=1 pytest -m kernel      kernels, in Triton's interpreter
pytest -m offline                        every launch compiled for every architecture
pytest -m cuda                           on a GPU
"""

import signal

import hypothesis
import pytest
import torch

from cgkernels._triton import HAS_TRITON, triton
from cgkernels.testing import poisoned_empty

INTERPRETING = HAS_TRITON and triton.knobs.runtime.interpret

if INTERPRETING:
    from tests import interpreter

    interpreter.install_bf16()

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")


def pytest_addoption(parser):
    parser.addoption(
        "--ghost",
        action="store_true",
        help="stub every kernel launch; tests that pass all the same are listed and make it fail",
    )


def pytest_configure(config):
    # A suite started in the background inherits an ignored SIGINT; the tests of Ctrl-C need it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--ghost"):
        from tests.interpreter import GhostReplay

        config.pluginmanager.register(GhostReplay(), "ghost-replay")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if item.get_closest_marker("kernel") and not INTERPRETING:
        pytest.skip("kernels run in the interpreter: TRITON_INTERPRET=1 pytest -m kernel")
    if item.get_closest_marker("offline"):
        if not HAS_TRITON or INTERPRETING:
            pytest.skip("needs Triton, and no TRITON_INTERPRET")
        if "offline" not in item.config.option.markexpr:
            pytest.skip("takes minutes: pytest -m offline")
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(autouse=True)
def _poison(request):
    """What a kernel forgets to write is NaN."""
    if INTERPRETING and request.node.get_closest_marker("kernel"):
        with poisoned_empty():
            yield
    else:
        yield
