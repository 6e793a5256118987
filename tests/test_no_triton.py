"""Where Triton is not installed everything but a launch works; importing does nothing else."""

import pathlib
import subprocess
import sys

WITHOUT_TRITON = """
import contextlib
import io
import sys

sys.modules["triton"] = None
written = io.StringIO()
with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
    import cgkernels
    import cgm

assert written.getvalue() == "", written.getvalue()

import importlib
import pkgutil

for module in pkgutil.walk_packages(cgkernels.__path__, "cgkernels."):
    importlib.import_module(module.name)

import torch

from cgkernels.library import OPS
from tests.support import launchers, op_calls, op_modules

calls = [
    call
    for module in op_modules()
    for sample in module.samples(torch.float32, torch.device("cpu"))
    for call in op_calls(sample)
]
assert {call.name for call in calls} == set(OPS)
for call in calls:
    if sum(t.numel() for t in call.run()) == 0:
        continue
    try:
        launchers()[call.name](*call.args)
    except RuntimeError as error:
        assert "is a Triton kernel, and Triton is not installed" in str(error), error
    else:
        raise AssertionError(f"{call.name} launched something")
print("done")
"""


IMPORTING = """
import sys
import torch
import cgkernels, cgm

heavy = {"matplotlib", "tyro", "rich", "torchvision", "diffusers", "transformers"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert not torch.cuda.is_initialized()
"""


def run(code):
    """Exit status, standard output and standard error of a process that runs the code."""
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    return done.returncode, done.stdout, done.stderr


def test_everything_but_a_launch_works_without_triton():
    status, output, errors = run(WITHOUT_TRITON)
    assert (status, output) == (0, "done\n"), errors


def test_importing_prints_nothing_and_loads_nothing_heavy():
    assert run(IMPORTING) == (0, "", "")
