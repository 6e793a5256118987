"""The first look at a GPU, on a CPU: what it judges, and how it goes on after it was cut off."""

import itertools
import json
import subprocess
import sys
import time
import types
from unittest import mock

import pytest
import torch

from benchmarks import gpu, suites, tune
from benchmarks import run as door
from benchmarks.gpu import FAILED, OK, SKIPPED, STARTED, Check, Journal, Look, Lost, Runner
from benchmarks.harness import case as harness_case
from benchmarks.harness import correctness
from benchmarks.harness.ceilings import ROOT, Ceilings
from benchmarks.harness.correctness import Skipped, is_large, judge, judge_graph, materialize
from benchmarks.harness.records import OURS, Row, Writer, read
from benchmarks.ops import LAUNCHES
from benchmarks.ops.guided_step import meta_numbers
from cgkernels.library import OPS, using_reference
from cgkernels.ops.guided_step.launch import _launch_inplace
from cgm import checkpoints
from cgm.families.autoregressive import dequantize
from tests.benchmarks.test_benchmarks import ENVIRONMENT

CPU = torch.device("cpu")
CALLS = itertools.count()
NORMAL, STEP, INPLACE = OPS["philox_normal"], OPS["guided_step_fwd"], OPS["guided_step_"]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(correctness, "_REPEATS", 2)


def arguments(op, label):
    return next(launch.run.args for launch in LAUNCHES[op]() if label in launch.label)


def step_arguments(shape=(4, 3, 8, 8), dtype=torch.float32, **options):
    """Of a guided step with noise, on a state that is a view."""
    x = torch.empty(shape[0], shape[1] + 2, *shape[2:], dtype=dtype, device="meta")[:, : shape[1]]
    step, scale, table, seed, index = meta_numbers(shape[0])
    c = torch.empty(shape, dtype=dtype, device="meta")
    given = {"x": x, "cond": c, "uncond": c, "v": None, "h1": None, "h2": None, "last": False}
    x, c, u, v, h1, h2, last = (given | options).values()
    return x, c, u, table, step, scale, v, h1, h2, seed, index, last


# Ops ----------------------------------------------------------------------------------------------
def test_arguments_become_real():
    inner = torch.empty(4, 6, dtype=torch.int64, device="meta")[1:, 2:4]
    meta = (*arguments("guided_step_fwd", "short rows")[:4], step_arguments()[0], inner, "v", None)
    real = materialize(meta, 0, CPU)
    for abstract, concrete in zip(meta, real, strict=True):
        if not isinstance(abstract, torch.Tensor):
            assert concrete is abstract
            continue
        assert concrete.device == CPU and concrete.dtype == abstract.dtype
        assert concrete.shape == abstract.shape and concrete.stride() == abstract.stride()
        assert concrete.storage_offset() == abstract.storage_offset()
        assert not concrete.is_floating_point() or concrete.all()
    low, high = real[3][:, 8], real[3][:, 9]
    assert (low < high).all()  # of clipping
    assert not torch.equal(real[0], real[1])  # one meta tensor, two arguments
    again, other = (materialize(meta, seed, CPU) for seed in (0, 1))
    assert torch.equal(again[0], real[0]) and not torch.equal(other[0], real[0])
    index = materialize(arguments("philox_normal", "(16, 10)"), 0, CPU)[1]
    assert index.dtype == torch.int64 and 0 <= index.min() < index.max() < 16


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OPS))
def test_an_op_agrees_with_itself(name):
    launch = [launch for launch in LAUNCHES[name]() if not is_large(launch.run.args)][-1]
    assert judge(OPS[name], launch.run.args, OPS[name], CPU) == ""


def off(*args):
    return NORMAL(*args).mul_(1.01)


def forgetful(*args):
    out = torch.empty_like(whole := NORMAL(*args))
    out[:, 1:] = whole[:, 1:]
    return out


def fickle(*args):
    out = NORMAL(*args)
    out[0, 0] += next(CALLS) % 2 * 1e-6
    return out


def careless(*args):
    args[1].add_(1)
    return NORMAL(args[0], args[1] - 1, *args[2:])


