"""Checkpoints: a folder of config.json and model.safetensors; and tensor files in general.

config.json          format version, family, config, versions; and what the caller adds: sampling,
                     data, training
model.safetensors    the weights to use: the averaged ones of a model that `cgm.training` trained

"sampling" is the preset of a checkpoint: the options of `sample` that it is best drawn with, those
that are not their defaults. The commands read it (`sampling_preset`); in Python
`model.sample(**sampling_preset(path))` does the same, while `model.sample()` alone has the defaults
of the family.

A file is written under a temporary name, flushed to disk and renamed: whoever reads finds the old
file or the new one, whole. Every tensor file carries a CRC-32 over its tensors, their names and its
information, since safetensors itself notices a truncated file but not a changed byte. Nothing is
unpickled. Whatever is wrong with a checkpoint is a ValueError that names the file.
"""

import contextlib
import dataclasses
import json
import os
import platform
import sys
import typing
import zlib
from collections.abc import Iterator, Mapping
from importlib import metadata as packages
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

import cgkernels
from cgm.model import FAMILIES, Model, config_class, config_from_dict, family_class, make_model

FORMAT = 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_SHIPPED = Path(str(resources.files("cgm"))) / "data" / "checkpoints"
_HEADER = "cgm"  # key of our entry in the metadata of a safetensors file


# Models -------------------------------------------------------------------------------------------
def save_model(
    path: str | Path,
    model: Model,
    metadata: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a checkpoint; the folder is made if need be, and its checkpoint replaced.

    metadata: entries of config.json, JSON types only, e.g. {"data": {"name": ...}}.
    dtype: parameters are stored in it, e.g. torch.float16 for half the size; buffers stay exact. A
    parameter too large for it raises ValueError.
    """
    path = Path(path)
    tensors = dict(model.state_dict())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if dtype is not None and parameter.is_floating_point():
            tensors[name] = parameter.detach().to(dtype)
            if not tensors[name].isfinite().all():
                raise ValueError(f"dtype must hold every weight, got {dtype} for {name}")
    info = {
        "format": FORMAT,
        **describe_model(model),
        **(metadata or {}),
        "versions": {
            "python": platform.python_version(),
            "cgkernels": cgkernels.__version__,
            **{name: packages.version(name) for name in ("torch", "safetensors")},
        },
    }
    text = json.dumps(info, indent=2) + "\n"
    path.mkdir(parents=True, exist_ok=True)
    with replacing(path / CONFIG_FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_tensors(path / WEIGHTS_FILE, tensors, info)


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    *,
    expected_family: str | None = None,
) -> Model:
    """The model of a checkpoint, in float32 and in evaluation mode.

    A file that is missing, truncated or changed, another format version, another family than
    expected_family, and weights that do not fit the config raise ValueError, which names the file.
    """
    path = Path(path)
    info = read_config(path)
    where = path / CONFIG_FILE
    if expected_family is not None and info["family"] != expected_family:
        raise ValueError(f"{where}: family must be {expected_family}, got {info['family']}")
    tensors, written_with = read_tensors(path / WEIGHTS_FILE)
    if written_with != info:
        raise ValueError(f"{path / WEIGHTS_FILE}: was not written together with {CONFIG_FILE}")
    try:
        model_class = family_class(info["family"])
        config = config_from_dict(config_class(model_class), info["config"])
        model = make_model(model_class, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    load_weights(model, tensors, path / WEIGHTS_FILE)
    return model.to(device).eval()


def read_config(path: str | Path) -> dict[str, Any]:
    """What config.json of a checkpoint says; ValueError if that cannot be read."""
    file = Path(path) / CONFIG_FILE
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON: {error}") from error
    if not isinstance(info, dict):
        raise ValueError(f"{file}: must be a JSON object, got {type(info).__name__}")
    if info.get("format") != FORMAT:
        raise ValueError(f"{file}: format must be {FORMAT}, got {info.get('format')}")
    if info.get("family") not in list(FAMILIES) or not isinstance(info.get("config"), dict):
        raise ValueError(
            f"{file}: must have a family of {', '.join(FAMILIES)} and its config, "
            f"got family {info.get('family')!r}"
        )
    return info


def describe_model(model: Model) -> dict[str, Any]:
    """Family and config as JSON types."""
    return {"family": model.family, "config": dataclasses.asdict(model.config)}


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], file: Path | str) -> None:
    """Copies the tensors into the model; ValueError, which names the file, if they do not fit."""
    wanted = model.state_dict()
    missing, unexpected = sorted(wanted.keys() - tensors), sorted(tensors.keys() - wanted)
    if missing or unexpected:
        raise ValueError(
            f"{file}: does not fit the model: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(unexpected)} are unexpected {unexpected[:3]}"
        )
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"{file}: {name} must be {tuple(tensor.shape)}, got {tuple(tensors[name].shape)}"
            )
    model.load_state_dict(dict(tensors))


def shipped(name: str) -> Path:
    """Folder of a checkpoint that ships with the package."""
    if name not in shipped_names():
        raise ValueError(f"name must be one of {', '.join(shipped_names())}, got {name!r}")
    return _SHIPPED / name


def shipped_names() -> list[str]:
    """The checkpoints that ship with the package."""
    return sorted(path.name for path in _SHIPPED.glob("*") if path.is_dir())


def drawable_names() -> list[str]:
    """The shipped checkpoints that can be drawn from: those whose config.json has a preset."""
    return [name for name in shipped_names() if "sampling" in read_config(shipped(name))]


def store_halved(source: str | Path, out: str | Path) -> None:
    """Writes a checkpoint again with its weights in float16, as the shipped ones are stored."""
    info = read_config(source)
    ours = ("format", "family", "config", "versions")
    metadata = {name: value for name, value in info.items() if name not in ours}
    save_model(out, load_model(source), metadata, dtype=torch.float16)


def sampling_preset(path: str | Path) -> dict[str, Any]:
    """Options of `sample` that a checkpoint says it is drawn with; empty if it says nothing.

    Raises:
        ValueError: the family has no such option, or it no such value; the file is named.
    """
    info, where = read_config(path), f"{Path(path) / CONFIG_FILE}: sampling"
    preset = info.get("sampling", {})
    if not isinstance(preset, dict):
        raise ValueError(f"{where} must be a JSON object, got {preset!r}")
    if not preset:
        return {}
    try:
        model_class = family_class(info["family"])
    except ValueError as error:
        raise ValueError(f"{Path(path) / CONFIG_FILE}: {error}") from error
    if model_class.sampling_config is None:
        raise ValueError(f"{where} must be absent: a model of {info['family']} draws nothing")
    hints = typing.get_type_hints(model_class.sampling_config)
    for name, value in preset.items():
        if name not in hints:
            raise ValueError(f"{where} has {name}, which is none of {', '.join(hints)}")
        if not _fits(hints[name], value):
            raise ValueError(f"{where}.{name} must be {_named(hints[name])}, got {value!r}")
    return preset


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value of JSON is one of the type of an option."""
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    kinds = (int, float) if hint is float else (hint,)
    return isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))


