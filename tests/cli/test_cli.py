"""The command line: what a user types, and what comes of it."""

import dataclasses
import inspect
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import cgkernels
from cgkernels.library import OPS
from cgm.checkpoints import load_model, read_tensors, save_model
from cgm.cli import bench, compare, convert, demo, evaluate, main, sample, train
from cgm.data import DATA_FIELDS, LAYOUTS, TASKS, load_folder, load_task
from cgm.data.folders import DIRECTIONS
from cgm.evaluation.classifier import Classifier, ClassifierConfig
from cgm.families.cyclegan import CycleGANConfig
from cgm.families.diffusion import ConditionalDiffusion, DiffusionConfig, SamplingConfig
from cgm.families.gan import GANConfig, Pix2PixConfig
from cgm.families.vae import VAEConfig
from cgm.model import FAMILIES, make_model
from cgm.training import TrainingConfig
from cgm.viz.plots import as_images, image_grid, point_map, sample_grid

TINY = shlex.split(
    "--model.width 8 --model.width_multipliers 1 --model.blocks 1 --model.heads 2 "
    "--training.batch-size 4 --training.log-every 1 --training.threads 1 --device cpu"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of runs, by task."""
    folders = {}
    for task in ("class_to_image", "complete", "colorize"):
        folders[task] = tmp_path_factory.mktemp("runs") / task
        line = f"train diffusion --task {task} --training.steps 3 --out {folders[task]}"
        assert main([*line.split(), *TINY]) == 0
    return folders


def everything_in(folder):
    return sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))


def image(file, width, height=None, mode="RGB"):
    file.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(0).integers(0, 255, (height or width, width, 3), np.uint8)
    Image.fromarray(levels).convert(mode).save(file)
    return file


def _unpaired(folder, file):
    for side in "AB":
        (folder / "unpaired" / side).mkdir(parents=True)
        shutil.copy(file, folder / "unpaired" / side)
    return folder / "unpaired"


# Help ---------------------------------------------------------------------------------------------
def test_help_lists_the_commands_without_torch():
    script = (
        "import sys; from cgm.cli import main; main(['--help']); "
        "print([m for m in ('torch', 'matplotlib', 'rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip().endswith("[]")
    for command in (
        "train FAMILY",
        "sample CHECKPOINT",
        "evaluate CHECKPOINT",
        "convert FILE OUT",
        "demo",
        "bench",
        "info",
    ):
        assert f"cgm {command} " in out.stdout


def test_help_of_a_command_loads_no_plots():
    lines = (
        "train diffusion", "sample class_to_image_diffusion", "evaluate colorize_energy", "convert",
        "demo", "compare", "bench", "info",
    )  # fmt: skip
    script = (
        "import sys; from cgm.cli import main\n"
        f"for line in {lines}:\n"
        "    main([*line.split(), '--help'])\n"
        "    print(line, [m for m in sys.modules if m in ('matplotlib', 'cgm.studies.demo')])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for line in lines:
        assert f"usage: cgm {line}" in out.stdout and f"\n{line} []\n" in out.stdout


def test_version(cgm):
    assert cgm("--version") == (0, f"cgm {cgkernels.__version__}\n", "")
    script = [sys.executable, "-m", "cgm", "--help"]
    out = subprocess.run(script, capture_output=True, text=True, check=True)
    assert out.stdout.startswith("usage: cgm COMMAND ...")


def test_usage(cgm):
    assert cgm("")[0] == cgm("train")[0] == cgm("sample")[0] == cgm("train --task x")[0] == 2
    code, out, _ = cgm("train --help")
    trained = sorted(set(FAMILIES) - {"classifier"})
    assert code == 0 and f"one of {', '.join(trained)}." in out
    code, out, _ = cgm("sample --help")
    assert code == 0 and "CHECKPOINT" in out


def comments(options):
    """{field: its comment} of a dataclass and those it derives from, from the source."""
    classes = [cls for cls in reversed(options.__mro__) if dataclasses.is_dataclass(cls)]
    source = "".join(map(inspect.getsource, classes))
    found = re.findall(r"((?:^    #.*\n)+)    (\w+):", source, re.MULTILINE)
    return {name: " ".join(re.sub(r"^    # ?", "", c, flags=re.M).split()) for c, name in found}


@pytest.mark.parametrize(
    "line, prefix, options",
    [
        ("train diffusion --help", "", train.TrainOptions),
        ("train diffusion --help", "model.", DiffusionConfig),
        ("train diffusion --help", "training.", TrainingConfig),
        ("train pix2pix --help", "model.", Pix2PixConfig),
        ("train pix2pix --help", "training.", TrainingConfig),
        ("train cyclegan --help", "model.", CycleGANConfig),
        ("train gan --help", "model.", GANConfig),
        ("train vae --help", "model.", VAEConfig),
        ("sample CHECKPOINT --help", "", sample.SampleOptions),
        ("sample CHECKPOINT --help", "", SamplingConfig),
        ("evaluate CHECKPOINT --help", "", evaluate.EvaluateOptions),
        ("evaluate CHECKPOINT --help", "", SamplingConfig),
        ("convert --help", "", convert.ConvertOptions),
        ("demo --help", "", demo.DemoOptions),
        ("bench --help", "", bench.BenchOptions),
        ("compare --help", "", compare.CompareOptions),
    ],
)
def test_every_field_is_a_flag_with_its_comment(cgm, trained, line, prefix, options):
    code, out, _ = cgm(line.replace("CHECKPOINT", str(trained["colorize"])))
    text = " ".join(out.replace("│", " ").split())
    helps = comments(options)
    nested = {"model", "training", "solver"}
    assert helps.keys() == options.__dataclass_fields__.keys() - nested and code == 0
    for name, comment in helps.items():
        flag = f"--{prefix}{name.replace('_', '-')}"
        if name in DATA_FIELDS:
            assert flag not in text
        elif options is convert.ConvertOptions and name in ("file", "out"):
            assert f" {name.upper()} {comment} (required)" in " ".join(text.split())
        else:
            told = rf"{re.escape(flag)}[ ,](.*? )?{re.escape(comment)} \(default"
            assert re.search(told, text), name


def test_help_names_the_choices(cgm):
    _, out, _ = cgm("train diffusion --help")
    for name in (*TASKS, *LAYOUTS, *DIRECTIONS):
        assert name in out


def test_data_fields_are_no_flags(cgm, tmp_path):
    line = f"train diffusion --task complete --model.num-classes 3 --out {tmp_path / 'x'}"
    code, _, err = cgm(line)
    assert code == 2 and "--model.num-classes" in err and not (tmp_path / "x").exists()


# Evaluate -----------------------------------------------------------------------------------------
def test_evaluate_prints_what_is_measured(cgm, trained):
    code, out, err = cgm(
        f"evaluate {trained['class_to_image']} --rows 20 --steps 1 --measures task"
    )
    assert code == 0 and err == ""
    assert "class_to_image on images of class_to_image that it never saw" in " ".join(out.split())
    assert re.search(r"share of samples in the asked class\s*│\s*0\.\d+ │\s*│\s*20 │", out)
    assert "held out:" not in out


def test_evaluate_compares_samples_with_real_images(cgm, trained, tmp_path):
    """All that fits lower halves, of one drawing: as a table, as figures and as an image."""
    line = f"evaluate {trained['complete']} --rows 20 --samples 20 --steps 1 --seed 3"
    code, out, err = cgm(line, "--out", tmp_path)
    assert code == 0 and err == ""
    words = " ".join(out.split())
    assert "Features of pixels, fingerprint pixels: only figures of Inception can" in words
    assert re.search(r"FD-pixels\s*│\s*[\d.]+ │\s*20 │\s*9000 │\s*[\d.]+ │\s*20 │", out)
    assert "memorization z, pixels" in out and "IS-" not in out
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["features"] == {"name": "pixels", "fingerprint": "pixels"}
    assert (found["task"], found["samples"], found["seed"], found["steps"]) == (
        "complete",
        20,
        3,
        1,
    )
    measures = {m["name"]: m for m in found["measures"]}
    assert len(measures) == len(found["measures"])
    assert measures["FD-pixels"]["reference"] == 9000 and measures["FD-pixels"]["floor_rows"] == 20
    assert measures["mean absolute error, of another's"]["error"] > 0
    assert measures["memorization z, pixels, below 1 % quantile"]["floor"] == 0.01
    assert Image.open(tmp_path / "nearest.png").height > 8 * 28
    samples = load_model(trained["complete"]).sample(
        cond=load_task("complete", "test").batch(torch.arange(20))["cond"], seed=3, steps=1
    )
    real = load_task("complete", "test").batch(torch.arange(20))["y"]
    error = (samples - real).abs().mean().item()
    assert measures["mean absolute error"]["value"] == pytest.approx(error, rel=1e-5)


def test_evaluate_one_measure(cgm, trained, tmp_path):
    line = f"evaluate {trained['class_to_image']} --measures fd --samples 20 --steps 1"
    code, out, err = cgm(line, "--features", "pixels", "--out", tmp_path)
    assert code == 0 and err == "" and "share of samples in the asked class" not in out
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert [m["name"] for m in found["measures"]] == ["FD-pixels"]
    assert [file.name for file in tmp_path.iterdir()] == ["evaluation.json"]


def test_an_autoregressive_model_from_training_to_bits(cgm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = "--model.depth 1 --model.width 8 --model.heads 1 --model.hidden 8 --model.levels 2"
    batch = "--training.steps 2 --training.batch-size 2"
    code, out, err = cgm(f"train autoregressive --task complete {sizes} {batch}")
    assert code == 0 and "step 2/2" in out and err == ""
    code, out, err = cgm("sample runs/autoregressive-complete --rows 3 --n 2 --top-k 1 --int8")
    assert code == 0 and "2 draws for each of 1" in out and err == ""
    assert Image.open("samples.png").height > 28
    code, out, err = cgm("evaluate runs/autoregressive-complete --rows 3 --measures task")
    assert code == 0 and err == "" and "bits per dimension, held out" in out
    assert "of 8 bits, what is lost" in out


def test_an_autoencoder_is_trained_and_draws_nothing(cgm, tmp_path):
    sizes = "--model.width 4 --model.depth 1 --model.latents 2"
    batch = "--training.steps 2 --training.batch-size 2"
    line = f"train autoencoder --task class_to_image {sizes} {batch} --out {tmp_path}/run"
    code, out, err = cgm(line)
    assert code == 0 and err == "" and "draw" not in out
    assert "sampling" not in json.loads((tmp_path / "run" / "config.json").read_text())
    code, _, err = cgm(f"sample {tmp_path}/run --out {tmp_path}/a.png")
    assert code == 2 and "a model of the family autoencoder, which draws nothing" in err


# Train and sample ---------------------------------------------------------------------------------
def test_the_command_that_train_prints_draws(cgm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cgm("train diffusion --task class_to_image --training.steps 2", *TINY)
    assert code == 0 and "step 2/2" in out and err == ""
    assert "runs/diffusion-class_to_image" in out
    model = load_model("runs/diffusion-class_to_image")
    assert model.config.cond_kind == "class" and model.config.num_classes == 10
    assert model.config.width == 8
    command = out.splitlines()[-1].split()
    assert command[:2] == ["cgm", "sample"]
    code, out, err = cgm(shlex.join(command[1:]) + " --steps 2 --n 2")
    assert code == 0 and "samples.png" in out and err == ""
    assert Image.open("samples.png").format == "PNG"


def test_a_preset_is_the_default_of_the_flags(cgm, trained, tmp_path):
    """Of a task it is what the family has in the contest; what is asked for goes before it."""
    folder, array = trained["class_to_image"], tmp_path / "a.safetensors"
    preset = {"sampler": "dpmpp_2m", "steps": 12, "guidance": 2.0}
    assert json.loads((folder / "config.json").read_text())["sampling"] == preset
    _, out, _ = cgm(f"sample {folder} --help")
    text = " ".join(out.replace("│", " ").split())
    for default in (
        "Solver. (default: dpmpp_2m)",
        "network. (default: 12)",
        "work. (default: 2.0)",
    ):
        assert default in text
    line = f"sample {folder} --classes 2 --n 1 --steps 3 --out {tmp_path / 'a.png'}"
    assert cgm(line, "--save-array", array)[0] == 0
    tensors, info = read_tensors(array)
    assert {name: info[name] for name in preset} == preset | {"steps": 3}
    expected = load_model(folder).sample(
        1, cond=tensors["cond"], sampler="dpmpp_2m", steps=3, guidance=2.0
    )
    assert torch.equal(tensors["samples"], expected)


def test_no_guidance_without_dropout_of_the_condition(cgm, tmp_path):
    line = f"train diffusion --task class_to_image --training.steps 1 --out {tmp_path / 'run'}"
    assert cgm(line, "--model.cond-dropout", 0, *TINY)[0] == 0
    info = json.loads((tmp_path / "run" / "config.json").read_text())
    assert info["sampling"] == {"sampler": "dpmpp_2m", "steps": 12}


def test_a_preset_that_does_not_fit(cgm, trained, tmp_path):
    shutil.copytree(trained["class_to_image"], tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    file.write_text(file.read_text().replace('"dpmpp_2m"', '"heun"'))
    code, _, err = cgm(f"sample {tmp_path / 'run'} --out {tmp_path / 'a.png'}")
    assert code == 2 and f"{file}: sampling.sampler must be one of ddpm" in err


def test_samples_are_the_model_s(cgm, trained, tmp_path, monkeypatch):
    """--index, --seed, --classes and the solver's flags reach the model, in any batches."""
    monkeypatch.setattr(sample, "_ROWS_AT_ONCE", 4)
    out, array = tmp_path / "a.png", tmp_path / "a.safetensors"
    flags = "--classes dress 9 --n 5 --seed 3 --index 7 --sampler ddpm --steps 3 --guidance 1.5"
    code, printed, err = cgm(
        f"sample {trained['class_to_image']} {flags}", "--out", out, "--save-array", array
    )
    assert code == 0 and err == "" and "5 draws for each of 2" in printed
    tensors, info = read_tensors(array)
    cond = torch.tensor([3, 9])
    assert torch.equal(tensors["cond"], cond)
    assert info["seed"] == 3 and info["sampler"] == "ddpm" and info["guidance"] == 1.5
    expected = load_model(trained["class_to_image"]).sample(
        5, cond=cond, seed=3, index=torch.tensor([7, 8]), sampler="ddpm", steps=3, guidance=1.5
    )
    # Round-off: the network saw other batches.
    torch.testing.assert_close(tensors["samples"], expected, rtol=0, atol=1e-3)
    assert Image.open(out).width > 5 * 28


@pytest.mark.parametrize("task, width", [("complete", 28), ("colorize", 28)])
def test_images_as_conditions_are_held_out_ones(cgm, trained, tmp_path, task, width):
    array = tmp_path / "a.safetensors"
    code, _, err = cgm(
        f"sample {trained[task]} --rows 4 9 --n 2 --steps 2",
        *("--out", tmp_path / "a.png", "--save-array", array),
    )
    assert code == 0 and err == ""
    tensors, _ = read_tensors(array)
    batch = load_task(task, "test").batch(torch.tensor([4, 9]))
    assert torch.equal(tensors["cond"], batch["cond"])
    assert tensors["samples"].shape == (2, *batch["y"].shape)
    shown = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    colored = (shown.max(2) - shown.min(2)).max() > 50
    assert colored == (task == "colorize")


def test_no_condition(cgm, tmp_path):
    model = make_model(ConditionalDiffusion, DiffusionConfig((1, 8, 8), width=8, heads=2))
    save_model(tmp_path / "model", model)
    array = tmp_path / "a.safetensors"
    line = f"sample {tmp_path / 'model'} --n 11 --steps 2 --index 3"
    code, _, _ = cgm(line, "--out", tmp_path / "a.png", "--save-array", array)
    index = 3 + torch.arange(11) * 2**32
    expected = model.eval().sample(11, index=index, steps=2)
    assert code == 0 and torch.equal(read_tensors(array)[0]["samples"][:, 0], expected)


def test_pairs_of_the_user(cgm, tmp_path):
    for i in range(5):
        image(tmp_path / "complete" / f"{i}.png", 32, 16)  # the name of a task is no task
    out = tmp_path / "run"
    code, printed, _ = cgm(
        f"train diffusion --data {tmp_path / 'complete'} --size 16 --direction BtoA --out {out} "
        "--training.steps 1",
        *TINY,
    )
    assert code == 0 and "--cond IMAGE" in printed
    line = f"sample {out} --n 2 --steps 2 --out {tmp_path / 'a.png'}"
    code, _, err = cgm(line)
    assert code == 2 and err.count("\n") == 1 and "--cond must be given" in err
    right = image(tmp_path / "conditions" / "right.png", 16)
    code, _, _ = cgm(line, "--cond", right)
    assert code == 0 and (tmp_path / "a.png").exists()
    other = image(tmp_path / "conditions" / "other.png", 32, 20)
    line = f"sample {out} --n 2 --steps 2 --out {tmp_path / 'made' / 'images'}"
    code, printed, err = cgm(
        line, "--cond", other.parent, "--save-array", tmp_path / "a.safetensors"
    )
    assert code == 0 and f"resized to 16 x 16 pixels, as in training: {other} from 32 x 20" in err
    tensors, _ = read_tensors(tmp_path / "a.safetensors")
    as_in_training = load_folder(_unpaired(tmp_path, other), "unpaired", size=16).batch(
        torch.zeros(1).long()
    )
    assert torch.equal(tensors["cond"][0], as_in_training["y"][0])
    # A file for each, of the draws side by side, pixel by pixel.
    files = sorted((tmp_path / "made" / "images").iterdir())
    assert [file.name for file in files] == ["other.png", "right.png"]
    for row, file in enumerate(files):
        levels = ((tensors["samples"][:, row] + 1) * 127.5).round().clamp(0, 255).byte()
        shown = torch.from_numpy(np.asarray(Image.open(file)).copy()).movedim(2, 0)
        assert torch.equal(shown, torch.cat(list(levels), 2))
    code, printed, _ = cgm(line, "--cond", other.parent)
    assert "(in place of other.png, right.png from before)" in printed


def test_classes_of_the_user(cgm, tmp_path):
    for name in ("cats", "1"):
        image(tmp_path / "pets" / name / "a.png", 8)
    line = f"train diffusion --data {tmp_path / 'pets'} --layout classes --size 8 --channels 1"
    code, _, _ = cgm(line, "--out", tmp_path / "run", "--training.steps", 1, *TINY)
    assert code == 0
    array = tmp_path / "a.safetensors"
    line = f"sample {tmp_path / 'run'} --steps 2 --n 1 --save-array {array}"
    for asked, ids in ((["cats"], [1]), (["1"], [0]), (["0"], [0])):
        assert cgm(line, "--out", tmp_path / "a.png", "--classes", *asked)[0] == 0
        assert read_tensors(array)[0]["cond"].tolist() == ids


def test_resume(cgm, tmp_path):
    line = f"train diffusion --task colorize --out {tmp_path / 'run'} --training.decay constant"
    assert cgm(line, "--training.steps", 2, *TINY)[0] == 0
    code, out, _ = cgm(line, "--training.steps", 4, "--resume", *TINY)
    assert code == 0 and "step 3/4" in out and "step 2/4" not in out
    straight = line.replace(str(tmp_path / "run"), str(tmp_path / "straight"))
    assert cgm(straight, "--training.steps", 4, *TINY)[0] == 0
    weights = [
        read_tensors(tmp_path / name / "model.safetensors")[0] for name in ("run", "straight")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_continues(cgm, tmp_path):
    line = f"train diffusion --task complete --out {tmp_path / 'run'} --training.steps 100000"
    script = "import sys; from cgm.cli import main; sys.exit(main())"
    log = tmp_path / "run" / "log.csv"
    with subprocess.Popen(
        [sys.executable, "-c", script, *line.split(), *TINY], stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not (log.exists() and len(log.read_text()) > 100):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("\n") == 1 and "--resume continues there" in err
    step = int(re.search(r"after step (\d+) of 100000", err).group(1))
    _, info = read_tensors(tmp_path / "run" / "training.safetensors")
    assert info["step"] == step
    code, out, _ = cgm(line.replace("100000", str(step + 1)), "--resume", *TINY)
    assert code == 0 and f"step {step + 1}/{step + 1}" in out and f"step {step}/" not in out


def test_ctrl_c_elsewhere(cgm, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_load_data", interrupt)
    assert cgm("train diffusion --task complete") == (130, "", "cgm: interrupted\n")


# Images from images -------------------------------------------------------------------------------
ADVERSARIAL = shlex.split(
    "--model.generator unet --model.depth 2 --model.width 4 --model.discriminator-width 4 "
    "--model.patch 16 --training.steps 3 --training.log-every 1 --training.threads 1 --device cpu"
)


def test_pix2pix_on_crops_with_sheets(cgm, tmp_path):
    for i in range(3):
        image(tmp_path / "facades" / f"{i}.png", 40, 20)
    out = tmp_path / "run"
    line = (
        f"train pix2pix --data {tmp_path / 'facades'} --size 20 --crop 16 --flip --out {out} "
        "--model.no-dropout --training.sheet-every 2"
    )
    code, printed, err = cgm(line, *ADVERSARIAL)
    assert code == 0 and err == "" and f"is in {out / 'index.html'}." in printed
    info = json.loads((out / "config.json").read_text())
    assert info["data"]["augmentation"] == {"size": [20, 20], "crop": 16, "flip": True}
    assert info["config"]["event_shape"] == info["config"]["cond_shape"] == [3, 16, 16]
    assert info["training"]["learning_rate"] == 2e-4 and info["training"]["beta1"] == 0.5
    names = sorted(file.name for file in (out / "samples").iterdir())
    assert names == ["step_000002.png", "step_000003.png"]
    assert 'src="samples/step_000003.png"' in (out / "index.html").read_text()
    code, _, err = cgm(line.replace("--crop 16", "--crop 12"), "--resume", *ADVERSARIAL)
    assert code == 2 and "data.augmentation.crop was 16 and is now 12" in err
    code, _, err = cgm(line.replace("--flip", ""), "--resume", *ADVERSARIAL)
    assert code == 2 and "data.augmentation.flip was True and is now False" in err
    line = line.replace("sheet-every 2", "sheet-every 0")
    assert cgm(line, "--resume", *ADVERSARIAL)[0] == 0
    cond = image(tmp_path / "cond.png", 16)
    code, _, err = cgm(f"sample {out} --n 1 --out {tmp_path / 'a.png'}", "--cond", cond)
    assert code == 0 and err == ""


def test_cyclegan_learns_from_unrelated_folders(cgm, tmp_path):
    for i in range(3):
        image(tmp_path / "h2z" / "trainA" / f"{i}.png", 16)
        image(tmp_path / "h2z" / "trainB" / f"b{i}.png", 16)
    folder, out = tmp_path / "h2z" / "train", tmp_path / "run"
    line = f"--data {folder} --layout unpaired --size 16 --crop 8 --out {out}"
    code, _, err = cgm(f"train pix2pix {line}", *ADVERSARIAL)
    assert code == 2 and "pix2pix learns from pairs, got unpaired" in err
    code, _, err = cgm(f"train cyclegan {line} --training.sheet-every 3", *ADVERSARIAL)
    assert code == 0 and err == ""
    cond = image(tmp_path / "cond.png", 8)
    line = f"sample {out} --n 1 --way back --out {tmp_path / 'a.png'}"
    assert cgm(line, "--cond", cond)[0] == 0
    assert (tmp_path / "a.png").exists()


def test_sheets_of_a_task_show_what_was_kept_from_training(cgm, tmp_path):
    out = tmp_path / "run"
    line = (
        f"train diffusion --task complete --training.steps 1 --training.sheet-every 1 --out {out}"
    )
    assert cgm(line, *TINY)[0] == 0
    batch = load_task("complete", "test").batch(torch.arange(6))
    samples = load_model(out).sample(3, cond=batch["cond"])
    labels = [f"row {i}" for i in range(6)]
    file = tmp_path / "a.png"
    sample_grid(file, samples, cond=batch["cond"], real=batch["y"], labels=labels, stacked=True)
    levels = [
        np.asarray(Image.open(f)).astype(int) for f in (file, out / "samples" / "step_000001.png")
    ]
    assert np.abs(levels[0] - levels[1]).max() <= 1


# Points -------------------------------------------------------------------------------------------
def test_points_are_learned_and_shown_as_a_map(cgm, tmp_path):
    out, file = tmp_path / "run", tmp_path / "points.png"
    flags = ["--model.patch", "1", "--training.steps", "2", "--training.sheet-every", "2"]
    line = f"train diffusion --task two_moons --out {out}"
    assert cgm(line, *TINY, *flags)[0] == 0
    assert cgm(f"sample {out} --n 40 --steps 2 --out {file}")[0] == 0
    with Image.open(file) as image, Image.open(out / "samples" / "step_000002.png") as sheet:
        assert image.height > 2 * 64 and sheet.height > 6 * 64


def test_a_point_map_has_the_points_where_they_are():
    points = torch.tensor([[0.0, 0.0], [1.2, 1.2], [1.2, 1.2], [-1.24, -1.24], [9.0, 0.0]])
    shown = point_map(points[:, None, :, None, None])
    assert shown.shape == (1, 1, 64, 64) and (shown < 1).sum() == 3
    assert shown[0, 0, 1, 62] < shown[0, 0, 31, 32] < 1  # upwards; two points are darker
    assert shown[0, 0, 63, 0] < 1
    assert (point_map(torch.full((0, 2, 2, 1, 1), 0.0)) == 1).all()


# Errors -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "line, words",
    [
        (
            "paint",
            "one of train, sample, evaluate, convert, demo, compare, bench, info, got 'paint'",
        ),
        ("train classifier", "got 'classifier'"),
        ("train classifier", "got 'classifier'"),
        ("train diffusion --out {new}", "one of --task and --data"),
        ("train diffusion --task complete --data {tmp} --out {new}", "one of --task and --data"),
        ("train diffusion --task paint --out {new}", "one of class_to_image, complete, colorize"),
        ("train diffusion --task complete --size 32 --out {new}", "--size belongs to --data"),
        ("train diffusion --task complete --crop 8 --out {new}", "--crop belongs to --data"),
        ("train diffusion --task complete --flip --out {new}", "--flip belongs to --data"),
        ("train diffusion --data {tmp} --size 8 --crop 9 --out {new}", "--crop must be from 0"),
        (
            "train diffusion --task complete --training.sheet-every -1 --out {new}",
            "--training.sheet-every must not be negative",
        ),
        ("convert {tmp}/corrupt/b.png {new}", "b.png: is damaged, or holds more than tensors"),
        ("convert {tmp}/none_net_G.pth {new}", "none_net_G.pth: cannot be read"),
        ("train diffusion --data {tmp}/nothing --out {new}", "{tmp}/nothing: no such folder"),
        ("train diffusion --data {tmp}/corrupt --out {new}", "b.png: cannot be read as an image"),
        (
            "train diffusion --data {tmp}/corrupt --layout rows --out {new}",
            "--layout must be one of",
        ),
        ("train diffusion --task complete --out {tmp}", "--out must be an empty folder"),
        ("train diffusion --task complete --out {tmp}/corrupt/b.png", "--out must be an empty"),
        ("train diffusion --task complete --out {new} --resume", "--out must hold a run to resume"),
        ("train --task complete diffusion", "FAMILY must come before the options"),
        ("train diffuzion", "did you mean diffusion?"),
        ("trayn diffusion", "did you mean train?"),
        ("train diffusion --task colorise --out {new}", "did you mean colorize?"),
        ("train diffusion --task complete --out {new} --init {tmp}/none", "--init must be a fold"),
        ("train vae --task complete --out {new} --init {run}", "--init must be a model of the f"),
        ("train diffusion --task complete --out {new} --device tpu", "--device must be cpu, cuda"),
        ("train diffusion --task complete --out {new} --model.patch 3", "--model.patch must div"),
        (
            "train diffusion --task complete --out {new} --training.steps 0",
            "--training.steps must be positive",
        ),
        ("train diffusion --task complete --out {new} --model.schedule sine", "'sine'"),
        ("sample {tmp}/nothing --out {png}", "CHECKPOINT must be a folder"),
        ("sample {tmp} --out {png}", "config.json: cannot be read"),
        ("sample {tmp}/truncated --out {png}", "model.safetensors: is truncated"),
        (
            "sample {tmp}/classifier --out {png}",
            "a model of the family classifier, which draws nothing",
        ),
        ("sample {run} --out {png} --n -3", "--n must be at least 1 and less than 2^31, got -3"),
        ("sample {run} --out {png} --n 2147483648", "--n must be at least 1 and less than 2^31"),
        ("sample ''", "CHECKPOINT must be a folder"),
        (
            "train vae --task complete --out {new} --training.threads 99999999",
            "--training.threads must be from 0 to 1024",
        ),
        ("sample {run} --out {png} --sampler heun", "--sampler must be one of ddpm, ddim, eul"),
        ("sample {run} --out {png} --sampler dimm", "got 'dimm'; did you mean ddim?"),
        ("sample {run} --out {png} --steps 0", "--steps must be positive"),
        ("sample {run} --out {png} --guidance nan", "--guidance must be finite"),
        ("sample {run} --out {png} --eta 0.5 --sampler ddpm", "--eta"),
        ("sample {run} --out {png} --classes hat", "--classes must be numbers below 10 or of T-sh"),
        ("sample {run} --out {png} --classes 10", "got '10'"),
        ("sample {run} --out {png} --rows 1", "--rows does not fit this model"),
        ("sample {run} --out {png} --index -1", "--index must be in"),
        ("sample {run} --out {png} --device cuda:99", "--device must be one that is here"),
        ("sample {run} --out {tmp}/corrupt/b.png/a.png", "--out must be in a folder to write"),
        ("sample {run} --out {png} --save-array {tmp}/corrupt/b.png/a.safetensors", "--save-arra"),
        ("sample --n 1 {run}", "CHECKPOINT must come before the options, which depend on it"),
        ("sample class_to_image_diffuzion", "; did you mean class_to_image_diffusion?"),
        ("sample {run} --out {png} --classes sneeker", "did you mean sneaker?"),
        ("sample {run} --out {tmp}/a.jpg", "--out must be a file .png"),
        ("sample {run} --out {png} --save-array {tmp}/a.npz", "--save-array must be a file .safet"),
        ("sample {complete} --out {png} --rows 1000", "--rows must be in [0, 999], got (1000,)"),
        ("sample {complete} --out {png} --rows 1 --cond {tmp}", "one of --rows and --cond"),
        ("sample {complete} --out {png} --cond {tmp}/corrupt/b.png", "b.png: cannot be read"),
        ("evaluate {tmp}/classifier", "a model of the family classifier, which draws nothing"),
        ("evaluate {run} --rows 1", "--rows must be from 2 to 1000, got 1"),
        ("evaluate {run} --rows 9 --steps 0", "--steps must be positive"),
        ("evaluate {run} --samples 3", "--samples must be at least 20, got 3"),
        ("evaluate {run} --measures fid", "--measures must be one of task, inception_score, fd,"),
        ("evaluate {run} --measures kdi", "got 'kdi'; did you mean kid?"),
        ("evaluate {run} --features faces", "--features must be one of classifier, pixels, incep"),
        (
            "evaluate {complete} --features classifier",
            "--features must be pixels for y (1, 14, 28)",
        ),
        ("evaluate {complete} --measures inception_score", "which pixels have not"),
        ("evaluate {run} --out {tmp}/corrupt/b.png", "--out must be a folder to write to, got "),
        ("evaluate {pairs}", "was not trained on a shipped task, so nothing is held out"),
        ("train autoregressive --task complete --out {new} --model.heads 5", "--model.heads must"),
        (
            "train autoencoder --task complete --out {new} --training.sheet-every 5",
            "--training.sheet-every must be 0: autoencoder draws nothing",
        ),
        ("demo --out {tmp}/corrupt/b.png", "--out must be a folder to write to, got {tmp}/corr"),
        ("bench --out {tmp}/corrupt/b.png/x", "--out must be a folder to write to, got {tmp}/corr"),
        ("compare --out {tmp}/corrupt/b.png", "--out must be a folder to write to, got {tmp}/corr"),
        ("bench --ways slow --out {new}", "--ways must be one of fused, plain, compiled, got 's"),
        ("bench --rows 0 --out {new}", "--rows must be at least 1, got 0"),
        ("bench --models vae --out {new}", "--models must be one of bouncing_ball_vae"),
        ("compare --families vaee --out {new}", "got 'vaee'; did you mean vae?"),
        ("compare --task colourize --out {new}", "got 'colourize'; did you mean colorize?"),
        ("compare --seconds -1 --out {new}", "--seconds must be positive, got -1.0"),
        ("convert out {new}", "out: cannot be read"),  # a file of that name, not the flag
        ("bench --device cuda:99", "--device must be one that is here"),
    ],
)
def test_user_errors(cgm, tmp_path, trained, line, words, monkeypatch):
    """One line that names the problem, no traceback, and nothing written."""
    image(tmp_path / "corrupt" / "a.png", 32, 16)
    (tmp_path / "corrupt" / "b.png").write_bytes(b"\x89PNG and no more")
    save_model(tmp_path / "classifier", make_model(Classifier, ClassifierConfig()))
    shutil.copytree(trained["class_to_image"], tmp_path / "pairs")
    info = json.loads((tmp_path / "pairs" / "config.json").read_text())
    info["data"]["name"] = "pairs"
    (tmp_path / "pairs" / "config.json").write_text(json.dumps(info))
    (tmp_path / "truncated").mkdir()
    for file in ("config.json", "model.safetensors"):
        whole = (trained["class_to_image"] / file).read_bytes()
        cut = len(whole) - 100 * (file == "model.safetensors")
        (tmp_path / "truncated" / file).write_bytes(whole[:cut])
    names = {
        "tmp": tmp_path,
        "new": tmp_path / "new",
        "png": tmp_path / "a.png",
        "run": trained["class_to_image"],
        "pairs": tmp_path / "pairs",
        "complete": trained["complete"],
    }
    before = everything_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = cgm(line.format(**names))
    assert code == 2 and out == "" and everything_in(tmp_path) == before
    assert words.format(**names) in err
    if not err.startswith("cgm: "):  # tyro's own words, in a box
        assert "For full helptext" in err and "Traceback" not in err
    else:
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError((3, 9)),
        RuntimeError("alloc_cpu.cpp: DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_is_one_line(cgm, monkeypatch, error):
    def load(options):
        raise error

    monkeypatch.setattr(train, "_load_data", load)
    code, _, err = cgm("train diffusion --task complete")
    assert (
        code == 2
        and err.startswith("cgm: out of memory; fewer or smaller")
        and "\n" not in err[:-1]
    )


def test_errors_of_ours_keep_their_traceback(cgm, monkeypatch):
    monkeypatch.setattr(train, "_load_data", lambda options: options.nothing)
    with pytest.raises(AttributeError):
        cgm("train diffusion --task complete")


# Info ---------------------------------------------------------------------------------------------
def test_info(cgm):
    code, out, err = cgm("info")
    assert code == 0 and err == ""
    for word in (torch.__version__, cgkernels.__version__, "triton", "GPU", *OPS):
        assert word in out
    fused = "Triton kernel" if torch.cuda.is_available() else "no GPU"
    assert out.count("plain PyTorch") == out.count(fused) == len(OPS)


def test_tables_are_whole_however_narrow_the_terminal(cgm, trained, monkeypatch):
    line = f"evaluate {trained['class_to_image']} --rows 2 --samples 20 --steps 1 --measures kid"
    wide = cgm(line)
    monkeypatch.setenv("COLUMNS", "20")
    assert "KID-classifier " in wide[1] and cgm(line)[:2] == wide[:2]


# Images -------------------------------------------------------------------------------------------
def test_grid_pixels_are_squares_of_the_levels(tmp_path):
    levels = torch.randint(0, 256, (3, 2, 3, 5, 7), generator=torch.Generator().manual_seed(0))
    file = tmp_path / "grid.png"
    groups = [("seven", levels.float() / 127.5 - 1), ("one", torch.full((1, 2, 1, 3, 2), 9.0))]
    image_grid(file, groups, row_labels=("a $b$", "long label"), title="Title")
    shown = np.asarray(Image.open(file).convert("RGB"))
    scale = -(-64 // 7)
    for column in range(3):
        for row in range(2):
            want = levels[column, row].permute(1, 2, 0).numpy().astype(np.uint8)
            want = want.repeat(scale, 0).repeat(scale, 1)
            windows = np.lib.stride_tricks.sliding_window_view(shown[..., 0], want.shape[:2])
            places = np.argwhere(
                (windows[:, :, ::scale, ::scale] == want[::scale, ::scale, 0]).all((2, 3))
            )
            assert any(
                np.array_equal(shown[y : y + want.shape[0], x : x + want.shape[1]], want)
                for y, x in places
            )


def test_grid_refuses_what_does_not_fit(tmp_path):
    images = torch.zeros(2, 3, 1, 4, 4)
    for groups, labels in (
        ([("", images), ("", images[:, :2])], ()),
        ([("", images[:, :, :, 0])], ()),
        ([("", torch.zeros(2, 3, 2, 4, 4))], ()),
        ([("", images)], ("a",)),
        ([], ()),
    ):
        with pytest.raises(ValueError, match="must"):
            image_grid(tmp_path / "grid.png", groups, row_labels=labels)
    assert not list(tmp_path.iterdir())


def test_as_images():
    generator = torch.Generator().manual_seed(0)
    y, cond = (torch.rand(n, generator=generator) for n in ((4, 3, 2, 5, 5), (3, 1, 5, 5)))
    assert as_images(y, cond).shape == (4, 3, 3, 5, 5)
    torch.testing.assert_close(as_images(y, cond)[2], as_images(y[2], cond))
    lower = torch.rand(4, 3, 1, 2, 5, generator=generator)
    assert torch.equal(as_images(lower, cond, stacked=True)[1, 2, :, 5:], lower[1, 2])
    assert torch.equal(as_images(lower, cond, stacked=True)[1, 2, :, :5], cond[2])
    assert as_images(cond) is cond
