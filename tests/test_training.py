"""The training loop: against a plain one, and everything that can go wrong on the way."""

import csv
import dataclasses
import io
import itertools
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from torch import nn

from cgkernels.random import normal
from cgm import training
from cgm.checkpoints import load_model, read_tensors, save_model, write_tensors
from cgm.data import Dataset, epoch_order
from cgm.families.cyclegan import CycleGAN, CycleGANConfig
from cgm.families.diffusion import ConditionalDiffusion, DiffusionConfig
from cgm.families.gan import ConditionalGAN, GANConfig, Pix2Pix, Pix2PixConfig
from cgm.model import FAMILIES, Model, make_model
from cgm.training import (
    TrainingConfig,
    TrainingInterrupted,
    learning_rate,
    lock,
    loop,
    progress,
    train,
)
from cgm.training.progress import Log
from cgm.viz import sample_page
from cgm.viz.plots import sample_grid
from tests.support import killed_at

N = 7


@dataclass(frozen=True)
class Inner:
    gain: float = 1.0


@dataclass(frozen=True)
class ToyConfig:
    shape: tuple[int, ...] = (2, 3)
    classes: int = 3
    inner: Inner = field(default_factory=Inner)


class Toy(Model):
    """Two phases over two networks: the second one's loss depends on the parameters of both."""

    family: ClassVar[str] = "toy"
    phases: ClassVar[tuple[str, ...]] = ("first", "second")

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        size = math.prod(config.shape)
        self.embed = nn.Embedding(config.classes, size)
        self.mix = nn.Linear(size, size)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.seen: list[torch.Tensor] = []

    def phase_parameters(self, phase):
        return list((self.embed if phase == "first" else self.mix).parameters())

    def loss(self, y, *, cond=None, phase="model", seed, index=None, shared=None):
        if y.shape[1:] != self.config.shape:
            raise ValueError(f"y must be (B, *{self.config.shape}), got {tuple(y.shape)}")
        self.calls += 1
        self.seen.append(index)
        noise = normal(
            y.shape, seed=seed, index=index, step=0, stream=3, dtype=torch.float32, device=y.device
        )
        out = self.embed(cond) * self.config.inner.gain
        if phase == "second":
            out = self.mix(out)
        fit = (out - (y + noise).flatten(1)).square().mean(1)
        return {"total": fit, "fit": fit}


@pytest.fixture(autouse=True)
def _toy_family(monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy", "tests.test_training:Toy")


def toy_data(y=None):
    generator = torch.Generator().manual_seed(0)
    if y is None:
        y = torch.randn(N, 2, 3, generator=generator)
    return Dataset("toy", y, torch.arange(N) % 3, "class", 3, ("a", "b", "c"))


CONFIG = TrainingConfig(
    steps=10, batch_size=3, warmup=3, weight_decay=0.1, save_every=4, log_every=2, seed=5
)


def toy(config=CONFIG):
    return make_model(Toy, ToyConfig(), seed=config.seed)


def run(out, config=CONFIG, dataset=None, model=None, **options):
    options.setdefault("console", Console(file=io.StringIO()))
    return train(model or toy(config), dataset or toy_data(), config, out, **options)


def state(out):
    return read_tensors(Path(out) / training.STATE_FILE)


def log_rows(out):
    with (Path(out) / training.LOG_FILE).open(newline="") as file:
        return list(csv.DictReader(file))


def at(number, action):
    """on_step that acts once, at this step."""
    return lambda step, average: action() if step == number else None


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def assert_same_run(a, b):
    (tensors, info), (tensors_b, info_b) = state(a), state(b)
    assert info == info_b and tensors.keys() == tensors_b.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, tensors_b[name]), name
    for file in ("model.safetensors", "config.json"):
        assert (a / file).read_bytes() == (b / file).read_bytes()