def _named(hint: Any) -> str:
    choices = typing.get_args(hint)
    return f"one of {', '.join(map(str, choices))}" if choices else f"of type {hint.__name__}"


# Files --------------------------------------------------------------------------------------------
def write_tensors(file: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Writes tensors and information (JSON types) as one file, the same bytes each time."""
    stored = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    text = json.dumps(info)
    # One entry only: safetensors writes several in an order of its own.
    header = json.dumps({"crc32": _checksum(stored, text), "info": text})
    with replacing(file) as temporary:
        temporary.write_bytes(save(stored, metadata={_HEADER: header}))


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and information of a file that `write_tensors` wrote; ValueError if it is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads((opened.metadata() or {})[_HEADER])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        text, crc32 = header["info"], header["crc32"]
        info = json.loads(text)
    except FileNotFoundError as error:
        raise ValueError(f"{file}: is missing") from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: is truncated, damaged or no checkpoint: {error}") from error
    if _checksum(tensors, text) != crc32:
        raise ValueError(f"{file}: is damaged: the checksum of its contents is wrong")
    return tensors, info


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary path beside `file` to write to; it becomes `file` when the block ends well."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself is on disk once its folder is
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _checksum(tensors: Mapping[str, Tensor], text: str) -> int:
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m cgm.checkpoints SOURCE OUT   (the same model in float16)")
    store_halved(sys.argv[1], sys.argv[2])
