"""Files that were changed: they load as they were, or are refused in words that name the file."""

import json
import math
import os
import time
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cgm.checkpoints import load_model, read_config, read_tensors, save_model, write_tensors
from cgm.data import load_folder
from cgm.families.autoregressive import AutoregressiveConfig, ConditionalTransformer
from cgm.families.convert import convert_published
from cgm.families.diffusion import ConditionalDiffusion, DiffusionConfig
from cgm.families.energy import ConditionalEBM, EnergyConfig
from cgm.families.flow import ConditionalFlow, FlowConfig
from cgm.families.gan import Pix2Pix, Pix2PixConfig
from cgm.families.vae import ConditionalVAE, VAEConfig
from cgm.model import make_model
from cgm.networks.published import load_published, network_of
from cgm.networks.resnet_generator import ResnetGenerator, ResnetGeneratorConfig

SHAPE = (1, 8, 8)
MODELS = {
    "diffusion": lambda: make_model(
        ConditionalDiffusion,
        DiffusionConfig(SHAPE, width=8, width_multipliers=(1,), blocks=1, heads=2),
    ),
    "autoregressive": lambda: make_model(
        ConditionalTransformer, AutoregressiveConfig(SHAPE, depth=1, width=16, hidden=16)
    ),
    "energy": lambda: make_model(
        ConditionalEBM, EnergyConfig(SHAPE, width=8, depth=1, hidden=8, chains=2)
    ),
    "flow": lambda: make_model(ConditionalFlow, FlowConfig(SHAPE, steps=(1,), width=4, depth=1)),
    "vae": lambda: make_model(ConditionalVAE, VAEConfig(SHAPE, width=8, depth=1)),
    "pix2pix": lambda: make_model(
        Pix2Pix,
        Pix2PixConfig((1, 8, 8), "image", 0, (1, 8, 8), depth=2, width=2, discriminator_width=2),
    ),
}
SECONDS = 20  # of one file, on a busy machine; each takes a fraction of one


@pytest.fixture
def checkpoint(tmp_path):
    for name, model in MODELS.items():
        save_model(tmp_path / name, model(), {"data": {"name": "x", "class_names": ["a"]}})
    return tmp_path


def outcome(load, where):
    """What load() gives, or None where it was refused as it should be, in time."""
    start = time.perf_counter()
    try:
        return load()
    except ValueError as error:
        assert str(where) in str(error), error
        return None
    finally:
        assert time.perf_counter() - start < SECONDS
        assert torch.is_grad_enabled()


def same(model, other):
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def damage(data, draw):
    """The bytes, cut off, with changed bits, or with other bytes in a place."""
    changed = bytearray(data)
    how = draw(st.sampled_from(["cut", "bits", "splice", "append"]))
    place = draw(st.integers(0, len(data) - 1))
    if how == "cut":
        return bytes(changed[:place])
    if how == "append":
        return bytes(changed) + draw(st.binary(min_size=1, max_size=64))
    if how == "splice":
        other = draw(st.integers(0, len(data) - 1))
        length = draw(st.integers(1, 256))
        changed[place : place + length] = changed[other : other + length]
        return bytes(changed)
    for place in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=4)):
        changed[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


def test_damaged_checkpoints(fuzz, checkpoint):
    whole = {
        file: file.read_bytes() for name in MODELS for file in sorted((checkpoint / name).iterdir())
    }
    loaded = {name: load_model(checkpoint / name) for name in MODELS}

    @given(st.sampled_from(sorted(whole)), st.data())
    def check(file, data):
        other = data.draw(st.none() | st.sampled_from(sorted(whole)))
        changed = damage(whole[file], data.draw) if other is None else whole[other]
        file.write_bytes(changed)
        try:
            model = outcome(lambda: load_model(file.parent), file.parent)
        finally:
            file.write_bytes(whole[file])
        if model is not None:
            assert same(model, loaded[file.parent.name])
            assert model.config == loaded[file.parent.name].config

    fuzz(check)


def changed_json(value, draw):
    """A JSON value with one part replaced."""
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: changed_json(value[key], draw)}
    if isinstance(value, list) and value and draw(st.booleans()):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], changed_json(value[place], draw), *value[place + 1 :]]
    numbers = [0, -1, 1, 2, 3, 1.5, 2**31, 2**62, 2**64, -(2**70), 1e308, math.nan, math.inf]
    others = [None, True, "", "x", "none", [], {}, [1], [[1, 2]], [1, 2**31, 2**31], {"a": 1}]
    return draw(st.sampled_from(numbers + others))


def test_changed_configs(fuzz, checkpoint):
    """Written whole, as a program that errs may write them: the checksums are right."""
    parts = {name: read_tensors(checkpoint / name / "model.safetensors") for name in MODELS}

    @given(st.sampled_from(sorted(MODELS)), st.data())
    def check(name, data):
        tensors, info = parts[name]
        folder = checkpoint / name
        key = data.draw(st.sampled_from(["config", "config", "config", "family", "data", "format"]))
        changed = {**info, key: changed_json(info[key], data.draw)}
        (folder / "config.json").write_text(json.dumps(changed))
        write_tensors(folder / "model.safetensors", tensors, changed)
        model = outcome(lambda: load_model(folder), folder)
        if model is not None:
            assert all(torch.equal(tensors[k], t) for k, t in model.state_dict().items())

    fuzz(check)


