"""The timer: how long calls take, side by side, on a GPU or on a CPU.

Three quantities are kept apart: the time of the device, the time until the call returns to the
host, and the time of calls back to back. On CUDA the device time is read from a pair of events for
each call; a kernel that spins in front lets the host queue everything first, so that no launch gap
falls between the two. Inputs rotate, so that a call does not find its own in the cache, and the
ways to compute something take turns (A B B A), so that a clock that sags slows all of them.
"""

import contextlib
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.autograd import profiler_legacy

Call = Callable[[], object]

ROUNDS = 5
_LEAST, _MOST = 6, 400  # samples in a round, as time allows
_HOST_CALLS = 20
_SPIN_LIMIT = 2000.0  # us: a longer call would fill the queue of launches behind a spinning kernel
_CACHES = 5  # inputs of a rotation hold this many times the L2 cache
_CPU_SETS = 4
_SAME = 0.05  # a change of the median by less is none
_VALUE_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


@dataclass(frozen=True)
class Timing:
    """Times of one call in microseconds.

    p20, p50, p80: quantiles of n samples of the device time (on a CPU: of the time of the call).
    low, high: lowest and highest of the medians of the rounds. host: until the call returned (on a
    CPU: what the call spent outside of operators). wall: one of many calls back to back. graph: one
    call inside a CUDA graph, None where there is none, and then graph_error says why.
    launch_bound: the host needs longer than the device (on a CPU: longer outside of operators than
    in them). syncs: how often one call waits for the device (on a CPU: operators that would).
    peak: bytes that one call allocates beyond its inputs, None on a CPU.
    """

    p20: float
    p50: float
    p80: float
    n: int
    low: float
    high: float
    host: float
    wall: float
    graph: float | None
    graph_error: str
    launch_bound: bool
    syncs: int
    peak: int | None

    @property
    def noise(self) -> float:
        """Spread of the samples as a share of their median."""
        return (self.p80 - self.p20) / self.p50


def measure(
    calls: Mapping[str, Sequence[Call]],
    device: torch.device | str,
    *,
    seconds: float = 0.3,
    rounds: int = ROUNDS,
) -> dict[str, Timing]:
    """Times every way to compute something, interleaved.

    Args:
        calls: for each way by name the same call on each of the rotating inputs (`input_sets` says
            how many). A call enqueues on the current stream and returns.
        device: cpu, or the CUDA device that the calls work on.
        seconds: to spend on each way, beside warm-up and one call a round, which it always gets.
        rounds: of interleaved blocks of samples.

    Whatever a call raises is raised.
    """
    device = torch.device(device)
    clock = _CudaClock(device) if device.type == "cuda" else _CpuClock()
    block: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for name, of_sets in calls.items():
        clock.samples(of_sets, len(of_sets), 0)  # compiles, allocates
        estimate = statistics.median(clock.samples(of_sets, 1, 0))
        fitting = math.ceil(seconds * 1e6 / rounds / max(estimate, 0.1))
        block[name] = min(_MOST, max(_LEAST, fitting) if estimate < 1e5 else max(1, fitting))
        clock.samples(of_sets, max(1, block[name] // 5), 0)  # clocks and temperature settle
    medians: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            drawn = clock.samples(calls[name], block[name], number * block[name])
            samples[name] += drawn
            medians[name].append(statistics.median(drawn))
    timings = {}
    for name, of_sets in calls.items():
        ordered = sorted(samples[name])
        p20, p50, p80 = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))
        host, wall, launch_bound, syncs = clock.host(of_sets, p50)
        graph, graph_error = clock.graph(of_sets, seconds)
        timings[name] = Timing(
            p20, p50, p80, len(ordered), min(medians[name]), max(medians[name]), host, wall,
            graph, graph_error, launch_bound, syncs, clock.peak(of_sets[0]),
        )  # fmt: skip
    return timings


def input_sets(nbytes: int, device: torch.device | str) -> int:
    """How many sets of inputs of this size calls must rotate through."""
    device = torch.device(device)
    if device.type != "cuda":
        return _CPU_SETS
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    fitting = torch.cuda.mem_get_info(device)[0] // 4 // max(1, nbytes)
    return max(1, min(math.ceil(_CACHES * cache / max(1, nbytes)), fitting, 64))


def verdict(before: tuple[float, float, float], after: tuple[float, float, float]) -> str:
    """SAME, FASTER, SLOWER or AMBIGUOUS, of two (p50, low, high) of `Timing`.

    A change counts where it is above 5 % and the ranges of the rounds' medians are disjoint.
    """
    change = after[0] / before[0] - 1
    if abs(change) <= _SAME:
        return "SAME"
    if after[1] <= before[2] and before[1] <= after[2]:
        return "AMBIGUOUS"
    return "FASTER" if change < 0 else "SLOWER"


