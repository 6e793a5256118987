"""Models across processes: two of them have the gradients of one with the whole batch."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from cgm.model import Model
from cgm.networks.layers import ActNorm
from tests.families.test_precision import lively

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)

ROWS, PROCESSES = 4, 2
# family, kind; the modules that are sharded each for itself (None: `fully_shard` cannot, as there
# are gradients within the loss)
FAMILIES = {
    ("diffusion", "class"): ["unet"],
    ("diffusion", "tokens"): ["unet.middle.block", "unet"],
    ("flow", "class"): ["levels.0.couplings.0", "levels.0"],
    ("gan", "class"): ["generator", "discriminator"],
    ("pix2pix", "image"): ["discriminator.net.3", "discriminator", "generator"],
    ("energy", "class"): None,
    ("gaussian_regression", "none"): [],
    ("vae", "class"): ["encoder", "decoder"],
}


def batch(kind: str) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(ROWS, 1, 8, 8, generator=generator) * 2 - 1
    cond = {
        "none": None,
        "class": torch.tensor([0, 2, 1, 1]),
        "image": y.flip(3),
        "tokens": torch.tensor([[0, 1, 2], [2, 2, 0], [1, 0, 1], [2, 1, 0]]),
    }
    return y, cond[kind]


def new(family: str, kind: str) -> Model:
    fields = {
        "gan": {"r1_weight": 0.0},  # a gradient of a gradient is beyond `fully_shard`
        "pix2pix": {"norm": "instance"},  # statistics of a batch would be those of a process
    }
    model = lively(family, kind, **fields.get(family, {})).train()
    if family == "energy":
        model.eval()  # its chains begin anew, as those of each process do
    return model


def gradients(call, model: nn.Module, kind: str, phases, rows: slice) -> dict[str, Tensor]:
    """By name, of the mean loss of these rows, for each phase in turn."""
    y, cond = batch(kind)
    found = {}
    index = torch.arange(ROWS)[rows]
    cond = None if cond is None else cond[rows]
    for phase in phases:
        model.zero_grad()
        loss = call(y[rows], cond=cond, seed=7, index=index, phase=phase)
        loss["total"].mean().backward()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            if gradient is not None:
                gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                found[f"{phase} {name}"] = gradient.clone()
    return found


def worker(rank: int, folder: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES
    )
    try:
        mesh = init_device_mesh("cpu", (PROCESSES,))
        size = ROWS // PROCESSES
        rows, found = slice(rank * size, (rank + 1) * size), {}
        for (family, kind), parts in FAMILIES.items():
            model = new(family, kind)
            several = len(model.phases) > 1
            whole = DistributedDataParallel(
                model, find_unused_parameters=several, broadcast_buffers=False
            )
            given = (model.phases, rows)
            found["parallel", family, kind] = gradients(whole, model, kind, *given)
            if family == "flow":
                found["first batch"] = {
                    n: p.detach().clone() for n, p in model.named_parameters() if ".norm." in n
                }
                start = model
            if parts is None:
                continue
            model = new(family, kind)
            if family == "flow":
                model.load_state_dict(start.state_dict())
            model.to(memory_format=torch.contiguous_format)  # which `fully_shard` asks for
            for part in parts:
                fully_shard(model.get_submodule(part), mesh=mesh)
            fully_shard(model, mesh=mesh)
            found["sharded", family, kind] = gradients(model, model, kind, *given)
        norm = ActNorm(3).train()
        norm(torch.arange(24.0).view(2, 3, 2, 2)[rank : rank + 1].square())
        found["actnorm"] = {n: p.detach() for n, p in norm.named_parameters()}
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("distributed")
    mp.spawn(worker, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize(
    ("way", "family", "kind"),
    [("parallel", *names) for names in FAMILIES]
    + [("sharded", *names) for names, parts in FAMILIES.items() if parts is not None],
)
def test_gradients_of_two_processes_are_those_of_the_whole_batch(found, way, family, kind):
    model = new(family, kind)
    expected = gradients(model, model, kind, model.phases, slice(0, ROWS))
    for of_rank in found:
        given = of_rank[way, family, kind]
        # Of a phase DDP and FSDP give zeros where one process has none at all.
        assert expected.keys() <= given.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(given[name], gradient, atol=1e-5, rtol=1e-3)


def test_the_first_batch_of_actnorm_is_that_of_all_processes(found):
    norm = ActNorm(3).train()
    x = torch.arange(24.0).view(2, 3, 2, 2).square()
    norm(x)
    for of_rank in found:
        for name, parameter in norm.named_parameters():
            torch.testing.assert_close(of_rank["actnorm"][name], parameter.detach())
    assert found[0]["first batch"].keys() == found[1]["first batch"].keys()
    for name, parameter in found[0]["first batch"].items():
        assert torch.equal(parameter, found[1]["first batch"][name])
