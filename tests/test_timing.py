"""The timer: what it says of calls whose times are known."""

import time

import pytest
import torch

from cgkernels import timing
from cgkernels.timing import input_sets, measure, verdict


def sleeper(seconds):
    return lambda: time.sleep(seconds)


def test_times_are_those_of_the_calls():
    found = measure({"short": [sleeper(0.002)], "long": [sleeper(0.006)]}, "cpu", seconds=0.05)
    short, long = found["short"], found["long"]
    assert 2000 <= short.p20 <= short.p50 <= short.p80 and long.p50 >= 6000
    assert 2000 <= short.low <= short.high and short.n >= timing.ROUNDS
    assert 2 < long.p50 / short.p50 < 4
    assert verdict((long.p50, long.low, long.high), (short.p50, short.low, short.high)) == "FASTER"


def test_ways_take_turns_and_inputs_rotate():
    log = []
    calls = {
        way: [lambda way=way, i=i: log.append((way, i)) or time.sleep(1e-3) for i in range(3)]
        for way in "ab"
    }
    measure(calls, "cpu", seconds=0.03, rounds=2)
    ways = [way for way, _ in log]
    changes = "".join(b for a, b in zip([None, *ways], ways, strict=False) if a != b)
    assert changes.startswith("ababa"), changes  # warmed up alone; A B, then B A
    for way in "ab":
        numbers = [i for w, i in log if w == way]
        assert {0, 1, 2} == set(numbers)


def test_a_call_that_waits_on_the_host_is_seen():
    x = torch.randn(1000)

    def waits():
        time.sleep(0.003)
        return x.sum().item() + len(x.nonzero())

    def works():
        return [torch.mm(x[None] * x[:, None], x[None] * x[:, None]) for _ in range(2)]

    found = measure({"waits": [waits], "works": [works]}, "cpu", seconds=0.02)
    assert found["waits"].launch_bound and found["waits"].syncs == 2
    assert found["waits"].host > 2000
    assert not found["works"].launch_bound and found["works"].syncs == 0
    assert found["works"].host < 0.5 * found["works"].p50


@pytest.mark.cuda
def test_a_call_that_waits_on_the_host_is_seen_on_cuda():
    x = torch.randn(1 << 20, device="cuda")

    def waits():
        time.sleep(0.003)
        torch.cuda.synchronize()
        return x.sum().item()

    def works():
        return [x.double().sin() for _ in range(5)]

    found = measure({"waits": [waits], "works": [works]}, "cuda", seconds=0.02)
    assert found["waits"].launch_bound and found["waits"].syncs == 2
    assert found["waits"].graph is None and found["waits"].graph_error
    assert not found["works"].launch_bound and found["works"].syncs == 0
    assert found["works"].graph and found["works"].graph < 1.5 * found["works"].p50
    assert found["works"].peak >= 8 * x.numel()


@pytest.mark.cuda
def test_inputs_exceed_the_cache_of_a_gpu():
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    assert input_sets(cache // 2, "cuda") == 10
    assert input_sets(10 * cache, "cuda") == 1


def test_what_a_call_raises_is_raised():
    def fails():
        raise RuntimeError("no such luck")

    with pytest.raises(RuntimeError, match="no such luck"):
        measure({"fails": [fails]}, "cpu")


@pytest.mark.parametrize(
    "before, after, said",
    [
        ((100, 99, 101), (104, 103.5, 104.5), "SAME"),
        ((100, 99, 101), (120, 118, 122), "SLOWER"),
        ((100, 99, 101), (80, 79, 81), "FASTER"),
        ((100, 90, 115), (110, 108, 112), "AMBIGUOUS"),
        ((100, 99, 108), (110, 108, 112), "AMBIGUOUS"),
    ],
)
def test_verdicts(before, after, said):
    assert verdict(before, after) == said
