"""The benchmarks: the gate in front of the timer, rows and files, selections, growth."""

import csv
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
from rich.console import Console

from benchmarks import run as door
from benchmarks.harness import case as harness_case
from benchmarks.harness import records
from benchmarks.harness.case import SIZES, Provider
from benchmarks.harness.ceilings import Ceilings, environment
from benchmarks.harness.growth import fits
from benchmarks.harness.records import OK, OURS, Row, Writer, read, version_of
from benchmarks.ops import CASES
from benchmarks.run import Deadline, GateError, main, run_case
from benchmarks.suites import select
from cgkernels import library
from cgkernels.ops import add_noise as op
from cgm.checkpoints import drawable_names, read_config, shipped
from cgm.families import diffusion
from tests.support import kernels, launchers, module_of

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e9, {"float32": 1e12}, 5.0, 1.0)
QUICK = ("--suite", "ops", "--names", "add_noise", "--sizes", "fashion", "--providers")


def case_of(name, **changes):
    """One small case without compilers."""
    case = select("ops", CPU, names=[name], sizes=["fashion"], providers=[OURS, "eager"])[0]
    return dataclasses.replace(case, **changes)


def rows_of(case):
    return run_case(case, CPU, CEILINGS, Deadline(time.monotonic() + 60))


@pytest.fixture
def quick(monkeypatch):
    """No time is spent on ceilings, and little on timing."""
    monkeypatch.setattr(door, "measure_ceilings", lambda device, dtypes: CEILINGS)
    monkeypatch.setattr(door, "_SECONDS", 0.01)


# The gate -----------------------------------------------------------------------------------------
def test_every_op_has_cases():
    files = {module_of(launcher).rpartition(".")[2] for launcher in launchers().values()}
    assert files | {"prefill_attention"} == CASES.keys()  # which has no kernel of ours


@pytest.mark.parametrize("case", select("ops", CPU, sizes=["fashion"]), ids=str)
def test_ours_passes_the_gate(case):
    case.gate(case.sets(CPU))


def wrong(run):
    """Off by one part in a hundred: nothing that a glance at the images would show."""

    def scaled(*args):
        first, *rest = run(*args)
        return first * 1.01, *rest

    return scaled


