"""The launches that models make, recorded from their `loss` and `sample` without a GPU.

Of every family, at the sizes of the benchmarks: the shipped models with the options that they are
drawn with and with those that change a launch, in a training step, prompts that a transformer
continues, and the image-to-image networks. `python -m benchmarks.offline` compiles them.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.generation import DECODES, Decode
from benchmarks.models.image_to_image import TASKS, our_call
from benchmarks.models.recording import Key, launch_of, recording
from benchmarks.models.shipped import BATCHES
from cgkernels.testing import Launch
from cgm.checkpoints import drawable_names, read_config, sampling_preset, shipped
from cgm.evaluation.execution import conditions
from cgm.families.cyclegan import CycleGAN, CycleGANConfig
from cgm.model import Model, config_class, config_from_dict, family_class, make_model
from cgm.networks.layers import ActNorm
from cgm.networks.transformer import Transformer
from cgm.sampling.decoding import generate

_META = torch.device("meta")
_TRAINED = 64  # rows of a training step
# Of a sampler in steps, which launch the same: the first has no history, the last draws no noise.
_STEPS = 3


def recorded_launches(names: Iterable[str] = ()) -> Iterator[tuple[str, Launch]]:
    """(op, launch), each once, under the label of the model that makes it first.

    names: of `RUNS`; default all.
    """
    seen: set[Key] = set()
    for name in names or RUNS:
        for what, run in RUNS[name]():
            with recording() as calls:
                run()
            for number, (key, args) in enumerate(calls.items(), 1):
                if key not in seen:
                    seen.add(key)
                    yield launch_of(key, args, f"{name}, {what}, {number}:")


Runs = Iterator[tuple[str, Callable[[], object]]]


# Shipped models -----------------------------------------------------------------------------------
def _shipped(name: str) -> Runs:
    info = read_config(shipped(name))
    model_class = family_class(info["family"])
    config = config_from_dict(config_class(model_class), info["config"])
    model = make_model(model_class, config).to(_META)
    options = set(model.sampling_options())
    preset = sampling_preset(shipped(name))
    preset |= {n: v for n, v in (("steps", _STEPS), ("graph", False)) if n in options}
    for batch in BATCHES.values():
        yield f"b{batch.rows}", partial(_draw, model, batch.rows, preset)
    rows = BATCHES["demo"].rows
    changes: tuple[tuple[str, dict[str, Any]], ...] = (
        ("guided", {"guidance": 2.0}),
        ("plain", {"guidance": 1.0}),
        ("int8", {"int8": True}),
        ("top-k, top-p", {"top_k": 8, "top_p": 0.9, "min_p": 0.01}),
        *((n, {"sampler": n}) for n in ("ddpm", "ddim", "dpmpp_2m")),
    )
    for what, change in changes:
        if change.keys() <= options and (what != "guided" or config.cond_dropout):
            yield f"{what} b{rows}", partial(_draw, model, rows, preset | change)
    if config.cond_kind != "none" and config.cond_dropout:
        plain = preset | {n: 1.0 for n in ("guidance",) if n in options}
        yield f"unconditional b{rows}", partial(_draw, model, rows, plain, given=False)
    yield f"loss b{_TRAINED}", partial(_train, model, _TRAINED)


def _draw(model: Model, rows: int, options: dict[str, Any], given: bool = True) -> Tensor:
    cond = conditions(model, rows) if given else None
    n = rows if cond is None else None
    # Indices of their own, on the device of the model.
    index = torch.arange(rows, device=_META)
    return model.eval().sample(n, cond=cond, index=index, **options)


def _train(model: Model, rows: int) -> None:
    """The phases of one step, forward and backward."""
    y = torch.zeros(rows, *model.config.event_shape, device=_META)
    cond = conditions(model.train(), rows)
    shared: dict[str, Any] = {"shared": {}} if len(model.phases) > 1 else {}
    seed, index = (torch.zeros(shape, dtype=torch.int64, device=_META) for shape in ((), rows))
    for module in model.modules():
        if isinstance(module, ActNorm):
            module.eval()  # as in all steps but the first, which looks at values
    for phase in model.phases:
        losses = model.loss(y, cond=cond, phase=phase, seed=seed, index=index, **shared)
        losses["total"].mean().backward(inputs=model.phase_parameters(phase))


def _cyclegan() -> Runs:
    model = make_model(CycleGAN, CycleGANConfig()).to(_META)
    yield "sample b1", partial(_draw, model, 1, {})
    yield "loss b1", partial(_train, model, 1)


# Prompts ------------------------------------------------------------------------------------------
def _decode(name: str) -> Runs:
    """A prompt each, and with the most rows one prompt that all share, rotary positions, int8."""
    decodes = [of for of in DECODES if of.name == name]
    for of in decodes:
        yield f"b{of.rows}", partial(_continue, of)
    most = max(decodes, key=lambda of: of.rows)
    rotary = dataclasses.replace(most.config, positions="rotary")
    yield f"one prompt b{most.rows}", partial(_continue, most, shared=True)
    turned = dataclasses.replace(most, config=rotary)
    yield f"rotary b{most.rows}", partial(_continue, turned)
    yield f"rotary, one prompt b{most.rows}", partial(_continue, turned, shared=True)
    yield f"int8 b{most.rows}", partial(_continue, most, shared=True, int8=True)


def _continue(of: Decode, shared: bool = False, **options: Any) -> Tensor:
    rows, n = (1, of.rows) if shared else (of.rows, None)
    with torch.device(_META):
        network = Transformer(of.config).to(torch.bfloat16).eval()
        prompt = torch.zeros(rows, of.prompt, dtype=torch.int64)
    return generate(network, prompt, of.length, n=n, temperature=0, graph=False, **options)


# Image-to-image networks --------------------------------------------------------------------------
def _image_to_image(name: str) -> Runs:
    for task in TASKS:
        if task.name == name:
            shape = (task.rows, 3, task.side, task.side)
            x = torch.empty(shape, dtype=torch.bfloat16, device=_META)
            x = x.contiguous(memory_format=torch.channels_last)
            yield f"b{task.rows} {task.side}", partial(our_call, task, x)


RUNS: dict[str, Callable[[], Runs]] = {
    **{name: partial(_shipped, name) for name in drawable_names()},
    "cyclegan": _cyclegan,
    **{of.name: partial(_decode, of.name) for of in DECODES},
    **{task.name: partial(_image_to_image, task.name) for task in TASKS},
}
"""What is recorded, by the name of the model: (what it does, a call on meta tensors)."""
