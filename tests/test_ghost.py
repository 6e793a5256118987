"""The test of the tests: without its kernel, every test of a kernel must fail.

Part of the interpreter leg (`TRITON_INTERPRET=1 pytest -m kernel`): each test here runs pytest in a
process of its own, on other files than this one.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

NOT_OF_KERNELS = ("test_ghost.py", "test_interpreter_support.py")  # but of the test support

pytestmark = pytest.mark.kernel

TOY = """
import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _silu_kernel(out_ptr, x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(out_ptr + i, x * tl.sigmoid(x), mask=i < n)


def honest(x):
    out = torch.empty_like(x)
    _silu_kernel[(triton.cdiv(x.numel(), 128),)](out, x, x.numel(), 128)
    return out


def falls_back(x):
    honest(x)
    return torch.nn.functional.silu(x)


def check(op):
    x = torch.randn(1000)
    torch.testing.assert_close(op(x), torch.nn.functional.silu(x))


@pytest.mark.kernel
def test_honest():
    check(honest)


@pytest.mark.kernel
def test_fallback():
    check(falls_back)


@pytest.mark.kernel
def test_shape_only():
    assert honest(torch.zeros(3)).shape == (3,)


@pytest.mark.kernel
def test_without_kernel():
    check(torch.nn.functional.silu)
"""


def pytest_process(*arguments):
    """Run pytest on kernels, in one process; return (exit status, output)."""
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-m", "kernel"]
    command += ["-n", "0", "--slow"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]  # of pytest-xdist, where this test runs in one of its workers
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "--tb=no", "-q", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def counts(output):
    """How many tests failed for want of their kernel, survived, and launched nothing."""
    found = re.search(r"^(\d+) killed, (\d+) survived, (\d+) no kernel$", output, re.MULTILINE)
    assert found, output
    return tuple(int(n) for n in found.groups())


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "test_toy.py").write_text(TOY)
    return str(tmp_path / "test_toy.py")


def test_an_honest_test_fails_without_its_kernel(toy):
    assert pytest_process(toy)[0] == 0
    status, output = pytest_process("--ghost", f"{toy}::test_honest", "-n", "2")
    assert counts(output) == (1, 0, 0) and status == 0, output


def test_survivors_are_named_and_fail_the_run(toy):
    status, output = pytest_process("--ghost", toy)
    assert counts(output) == (1, 2, 1) and status == 1, output
    survivors = re.findall(r"^SURVIVED .*::(\w+: \w+)$", output, re.MULTILINE)
    assert survivors == ["test_fallback: _silu_kernel", "test_shape_only: _silu_kernel"]


def test_a_run_that_launches_nothing_proves_nothing(toy):
    status, output = pytest_process("--ghost", f"{toy}::test_without_kernel")
    assert counts(output) == (0, 0, 1) and status == 1, output


def test_no_test_of_a_kernel_passes_without_it():
    support = [f"--ignore={ROOT / 'tests' / name}" for name in NOT_OF_KERNELS]
    status, output = pytest_process("--ghost", str(ROOT / "tests"), *support)
    killed, survived, _ = counts(output)
    assert survived == 0 and killed > 0 and status == 0, output
