"""What times are judged by: the device's own ceilings, the floor of a case, the environment.

The timer itself is `cgkernels.timing.measure`; `cgm bench` uses it too.
"""

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cgkernels._triton import HAS_TRITON, triton
from cgkernels.timing import Call, Timing, input_sets, measure, verdict

__all__ = [
    "Call", "Ceilings", "Timing", "environment", "input_sets", "measure", "measure_ceilings",
    "verdict",
]  # fmt: skip

ROOT = Path(__file__).parents[2]
_SMI = "driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"


@triton.jit
def _empty_kernel():
    pass


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches, measured in this run.

    copy: bytes a second that a large copy reads and writes. flops: operations a second of a large
    matrix product of random numbers, by dtype (float32 with TF32 where the device has it).
    launch, launch_in_graph: microseconds of an empty kernel, back to back and inside a CUDA graph;
    on a CPU both are those of the smallest operator.
    """

    copy: float
    flops: dict[str, float]
    launch: float
    launch_in_graph: float

    def text(self) -> str:
        """In words, with units."""
        rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in self.flops.items())
        launch = f"launch {self.launch:.3g} us, {self.launch_in_graph:.3g} us in a graph"
        return f"copy {self.copy / 1e9:.4g} GB/s, {rates}, {launch}"

    def floor(self, nbytes: float, flops: float, dtype: str) -> tuple[float, str]:
        """The least time in microseconds, and what sets it: memory, math or launch."""
        rate = self.flops.get(dtype, min(self.flops.values()))
        times = {
            "memory": nbytes / self.copy * 1e6,
            "math": flops / rate * 1e6,
            "launch": self.launch_in_graph,
        }
        bound = max(times, key=times.__getitem__)
        return times[bound], bound


def measure_ceilings(device: torch.device | str, dtypes: Iterable[torch.dtype]) -> Ceilings:
    """Measures the ceilings of a device for matrix products in these dtypes."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    x = torch.randn((1 << 28) if cuda else (1 << 25), device=device)
    y = torch.empty_like(x)
    timing = measure({"copy": [lambda: y.copy_(x)]}, device)["copy"]
    copy = 2 * x.nbytes / timing.p50 * 1e6
    side = 8192 if cuda else 1024
    flops = {}
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for dtype in dtypes:
            a = torch.randn(side, side, device=device).to(dtype)
            timing = measure({"product": [lambda a=a: a @ a]}, device)["product"]  # type: ignore[misc]
            flops[name_of(dtype)] = 2 * side**3 / timing.p50 * 1e6
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    if cuda and HAS_TRITON:
        timing = measure({"launch": [lambda: _empty_kernel[(1,)]()] * 20}, device)["launch"]
    else:
        one = torch.zeros(1, device=device)
        timing = measure({"launch": [lambda: one.add_(1)] * 20}, device)["launch"]
    inside = timing.p50 if timing.graph is None else timing.graph
    return Ceilings(copy, flops, timing.wall, inside)


def name_of(dtype: torch.dtype) -> str:
    """float32 of torch.float32."""
    return str(dtype).removeprefix("torch.")


def environment(device: torch.device | str, commit_name: str = "unknown") -> dict[str, Any]:
    """What a file of results must say about where it comes from.

    commit_name stands for the commit where git cannot tell.
    """
    device = torch.device(device)
    found: dict[str, Any] = {
        "device": device_name(device),
        "commit": commit(commit_name),
        "date": time.strftime("%Y-%m-%d"),
        "time": time.strftime("%H:%M:%S"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else "not installed",
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "fp_fusion": os.environ.get("TRITON_DEFAULT_FP_FUSION", "default"),
    }
    if device.type == "cuda":
        found |= {
            "cuda": torch.version.cuda,
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "clocks": clocks(),
        }
    return found


def clocks() -> str:
    """Driver, clocks, power, temperature and reasons for throttling, as nvidia-smi has them."""
    command = ["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"
    return "; ".join(shown.split("\n")).strip("; ")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def commit(unknown: str = "unknown") -> str:
    """Short hash of the commit, "+" where tracked files differ from it; `unknown` without git."""

    def git(*args: str) -> str:
        run = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--untracked-files=no", ":!docs", ":!benchmarks/results"
        )
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return unknown


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
