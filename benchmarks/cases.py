"""What is measured: every op and every reference model, declared once for all doors.

A case is a call of ours on random inputs of a shape that a known model has, with the bytes that it
must move, the operations that it must do, and the other ways to compute the same. The cases of ops
have their own files (`diffusion.py`, `attention.py`, `decoding.py`, `normalisation.py`,
`convolution.py`, `patchgan.py`, `latents.py`, `flow.py`).

Plain PyTorch is what one would write without this library: noise comes from PyTorch's own
generator, whose draws depend on the batch and on the device, and which is cheaper than ours on a
CPU. That a sample depends on its seed and index alone is part of what ours is timed for.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cgkernels
from benchmarks import (
    attention,
    convolution,
    decoding,
    diffusion,
    flow,
    latents,
    normalisation,
    patchgan,
)
from benchmarks.generation import decoding_cost, generation_cases
from benchmarks.image_to_image import image_to_image_cases
from benchmarks.opcase import COMPILED, Case, Extent, Inputs, OpCase, Provider, Size
from benchmarks.records import OURS
from benchmarks.timing import Call, name_of
from cgkernels.testing import assert_within_budget, float32_normals, plain_and_modelled
from cgm.checkpoints import drawable_names, load_model, read_config, sampling_preset, shipped
from cgm.evaluation.execution import compiled_copy, conditions, difference_of, model_call
from cgm.families.autoregressive import AutoregressiveConfig, ConditionalTransformer
from cgm.families.diffusion import ConditionalDiffusion, DiffusionConfig
from cgm.model import Model, make_model

_ROWS_JUDGED = 16  # of a model's samples: each depends on its seed and index alone


# Ops ----------------------------------------------------------------------------------------------
OP_CASES: dict[str, list[OpCase]] = {
    **diffusion.CASES, **attention.CASES, **decoding.CASES, **normalisation.CASES,
    **convolution.CASES, **patchgan.CASES, **latents.CASES, **flow.CASES,
}  # fmt: skip


def _op_case(
    suite: str, name: str, op: OpCase, size: str, shape: tuple[int, ...], label: str,
    dtype: torch.dtype, rank: int, extent: Extent | None = None,
) -> Case:  # fmt: skip
    numel = math.prod(shape)
    nbytes, flops = op.cost(shape, dtype.itemsize)

    def inputs(seed: int, device: torch.device) -> Inputs:
        return op.make(shape, dtype, torch.Generator().manual_seed(seed), device)

    def build(function: Callable[..., Any], sets: Sequence[Inputs]) -> list[Call]:
        return [lambda i=i: op.finish(function(**i), i) for i in sets]  # type: ignore[misc]

    def compiled(mode: str, sets: Sequence[Inputs]) -> list[Call]:
        return build(torch.compile(op.plain, mode=mode, dynamic=False), sets)

    providers = {
        OURS: Provider(partial(build, op.ours)),
        "eager": Provider(partial(build, op.plain)),
    }
    for mode, provider in COMPILED.items():
        providers[provider] = Provider(partial(compiled, mode), cuda=mode != "default")
    return Case(
        suite, name, op.variant, size, label, dtype, inputs,
        partial(_gate, op, inputs), providers | op.peers(),
        nbytes=nbytes, flops=flops, items=numel,
        source=f"cgkernels.ops.{name}", rank=rank, extent=extent,
    )  # fmt: skip


def _gate(op: OpCase, make: Callable, sets: Sequence[Inputs]) -> None:
    """Ours on these inputs against the truth, all sets together where one gives few values."""
    results: list[tuple[list[Tensor], ...]] = []
    sets, extra = list(sets), 0
    while True:
        for given in sets:
            ours = _outputs(op, op.ours, _fresh(given))
            with float32_normals():
                plain, modelled = plain_and_modelled(partial(_plain_outputs, op, given))
            exact = _outputs(op, _plainly(op.exact or op.ours), _fresh(given, torch.float64))
            results.append((ours, plain, exact, modelled))
        fewest = min(sum(r[0][i].numel() for r in results) for i in range(len(results[0][0])))
        if fewest >= op.values:
            break
        extra += 1
        sets = [make(10_000 + extra, _device_of(sets[0]))]
    for of_output in range(len(results[0][0])):
        ours, plain, exact, modelled = ([r[i][of_output] for r in results] for i in range(4))
        if ours[0].is_floating_point():
            assert_within_budget(ours, plain, exact, modelled)
        else:
            _assert_equal(ours, exact)


def _assert_equal(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Whole numbers, such as tokens, have no budget."""
    wrong = sum(int((a.cpu() != b).sum()) for a, b in zip(ours, exact, strict=True))
    if wrong:
        raise AssertionError(f"{wrong} of {sum(t.numel() for t in ours)} whole numbers are wrong")


