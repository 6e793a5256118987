"""Tuning, on a CPU: toy calls whose speed under each configuration is known."""

import dataclasses
import json
import math
import time
import types

import pytest
import torch

from benchmarks import tune
from benchmarks.harness.case import Provider
from benchmarks.harness.records import OURS
from benchmarks.harness.tuning import Tunable, row_blocks
from benchmarks.ops import (
    CASES,
    affine_coupling,
    conv2d_stats,
    decode_attention,
    norm_linear,
    pair_conv2d,
    patch_head_loss,
    sample_logits,
)
from benchmarks.ops import instance_norm_act as norms
from benchmarks.suites import select
from benchmarks.tune import Sweep, choose, lines, passes, sweep
from cgkernels import rows
from cgkernels._triton import HAS_TRITON
from cgkernels.ops.instance_norm_act.launch import _launch_config as norm_config
from tests.support import kernels

CPU = torch.device("cpu")
NOW, A, B = ('{"BLOCK": 1}', '{"BLOCK": 2}', '{"BLOCK": 4}')


@pytest.fixture
def toy(monkeypatch):
    """An op whose calls take a millisecond a block, and that fails with blocks of 8 or 16."""
    module = types.ModuleType("toy")
    module.config = lambda numel, dense: {"BLOCK": 4}
    blocks = [{"BLOCK": n} for n in (1, 2, 4, 8, 16)]
    tunable = Tunable(module, "config", lambda numel, dense: iter(blocks))
    monkeypatch.setitem(tune.TUNABLES, "add_noise", tunable)
    spilled = {16: 3}
    monkeypatch.setattr(tune, "_spills", lambda call: spilled.get(call()["BLOCK"], 0))

    def build(sets):
        def call():
            config = module.config(numel=784, dense=True)
            if config["BLOCK"] == 8:
                raise RuntimeError("out of resources\nby far")
            time.sleep(1e-3 * config["BLOCK"])
            return config

        return [call for _ in sets]

    def gate(sets):
        assert module.config(784, True)["BLOCK"] != 1

    (case,) = select("ops", CPU, names=["add_noise"], sizes=["fashion"], dtypes=["bfloat16"])
    return dataclasses.replace(case, providers={OURS: Provider(build)}, gate=gate)


# What is swept ------------------------------------------------------------------------------------
def test_every_op_is_tuned():
    """But the one that has no kernel of ours."""
    assert tune.TUNABLES.keys() == CASES.keys() - {"prefill_attention"}


@pytest.mark.parametrize("numel", [1, 300, 3072, 2**34])
@pytest.mark.parametrize("dense", [True, False])
def test_candidates_can_be_launched(numel, dense):
    found = list(row_blocks(numel, dense))
    assert (
        found
        and found[0]["BLOCK"] == 256
        and all(c.keys() == {"BLOCK", "num_warps"} for c in found)
    )
    assert max(c["BLOCK"] for c in found) <= max(256, min(4096, 2 * numel))
    assert len({json.dumps(c) for c in found}) == len(found)
    if numel > 1000:
        assert rows.row_block(numel, dense) in found


@pytest.mark.parametrize("numel", [1, 2352, 3072, 2**20, 2**24])
def test_candidates_for_rows_in_parts_include_the_present(numel):
    found = list(affine_coupling._row_splits(numel, True))
    assert found and all(c["SPLIT"] % c["BLOCK"] == 0 for c in found)
    assert all(math.ceil(numel / c["SPLIT"]) <= 1024 for c in found)
    if numel > 2**12:
        assert tune.TUNABLES["affine_coupling"].function(numel, True) in found


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_size", [32, 64, 80, 128, 256])
def test_candidates_for_splits_include_the_present(head_size, itemsize):
    found = [json.dumps(config) for config in decode_attention._splits(head_size, itemsize)]
    present = tune.TUNABLES["decode_attention"].function(head_size, itemsize)
    assert json.dumps(present) in found and len(set(found)) == len(found) < 80
    assert {json.loads(config)["PDL"] for config in found} == {False, True}


