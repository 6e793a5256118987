"""Checkpoints: what is written is read, what is damaged is refused, and no file is half written."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import stat
import time
import tracemalloc
from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch
from torch import nn

from cgm import checkpoints
from cgm.checkpoints import (
    drawable_names,
    load_model,
    read_config,
    read_tensors,
    sampling_preset,
    save_model,
    store_halved,
    write_tensors,
)
from cgm.evaluation.classifier import Classifier, ClassifierConfig
from cgm.families.diffusion import ConditionalDiffusion, DiffusionConfig
from cgm.families.energy import ConditionalEBM, EnergyConfig
from cgm.model import FAMILIES, config_class, config_from_dict, family_class, make_model
from tests.support import killed_at
from tests.test_training import Inner, Toy, ToyConfig

CONFIG, WEIGHTS = checkpoints.CONFIG_FILE, checkpoints.WEIGHTS_FILE


@pytest.fixture(autouse=True)
def _toy_family(monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy", "tests.test_training:Toy")
    monkeypatch.setitem(FAMILIES, "wide", "tests.test_checkpoints:Wide")


class Wide(Toy):
    """Other names and shapes of tensors for the same config."""

    family = "wide"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.mix = nn.Linear(6, 7)
        self.extra = nn.Parameter(torch.zeros(2))


def toy(seed=0):
    return make_model(Toy, ToyConfig(inner=Inner(0.5)), seed=seed)


def same(model, other):
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def saved(tmp_path):
    save_model(tmp_path / "toy", toy(), {"data": {"name": "shapes", "class_names": ("a", "b")}})
    return tmp_path / "toy"


# What is written is read --------------------------------------------------------------------------
def test_round_trip(saved):
    loaded = load_model(saved, expected_family="toy")
    assert type(loaded) is Toy and same(loaded, toy())
    assert loaded.config == ToyConfig(inner=Inner(0.5)) and not loaded.training
    info = read_config(saved)
    assert info["data"] == {"name": "shapes", "class_names": ["a", "b"]}
    assert info["format"] == 1 and info["family"] == "toy"
    assert set(info["versions"]) == {"python", "cgkernels", "torch", "safetensors"}
    assert sorted(p.name for p in saved.iterdir()) == [CONFIG, WEIGHTS]


def test_same_bytes_each_time(saved, tmp_path):
    save_model(tmp_path / "again", toy(), read_config_metadata(saved))
    for name in (CONFIG, WEIGHTS):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def read_config_metadata(path):
    return {"data": read_config(path)["data"]}


def test_files_have_the_usual_mode(saved, tmp_path):
    (tmp_path / "usual").write_text("")
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    assert {stat.S_IMODE(p.stat().st_mode) for p in saved.iterdir()} == {usual}


def test_half_precision_storage(tmp_path):
    model = toy()
    model.calls += 2**40 + 1
    save_model(tmp_path / "half", model, dtype=torch.float16)
    save_model(tmp_path / "full", model)
    loaded = load_model(tmp_path / "half")
    for name, parameter in model.named_parameters():
        assert loaded.get_parameter(name).dtype == torch.float32
        assert torch.equal(loaded.get_parameter(name), parameter.half().float())
    assert int(loaded.calls) == 2**40 + 1
    tensors = read_tensors(tmp_path / "half" / WEIGHTS)[0]
    assert tensors["mix.weight"].dtype == torch.float16
    with torch.no_grad():
        model.mix.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"dtype must hold every weight.*float16 for mix\.weight"):
        save_model(tmp_path / "large", model, dtype=torch.float16)
    assert not (tmp_path / "large").exists()


def test_tied_and_strided_tensors(tmp_path):
    weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    tied = torch.randn(3, 3)
    tensors = {"a": tied, "b": tied, "c": tied[1], "d": weight, "e": weight[:, 1:].mT}
    tensors |= {"f": torch.zeros(0, 3), "g": torch.ones(3, dtype=torch.bfloat16)}
    tensors |= {"h": torch.tensor(2.0)}
    write_tensors(tmp_path / "file", tensors, {"step": 1, "x": math.inf})
    read, info = read_tensors(tmp_path / "file")
    assert info == {"step": 1, "x": math.inf} and read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_loading_leaves_the_global_generator(saved):
    before = torch.random.get_rng_state()
    load_model(saved)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_make_model_is_seeded():
    torch.manual_seed(1)
    assert same(toy(), toy()) and not same(toy(), toy(seed=1))


# What is damaged is refused -----------------------------------------------------------------------
def test_every_truncation_is_refused(saved):
    for name in (CONFIG, WEIGHTS):
        whole = (saved / name).read_bytes()
        # A missing newline at the end of the JSON loses nothing.
        for length in range(0, len(whole) - 1, 7):
            (saved / name).write_bytes(whole[:length])
            with pytest.raises(ValueError, match=name):
                load_model(saved)
        (saved / name).write_bytes(whole)
    load_model(saved)


def test_every_changed_byte_is_refused(saved):
    for name in (CONFIG, WEIGHTS):
        whole = (saved / name).read_bytes()
        for place in range(0, len(whole), 5):
            changed = bytearray(whole)
            changed[place] ^= 0x15
            (saved / name).write_bytes(changed)
            try:
                loaded = load_model(saved)
            except ValueError as error:
                assert str(saved) in str(error)
            else:  # spaces of the JSON
                assert same(loaded, toy()) and loaded.config == toy().config
        (saved / name).write_bytes(whole)


def test_changed_dtype_is_refused(saved):
    """Of the same size, so that the file is well formed."""
    file = saved / WEIGHTS
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I32"'))
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: is damaged: the checksum"):
        load_model(saved)


def test_missing_files(saved, tmp_path):
    with pytest.raises(ValueError, match=rf"nothing/{CONFIG}: cannot be read: No such file"):
        load_model(tmp_path / "nothing")
    (saved / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=rf"toy/{WEIGHTS}: is missing"):
        load_model(saved)
    (saved / WEIGHTS).mkdir()
    with pytest.raises(ValueError, match=rf"toy/{WEIGHTS}: must be a file, is a folder"):
        load_model(saved)


def test_pickles_are_refused(saved):
    torch.save(toy().state_dict(), saved / WEIGHTS)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: is truncated, damaged or no checkpoint"):
        load_model(saved)


def test_foreign_safetensors_are_refused(saved):
    from safetensors.torch import save_file

    save_file(toy().state_dict(), saved / WEIGHTS)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: is truncated, damaged or no checkpoint"):
        load_model(saved)


def rewrite(saved, **changes):
    """The checkpoint with other entries, as a program that differs from this one may write it."""
    info = {**read_config(saved), **changes}
    tensors, _ = read_tensors(saved / WEIGHTS)
    (saved / CONFIG).write_text(json.dumps(info))
    write_tensors(saved / WEIGHTS, tensors, info)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": 2}, "format must be 1, got 2"),
        ({"family": "gone"}, "must have a family of .*, got family 'gone'"),
        ({"family": ["toy"]}, "must have a family of"),
        ({"config": None}, "must have a family of .* and its config"),
        ({"config": {"shape": [2, 3], "depth": 1}}, "ToyConfig has no field depth"),
        ({"config": {"shape": "wide"}}, "can't multiply|must be"),
        ({"config": {"inner": {"gian": 1.0}}}, "Inner has no field gian"),
    ],
)
def test_wrong_config(saved, changes, message):
    rewrite(saved, **changes)
    with pytest.raises(ValueError, match=rf"{CONFIG}: .*({message})"):
        load_model(saved)


def test_wrong_family(saved):
    with pytest.raises(ValueError, match=rf"{CONFIG}: family must be diffusion, got toy"):
        load_model(saved, expected_family="diffusion")
    with pytest.raises(ValueError, match=r"family must be one of .*, got 'gone'"):
        family_class("gone")


def test_weights_that_do_not_fit(saved):
    rewrite(saved, config={"classes": 4})
    with pytest.raises(
        ValueError, match=rf"{WEIGHTS}: embed\.weight must be \(4, 6\), got \(3, 6\)"
    ):
        load_model(saved)
    rewrite(saved, family="wide")
    with pytest.raises(ValueError, match=r"1 tensors are missing \['extra'\], 0 are unexpected"):
        load_model(saved)
    tensors, info = read_tensors(saved / WEIGHTS)
    write_tensors(saved / WEIGHTS, {**tensors, "spare": torch.zeros(1)}, {**info, "family": "toy"})
    (saved / CONFIG).write_text(json.dumps({**info, "family": "toy", "config": {}}))
    with pytest.raises(ValueError, match="was not written together with"):
        load_model(saved)
    rewrite(saved, config={})
    with pytest.raises(ValueError, match=r"0 tensors are missing \[\], 1 are unexpected \['spare'"):
        load_model(saved)


def test_files_of_two_checkpoints(saved, tmp_path):
    save_model(tmp_path / "other", make_model(Toy, ToyConfig(inner=Inner(2.0))))
    os.replace(tmp_path / "other" / CONFIG, saved / CONFIG)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: was not written together with {CONFIG}"):
        load_model(saved)


def test_shipped():
    with pytest.raises(ValueError, match=r"name must be one of .*, got '\.\.'"):
        checkpoints.shipped("..")


# Presets ------------------------------------------------------------------------------------------
@pytest.fixture
def diffusion():
    config = DiffusionConfig((1, 8, 8), width=8, width_multipliers=(1,), blocks=1, heads=2)
    return make_model(ConditionalDiffusion, config)


def test_a_preset_is_read_as_it_was_saved(diffusion, saved, tmp_path):
    preset = {"sampler": "dpmpp_2m", "steps": 12, "guidance": 2, "clip": False}
    save_model(tmp_path / "preset", diffusion, {"sampling": preset})
    assert sampling_preset(tmp_path / "preset") == preset
    save_model(tmp_path / "none", diffusion)
    assert sampling_preset(tmp_path / "none") == sampling_preset(saved) == {}
    samples = load_model(tmp_path / "preset").sample(1, seed=3, steps=2)
    # `sample` alone has the family's defaults.
    assert torch.equal(samples, load_model(tmp_path / "none").sample(1, seed=3, steps=2))


@pytest.mark.parametrize(
    "preset, words",
    [
        ([], r"sampling must be a JSON object, got \[\]"),
        ({"top_k": 3}, "sampling has top_k, which is none of sampler, steps, guidance"),
        ({"sampler": "heun"}, "sampling.sampler must be one of ddpm, ddim, .*, got 'heun'"),
        ({"steps": "12"}, "sampling.steps must be a whole number, got '12'"),
        ({"steps": 1.5}, "sampling.steps must be a whole number, got 1.5"),
        ({"steps": True}, "sampling.steps must be a whole number, got True"),
        ({"guidance": None}, "sampling.guidance must be a number, got None"),
        ({"clip": 0}, "sampling.clip must be True or False, got 0"),
    ],
)
def test_a_preset_that_does_not_fit_names_the_file(diffusion, tmp_path, preset, words):
    save_model(tmp_path, diffusion, {"sampling": preset})
    with pytest.raises(ValueError, match=f"{CONFIG}: {words}"):
        sampling_preset(tmp_path)


def test_what_draws_nothing_has_no_preset(tmp_path):
    model = make_model(Classifier, ClassifierConfig())
    save_model(tmp_path, model, {"sampling": {"steps": 3}})
    with pytest.raises(ValueError, match="sampling must be absent: a model of classifier draws no"):
        sampling_preset(tmp_path)


def test_shipped_presets():
    for name in checkpoints.shipped_names():
        path = checkpoints.shipped(name)
        draws = family_class(read_config(path)["family"]).sampling_config is not None
        assert ("sampling" in read_config(path)) == (name in checkpoints.drawable_names()) == draws
    presets = {name: sampling_preset(checkpoints.shipped(name)) for name in drawable_names()}
    assert {name: preset for name, preset in presets.items() if preset} == {
        "class_to_image_diffusion": {"sampler": "dpmpp_2m", "steps": 12, "guidance": 2.0},
        "colorize_diffusion": {"steps": 20},
        "colorize_energy": {"temperature": 0.1},
    }


# No file is half written --------------------------------------------------------------------------
@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_failure_before_the_rename_leaves_the_old_checkpoint(saved, monkeypatch, broken):
    def fail(*arguments):
        raise OSError(5, "Input/output error")

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr(checkpoints.os, broken, fail)
    with pytest.raises(OSError, match="Input/output error"):
        save_model(saved, toy(seed=1))
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_killed_at_the_rename(saved):
    """The temporary file of a killed process stays, harms nothing, and the next save takes it."""
    pid = os.fork()
    if pid == 0:
        checkpoints.os.replace = lambda *arguments: os._exit(9)
        save_model(saved, toy(seed=1))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert any(path.name.endswith(".tmp") for path in saved.iterdir())
    assert same(load_model(saved), toy())
    save_model(saved, toy(seed=1))
    assert same(load_model(saved), toy(seed=1))
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]


def test_killed_anywhere_it_is_the_old_or_the_new(saved, tmp_path):
    """Of another model, config and metadata, and again over what the kill left."""
    other = make_model(Toy, ToyConfig(inner=Inner(2.0)), seed=1)
    seen = []
    for number in itertools.count():
        folder = tmp_path / f"killed_{number}"
        shutil.copytree(saved, folder)
        metadata = {"data": {"name": "new"}}
        if not killed_at(number, lambda at=folder, data=metadata: save_model(at, other, data)):
            break
        for _ in range(2):
            model, info = load_model(folder), read_config(folder)
            new = info["data"]["name"] == "new"
            assert same(model, other if new else toy())
            assert model.config.inner.gain == info["config"]["inner"]["gain"] == 1.5 * new + 0.5
            # A second kill, where only the first file is there.
            killed_at(1, lambda at=folder: save_model(at, toy(seed=2)))
        seen.append(new)
        save_model(folder, other)
        assert same(load_model(folder), other)
        assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert seen == sorted(seen) and {*seen} == {False, True}


# What no checkpoint can be ------------------------------------------------------------------------
def test_what_is_no_file_is_refused(saved):
    """At once: a pipe would wait, an endless file be read for ever."""
    for name in (CONFIG, WEIGHTS):
        whole = (saved / name).read_bytes()
        (saved / name).unlink()
        os.mkfifo(saved / name)
        with pytest.raises(ValueError, match=f"{name}: must be a file, is a pipe or a device"):
            load_model(saved)
        (saved / name).unlink()
        (saved / name).symlink_to("/dev/zero")
        with pytest.raises(ValueError, match=f"{name}: must be a file, is a pipe or a device"):
            load_model(saved)
        (saved / name).unlink()
        (saved / name).mkdir()
        with pytest.raises(ValueError, match=f"{name}: must be a file, is a folder"):
            load_model(saved)
        (saved / name).rmdir()
        (saved / name).write_bytes(whole)
    load_model(saved)


@pytest.mark.parametrize(
    "text, words",
    [
        (b"[" * 100_000, "is not JSON"),
        (b'{"format": 1, "format": 1}', "is not JSON: a name comes twice"),
        (b"\xff\xfe{}", "is not JSON"),
        (b'{"format": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b" " * (2**22 + 1), "is not JSON: has more than 4194304 bytes"),
        (b"1", "must be a JSON object"),
        (b"", "is not JSON"),
    ],
    ids=["deep", "twice", "utf-16", "digits", "long", "number", "empty"],
)
def test_what_is_no_config(saved, text, words):
    (saved / CONFIG).write_bytes(text)
    with pytest.raises(ValueError, match=rf"{CONFIG}: {words}"):
        load_model(saved)


def test_headers_are_read_within_bounds(saved):
    whole = (saved / WEIGHTS).read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header, data = whole[8 : 8 + size], whole[8 + size :]
    for changed, words in (
        (header.replace(b"{", b'{"mix.bias": 1, ', 1), "a name comes twice"),
        (header.rstrip() + b" " * 2**24, "the header has more than 16777216 bytes"),
        (b'{"__metadata__": {"cgm": "' + b"[" * 100_000 + b'"}}', ""),
        (b'{"__metadata__": {"cgm": "{\\"info\\": 3, \\"crc32\\": 1}"}}', "no text of information"),
    ):
        (saved / WEIGHTS).write_bytes(len(changed).to_bytes(8, "little") + changed + data)
        with pytest.raises(ValueError, match=rf"{WEIGHTS}: is truncated, damaged or no.*{words}"):
            load_model(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 500_000}, {"blocks": 2**31}, {"blocks": 2**62}, {"width_multipliers": [2**40]},
        {"num_classes": 2**62, "cond_kind": "class"}, {"attention_depth": 2**40},
        {"timesteps": 2**40}, {"patch": 2**40, "event_shape": [1, 2**40, 2**40]},
        {"width_multipliers": [1] * 10_000}, {"heads": 3}, {"width": 1.5}, {"blocks": None},
    ],
)  # fmt: skip
def test_a_config_of_another_network_costs_nothing(diffusion, tmp_path, changes):
    """However large it is: the weights decide, before anything is built."""
    save_model(tmp_path, diffusion)
    config = {**read_config(tmp_path)["config"], **changes}
    rewrite(tmp_path, config=config)
    start = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"{tmp_path}/({CONFIG}|{WEIGHTS}): "):
        load_model(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    assert torch.is_grad_enabled()
    tracemalloc.stop()
    assert peak < 2**27 and time.perf_counter() - start < 20


def test_pools_are_bounded(tmp_path):
    model = make_model(ConditionalEBM, EnergyConfig((1, 8, 8), width=8, depth=1, hidden=8))
    save_model(tmp_path, model)
    rewrite(tmp_path, config={**read_config(tmp_path)["config"], "chains": 2**40})
    with pytest.raises(ValueError, match=rf"{CONFIG}: must ask for at most 4,294,967,296 bytes"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t * math.nan, "must be finite"),
        (lambda t: t.double() * 1e300, "must be finite"),  # no float32
        (lambda t: t.to(torch.int8), "must be torch.float32, got torch.int8"),
        (lambda t: t > 0, "must be torch.float32, got torch.bool"),
        (lambda t: t.to(torch.complex64), "must be torch.float32, got torch.complex64"),
        (lambda t: t.to(torch.float8_e4m3fn), "must be torch.float32, got torch.float8"),
    ],
)
def test_weights_of_another_kind_are_refused_by_name(saved, change, words):
    tensors, info = read_tensors(saved / WEIGHTS)
    write_tensors(saved / WEIGHTS, {**tensors, "mix.weight": change(tensors["mix.weight"])}, info)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: mix\.weight {words}"):
        load_model(saved)
    calls = tensors["calls"].float()
    write_tensors(saved / WEIGHTS, {**tensors, "calls": calls}, info)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: calls must be torch\.int64, got"):
        load_model(saved)


@pytest.mark.parametrize(
    "data, words",
    [([], "data must be a JSON"), ({"class_names": [1]}, "data.class_names must be a list")],
)
def test_wrong_data_entries(saved, data, words):
    rewrite(saved, data=data)
    with pytest.raises(ValueError, match=f"{CONFIG}: {words}"):
        load_model(saved)


# Configs ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Nested:
    pairs: tuple[tuple[int, int], ...] = ((1, 2),)
    inner: Inner = field(default_factory=Inner)
    maybe: tuple[int, ...] | None = None
    word: Literal["a", "b"] = "a"


@pytest.mark.parametrize(
    "config", [Nested(((3, 4), (5, 6)), Inner(2.0), (1,), "b"), Nested(), DiffusionConfig()]
)
def test_config_survives_json(config):
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    again = config_from_dict(type(config), values)
    assert again == config and hash(again) == hash(config)


def test_absent_fields_take_their_defaults():
    assert config_from_dict(Nested, {"word": "b"}) == Nested(word="b")


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    model_class = family_class(name)
    assert model_class.family == name
    assert dataclasses.is_dataclass(config_class(model_class))


def test_stored_halved(tmp_path):
    """The command that makes the checkpoints which ship: float16, and all else as it was."""
    save_model(tmp_path / "run", toy(), {"sampling": {}, "data": {"name": "toy"}})
    store_halved(tmp_path / "run", tmp_path / "half")
    assert read_config(tmp_path / "half") == read_config(tmp_path / "run")
    half = load_model(tmp_path / "half").state_dict()
    for name, tensor in load_model(tmp_path / "run").named_parameters():
        assert torch.equal(half[name], tensor.half().float())
