"""Checkpoints: a folder of config.json and model.safetensors; and tensor files in general.

config.json          format version, family, config, versions; and what the caller adds: sampling,
                     data, training
model.safetensors    the weights to use: the averaged ones of a model that `cgm.training` trained

"sampling" is the preset of a checkpoint: the options of `sample` that it is best drawn with, those
that are not their defaults. The commands read it (`sampling_preset`); in Python
`model.sample(**sampling_preset(path))` does the same, while `model.sample()` alone has the defaults
of the family.

A file is written under a temporary name, flushed to disk and renamed: whoever reads finds the old
file or the new one, whole. The weights carry what config.json says, and are renamed first: from
then on the checkpoint is the new one. Until config.json is there too, they name the one that it
replaces, so that a process can be killed anywhere in between.

Every tensor file carries a CRC-32 over its tensors, their names and its information, since
safetensors itself notices a truncated file but not a changed byte. Nothing is unpickled, and a
network is built only if the weights are those of it. Whatever is wrong with a checkpoint is a
ValueError that names the file.
"""

import contextlib
import dataclasses
import json
import os
import platform
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata as packages
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import cgkernels
from cgm.model import FAMILIES, Model, config_class, config_from_dict, family_class, make_model

FORMAT = 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_SHIPPED = Path(str(resources.files("cgm"))) / "data" / "checkpoints"
_HEADER = "cgm"  # key of our entry in the metadata of a safetensors file
_DAMAGED = "is truncated, damaged or no checkpoint"
_MOST_TEXT, _MOST_HEADER = 2**22, 2**24  # bytes of config.json, of the header of a tensor file
_MOST_BUFFERS = 2**32  # bytes of what a network holds beside its weights, such as pools of images
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_Network = TypeVar("_Network", bound=nn.Module)


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
    text = (json.dumps(info, indent=2) + "\n").encode()
    path.mkdir(parents=True, exist_ok=True)
    file = path / CONFIG_FILE
    before = file.read_bytes() if file.exists() else text
    with replacing(file) as temporary:
        temporary.write_bytes(text)
        replaces = None if before == text else zlib.crc32(before)
        write_tensors(path / WEIGHTS_FILE, tensors, info, replaces=replaces)


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    *,
    expected_family: str | None = None,
) -> Model:
    """The model of a checkpoint, in float32 and in evaluation mode.

    A file that is missing, truncated or changed, another format version, another family than
    expected_family, and weights that do not fit the config, in name, shape or dtype, or are not
    finite, raise ValueError, which names the file.
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
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from error
    model = network_with(
        lambda: make_model(model_class, config), tensors, path / WEIGHTS_FILE, config=where
    )
    return model.to(device).eval()


def read_config(path: str | Path) -> dict[str, Any]:
    """What config.json of a checkpoint says; ValueError if that cannot be read.

    Where a save was cut off before it came to config.json, what the weights say.
    """
    file = Path(path) / CONFIG_FILE
    check_file(file)
    with _reading(file, "is not JSON"):
        text = _read(file, _MOST_TEXT)
        info = _parse(text)
    with contextlib.suppress(ValueError):  # what is wrong with the weights is said later
        weights = file.with_name(WEIGHTS_FILE)
        header = _header(weights)
        if header.get("replaces") == zlib.crc32(text):
            with _reading(weights, _DAMAGED):
                info = _parse(header["info"])
    if not isinstance(info, dict):
        raise ValueError(f"{file}: must be a JSON object, got {type(info).__name__}")
    if info.get("format") != FORMAT:
        raise ValueError(f"{file}: format must be {FORMAT}, got {info.get('format')}")
    if info.get("family") not in list(FAMILIES) or not isinstance(info.get("config"), dict):
        raise ValueError(
            f"{file}: must have a family of {', '.join(FAMILIES)} and its config, "
            f"got family {info.get('family')!r}"
        )
    if not isinstance(data := info.get("data", {}), dict):
        raise ValueError(f"{file}: data must be a JSON object, got {data!r}")
    names = data.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: data.class_names must be a list of names, got {names!r}")
    return info


def describe_model(model: Model) -> dict[str, Any]:
    """Family and config as JSON types."""
    return {"family": model.family, "config": dataclasses.asdict(model.config)}


def network_with(
    make: Callable[[], _Network],
    tensors: Mapping[str, Tensor],
    file: Path | str,
    *,
    config: Path | str,
) -> _Network:
    """The network that `make` builds as config says, with these weights of file.

    It is built on the meta device first, where nothing takes memory, and no further than so many
    tensors justify: a file that asks for another network, however large, costs nothing.

    Raises:
        ValueError: as `load_weights`; or the network cannot be built, which names config.
    """
    try:
        with torch.device("meta"), _AtMost(1000 + 100 * len(tensors)):
            sketch = make()
    except Exception as error:  # sizes that no tensor can have raise anything
        raise ValueError(f"{config}: {error}") from error
    check_weights(sketch.state_dict(), tensors, file)
    kept = sketch.state_dict().keys()
    buffers = sum(b.nbytes for name, b in sketch.named_buffers() if name not in kept)
    if buffers > _MOST_BUFFERS:
        raise ValueError(
            f"{config}: must ask for at most {_MOST_BUFFERS:,} bytes beside the weights, "
            f"asks for {buffers:,}"
        )
    with torch.device("cpu"):  # there and in float32, whatever the defaults are
        network = make().float()
        load_weights(network, tensors, file)
    return network


class _AtMost(TorchFunctionMode):
    """No more than so many calls of PyTorch; the networks here take less than 20 for a tensor."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.calls -= 1
        # Where a context ends, gradients must come back.
        if self.calls < 0 and function is not torch._C._set_grad_enabled:
            raise ValueError("must ask for no more layers than there are weights")
        return function(*args, **(kwargs or {}))


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], file: Path | str) -> None:
    """Copies the tensors into the model.

    Raises:
        ValueError: names, shapes or dtypes are not those of the model, or a value is not finite.
            The message names the file and the tensor.
    """
    wanted = model.state_dict()
    check_weights(wanted, tensors, file)
    for name, tensor in wanted.items():
        if tensor.is_floating_point() and not tensors[name].to(tensor.dtype).isfinite().all():
            raise ValueError(f"{file}: {name} must be finite, has values that are not")
    model.load_state_dict(dict(tensors))


