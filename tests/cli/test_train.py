"""`cgm train`: every family on every task, from where it begins, and how it ends."""

import importlib
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from cgm.checkpoints import load_model, read_tensors, save_model, shipped
from cgm.cli.signals import ending_by_signals, mend_streams
from cgm.data import TASKS, load_folder
from cgm.families.gan import Pix2Pix, Pix2PixConfig
from cgm.model import FAMILIES, make_model
from cgm.training import loop

SHORT = "--training.steps 3 --training.batch-size 1 --training.threads 1 --device cpu"
# What is refused with the default flags: the flags that the line names, and those that then fit,
# or none if that family cannot learn this task at all.
REFUSED = {
    **{(family, task): ("--model.patch", "--model.patch 1")
       for family in ("diffusion", "energy", "gan") for task in ("two_moons", "eight_gaussians")},
    **{(family, task): (f"--task {task}: the kind of condition must be image", "")
       for family in ("pix2pix", "cyclegan")
       for task in ("class_to_image", "two_moons", "eight_gaussians")},
    **{(family, "complete"): ("--task complete: the images must have sides that are multiples", "")
       for family in ("pix2pix", "cyclegan")},
    ("pix2pix", "bouncing_ball"): ("--model.patch", "--model.patch 34"),
    ("cyclegan", "bouncing_ball"): ("--model.patch", "--model.patch 34"),
    ("cyclegan", "colorize"): ("--model.identity-weight", "--model.identity-weight 0"),
}  # fmt: skip


def images(folder, side, *, wide=1, count=2, names="{}.png"):
    folder.mkdir(parents=True)
    for i in range(count):
        levels = np.random.default_rng(i).integers(0, 255, (side, wide * side, 3), np.uint8)
        Image.fromarray(levels).save(folder / names.format(i))
    return folder


# Families and tasks -------------------------------------------------------------------------------
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "classifier"])
def test_every_family_learns_every_task_or_says_why_not(cgm, tmp_path, family, task):
    out = tmp_path / "run"
    line = f"train {family} --task {task} --out {out} {SHORT}"
    code, _, err = cgm(line)
    if (family, task) in REFUSED:
        words, flags = REFUSED[family, task]
        assert code == 2 and err.startswith(f"cgm: {words}") and err.count("\n") == 1
        assert not out.exists()
        if not flags:
            fitting = err.split(f"{family} can learn ")[1].split(", ")
            assert "edges_to_image" in fitting and "complete" not in fitting
            return
        code, _, err = cgm(f"{line} {flags}")
    assert code == 0 and read_tensors(out / "training.safetensors")[1]["step"] == 3, err


@pytest.mark.parametrize(
    "line, words",
    [
        ("pix2pix --size 17", "--size 17: the images must have sides that are multiples of 4"),
        ("pix2pix --size 90", "--size 90: the images must have sides that are multiples of 4"),
        ("pix2pix --size 20 --crop 6", "--crop 6: the images must have sides that are multiples"),
        ("cyclegan --size 17", "--size 17: the images must have sides that are multiples of 4"),
        ("pix2pix --size 16", "--model.patch must be one of 1, 16, 34 for images of 16 x 16 pix"),
        ("pix2pix --size 32 --crop 16", "--model.patch must be one of 1, 16, 34 for images of 16"),
        ("cyclegan --size 16", "--model.patch must be one of 1, 16, 34 for images of 16 x 16 pix"),
        ("gan --size 7", "--model.patch must be one of 1, 16 for images of 7 x 7 pixels, got 34"),
        ("diffusion --size 17", "--model.patch must divide height and width (17, 17), as 1 does"),
        ("energy --size 20 --crop 7", "--model.patch must divide height and width (7, 7), as 1"),
        ("pix2pix --layout classes", "--layout classes: the kind of condition must be image"),
        ("pix2pix --cond-channels 2", "--cond-channels must be one of None, 1, 3, got 2"),
        ("cyclegan --size 24 --cond-channels 1", "--model.identity-weight must be 0 between"),
    ],
)
def test_sizes_that_do_not_fit(cgm, tmp_path, line, words):
    pairs = images(tmp_path / "pairs", 24, wide=2)
    images(pairs / "class", 24)
    code, out, err = cgm(f"train {line} --data {pairs} --out {tmp_path / 'new'} {SHORT}")
    assert code == 2 and out == "" and err.startswith(f"cgm: {words}") and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("size, dropout", [(100, False), (64, True)])
