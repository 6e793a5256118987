"""Cases of models that draw samples: the shipped ones, and for growth untrained ones."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.case import COMPILED, Case, Extent, Inputs, Provider
from benchmarks.harness.ceilings import Call
from benchmarks.harness.records import OURS
from benchmarks.models.generation import decoding_cost
from cgkernels.testing import assert_within_budget, float32_normals, plain_and_modeled
from cgm.checkpoints import drawable_names, load_model, read_config, sampling_preset, shipped
from cgm.evaluation.execution import compiled_copy, conditions, difference_of, model_call
from cgm.families.autoregressive import AutoregressiveConfig, ConditionalTransformer
from cgm.families.diffusion import ConditionalDiffusion, DiffusionConfig
from cgm.model import Model, make_model

_ROWS_JUDGED = 16  # of a model's samples: each depends on its seed and index alone


@dataclass(frozen=True)
class Batch:
    """How many samples are drawn at once."""

    rows: int
    what: str
    cpu: bool = False


BATCHES = {
    "few": Batch(4, "a few samples", cpu=True),
    "demo": Batch(20, "a batch of the demo"),
    "many": Batch(512, "a batch that fills the GPU"),
}


def _model_case(
    suite: str, name: str, variant: str, size: str, label: str, rows: int, rank: int,
    make: Callable[[torch.device], Any], solver: dict[str, Any], extent: Extent | None = None,
) -> Case:  # fmt: skip
    model = make(torch.device("cpu"))

    def inputs(seed: int, device: torch.device) -> Inputs:
        model = make(device)
        return {"model": model, "cond": conditions(model, rows, seed), "rows": rows, "seed": seed}

    def build(way: str, sets: Sequence[Inputs]) -> list[Call]:
        return [model_call(way=way, **given, **solver) for given in sets]

    def compiled(mode: str, sets: Sequence[Inputs]) -> list[Call]:
        twin = compiled_copy(sets[0]["model"], mode)
        return build("compiled", [{**given, "model": twin} for given in sets])

    def gate(sets: Sequence[Inputs]) -> None:
        for given in sets:
            _judge_model(given["model"], given["cond"], rows, given["seed"], solver)

    providers = {
        OURS: Provider(partial(build, "fused")),
        "eager": Provider(partial(build, "plain")),
    }
    for mode, provider in COMPILED.items():
        providers[provider] = Provider(partial(compiled, mode), cuda=mode != "default")
    nbytes, flops = _model_cost(model, rows, solver)
    return Case(
        suite, name, variant, size, label, torch.float32, inputs, gate,
        providers | _PEER_LOOPS.get(model.family, lambda solver: {})(solver),
        nbytes=nbytes, flops=flops, items=rows,
        source=type(model).__module__, rank=rank, extent=extent, rotate=False,
    )  # fmt: skip


@cache
def _shipped_model(name: str, device: torch.device) -> Any:
    return load_model(shipped(name), device)


def _model_cost(model: Model, rows: int, solver: dict[str, Any]) -> tuple[int, int]:
    """Bytes that must be moved and operations that must be done to draw so many samples."""
    values = math.prod(model.config.event_shape)
    if isinstance(model, ConditionalTransformer):
        prefix = model.config.prefix_length
        return decoding_cost(model.transformer.config, rows, prefix, values, 4)
    weights = sum(p.nbytes for p in model.parameters())
    flops = _flops_of_a_sample(model, tuple(sorted(solver.items())))
    return weights + 4 * rows * values, rows * flops


@cache
def _flops_of_a_sample(model: Model, solver: tuple[tuple[str, Any], ...]) -> int:
    """Operations of the matrix products and convolutions, counted by drawing a sample.

    Of a sampler in steps they are linear in these: two short runs tell.
    """

    def counted(**options: Any) -> int:
        draw = model_call(model, "plain", conditions(model, 1), rows=1, **dict(solver) | options)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            draw()
        return counter.get_total_flops()

    if "steps" not in model.sampling_options():
        return counted()
    assert model.sampling_config is not None  # it has options
    chosen = model.sampling_config(**dict(solver))
    few, more = counted(steps=2), counted(steps=3)
    return few + (chosen.steps - 2) * (more - few)


def _judge_model(
    model: Model, cond: Tensor | None, rows: int, seed: int, solver: dict[str, Any]
) -> None:
    """The first samples of ours against the same model in float64: a sample is alone in its row."""
    judged = min(rows, _ROWS_JUDGED)
    first = None if cond is None else cond[:judged]
    if model.discrete:  # of as few values as can be, since each takes a step
        channels, height, width = model.config.event_shape
        shape = (1 if cond is None else rows, channels, height - 1, width)
        solver = solver | {"given": torch.zeros(shape)}
    ours = model_call(model, "fused", cond, rows=rows, seed=seed, **solver)()[:judged].cpu()
    if model.discrete and cond is not None:
        solver["given"] = solver["given"][:judged]
    wide = copy.deepcopy(model).cpu().double()
    wide_cond = None if first is None else first.cpu()
    if wide_cond is not None and wide_cond.is_floating_point():
        wide_cond = wide_cond.double()
    exact = model_call(wide, "plain", wide_cond, rows=judged, seed=seed, **solver)()
    if model.discrete:
        difference = difference_of(model, ours, exact)
        assert difference == 0, f"samples differ from those in float64 by {difference:.3g}"
        return
    with float32_normals():
        plain, modeled = plain_and_modeled(
            model_call(model, "plain", first, rows=judged, seed=seed, **solver)
        )
    assert_within_budget(ours, plain.cpu(), exact, modeled.cpu())


def _diffusers_loop(solver: dict[str, Any]) -> dict[str, Provider]:
    """The loop of a diffusers pipeline around our U-Net: its scheduler, guidance by a double batch.

    For DPM-Solver++ 2M and class conditions, which is what the shipped model is drawn with.
    """

    def build(sets: Sequence[Inputs]) -> list[Call]:
        import diffusers

        def draw(model, cond, rows, seed):
            device, levels = cond.device, model.schedule.alphas_cumprod
            scheduler = diffusers.DPMSolverMultistepScheduler(
                trained_betas=1 - levels / numpy.append(1.0, levels[:-1]),
                prediction_type="v_prediction",
                timestep_spacing="trailing",
            )
            scheduler.set_timesteps(solver["steps"], device=device)
            generator = torch.Generator(device).manual_seed(seed)
            x = torch.randn(rows, *model.config.event_shape, generator=generator, device=device)
            unet, null = model.unet, torch.full_like(cond, model.config.num_classes)
            classes = unet.class_film(torch.cat([null, cond]))
            for t in scheduler.timesteps:
                film = unet.time_film(t[None]) + classes
                uncond, guided = unet(torch.cat([x, x]), film).chunk(2)
                e = uncond + solver["guidance"] * (guided - uncond)
                x = scheduler.step(e, t, x, return_dict=False)[0]
            return x

        return [partial(torch.no_grad()(draw), **given) for given in sets]

    fits = solver.get("sampler") == "dpmpp_2m"
    return {"diffusers": Provider(build, needs="diffusers")} if fits else {}


_PEER_LOOPS: dict[str, Callable[[dict[str, Any]], dict[str, Provider]]] = {
    "diffusion": _diffusers_loop
}


# Cases --------------------------------------------------------------------------------------------
def shipped_cases(device: torch.device) -> Iterator[Case]:
    """Every shipped model that draws, in batches that a device is large enough for."""
    sizes = [name for name, batch in BATCHES.items() if device.type == "cuda" or batch.cpu]
    for name in drawable_names():
        make, solver = partial(_shipped_model, name), sampling_preset(shipped(name))
        if device.type == "cpu" and make(device).discrete:
            continue  # a call takes seconds; `cgm bench` times it, and here a decoder's tokens are
        for rank, size in enumerate(sizes):
            batch = BATCHES[size]
            yield _model_case(
                "models", name, "", size, f"{batch.what}, {batch.rows}", batch.rows, rank,
                make, solver,
            )  # fmt: skip


def growth_cases(device: torch.device) -> Iterator[Case]:
    """Sweeps over batches, steps and pixels: nothing may grow faster than its work does."""
    cuda = device.type == "cuda"
    for name in drawable_names():
        make, solver = partial(_shipped_model, name), sampling_preset(shipped(name))
        if read_config(shipped(name))["family"] == "autoregressive":
            continue  # a smaller one is below
        iterated = "steps" in solver
        few = solver | {"steps": 2} if iterated else solver
        for rows in (64, 128, 256, 512) if cuda else (4, 8, 16, 32):
            yield _model_case(
                "growth", name, "", f"b{rows}", f"{rows} samples", rows, 0,
                make, few, Extent("batch", rows, 1.0),
            )  # fmt: skip
        for steps in () if not iterated else (8, 16, 32, 64) if cuda else (4, 8, 16, 32):
            yield _model_case(
                "growth", name, "", f"s{steps}", f"{steps} steps", 4, 0,
                make, solver | {"steps": steps}, Extent("steps", steps, 1.0),
            )  # fmt: skip
    for side in (32, 64, 128, 256) if cuda else (16, 32, 64, 128):
        # Attention of the lowest resolution is quadratic in the pixels, the rest is linear.
        yield _model_case(
            "growth", "untrained_diffusion", "", f"side{side}", f"(1, {side}, {side})", 2, 0,
            partial(_untrained, ConditionalDiffusion, DiffusionConfig(event_shape=(1, side, side))),
            {"sampler": "ddim", "steps": 2}, Extent("pixels", side**2, 2.0),
        )  # fmt: skip
    for side, rows in [(side, 2) for side in ((16, 32, 48, 64) if cuda else (6, 8, 12, 16))] + [
        (8, rows) for rows in ((64, 128, 256, 512) if cuda else (4, 8, 16, 32))
    ]:
        # A token a pixel, each of which sees all before it.
        by_rows = rows > 2
        yield _model_case(
            "growth", "untrained_autoregressive", "", f"b{rows}" if by_rows else f"side{side}",
            f"{rows} of (1, {side}, {side})", rows, 0,
            partial(
                _untrained, ConditionalTransformer,
                AutoregressiveConfig(event_shape=(1, side, side)),
            ),
            {}, Extent("batch", rows, 1.0) if by_rows else Extent("pixels", side**2, 2.0),
        )  # fmt: skip


@cache
def _untrained(model_class: type[Model], config: Any, device: torch.device) -> Any:
    return make_model(model_class, config).to(device).eval()
