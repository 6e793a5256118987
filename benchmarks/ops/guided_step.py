"""`guided_step`: what it is measured on, what it launches, how it is tuned."""

from collections.abc import Iterator, Sequence
from functools import cache, partial

import torch
from torch import Tensor

import cgkernels
from benchmarks.harness.case import Inputs, OpCase, Provider, passes
from benchmarks.harness.ceilings import Call
from benchmarks.harness.inputs import normal, numbers
from benchmarks.harness.tuning import ROWS
from cgkernels.ops.guided_step.launch import _launch_bwd, _launch_fwd, _launch_inplace
from cgkernels.samplers import make_schedule, make_table
from cgkernels.testing import Launch


@cache
def _step_table(sampler: str) -> Tensor:
    return make_table(sampler, make_schedule("scaled_linear"), steps=50, clip=(-1, 1)).table


def _step_inputs(sampler, shape, dtype, generator, device, *, in_place=False):
    """A state, and the outputs of a network for a doubled batch, in the middle of sampling."""
    made: Inputs = {
        "x": normal(shape, dtype, generator, device),
        "outputs": normal((2 * shape[0], *shape[1:]), dtype, generator, device),
        "table": _step_table(sampler).to(device, torch.float32),
        "step": torch.tensor(25, device=device),
        "scale": torch.tensor(7.5, device=device),
    }
    if sampler == "ddpm":
        made |= numbers(generator, device, shape[0])
    if in_place:
        made["twin"] = torch.empty_like(made["x"])
        made["h1"] = normal(shape, dtype, generator, device)
    return made


def _step(x, outputs, **options):
    return cgkernels.guided_step(x, outputs, **options)


def _step_in_place(x, outputs, **options):
    cgkernels.guided_step_(x, outputs, **options)
    return x, options["twin"], options["h1"]


def _plain_step(x, outputs, table, step, scale, seed=None, index=None):
    uncond, cond = outputs.chunk(2)
    a0, a1, b0, b1, _, _, b4, b5, low, high, _, _ = (
        table.index_select(0, step[None])[0].to(x.dtype).unbind()
    )
    e = uncond + scale.to(x.dtype) * (cond - uncond)
    x0 = torch.clamp(a0 * x + a1 * e, low, high)
    out = b0 * x + b1 * x0 + b4 * e
    return out if seed is None else out + b5 * torch.randn_like(x)


def _plain_step_in_place(x, outputs, table, step, scale, twin, h1):
    uncond, cond = outputs.chunk(2)
    a0, a1, b0, b1, b2, _, b4, _, low, high, _, _ = (
        table.index_select(0, step[None])[0].to(x.dtype).unbind()
    )
    e = uncond + scale.to(x.dtype) * (cond - uncond)
    x0 = torch.clamp(a0 * x + a1 * e, low, high)
    x.copy_(b0 * x + b1 * x0 + b2 * h1 + b4 * e)
    twin.copy_(x)
    h1.copy_(x0)
    return x, twin, h1


def _diffusers_step(sampler: str) -> dict[str, Provider]:
    def build(sets: Sequence[Inputs]) -> list[Call]:
        import diffusers

        kind = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}[sampler]
        scheduler = getattr(diffusers, kind)(
            beta_schedule="scaled_linear", beta_start=8.5e-4, beta_end=0.012, clip_sample=True
        )
        scheduler.set_timesteps(50, device=sets[0]["x"].device)
        t = scheduler.timesteps[25]

        def step(x, outputs, scale, **rest):
            uncond, cond = outputs.chunk(2)
            e = uncond + scale.to(x.dtype) * (cond - uncond)
            return scheduler.step(e, t, x, return_dict=False)[0]

        return [partial(step, **inputs) for inputs in sets]

    return {"diffusers": Provider(build, needs="diffusers")}


def _langevin_inputs(shape, dtype, generator, device):
    """A state and the gradient of its energy."""
    from cgm.sampling.langevin import langevin_table  # kernels are judged without cgm

    return {
        "x": normal(shape, dtype, generator, device),
        "force": normal(shape, dtype, generator, device),
        "table": langevin_table(40, 0.05, 0.002, 2.0).to(device, torch.float32),
        "step": torch.tensor(25, device=device),
        **numbers(generator, device, shape[0]),
    }


def _langevin(x, force, **options):
    return cgkernels.guided_step(x, force, **options)


def _plain_langevin(x, force, table, step, seed, index):
    _, a1, _, _, _, _, _, b5, low, high, _, _ = (
        table.index_select(0, step[None])[0].to(x.dtype).unbind()
    )
    return torch.clamp(x + a1 * force, low, high) + b5 * torch.randn_like(x)