# The loop -----------------------------------------------------------------------------------------
def test_equals_a_plain_loop(tmp_path):
    model = toy()
    average = run(tmp_path / "run", model=model)

    plain, data = toy(), toy_data()
    ema = {name: p.detach().clone() for name, p in plain.named_parameters()}
    optimizers = {
        phase: torch.optim.AdamW(
            [
                {"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0}
                for p in plain.phase_parameters(phase)
            ]
        )
        for phase in Toy.phases
    }
    for step in range(CONFIG.steps):
        places = [divmod(p, N) for p in range(3 * step, 3 * step + 3)]
        rows = torch.stack([epoch_order(N, 5, epoch)[place] for epoch, place in places])
        index = rows + torch.tensor([epoch for epoch, _ in places]) * 2**32
        for phase, optimizer in optimizers.items():
            plain.zero_grad()
            loss = plain.loss(data.y[rows], cond=data.cond[rows], phase=phase, seed=5, index=index)
            loss["total"].mean().backward()
            nn.utils.clip_grad_norm_(plain.phase_parameters(phase), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(CONFIG, step)
            optimizer.step()
        decay = min(CONFIG.ema_decay, (2 + step) / (11 + step))
        for name, p in plain.named_parameters():
            ema[name] += (1 - decay) * (p.detach() - ema[name])
    assert int(model.calls) == int(average.calls) == 2 * CONFIG.steps
    for name, p in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p)
        torch.testing.assert_close(average.get_parameter(name), ema[name])


@pytest.mark.parametrize("batch_size", [1, 3, 7, 16])
def test_each_epoch_has_each_row_once(tmp_path, batch_size):
    config = dataclasses.replace(CONFIG, batch_size=batch_size, steps=14)
    model = toy(config)
    run(tmp_path / "run", config, model=model)
    index = torch.cat(model.seen[::2])
    assert len(index) == 14 * batch_size
    for epoch in range(len(index) // N):
        part = index[epoch * N : (epoch + 1) * N]
        assert sorted((part - epoch * 2**32).tolist()) == list(range(N))


def test_global_generator_is_neither_used_nor_changed(tmp_path):
    for number in (1, 2):
        torch.manual_seed(number)
        before = torch.random.get_rng_state()
        run(tmp_path / str(number))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert_same_run(tmp_path / "1", tmp_path / "2")


def test_settings_of_torch_are_restored(tmp_path):
    before = torch.get_num_threads(), torch.backends.cudnn.deterministic
    during = []
    config = dataclasses.replace(CONFIG, threads=before[0] + 1)
    run(tmp_path / "run", config, on_step=lambda *_: during.append(torch.get_num_threads()))
    assert set(during) == {before[0] + 1}
    assert (torch.get_num_threads(), torch.backends.cudnn.deterministic) == before


def test_learning_rate():
    config = TrainingConfig(steps=110, warmup=10, learning_rate=2.0, decay="cosine")
    assert [learning_rate(config, s) for s in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert [learning_rate(config, s) for s in (60, 110)] == pytest.approx([1.0, 0.0])
    linear = dataclasses.replace(config, decay="linear")
    assert learning_rate(linear, 35) == pytest.approx(1.5)
    constant = dataclasses.replace(config, decay="constant")
    assert learning_rate(constant, 109) == 2.0
    no_warmup = TrainingConfig(steps=1, warmup=0, learning_rate=2.0)
    assert learning_rate(no_warmup, 0) == 2.0
    assert learning_rate(TrainingConfig(steps=5, warmup=10), 4) == pytest.approx(5e-4)


def test_average_follows_and_is_what_is_saved(tmp_path):
    steps = []
    average = run(tmp_path / "run", on_step=lambda step, average: steps.append((step, average)))
    assert [step for step, _ in steps] == list(range(1, 11))
    assert all(a is average for _, a in steps)
    assert not average.training and not any(p.requires_grad for p in average.parameters())
    loaded = load_model(tmp_path / "run")
    for name, tensor in average.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_without_average(tmp_path):
    model = toy()
    average = run(tmp_path / "run", dataclasses.replace(CONFIG, ema_decay=0.0), model=model)
    for name, tensor in average.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


# Resuming -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resumes_bit_exactly(tmp_path, precision):
    config = dataclasses.replace(CONFIG, precision=precision)
    run(tmp_path / "whole", config)
    with pytest.raises(TrainingInterrupted, match=r"step 5 of 10.*--resume") as caught:
        run(tmp_path / "parts", config, on_step=at(5, press_ctrl_c))
    assert caught.value.step == 5 and caught.value.out == tmp_path / "parts"
    assert state(tmp_path / "parts")[1]["step"] == 5
    run(tmp_path / "parts", config, model=toy(CONFIG), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    whole = {row.pop("step"): row for row in log_rows(tmp_path / "whole")}
    parts = {row.pop("step"): row for row in log_rows(tmp_path / "parts")}
    assert list(parts) == ["2", "4", "5", "6", "8", "10"]
    for step in ("2", "4", "8", "10"):
        assert {**whole[step], "seconds": ""} == {**parts[step], "seconds": ""}
    seconds = [float(row["seconds"]) for row in parts.values()]
    assert seconds == sorted(seconds)


def test_resumes_from_the_last_checkpoint_after_a_crash(tmp_path):
    config = dataclasses.replace(CONFIG, log_every=1)

    def crash():
        raise RuntimeError("crash")

    run(tmp_path / "whole", config)
    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path / "parts", config, on_step=at(7, crash))
    assert [int(row["step"]) for row in log_rows(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]
    with (tmp_path / "parts" / training.LOG_FILE).open("a") as file:
        file.write("3,0.")  # a row cut off
    run(tmp_path / "parts", config, resume=True)
    assert [int(row["step"]) for row in log_rows(tmp_path / "parts")] == list(range(1, 11))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resumes_at_the_end_and_longer(tmp_path):
    config = dataclasses.replace(CONFIG, decay="constant", steps=4)
    run(tmp_path / "run", config)
    before = state(tmp_path / "run")
    run(tmp_path / "run", config, resume=True)
    assert state(tmp_path / "run")[1] == before[1]
    with pytest.raises(ValueError, match="steps must be at least 4, got 3"):
        run(tmp_path / "run", dataclasses.replace(config, steps=3), resume=True)
    run(tmp_path / "run", dataclasses.replace(config, steps=10), resume=True)
    run(tmp_path / "whole", dataclasses.replace(config, steps=10))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_refuses_to_resume_another_run(tmp_path):
    out = tmp_path / "run"
    run(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = make_model(Toy, ToyConfig(inner=Inner(2.0)))
    with pytest.raises(ValueError, match=r"model\.config\.inner\.gain was 1\.0 and is now 2\.0"):
        run(out, model=other, resume=True)
    y = toy_data().y
    y[0, 0, 0] += 1
    with pytest.raises(ValueError, match=r"training\.safetensors: .*data\.crc32 was"):
        run(out, dataset=toy_data(y), resume=True)
    changed = dataclasses.replace(CONFIG, batch_size=4, beta1=0.5)
    words = (
        r"training\.batch_size was 3.*training\.beta1 was 0\.9 and is now 0\.5; what may change on "
        r"a resume is training\.steps, training\.learning_rate, training\.warmup, training\.decay, "
    )
    with pytest.raises(ValueError, match=words):
        run(out, changed, resume=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_resumes_with_another_learning_rate(tmp_path):
    """Its next step is one of the fresh rate, with the optimizer's moments of the old one."""
    old = dataclasses.replace(CONFIG, steps=4, decay="constant", warmup=0)
    model = toy()
    run(tmp_path / "run", old, model=model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {
        name: (state(tmp_path / "run")[0][f"optimizer/second/{name}/exp_avg"],
               state(tmp_path / "run")[0][f"optimizer/second/{name}/exp_avg_sq"])
        for name in ("mix.weight", "mix.bias")
    }  # fmt: skip
    new = dataclasses.replace(old, steps=5, learning_rate=0.25, decay="linear", weight_decay=0.1)
    resumed = toy()
    run(tmp_path / "run", new, model=resumed, resume=True)
    after = state(tmp_path / "run")[0]
    rate = learning_rate(new, 4)
    assert rate == pytest.approx(0.25 * (1 - 4 / 5))
    for name, (mean, square) in moments.items():
        new_mean = after[f"optimizer/second/{name}/exp_avg"]
        gradient = (new_mean - 0.9 * mean) / 0.1
        new_square = 0.999 * square + 0.001 * gradient**2
        kept = before[name] * (1 - rate * (0.1 if name == "mix.weight" else 0.0))
        step = (new_mean / (1 - 0.9**5)) / ((new_square / (1 - 0.999**5)).sqrt() + 1e-8)
        torch.testing.assert_close(
            dict(resumed.named_parameters())[name], kept - rate * step, rtol=1e-3, atol=1e-4
        )


def test_refuses_a_damaged_state(tmp_path):
    out = tmp_path / "run"
    run(out)
    file = out / training.STATE_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"training\.safetensors: is truncated"):
        run(out, resume=True)


# Stopping -----------------------------------------------------------------------------------------
def test_second_ctrl_c_stops_at_once(tmp_path):
    def twice():
        press_ctrl_c()
        press_ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", on_step=at(6, twice))
    assert state(tmp_path / "run")[1]["step"] == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_saves_and_says_how_to_resume(tmp_path, number):
    before = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(TrainingInterrupted, match=r"step 5 of 10.*--resume") as caught:
        run(tmp_path / "run", on_step=at(5, lambda: signal.raise_signal(number)))
    assert caught.value.signal == number and state(tmp_path / "run")[1]["step"] == 5
    assert [signal.getsignal(n) for n in SIGNALS] == before
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.signal == number
    run(tmp_path / "whole")
    run(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number", SIGNALS[1:])
def test_a_second_signal_ends_at_once(tmp_path, number):
    def twice():
        signal.raise_signal(number)
        signal.raise_signal(number)

    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "run", on_step=at(6, twice))
    assert caught.value.code == 128 + number and state(tmp_path / "run")[1]["step"] == 4


def test_what_is_ignored_stays_ignored(tmp_path):
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(tmp_path / "run", on_step=at(5, lambda: signal.raise_signal(signal.SIGHUP)))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert state(tmp_path / "run")[1]["step"] == 10


class Closed(io.StringIO):
    """An output whose reader goes after so many writes."""

    def __init__(self, writes, error):
        super().__init__()
        self.left, self.error = writes, error

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "I/O error")])
@pytest.mark.parametrize("writes", [0, 2])
def test_a_closed_output_saves(tmp_path, monkeypatch, error, writes):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # rich would close that of pytest
    monkeypatch.setattr("os.dup2", lambda *a: None)
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
    config = dataclasses.replace(CONFIG, log_every=1, steps=20)
    with pytest.raises(TrainingInterrupted, match="--resume") as caught:
        run(tmp_path / "run", config, console=Console(file=Closed(writes, error)))
    assert caught.value.signal == 13
    step = state(tmp_path / "run")[1]["step"]
    assert step == caught.value.step < 20
    run(tmp_path / "run", config, resume=True)
    run(tmp_path / "whole", config)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_lines_while_a_step_lasts(tmp_path, monkeypatch):
    """And what is known of slow steps beforehand."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    monkeypatch.setattr(progress, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(loop, "_SLOW", 0.1)

    class Slow(Toy):
        def loss(self, y, **arguments):
            time.sleep(0.1)
            return super().loss(y, **arguments)

    file = io.StringIO()
    config = dataclasses.replace(CONFIG, steps=2, log_every=100, save_every=100)
    run(tmp_path / "run", config, model=Slow(ToyConfig()), console=Console(file=file, width=200))
    lines = file.getvalue().splitlines()
    assert re.fullmatch(r"a step may take 0:00:0\d, for 3 examples", lines[0])
    assert "step 1/2: 0 s so far" in lines and "step 2/2: 0 s so far" in lines
    losses = [line for line in lines if "loss" in line]
    assert losses[0].startswith("step 1/2  loss ") and re.search(r"0:00:\d\d left$", losses[0])


def test_ctrl_c_in_the_last_step_is_a_normal_end(tmp_path):
    run(tmp_path / "run", on_step=at(10, press_ctrl_c))
    assert state(tmp_path / "run")[1]["step"] == 10


def test_trains_in_another_thread(tmp_path):
    thread = threading.Thread(target=run, args=(tmp_path / "run",))
    thread.start()
    thread.join()
    assert state(tmp_path / "run")[1]["step"] == 10


def test_stops_before_a_loss_that_is_not_finite(tmp_path):
    data, bad_row = toy_data(), 3
    data.y[bad_row, 1, 2] = math.nan  # behind its back: a data set takes none
    places = epoch_order(N, CONFIG.seed, 0).tolist()
    bad_step = places.index(bad_row) // 3 + 1
    config = dataclasses.replace(CONFIG, save_every=1)
    model, weights = toy(config), []
    before = {name: t.clone() for name, t in model.state_dict().items()}
    weights.append(before)

    def keep(step, average):
        weights.append({name: t.clone() for name, t in model.state_dict().items()})

    with pytest.raises(FloatingPointError, match=f"phase first is not finite at step {bad_step};"):
        run(tmp_path / "run", config, data, model, on_step=keep)
    tensors, info = state(tmp_path / "run")
    assert info["step"] == bad_step - 1 and len(weights) == bad_step
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[bad_step - 1][name])
        assert torch.equal(parameter, tensors[f"weights/{name}"])
    load_model(tmp_path / "run")


def test_no_update_follows_one_that_is_not_finite(tmp_path):
    """On a GPU the host learns of it steps later."""
    wrong = toy_data()
    wrong.y[:] = math.nan
    for bad in range(1, 4):
        model = toy()
        run = loop._Run(model, toy_data(), CONFIG, torch.device("cpu"))
        for _ in range(bad):
            run.train_step(0.1)
        before = [p.clone() for p in model.parameters()]
        run.dataset = wrong
        run.train_step(0.1)
        run.dataset = toy_data()
        run.train_step(0.1)
        assert all(map(torch.equal, model.parameters(), before))
        with pytest.raises(FloatingPointError, match=f"phase first .* step {bad + 1};"):
            run.save(tmp_path)
        assert not any(tmp_path.iterdir())


def test_gradient_that_is_not_finite(tmp_path):
    class Root(Toy):
        phases = ("second",)

        def loss(self, y, **arguments):
            total = super().loss(y, **arguments)["total"]
            return {"total": total + (0 * self.mix.weight.sum()).sqrt()}

    with pytest.raises(FloatingPointError, match="phase second is not finite at step 1"):
        run(tmp_path / "run", model=Root(ToyConfig()))


# The folder ---------------------------------------------------------------------------------------
def test_refuses_a_folder_in_use(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out must be an empty folder, or resume given"):
        run(tmp_path)
    with pytest.raises(ValueError, match="out must be an empty folder"):
        run(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=r"there is no training\.safetensors"):
        run(tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    run(tmp_path / "empty")


def test_killed_anywhere_it_starts_or_resumes(tmp_path):
    config = dataclasses.replace(CONFIG, steps=2, save_every=1, log_every=1)
    run(tmp_path / "whole", config)
    for number in itertools.count():
        out = tmp_path / f"killed_{number}"
        if not killed_at(number, lambda out=out: run(out, config)):
            break
        # With other steps, and killed at the first save once more.
        started = (out / training.STATE_FILE).exists()
        other = dataclasses.replace(config, steps=3)
        killed_at(4, lambda out=out, on=started, config=other: run(out, config, resume=on))
        if (out / "config.json").exists():
            load_model(out)
        started = (out / training.STATE_FILE).exists()
        run(out, config, resume=started)
        assert_same_run(out, tmp_path / "whole")
        assert not list(out.glob(".*"))
    assert number > 10


def test_one_trainer_in_a_folder(tmp_path):
    """The lock ends with its process, however that ends, and says whose it is."""
    out = tmp_path / "run"

    def second():
        with pytest.raises(ValueError, match=rf"got {out}: process {os.getpid()} trains there"):
            run(out, resume=True)

    run(out, on_step=at(2, second))
    assert not (out / lock.LOCK_FILE).exists()
    # What a killed process left: a number that is nobody's, and no lock.
    (out / lock.LOCK_FILE).write_text("999999999\n")
    run(out, resume=True)
    assert not (out / lock.LOCK_FILE).exists()
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "other", on_step=at(2, lambda: 1 // 0))
    assert not (tmp_path / "other" / lock.LOCK_FILE).exists()


def test_the_lock_of_another_process(tmp_path):
    code = (
        "import sys, pathlib, cgm.training.lock as lock\n"
        "with lock.locked(pathlib.Path(sys.argv[1])): print('locked', flush=True); input()"
    )
    out = tmp_path / "run"
    command = [sys.executable, "-c", code, str(out)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"process {process.pid} trains there"):
            run(out)
    finally:
        process.kill()
        process.communicate()
    assert (out / lock.LOCK_FILE).read_text() == f"{process.pid}\n"
    run(out)
    assert not (out / lock.LOCK_FILE).exists()


def test_a_run_from_before_a_field_of_the_config_resumes(tmp_path, monkeypatch):
    out = tmp_path / "run"
    run(out)
    tensors, info = state(out)
    del info["model"]["config"]["inner"]
    write_tensors(out / training.STATE_FILE, tensors, info)
    run(out, dataclasses.replace(CONFIG, steps=11), resume=True)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t, i: t.update({"spare": torch.zeros(1)}), "has spare, which is none of weights"),
        (lambda t, i: i.update(step="2"), "step must be a whole number, got '2'"),
        (lambda t, i: i.pop("step"), "step must be a whole number, got None"),
        (lambda t, i: i.pop("model"), "is of another run: model"),
        (
            lambda t, i: t.update({"optimizer/second/mix.weight/exp_avg": torch.zeros(1)}),
            r"optimizer|mix\.weight/exp_avg must be \(6, 6\), got \(1,\)",
        ),
        (
            lambda t, i: t.pop("optimizer/second/mix.weight/exp_avg"),
            "1 tensors are missing",
        ),
        (
            lambda t, i: t["weights/mix.weight"].fill_(math.inf),
            r"mix\.weight must be finite",
        ),
    ],
)
def test_a_state_that_does_not_fit_names_the_file(tmp_path, change, words):
    out = tmp_path / "run"
    run(out)
    tensors, info = state(out)
    change(tensors, info)
    write_tensors(out / training.STATE_FILE, tensors, info)
    with pytest.raises(ValueError, match=rf"training\.safetensors: .*({words})"):
        run(out, resume=True)


def test_refuses_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out must be a folder to write to"):
        run(tmp_path / "file" / "run")

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match="No space left on device"):
        run(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_wrong_data_shows_before_anything_is_written(tmp_path):
    data = Dataset("toy", torch.zeros(N, 2, 4), torch.zeros(N, dtype=torch.int64), "class", 3)
    with pytest.raises(ValueError, match="y must be"):
        run(tmp_path / "run", dataset=data)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "field, value",
    [
        ("steps", 0),
        ("batch_size", -1),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("gradient_clip", 0.0),
        ("ema_decay", 1.0),
        ("warmup", -1),
        ("log_every", 0),
        ("sheet_every", -1),
    ],
)
def test_config_errors(field, value):
    with pytest.raises(ValueError, match=rf"^{field} must .*got {value}"):
        TrainingConfig(**{field: value})


# Progress -----------------------------------------------------------------------------------------
def test_log_and_lines(tmp_path):
    file = io.StringIO()
    run(tmp_path / "run", console=Console(file=file, width=40))
    lines = file.getvalue().splitlines()
    steps = [line.split("  ")[0] for line in lines if "loss" in line]
    assert steps[:2] == ["step 1/10", "step 2/10"] and "\x1b" not in file.getvalue()
    assert {f"step {n}/10" for n in (2, 4, 6, 8, 10)} <= set(steps)
    assert lines[0].startswith("step 1/10  loss ") and lines[-1].endswith("0:00:00 left")
    rows = log_rows(tmp_path / "run")
    assert list(rows[0]) == [
        "step", "seconds", "learning_rate",
        "first/total", "first/fit", "first/gradient_norm",
        "second/total", "second/fit", "second/gradient_norm",
    ]  # fmt: skip
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8, 10]
    run(tmp_path / "each", dataclasses.replace(CONFIG, log_every=1))
    each = [float(row["second/total"]) for row in log_rows(tmp_path / "each")]
    for number, row in enumerate(rows):
        mean = sum(each[2 * number : 2 * number + 2]) / 2
        assert float(row["second/total"]) == pytest.approx(mean, rel=1e-5)


def test_bar_on_a_terminal(tmp_path):
    file = io.StringIO()
    terminal = {"TERM": "xterm"}
    run(
        tmp_path / "run",
        console=Console(file=file, force_terminal=True, width=120, _environ=terminal),
    )
    assert "━" in file.getvalue() and "step 10/10" in file.getvalue()


def test_log_keeps_large_steps(tmp_path):
    file = tmp_path / "log.csv"
    Log(file, ["step", "seconds"], 0).write([12345678, 0.5])
    assert Log(file, ["step", "seconds"], 12345678).seconds == 0.5
    assert file.read_text().splitlines() == ["step,seconds", "12345678,0.5"]


# Adversarial families -----------------------------------------------------------------------------
def images(n, channels=3, side=16):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(n)) * 2 - 1


def pairs(name="pairs", **options):
    return Dataset(name, images(7), images(7).flip(0), "image", **options)


SMALL = {"width": 4, "discriminator_width": 4, "patch": 16}
SHAPES = {"event_shape": (3, 16, 16), "cond_shape": (3, 16, 16)}
BATCH_NORM = Pix2PixConfig(**SHAPES, depth=2, dropout=False, **SMALL)
ADVERSARIAL = {
    "pix2pix": (Pix2Pix, BATCH_NORM, pairs()),
    "r1": (Pix2Pix, dataclasses.replace(BATCH_NORM, norm="instance", r1_weight=1.0), pairs()),
    "gan": (
        ConditionalGAN,
        GANConfig((3, 16, 16), "class", 3, latents=4, r1_weight=10.0, **SMALL),
        Dataset("classes", images(7), torch.arange(7) % 3, "class", 3),
    ),
    "cyclegan": (
        CycleGAN,
        CycleGANConfig(**SHAPES, generator="unet", depth=2, pool=2, **SMALL),
        Dataset("unpaired", images(7), images(5), "image", paired=False),
    ),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_bfloat16_learns_as_float32_and_resumes(tmp_path, name):
    """Also with the penalty, and with a pool of images."""
    family, model_config, data = ADVERSARIAL[name]

    def go(out, steps, precision="bfloat16", **options):
        config = dataclasses.replace(
            CONFIG, steps=steps, precision=precision, decay="constant", learning_rate=2e-4,
            gradient_clip=math.inf, log_every=1, warmup=0,
        )  # fmt: skip
        run(out, config, data, make_model(family, model_config, seed=1), **options)

    go(tmp_path / "run", 3)
    go(tmp_path / "float32", 3, "float32")
    low, full = (log_rows(tmp_path / name)[0] for name in ("run", "float32"))
    for column in low.keys() - {"seconds"}:  # of the first step: later ones have other weights
        assert float(low[column]) == pytest.approx(float(full[column]), rel=0.03, abs=2e-3), column
    assert {**low, "seconds": ""} != {**full, "seconds": ""}
    go(tmp_path / "run", 5, resume=True)
    go(tmp_path / "whole", 5)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("name", ["r1", "gan"])
def test_gradient_of_the_penalty_in_bfloat16(name):
    """The gradient of a gradient, both of them through autocast."""
    family, model_config, data = ADVERSARIAL[name]
    model = make_model(family, model_config, seed=1)
    parameters = list(model.discriminator.parameters())
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = model.loss(
                **data.batch(torch.arange(4)), phase="discriminator", seed=0, index=torch.arange(4)
            )
        gradients = torch.autograd.grad(losses["r1"].sum(), parameters, materialize_grads=True)
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    assert found[0].norm() > 0 and not torch.equal(*found)
    assert (found[1] - found[0]).norm() < 0.03 * found[0].norm()


# Sheets -------------------------------------------------------------------------------------------
SHEETS = dataclasses.replace(CONFIG, ema_decay=0.0, sheet_every=4, log_every=1)


def sheet_bytes(out):
    return {file.name: file.read_bytes() for file in sorted((out / "samples").iterdir())}


def page(out):
    return (out / "index.html").read_text(encoding="utf-8")


def new_pix2pix():
    return make_model(Pix2Pix, BATCH_NORM, seed=1)


def test_sheets_are_what_the_checkpoint_draws(tmp_path):
    """Batch norm: its statistics must reach the average before it draws."""
    kept = []
    keep = at(5, lambda: kept.append(load_model(tmp_path / "run")))
    data = pairs()
    run(tmp_path / "run", SHEETS, data, new_pix2pix(), on_step=keep)
    sheets = sheet_bytes(tmp_path / "run")
    assert list(sheets) == ["step_000004.png", "step_000008.png", "step_000010.png"]
    rows = data.batch(torch.arange(6))
    samples = kept[0].sample(3, cond=rows["cond"])
    assert torch.equal(samples[0], samples[2])
    sample_grid(
        tmp_path / "a.png",
        samples[:1],  # without noise all draws are one
        cond=rows["cond"],
        real=rows["y"],
        labels=[f"row {i}" for i in range(6)],
    )
    assert (tmp_path / "a.png").read_bytes() == sheets["step_000004.png"]
    assert len(set(sheets.values())) == 3  # it learns
    seldom = dataclasses.replace(SHEETS, save_every=100, log_every=100)
    run(tmp_path / "seldom", seldom, data, new_pix2pix())
    assert sheet_bytes(tmp_path / "seldom") == sheets


def test_a_sheet_that_cannot_be_written_loses_no_step(tmp_path):
    """A file stands where the folder of the sheets would be."""
    out = tmp_path / "run"
    seldom = dataclasses.replace(SHEETS, save_every=100, log_every=100)
    block = at(3, lambda: (out / "samples").write_text("in the way"))
    with pytest.raises(ValueError, match=r"^out must be a folder to write to.* step 4 is saved"):
        run(out, seldom, pairs(), new_pix2pix(), on_step=block)
    (out / "samples").unlink()
    run(out, seldom, pairs(), new_pix2pix(), resume=True)
    run(tmp_path / "whole", seldom, pairs(), new_pix2pix())
    whole = sheet_bytes(tmp_path / "whole")
    del whole["step_000004.png"]
    assert sheet_bytes(out) == whole


def test_sheets_change_no_bit_and_resume(tmp_path):
    data = pairs(crop=0, flip=True)
    without = dataclasses.replace(SHEETS, sheet_every=0)
    run(tmp_path / "without", without, data, new_pix2pix())
    assert not (tmp_path / "without" / "index.html").exists()
    run(tmp_path / "whole", SHEETS, data, new_pix2pix())
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "parts", SHEETS, data, new_pix2pix(), on_step=at(5, press_ctrl_c))
    assert list(sheet_bytes(tmp_path / "parts")) == ["step_000004.png"]
    run(tmp_path / "parts", SHEETS, data, new_pix2pix(), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert sheet_bytes(tmp_path / "whole") == sheet_bytes(tmp_path / "parts")
    assert page(tmp_path / "whole").count("<img") == page(tmp_path / "parts").count("<img") == 3
    tensors, plain = (state(tmp_path / name)[0] for name in ("whole", "without"))
    assert all(torch.equal(tensor, plain[name]) for name, tensor in tensors.items())
    # Every how many steps there is one may change.
    longer = dataclasses.replace(SHEETS, steps=11, sheet_every=11, decay="constant")
    run(
        tmp_path / "other",
        dataclasses.replace(longer, steps=10, sheet_every=0),
        data,
        new_pix2pix(),
    )
    run(tmp_path / "other", longer, data, new_pix2pix(), resume=True)
    assert list(sheet_bytes(tmp_path / "other")) == ["step_000011.png"]


def test_page(tmp_path):
    out = tmp_path / "<b>&run"
    run(out, SHEETS, pairs('<script>alert("&")</script>'), new_pix2pix())
    text = page(out)
    assert text.startswith("<!DOCTYPE html>") and text.endswith("</html>\n")
    assert "<script" not in text and "<b>" not in text
    assert "&lt;b&gt;&amp;run" in text and "&lt;script&gt;" in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources == ["log.csv", "config.json"] + [
        f"samples/step_{step:06}.png" for step in (10, 8, 4)
    ]
    assert all((out / source).is_file() for source in sources)
    parts = re.split(r"<h2>(.*?)</h2>", text)[1:]
    assert parts[::2] == ["Step 10", "Step 8", "Step 4", "model: pix2pix", "training", "data"]
    rows = {int(row["step"]): row for row in log_rows(out)}
    for step, part in zip((10, 8, 4), parts[1::2], strict=False):
        cells = dict(re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", part))
        assert cells == {name: value for name, value in rows[step].items() if name != "step"}
    assert "<td>sheet_every</td><td>4</td>" in parts[9]
    assert "<td>event_shape</td><td>[3, 16, 16]</td>" in parts[7]
    assert not list(out.glob(".*"))


def test_page_has_no_sheets_of_steps_that_were_lost(tmp_path):
    def crash():
        raise RuntimeError("crash")

    config = dataclasses.replace(SHEETS, sheet_every=1)
    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path / "run", config, pairs(), new_pix2pix(), on_step=at(7, crash))
    assert 'alt="samples at step 6"' in page(tmp_path / "run")
    with pytest.raises(RuntimeError, match="crash"):  # from step 4 on
        run(tmp_path / "run", config, pairs(), new_pix2pix(), resume=True, on_step=at(6, crash))
    steps = re.findall("<h2>Step (.*)</h2>", page(tmp_path / "run"))
    assert steps == ["5", "4", "3", "2", "1"]


@pytest.mark.parametrize("kind", ["none", "class", "image", "lower half", "colors", "unpaired"])
def test_sheets_of_every_kind(tmp_path, kind, monkeypatch):
    drawn = []
    monkeypatch.setattr(sample_page, "sample_grid", lambda *a, **k: drawn.append((a[1], k)))
    y, cond = images(4, 1, 8), images(4, 2, 8)
    fitting = {
        "none": Dataset("x", y),
        "class": Dataset("x", y, torch.tensor([1, 0, 1, 0]), "class", 2, ("<a>", "b")),
        "image": Dataset("x", y, cond[:, :1], "image"),
        "colors": Dataset("x", cond, y, "image"),
        "lower half": Dataset("x", y[:, :, 4:], y[:, :, :4], "image"),
        "unpaired": Dataset("x", y, cond[:3, :1], "image", paired=False),
    }[kind]
    fields = {f: getattr(fitting, f) for f in ("event_shape", "cond_kind", "cond_shape")}
    family, config = ConditionalDiffusion, DiffusionConfig(
        **fields, num_classes=fitting.num_classes, width=8, width_multipliers=(1,), blocks=1,
        heads=2,
    )  # fmt: skip
    if kind == "unpaired":
        sides = {name: fields[name] for name in ("event_shape", "cond_shape")}
        family, config = CycleGAN, CycleGANConfig(**sides, generator="unet", depth=2, **SMALL)
    shown = sample_page.first_rows(fitting, stacked=kind == "lower half")
    model = make_model(family, config).eval()
    (tmp_path / "log.csv").write_text("step,seconds\n3,0.1\n")
    save_model(tmp_path, model)
    sample_page.Sheets(model, shown, tmp_path).write(3)
    [(samples, given)] = drawn
    if kind == "none":
        assert samples.shape == (18, 1, 1, 8, 8) and samples.unique(dim=0).shape[0] == 18
        assert given["cond"] is given["real"] is None and given["labels"] == ()
        return
    batch = fitting.batch(torch.arange(4))
    assert samples.shape == (1 if kind == "unpaired" else 3, 4, *fitting.event_shape)
    expected = model.sample(len(samples), cond=batch["cond"], index=torch.arange(4))
    assert torch.equal(samples, expected)
    assert torch.equal(given["real"], batch["y"]) and given["stacked"] == (kind == "lower half")
    if kind == "class":
        assert given["labels"] == ("b", "<a>", "b", "<a>") and given["cond"] is None
    else:
        assert given["labels"][3] == "row 3" and torch.equal(given["cond"], batch["cond"])
    assert (given["real_header"] == "real") == (kind != "unpaired")


def test_sheets_of_what_cannot_be_shown(tmp_path):
    with pytest.raises(ValueError, match="sheet_every must be 0: toy draws nothing"):
        run(tmp_path / "run", SHEETS)
    model = make_model(ConditionalDiffusion, DiffusionConfig((2, 8, 8), width=8, heads=2))
    with pytest.raises(ValueError, match=r"1 or 3 channels, got y \(4, 2, 8, 8\)"):
        run(tmp_path / "run", SHEETS, Dataset("x", images(4, 2, 8)), model)
    config = dataclasses.replace(BATCH_NORM, cond_shape=(2, 16, 16))
    data = Dataset("x", images(4), images(4, 2), "image")
    with pytest.raises(ValueError, match=r"got y \(4, 3, 16, 16\) and cond \(4, 2, 16, 16\)"):
        run(tmp_path / "run", SHEETS, data, make_model(Pix2Pix, config))
    assert not (tmp_path / "run").exists()


# On a GPU -----------------------------------------------------------------------------------------
@pytest.mark.cuda
def test_steps_do_not_wait_for_the_device(tmp_path):
    def watch(step, average):
        torch.cuda.set_sync_debug_mode("error" if 2 <= step < 6 else "default")

    config = dataclasses.replace(CONFIG, steps=8, log_every=8, save_every=8)
    try:
        run(tmp_path / "run", config, device="cuda", on_step=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_resumes_bit_exactly_on_a_gpu(tmp_path):
    run(tmp_path / "whole", device="cuda")
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "parts", device="cuda", on_step=at(5, press_ctrl_c))
    run(tmp_path / "parts", device="cuda", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