def test_changed_weights(fuzz, checkpoint):
    file = checkpoint / "vae" / "model.safetensors"
    tensors, info = read_tensors(file)
    dtypes = [
        torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool,
        torch.complex64, torch.float8_e5m2,
    ]  # fmt: skip

    @given(st.sampled_from(sorted(tensors)), st.data())
    def check(name, data):
        how = data.draw(st.sampled_from(["dtype", "shape", "name", "nan", "missing"]))
        changed = dict(tensors)
        tensor = changed.pop(name)
        if how == "dtype":
            changed[name] = tensor.to(data.draw(st.sampled_from(dtypes)))
        elif how == "shape":
            changed[name] = data.draw(st.sampled_from([tensor[None], tensor.flatten()[:-1]]))
        elif how == "name":
            changed[data.draw(st.text(max_size=5))] = tensor
        elif how == "nan":
            place = data.draw(st.integers(0, tensor.numel() - 1))
            bad = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
            changed[name] = tensor.flatten().index_fill(0, torch.tensor([place]), bad)
            changed[name] = changed[name].view_as(tensor)
        write_tensors(file, changed, info)
        model = outcome(lambda: load_model(file.parent), file)
        rounded = how == "dtype" and changed[name].dtype in dtypes[:3]
        assert (model is not None) == rounded
        if model is not None:
            assert torch.equal(model.state_dict()[name], changed[name].float())

    fuzz(check)


@pytest.mark.parametrize("archive", [True, False])
def test_damaged_published_files(fuzz, tmp_path, archive):
    """Of an archive nothing changes in silence; older files carry no checksum of the values."""
    network = ResnetGenerator(ResnetGeneratorConfig(width=2, blocks=1, norm="batch"))
    file = tmp_path / "latest_net_G.pth"
    torch.save(network.state_dict(), file, _use_new_zipfile_serialization=archive)
    whole = file.read_bytes()

    @given(st.data())
    def check(data):
        file.write_bytes(damage(whole, data.draw))
        if data.draw(st.integers(0, 3)) == 0:
            outcome(lambda: convert_published(file, size=16), file)
        state = outcome(lambda: load_published(file), file)
        if state is None:
            return
        loaded = outcome(lambda: network_of(state), "state")
        if loaded is not None and archive:
            assert same(loaded, network)

    fuzz(check)


def test_damaged_images(fuzz, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    folder = tmp_path / "c"
    folder.mkdir()
    whole = {}
    for name in ("1.png", "1.jpg", "1.bmp", "1.webp"):
        mode = "RGBA" if name == "1.png" else "RGB"
        image = Image.fromarray(pixels if mode == "RGBA" else pixels[..., :3])
        image.save(tmp_path / name)
        whole[name] = (tmp_path / name).read_bytes()

    @given(st.sampled_from(sorted(whole)), st.sampled_from(sorted(whole)), st.data())
    def check(name, other, data):
        file = folder / name
        file.write_bytes(damage(whole[other], data.draw))
        loaded = outcome(lambda: load_folder(tmp_path, "classes", size=8), file)
        file.unlink()
        assert loaded is None or loaded.y.shape == (1, 3, 8, 8)

    fuzz(check)


def test_odd_folders(fuzz, tmp_path):
    """Every entry is read, passed over as documented, or named."""
    image = Image.new("RGB", (8, 8), "red")
    numbers = iter(range(10**9))

    def put(path, kind):
        if kind == "folder":
            path.mkdir()
        elif kind == "broken link":
            path.symlink_to(path.with_name("nowhere"))
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "image":
            image.save(path, format="PNG")
        else:
            path.write_bytes(b"" if kind == "empty" else b"hello")

    kinds = st.sampled_from(["image", "image", "folder", "broken link", "pipe", "empty", "text"])
    suffixes = st.sampled_from([".png", ".PNG", ".jpg", ".tif", ".txt", "", ".gif", ".webp"])
    names = st.sampled_from(["a", ".a", "1", "10", "ä", "a b", "a\nb", "[x]"])

    @given(st.dictionaries(st.tuples(names, suffixes), kinds, max_size=4))
    def check(entries):
        root = tmp_path / str(next(numbers))
        (root / "c").mkdir(parents=True)
        for (name, suffix), kind in entries.items():
            put(root / "c" / f"{name}{suffix}", kind)
        loaded = outcome(lambda: load_folder(root, "classes", size=4), root / "c")
        readable = [
            kind
            for (name, suffix), kind in entries.items()
            if name[0] != "." and suffix.lower() in (".png", ".jpg", ".webp", ".tif", ".gif")
            and kind != "folder"
        ]  # fmt: skip
        if loaded is not None:
            assert len(loaded) == len(readable) and set(readable) == {"image"}

    fuzz(check)


def test_a_stale_config_is_taken_only_by_the_name_that_the_weights_give(fuzz, checkpoint):
    """The state between the two renames of a save, and what only resembles it."""
    folder = checkpoint / "vae"
    tensors, info = read_tensors(folder / "model.safetensors")
    old = {**info, "data": {"name": "old"}}

    @given(st.booleans(), st.integers(0, 2**32 - 1))
    def check(right, other):
        text = json.dumps(old).encode()
        (folder / "config.json").write_bytes(text)
        replaces = zlib.crc32(text) if right else other
        write_tensors(folder / "model.safetensors", tensors, info, replaces=replaces)
        model = outcome(lambda: load_model(folder), folder)
        assert (model is not None) == right or replaces == zlib.crc32(text)
        if right:
            assert read_config(folder) == info

    fuzz(check)
