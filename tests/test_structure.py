"""The rooms of the house, and that imports go one way between them: drawn from the source.

    benchmarks, tests -> cgm -> cgkernels
    cgm: cli -> studies -> {families, evaluation} -> ... -> {model, data}, as LAYERS has it

An import counts wherever it stands, in a function too, except under TYPE_CHECKING. Modules that are
resolved by name when they are used (families, commands, the lazy names of cgm) are no imports.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import cgm

ROOT = Path(__file__).parents[1]
PACKAGES = ("cgkernels", "cgm", "benchmarks")

# What each package may import of the others.
BELOW = {"cgkernels": set(), "cgm": {"cgkernels"}, "benchmarks": {"cgkernels", "cgm"}}
# Rooms of cgm, files or folders, from the lowest up: each imports of lower layers only. What stands
# in one layer does not import each other.
LAYERS = (
    {"model", "data", "samplers"},
    {"checkpoints"},
    {"networks", "viz"},
    {"sampling", "training"},
    {"families", "evaluation"},
    {"studies"},
    {"cli"},
)
MOST_ROOMS, MOST_ARROWS = 12, 40
MOST_LINES, MOST_LINES_OF_A_COMMAND = 500, 250
# Longer files, each with its reason.
LONGER: dict[str, str] = {}


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of what is imported; of `from a import b` both a and a.b."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes: list[ast.AST] = list(node.orelse)
            yield from (name for rest in nodes for name in imported(ast.Module([rest], [])))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are written from the package's root"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imported(node)


def sources(package: str) -> dict[str, str]:
    """Source of each file, by its path from the root."""
    files = sorted((ROOT / package).rglob("*.py"))
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}


def room_of(name: str) -> str:
    """The room of a module of cgm, or of a lazy name; "" for the package itself."""
    parts = name.removesuffix(".py").replace("/", ".").split(".")
    if len(parts) == 2 and parts[1] in cgm._MODULE_OF:
        parts = cgm._MODULE_OF[parts[1]].split(".")
    room = parts[1] if len(parts) > 1 else ""
    return {"__init__": "", "__main__": "cli"}.get(room, room)


def arrows(files: dict[str, str], rooms: set[str]) -> set[tuple[str, str]]:
    """(from, to) of the rooms of cgm."""
    found = {
        (room_of(path), room_of(name))
        for path, source in files.items()
        for name in imported(ast.parse(source))
        if name.split(".")[0] == "cgm"
    }
    return {(a, b) for a, b in found if a and a != b and b in rooms}


def upward(drawn: set[tuple[str, str]]) -> list[str]:
    """Arrows that do not go down the layers."""
    height = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}
    return sorted(f"{a} -> {b}" for a, b in drawn if height[a] <= height[b])


def foreign(package: str, files: dict[str, str]) -> list[str]:
    """Imports of packages of this repository that are not below this one."""
    forbidden = {*PACKAGES, "tests"} - {package} - BELOW[package]
    return sorted(
        f"{path}: {name}"
        for path, source in files.items()
        for name in imported(ast.parse(source))
        if name.split(".")[0] in forbidden
    )


# The house ----------------------------------------------------------------------------------------
def test_rooms_and_arrows_of_cgm():
    files = sources("cgm")
    rooms = {room_of(path) for path in files} - {""}
    assert rooms == set().union(*LAYERS), "LAYERS says where each room of cgm is"
    assert len(rooms) <= MOST_ROOMS
    drawn = arrows(files, rooms)
    assert upward(drawn) == []
    assert len(drawn) <= MOST_ARROWS, sorted(drawn)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_what_is_below_them(package):
    assert foreign(package, sources(package)) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_is_long(package):
    lengths = {path: source.count("\n") for path, source in sources(package).items()}
    most = {path: MOST_LINES for path in lengths}
    most |= {path: MOST_LINES_OF_A_COMMAND for path in lengths if path.startswith("cgm/cli/")}
    long = {path: n for path, n in lengths.items() if n > most[path]}
    assert long.keys() == LONGER.keys() & lengths.keys(), long


# The checks themselves ----------------------------------------------------------------------------
def test_an_import_is_seen_wherever_it_stands():
    source = """
import os, cgm.data
from cgm import viz
if TYPE_CHECKING:
    from cgm.cli import main
else:
    import cgm.training
def f():
    try:
        from cgm.studies.demo import demo
    except ImportError:
        pass
"""
    assert set(imported(ast.parse(source))) == {
        "os", "cgm.data", "cgm", "cgm.viz", "cgm.training", "cgm.studies.demo",
        "cgm.studies.demo.demo",
    }  # fmt: skip


def test_an_upward_import_is_found():
    rooms = set().union(*LAYERS)
    files = {
        "cgm/families/new.py": "from cgm.sampling.decoding import generate",
        "cgm/model.py": "def late():\n    from cgm.families import vae",
        "cgm/__main__.py": "import cgm.studies",
        "cgm/evaluation/new.py": "import cgm.families.vae",
        "cgm/networks/new.py": "from cgm import ConditionalVAE",
    }
    drawn = arrows(files, rooms)
    assert drawn == {
        ("families", "sampling"), ("model", "families"), ("cli", "studies"),
        ("evaluation", "families"), ("networks", "families"),
    }  # fmt: skip
    assert upward(drawn) == [
        "evaluation -> families",
        "model -> families",
        "networks -> families",
    ]


def test_an_import_of_a_package_above_is_found():
    assert foreign("cgkernels", {"a.py": "def f():\n    import cgm.model"}) == ["a.py: cgm.model"]
    assert foreign("cgm", {"a.py": "from benchmarks import run"}) == [
        "a.py: benchmarks",
        "a.py: benchmarks.run",
    ]
    assert foreign("benchmarks", {"a.py": "import cgm, cgkernels, torch"}) == []