@pytest.mark.parametrize("features", [40, 768, 3072])
@pytest.mark.parametrize("activation", [None, "swiglu"])
def test_candidates_for_tiles_cover_the_features(features, activation):
    found = list(norm_linear._linear_tiles(768, features, torch.bfloat16, activation))
    assert len({json.dumps(c) for c in found}) == len(found)
    assert {config["PDL"] for config in found} == {False, True}
    for config in found:
        splits, split = config["SPLITS"], config["SPLIT"]
        assert (splits - 1) * split < features <= splits * split
        assert split % config["BLOCK_K"] == 0 and config["BLOCK_N"] >= 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_candidates_for_pixels_include_the_present(dtype):
    found = list(patch_head_loss._pixel_tiles(961, dtype))
    assert tune.TUNABLES["patch_head_loss"].function(961, dtype) in found
    assert len({json.dumps(c) for c in found}) == len(found) < 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("features", "outputs"), [(48, 64), (3, 64), (576, 128)])
def test_candidates_for_windows_include_the_present(features, outputs, dtype):
    found = list(pair_conv2d._window_tiles(features, outputs, dtype))
    assert tune.TUNABLES["pair_conv2d"].function(features, outputs, dtype) in found
    assert len({json.dumps(c) for c in found}) == len(found) < 80
    assert all(c["num_warps"] <= 4 for c in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(4096, 128, 64), (4096, 256, 256), (961, 512, 256), (900, 7, 3)])
def test_candidates_for_convolutions_include_the_present_and_no_eight_warps(size, dtype):
    found = list(conv2d_stats._convolution_tiles(*size, dtype))
    assert tune.TUNABLES["conv2d_stats"].function(*size, dtype) in found
    assert len({json.dumps(c) for c in found}) == len(found) < 80
    assert all(c["num_warps"] == 4 and c["BLOCK_N"] >= 16 <= c["BLOCK_K"] for c in found)


@pytest.mark.parametrize("vocabulary", [1, 100, 1000, 16384, 32000, 2**18])
def test_candidates_for_vocabularies_hold_what_fits(vocabulary):
    found = list(sample_logits._vocabulary_walks(vocabulary))
    assert found and len({json.dumps(c) for c in found}) == len(found)
    for config in found:
        assert config["PIECE"] <= config["BLOCK"]
        assert not config["HELD"] or vocabulary <= config["BLOCK"] <= 16384
        assert 32 * config["num_warps"] * config["maxnreg"] <= 65536


@pytest.mark.parametrize("pixels", [2, 961, 1024, 4096, 2**20])
@pytest.mark.parametrize("channels, channels_last", [(3, True), (512, True), (64, False)])
def test_candidates_for_norms_take_all_pixels(pixels, channels, channels_last):
    found = list(norms._norm_tiles(pixels, channels, channels_last))
    assert found and len({json.dumps(c) for c in found}) == len(found)
    for config in found:
        assert config["split"] % config["BLOCK_P"] == 0
        assert config["WHOLE"] or 1 < math.ceil(pixels / config["split"]) <= 256
    if pixels in (1024, 2**20) and channels > 3:
        assert norm_config(pixels, channels, channels_last) in found


def test_one_dtype_of_each_size_is_swept():
    found = tune.chosen(CPU)
    assert {case.dtype for case in found} == {torch.float32, torch.bfloat16}
    assert {case.name for case in found} == set(tune.TUNABLES)
    assert {case.name for case in tune.chosen(CPU, ["add_noise"])} == {"add_noise"}
    on_gpu = [case.dtype for case in tune.chosen(torch.device("cuda"))]
    assert set(on_gpu) == {torch.bfloat16, torch.float32} and on_gpu[0] == torch.bfloat16


# Sweeps -------------------------------------------------------------------------------------------
def test_a_sweep(toy):
    before = tune.TUNABLES["add_noise"].function
    found = sweep(toy, CPU, seconds=0.01)
    assert tune.TUNABLES["add_noise"].function is before
    assert found.arguments == {"numel": 784, "dense": True} and found.itemsize == 2
    assert found.present == B and list(found.times) == [B, NOW, A]  # once, though a candidate too
    assert found.ratio(NOW) > 2 and found.verdict(NOW) == "FASTER"
    assert found.dropped == {
        '{"BLOCK": 8}': "RuntimeError: out of resources",
        '{"BLOCK": 16}': "spills 3 registers",
    }
    assert Sweep(**json.loads(json.dumps(dataclasses.asdict(found)))).ratio(A) == found.ratio(A)