@pytest.mark.parametrize(
    "run, words",
    [
        (off, "result 0: less accurate than plain PyTorch"),
        (forgetful, "differ in NaN or infinity at 32 of 320 values"),
        (fickle, "gives other bits than the first"),
        (careless, "argument 1 was written"),
    ],
)
def test_what_is_wrong_is_found(run, words):
    args = arguments("philox_normal", "float32 (16, 10)")
    judge(NORMAL, args, NORMAL, CPU)
    with pytest.raises(AssertionError) as raised:
        judge(NORMAL, args, run, CPU)
    assert words in str(raised.value)


def test_writing_is_judged_and_watched():
    args = step_arguments(last=torch.empty(4, 3, 8, 8, device="meta"))
    judge(INPLACE, args, INPLACE, CPU)

    def forgets_the_twin(*args):
        INPLACE(*args[:-1], None)

    def writes_beside(*args):
        INPLACE(*args)
        args[0].as_strided((4, 5, 8, 8), (320, 64, 8, 1), args[0].storage_offset())[:, 3:] = 0

    with pytest.raises(AssertionError, match="result 1: less accurate"):
        judge(INPLACE, args, forgets_the_twin, CPU)
    with pytest.raises(AssertionError, match="memory around tensor 0 was written"):
        judge(INPLACE, args, writes_beside, CPU)


def test_small_results_are_judged_together():
    args = arguments("diffusion_loss_fwd", "v contiguous torch.bfloat16")
    small = [a[..., :4, :4] if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in args]
    with mock.patch.object(correctness, "assert_within_budget") as judged:
        judge(OPS["diffusion_loss_fwd"], small, OPS["diffusion_loss_fwd"], CPU)
    actual, same, exact, _ = judged.call_args.args
    assert len(actual) == len(same) == len(exact) == 16 and actual[0].numel() == 16
    assert not torch.equal(actual[0], actual[1]) and exact[0].dtype == torch.float64


def test_large_launches_are_judged_in_slices(monkeypatch):
    monkeypatch.setattr(correctness, "_LARGE", 2**12)
    monkeypatch.setattr(correctness, "_SLICE", 2**10)
    args = step_arguments((1, 4, 32, 32))
    args = (args[1].clone(), *args[1:])  # dense
    assert "three slices of 1024 of 4096" not in judge(STEP, args, STEP, CPU)
    monkeypatch.setattr(correctness, "_LARGE", 2**12 - 1)
    assert "three slices of 1024 of 4096" in judge(STEP, args, STEP, CPU)

    def wrong_at(place, value):
        def run(*args):
            out, x0 = STEP(*args)
            out.view(-1)[place] += value
            return out, x0

        return run

    for place in (5, 2048, 4095):
        with pytest.raises(AssertionError, match="less accurate"):
            judge(STEP, args, wrong_at(place, 0.1), CPU)
    with pytest.raises(AssertionError, match="not all of it was written"):
        judge(STEP, args, wrong_at(1300, float("nan")), CPU)


def test_memory_that_is_too_small_is_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**30, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    args = arguments("guided_step_fwd", "2^32")
    with pytest.raises(Skipped, match="needs 50 GiB of GPU memory, 10 GiB are free"):
        judge(STEP, args, STEP, torch.device("cuda"))


def stand_in(call):
    """A graph, as far as values go: it works on the tensors of its capture."""
    found = call()

    def replay():
        for kept, new in zip(found, call(), strict=True):
            kept.copy_(new)

    return found, replay


def test_replays_are_compared(monkeypatch):
    monkeypatch.setattr(correctness, "_capture", stand_in)
    last = torch.empty(4, 3, 8, 8, device="meta")
    in_place, args = step_arguments(last=last), step_arguments(h1=last, h2=last)
    assert judge_graph(STEP, args, STEP, CPU) == judge_graph(INPLACE, in_place, INPLACE, CPU) == ""
    monkeypatch.setattr(correctness, "_capture", lambda call: (call(), lambda: None))
    with pytest.raises(AssertionError, match="result 0: replay 2 differs"):
        judge_graph(STEP, args, STEP, CPU)


