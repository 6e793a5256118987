"""README and docs say what is so: code runs, commands parse, links and names exist.

The info string of a fenced block decides: ```python is run, ```python no-run is not (it needs what
a test must not download), ```python file=PATH and ```diff file=PATH are the files that
docs/adding_an_op.md adds, a ```text right after a block of Python is what it prints, and in a block
without a language each line is a command.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import pathlib
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from unittest import mock

import pytest
import tyro

import cgm.cli
from cgm.checkpoints import FORMAT, save_model
from cgm.model import FAMILIES

ROOT = pathlib.Path(__file__).parents[1]
ADDING = "docs/adding_an_op.md"
WRITTEN = (
    "README.md",
    "CONTRIBUTING.md",
    "cgm/data/checkpoints/README.md",
    *(
        f"docs/{path.name}"
        for path in sorted((ROOT / "docs").glob("*.md"))
        if path.name not in ("ops.md", "measured.md")
    ),
)
EVERY = (*WRITTEN, "CHANGELOG.md", "docs/ops.md", "docs/measured.md")


@dataclass(frozen=True)
class Block:
    """A fenced block: language, the rest of its info string, its text and what follows at once."""

    language: str
    info: str
    text: str
    prints: str | None


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name):
    found = re.finditer(
        r"^```(\w*) ?(.*)\n((?:(?!```).*\n)*)```\n(?:\n```text\n((?:(?!```).*\n)*)```)?",
        read(name),
        re.MULTILINE,
    )
    return [Block(*match.groups()) for match in found]


def prose(name):
    """The text outside of blocks."""
    return re.sub(r"^```.*\n(?:(?!```).*\n)*```$", "", read(name), flags=re.MULTILINE)


def inline(name):
    """What stands in backticks, outside of blocks."""
    return re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", prose(name))


def files_of_the_new_op():
    """Path and block of each file that docs/adding_an_op.md writes."""
    found = [block for block in blocks(ADDING) if block.info.startswith("file=")]
    return {block.info.removeprefix("file="): block for block in found}


# Sizes, links, names ------------------------------------------------------------------------------
def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 7000


def test_the_ops_are_as_their_docstrings_say():
    made = runpy.run_path(str(ROOT / "docs/make_ops.py"))["text"]()
    assert read("docs/ops.md") == made, "run `python docs/make_ops.py`"


def anchors(name):
    """Of headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", read(name), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", EVERY)
def test_links_resolve(name):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(name))
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT)), link


@pytest.mark.parametrize("name", EVERY)
def test_dotted_names_exist(name):
    for text in inline(name):
        if text.startswith("python "):
            continue  # a command
        for dotted in re.findall(r"(?<![\w./-])(?:cgkernels|cgm|benchmarks)(?:\.\w+)+", text):
            if not dotted.endswith(".run") or "benchmarks" not in dotted:
                pkgutil.resolve_name(dotted)


@pytest.mark.parametrize("name", EVERY)
def test_paths_exist(name):
    new = files_of_the_new_op()
    for text in inline(name):
        for path in re.findall(
            r"(?<![\w./<-])(?:cgkernels|cgm|benchmarks|tests|docs|examples)/[\w./<>*-]+", text
        ):
            if "<" not in path and path not in new:
                assert list(ROOT.glob(path.rstrip("/"))), path


def test_every_family_is_in_the_table_of_models():
    table = re.findall(r"^\| (\w+) \| `cgm\.", read("docs/models.md"), re.MULTILINE)
    assert sorted({*table, "autoencoder", "classifier"}) == sorted(FAMILIES)


# Python -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", [n for n in WRITTEN if any(b.language == "python" and not b.info for b in blocks(n))]
)
def test_code_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": name}
    for block in blocks(name):
        if block.language != "python" or block.info:
            assert block.language != "python" or block.info.startswith(("no-run", "file="))
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block.text, name, "exec"), namespace)
        if block.prints is not None:
            assert printed.getvalue() == block.prints


def test_the_demonstration_of_the_readme_is_short_and_prints():
    (shown,) = [block for block in blocks("README.md") if block.prints]
    assert len(shown.text.splitlines()) <= 24 and shown.prints.startswith("True\nTrue\n")


# Commands -----------------------------------------------------------------------------------------
class Parsed(Exception):
    """Raised where a command has its arguments, and would begin."""


def commands(name):
    """Every command, as words, in the order of the text."""
    lines = [block.text.replace("\\\n", " ") for block in blocks(name) if not block.language]
    spans = [text.replace("\n", " ") for text in inline(name)]
    for line in [*"".join(lines).splitlines(), *spans]:
        for part in line.split(" && "):
            words = shlex.split(part, comments=True) if part.count("'") % 2 == 0 else []
            while words and re.fullmatch(r"[A-Z_]+=\w+", words[0]):
                words = words[1:]
            if words[:2] == ["python", "-m"] or (len(words) > 1 and words[0] in ("cgm", "pytest")):
                yield words


def raise_parsed(parse):
    """parse, which then is all."""

    def run(*args, **kwargs):
        raise Parsed(parse(*args, **kwargs))

    return run