def test_a_case_has_one_shape(toy):
    module = tune.TUNABLES["add_noise"].module

    def two(sets):
        return [lambda: (module.config(1, True), module.config(2, True))]

    def none(sets):
        return [lambda: None]

    for build, words in ((two, "'numel': 2"), (none, r"asked for \[\]")):
        with pytest.raises(ValueError, match=words):
            sweep(dataclasses.replace(toy, providers={OURS: Provider(build)}), CPU)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_spills_are_those_of_all_kernels_of_a_call(monkeypatch):
    jit = pytest.importorskip("triton.runtime.jit")
    spills = iter((0, 12, 4))
    monkeypatch.setattr(
        jit.JITFunction, "run", lambda *_, **__: types.SimpleNamespace(n_spills=next(spills))
    )
    kernel = object.__new__(jit.JITFunction)
    assert tune._spills(lambda: [kernel[(1,)]() for _ in range(3)]) == 12
    assert tune._spills(lambda: None) == 0


def test_the_gate_is_asked_under_the_configuration(toy):
    assert passes(toy, CPU, A) and not passes(toy, CPU, NOW)


@pytest.mark.kernel
def test_kernels_take_the_candidates():
    case = select("ops", CPU, names=["diffusion_loss"], sizes=["fashion"], providers=[OURS])[0]
    small = {k: v[:2] if k in ("pred", "x0", "t", "index") else v
             for k, v in case.inputs(0, CPU).items()}  # fmt: skip
    (call,) = case.providers[OURS].build([small])
    tunable = tune.TUNABLES["diffusion_loss"]
    with kernels("cpu"), tunable.switched() as switch:
        losses = [call()]
        for config in ({"BLOCK": 256, "num_warps": 1}, {"BLOCK": 512, "num_warps": 2}):
            losses.append(switch.call(config, call))
    assert switch.asked == [{"numel": 784, "dense": True}]
    torch.testing.assert_close(losses[1:], losses[:1] * 2)
    with kernels("cpu"), tunable.switched() as switch, pytest.raises(ZeroDivisionError):
        switch.call({"BLOCK": 0, "num_warps": 1}, call)


# Winners ------------------------------------------------------------------------------------------
def measured(case="c", numel=64, itemsize=2, dense=True, now=10.0, op="add_noise", **times):
    """A sweep; times of the configurations A and B."""
    spread = {name: (t, 0.99 * t, 1.01 * t) for name, t in ({NOW: now} | times).items()}
    return Sweep(op, case, {"numel": numel, "dense": dense}, itemsize, NOW, spread, {})


def winner_of(*sweeps, right=lambda case, config: True):
    (choice,) = choose(sweeps, right)
    return choice.config


@pytest.mark.parametrize(
    "first, second, winner",
    [
        ({A: 8.0, B: 7.0}, {A: 8.0, B: 9.0}, B),
        ({A: 8.0, B: 7.0}, {A: 8.0, B: 11.0}, A),  # B is SLOWER in one case
        ({A: 9.8, B: 11.0}, {A: 9.7, B: 9.9}, NOW),  # A is the SAME in both
        ({A: 8.0, B: 7.0}, {A: 8.0}, A),  # B was dropped in one case
        ({A: 9.8}, {A: 9.0}, A),
    ],
)
def test_a_winner_is_faster_and_nowhere_slower(first, second, winner):
    assert winner_of(measured(**first), measured("d", **second)) == winner


def test_noise_is_no_win():
    noisy = measured(**{A: 8.0})
    noisy.times[A] = (8.0, 7.0, 10.5)
    assert noisy.verdict(A) == "AMBIGUOUS" and winner_of(noisy) == NOW


def test_a_winner_that_fails_the_gate_is_dropped():
    asked = []

    def right(case, config):
        asked.append((case, config))
        return (case, config) != ("d", B)

    sweeps = measured(**{A: 8.0, B: 7.0}), measured("d", **{A: 8.0, B: 7.0})
    assert winner_of(*sweeps, right=right) == A
    assert asked == [("c", B), ("d", B), ("c", A), ("d", A)]
    assert winner_of(*sweeps, right=lambda case, config: False) == NOW