CASES = [
    OpCase("ddim", partial(_step_inputs, "ddim"), _step, _plain_step, passes(4, 13),
           peers=partial(_diffusers_step, "ddim")),
    OpCase("ddpm", partial(_step_inputs, "ddpm"), _step, _plain_step, passes(4, 21),
           peers=partial(_diffusers_step, "ddpm")),
    OpCase("langevin", _langevin_inputs, _langevin, _plain_langevin, passes(3, 16)),
    OpCase("in place, dpmpp_2m", partial(_step_inputs, "dpmpp_2m", in_place=True),
           _step_in_place, _plain_step_in_place, passes(7, 15)),
]  # fmt: skip


# Launches -----------------------------------------------------------------------------------------
def launches() -> Iterator[Launch]:
    shape = (16, 4, 64, 64)
    step, scale, table, seed, index = meta_numbers(shape[0])

    def launch(x, c, u=None, v=None, h1=None, h2=None, noise=False, x0=False):
        rows = x.shape[0]
        s, i = (seed, index[:rows]) if noise else (None, None)
        args = (x, c, u, table, step[:rows], scale[:rows], v, h1, h2, s, i, x0)
        return partial(_launch_fwd, *args)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        t, last = _meta(shape, dtype), _meta(shape, dtype, channels_last=True)
        yield Launch(f"plain {dtype}", launch(t, t), 128)
        yield Launch(f"noise {dtype}", launch(t, t, noise=True), 128)
        yield Launch(f"guided, x0 {dtype}", launch(t, t, t, x0=True), 128)
        yield Launch(f"guided, noise {dtype}", launch(t, t, t, noise=True), 128)
        yield Launch(f"learned variance {dtype}", launch(t, t, t, v=t, noise=True), 128)
        yield Launch(f"history, x0 {dtype}", launch(t, t, t, h1=t, h2=t, x0=True), 128)
        yield Launch(f"channels_last {dtype}", launch(last, last, last, noise=True), 128)
    half, wide = _meta(shape, torch.bfloat16), _meta(shape, torch.float32)
    yield Launch("float32 state, bfloat16 network", launch(wide, half, half, noise=True), 128)
    huge = _meta((1, 4, 2**15, 2**15), torch.bfloat16)  # positions of 64 bits
    yield Launch("2^32 elements a row", launch(huge, huge, huge, noise=True), 128)
    small = _meta((16, 1, 5, 5), torch.float32)
    yield Launch("short rows", launch(small, small, small, noise=True))


def inplace_launches() -> Iterator[Launch]:
    shape = (16, 4, 64, 64)
    step, scale, table, seed, index = meta_numbers(shape[0])

    def launch(x, t, v=None, h=None, noise=False):
        s, i = (seed, index) if noise else (None, None)
        return partial(_launch_inplace, x, t, t, table, step, scale, v, h, h, s, i, x)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        t = _meta(shape, dtype)
        part = _meta(shape, dtype, extra_channels=4)
        last_part = _meta(shape, dtype, extra_channels=3, channels_last=True)
        yield Launch(f"twin {dtype}", launch(part, t, noise=True), 128)
        yield Launch(f"shift {dtype}", launch(part, t, h=t), 128)
        yield Launch(f"strided, everything {dtype}", launch(last_part, t, t, t, noise=True))


def bwd_launches() -> Iterator[Launch]:
    shape = (16, 4, 64, 64)
    step, scale, table, *_ = meta_numbers(shape[0])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        t, last = _meta(shape, dtype), _meta(shape, dtype, channels_last=True)
        for name, args, bits in (
            ("plain", (t, None, t, t, None, table, step, scale, None, None), 128),
            ("guided, history", (t, t, t, t, t, table, step, scale, t, t), 128),
            ("mixed layouts", (t, t, last, t, t, table, step, scale, None, None), 0),
        ):
            yield Launch(f"{name} {dtype}", partial(_launch_bwd, *args), bits)


def meta_numbers(rows):
    """step, scale, table, seed, index as the public function makes them."""
    step = torch.empty((), dtype=torch.int64, device="meta").expand(rows)
    scale = torch.empty((), device="meta").expand(rows)
    seed = torch.empty((), dtype=torch.int64, device="meta")
    index = torch.empty(rows, dtype=torch.int64, device="meta")
    return step, scale, torch.empty(50, 12, device="meta"), seed, index


def _meta(shape, dtype, *, channels_last=False, extra_channels=0):
    """A meta tensor, or the first channels of a wider buffer."""
    wide = (shape[0], shape[1] + extra_channels, *shape[2:])
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(wide, dtype=dtype, device="meta", memory_format=format)[:, : shape[1]]


LAUNCHES = {
    "guided_step_fwd": launches,
    "guided_step_bwd": bwd_launches,
    "guided_step_": inplace_launches,
}


# Tuning -------------------------------------------------------------------------------------------
TUNABLE = ROWS
