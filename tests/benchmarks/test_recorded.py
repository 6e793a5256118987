"""The launches that are recorded of models: that they are all there, and what they are."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.models import recording as recorder
from benchmarks.models.launches import RUNS, recorded_launches
from benchmarks.models.recording import launch_of, recording
from benchmarks.ops import LAUNCHES
from cgkernels import add_noise, philox_normal
from cgkernels.library import OPS
from cgm.checkpoints import read_config, shipped, shipped_names
from cgm.model import FAMILIES, family_class

META = torch.device("meta")
TABLE = torch.empty(10, 2, device=META)


def noised(x, **options):
    given = {"table": TABLE, "t": torch.zeros(len(x), dtype=torch.int64, device=META)}
    return add_noise(x, **given, seed=0, **options)


# The recorder -------------------------------------------------------------------------------------
def test_a_call_becomes_the_launch_of_its_op():
    x = torch.empty(4, 6, 8, 8, device=META)[:, 1:4].requires_grad_()
    with recording() as calls:
        noised(x)[0].sum().backward()
    (forward, backward) = (launch_of(*call, "toy:") for call in calls.items())
    assert [op for op, _ in (forward, backward)] == ["add_noise_fwd", "add_noise_bwd"]
    op, launch = forward
    assert launch.label == "toy: 4x3x8x8 torch.float32" and not launch.run.keywords
    assert launch.run.func is next(LAUNCHES[op]()).run.func
    given = launch.run.args[0]
    assert given.stride() == x.stride() and given.storage_offset() == x.storage_offset()
    assert not given.requires_grad and given.device == META


def test_calls_that_a_launcher_can_tell_apart_are_kept():
    memory = torch.empty(64, device=META)
    with recording() as calls:
        for offset in (0, 4, 8, 1, 5):  # at 16 bytes, thrice, and at 4 of 16, twice
            noised(memory[offset:][:32].view(2, 16))
        noised(memory.view(16, 4)[:, :2])
        noised(memory.bfloat16().view(2, 32)[:, :16])
        noised(memory[:32].view(2, 16))
    assert len(calls) == 4


def test_a_loop_that_repeats_itself_is_left(monkeypatch):
    monkeypatch.setattr(recorder, "_REPEATS", 5)
    steps = []
    with recording() as calls:
        for step in range(100):
            steps.append(step)
            philox_normal((2, 3) if step < 50 else (2, 4), seed=0, step=0, device=META)
    assert len(steps) == 7 and len(calls) == 1


def test_convolutions_are_laid_out_as_on_a_gpu():
    x, weight = torch.empty(2, 8, 6, 6, device=META), torch.empty(4, 8, 3, 3, device=META)
    last = {"memory_format": torch.channels_last}
    with recording():
        for given in ((x.to(**last), weight), (x, weight.to(**last))):
            assert F.conv2d(*given).is_contiguous(**last)
        assert F.conv2d(x, weight).is_contiguous()
        assert F.conv_transpose2d(x.to(**last), weight.transpose(0, 1)).is_contiguous(**last)


def test_autocast_is_as_it_was():
    with recording():
        assert not torch.is_autocast_enabled("meta")
        with torch.autocast("meta", enabled=False), torch.autocast("cpu", torch.bfloat16):
            assert torch.is_autocast_enabled("cpu")
    with pytest.raises(RuntimeError), torch.autocast("meta"):
        pass


# Models -------------------------------------------------------------------------------------------
def test_every_family_that_is_drawn_from_is_recorded():
    families = {read_config(shipped(name))["family"] for name in shipped_names() if name in RUNS}
    drawn = {name for name in FAMILIES if family_class(name).sampling_config is not None}
    assert families | {"cyclegan"} == drawn


@pytest.mark.parametrize(
    ("name", "ops"),
    [
        ("colorize_flow", {"philox_normal", "affine_coupling_fwd", "affine_coupling_bwd"}),
        ("colorize_diffusion", {"philox_normal", "guided_step_", "add_noise_fwd",
                                "diffusion_loss_fwd", "diffusion_loss_bwd"}),
        ("cyclegan", {"instance_norm_act_fwd", "instance_norm_act_bwd", "pair_conv2d",
                      "patch_head_loss"}),
        ("gpt2_6x384", {"embed_tokens", "norm_linear", "norm_linear_counted", "sample_logits_fwd",
                        "sample_logits_", "decode_attention_append"}),
    ],
)  # fmt: skip
def test_what_models_launch(name, ops):
    found = list(recorded_launches([name]))
    assert {op for op, _ in found} == ops
    labels = [label for _, label in ((op, launch.label) for op, launch in found)]
    assert len(set(labels)) == len(labels) and all(label.startswith(name) for label in labels)
    for op, launch in found:
        OPS[op](*launch.run.args)  # they are arguments of the op


def test_the_attention_of_the_decoder():
    """A prefix each, one that all rows share, and rotary positions."""
    found = [launch for op, launch in recorded_launches(["gpt2_6x384"]) if "attention" in op]
    prefixes = {tuple(launch.run.args[10].shape[:2]) for launch in found}
    assert prefixes == {(1, 64), (8, 64)}
    kinds = {(launch.run.args[7] is None, len(launch.run.args[10])) for launch in found}
    assert kinds == {(True, 1), (True, 8), (False, 1), (False, 8)}
    assert all(launch.run.args[6] is not None for launch in found)  # counters, as on a GPU