def check_weights(
    wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], file: Path | str
) -> None:
    """ValueError, which names the file, unless names, shapes and dtypes are the wanted ones."""
    missing, unexpected = sorted(wanted.keys() - tensors), sorted(tensors.keys() - wanted)
    if missing or unexpected:
        raise ValueError(
            f"{file}: does not fit the model: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(unexpected)} are unexpected {unexpected[:3]}"
        )
    for name, tensor in wanted.items():
        got = tensors[name]
        if got.shape != tensor.shape:
            raise ValueError(
                f"{file}: {name} must be {tuple(tensor.shape)}, got {tuple(got.shape)}"
            )
        # Floating weights may be stored in any floating dtype.
        if got.dtype not in (_FLOATS if tensor.is_floating_point() else (tensor.dtype,)):
            raise ValueError(f"{file}: {name} must be {tensor.dtype}, got {got.dtype}")


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
    for name in preset:
        if name not in (options := model_class.sampling_options()):
            raise ValueError(f"{where} has {name}, which is none of {', '.join(options)}")
    try:
        model_class.sampling_config(**preset)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}.{error}") from error
    return preset


# Files --------------------------------------------------------------------------------------------
def write_tensors(
    file: Path,
    tensors: Mapping[str, Tensor],
    info: Mapping[str, Any],
    *,
    replaces: int | None = None,
) -> None:
    """Writes tensors and information (JSON types) as one file, the same bytes each time.

    replaces: CRC-32 of the config.json that information in weights stands for already.
    """
    stored = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    text = json.dumps(info)
    entry: dict[str, Any] = {"crc32": _checksum(stored, text), "info": text}
    if replaces is not None:
        entry["replaces"] = replaces
    with replacing(file) as temporary:
        # One entry only: safetensors writes several in an order of its own.
        temporary.write_bytes(save(stored, metadata={_HEADER: json.dumps(entry)}))


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and information of a file that `write_tensors` wrote; ValueError if it is damaged."""
    header = _header(file)
    with _reading(file, _DAMAGED):
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        info = _parse(header["info"])
        same = _checksum(tensors, header["info"]) == header["crc32"]
    if not same:
        raise ValueError(f"{file}: is damaged: the checksum of its contents is wrong")
    return tensors, info


def check_file(file: str | Path) -> None:
    """ValueError unless it is there, and a file: a pipe never begins, a device never ends."""
    try:
        mode = Path(file).stat().st_mode
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise ValueError(f"{file}: must be a file, is {what}")


@contextlib.contextmanager
def _reading(file: Path, wrong: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{file}: {wrong}: {error}") from error


def _read(file: Path, most: int) -> bytes:
    with file.open("rb") as opened:
        text = opened.read(most + 1)
    if len(text) > most:
        raise ValueError(f"has more than {most} bytes")
    return text


def _header(file: Path) -> dict[str, Any]:
    """Our entry of a tensor file."""
    if not file.exists():
        raise ValueError(f"{file}: is missing")
    check_file(file)
    with _reading(file, _DAMAGED), file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > _MOST_HEADER:
            raise ValueError(f"the header has more than {_MOST_HEADER} bytes")
        entry = _parse(_parse(opened.read(length))["__metadata__"][_HEADER])
        if not isinstance(entry["info"], str):
            raise ValueError("the header has no text of information")
        return entry


def _parse(text: str | bytes) -> Any:
    """JSON in which no name comes twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(made := dict(pairs)) < len(pairs):
            raise ValueError("a name comes twice in an object")
        return made

    return json.loads(text, object_pairs_hook=once)


def is_vacant(folder: Path) -> bool:
    """Whether there is nothing in a folder but what a killed process left behind."""
    left = (".tmp", ".lock")
    return all(p.name.startswith(".") and p.suffix in left for p in folder.iterdir())


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