def test_the_config_says_whether_there_is_dropout(cgm, tmp_path, size, dropout):
    """Sides of 100 pixels allow a U-Net of depth 2, which has no layer with dropout."""
    pairs = images(tmp_path / "pairs", size, wide=2)
    narrow = "--model.width 4 --model.discriminator-width 4 --training.steps 1 --device cpu"
    line = f"train pix2pix --data {pairs} --size {size} --out {tmp_path / 'run'} {narrow}"
    code, _, err = cgm(line)
    assert code == 0
    assert ("has no dropout, so all draws of a condition are one" in err) == (not dropout)
    assert (
        json.loads((tmp_path / "run" / "config.json").read_text())["config"]["dropout"] == dropout
    )
    model = load_model(tmp_path / "run")
    cond = load_folder(pairs, size=size).batch(torch.arange(1))["cond"]
    drawn = model.sample(4, cond=cond)
    assert bool((drawn == drawn[:1]).all()) == (not dropout)


# Where it begins ----------------------------------------------------------------------------------
def test_a_model_learns_on_from_another(cgm, tmp_path):
    """Its config is the default of the flags, its weights the first; the optimizer is fresh."""
    pairs = images(tmp_path / "pairs", 16, wide=2)
    config = Pix2PixConfig(
        event_shape=(3, 32, 32), cond_shape=(3, 32, 32), generator="resnet", depth=1, width=4,
        norm="instance", patch=16, discriminator_width=4, loss="hinge",
    )  # fmt: skip
    source = make_model(Pix2Pix, config, seed=7)
    save_model(tmp_path / "converted", source, {"converted": {}})
    line = f"train pix2pix --init {tmp_path / 'converted'} --data {pairs} --size 16"
    line += f" --out {tmp_path / 'run'} {SHORT} --training.learning-rate 1e-30"
    code, _, err = cgm(f"{line} --model.loss lsgan")
    assert code == 0, err
    tuned = load_model(tmp_path / "run")
    assert (tuned.config.generator, tuned.config.norm, tuned.config.loss) == (
        "resnet", "instance", "lsgan",
    )  # fmt: skip
    assert tuned.config.event_shape == (3, 16, 16)
    for name, tensor in source.state_dict().items():
        torch.testing.assert_close(tuned.state_dict()[name], tensor, rtol=0, atol=1e-12)
    state, info = read_tensors(tmp_path / "run" / "training.safetensors")
    steps = [int(t) for name, t in state.items() if name.endswith("/step")]
    assert info["step"] == 3 and set(steps) == {3}
    line = line.replace(f"--out {tmp_path / 'run'}", f"--out {tmp_path / 'other'}")
    code, _, err = cgm(f"{line} --model.width 8")
    assert code == 2 and "model.safetensors: generator" in err and "must be (8," in err
    assert err.startswith("cgm: --init must fit the data and the flags: ")
    assert not (tmp_path / "other").exists()


def test_init_of_a_shipped_model(cgm, tmp_path):
    line = f"train pix2pix --task edges_to_image --init edges_to_image_pix2pix {SHORT}"
    code, _, err = cgm(f"{line} --out {tmp_path / 'run'}")
    assert code == 0, err
    assert (
        load_model(tmp_path / "run").config == load_model(shipped("edges_to_image_pix2pix")).config
    )
    code, _, err = cgm(f"{line.replace('_pix2pix', '_pix2pics')} --out {tmp_path / 'b'}")
    assert code == 2 and err.startswith("cgm: --init must be a folder") and "mean edges_to" in err


@pytest.mark.parametrize("layout", ["pairs", "two_folders", "unpaired"])
@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_gray_images_become_colored_ones(cgm, tmp_path, layout, direction):
    folder = tmp_path / "pairs"
    if layout == "pairs":
        images(folder, 16, wide=2)
    else:
        images(folder / "A", 16)
        images(folder / "B", 16)
    options = {"size": 16, "channels": 3, "cond_channels": 1, "direction": direction}
    dataset = load_folder(folder, layout, **options)
    both = load_folder(folder, layout, **{**options, "cond_channels": None})
    assert torch.equal(dataset.y, both.y) and dataset.cond.shape[1] == 1
    gray = Image.fromarray(both.cond[0].movedim(0, 2).numpy()).convert("L")
    assert torch.equal(dataset.cond[0, 0], torch.from_numpy(np.array(gray)))
    if layout == "pairs":
        line = f"train least_squares --data {folder} --size 16 --cond-channels 1 {SHORT}"
        assert cgm(f"{line} --out {tmp_path / 'run'} --direction {direction}")[0] == 0
        assert load_model(tmp_path / "run").config.cond_shape == (1, 16, 16)


