"""Cases of image-to-image networks at published sizes: scoring, a training step, a generator.

Plain PyTorch are the networks of `plain_networks` with the same weights, in both memory formats.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.case import COMPILED, Case, Inputs, Provider
from benchmarks.harness.ceilings import Call
from benchmarks.harness.records import OURS
from benchmarks.models.plain_networks import PlainDiscriminator, PlainResnet, PlainUNet
from cgkernels.testing import assert_within_budget, plain_and_modeled
from cgm.families.gan import Pix2Pix, Pix2PixConfig
from cgm.model import make_model
from cgm.networks.resnet_generator import ResnetGenerator, ResnetGeneratorConfig
from cgm.sampling.patch_scorer import PatchScorer

_LAST = torch.channels_last
_Network = TypeVar("_Network", bound=nn.Module)


@dataclass(frozen=True)
class Task:
    """What is computed of images of some side, and whether a CPU can bear it."""

    name: str
    rows: int
    side: int
    cpu: bool = False


TASKS = [
    Task("patch_scores", 1, 256, cpu=True),
    Task("patch_scores", 16, 256),
    Task("patch_scores", 64, 256),
    Task("patch_scores", 4, 64, cpu=True),
    Task("pix2pix_step", 1, 256, cpu=True),
    Task("pix2pix_step", 16, 256),
    Task("resnet_generator", 1, 64, cpu=True),
    Task("resnet_generator", 1, 256),
    Task("resnet_generator", 16, 256),
]


def image_to_image_cases(device: torch.device) -> Iterator[Case]:
    """Those that a device is large enough for."""
    for rank, task in enumerate(TASKS):
        if task.cpu or device.type == "cuda":
            yield _case(task, torch.bfloat16 if device.type == "cuda" else torch.float32, rank)


@cache
def _model(side: int) -> Pix2Pix:
    """pix2pix with instance norm, whose statistics need no batch; U-Net of 8 levels at 256."""
    shape = (3, side, side)
    config = Pix2PixConfig(
        event_shape=shape, cond_shape=shape, depth=side.bit_length() - 1, norm="instance",
        dropout=False, loss="lsgan",
    )  # fmt: skip
    model = make_model(Pix2Pix, config)
    assert isinstance(model, Pix2Pix)
    return model


@cache
def _resnet() -> ResnetGenerator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResnetGenerator(ResnetGeneratorConfig()).to(memory_format=_LAST)  # type: ignore[call-overload]


def _case(task: Task, dtype: torch.dtype, rank: int) -> Case:
    ours, plain, sources = _WAYS[task.name]

    def inputs(seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        shape = (task.rows, 3, task.side, task.side)
        images = (torch.rand(shape, generator=generator) * 2 - 1 for _ in range(2))
        x, y = (t.to(device, dtype).contiguous(memory_format=_LAST) for t in images)
        return {"x": x, "y": y}

    def build(way: Callable[..., Callable], options: dict, sets: Sequence[Inputs]) -> list[Call]:
        call = way(sets[0]["x"], **options)
        return [partial(call, **i) for i in sets]

    def of_plain(**options: Any) -> Callable[[Sequence[Inputs]], list[Call]]:
        return partial(build, plain, options)

    providers = {
        OURS: Provider(partial(build, ours, {})),
        "eager": Provider(of_plain(last=True)),
        "eager-nchw": Provider(of_plain(last=False)),
    }
    for mode, name in COMPILED.items():
        providers[name] = Provider(of_plain(last=True, mode=mode), cuda=mode != "default")
    example = torch.zeros(1, 3, task.side, task.side)
    with FlopCounterMode(display=False) as counter:
        plain(example, last=False)(example, example)
    return Case(
        "models", task.name, "", f"b{task.rows}_{task.side}",
        f"{task.rows} images of {task.side} x {task.side}", dtype, inputs,
        partial(_gate, ours, plain), providers, nbytes=_weights(task) * dtype.itemsize,
        flops=task.rows * counter.get_total_flops(), items=task.rows, source=sources, rank=rank,
        rotate=False,
    )  # fmt: skip


def our_call(task: Task, x: Tensor) -> Tensor:
    """Ours once, of pairs of an image with itself."""
    ours, *_ = _WAYS[task.name]
    return ours(x)(x=x, y=x)


def _weights(task: Task) -> int:
    """Numbers that must be read once."""
    model = _model(task.side) if task.name == "pix2pix_step" else None
    network = _resnet() if task.name == "resnet_generator" else _model(256).discriminator
    return sum(p.numel() for p in (network if model is None else model).parameters())


def _gate(ours: Callable, plain: Callable, sets: Sequence[Inputs]) -> None:
    """Ours on the first image against the plain networks in float64."""
    one = {name: t[:1] for name, t in sets[0].items()}
    wide = {name: t.cpu().double() for name, t in one.items()}
    got = ours(one["x"])(**one).cpu()
    same, modeled = (t.cpu() for t in plain_and_modeled(lambda: plain(one["x"])(**one)))
    assert_within_budget(got, same, plain(wide["x"])(**wide), modeled)


def _like(network: _Network, x: Tensor, last: bool = True) -> _Network:
    """A copy on the device and in the dtype of x."""
    network = copy.deepcopy(network).to(x.device, x.dtype)
    return network.to(memory_format=_LAST if last else torch.contiguous_format)  # type: ignore[call-overload]


def _given(network: nn.Module, source: nn.Module, x: Tensor, last: bool) -> nn.Module:
    """A plain network with the weights of ours."""
    network.load_state_dict(source.state_dict())
    return _like(network, x, last)


# Scoring ------------------------------------------------------------------------------------------
def _our_scores(x: Tensor) -> Callable:
    network: Any = _like(_model(256).discriminator, x).eval()
    return PatchScorer(network, x, x)


def _plain_scores(x: Tensor, last: bool = True, mode: str = "") -> Callable:
    network = PlainDiscriminator(3, "instance", 64, 6)
    judge: Callable = _given(network, _model(256).discriminator, x, last).eval()
    judge = torch.compile(judge, mode=mode, dynamic=False) if mode else judge

    @torch.no_grad()
    def score(x: Tensor, y: Tensor) -> Tensor:
        return judge(_in_format(torch.cat([x, y], 1), last))

    return score


# Training -----------------------------------------------------------------------------------------
def _our_step(x: Tensor) -> Callable:
    """Both phases, forward and backward, without the optimizer, which is the same for all."""
    model = _like(_model(x.shape[-1]), x).train()
    parameters = {phase: model.phase_parameters(phase) for phase in model.phases}

    def step(x: Tensor, y: Tensor) -> Tensor:
        shared: dict[str, Tensor] = {}
        for phase in model.phases:
            values = model.loss(y, cond=x, phase=phase, seed=0, shared=shared)
            values["total"].mean().backward(inputs=parameters[phase])
        return _first_gradients(*parameters.values())

    return step


def _plain_step(x: Tensor, last: bool = True, mode: str = "") -> Callable:
    ours = _model(x.shape[-1])
    unet = PlainUNet(ours.config.depth, "instance", 64)
    generator: Any = _given(unet, ours.generator, x, last).train()
    discriminator = PlainDiscriminator(3, "instance", 64, 6)
    judge: Any = _given(discriminator, ours.discriminator, x, last).train()
    parameters = list(judge.parameters()), list(generator.parameters())
    if mode:
        generator, judge = (torch.compile(n, mode=mode, dynamic=False) for n in (generator, judge))

    def step(x: Tensor, y: Tensor) -> Tensor:
        x, y = _in_format(x, last), _in_format(y, last)
        fake = generator(x)
        real, drawn = judge(torch.cat([x, y], 1)), judge(torch.cat([x, fake.detach()], 1))
        loss = ((real - 1).square().mean() + drawn.square().mean()) / 2
        loss.backward(inputs=parameters[0])
        drawn = judge(torch.cat([x, fake], 1))
        loss = (drawn - 1).square().mean() + 100 * F.l1_loss(fake, y)
        loss.backward(inputs=parameters[1])
        return _first_gradients(*parameters)

    return step


def _first_gradients(*groups: Sequence[nn.Parameter]) -> Tensor:
    """Of the first layer of each network; all gradients are dropped."""
    first = torch.cat([group[0].grad.flatten() for group in groups])  # type: ignore[union-attr]
    for parameter in (p for group in groups for p in group):
        parameter.grad = None
    return first


# Generator ----------------------------------------------------------------------------------------
def _our_images(x: Tensor) -> Callable:
    return _drawing(_like(_resnet(), x).eval(), True)


def _plain_images(x: Tensor, last: bool = True, mode: str = "") -> Callable:
    network: Any = _given(PlainResnet(9, "instance", 64), _resnet(), x, last).eval()
    return _drawing(torch.compile(network, mode=mode, dynamic=False) if mode else network, last)


def _drawing(network: Any, last: bool) -> Callable:
    @torch.no_grad()
    def draw(x: Tensor, y: Tensor) -> Tensor:
        return network(_in_format(x, last))

    return draw


def _in_format(x: Tensor, last: bool) -> Tensor:
    return x.contiguous(memory_format=_LAST if last else torch.contiguous_format)


_WAYS: dict[str, tuple[Callable, Callable, str]] = {
    "patch_scores": (_our_scores, _plain_scores, "cgm.sampling.patch_scorer"),
    "pix2pix_step": (_our_step, _plain_step, "cgm.families.gan"),
    "resnet_generator": (_our_images, _plain_images, "cgm.networks.resnet_generator"),
}
