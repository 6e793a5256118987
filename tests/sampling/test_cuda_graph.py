"""Graphs of steps: on the device of the model, whatever device is current, and under autocast."""

import contextlib
from unittest import mock

import pytest
import torch

from cgm.families import diffusion, flow
from cgm.families.diffusion import ConditionalDiffusion, DiffusionConfig
from cgm.families.flow import ConditionalFlow, FlowConfig
from cgm.model import make_model
from cgm.networks.patch_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from cgm.networks.transformer import Transformer, TransformerConfig
from cgm.sampling import decoding, langevin, patch_scorer
from cgm.sampling.cuda_graph import capture


class Cuda:
    """The part of torch.cuda that a capture calls, and on which device it does."""

    def __init__(self):
        self.device, self.stream, self.log = 0, mock.Mock(), []

    @contextlib.contextmanager
    def on(self, device):
        before, self.device = self.device, torch.device(device).index
        yield
        self.device = before

    @contextlib.contextmanager
    def within(self, stream):
        self.log.append(("stream", stream.device))
        yield

    @contextlib.contextmanager
    def graph(self, graph, stream):
        assert stream.device == self.device and stream is self.made
        self.log.append(("graph", self.device))
        yield

    def new_stream(self):
        self.made = mock.Mock(device=self.device)
        return self.made

    def patched(self):
        return mock.patch.multiple(
            torch.cuda, device=self.on, Stream=self.new_stream, stream=self.within,
            current_stream=lambda: mock.Mock(device=self.device), CUDAGraph=mock.Mock,
            graph=self.graph,
        )  # fmt: skip


@pytest.mark.parametrize("cached", [True, False])
def test_steps_are_captured_on_their_device_without_the_cache_of_autocast(cached):
    cuda, steps = Cuda(), []

    def step():
        steps.append((cuda.device, torch.is_autocast_cache_enabled()))

    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(cached)
    try:
        with cuda.patched():
            capture(step, torch.device("cuda", 1), 3)
        assert torch.is_autocast_cache_enabled() == cached
        assert steps == [(1, False)] * 4 and cuda.log == [("stream", 1), ("graph", 1)]
        with cuda.patched(), pytest.raises(ZeroDivisionError):
            capture(lambda: 1 // 0, torch.device("cuda", 1))
        assert torch.is_autocast_cache_enabled() == cached
    finally:
        torch.set_autocast_cache_enabled(before)


def _diffusion(device):
    config = DiffusionConfig(event_shape=(1, 4, 4), width=8, timesteps=10)
    model = make_model(ConditionalDiffusion, config).to(device)
    return lambda: model.sample(2, seed=0, steps=2)


def _flow(device):
    config = FlowConfig(event_shape=(1, 4, 4), levels=0)
    model = make_model(ConditionalFlow, config).to(device).eval()
    inputs = (torch.zeros((), dtype=torch.int64), torch.arange(2), torch.ones(()))
    return lambda: flow._Graph(model, None, tuple(t.to(device) for t in inputs))


def _decoding(device):
    config = TransformerConfig(vocabulary=8, length=16, layers=1, width=8, heads=1, hidden=8)
    network = Transformer(config).to(device).eval()
    return lambda: decoding.generate(
        network, torch.zeros(1, 2, dtype=torch.int64, device=device), 12
    )


def _langevin(device):
    start = torch.zeros(2, 3, device=device)
    options = {"steps": 2, "step_size": 0.1, "seed": 0, "graph": True}
    return lambda: langevin.langevin(lambda y: y.square().sum(1), start, **options)


def _scorer(device):
    config = PatchDiscriminatorConfig(in_channels=3, patch=16, width=4, norm="instance")
    network = PatchDiscriminator(config).to(device).eval()
    return lambda: patch_scorer.PatchScorer(network, torch.zeros(1, 3, 20, 20, device=device))


CALLERS = {diffusion: _diffusion, flow: _flow, decoding: _decoding, langevin: _langevin,
           patch_scorer: _scorer}  # fmt: skip
callers = pytest.mark.parametrize("module", CALLERS, ids=lambda m: m.__name__.split(".")[-1])


@callers
def test_all_who_capture_name_the_device_of_their_tensors(module, monkeypatch):
    run, devices = CALLERS[module]("cpu"), []

    def stand_in(step, device, count=1):
        devices.append(device)
        return step

    monkeypatch.setattr(module, "capture", stand_in)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    run()
    assert devices == [torch.device("cpu")]


@pytest.mark.cuda
@callers
def test_on_the_second_device_while_the_first_is_current(module):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    found = []
    for number in (0, 1):
        with torch.cuda.device(0):
            made = CALLERS[module](f"cuda:{number}")()
            if isinstance(made, flow._Graph):
                made = made.run(made.inputs)
            if isinstance(made, torch.Tensor):
                found.append(made.cpu())
    assert all(torch.equal(t, found[0]) for t in found)


@pytest.mark.cuda
def test_a_graph_outlives_the_autocast_it_was_made_under():
    linear, x = torch.nn.Linear(64, 64).cuda(), torch.randn(4, 64, device="cuda")
    out = torch.empty(4, 64, device="cuda")

    def step():
        out.copy_(linear(x))

    with torch.autocast("cuda", torch.bfloat16):
        replay = capture(step, x.device)
        expected = linear(x).float()
    others = [torch.full((64, 64), 7.0, device="cuda", dtype=torch.bfloat16) for _ in range(64)]
    replay()
    assert torch.equal(out, expected) and len(others) == 64
