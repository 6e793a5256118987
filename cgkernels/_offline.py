"""Compile the launches of an op for any NVIDIA architecture, without a GPU, and read the result.

The launcher runs unchanged on meta tensors, so that Triton specializes as in production: dtypes,
alignment of pointers, divisibility of integers, block sizes, warps and stages. Nothing is executed.
ptxas, cuobjdump and nvdisasm come with Triton.

Triton is imported inside functions: `testing.py`, which shows this module, must also import where
Triton is not installed.
"""

import contextlib
import functools
import math
import pathlib
import re
import subprocess
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

# Shared memory that one block may have, bytes (CUDA C++ Programming Guide, compute capabilities,
# less the 1 KiB that the driver keeps). Triton compares only when a kernel is loaded onto a GPU.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}

# The matrix instruction of each generation: mma.sync, wgmma, tcgen05.
MATRIX_INSTRUCTION = {80: "[HIQ]MMA", 90: "[HIQ]GMMA", 100: r"UTC\w*MMA", 120: "[HIQO]MMA"}

_GRID_LIMIT = (2**31 - 1, 65_535, 65_535)
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_POINTER_ACCESS = re.compile(
    r"\b(tt\.load|tt\.store|ttg\.async_copy_global_to_local)\b.*?"
    r"(?:tensor<((?:\d+x)+))?!tt\.ptr<[a-z]+(\d+)"
)


@dataclass(frozen=True)
class Launch:
    """One launch configuration of an op: compiled without a GPU, checked on one.

    run is the op's launcher on meta tensors, and run.args are the op's arguments in the order of
    its schema; vector_bits is the width that the main loads and stores of global memory reach (0:
    not promised); dot says that tensor cores are expected.
    """

    label: str
    run: functools.partial[Any]
    vector_bits: int = 0
    dot: bool = False


@dataclass(frozen=True)
class KernelReport:
    """What one kernel of a launch became on one architecture.

    stack and spills (counts of LDL and STL) are 0 unless registers spill. load_bits and store_bits
    are the narrowest main accesses of global memory (see `problems`), 0 where there is none.
    matrix is the kind of matrix instruction, empty without one. shared is in bytes per block.
    """

    kernel: str
    arch: int
    warps: int
    stages: int
    registers: int
    stack: int
    spills: int
    shared: int
    shared_limit: int
    load_bits: int
    store_bits: int
    matrix: str
    instructions: int
    grid: tuple[int, ...]


def compile_launch(launch: Launch, arch: int) -> list[KernelReport]:
    """Compile every kernel that launch.run() launches for sm_<arch>, and launch none.

    Raises:
        RuntimeError: TRITON_INTERPRET is set; interpreted kernels cannot be compiled.
        ValueError: an architecture that is not in SHARED_LIMIT.
    """
    if arch not in SHARED_LIMIT:
        raise ValueError(f"arch must be one of {sorted(SHARED_LIMIT)}, got {arch}")
    with _compiling(arch) as compiled:
        launch.run()
    return [_read(kernel, grid, launch.vector_bits or 128) for kernel, grid in compiled]


def problems(compiled: list[KernelReport], launch: Launch) -> list[str]:
    """What must not land, in words: spills, shared memory, narrow accesses, no tensor cores.

    launch.vector_bits is a promise about the main accesses: those through a block of pointers with
    at least that many bits for every thread. Scalars (a seed, a coefficient) and blocks too small
    to give each thread a full vector (a bias, partial sums) are set aside: as many instructions as
    they need, of their width. All other loads and stores of each kernel must be at least
    vector_bits wide, and in one kernel at least there must be some. Bulk copies (TMA) are wide.

    launch.dot asks that one kernel at least uses the matrix instruction of the architecture.
    """
    if not compiled:
        return ["launches no kernel"]
    found = []
    for row in compiled:
        if row.stack or row.spills:
            found.append(
                f"{row.kernel}: registers spill, {row.stack} bytes of stack per thread, "
                f"{row.spills} loads and stores"
            )
        if row.shared > row.shared_limit:
            found.append(
                f"{row.kernel}: {row.shared:,} bytes of shared memory, sm_{row.arch} has "
                f"{row.shared_limit:,}"
            )
        if any(n > limit for n, limit in zip(row.grid, _GRID_LIMIT, strict=False)):
            found.append(f"{row.kernel}: grid {row.grid} is beyond {_GRID_LIMIT}")
        for what, bits in (("load", row.load_bits), ("store", row.store_bits)):
            if 0 < bits < launch.vector_bits:
                found.append(f"{row.kernel}: {what}s of {bits} bits, {launch.vector_bits} promised")
    if launch.vector_bits and not any(row.load_bits or row.store_bits for row in compiled):
        found.append(f"no block with {launch.vector_bits} bits for every thread")
    arch = compiled[0].arch
    if launch.dot and not any(re.fullmatch(MATRIX_INSTRUCTION[arch], r.matrix) for r in compiled):
        kinds = sorted({row.matrix or "none" for row in compiled})
        found.append(f"no tensor-core instruction of sm_{arch}, but {', '.join(kinds)}")
    return found