def _outputs(op: OpCase, function: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    result = op.finish(function(**inputs), inputs)
    return [t.detach() for t in (result if isinstance(result, tuple) else (result,))]


def _plain_outputs(op: OpCase, inputs: Inputs) -> list[Tensor]:
    return _outputs(op, _plainly(op.ours), _fresh(inputs))


def _plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(**inputs: Any) -> Any:
        with cgkernels.reference():
            return function(**inputs)

    return call


def _fresh(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """Copies; in float64 on the CPU, where alone the references take it."""
    made = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            copy = value.detach().clone()
            if dtype is not None:
                copy = copy.cpu().to(dtype if copy.is_floating_point() else copy.dtype)
            value = copy.requires_grad_(value.requires_grad)
        made[name] = value
    return made


def _device_of(inputs: Inputs) -> torch.device:
    return next(v.device for v in inputs.values() if isinstance(v, Tensor))


# Models -------------------------------------------------------------------------------------------
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


def _model_cost(model: Any, rows: int, solver: dict[str, Any]) -> tuple[int, int]:
    """Bytes that must be moved and operations that must be done to draw so many samples."""
    values = math.prod(model.config.event_shape)
    if isinstance(model, ConditionalTransformer):
        prefix = model.config.prefix_length
        return decoding_cost(model.transformer.config, rows, prefix, values, 4)
    weights = sum(p.nbytes for p in model.parameters())
    flops = _flops_of_a_sample(model, tuple(sorted(solver.items())))
    return weights + 4 * rows * values, rows * flops


@cache
def _flops_of_a_sample(model: Any, solver: tuple[tuple[str, Any], ...]) -> int:
    """Operations of the matrix products and convolutions, counted by drawing a sample.

    Of a sampler in steps they are linear in these: two short runs tell.
    """

    def counted(**options: Any) -> int:
        draw = model_call(model, "plain", conditions(model, 1), rows=1, **dict(solver) | options)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            draw()
        return counter.get_total_flops()

    chosen = model.sampling_config(**dict(solver))
    if not hasattr(chosen, "steps"):
        return counted()
    few, more = counted(steps=2), counted(steps=3)
    return few + (chosen.steps - 2) * (more - few)


def _judge_model(
    model: Any, cond: Tensor | None, rows: int, seed: int, solver: dict[str, Any]
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
        plain, modelled = plain_and_modelled(
            model_call(model, "plain", first, rows=judged, seed=seed, **solver)
        )
    assert_within_budget(ours, plain.cpu(), exact, modelled.cpu())


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


# Growth -------------------------------------------------------------------------------------------
def _growth_cases(device: torch.device) -> Iterator[Case]:
    """Sweeps over sizes, of ours alone: nothing may grow faster than its work does."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    for name, variants in OP_CASES.items():
        for op in variants:
            sweep = op.sweep
            for shape in sweep.shapes:
                axis, larger = sweep.axis, sweep.larger if cuda else 1
                shape = (*shape[:axis], shape[axis] * larger, *shape[axis + 1 :])
                value = math.prod(shape) if sweep.extent == "elements" else shape[axis]
                extent = Extent(sweep.extent, value, 1.0)
                size = f"{sweep.extent}{value}"
                yield _op_case("growth", name, op, size, shape, str(shape), dtype, 0, extent)
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


# All of them --------------------------------------------------------------------------------------
SUITES = ("ops", "models", "growth")


def cases(suite: str, device: torch.device) -> list[Case]:
    """The cases of a suite for a device, the most important first; "all" is ops and models."""
    if suite == "growth":
        return [
            dataclasses.replace(case, providers={OURS: case.providers[OURS]})
            for case in _growth_cases(device)
        ]
    found = []
    if suite in ("ops", "all"):
        found += list(_op_cases(device))
    if suite in ("models", "all"):
        found += list(_model_cases(device))
    return sorted(found, key=lambda case: case.rank)


def _op_cases(device: torch.device) -> Iterator[Case]:
    cuda = device.type == "cuda"
    dtypes = (
        (torch.bfloat16, torch.float32, torch.float16) if cuda else (torch.float32, torch.bfloat16)
    )
    for (name, variants), (j, dtype) in product(OP_CASES.items(), enumerate(dtypes)):
        for op in variants:
            sizes = {name: size for name, size in op.sizes.items() if cuda or size.cpu}
            for i, (size, of) in enumerate(sorted(sizes.items(), key=_looked_at_first)):
                yield _op_case("ops", name, op, size, of.shape, of.label, dtype, i + 2 * j)


def _looked_at_first(named: tuple[str, Size]) -> bool:
    """On CUDA a size between launch and bandwidth, and a large one, come before the others."""
    return not named[1].first


def _model_cases(device: torch.device) -> Iterator[Case]:
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
    yield from generation_cases(device)
    yield from image_to_image_cases(device)


def select(
    suite: str,
    device: torch.device,
    *,
    names: Sequence[str] = (),
    sizes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    providers: Sequence[str] = (),
) -> list[Case]:
    """The cases that fit every list that is not empty, with these providers.

    Raises:
        ValueError: a suite, name, size, dtype or provider that none of the cases has.
    """
    if suite not in (*SUITES, "all"):
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, all, got {suite!r}")
    found = cases(suite, device)
    for what, asked, value in (
        ("names", names, lambda case: [case.name]),
        ("sizes", sizes, lambda case: [case.size]),
        ("dtypes", dtypes, lambda case: [name_of(case.dtype)]),
        ("providers", providers, lambda case: list(case.providers)),
    ):
        known = list(dict.fromkeys(v for case in found for v in value(case)))
        for name in asked:
            if name not in known:
                raise ValueError(
                    f"{what} must be of {', '.join(known)} for suite {suite} on {device.type}, "
                    f"got {name!r}"
                )
    found = [
        case
        for case in found
        if (not names or case.name in names)
        and (not sizes or case.size in sizes)
        and (not dtypes or name_of(case.dtype) in dtypes)
    ]
    if not found:
        raise ValueError(f"no case of suite {suite} has these names, sizes and dtypes together")
    if providers:
        found = [
            dataclasses.replace(
                case, providers={n: p for n, p in case.providers.items() if n in providers}
            )
            for case in found
        ]
    return found
