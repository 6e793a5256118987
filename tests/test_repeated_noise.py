"""What must change from draw to draw is asked for, or a warning says once that it did not."""

import inspect
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import cgkernels
from cgkernels import add_noise, checks, diffusion_loss, random
from tests.families.test_diffusion import KINDS, images, model

TABLE = torch.tensor([[0.8, 0.6], [0.6, 0.8]])


@pytest.fixture(autouse=True)
def unsaid(monkeypatch):
    """As in a program that has just begun."""
    monkeypatch.setattr(checks, "_seen", {})


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(
    ("function", "changes"),
    [
        (cgkernels.sample_logits, "position"), (cgkernels.sample_and_kl, "step"),
        (cgkernels.philox_normal, "step"), (random.normal, "step"), (random.uniform, "step"),
        (random.exponential, "step"), (add_noise, "seed"), (diffusion_loss, "seed"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_what_must_change_has_no_default(function, changes):
    assert inspect.signature(function).parameters[changes].default is inspect.Parameter.empty


def batches(steps):
    for _ in range(steps):
        yield torch.randn(2, 3), torch.randint(2, (2,))


def train(steps, seed_of, **rows):
    weight = torch.ones(3, requires_grad=True)
    for step, (x0, t) in enumerate(batches(steps)):
        noise = {"table": TABLE, "t": t, "seed": seed_of(step), **rows}
        x_t, _ = add_noise(x0, **noise)
        diffusion_loss(weight * x_t, x0, **noise).sum().backward()
        with torch.no_grad():
            weight -= 0.1 * weight.grad


def test_a_loop_with_one_seed_is_told_once():
    with pytest.warns(UserWarning, match="add_noise draws the same .* seed=step, or index") as told:
        train(4, lambda step: 0)
    assert len(told) == 1 and told[0].filename == __file__


def test_so_is_a_loop_that_adds_its_noise_elsewhere():
    weight = torch.ones(3, requires_grad=True)
    with pytest.warns(UserWarning, match="diffusion_loss draws the same noise"):
        for x0, _ in batches(2):
            diffusion_loss(weight * x0, x0, table=TABLE, t=0, seed=5).sum().backward()


@pytest.mark.usefixtures("silent")
def test_a_loop_that_changes_its_noise_is_not():
    train(3, lambda step: step)
    train(3, lambda step: torch.tensor(0))  # a device's seed is not looked at
    train(1, lambda step: 0)
    for epoch in range(3):
        train(1, lambda step: 0, index=torch.arange(2) + 2**32 * epoch)


@pytest.mark.usefixtures("silent")
def test_other_repetitions_are_not():
    """Comparisons, validation, a forward made again in the backward, traces."""
    x0, t = torch.randn(2, 3), torch.tensor([0, 1])
    for target in ("epsilon", "v"):
        add_noise(x0, table=TABLE, t=t, seed=0, target=target)
    for level in range(2):
        add_noise(x0, table=TABLE, t=level, seed=0)
    with torch.no_grad():
        train_of = [add_noise(x0, table=TABLE, t=t.clone(), seed=0) for _ in range(2)]
    assert torch.equal(train_of[0][0], train_of[1][0])

    def step(x):
        return add_noise(x, table=TABLE, t=t.clone(), seed=0)[0].square()

    checkpoint(step, x0.clone().requires_grad_(), use_reentrant=False).sum().backward()

    checks._seen.clear()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    compiled(x0)
    compiled(x0 + 1)


def test_the_loss_of_a_model_tells_it_where_weights_changed():
    diffusion, y = model(KINDS["none"]), images(2)
    optimizer = torch.optim.SGD(diffusion.parameters(), lr=0.1)

    def step(seed, **rows):
        diffusion.loss(y, seed=seed, **rows)["total"].mean().backward()
        optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            step(seed)
        for epoch in range(2):
            step(7, index=torch.arange(2) + 2**32 * epoch)
        for _ in range(2):
            diffusion.loss(y, seed=9)
    with pytest.warns(UserWarning, match=r"\.loss draws the same noise again: seed is 9") as told:
        for _ in range(3):
            step(9)
    assert len(told) == 1 and told[0].filename == __file__
