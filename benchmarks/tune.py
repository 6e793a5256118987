"""Which launch configuration is fastest on this GPU, for each shape that the function tells apart.

    python -m benchmarks.tune guided_step               one op
    python -m benchmarks.tune guided_step add_noise     ops that share a function, judged together

Ops take block size and warps from a pure function of sizes (`TUNABLES`). On each case of the
benchmarks every candidate stands in for what that function returns; candidates take turns in one
measurement. One that spills registers is dropped, and so is a winner that fails the float64 gate. A
win is claimed where a case is FASTER and none is SLOWER (`cgkernels.timing.verdict`), else what is
there is kept. The last lines are ready to be pasted into the function.
"""

import argparse
import contextlib
import dataclasses
import inspect
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, product
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from benchmarks.cases import select
from benchmarks.opcase import Case
from benchmarks.records import OURS
from benchmarks.timing import Call, measure, verdict
from cgkernels import rows
from cgkernels.ops import (
    affine_coupling,
    conv2d_stats,
    embed_tokens,
    pair_conv2d,
    patch_head_loss,
)
from cgkernels.ops.decode_attention import launch as decode_attention_launch
from cgkernels.ops.instance_norm_act import launch as instance_norm_act_launch
from cgkernels.ops.norm_linear import launch as norm_linear_launch
from cgkernels.ops.sample_logits import launch as sample_logits_launch

Config = dict[str, Any]

_SECONDS = 0.05  # of timing for each candidate on each case


# What is swept ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Tunable:
    """A function that launches take their configuration from, called as module.name(...).

    Its first argument is a size, the others tell kinds of launches apart. candidates gives what it
    may return for these arguments.
    """

    module: ModuleType
    name: str
    candidates: Callable[..., Iterator[Config]]

    @property
    def function(self) -> Callable[..., Config]:
        return getattr(self.module, self.name)

    @contextlib.contextmanager
    def switched(self) -> Iterator["Switch"]:
        """Inside, launches ask the switch."""
        switch = Switch(self.function)
        with mock.patch.object(self.module, self.name, switch):
            yield switch


@dataclass
class Switch:
    """Stands in for a function: returns the chosen configuration, else what the function does."""

    function: Callable[..., Config]
    config: Config | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)  # arguments, while none is chosen

    def __call__(self, *args: Any, **kwargs: Any) -> Config:
        if self.config is not None:
            return dict(self.config)
        self.asked.append(dict(inspect.signature(self.function).bind(*args, **kwargs).arguments))
        return self.function(*args, **kwargs)

    def call(self, config: Config, call: Call) -> object:
        """The call under a configuration."""
        self.config = config
        return call()


def _row_blocks(numel: int, dense: bool) -> Iterator[Config]:
    """2 to 32 elements a thread; of blocks larger than a row only the smallest."""
    for block in (256, 512, 1024, 2048, 4096):
        if block > 256 and block >= 2 * numel:
            return
        for warps in (1, 2, 4, 8):
            if 2 <= block // (32 * warps) <= 32:
                yield {"BLOCK": block, "num_warps": warps}


def _row_splits(numel: int, dense: bool) -> Iterator[Config]:
    """As `_row_blocks`, of which a program takes one to eight, and at most 1024 programs a row."""
    for config in _row_blocks(numel, dense):
        block = config["BLOCK"]
        for blocks in (1, 2, 4, 8):
            if blocks == 1 or block * blocks < 2 * numel:
                yield {"SPLIT": block * max(blocks, math.ceil(numel / (1024 * block))), **config}


def _vector_blocks(width: int) -> Iterator[Config]:
    """As elementwise kernels have, of one vector."""
    yield from _row_blocks(width, dense=True)


def _early(sizes: Config, too: bool) -> Iterator[Config]:
    """Programs that start when the launch before ends; of some sizes also those that do so early.

    Before sm_90 the latter do not compile, and are dropped.
    """
    for pdl in (False, True) if too else (False,):
        yield {**sizes, "PDL": pdl}


def _splits(head_size: int, itemsize: int) -> Iterator[Config]:
    """Splits of 16 to 256 KiB of keys and values, in blocks of 2 to 32 KiB of each."""
    token = itemsize << (head_size - 1).bit_length()
    for split, block in product((64, 128, 256, 512), (16, 32, 64, 128)):
        fits = block < split and 2 << 10 <= block * token <= 32 << 10
        if fits and 16 << 10 <= 2 * split * token <= 256 << 10:
            for stages, warps in product((2, 3), (4, 8)):
                sizes = {"SPLIT": split, "BLOCK": block, "STAGES": stages, "num_warps": warps}
                yield from _early(sizes, warps == 4)


_ROWS = Tunable(rows, "row_block", _row_blocks)