def lines_of(*sweeps):
    return lines(tune.TUNABLES["add_noise"], choose(sweeps, lambda case, config: True))


def test_lines_have_thresholds_and_what_they_won():
    fast, faster = {A: 8.0}, {A: 5.0}
    found = lines_of(
        measured(numel=1024, **faster), measured(numel=256, **fast), measured(numel=4096, now=9.0),
        measured(numel=512, now=8.0, **fast), measured("d", 256, **{A: 9.9}),
    )  # fmt: skip
    assert found == [
        f"if numel <= 256 and dense: return {A}  # speed +12.4%, worst case +1.0%, cases: 2",
        f"if numel <= 512 and dense: return {NOW}  # kept, cases: 1",
        f"if numel <= 1024 and dense: return {A}  # speed +100.0%, worst case +100.0%, cases: 1",
        f"if numel <= 4096 and dense: return {NOW}  # kept, cases: 1",
    ]
    merged = lines_of(*(measured(numel=n, **faster) for n in (256, 512, 1024)))
    assert [line.partition(":")[0] for line in merged] == ["if numel <= 1024 and dense"]


def test_kinds_of_launches_and_dtypes_are_told_apart_where_they_differ():
    found = lines_of(
        measured(itemsize=2, **{A: 5.0}), measured(itemsize=4, **{A: 5.0}),
        measured(itemsize=2, dense=False, **{A: 5.0}), measured(itemsize=4, dense=False),
    )  # fmt: skip
    assert [line.partition(":")[0] for line in found] == [
        "if numel <= 64 and dense",
        "if numel <= 64 and not dense and itemsize == 2",
        "if numel <= 64 and not dense and itemsize == 4",
    ]
    assert found[0].endswith("cases: 2")


def test_lines_are_code(toy):
    for line in lines_of(measured(**{A: 5.0}), measured(numel=10**6, itemsize=4)):
        compile(f"def config(numel, dense, itemsize):\n    {line}", "", "exec")


def test_ops_that_share_a_function_are_judged_together(toy, monkeypatch):
    shared = tune.TUNABLES["add_noise"]
    monkeypatch.setitem(tune.TUNABLES, "guided_step", shared)
    monkeypatch.setattr(tune, "passes", lambda case, device, config: True)
    cases = [dataclasses.replace(toy, name=op) for op in ("add_noise", "guided_step")]
    sweeps = [measured(str(case), op=case.name, **{A: 5.0}) for case in cases]
    head, line = tune.winners(sweeps, cases, CPU)
    assert head == "toy.config, measured with add_noise, guided_step:" and line.endswith("cases: 2")


# Command ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "the following arguments are required: OP"),
        (
            ["conv"],
            "OP must be of add_noise, affine_coupling, conv2d_stats, decode_attention, ",
        ),
        (["add_noise", "--minutes", "0"], "--minutes must be positive, got 0"),
        (["add_noise"], "needs a CUDA GPU, found none"),
    ],
)
def test_wrong_calls(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        tune.main(arguments)
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_the_command(toy, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(tune, "chosen", lambda device, ops: [toy] * 3)

    def measure(ways, device, seconds):
        blocks = {name: calls[0]()["BLOCK"] for name, calls in ways.items()}
        return {name: types.SimpleNamespace(p50=n, low=n, high=n) for name, n in blocks.items()}

    monkeypatch.setattr(tune, "measure", measure)
    now, plain = [0.0], tune.sweep
    monkeypatch.setattr(tune.time, "monotonic", lambda: now[0])

    def timed(case, device):
        now[0] += 40
        return plain(case, CPU)

    monkeypatch.setattr(tune, "sweep", timed)
    monkeypatch.setattr(tune, "passes", lambda case, device, config: passes(case, CPU, config))
    assert tune.main(["add_noise", "--minutes", "1.5"]) == 0
    shown = capsys.readouterr().out
    assert "Out of time for 1 of 3 cases" in shown and "3 timed, 2 dropped" in shown
    assert f"if numel <= 784 and dense: return {A}  # speed +100.0%" in shown  # NOW fails the gate
    assert "A GPU, torch" in shown and "toy.config, measured with add_noise:" in shown