def write_stub(folder, family):
    """So much of a checkpoint as options are read from."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    info = {"format": FORMAT, "family": family, "config": {}}
    (folder / "config.json").write_text(json.dumps(info))


def parse_cgm(words):
    """Reads the arguments of `cgm` and runs what is cheap; leaves what it would have written."""
    argv = words[1:]
    options = {word: after for word, after in zip(argv, [*argv[1:], ""], strict=True)}

    def train(model, dataset, config, out, **rest):
        save_model(out, model)
        raise Parsed

    if argv[1:] == [] and argv[0] in ("train", "sample", "evaluate", "convert"):
        assert argv[0] in cgm.cli.COMMANDS  # spoken of, not called
    elif argv[0] in ("--version", "info") or "--help" in argv:
        assert cgm.cli.main(argv) == 0
    elif argv[0] == "train" and "--task" in options:
        with mock.patch("cgm.training.train", train), pytest.raises(Parsed):
            cgm.cli.main(argv)
    else:
        with mock.patch.object(tyro, "cli", raise_parsed(tyro.cli)), pytest.raises(Parsed):
            cgm.cli.main(argv)
        if argv[0] == "train":
            write_stub(options.get("--out", "runs/folder"), argv[1])
        if argv[0] == "convert":
            write_stub(argv[2], "cyclegan" if argv[1].endswith("_A.pth") else "pix2pix")


def parse_module(words):
    """Reads the arguments of `python -m MODULE`."""
    if words[2] == "cgm":
        return parse_cgm(words[2:])
    if len(words) == 3:  # spoken of, not called
        assert importlib.util.find_spec(words[2])
        return None
    if words[2] == "cgm.checkpoints":  # SOURCE OUT
        assert len(words) == 5 and pathlib.Path(words[3]).is_dir()
        return None
    parser = argparse.ArgumentParser
    with (
        mock.patch.object(sys, "argv", words[2:]),
        mock.patch.object(parser, "parse_args", raise_parsed(parser.parse_args)),
        pytest.raises(Parsed),
    ):
        runpy.run_module(words[2], run_name="__main__")


def check_pytest(words):
    """Its markers and paths."""
    markers = tomllib.loads(read("pyproject.toml"))["tool"]["pytest"]["ini_options"]["markers"]
    known = {re.match(r"\w+", marker)[0] for marker in markers}
    for i, word in enumerate(words):
        if words[i - 1] == "-m":
            assert word in known
        if "/" in word:
            assert (ROOT / word).exists() or word in files_of_the_new_op()


@pytest.mark.parametrize("name", [n for n in EVERY if any(commands(n))])
def test_commands_parse(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # What an earlier page, or the user, has made before.
    write_stub("runs/diffusion-class_to_image", "diffusion")
    for words in commands(name):
        try:
            {"cgm": parse_cgm, "pytest": check_pytest, "python": parse_module}[words[0]](words)
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            said = "".join(capsys.readouterr())
            raise AssertionError(f"{name}: {shlex.join(words)}\n{said}") from error


# Adding an op -------------------------------------------------------------------------------------
def patched(text, diff):
    """The text with the hunks of a diff, which hold lines of context and lines that are added."""
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] == " ")
        assert text.count(before) == 1, before
        text = text.replace(before, "".join(line[1:] for line in lines))
    return text


def test_a_new_op_touches_the_four_files_of_the_table():
    table = re.findall(r"^\| `([^`]+)` \|", read(ADDING), re.MULTILINE)
    new = list(files_of_the_new_op())
    assert len(new) == 4
    assert [path.replace("gated_relu", "<op>") for path in new] == table
    for path, block in files_of_the_new_op().items():
        assert (ROOT / path).exists() == (block.language == "diff")


@pytest.mark.slow
def test_an_op_added_to_the_letter_passes_the_tests_of_all_ops(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__", "results", "*.png")
    for folder in ("cgkernels", "cgm", "benchmarks", "tests", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path, block in files_of_the_new_op().items():
        file = tmp_path / path
        new = block.language == "python"
        file.write_text(block.text if new else patched(file.read_text(), block.text))

    def run(*words, **environment):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), **environment}
        for name in [name for name in environment if name.startswith("PYTEST_")]:
            del environment[name]
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert run("-c", "import cgkernels; print(cgkernels.__file__)").startswith(str(tmp_path))
    run("docs/make_ops.py")
    assert "## gated_relu" in (tmp_path / "docs/ops.md").read_text()
    suites = ("tests/ops/test_gated_relu.py", "tests/test_all_ops.py", "tests/test_library.py")
    tests = ("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", "gated_relu")
    assert int(re.search(r"(\d+) passed", run(*tests, *suites))[1]) > 80
    kernels = run(*tests, "-m", "kernel", *suites, TRITON_INTERPRET="1")
    assert int(re.search(r"(\d+) passed", kernels)[1]) > 20
    listed = "from benchmarks.ops import CASES, LAUNCHES; print(*CASES, *LAUNCHES)"
    assert {"gated_relu", "gated_relu_fwd", "gated_relu_bwd"} <= set(run("-c", listed).split())