@pytest.mark.cuda
def test_a_call_is_captured():
    args = step_arguments(last=torch.empty(4, 3, 8, 8, device="meta"))
    assert judge_graph(INPLACE, args, INPLACE, torch.device("cuda")) == ""


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_are_judged(dtype):
    """In place, strided, with noise: in the interpreter what a GPU does."""
    last = torch.empty(2, 3, 16, 16, dtype=dtype, device="meta")
    args = step_arguments((2, 3, 16, 16), dtype, v=last, h1=last, h2=last, last=last)
    assert judge(INPLACE, args, _launch_inplace, CPU) == ""

    def without_noise(*args):
        _launch_inplace(*args[:-3], None, None, args[-1])

    with pytest.raises(AssertionError, match="less accurate"):
        judge(INPLACE, args, without_noise, CPU)


# Models -------------------------------------------------------------------------------------------
MODELS = ["class_to_image_diffusion", "colorize_least_squares"]  # not all: that takes a minute


@pytest.fixture(scope="module")
def model():
    checks = correctness.ModelChecks("class_to_image_diffusion", CPU)
    checks.solver = {**checks.solver, "steps": 3}
    return checks


def test_models_are_judged(model, monkeypatch):
    assert model.graph_is_eager() == ""
    assert "equal to the bit" in (said := model.alone_is_batch()) or "budget" in said
    monkeypatch.setattr(correctness, "cuda_syncs", lambda call: len(call().shape))
    assert model.never_waits() == "waits 4 times, whatever the length of the run"


def test_waits_of_a_model_that_draws_values(monkeypatch):
    checks, drawn = correctness.ModelChecks("complete_autoregressive", CPU), []
    monkeypatch.setattr(correctness, "cuda_syncs", lambda call: drawn.append(call()) or 3)
    assert checks.never_waits() == "waits 3 times, whatever the length of the run"
    kept = [(sample == dequantize(torch.tensor([8]), 16, (1, 1, 1))).all(3) for sample in drawn]
    assert kept[0][:, :, :13].all() and kept[1][:, :, :12].all() and not kept[1].all()


@pytest.mark.slow
def test_wrong_models_are_found(model, monkeypatch):
    right = model.draw

    def by_batch(rows=slice(None), **options):
        out = right(rows, **options)
        if using_reference():  # plain PyTorch is right
            return out
        return out * (1 if len(out) == 1 else 1.01) * (1.0001 if options.get("graph") else 1)

    monkeypatch.setattr(model, "draw", by_batch)
    with pytest.raises(AssertionError, match="less accurate"):
        model.alone_is_batch()
    with pytest.raises(AssertionError, match="graph and eager samples differ by up to"):
        model.graph_is_eager()
    steps = iter((6, 10))
    monkeypatch.setattr(correctness, "cuda_syncs", lambda call: next(steps))
    with pytest.raises(AssertionError, match=r"waits for the device \[6, 10\] times"):
        model.never_waits()


# Running and resuming -----------------------------------------------------------------------------
def look_at(tmp_path, seconds=60.0, **environment):
    environment = ENVIRONMENT | {"torch": "2", "triton": "3"} | environment
    return Look(CPU, tmp_path, environment, time.monotonic() + seconds)


def run_checks(look, stages, lost=lambda: False):
    """The runner after a run; stages are dictionaries of functions, or of versions and them."""

    def listed(checks):
        def stage(look):
            for key, run in checks.items():
                version, run = run if isinstance(run, tuple) else ("1", run)
                yield Check(key, version, run)

        return stage

    runner = Runner(look, lost)
    runner.run([(name, listed(checks), 1.0) for name, checks in stages.items()])
    return runner


def fail():
    raise AssertionError("wrong\nin detail")


def skip():
    raise Skipped("too small")


def logging(log, name, then=lambda: ""):
    def run():
        log.append(name)
        return then()

    return run


