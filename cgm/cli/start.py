"""Where `cgm train` begins: at the weights of another model, by --init."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cgm.cli.options import naming_flags

if TYPE_CHECKING:
    from cgm.model import Model


@dataclass(frozen=True)
class Start:
    """The checkpoint of --init: its config is the default of the flags, its weights the first."""

    path: Path
    config: dict[str, Any]

    def load_into(self, model: "Model") -> None:
        from cgm.checkpoints import WEIGHTS_FILE, load_weights, read_tensors

        file = self.path / WEIGHTS_FILE
        try:
            load_weights(model, read_tensors(file)[0], file)
        except ValueError as error:
            raise ValueError(f"--init must fit the data and the flags: {error}") from error


def find_start(argv: Sequence[str], family: str) -> Start | None:
    """The checkpoint of --init, which decides the defaults of the flags: read before them."""
    from cgm.checkpoints import read_config
    from cgm.cli.checkpoint import find_checkpoint
    from cgm.data import DATA_FIELDS
    from cgm.model import config_class, config_from_dict, family_class

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--init", nargs="?")
    name = parser.parse_known_args(list(argv))[0].init
    if name is None:  # absent, or without a value, which tyro refuses
        return None
    with naming_flags({"CHECKPOINT": "--init"}):
        path = find_checkpoint(name)
    info = read_config(path)
    if info["family"] != family:
        raise ValueError(
            f"--init must be a model of the family {family}, got one of {info['family']}: {path}"
        )
    config = config_from_dict(config_class(family_class(family)), info["config"])
    fields = (f.name for f in dataclasses.fields(config) if f.name not in DATA_FIELDS)
    return Start(path, {name: getattr(config, name) for name in fields})
