"""`cgm convert`: a published checkpoint of pix2pix or CycleGAN becomes one of ours."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cgm.cli.options import flags_of, naming_flags, parse


@dataclass(frozen=True)
class ConvertOptions:
    """Makes a checkpoint of ours from a published file of pix2pix or CycleGAN.

    Of a CycleGAN give the file that ends in net_G_A.pth, with the one of net_G_B.pth beside it.
    Discriminators (net_D.pth; net_D_A.pth, net_D_B.pth) are taken from beside it if they are there.
    """

    # The file of a generator, such as latest_net_G.pth.
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    # Folder of the checkpoint to write.
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    # Side of the images, pixels; the file does not tell.
    size: int = 256
    # Whether a U-Net of pix2pix has dropout; the file does not tell.
    dropout: bool = True
    # Border in the blocks of a ResNet; the file tells only one of zeros.
    padding: Literal["reflect", "replicate"] = "reflect"


def run(argv: Sequence[str]) -> None:
    options = parse(ConvertOptions, prog="cgm convert", args=argv)
    from cgm.checkpoints import is_vacant, save_model
    from cgm.families.convert import assumed, convert_published
    from cgm.studies.targets import make_folder

    out = options.out
    if out.exists() and not (out.is_dir() and is_vacant(out)):
        raise ValueError(f"OUT must be an empty folder, or a new one, got {out}")
    with naming_flags(flags_of(options)):
        model, sources = convert_published(
            options.file, size=options.size, dropout=options.dropout, padding=options.padding
        )
    make_folder("OUT", out)
    save_model(out, model, {"converted": sources})
    for network, source in sources.items():
        print(f"{network}: {source}")
    for what in assumed(model):
        print(f"assumed: {what}")
    print(f"The model is in {out}. To draw from it:")
    print(f"  cgm sample {shlex.quote(str(out))} --cond IMAGE")