def test_what_is_found_is_kept_and_what_failed_runs_again_last(tmp_path, capsys):
    log = []
    first = {"a": logging(log, "a"), "b": logging(log, "b", fail), "c": logging(log, "c", skip)}
    second = {"d": logging(log, "d")}
    runner = run_checks(look_at(tmp_path), {"one": first, "two": second})
    assert log == ["a", "b", "c", "d"] and runner.failed == ["b: AssertionError: wrong"]
    assert dict(runner.counts["one"]) == {OK: 1, FAILED: 1, SKIPPED: 1}
    shown = capsys.readouterr().out
    assert "failed " in shown and "too small" in shown and "in detail" not in shown
    lines = [json.loads(line) for line in (tmp_path / "checks.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines][1::2] == [OK, FAILED, SKIPPED, OK]
    assert lines[3]["reason"] == "AssertionError: wrong\nin detail" and lines[3]["seconds"] >= 0
    assert lines[1]["version"] == "1" and "A GPU" in lines[1]["where"]

    log.clear()
    first["b"] = logging(log, "b")
    again = run_checks(look_at(tmp_path), {"one": first, "two": second})
    assert log == ["c", "b"] and not again.failed
    assert dict(again.counts["one"]) == {OK: 2, SKIPPED: 1} and dict(again.counts["two"]) == {OK: 1}


def test_other_code_and_another_gpu_start_anew(tmp_path):
    log = []
    for version, torch_version in (("1", "2"), ("1", "2"), ("2", "2"), ("2", "3")):
        checks = {"a": (version, logging(log, version + torch_version))}
        run_checks(look_at(tmp_path, torch=torch_version), {"one": checks})
    assert log == ["12", "22", "23"]
    for _ in range(2):
        run_checks(look_at(tmp_path), {"one": {"quick": ("", logging(log, "quick"))}})
    assert log[3:] == ["quick", "quick"]


def test_a_run_cut_off_at_any_byte_goes_on(tmp_path):
    log, names = [], ["a", "b", "c"]
    checks = {name: logging(log, name) for name in names}
    run_checks(look_at(tmp_path), {"one": checks})
    file = tmp_path / "checks.jsonl"
    whole = file.read_bytes()
    for size in range(0, len(whole), 7):
        file.write_bytes(whole[:size])
        complete = [json.loads(line) for line in whole[:size].split(b"\n")[:-1]]
        status = {line["key"]: line["status"] for line in complete}
        log.clear()
        run_checks(look_at(tmp_path), {"one": checks})
        hung = [name for name in names if status.get(name) == STARTED]
        assert log == [n for n in names if n not in status] + hung
        assert [line["status"] for line in Journal(file).lines].count(OK) == 3


def test_time_is_kept(tmp_path, monkeypatch):
    log, now = [], [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow():
        now[0] += 5
        return ""

    checks = {name: logging(log, name, slow) for name in "abcdef"}
    checks["last"] = ("", logging(log, "last"))
    runner = run_checks(look_at(tmp_path, seconds=14), {"one": checks})
    assert log == ["a", "b", "last"] and dict(runner.counts["one"]) == {OK: 3, "left": 4}


def test_a_stage_has_its_share_and_the_rest_comes_after(tmp_path):
    log, look = [], look_at(tmp_path)

    def stage(*names):
        return lambda look: (Check(name, "1", logging(log, name)) for name in names)

    Runner(look, lambda: False).run([("one", stage("a", "b"), 0.0), ("two", stage("c"), 1.0)])
    assert log == ["c", "a", "b"]

    log.clear()
    bad = lambda look: iter([Check("bad", "1", logging(log, "bad", fail))])  # noqa: E731
    for expected in (["bad"], ["bad", "d", "bad"]):
        stages = [("bad", bad, 1.0), ("late", stage("d"), 0.0)]
        Runner(look, lambda: False).run(stages if len(log) else stages[:1])
        assert log == expected


def test_a_stage_that_cannot_be_set_up_is_a_line(tmp_path):
    def needs(look):
        import a_package_that_nobody_has  # noqa: F401

        yield

    def breaks(look):
        raise RuntimeError("no such luck")
        yield

    runner = Runner(look_at(tmp_path), lambda: False)
    runner.run([("one", needs, 1.0), ("two", breaks, 1.0)])
    assert runner.last["rest of one"]["reason"] == "needs a_package_that_nobody_has"
    assert runner.failed == ["rest of two: RuntimeError: no such luck"]
    assert runner.counts == {"one": {SKIPPED: 1}, "two": {FAILED: 1}}


def test_correctness_needs_torch_triton_and_numpy_alone(tmp_path):
    """The rest is named where it is missed."""
    script = f"""
import sys
for name in ("rich", "tyro", "matplotlib", "safetensors", "PIL", "pytest", "diffusers"):
    sys.modules[name] = None
import pathlib, time, torch
from benchmarks import gpu
op = "philox_normal"
gpu.OPS, gpu.LAUNCHES = ({{op: known[op]}} for known in (gpu.OPS, gpu.LAUNCHES))
gpu.judge = gpu.judge_graph = lambda *args: ""
found = {{"device": "A GPU", "torch": "2", "triton": "3"}}
look = gpu.Look(torch.device("cpu"), pathlib.Path({str(tmp_path)!r}), found, time.monotonic() + 60)
runner = gpu.Runner(look, lambda: False)
runner.run(gpu.STAGES)
print(runner.summary())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    assert "correctness: 9 ok" in shown and "graphs:      9 ok, 1 skipped" in shown
    for line in ("tests  needs pytest", "graphs  needs safetensors", "tables  needs "):
        assert f"rest of {line}" in shown, shown
    assert "FAILED" not in shown


def test_a_gpu_that_is_lost_ends_the_run(tmp_path):
    log = []
    checks = {"bad": logging(log, "bad", fail), "good": logging(log, "good")}
    for expected in (["bad"], ["bad", "good", "bad"]):
        with pytest.raises(Lost):
            run_checks(look_at(tmp_path), {"one": checks}, lost=lambda: True)
        assert log == expected


# Stages -------------------------------------------------------------------------------------------
@pytest.fixture
def small(monkeypatch):
    """One op, one case, nothing slow."""
    launches = [next(launch for launch in LAUNCHES["philox_normal"]() if "10)" in launch.label)]
    (case,) = suites.select(
        "ops", CPU, names=["philox_normal"], sizes=["fashion"], dtypes=["float32"],
        providers=[OURS],
    )  # fmt: skip
    monkeypatch.setattr(gpu, "OPS", {"philox_normal": NORMAL})
    monkeypatch.setattr(gpu, "LAUNCHES", {"philox_normal": lambda: iter(launches)})
    gpu.LAUNCHES["philox_normal"].__module__ = "cgkernels.ops.philox_normal"
    monkeypatch.setattr(correctness, "_capture", stand_in)
    monkeypatch.setattr(correctness, "cuda_syncs", lambda call: 3)
    monkeypatch.setattr(suites, "cases", lambda suite, device: [case] * (suite == "all"))
    monkeypatch.setattr(checkpoints, "drawable_names", lambda: MODELS)
    monkeypatch.setattr(gpu, "measure_ceilings", lambda *_: Ceilings(1e9, {"float32": 1e12}, 5, 1))
    monkeypatch.setattr(door, "_SECONDS", 0.01)
    monkeypatch.setattr(gpu, "_pytest", lambda look: "3 passed")
    monkeypatch.setattr(tune, "chosen", lambda device: [case])
    times = {'{"BLOCK": 1}': (2.0, 2.0, 2.0), '{"BLOCK": 2}': (1.0, 1.0, 1.0)}
    found = tune.Sweep(
        "philox_normal", str(case), {"numel": 784, "dense": True}, 4, '{"BLOCK": 1}', times, {}
    )
    monkeypatch.setattr(tune, "sweep", lambda case, device: found)
    return case


@pytest.mark.slow
def test_all_stages(tmp_path, small, capsys):
    runner = Runner(look_at(tmp_path), lambda: False)
    runner.run(gpu.STAGES)
    assert not runner.failed, runner.summary()
    keys = list(runner.last)
    assert keys[0].startswith("philox_normal: contiguous") and keys[1].startswith("graph of ")
    checks = ("graph and eager", "alone and in a batch", "waits in the loop")
    models = [f"{name}: {check}" for name in MODELS for check in checks]
    assert keys[2 : 2 + len(models)] == models
    others = ["pytest -m cuda", f"time ops {small}", f"tune {small}", "winners"]
    assert keys[2 + len(models) :] == others
    (table,) = tmp_path.glob("*.csv")
    assert [row.provider for row in read(table)[1]] == [OURS]
    pasted = "if numel <= 784 and dense: return"
    assert pasted in capsys.readouterr().out
    assert pasted in (tmp_path / "launch_configurations.txt").read_text()
    again = Runner(look_at(tmp_path), lambda: False)
    again.run(gpu.STAGES)
    shown = capsys.readouterr().out
    assert pasted in shown  # from the sweeps of the first run
    done = [line for line in shown.splitlines() if line.startswith("ok ")]
    assert len(done) == 1 and len(list(tmp_path.glob("*.csv"))) == 1
    other = Runner(look_at(tmp_path, device="another"), lambda: False)
    other.run([("tuning", lambda look: iter([*gpu.tuning(look)][1:]), 1.0)])
    assert other.last["winners"]["reason"] == "of 0 of 1 cases"


def test_a_case_that_is_wrong_or_late_is_no_result(tmp_path, small, monkeypatch):
    monkeypatch.setattr(harness_case.Case, "version", "1")
    refused = mock.Mock(side_effect=door.GateError("less accurate than plain"))
    monkeypatch.setattr(door, "run_case", refused)
    stage = [("tables", gpu.tables, 1.0)]
    runner = Runner(look_at(tmp_path), lambda: False)
    runner.run(stage)
    assert runner.failed == [f"time ops {small}: GateError: less accurate than plain"]
    row = Row("ops", "an_op", "", "big", "", "float32", "compile", "out of time")
    monkeypatch.setattr(door, "run_case", lambda *_: [row])
    runner = Runner(look_at(tmp_path), lambda: False)
    runner.run(stage)
    assert runner.last[f"time ops {small}"]["reason"] == "out of time for compile"


def test_the_outcome_of_pytest(tmp_path, monkeypatch):
    def ran(code, text):
        def run(command, *, stdout, **_):
            assert command[1:5] == ["-m", "pytest", "-m", "cuda"]
            stdout.write(text)
            return subprocess.CompletedProcess(command, code)

        return run

    look = look_at(tmp_path)
    (check,) = gpu.tests(look)
    monkeypatch.setattr(subprocess, "run", ran(0, "...\n3 passed\n"))
    assert check.run() == "3 passed" and (tmp_path / "pytest.txt").read_text() == "...\n3 passed\n"
    monkeypatch.setattr(subprocess, "run", ran(1, "F\nFAILED x\n1 failed\n"))
    with pytest.raises(AssertionError, match=r"^exit status 1: 1 failed\nF\nFAILED x"):
        check.run()
    late = mock.Mock(side_effect=subprocess.TimeoutExpired("pytest", 30))
    monkeypatch.setattr(subprocess, "run", late)
    with pytest.raises(Skipped, match="out of time after 30 s"):
        check.run()
    assert late.call_args.kwargs["timeout"] == pytest.approx(30, abs=1)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError):
        next(gpu.tests(look))


def test_a_torn_table_is_readable(tmp_path):
    writer = Writer(tmp_path, ENVIRONMENT)
    row = Row("ops", "an_op", "", "big", "", "float32", OURS, OK, p50=1.5, version="1")
    writer.write(row)
    writer.write(row)
    writer.file.write_bytes(writer.file.read_bytes()[:-9])
    gpu.drop_torn_line(writer.file)
    assert read(writer.file)[1] == [row]
    gpu.drop_torn_line(writer.file)
    assert read(writer.file)[1] == [row]


# Command ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--minutes", "1"], "the following arguments are required: --out"),
        (["--minutes", "0", "--out", "x"], "--minutes must be positive, got 0"),
        (["--minutes", "1", "--out", "x"], "needs a CUDA GPU, found none"),
    ],
)
def test_wrong_calls(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main(arguments)
    assert ended.value.code == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("outcome", [OK, FAILED, "lost"])
def test_the_command(outcome, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu, "HAS_TRITON", True)
    runtime = types.SimpleNamespace(interpret=False)
    monkeypatch.setattr(
        gpu, "triton", types.SimpleNamespace(knobs=types.SimpleNamespace(runtime=runtime))
    )
    monkeypatch.setattr(gpu, "_lost", lambda: outcome == "lost")
    found = ENVIRONMENT | {"torch": "2", "triton": "3"}
    monkeypatch.setattr(gpu, "environment", lambda device, commit: found | {"commit": commit})
    run = (lambda: "fine") if outcome == OK else fail
    stages = [("one", lambda look: iter([Check("a", "1", run)]), 1.0)]
    monkeypatch.setattr(gpu, "STAGES", stages)
    arguments = ["--minutes", "1", "--out", str(tmp_path / "new"), "--commit", "abc"]
    assert gpu.main(arguments) == (0 if outcome == OK else 1)
    shown = capsys.readouterr().out
    assert ("FAILED a: AssertionError: wrong" in shown) == (outcome != OK)
    assert ("run the same command again" in shown) == (outcome == "lost")
    (line,) = Journal(tmp_path / "new" / "environment.jsonl").lines
    assert line["commit"] == "abc"
