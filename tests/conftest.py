"""What decides where a test runs, and what every test gets.

pytest                                   what this machine can run in minutes, on all cores
pytest --slow                            the long tests too
pytest tests/fuzz --fuzz 100000          so many made-up calls in place of 2,000
TRITON_INTERPRET=1 pytest -m kernel      kernels, in Triton's interpreter
pytest -m offline                        every launch compiled for every architecture
pytest -m peers                          comparisons with other libraries
pytest -m cuda                           on a GPU

The last lines of a run say what it left out, and how that is run.
"""

import collections
import functools
import importlib.util
import os
import signal
import sys

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

COMMANDS = {
    "kernel": "TRITON_INTERPRET=1 pytest -m kernel",
    "cuda": "on a GPU, pytest -m cuda",
    "offline": "pytest -m offline",
    "peers": "pip install -e '.[peers]', pytest -m peers",
    "slow": "pytest --slow",
}
"""Why a test may be left out, by marker, and the command that runs it."""

MOST_WORKERS = 8  # each imports torch and all tests: more of them save no time

LEFT_OUT = pytest.StashKey[dict[str, int]]()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")
    parser.addoption(
        "--fuzz",
        type=int,
        default=2000,
        metavar="N",
        help="how many calls the tests of tests/fuzz make up, all together (default 2000)",
    )
    parser.addoption(
        "--ghost",
        action="store_true",
        help="stub every kernel launch; tests that pass all the same are listed and make it fail",
    )


# One process on each core -------------------------------------------------------------------------
@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """A run of folders takes all cores, unless `-n` says otherwise; a GPU has one process."""
    option = config.option
    on_gpu = torch.cuda.is_available() and "not cuda" not in option.markexpr
    if (
        not hasattr(config, "workerinput")  # of a worker
        and getattr(option, "numprocesses", 0) is None  # pytest-xdist is here, and no -n was given
        and not on_gpu
        and any(os.path.isdir(argument) for argument in config.args)
        and not (option.usepdb or option.trace or option.collectonly or option.capture == "no")
    ):
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        option.numprocesses = min(cores, MOST_WORKERS)
    if getattr(option, "numprocesses", None) and option.dist == "no":
        option.dist = "worksteal"  # neighbors stay together, and so do their fixtures


def pytest_configure(config):
    # Each process computes on one core, those that the tests start, too.
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    # A suite started in the background inherits an ignored SIGINT; the tests of Ctrl-C need it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[LEFT_OUT] = {}
    if config.getoption("--ghost"):
        from tests.interpreter import GhostReplay

        config.pluginmanager.register(GhostReplay(), "ghost-replay")


# What is left out ---------------------------------------------------------------------------------
@functools.cache
def is_installed(library):
    return importlib.util.find_spec(library) is not None


def reason_to_leave_out(item):
    """The marker for which a test does not run here, if there is one."""
    marked = item.get_closest_marker
    named = any("::" in argument for argument in item.config.args)
    expression = item.config.option.markexpr
    if marked("kernel") and not INTERPRETING:
        return "kernel"
    if marked("cuda") and not torch.cuda.is_available():
        return "cuda"
    if marked("offline") and (
        not HAS_TRITON or INTERPRETING or not (named or "offline" in expression)
    ):
        return "offline"
    if not all(is_installed(name) for peers in item.iter_markers("peers") for name in peers.args):
        return "peers"
    asked = named or "slow" in expression or item.config.option.slow
    if marked("slow") and not marked("cuda") and not asked:  # slow on a CPU
        return "slow"
    return None


@pytest.hookimpl(trylast=True)  # of those that -m and -k chose
def pytest_collection_modifyitems(config, items):
    reasons = [reason_to_leave_out(item) for item in items]
    left_out = [item for item, reason in zip(items, reasons, strict=True) if reason]
    config.stash[LEFT_OUT] = dict(collections.Counter(filter(None, reasons)))
    items[:] = [item for item, reason in zip(items, reasons, strict=True) if not reason]
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # in a worker of pytest-xdist
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Each worker has collected everything."""
    if hasattr(node, "workeroutput"):  # not of one that crashed
        node.config.stash[LEFT_OUT] = node.workeroutput["left_out"]


def pytest_terminal_summary(terminalreporter, config):
    if counts := config.stash[LEFT_OUT]:
        parts = [f"{counts[m]:,} {m} ({c})" for m, c in COMMANDS.items() if m in counts]
        terminalreporter.write_line(f"left out: {'; '.join(parts)}")


# What every test gets -----------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def _poison(request):
    """What a kernel forgets to write is NaN."""
    if INTERPRETING and request.node.get_closest_marker("kernel"):
        with poisoned_empty():
            yield
    else:
        yield