def test_a_wrong_op_is_refused_and_writes_no_row(tmp_path, quick, monkeypatch, capsys):
    monkeypatch.setattr(op, "_fwd", wrong(op._fwd))
    assert main([*QUICK, OURS, "eager", "--out", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())
    assert (
        "add_noise v fashion float32: ours is wrong, and was not timed" in capsys.readouterr().err
    )


def test_others_are_timed_where_one_is_refused(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(op, "_fwd", wrong(op._fwd))
    arguments = ["--suite", "ops", "--names", "add_noise", "philox_normal", "--sizes", "fashion"]
    assert main([*arguments, "--providers", OURS, "--out", str(tmp_path)]) == 1
    (file,) = tmp_path.iterdir()
    assert {row.case for row in read(file)[1]} == {"philox_normal"}


@pytest.mark.kernel
def test_the_gate_judges_kernels():
    case = case_of("add_noise")
    small = [case.inputs(0, CPU)]
    with kernels("cpu"):
        case.gate(small)
        with (
            mock.patch.object(op, "_fwd", wrong(op._fwd)),
            pytest.raises(AssertionError, match="less accurate"),
        ):
            case.gate(small)


def test_small_results_are_judged_together():
    """A loss has a value for each sample: some hundred are needed to tell it from round-off."""
    case = case_of("diffusion_loss")
    with mock.patch.object(harness_case, "assert_within_budget") as judge:
        case.gate([case.inputs(0, CPU)])
    actual, _, exact, _ = judge.call_args_list[0].args
    assert sum(t.numel() for t in actual) >= 256 and exact[0].dtype == torch.float64


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_the_gate_of_models(broken, monkeypatch):
    cases = select("models", CPU, sizes=["few"])
    case = next(case for case in cases if case.name == "class_to_image_diffusion")
    sets = case.sets(CPU)
    if not broken:
        case.gate(sets)
        return
    step = diffusion.cgkernels.guided_step_

    def wrong_step(x, *args, **options):
        step(x, *args, **options)
        return x.mul_(1 if library.using_reference() else 1.001)

    monkeypatch.setattr(diffusion.cgkernels, "guided_step_", wrong_step)
    with pytest.raises(AssertionError, match="less accurate"):
        case.gate(sets)


# Rows ---------------------------------------------------------------------------------------------
def test_rows_say_what_was_measured(monkeypatch):
    monkeypatch.setattr(door, "_SECONDS", 0.01)
    case = case_of("add_noise")
    ours, eager = rows_of(case)
    assert (ours.provider, eager.provider, ours.status) == (OURS, "eager", OK)
    numel = math.prod(SIZES["fashion"].shape)
    assert ours.bytes == 3 * 4 * numel and ours.items == numel
    assert ours.floor == pytest.approx(3 * 4 * numel / 1e9 * 1e6) and ours.bound == "memory"
    assert ours.of_floor == pytest.approx(ours.floor / ours.p50)
    assert ours.p20 <= ours.p50 <= ours.p80 and ours.n >= 30 and ours.sets > 1
    assert ours.version == version_of("cgkernels.ops.add_noise")


def test_a_case_that_sleeps_on_the_host_is_seen(monkeypatch):
    monkeypatch.setattr(door, "_SECONDS", 0.01)

    def build(sets):
        def call(given):
            time.sleep(0.005)
            return given["x0"].sum().item()

        return [lambda g=given: call(g) for given in sets]

    ours, _, sleeps = rows_of(
        case_of("add_noise", providers=case_of("add_noise").providers | {"sleeps": Provider(build)})
    )
    assert sleeps.launch_bound and sleeps.syncs == 1 and sleeps.host > 4000
    assert not ours.launch_bound


def test_what_cannot_run_is_a_row_with_its_reason(monkeypatch):
    monkeypatch.setattr(door, "_SECONDS", 0.01)

    def fails(sets):
        raise RuntimeError("no compiler\nat all")

    providers = {
        OURS: case_of("add_noise").providers[OURS],
        "peer": Provider(fails, needs="a_package_that_nobody_has"),
        "graph": Provider(fails, cuda=True),
        "broken": Provider(fails),
        "compile": Provider(fails),
    }
    case = case_of("add_noise", providers=providers)
    deadline = Deadline(time.monotonic() + 5)
    rows = run_case(case, CPU, CEILINGS, deadline)
    assert [row.status for row in rows] == [
        OK, "not installed", "needs CUDA", "failed: RuntimeError: no compiler", "out of time",
    ]  # fmt: skip
    assert all(row.p50 is None for row in rows[1:])


def test_floor_is_the_largest_of_its_parts():
    assert CEILINGS.floor(4e6, 1e6, "float32") == (4000.0, "memory")
    assert CEILINGS.floor(4e3, 1e10, "float32") == (10_000.0, "math")
    assert CEILINGS.floor(4, 4, "float32") == (1.0, "launch")
    assert CEILINGS.floor(4, 1e10, "bfloat16") == (10_000.0, "math")  # a dtype never measured


# Files --------------------------------------------------------------------------------------------
ENVIRONMENT = {"device": "A GPU, 80 GB", "date": "2026-01-02", "commit": "abc1234+", "note": "a\nb"}
ROW = Row("ops", "an_op", "", "big", "a (big) \"one\"", "float32", OURS, OK, p50=12.5, n=30,
          launch_bound=False, graph_error="a, b")  # fmt: skip


def test_a_file_is_read_as_it_was_written(tmp_path):
    writer = Writer(tmp_path / "new", ENVIRONMENT)
    assert not writer.file.exists()
    rows = [ROW, dataclasses.replace(ROW, provider="eager", status="failed: x", p50=None, n=None)]
    for row in rows:
        writer.write(row)
    environment, found = read(writer.file)
    assert writer.file.name == "A-GPU-80-GB_2026-01-02_abc1234+.csv"
    assert found == rows and environment == {**ENVIRONMENT, "note": "a b"}
    again = Writer(tmp_path / "new", ENVIRONMENT)
    again.write(ROW)
    assert again.file.stem == writer.file.stem + "_2" and len(read(writer.file)[1]) == 2


def test_a_file_that_is_none_of_ours(tmp_path):
    for text in ("", "a,b\n1,2\n", "# device: x\n"):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(ValueError, match=r"x\.csv: is no file of results"):
            read(tmp_path / "x.csv")
    writer = Writer(tmp_path, ENVIRONMENT)
    writer.write(ROW)
    writer.file.write_text(writer.file.read_text().replace("12.5", "12.5.7"))
    with pytest.raises(ValueError, match="row 1 is damaged"):
        read(writer.file)
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / "nothing.csv")


def test_the_version_follows_the_code_and_not_its_words(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    texts = {
        "plain": "def f(x):\n    return x + 1\n",
        "in_words": '"""What."""\n\n\ndef f(x):\n    """Adds."""\n    return x + 1  # one\n',
        "in_lines": "def f(\n    x\n):\n    return x + 1\n",
        "other": "def f(x):\n    return x + 2\n",
    }
    for name, text in texts.items():
        (tmp_path / f"toy_{name}.py").write_text(text)
    plain, in_words, in_lines, other = (records._code(f"toy_{name}") for name in texts)
    assert plain == in_words == in_lines != other
    assert version_of("toy_plain") != version_of("toy_other")


def test_the_version_follows_what_is_imported():
    found = records._closure("cgkernels.ops.add_noise")
    assert {"cgkernels.rows", "cgkernels.device", "cgkernels.targets"} <= found
    assert "cgkernels.ops.guided_step" not in found
    assert "cgkernels.ops.guided_step.kernel" in records._closure("cgkernels.ops.guided_step")
    assert "cgkernels.ops.guided_step" in records._closure("cgm.families.diffusion")


def test_environment_names_what_a_number_needs():
    found = environment(CPU)
    assert {"device", "commit", "date", "command", "torch", "threads", "python"} <= found.keys()
    assert found["threads"] == torch.get_num_threads() and len(str(found["commit"])) >= 7


# The door -----------------------------------------------------------------------------------------
def test_the_table_and_its_file(tmp_path, quick, capsys):
    assert main([*QUICK, OURS, "eager", "compile-max-autotune", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.iterdir()
    environment, rows = read(file)
    shown = capsys.readouterr().out
    assert [row.provider for row in rows if row.dtype == "float32"] == [
        OURS, "eager", "compile-max-autotune",
    ]  # fmt: skip
    assert "add_noise v fashion float32" in shown and "needs CUDA" in shown
    assert file.name in shown and "copy 1 GB/s" in environment["ceilings"]


def test_changes_are_marked(tmp_path, quick, capsys):
    arguments = [*QUICK, OURS, "--dtypes", "float32"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.iterdir()
    lines = file.read_text().splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("suite,"))
    (row,) = csv.DictReader(lines[header:])
    slower = {name: str(100 * float(row[name])) for name in ("p50", "low", "high")}
    with file.open("w") as opened:
        opened.write("\n".join(lines[:header]).replace("device: ", "device: another ") + "\n")
        writer = csv.DictWriter(opened, row)
        writer.writeheader()
        writer.writerow(row | slower)
    capsys.readouterr()
    assert main([*arguments, "--out", str(tmp_path), "--compare", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "FASTER -" in shown and "measured on another device, another" in shown


def test_time_is_kept(tmp_path, quick, capsys):
    start = time.process_time()  # of our own: other tests run at the same time
    assert main(["--minutes", "0.02", "--out", str(tmp_path)]) == 0
    assert time.process_time() - start < 20
    assert "Out of time for" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--suite", "speed"], "suite must be one of ops, models, growth, all, got 'speed'"),
        (
            ["--suite", "ops", "--names", "conv"],
            "names must be of add_noise, affine_coupling, conv2d_stats, deco",
        ),
        (["--suite", "ops", "--sizes", "huge"], "sizes must be of fashion, "),
        (
            ["--suite", "ops", "--dtypes", "int8"],
            "dtypes must be of float32, bfloat16 for suite ops on cpu, got",
        ),
        (
            ["--suite", "ops", "--providers", "jax"],
            "providers must be of cgkernels, eager, compile, compile-reduce",
        ),
        (["--names", "add_noise", "--sizes", "few"], "no case of suite all has these"),
        (["--minutes", "0"], "--minutes must be positive, got 0"),
        (["--device", "cuda:77"], "--device must be one that is here"),
        (["--device", "abacus"], "--device must be"),
        (["--suite", "ops", "--compare", "nothing.csv"], "nothing.csv: cannot be read"),
        (["--suite", "ops", "--out", "{file}/x"], "--out must be a folder"),
    ],
)
def test_user_errors(arguments, words, tmp_path, quick, capsys):
    (tmp_path / "file").write_text("")
    arguments = [a.replace("{file}", str(tmp_path / "file")) for a in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "new")]
    assert main(arguments) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_pytest_benchmark_writes_json(tmp_path):
    """The second door on the same cases, with the options of pytest-benchmark."""
    file = tmp_path / "out.json"
    chosen = "philox_normal and (cgkernels or eager or reduce)"
    command = ["-m", "pytest", "benchmarks", "-q", "-k", chosen, f"--benchmark-json={file}"]
    # pytest-benchmark measures nothing in a worker of pytest-xdist.
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout
    found = json.loads(file.read_text())["benchmarks"]
    assert [entry["name"].split(", ")[-1].rstrip("]") for entry in found] == [OURS, "eager"]
    assert all(entry["stats"]["median"] > 0 for entry in found)
    assert "needs CUDA" in done.stdout


# Growth -------------------------------------------------------------------------------------------
def sweep(times, *, limit=1.0, case="an_op"):
    sizes = [2**i for i in range(len(times))]
    return [
        dataclasses.replace(
            ROW, suite="growth", case=case, size=f"b{n}", p50=t, extent="elements",
            extent_value=n, extent_limit=limit,
        )
        for n, t in zip(sizes, times, strict=True)
    ]  # fmt: skip


def test_exponents():
    linear, square = sweep([3.0 * 2**i for i in range(5)]), sweep([4.0**i for i in range(5)])
    flat = sweep([10.0, 10.0, 11.0, 16.0, 32.0, 64.0])  # the cost of a call, then the work
    (fit,) = fits(linear)
    assert fit.exponent == pytest.approx(1) and not fit.too_fast and fit.sizes == (1, 2, 4, 8, 16)
    (fit,) = fits(square)
    assert fit.exponent == pytest.approx(2) and fit.too_fast
    assert not fits(sweep([4.0**i for i in range(5)], limit=2.0))[0].too_fast
    assert fits(flat)[0].exponent == pytest.approx(1, abs=0.02)
    assert fits(sweep([1.0, 2.0])) == [] and fits([ROW]) == []
    shuffled = [*linear[::-1], *sweep([4.0**i for i in range(5)], case="other")]
    assert [round(fit.exponent) for fit in fits(shuffled)] == [1, 2]


def test_growth_beyond_the_limit_is_a_problem(capsys):
    console = Console(width=150)
    assert door.print_growth(console, sweep([2.0**i for i in range(5)])) == []
    (said,) = door.print_growth(console, sweep([4.0**i for i in range(5)]))
    assert "time grows with elements^2.00, at most 1.00" in said
    assert "exceeded" in capsys.readouterr().out


@pytest.mark.slow
def test_every_op_and_model_is_swept():
    found = select("growth", CPU)
    swept = {case.name for case in found}
    assert CASES.keys() <= swept
    for name in drawable_names():
        family = read_config(shipped(name))["family"]
        assert {name, f"untrained_{family}"} & swept
    extents = {case.extent.name for case in found}
    assert extents >= {"elements", "batch", "steps", "pixels", "context"}
    assert all(list(case.providers) == [OURS] for case in found)


def test_gate_error_keeps_the_words():
    def gate(sets):
        raise AssertionError("less accurate than plain")

    with pytest.raises(GateError, match="less accurate than plain"):
        rows_of(case_of("add_noise", gate=gate))