def _linear_tiles(
    channels: int, features: int, dtype: torch.dtype, activation: str | None
) -> Iterator[Config]:
    """Tiles of 16 to 64 rows of the weight; of the features all, or parts of 256 or more."""
    few = [n for n in (1, 2, 4, 8) if n == 1 or features >= 256 * n]
    for block_n, block_k, warps, splits in product((16, 32, 64), (64, 128), (1, 2, 4), few):
        if block_n * block_k > 4096:
            continue
        split = block_k * math.ceil(features / (splits * block_k))
        sizes = {
            "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": split,
            "SPLITS": math.ceil(features / split), "STAGES": 4, "num_warps": warps,
            "maxnreg": None,
        }  # fmt: skip
        yield from _early(sizes, warps == 2)


def _pixel_tiles(pixels: int, dtype: torch.dtype) -> Iterator[Config]:
    """Tiles of 16 to 128 pixels, and parts of 32 to 128 channels of at most 256 bytes a pixel."""
    for block_m, block_c, stages in product((16, 32, 64, 128), (32, 64, 128), (3, 4, 6)):
        if block_c * dtype.itemsize <= 256:
            warps = 4 if block_m >= 64 else 1
            yield {"BLOCK_M": block_m, "BLOCK_C": block_c, "STAGES": stages, "num_warps": warps}


def _window_tiles(features: int, outputs: int, dtype: torch.dtype) -> Iterator[Config]:
    """Tiles of 2048 to 8192 numbers; never more than four warps (see the function)."""
    sizes = product((32, 64, 128), (16, 32, 64), (16, 32), (1, 2, 3), (2, 4))
    for block_m, block_n, block_k, stages, warps in sizes:
        few = block_n > 16 and block_n >= 2 * outputs
        if few or not 2048 <= block_m * block_n <= 8192 or block_k >= 2 * max(16, features):
            continue
        yield {
            "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_stages": stages,
            "num_warps": warps,
        }  # fmt: skip


def _convolution_tiles(
    pixels: int, channels: int, features: int, dtype: torch.dtype
) -> Iterator[Config]:
    """Up to 64 sums a thread of four warps: eight are wrong (triton#1254), and more sums spill."""
    widest = min(128, max(16, 2 ** (channels - 1).bit_length()))
    deepest = max(16, 2 ** (features - 1).bit_length())
    for block_m, block_n, block_k, stages in product(
        (64, 128), (16, 32, 64, 128), (16, 32, 64), (2, 3, 4)
    ):
        fits = widest <= 4 * block_n <= 4 * widest and block_m * block_n <= 8192
        shared = (block_m + block_n) * block_k * stages * dtype.itemsize
        if fits and block_k <= deepest and shared <= 100 << 10:  # so that two fit a multiprocessor
            yield {
                "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "STAGES": stages,
                "num_warps": 4,
                "maxnreg": 192 if dtype.itemsize == 4 and features % 16 == 0 else None,
            }  # fmt: skip


