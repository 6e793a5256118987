"""Cases of the ops of diffusion, at the shapes of known models."""

from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor

import cgkernels
from benchmarks.opcase import Inputs, OpCase, Provider, normal, numbers, passes
from benchmarks.timing import Call
from cgkernels.samplers import make_schedule, make_table
from cgm.sampling.langevin import langevin_table


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


def _noise_inputs(shape, dtype, generator, device):
    rows = shape[0]
    return {
        "x0": normal(shape, dtype, generator, device),
        "table": make_schedule("linear").training_table().to(device),
        "t": torch.randint(1000, (rows,), generator=generator).to(device),
        "target": "v",
        **numbers(generator, device, rows),
    }


def _coefficients(x, table, t):
    return (c.view(-1, *(1,) * (x.dim() - 1)) for c in table[t].to(x.dtype).unbind(1))


def _plain_add_noise(x0, table, t, target, seed, index):
    alpha, sigma = _coefficients(x0, table, t)
    z = torch.randn_like(x0)
    return alpha * x0 + sigma * z, alpha * z - sigma * x0


def _diffusers_noise() -> dict[str, Provider]:
    def build(sets: Sequence[Inputs]) -> list[Call]:
        import diffusers

        scheduler = diffusers.DDPMScheduler()

        def add(x0, t, **rest):
            z = torch.randn_like(x0)
            return scheduler.add_noise(x0, z, t), scheduler.get_velocity(x0, z, t)

        return [partial(add, **inputs) for inputs in sets]

    return {"diffusers": Provider(build, needs="diffusers")}


def _loss_inputs(shape, dtype, generator, device, *, backward=False):
    pred = normal(shape, dtype, generator, device).requires_grad_(backward)
    return {"pred": pred, **_noise_inputs(shape, dtype, generator, device)}


def _plain_loss(pred, x0, table, t, target, seed, index):
    """As trainers write it, with the noise that was drawn for the network's input kept: z again."""
    alpha, sigma = _coefficients(x0, table, t)
    goal = alpha * torch.randn_like(x0) - sigma * x0
    return (pred - goal).float().square().flatten(1).mean(1)


def _gradient(loss, inputs):
    return loss.detach(), *torch.autograd.grad(loss.sum(), inputs["pred"])


def _noise_only_inputs(shape, dtype, generator, device):
    return {"like": torch.empty(shape, dtype=dtype, device=device)} | numbers(
        generator, device, shape[0]
    )


def _noise(like, seed, index):
    return cgkernels.philox_normal(tuple(like.shape), seed=seed, index=index, dtype=like.dtype)


CASES: dict[str, list[OpCase]] = {
    "guided_step": [
        OpCase("ddim", partial(_step_inputs, "ddim"), _step, _plain_step, passes(4, 13),
               peers=partial(_diffusers_step, "ddim")),
        OpCase("ddpm", partial(_step_inputs, "ddpm"), _step, _plain_step, passes(4, 21),
               peers=partial(_diffusers_step, "ddpm")),
        OpCase("langevin", _langevin_inputs, _langevin, _plain_langevin, passes(3, 16)),
        OpCase("in place, dpmpp_2m", partial(_step_inputs, "dpmpp_2m", in_place=True),
               _step_in_place, _plain_step_in_place, passes(7, 15)),
    ],
    "add_noise": [
        OpCase("v", _noise_inputs, cgkernels.add_noise, _plain_add_noise, passes(3, 12),
               peers=_diffusers_noise),
    ],
    "diffusion_loss": [
        OpCase("v", _loss_inputs, cgkernels.diffusion_loss, _plain_loss, passes(2, 12)),
        OpCase("v, forward and backward", partial(_loss_inputs, backward=True),
               cgkernels.diffusion_loss, _plain_loss, passes(3, 15), finish=_gradient),
    ],
    "philox_normal": [
        OpCase("", _noise_only_inputs, _noise, lambda like, **_: torch.randn_like(like),
               passes(1, 6)),
    ],
}  # fmt: skip