@dataclass(frozen=True)
class Lowered:
    """What a kernel was asked for, and the IR of Triton that it became."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by their names
    ir: str


def lower_launch(
    launch: Launch, arch: int, variants: Callable[..., Iterable[tuple[Any, ...]]] = lambda a: [a]
) -> list[Lowered]:
    """The first stage of compilation of every kernel that launch.run() launches.

    A kernel's own faults show there, in a tenth of the time. variants: of its positional arguments,
    each of which is lowered.

    Raises:
        RuntimeError: TRITON_INTERPRET is set.
    """
    lowered: list[Lowered] = []

    def take(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: Any) -> None:
        for given in variants(args):
            with mock.patch.object(type(kernel), "_do_compile", _lower):
                ir = kernel.warmup(*given, grid=grid, **options)
            arguments = dict(zip(kernel.arg_names, given, strict=False)) | options
            lowered.append(Lowered(kernel.__name__, grid, arguments, ir))

    with _taking(arch, take, "lowered"):
        launch.run()
    return lowered


def _lower(
    kernel: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any,
    attributes: Any, warmup: bool,
) -> str:  # fmt: skip
    """In place of `JITFunction._do_compile`: its first stage alone."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import Language

    kept, _, target, backend, _ = kernel.device_caches[device]
    context, stages = ir.context(), {}
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = kernel.ASTSource(kernel, signature, constants, attributes).make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(),
        context,
    )  # fmt: skip
    backend.add_stages(stages, options, Language.TRITON)
    kept[key] = str(stages["ttir"](module, {}))
    return kept[key]


@contextlib.contextmanager
def _compiling(arch: int) -> Iterator[list[tuple[Any, tuple[int, ...]]]]:
    """kernel[grid](...) compiles for sm_<arch>; yields the list of (compiled kernel, grid)."""
    compiled: list[tuple[Any, tuple[int, ...]]] = []

    def take(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: Any) -> None:
        compiled.append((kernel.warmup(*args, grid=grid, **options), grid))

    with _taking(arch, take, "compiled"):
        yield compiled


@contextlib.contextmanager
def _taking(arch: int, take: Callable[..., None], stage: str) -> Iterator[None]:
    """kernel[grid](...) calls take(kernel, grid, args, options), where Triton sees an sm_<arch>."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import KernelInterface

    if triton.knobs.runtime.interpret:
        raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")

    def take_instead(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: take(kernel, grid, args, options)

    driver = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: f"sm_{arch}, {stage}",  # the key under which kernels are kept
        get_current_stream=lambda device: 0,
    )
    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(KernelInterface, "__getitem__", take_instead),
    ):
        yield


def _read(kernel: Any, grid: tuple[int, ...], vector_bits: int) -> KernelReport:
    registers, stack, instructions = _disassemble(kernel.asm["cubin"])
    meta = kernel.metadata
    arch = meta.target.arch
    threads = 32 * meta.num_warps
    small: dict[str, list[tuple[int, int]]] = {"load": [], "store": []}  # (bits, how many a thread)
    for op, shape, element in _POINTER_ACCESS.findall(kernel.asm["ttgir"]):
        elements, bits = math.prod(map(int, shape.split("x")[:-1])), max(8, int(element))
        if elements * bits < threads * vector_bits:
            small["store" if op == "tt.store" else "load"].append((bits, -(-elements // threads)))
    opcodes = Counter({op: n for op, n in instructions.items() if "MMA" in op.split(".")[0]})
    return KernelReport(
        kernel=meta.name,
        arch=arch,
        warps=meta.num_warps,
        stages=meta.num_stages,
        registers=registers,
        stack=stack,
        spills=_count(instructions, "LDL", "STL"),
        shared=meta.shared,
        shared_limit=SHARED_LIMIT[arch],
        load_bits=_narrowest(instructions, ("LDG", "LDGSTS", "UTMALDG"), small["load"]),
        store_bits=_narrowest(instructions, ("STG", "UTMASTG"), small["store"]),
        matrix=opcodes.most_common(1)[0][0].split(".")[0] if opcodes else "",
        instructions=instructions.total() - instructions["NOP"],
        grid=grid,
    )


@functools.cache  # many launches share a kernel, and the two tools take 0.4 s
def _disassemble(cubin: bytes) -> tuple[int, int, Counter[str]]:
    """Registers and bytes of stack per thread, and how often each instruction occurs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _nvidia("cuobjdump", "--dump-resource-usage", file.name)
        sass = _nvidia("nvdisasm", "-c", file.name)
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)  # one kernel in each
    return int(registers), int(stack), Counter(_INSTRUCTION.findall(sass))


def _nvidia(tool: str, *args: str) -> str:
    import triton.backends.nvidia

    path = pathlib.Path(triton.backends.nvidia.__file__).parent / "bin" / tool
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def _count(instructions: Counter[str], *opcodes: str) -> int:
    return sum(n for op, n in instructions.items() if op.split(".")[0] in opcodes)


def _narrowest(
    instructions: Counter[str], opcodes: tuple[str, ...], small: list[tuple[int, int]]
) -> int:
    """Bits of the narrowest of these instructions that no small access accounts for; else 0."""
    widths: Counter[int] = Counter()
    for instruction, n in instructions.items():
        opcode, *modifiers = instruction.split(".")
        if opcode in opcodes:
            widths[_width(opcode, modifiers)] += n
    for bits, count in small:
        # Together, one by one, or where 64 bits are used in halves, or one half only, by 32.
        for width, n in ((bits * count, 1), (bits, count), (32, bits * count // 32), (32, count)):
            if widths[width] >= n:
                widths[width] -= n
                break
    return min(+widths, default=0)


def _width(opcode: str, modifiers: list[str]) -> int:
    if opcode.startswith("UTMA"):
        return 128
    for modifier in modifiers:
        if match := re.fullmatch(r"[US]?(8|16|64|128|256)", modifier):
            return int(match[1])
    return 32
