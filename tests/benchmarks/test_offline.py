"""Offline compilation: what it must find in known kernels, and the launches of every op."""

import csv
import os
import pathlib
import re
import subprocess
import sys
from functools import partial
from unittest import mock

import pytest
import torch

from benchmarks.models.launches import RUNS, recorded_launches
from benchmarks.offline import ARCHITECTURES, compile_all, listed, main
from benchmarks.ops import LAUNCHES
from cgkernels._offline import _compiling
from cgkernels._triton import HAS_TRITON, tl, triton
from cgkernels.ops.decode_attention import launch as decode_attention
from cgkernels.ops.norm_linear import launch as norm_linear
from cgkernels.testing import Launch, compile_launch, problems

ROOT = pathlib.Path(__file__).parents[2]

compiles = pytest.mark.skipif(
    not HAS_TRITON or triton.knobs.runtime.interpret,
    reason="needs Triton, and no TRITON_INTERPRET",
)


@triton.jit
def _axpy(out_ptr, x_ptr, a_ptr, row_ptr, part_ptr, n, stride, BLOCK: tl.constexpr):
    """One program per BLOCK elements: out = a x + row, and their sum; x with a stride."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_ptr + tl.load(part_ptr).to(tl.int64))
    a = tl.load(a_ptr + tl.arange(0, 256))
    y = tl.sum(a) * tl.load(x_ptr + i * stride, mask=i < n).to(tl.float32) + row
    tl.store(out_ptr + i, y.to(out_ptr.dtype.element_ty), mask=i < n)
    tl.store(part_ptr + tl.program_id(0), tl.sum(y))


@triton.jit
def _matmul(c_ptr, a_ptr, b_ptr, M, N, K, TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr):
    """One program per (TM, TN) tile of c = a @ b, row-major."""
    m = tl.program_id(0) * TM + tl.arange(0, TM)
    n = tl.program_id(1) * TN + tl.arange(0, TN)
    acc = tl.zeros((TM, TN), tl.float32)
    for start in range(0, K, TK):
        k = start + tl.arange(0, TK)
        a_mask, b_mask = (m < M)[:, None] & (k < K)[None, :], (k < K)[:, None] & (n < N)[None, :]
        a = tl.load(a_ptr + m[:, None] * K + k[None, :], mask=a_mask, other=0.0)
        b = tl.load(b_ptr + k[:, None] * N + n[None, :], mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc)
    c_mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc.to(c_ptr.dtype.element_ty), mask=c_mask)


def axpy(dtype=torch.float32, n=1 << 20, stride=1, misaligned=False, programs=None, **config):
    out = torch.empty(n, dtype=dtype, device="meta")
    x = torch.empty(n * stride + 1, dtype=dtype, device="meta")[int(misaligned) :]
    scalars = torch.empty(1024, device="meta")
    rows = torch.empty(64, dtype=torch.int64, device="meta")
    config = {"BLOCK": 1024, "enable_fp_fusion": True, **config}
    grid = programs or (n // config["BLOCK"],)
    _axpy[grid](out, x, scalars, rows, scalars, n, stride, **config)


def matmul(dtype=torch.bfloat16, size=4096, **config):
    a = torch.empty(size, size, dtype=dtype, device="meta")
    config = {"TM": 128, "TN": 128, "TK": 64, "num_warps": 8, "num_stages": 3, **config}
    grid = (size // config["TM"], size // config["TN"])
    _matmul[grid](a, a, a, size, size, size, enable_fp_fusion=True, **config)


def found(run, arch=90, **promise):
    launch = Launch("toy", partial(run), **promise)
    return problems(compile_launch(launch, arch), launch)


@compiles
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_good_kernel_has_no_problems(arch):
    assert found(lambda: axpy(torch.bfloat16), arch, vector_bits=128) == []


@compiles
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_dot_uses_the_tensor_cores_of_each_generation(arch):
    launch = Launch("matmul", partial(matmul), vector_bits=128, dot=True)
    (report,) = compile_launch(launch, arch)
    assert problems([report], launch) == []
    kind = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}[arch]
    assert report.matrix == kind and report.load_bits == report.store_bits == 128
    assert report.kernel == "_matmul" and report.grid == (32, 32) and report.arch == arch
    assert 0 < report.registers < 256 and 32_768 < report.shared < report.shared_limit


@compiles
@pytest.mark.parametrize(
    ("message", "run", "promise"),
    [
        ("_axpy: loads of 32 bits, 128 promised", lambda: axpy(stride=3), {"vector_bits": 128}),
        ("_axpy: loads of 32 bits", lambda: axpy(misaligned=True), {"vector_bits": 128}),
        ("_axpy: stores of 32 bits", lambda: axpy(n=(1 << 20) + 1), {"vector_bits": 128}),
        ("_axpy: loads of 16 bits", lambda: axpy(torch.half, stride=3), {"vector_bits": 64}),
        ("no block with 128 bits", lambda: axpy(BLOCK=128), {"vector_bits": 128}),
        ("no tensor-core instruction of sm_80, but none", axpy, {"dot": True}),
        ("_matmul: registers spill", lambda: matmul(maxnreg=32), {}),
        ("_axpy: grid", lambda: axpy(programs=(1, 65_536)), {}),
        ("launches no kernel", lambda: None, {}),
    ],
)
def test_a_bad_launch_is_found(message, run, promise):
    assert any(message in problem for problem in found(run, 80, **promise))


@compiles
def test_shared_memory_is_judged_by_the_limit_of_each_architecture():
    def large():
        matmul(TN=256, num_stages=4)

    message = "_matmul: 147,456 bytes of shared memory, sm_120 has 101,376"
    assert found(large, 120) == [message]
    assert found(large, 80) == []


@compiles
def test_a_promise_holds_for_every_kernel_of_a_launch():
    def two():
        axpy()
        axpy(stride=3)

    def main_and_small():
        axpy()
        axpy(n=128, BLOCK=128)

    assert found(two, vector_bits=128) == ["_axpy: loads of 32 bits, 128 promised"]
    assert found(main_and_small, vector_bits=128) == []


@compiles
def test_arguments_of_compile_launch_are_checked():
    with pytest.raises(ValueError, match="arch must be one of"):
        compile_launch(Launch("toy", partial(axpy)), 52)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="0 active drivers"):
            axpy()  # nothing stays patched


# The command --------------------------------------------------------------------------------------
def command(*arguments, **environment):
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.offline", *arguments],
        cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True,
    )  # fmt: skip


@compiles
@pytest.mark.slow
def test_the_command_prints_and_writes_a_table(tmp_path):
    done = command("philox_normal", "--arch", "90", "--csv", str(tmp_path / "table.csv"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Triton {triton.__version__}, problems: 0" in done.stdout
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert f"\n{len(rows)} kernels" in done.stdout
    assert {row["op"] for row in rows} == {"philox_normal"} and {r["arch"] for r in rows} == {"90"}
    assert all(int(row["registers"]) > 0 and row["stack"] == "0" for row in rows)


@compiles
def test_the_command_reports_problems_and_goes_on(monkeypatch, capsys):
    def launches():
        yield Launch("bad", partial(axpy, BLOCK=1000))
        yield Launch("narrow", partial(axpy, stride=3), vector_bits=128)
        yield Launch("good", partial(axpy), vector_bits=128)

    monkeypatch.setitem(LAUNCHES, "toy", launches)
    assert main(["toy", "--arch", "90"]) == 1
    output = capsys.readouterr().out
    assert "\n2 kernels" in output and "problems: 2" in output
    assert "PROBLEM toy, bad, sm_90: does not compile: CompilationError" in output
    assert "PROBLEM toy, narrow, sm_90: _axpy: loads of 32 bits, 128 promised" in output


def test_the_command_refuses_what_it_cannot_do(capsys):
    if HAS_TRITON:
        done = command(TRITON_INTERPRET="1")
        assert done.returncode == 2 and "unset TRITON_INTERPRET" in done.stderr
        with pytest.raises(SystemExit, match=r"^2$"):
            main(["no_such_op"])
        assert "no op 'no_such_op'; there are" in capsys.readouterr().err
    else:
        done = command()
        assert done.returncode == 2 and "Triton is not installed" in done.stderr


# Programmatic dependent launch --------------------------------------------------------------------
@pytest.mark.offline
@pytest.mark.parametrize("arch", [90, 120])
@pytest.mark.parametrize(
    ("module", "label"),
    [(norm_linear, "768 x 3072 torch.bfloat16 int8"), (norm_linear, "swiglu 2048"),
     (decode_attention, "D 64 torch.bfloat16")],
)  # fmt: skip
def test_a_launch_that_starts_early_waits_before_it_touches_memory(module, label, arch):
    """Weights are asked for before; with the switch off there is nothing of all this."""
    op = module.__name__.split(".")[2].replace("decode_attention", "decode_attention_append")
    launch = next(found for found in LAUNCHES[op]() if label in found.label)
    config, code = module._launch_config, {}
    for pdl in (False, True):

        def switched(*arguments, pdl=pdl):
            assert config(*arguments)["PDL"] is False  # until it is measured
            return {**config(*arguments), "PDL": pdl}

        with mock.patch.object(module, "_launch_config", switched):
            assert problems(compile_launch(launch, arch), launch) == []
            with _compiling(arch) as compiled:
                launch.run()
        ((kernel, _),) = compiled
        assert kernel.metadata.launch_pdl is pdl
        code[pdl] = kernel.asm["ptx"]
    assert "griddepcontrol" not in code[False] and "prefetch.global" not in code[False]
    before, after = code[True].split("griddepcontrol.wait")
    access = r"\b(ld\.global|st\.global|cp\.async|atom|red)\b"
    assert re.search(access, after) and not re.search(access, before)
    assert "griddepcontrol.launch_dependents" in before
    assert ("prefetch.global.L2" in before) == (module is norm_linear)
    assert "prefetch.global" not in after


# Every op -----------------------------------------------------------------------------------------
@pytest.mark.offline
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("op", sorted(LAUNCHES))
def test_launches_of_an_op_compile_well(op, arch):
    """Some two for sm_90, one for the others; `python -m benchmarks.offline` tries them all."""
    every = max(1, len(list(LAUNCHES[op]())) // (2 if arch == 90 else 1))
    assert not problems_of(listed([op], every), arch)


def problems_of(launches, arch):
    found = compile_all(launches, [arch])
    return [f"{op}, {label}: {p}" for op, label, _, _, ps in found for p in ps]


@pytest.mark.offline
@pytest.mark.parametrize("name", RUNS)
def test_launches_that_models_make_compile_well(name):
    """For sm_90 the first of each op, and all of attention, whose kernel has the most registers.

    `python -m benchmarks.offline` tries them all, for the other architectures too.
    """
    chosen, ops = [], set()
    for op, launch in recorded_launches([name]):
        if op not in ops or op.startswith("decode_attention"):
            chosen.append((op, launch))
        ops.add(op)
    assert not problems_of(chosen, 90)
