"""Ranges of the whole numbers in Triton's IR: where 32 bits may not do.

A launch is never run: what its arguments are, how many programs it has and what the operations make
of them says from where to where every number can go. A sum, difference or product of 32 bits that
leaves them, and comes into an address, reads or writes somewhere else.

What is loaded, and what a loop carries or a reduction leaves, is taken for a position: from 0 to
the largest whole number among the arguments that 32 bits hold. Noise and order keys wrap on
purpose, and come into no address.
"""

import re
from typing import Any, NamedTuple

_LEAST, _MOST = -(2**31), 2**31 - 1
_VALUE = r"%[\w.#$-]+"
_RESULT = re.compile(rf"^\s*({_VALUE})(?::\d+)? = (.*)$")
_LOOP = re.compile(rf"scf\.for ({_VALUE}) = ({_VALUE}) to ({_VALUE}) ")
_LOCATION = re.compile(r"\s*loc\((#?[\w]+)\)\s*$")


class Range(NamedTuple):
    """From least to most; where it left 32 bits before, with the places."""

    least: int
    most: int
    left: frozenset[str] = frozenset()


def overflows(ir: str, grid: tuple[int, ...], arguments: dict[str, Any]) -> set[str]:
    """The operations, with their line in the kernel, whose 32 bits may not do for an address."""
    return _Function(ir, grid, arguments).run()


class _Function:
    def __init__(self, ir: str, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        self.lines = ir.splitlines()
        self.places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ir, re.MULTILINE))
        self.programs = grid[0]
        flat = _flattened(arguments)
        sizes = (v for name, v in flat.items() if name != "window")  # 2^30 is any
        self.position = max([1, *(v for v in sizes if v <= _MOST)])
        self.known: dict[str, Range | None] = {
            f"%{name}": Range(value, value) for name, value in flat.items()
        }
        self.found: set[str] = set()

    def run(self) -> set[str]:
        for line in self.lines:
            place = _LOCATION.search(line)
            text = _LOCATION.sub("", line)
            if carried := re.search(r"(?:iter_args|scf\.while |\^bb0)\s*\((.*)", text):
                self.known |= dict.fromkeys(re.findall(rf"({_VALUE})(?: =|:)", carried[1]))
            if loop := _LOOP.search(text):
                start, end = self.of(loop[2]), self.of(loop[3])
                if start is not None and end is not None:
                    most, left = max(start.least, end.most - 1), start.left | end.left
                    self.known[loop[1]] = Range(start.least, most, left)
            elif match := _RESULT.match(text):
                self.known[match[1]] = self.result(match[2], place)
        return self.found

    def of(self, name: str, bits: int = 32) -> Range | None:
        """The range of a value; of 64 bits None where it may be any."""
        if (found := self.known.get(name)) is not None:
            return found
        return Range(0, self.position) if bits == 32 else None

    def result(self, text: str, place: re.Match[str] | None) -> Range | None:
        operation = re.match(r"[\w.]+", text)
        if operation is None:
            return None
        name, operands = operation[0], re.findall(_VALUE, text)
        types = re.findall(r"(?:\b|\dx)i(1|8|16|32|64)\b", text.rsplit(" : ", 1)[-1])
        bits = int(types[-1 if name in ("tt.addptr", "arith.select") else 0]) if types else 0
        if name == "arith.constant":
            value = re.search(r"constant (?:dense<)?(-?\d+)>? ", text)
            return Range(int(value[1]), int(value[1])) if value and bits in (32, 64) else None
        if name == "tt.get_program_id":
            return Range(0, self.programs - 1)
        if name == "tt.get_num_programs":
            return Range(1, self.programs)
        if name == "tt.make_range":
            ends = dict(re.findall(r"(end|start) = (\d+)", text))
            return Range(int(ends["start"]), int(ends["end"]) - 1)
        if name == "tt.addptr":
            offset = self.of(operands[1], bits)
            if offset is not None:
                self.found |= offset.left
            return None
        if bits not in (32, 64):
            return None
        if name in ("arith.extsi", "arith.extui", "tt.splat", "tt.broadcast", "tt.expand_dims",
                    "tt.reshape", "tt.trans"):  # fmt: skip
            return self.of(operands[0], bits)
        if name == "arith.trunci":
            found = self.of(operands[0], 64)
            if found is None or (found.least >= _LEAST and found.most <= _MOST):
                return found
            cut = f"{name} of up to {found.most:,} at {self.place(place)}"
            return Range(0, self.position, found.left | {cut})
        if name == "arith.select":
            return _joined(*(self.of(o, bits) for o in operands[1:]))
        if name == "math.absi" and (found := self.of(operands[0], bits)) is not None:
            most = max(-found.least, found.most)
            return Range(
                0 if found.least <= 0 <= found.most else min(map(abs, found[:2])), most, found.left
            )
        if name not in _ARITHMETIC:
            return None
        a, b = (self.of(o, bits) for o in operands[:2])
        if a is None or b is None:
            return None
        least, most = _ARITHMETIC[name](a, b)
        left = a.left | b.left
        if bits == 32 and (least < _LEAST or most > _MOST):
            left |= {f"{name} up to {max(-least, most):,} at {self.place(place)}"}
        return Range(least, most, left)

    def place(self, match: re.Match[str] | None) -> str:
        """Lines of the sources, the innermost first."""
        text = match[1] if match else ""
        for _ in range(12):
            text = re.sub(r"#loc\d*", lambda m: self.places.get(m[0], ""), text)
        return " in ".join(re.findall(r'/([\w]+/[\w]+\.py":\d+)', text)) or text


def _flattened(arguments: dict[str, Any]) -> dict[str, int]:
    """Whole numbers by their names in the IR: of a tuple name.0, name.1 and so on."""
    flat: dict[str, int] = {}
    for name, value in arguments.items():
        if isinstance(value, tuple):
            flat |= _flattened({f"{name}.{i}": v for i, v in enumerate(value)})
        elif isinstance(value, int) and not isinstance(value, bool):
            flat[name] = value
    return flat


def _joined(a: Range | None, b: Range | None) -> Range | None:
    if a is None or b is None:
        return None
    return Range(min(a.least, b.least), max(a.most, b.most), a.left | b.left)


def _products(a: Range, b: Range) -> tuple[int, int]:
    every = [x * y for x in a[:2] for y in b[:2]]
    return min(every), max(every)


def _quotients(a: Range, b: Range) -> tuple[int, int]:
    every = [int(x / y) if abs(x) < 2**52 else x // y for x in a[:2] for y in b[:2] if y > 0]
    return (min(every), max(every)) if every and b.least > 0 else (_LEAST, _MOST)


def _remainders(a: Range, b: Range) -> tuple[int, int]:
    most = max(abs(b.least), abs(b.most), 1) - 1
    return (0 if a.least >= 0 else -min(most, -a.least)), min(most, max(a.most, 0))


_ARITHMETIC: dict[str, Any] = {
    "arith.addi": lambda a, b: (a.least + b.least, a.most + b.most),
    "arith.subi": lambda a, b: (a.least - b.most, a.most - b.least),
    "arith.muli": _products,
    "arith.shli": lambda a, b: _products(a, Range(2**b.least, 2 ** min(b.most, 63))),
    "arith.divsi": _quotients,
    "arith.remsi": _remainders,
    "arith.minsi": lambda a, b: (min(a.least, b.least), min(a.most, b.most)),
    "arith.maxsi": lambda a, b: (max(a.least, b.least), max(a.most, b.most)),
}  # fmt: skip
