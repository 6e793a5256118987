"""How tests are run: on which cores, what is left out, and what is said of it."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

TOY = """
import os

import pytest
import torch


def test_plain():
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"]) == 1


@pytest.mark.kernel
def test_kernel(): ...


@pytest.mark.offline
def test_offline(): ...


@pytest.mark.peers("no_library_has_this_name")
def test_peers(): ...


@pytest.mark.slow
def test_slow(): ...
"""


def pytest_process(folder, *arguments):
    """Run pytest on a folder with the toy; return (exit status, output)."""
    (folder / "conftest.py").write_text("from tests.conftest import *\n")
    (folder / "test_toy.py").write_text(TOY)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in [*environment]:
        if name.startswith("PYTEST_") or name in ("OMP_NUM_THREADS", "TRITON_INTERPRET"):
            del environment[name]
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "in_workers"),
    [
        (("test_toy.py",), False),
        pytest.param((".",), True, marks=pytest.mark.slow),
        pytest.param((".", "-p", "no:xdist"), False, marks=pytest.mark.slow),
        pytest.param((".", "-n", "0"), False, marks=pytest.mark.slow),
    ],
)
def test_what_cannot_run_is_left_out_in_one_line(arguments, in_workers, tmp_path):
    status, output = pytest_process(tmp_path, *arguments)
    (said,) = [line for line in output.splitlines() if line.startswith("left out: ")]
    for part in (
        "1 kernel (TRITON_INTERPRET=1 pytest -m kernel)", "1 offline (pytest -m offline)",
        "1 peers (pip install -e '.[peers]', pytest -m peers)", "1 slow (pytest --slow)",
    ):  # fmt: skip
        assert part in said
    assert status == 0 and "1 passed" in output and "skipped" not in output, output
    assert (" workers" in output) == in_workers, output


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [(".", "--slow", "-k", "test_slow"), (".", "-m", "slow"), ("test_toy.py::test_slow",)],
)
def test_what_is_slow_is_run_when_asked_for(arguments, tmp_path):
    status, output = pytest_process(tmp_path, *arguments)
    assert status == 0 and "1 passed" in output and "left out" not in output, output
