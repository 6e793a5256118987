"""What importing the packages loads, and what the package `cgm` offers by name."""

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cgkernels
import cgm

ROOT = Path(__file__).parents[1]
HEAVY = {"matplotlib", "PIL", "tyro", "rich", "numba", "torch._dynamo", "torch._inductor"}


def loaded(*statements: str) -> set[str]:
    """Modules that the last of these statements adds to those before it."""
    *before, last = statements
    script = "\n".join(
        ["import sys", *before, "known = set(sys.modules)", last, "print(set(sys.modules) - known)"]
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return ast.literal_eval(done.stdout.replace("set()", "{}") or "{}") or set()


def test_cgkernels_loads_itself_and_triton_alone():
    found = loaded("import torch", "import cgkernels")
    assert "cgkernels.library" in found and not found & HEAVY
    others = {name.split(".")[0] for name in found} - sys.stdlib_module_names
    # The platform's own _sysconfigdata_... is of the standard library, under a name of its own.
    assert {name for name in others if not name.startswith("_sysconfigdata")} <= {
        "cgkernels", "triton",
    }  # fmt: skip


def test_cgm_loads_nothing():
    found = loaded("import importlib, typing", "import cgm")
    assert found == {"cgm"}


def test_a_model_loads_no_plots_and_no_command_line():
    assert not loaded("import torch", "import cgm; cgm.ConditionalDiffusion, cgm.train") & {
        "matplotlib", "tyro", "numba", "torch._dynamo", "torch._inductor",
    }  # fmt: skip


def test_benchmarks_load_neither_studies_nor_plots():
    found = loaded("import torch", "import benchmarks.run, benchmarks.gpu, benchmarks.tune")
    assert "benchmarks.run" in found and not found & {"matplotlib", "tyro"}
    assert not {name for name in found if name.startswith("cgm.studies")}


# Names --------------------------------------------------------------------------------------------
def test_the_names_of_cgm_are_those_of_its_modules():
    for name, module in cgm._MODULE_OF.items():
        assert getattr(cgm, name) is getattr(importlib.import_module(module), name)
    assert sorted(cgm.__all__) == sorted(cgm._MODULE_OF)
    assert set(cgm.__all__) <= set(dir(cgm))
    with pytest.raises(AttributeError, match="module 'cgm' has no attribute 'ConditionalGPT'"):
        cgm.ConditionalGPT  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(cgm.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    seen = {
        alias.asname: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == cgm._MODULE_OF


def test_one_version():
    assert cgm.__version__ == cgkernels.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "cgkernels.__version__"}
