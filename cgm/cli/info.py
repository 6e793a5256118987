"""`cgm info`: versions, the GPU, how each op runs here."""

from collections.abc import Sequence
from dataclasses import dataclass

from cgm.cli.options import parse


@dataclass(frozen=True)
class InfoOptions:
    """Prints versions, the GPU, how each op runs here, and the shipped checkpoints."""


def run(argv: Sequence[str]) -> None:
    parse(InfoOptions, prog="cgm info", args=argv)
    import platform

    import torch
    from rich.table import Table

    import cgkernels
    from cgkernels._triton import HAS_TRITON, triton
    from cgkernels.library import OPS
    from cgm.checkpoints import shipped_names
    from cgm.training.progress import result_console

    cuda = torch.cuda.is_available()
    table = Table(show_header=False, box=None)
    table.add_row("cgkernels", cgkernels.__version__)
    table.add_row("python", f"{platform.python_version()}, {platform.platform()}")
    table.add_row("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    table.add_row("triton", triton.__version__ if HAS_TRITON else "not installed")
    interpreting = HAS_TRITON and triton.knobs.runtime.interpret
    if HAS_TRITON:
        table.add_row("interpreter", "on (TRITON_INTERPRET)" if interpreting else "off")
    if not cuda:
        table.add_row("GPU", "none that CUDA can use")
    for number in range(torch.cuda.device_count() if cuda else 0):
        major, minor = torch.cuda.get_device_capability(number)
        name = torch.cuda.get_device_name(number)
        table.add_row(f"GPU {number}", f"{name}, compute capability {major}.{minor}")
    table.add_row("checkpoints", ", ".join(shipped_names()) or "none")
    console = result_console()
    console.print(table)

    ops = Table(title="How the ops run here")
    for column in ("op", "on the CPU", "on CUDA"):
        ops.add_column(column)
    if not cuda:
        fused = "no GPU"
    elif not HAS_TRITON:
        fused = "not at all: no Triton"
    else:
        fused = "Triton kernel, interpreted" if interpreting else "fused Triton kernel"
    for name in sorted(OPS):
        ops.add_row(name, "plain PyTorch", fused)
    console.print(ops)