def _vocabulary_walks(vocabulary: int) -> Iterator[Config]:
    """A row in registers where 32 of each thread's hold it; pieces of 4 to 16 tokens a thread."""
    whole = max(128, 2 ** (vocabulary - 1).bit_length())
    for warps, tokens in product((1, 2, 4, 8, 16, 32), (4, 8, 16)):
        piece = 32 * warps * tokens
        if piece > whole:
            continue
        for held in (True, False) if whole <= min(16384, 32 * 32 * warps) else (False,):
            yield {
                "HELD": held, "BLOCK": whole if held else piece, "PIECE": piece,
                "num_warps": warps, "maxnreg": min(255, 65536 // (32 * warps)),
            }  # fmt: skip


def _norm_tiles(pixels: int, channels: int, channels_last: bool) -> Iterator[Config]:
    """Tiles of 1024 to 4096 elements; few pixels whole, and all in 256 parts or a quarter of them.

    In channels_last a tile is 8 to 64 channels wide, else one.
    """
    widths = [c for c in (8, 16, 32, 64) if c == 8 or c < 2 * channels] if channels_last else [1]
    for tile, block_c, warps in product((1024, 2048, 4096), widths, (2, 4, 8)):
        block_p = tile // block_c
        least = max(256, math.ceil(pixels / 256))
        splits = {block_p * math.ceil(min(n, pixels) / block_p) for n in (least, 4 * least)}
        for split, whole in product(sorted(splits), (True, False)):
            fits = split >= pixels or pixels <= 4096 if whole else split < pixels
            if fits and 4 <= tile // (32 * warps) <= 16 and not (whole and split < max(splits)):
                yield {
                    "WHOLE": whole, "split": split, "BLOCK_P": block_p, "BLOCK_C": block_c,
                    "num_warps": warps,
                }  # fmt: skip


TUNABLES = {
    "guided_step": _ROWS,
    "add_noise": _ROWS,
    "diffusion_loss": _ROWS,
    "philox_normal": _ROWS,
    "sample_and_kl": _ROWS,
    "instance_norm_act": Tunable(instance_norm_act_launch, "_launch_config", _norm_tiles),
    "norm_linear": Tunable(norm_linear_launch, "_launch_config", _linear_tiles),
    "pair_conv2d": Tunable(pair_conv2d, "_launch_config", _window_tiles),
    "patch_head_loss": Tunable(patch_head_loss, "_launch_config", _pixel_tiles),
    "conv2d_stats": Tunable(conv2d_stats, "_launch_config", _convolution_tiles),
    "affine_coupling": Tunable(affine_coupling, "_launch_config", _row_splits),
    "sample_logits": Tunable(sample_logits_launch, "_launch_config", _vocabulary_walks),
    "embed_tokens": Tunable(embed_tokens, "_launch_config", _vector_blocks),
    "decode_attention": Tunable(decode_attention_launch, "_launch_config", _splits),
}
"""For each op of the benchmarks."""


# Sweeps -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sweep:
    """One case under every candidate; configurations are keys as JSON.

    arguments: what the function was asked. present: its answer. times: (p50, low, high) of
    `cgkernels.timing.Timing`. dropped: why the other candidates were not timed.
    """

    op: str
    case: str
    arguments: dict[str, Any]
    itemsize: int
    present: str
    times: dict[str, tuple[float, float, float]]
    dropped: dict[str, str]

    def ratio(self, config: str) -> float:
        """How many times faster than the present one."""
        return self.times[self.present][0] / self.times[config][0]

    def verdict(self, config: str) -> str:
        return verdict(self.times[self.present], self.times[config])


def sweep(case: Case, device: torch.device, *, seconds: float = _SECONDS) -> Sweep:
    """Times a case under every candidate."""
    tunable = TUNABLES[case.name]
    calls = case.providers[OURS].build(case.sets(device))
    with tunable.switched() as switch:
        calls[0]()
        asked = [a for n, a in enumerate(switch.asked) if a not in switch.asked[:n]]
        if len(asked) != 1:
            raise ValueError(f"{case} must ask {tunable.name} for one shape, asked for {asked}")
        arguments, present = asked[0], switch(**asked[0])
    ways: dict[str, list[Call]] = {}
    dropped: dict[str, str] = {}
    with tunable.switched() as switch:
        for config in [present, *tunable.candidates(**arguments)]:
            key = json.dumps(config)
            try:
                spills = _spills(partial(switch.call, config, calls[0]))
            except Exception as error:  # of the compiler, of resources
                dropped[key] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            if spills and config != present:
                dropped[key] = f"spills {spills} registers"
                continue
            ways[key] = [partial(switch.call, config, call) for call in calls]
        timings = measure(ways, device, seconds=seconds)
    times = {key: (t.p50, t.low, t.high) for key, t in timings.items()}
    return Sweep(
        case.name, str(case), arguments, case.dtype.itemsize, json.dumps(present), times, dropped
    )


def _spills(call: Call) -> int:
    """The most registers that a kernel of this call spills, in words of local memory a thread."""
    from triton.runtime.jit import JITFunction

    launched = []
    run = JITFunction.run

    def recorded(*args: Any, **kwargs: Any) -> Any:
        launched.append(run(*args, **kwargs))
        return launched[-1]

    with mock.patch.object(JITFunction, "run", recorded):
        call()
    return max((kernel.n_spills for kernel in launched), default=0)


def passes(case: Case, device: torch.device, config: str) -> bool:
    """Whether ours is right under this configuration."""
    with TUNABLES[case.name].switched() as switch:
        switch.config = json.loads(config)
        try:
            case.gate([case.inputs(0, device)])
        except AssertionError:
            return False
    return True


# Winners ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Choice:
    """The configuration for one shape class, and how much faster it is on each of its cases."""

    size: int
    kind: tuple[tuple[str, Any], ...]  # the other arguments
    itemsize: int | None  # None: of any
    config: str
    ratios: tuple[float, ...]
    kept: bool


def choose(sweeps: Iterable[Sweep], right: Callable[[str, str], bool]) -> list[Choice]:
    """The winner of each class: cases whose arguments and size of dtype are equal.

    right(case, config) says whether a case passes its gate; asked for likely winners only.
    """
    classes: dict[tuple[Any, ...], list[Sweep]] = defaultdict(list)
    for found in sweeps:
        classes[(*found.arguments.items(), found.itemsize)].append(found)
    choices = []
    for ((_, size), *kind, itemsize), group in classes.items():
        present = group[0].present
        timed = [key for key in group[0].times if all(key in s.times for s in group)]
        said = {key: {s.verdict(key) for s in group} for key in timed}
        likely = [key for key in timed if "FASTER" in said[key] and "SLOWER" not in said[key]]
        likely.sort(key=lambda key: -_mean([s.ratio(key) for s in group]))
        winner = next((k for k in likely if all(right(s.case, k) for s in group)), present)
        ratios = tuple(s.ratio(winner) for s in group)
        choices.append(Choice(size, tuple(kind), itemsize, winner, ratios, winner == present))
    return sorted(choices, key=lambda choice: choice.size)


def lines(tunable: Tunable, choices: Sequence[Choice]) -> list[str]:
    """The winners as code: for each kind of launches the largest size of each configuration."""
    size, *_ = inspect.signature(tunable.function).parameters
    found = []
    for kind in dict.fromkeys(choice.kind for choice in choices):
        of_kind = [choice for choice in choices if choice.kind == kind]
        answers: dict[int, set[str]] = defaultdict(set)
        for choice in of_kind:
            answers[choice.size].add(choice.config)
        if all(len(configs) == 1 for configs in answers.values()):
            of_kind = [dataclasses.replace(choice, itemsize=None) for choice in of_kind]
        for itemsize in dict.fromkeys(choice.itemsize for choice in of_kind):
            alike = [choice for choice in of_kind if choice.itemsize == itemsize]
            for _, run in groupby(alike, key=lambda choice: (choice.config, choice.kept)):
                found.append(_line(size, list(run)))
    return found


def _line(size: str, run: list[Choice]) -> str:
    last = run[-1]
    conditions = [f"{size} <= {last.size}"]
    for name, value in last.kind:
        whether = {True: name, False: f"not {name}"}
        conditions.append(whether[value] if isinstance(value, bool) else f"{name} == {value!r}")
    if last.itemsize is not None:
        conditions.append(f"itemsize == {last.itemsize}")
    ratios = [ratio for choice in run for ratio in choice.ratios]
    gain, worst = (f"{r - 1:+.1%}" for r in (_mean(ratios), min(ratios)))
    why = "kept" if last.kept else f"speed {gain}, worst case {worst}"
    return f"if {' and '.join(conditions)}: return {last.config}  # {why}, cases: {len(ratios)}"


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


# Command ------------------------------------------------------------------------------------------
def chosen(device: torch.device, ops: Sequence[str] = ()) -> list[Case]:
    """The cases of these ops (default: all), the most important first; one dtype of each size."""
    found = select("ops", device, names=ops or list(TUNABLES), providers=[OURS])
    dtypes = {case.dtype.itemsize: case.dtype for case in reversed(found)}
    return [case for case in found if case.dtype == dtypes[case.dtype.itemsize]]


def winners(sweeps: Sequence[Sweep], cases: Sequence[Case], device: torch.device) -> Iterator[str]:
    """Lines of text: for each function that was swept, its ops and its winners."""
    by_name = {str(case): case for case in cases}
    for tunable in dict.fromkeys(TUNABLES[s.op] for s in sweeps):
        of_it = [s for s in sweeps if TUNABLES[s.op] == tunable]
        choices = choose(of_it, lambda case, config: passes(by_name[case], device, config))
        ops = ", ".join(dict.fromkeys(s.op for s in of_it))
        yield f"{tunable.module.__name__}.{tunable.name}, measured with {ops}:"
        yield from (f"    {line}" for line in lines(tunable, choices))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description="Sweep launch configurations on this GPU, and print the winners.",
    )
    parser.add_argument("ops", nargs="+", metavar="OP", help=f"of {', '.join(TUNABLES)}")
    parser.add_argument("--minutes", type=float, default=10.0, help="when to stop (default: 10)")
    options = parser.parse_args(arguments)
    for op in options.ops:
        if op not in TUNABLES:
            parser.error(f"OP must be of {', '.join(TUNABLES)}, got {op!r}")
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive, got {options.minutes}")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU, found none")
    device = torch.device("cuda")
    end, longest = time.monotonic() + 60 * options.minutes, 0.0
    cases = chosen(device, options.ops)
    sweeps: list[Sweep] = []
    for case in cases:
        start = time.monotonic()
        if start + longest > end:
            print(f"Out of time for {len(cases) - len(sweeps)} of {len(cases)} cases")
            break
        sweeps.append(sweep(case, device))
        longest = max(longest, time.monotonic() - start)
        print(f"{case}: {len(sweeps[-1].times)} timed, {len(sweeps[-1].dropped)} dropped")
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    for line in winners(sweeps, cases, device):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