# Synchronizations ---------------------------------------------------------------------------------
def cuda_syncs(call: Call) -> int:
    """What PyTorch reports (reads of values, copies to the host), and explicit waits."""
    found = 0

    def count(*args: object, **kwargs: object) -> None:
        nonlocal found
        found += 1

    waits = (torch.cuda, torch.cuda.Stream, torch.cuda.Event)
    before = torch.cuda.get_sync_debug_mode()
    with contextlib.ExitStack() as stack:
        for owner in waits:
            stack.enter_context(mock.patch.object(owner, "synchronize", count))
        reported = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        stack.callback(torch.cuda.set_sync_debug_mode, before)
        torch.cuda.set_sync_debug_mode("warn")
        call()
    return found + sum("synchronizing CUDA operation" in str(w.message) for w in reported)


def _would_sync(event: Any) -> bool:
    """Whether this event of a CPU profile is an operator that needs values on the host."""
    namespace, _, name = event.name.partition("::")
    if namespace != "aten" or (event.cpu_parent and _would_sync(event.cpu_parent)):
        return False
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, o) for o in packet.overloads()] if packet else []
    return any(tag in o.tags for o in overloads for tag in _VALUE_TAGS)


# Clocks -------------------------------------------------------------------------------------------
class _CpuClock:
    """A call is done when it returns."""

    def samples(self, calls: Sequence[Call], n: int, first: int) -> list[float]:
        """Microseconds of n calls, which rotate from the first on."""
        times = []
        for number in range(first, first + n):
            call = calls[number % len(calls)]
            start = time.perf_counter_ns()
            call()
            times.append((time.perf_counter_ns() - start) / 1e3)
        return times

    def host(self, calls: Sequence[Call], p50: float) -> tuple[float, float, bool, int]:
        with profiler_legacy.profile() as profile:  # the newer one writes to the terminal
            start = time.perf_counter_ns()
            calls[0]()
            took = (time.perf_counter_ns() - start) / 1e3
        events = profile.function_events
        inside = sum(event.cpu_time_total for event in events if event.cpu_parent is None)
        outside = max(0.0, 1 - inside / took)  # a share, since the profiler slows all of it
        return outside * p50, p50, outside > 0.5, sum(map(_would_sync, events))

    def graph(self, calls: Sequence[Call], seconds: float) -> tuple[None, str]:
        return None, "no CUDA"

    def peak(self, call: Call) -> None:
        return None


class _CudaClock:
    """Pairs of events; one synchronization, after a block of samples."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rate = torch.cuda.get_device_properties(device).clock_rate  # kHz

    def samples(self, calls: Sequence[Call], n: int, first: int) -> list[float]:
        """Microseconds of device time of n calls, which rotate from the first on."""
        torch.cuda.synchronize(self.device)
        start = time.perf_counter_ns()
        calls[first % len(calls)]()
        host = (time.perf_counter_ns() - start) / 1e3
        cycles = int((2 * host + 20) * 1e-3 * self.rate) if host < _SPIN_LIMIT else 0
        starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(n)] for _ in range(2))
        for number in range(n):
            if cycles:
                torch.cuda._sleep(cycles)
            starts[number].record()
            calls[(first + number) % len(calls)]()
            ends[number].record()
        torch.cuda.synchronize(self.device)
        return [s.elapsed_time(e) * 1e3 for s, e in zip(starts, ends, strict=True)]

    def host(self, calls: Sequence[Call], p50: float) -> tuple[float, float, bool, int]:
        """Until the call returns; of calls back to back; whether the host is slower; waits."""
        torch.cuda.synchronize(self.device)
        times = []
        begin = time.perf_counter_ns()
        for number in range(_HOST_CALLS):
            start = time.perf_counter_ns()
            calls[number % len(calls)]()
            times.append((time.perf_counter_ns() - start) / 1e3)
        torch.cuda.synchronize(self.device)
        wall = (time.perf_counter_ns() - begin) / 1e3 / _HOST_CALLS
        host = statistics.median(times)
        return host, wall, host > p50, cuda_syncs(calls[0])

    def graph(self, calls: Sequence[Call], seconds: float) -> tuple[float | None, str]:
        """Time of a call in a graph of all the rotating calls; why not, where that fails."""
        side = torch.cuda.Stream(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                calls[0]()
            torch.cuda.current_stream(self.device).wait_stream(side)
            with torch.cuda.graph(graph, stream=side):  # else that of another device, perhaps
                kept = [call() for call in calls]
        except Exception as error:  # whatever cannot be captured: a wait, a copy to the host
            torch.cuda.synchronize(self.device)
            return None, f"{type(error).__name__}: {str(error).splitlines()[0]}"
        estimate = statistics.median(self.samples([graph.replay], 3, 0))
        n = max(5, min(_MOST, math.ceil(seconds * 1e6 / max(estimate, 1.0))))
        replayed = statistics.median(self.samples([graph.replay], n, 0)) / len(calls)
        del kept
        return replayed, ""

    def peak(self, call: Call) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before
