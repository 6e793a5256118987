"""Writes docs/ops.md from the docstrings of the ops: `python docs/make_ops.py`.

With --check nothing is written, and the exit status is 1 where the file is not what the docstrings
say. Each public function of an op is a section: its signature and docstring; before the functions
of a module stands what the module says of formula, shapes, dtypes, backward and source.
"""

import argparse
import importlib
import inspect
import itertools
import pathlib
import re
import sys
import typing

import torch

import cgkernels

FILE = pathlib.Path(__file__).parent / "ops.md"
HEAD = """\
# Ops

<!-- Made from docstrings by `python docs/make_ops.py`; edit those. -->

Every op is imported from `cgkernels`. Each has a definition in plain PyTorch, which runs in its
place inside `with cgkernels.reference():`. Wrong arguments raise before anything is launched or
written. `torch.func.grad` and `vmap` work with all that are differentiable: a lane is a call of its
own, and draws noise by an `index` of its own. Exported programs, AOTInductor packages too, call the
ops by name: `cgkernels` must be imported where they are loaded. How noise follows from
(seed, index) is said in `cgkernels.random`.
"""
FIELDS = ("Shapes", "Dtypes", "Backward", "Source")


def modules() -> dict[str, list[str]]:
    """The public functions by the module of their op, in the order of their names."""
    found: dict[str, list[str]] = {}
    for name in sorted(cgkernels.__all__):
        module = getattr(getattr(cgkernels, name), "__module__", "")
        if module.startswith("cgkernels.ops."):
            op = ".".join(module.split(".")[:3])  # of a large op, the package
            found.setdefault(op, []).append(name)
    return dict(sorted(found.items()))


def text() -> str:
    """The whole file."""
    ops = modules()
    names = list(itertools.chain(*ops.values()))
    lines = [HEAD, "| op | what it is |", "|---|---|"]
    for name in names:
        summary = doc_of(getattr(cgkernels, name)).partition("\n")[0].replace("|", "\\|")
        lines.append(f"| [`{name}`](#{name}) | {summary} |")
    lines.append("")
    for module, functions in ops.items():
        lines += [f"## {module.rsplit('.', 1)[1]}", "", *module_lines(module)]
        for name in functions:
            if name != module.rsplit(".", 1)[1]:
                lines += [f"### {name}", ""]
            lines += function_lines(name)
    return "\n".join(lines).rstrip() + "\n"


def module_lines(module: str) -> list[str]:
    """The docstring of an op's module: prose, formulas, and the fields as a list."""
    doc = doc_of(importlib.import_module(module))
    prose, *fields = re.split(rf"^(?=(?:{'|'.join(FIELDS)})\b)", doc, flags=re.MULTILINE)
    lines = markdown(prose)
    for field in fields:
        name, rest = field.split(maxsplit=1)
        lines.append(f"- **{name}** {escaped(' '.join(rest.split()))}")
    return [*lines, ""]


def function_lines(name: str) -> list[str]:
    """The signature and the docstring of a public function."""
    function = getattr(cgkernels, name)
    return [
        "```python",
        signature(name, function),
        "```",
        "",
        *markdown(doc_of(function)),
    ]


def doc_of(thing: object) -> str:
    """Its docstring, without the indentation."""
    return inspect.getdoc(thing) or ""


def signature(name: str, function: typing.Any) -> str:
    """def f(...), one argument a line where they do not fit into one."""
    hints = typing.get_type_hints(function)
    result = f" -> {type_name(hints['return'])}" if "return" in hints else ""
    arguments, star = [], False
    for argument in inspect.signature(function).parameters.values():
        if argument.kind is argument.KEYWORD_ONLY and not star:
            arguments.append("*")
            star = True
        default = "" if argument.default is argument.empty else f" = {value(argument.default)}"
        arguments.append(f"{argument.name}: {type_name(hints[argument.name])}{default}")
    line = f"{name}({', '.join(arguments)}){result}"
    if len(line) <= 88:
        return line
    return "\n".join([f"{name}(", *(f"    {a}," for a in arguments), f"){result}"])


def value(default: object) -> str:
    """A default as it is written."""
    if isinstance(default, str):
        return f'"{default}"'
    return str(default) if isinstance(default, torch.memory_format) else repr(default)


def type_name(hint: typing.Any) -> str:
    """A type without the modules it comes from."""
    name = hint.__name__ if inspect.isclass(hint) and not typing.get_args(hint) else str(hint)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=\w)", "", name.replace("NoneType", "None"))


def markdown(doc: str) -> list[str]:
    """A docstring as markdown: paragraphs, indented formulas, Args, Returns, Raises, Example."""
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", doc.strip("\n")):
        head, *rest = block.splitlines()
        section = re.match(r"(Args|Returns|Raises):$|(Example.*):$", head)
        if section and section[2]:
            lines += [f"**{section[2]}**", "", "```python", *dedented(rest), "```", ""]
        elif section:
            lines += [f"**{section[1]}**", ""]
            lines += prose(dedented(rest)) if section[1] == "Returns" else items(dedented(rest))
        elif head.startswith("    "):
            lines += ["```text", *dedented(block.splitlines()), "```", ""]
        else:
            lines += prose(block.splitlines())
    return lines


def dedented(lines: list[str]) -> list[str]:
    """Without the indentation that all lines share."""
    return inspect.cleandoc("\n" + "\n".join(lines)).splitlines()


def prose(lines: list[str]) -> list[str]:
    """A paragraph, with what is indented below it as a block of its own."""
    indented = next((i for i, line in enumerate(lines) if line.startswith("    ")), len(lines))
    out = [*(escaped(line) for line in lines[:indented]), ""]
    if indented == len(lines):
        return out
    end = indented
    while end < len(lines) and lines[end].startswith("    "):
        end += 1
    out += ["```text", *dedented(lines[indented:end]), "```", ""]
    return out + (prose(lines[end:]) if end < len(lines) else [])


def items(lines: list[str]) -> list[str]:
    """`name: text` with its indented continuation, as a list."""
    found: list[str] = []
    for line in lines:
        if line.startswith(" "):
            found[-1] += " " + escaped(line.strip())
        else:
            names, colon, rest = line.partition(": ")
            found.append(f"- `{names}`: {escaped(rest)}" if colon else f"- {escaped(line)}")
    return [*found, ""]


def escaped(line: str) -> str:
    """Outside of `code`, what markdown would take for emphasis or a tag."""
    parts = re.split(r"(`[^`]*`)", line)
    special = r"([*<]|(?<!\w)_|_(?!\w))"
    return "".join(p if i % 2 else re.sub(special, r"\\\1", p) for i, p in enumerate(parts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    check = parser.parse_args().check
    made = text()
    if check and (not FILE.exists() or FILE.read_text(encoding="utf-8") != made):
        print(f"{FILE} is out of date: run `python docs/make_ops.py`", file=sys.stderr)
        return 1
    if not check:
        FILE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