def test_resume_says_what_may_change(cgm, tmp_path):
    line = f"train vae --task complete --out {tmp_path / 'run'} {SHORT} --model.width 8"
    assert cgm(line)[0] == 0
    code, _, err = cgm(f"{line} --resume --training.beta1 0.5 --model.width 4")
    assert code == 2 and err.count("\n") == 1
    assert "--training.beta1 was 0.9 and is now 0.5" in err
    assert "--model.width was 8 and is now 4" in err
    assert "may change on a resume is --training.steps, --training.learning-rate, --trai" in err
    more = line.replace("steps 3", "steps 4")
    assert cgm(f"{more} --resume --training.learning-rate 1e-5")[0] == 0
    training = json.loads((tmp_path / "run" / "config.json").read_text())["training"]
    assert training["learning_rate"] == 1e-5 and training["steps"] == 4


# How it ends --------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves(cgm, tmp_path, monkeypatch, number):
    def step(run, rate, wrapped=loop._Run.train_step):
        wrapped(run, rate)
        if run.step == 2:
            signal.raise_signal(number)

    monkeypatch.setattr(loop._Run, "train_step", step)
    before = signal.getsignal(number)
    line = f"train vae --task two_moons --out {tmp_path / 'run'} {SHORT}"
    code, _, err = cgm(line)
    assert code == 128 + number and signal.getsignal(number) is before
    assert err.count("\n") == 1 and "after step 2 of 3" in err and "--resume continues" in err
    assert read_tensors(tmp_path / "run" / "training.safetensors")[1]["step"] == 2
    assert cgm(f"{line} --resume")[0] == 0


def test_signals_elsewhere(cgm, monkeypatch):
    """Before there is anything to save, and in commands that save nothing."""
    monkeypatch.setattr(
        "cgm.cli.train._load_data", lambda options: signal.raise_signal(signal.SIGTERM)
    )
    assert cgm("train vae --task two_moons")[0] == 143


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_for_an_import(tmp_path, monkeypatch, number):
    """As torch imports numpy, and goes on without it."""
    lines = ("import signal", "try:", f"    signal.raise_signal({int(number)})",
             "except BaseException:", "    raise ImportError", "whole = True")  # fmt: skip
    name = f"imports_during_{signal.Signals(number).name}"
    (tmp_path / f"{name}.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises((KeyboardInterrupt, SystemExit)) as caught, ending_by_signals():
        assert importlib.import_module(name).whole
        time.sleep(10)
    code = 128 + number
    assert caught.type is KeyboardInterrupt if code == 130 else caught.value.code == code


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-"])
def test_closed_streams_are_nobody_who_reads(closed):
    for line in ("--version", "convert --help"):
        command = f"{shlex.quote(sys.executable)} -m cgm {line} {closed}"
        done = subprocess.run(["sh", "-c", command], capture_output=True)
        assert done.returncode == 0 and done.stderr == b"", done.stderr


def test_names_that_a_stream_cannot_encode_are_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    mend_streams()
    print("\xfc.png \udcff")
    assert written.getvalue() == b"\\xfc.png \\udcff\n"


@pytest.mark.slow
def test_a_closed_pipe_saves(tmp_path):
    """As of `cgm train ... | head -n 2`."""
    out = tmp_path / "run"
    line = f"train vae --task two_moons --out {out} --training.steps 100000 --training.log-every 1"
    with subprocess.Popen(
        [sys.executable, "-m", "cgm", *line.split(), "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline().startswith("step 1/100000  loss ")
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 141
    assert err.count("\n") == 1 and "--resume continues there" in err
    step = int(re.search(r"after step (\d+) of", err)[1])
    assert read_tensors(out / "training.safetensors")[1]["step"] == step


@pytest.mark.slow
@pytest.mark.parametrize("line", ["info", "sample --help", "train vae --help"])
def test_other_commands_end_quietly_where_nobody_reads(line):
    with subprocess.Popen(
        [sys.executable, "-m", "cgm", *line.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(timeout=60) == 141


def test_progress_of_what_lasts(capsys, monkeypatch):
    """Lines on stderr, of what runs and for how long; stdout is for results."""
    from cgm.training import progress

    monkeypatch.setattr(progress, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.2)
    with progress.Status("a plan") as status:
        status.update("[first] thing")
        time.sleep(0.1)
        status.update("second")
        time.sleep(0.5)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and lines[:3] == ["a plan", "[first] thing", "second"]
    assert "second, 0 s so far" in lines
