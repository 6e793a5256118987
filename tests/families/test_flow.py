"""Conditional flows: exact densities and inverses, samples, and what a short training learns."""

import math

import pytest
import torch
from torch import Tensor

import cgkernels
from cgkernels.random import normal, uniform
from cgm.checkpoints import load_model, save_model
from cgm.data import Dataset
from cgm.evaluation.likelihood import bits_per_dimension
from cgm.families.flow import ChannelMap, ConditionalFlow, FlowConfig
from cgm.model import make_model
from cgm.training import TrainingConfig, train
from tests.support import assert_equal

SIZES = {"steps": (1, 2), "width": 8, "depth": 2}
KINDS = {
    "none": {"event_shape": (1, 8, 12)},
    "class": {"event_shape": (1, 8, 12), "cond_kind": "class", "num_classes": 3},
    "image": {"event_shape": (2, 8, 12), "cond_kind": "image", "cond_shape": (3, 8, 12)},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def flow(kind: str = "none", **changes) -> ConditionalFlow:
    return spread(make_model(ConditionalFlow, FlowConfig(**{**SIZES, **KINDS[kind], **changes})))


def spread(model: ConditionalFlow) -> ConditionalFlow:
    """In evaluation, with weights that leave the identity at which couplings start."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter += 0.05 * normal((1, *parameter.shape), seed=i, step=0, stream=6)[0]
    return model.eval()


def images(rows: int, model: ConditionalFlow) -> Tensor:
    return 2 * uniform((rows, *model.config.event_shape), seed=5, step=0, stream=6) - 1


def conditions(kind: str, rows: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "class":
        return torch.arange(rows) % 3
    return normal((rows, 3, 8, 12), seed=9, step=0, stream=6)


def taken(cond: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if cond is None else cond[rows]


# Exactness ----------------------------------------------------------------------------------------
EXACT = {
    "images": {"steps": (2, 2)},
    "odd sides": {"event_shape": (1, 5, 7), "steps": (3, 2)},
    "one channel stays": {"event_shape": (3, 6, 4), "steps": (1, 2, 2)},
    "points": {"event_shape": (2, 1, 1), "steps": (4,)},
    "additive": {"steps": (2, 2), "additive": True},
}


@pytest.mark.parametrize("case", EXACT)
def test_decoding_is_the_inverse_of_encoding(case):
    model = flow(**EXACT[case])
    y = images(4, model)
    z, logdet = model.encode(y)
    assert z.shape == (4, model.dimensions) and logdet.shape == (4,)
    assert (model.decode(z) - y).abs().max() < 1e-5
    assert (model.encode(model.decode(z))[0] - z).abs().max() < 1e-4
    assert not torch.allclose(z, y.flatten(1), atol=0.1)


@pytest.mark.parametrize("case", EXACT)
def test_the_determinant_is_that_of_the_jacobian(case):
    changes = {"event_shape": (1, 4, 4), **EXACT[case]}
    model = flow(**changes).double()
    y = images(1, model).double()
    planes = model._planes(None, 1)
    run = lambda y: model._encode(y, planes)[0]  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(run, y).view(model.dimensions, -1)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1][None], model.encode(y)[1])


def test_log_prob_by_hand():
    """Of an untrained flow of points: a rotation, whose density is the normal one."""
    model = make_model(ConditionalFlow, FlowConfig(event_shape=(2, 1, 1), steps=(3,), levels=0))
    y = torch.tensor([[0.3, -1.2], [2.0, 0.5]]).view(2, 2, 1, 1)
    expected = -0.5 * y.square().sum((1, 2, 3)) - math.log(2 * math.pi)
    torch.testing.assert_close(model.eval().log_prob(y), expected)
    bits = model.bits_per_dimension(y)
    torch.testing.assert_close(bits, -expected / (2 * math.log(2)))


@pytest.mark.parametrize("cond", [None, 2])
def test_the_density_of_points_integrates_to_one(cond):
    changes = {} if cond is None else {"cond_kind": "class", "num_classes": 3}
    model = flow(event_shape=(2, 1, 1), steps=(4,), levels=0, **changes)
    side = torch.linspace(-12, 12, 241)
    grid = torch.cartesian_prod(side, side).view(-1, 2, 1, 1)
    given = None if cond is None else torch.full((len(grid),), cond)
    density = model.log_prob(grid, cond=given).exp()
    assert density.max() > 1.05 / (2 * math.pi)  # no normal density any more
    assert abs(density.sum() * 0.1**2 - 1) < 1e-3


def test_the_noise_of_images_and_its_bound():
    """(v + u) / 2 - 1 of four values, and log P(v) >= E log p - D log 2."""
    model = flow(levels=4)
    v = torch.arange(96).view(1, 1, 8, 12) % 4
    y = v / 1.5 - 1
    index = torch.tensor([7])
    u = uniform(tuple(y.shape), seed=3, index=index, step=0, stream=3)
    expected = model.log_prob((v + u) / 2 - 1) - 96 * math.log(2)
    torch.testing.assert_close(model.elbo(y, seed=3, index=index), expected)
    losses = model.loss(y, seed=3, index=index)
    torch.testing.assert_close(losses["total"], -expected / 96)
    torch.testing.assert_close(losses["bits"], -expected / (96 * math.log(2)))
    found = model.bits_per_dimension(y, seed=3, index=index)
    torch.testing.assert_close(found, losses["bits"])
    measured = bits_per_dimension(model, y.repeat(2, 1, 1, 1), None)
    assert measured.dtype == torch.float64
    expected = model.bits_per_dimension(y.repeat(2, 1, 1, 1))
    torch.testing.assert_close(measured.float(), expected)


def test_the_noise_of_real_numbers():
    model = flow(levels=0, noise=0.5)
    y, index = 3 * images(2, model), torch.tensor([4, 2**40])
    z = normal(tuple(y.shape), seed=3, index=index, step=0, stream=3)
    expected = -model.log_prob(y + 0.5 * z) / 96
    torch.testing.assert_close(model.loss(y, seed=3, index=index)["total"], expected)
    with pytest.raises(NotImplementedError, match="log_prob"):
        model.elbo(y)


# Maps of channels ---------------------------------------------------------------------------------
def test_the_first_batch_normalizes():
    torch.manual_seed(0)
    channel_map = ChannelMap(3)
    x = 5 + 2 * torch.randn(16, 3, 4, 4)
    channel_map(x[:1, :, :1, :1])  # of one value there is no deviation
    assert not channel_map.norm.initialized
    channel_map = ChannelMap(3)
    y, logdet = channel_map(x)
    assert y.mean((0, 2, 3)).abs().max() < 1e-5
    torch.testing.assert_close(y.square().mean(), torch.tensor(1.0), rtol=1e-2, atol=0)
    torch.testing.assert_close(channel_map(y, inverse=True)[0], x)
    assert_equal(channel_map.eval()(3 * x)[1], logdet)


@pytest.mark.parametrize("additive", [False, True])
def test_half_precision_does_not_reach_what_is_inverted(additive):
    """Under autocast the networks round; the maps around them do not, and stay exact."""
    model = flow(additive=additive)
    y = images(3, model)
    with torch.autocast("cpu", torch.bfloat16):
        z, _ = model.encode(y)
        assert z.dtype == torch.float32
        back = model.decode(z)
    assert (back - y).abs().max() < 1e-4
    assert not torch.equal(z, model.encode(y)[0])


# Samples ------------------------------------------------------------------------------------------
@kinds
def test_a_sample_depends_on_seed_and_index_only(kind):
    model, cond = flow(kind), conditions(kind, 4)
    shape = model.config.event_shape
    if cond is None:
        together = model.sample(4, seed=7)
        some = model.sample(2, seed=7, index=torch.tensor([2, 0]) * 2**32)
        more = model.sample(7, seed=7)[:4]
    else:
        together = model.sample(cond=cond, seed=7)
        some = model.sample(cond=cond[[2, 0]], seed=7, index=torch.tensor([2, 0]))
        more = model.sample(3, cond=cond, seed=7)[0]
        draw = model.sample(cond=cond, seed=7, index=torch.arange(4) + 2 * 2**32)
        torch.testing.assert_close(model.sample(3, cond=cond, seed=7)[2], draw)
        assert not torch.allclose(draw, together)
    assert together.shape == (4, *shape) and together.abs().max() <= 1
    torch.testing.assert_close(some, together[[2, 0]])
    torch.testing.assert_close(more, together)
    n = 4 if cond is None else None
    assert_equal(model.sample(n, cond=cond, seed=7), together)
    assert not torch.allclose(model.sample(n, cond=cond, seed=8), together)
    empty = model.sample(0 if cond is None else None, cond=taken(cond, torch.arange(0)))
    assert empty.shape == (0, *shape)


def test_samples_are_decoded_noise():
    model, cond = flow("class", levels=0), torch.tensor([2, 0])
    index = torch.tensor([3, 2**33])
    z = normal((2, 96), seed=4, index=index, step=0, stream=6)
    for temperature in (1.0, 0.5):
        drawn = model.sample(cond=cond, seed=4, index=index, temperature=temperature)
        torch.testing.assert_close(drawn, model.decode(temperature * z, cond=cond))


@kinds
def test_losses_of_a_row_do_not_depend_on_its_batch(kind):
    model, cond = flow(kind), conditions(kind, 4)
    y, rows = images(4, model), torch.tensor([2, 0])
    whole = model.loss(y, cond=cond, seed=3)["total"]
    some = model.loss(y[rows], cond=taken(cond, rows), seed=3, index=rows)["total"]
    torch.testing.assert_close(some, whole[rows])
    assert not torch.equal(model.loss(y, cond=cond, seed=4)["total"], whole)
    if cond is not None:
        changed = model.loss(y, cond=cond.roll(1, 0), seed=3)["total"]
        assert not torch.allclose(changed, whole)


@kinds
def test_plain_pytorch_agrees(kind):
    model, cond = flow(kind), conditions(kind, 3)
    y, n = images(3, model), 3 if cond is None else None
    drawn, found = model.sample(n, cond=cond), model.log_prob(y, cond=cond)
    with cgkernels.reference():
        torch.testing.assert_close(model.sample(n, cond=cond), drawn)
        torch.testing.assert_close(model.log_prob(y, cond=cond), found)


@pytest.mark.cuda
@kinds
def test_a_graph_equals_eager_bitwise(kind):
    """Also for other seeds, conditions, temperatures, weights and numbers of samples after it."""
    model, cond = flow(kind).cuda(), conditions(kind, 4)
    for rows, seed, temperature in ((4, 0, 1.0), (4, 1, 0.5), (3, 1, 1.0)):
        some = None if cond is None else cond[:rows].flip(0).cuda()
        options = {"cond": some, "seed": seed, "temperature": temperature}
        n = rows if cond is None else 2
        eager = model.sample(n, graph=False, **options)
        assert_equal(model.sample(n, **options), eager)
        with torch.no_grad():
            model.levels[0].maps[0].norm.loc += 0.1
        assert not torch.equal(model.sample(n, **options), eager)


# Training -----------------------------------------------------------------------------------------
def blocks(rows: int, kinds_of_them: int = 4) -> Dataset:
    """One quarter of an image is light: the class says which."""
    labels = torch.arange(rows) % kinds_of_them
    y = torch.full((rows, 1, 8, 8), -0.6)
    for row, label in enumerate(labels.tolist()):
        down, across = 4 * (label // 2), 4 * (label % 2)
        y[row, 0, down : down + 4, across : across + 4] = 0.6
    return Dataset("blocks", y, labels, "class", kinds_of_them)


def trained(folder, steps=100, resume=False, **changes) -> ConditionalFlow:
    options = {"event_shape": (1, 8, 8), "cond_kind": "class", "num_classes": 4, "levels": 16}
    model = make_model(ConditionalFlow, FlowConfig(**{**SIZES, **options, **changes}), seed=1)
    training = TrainingConfig(
        steps=steps, batch_size=16, learning_rate=5e-3, warmup=5, decay="constant",
        ema_decay=0.0, save_every=steps, log_every=steps,
    )  # fmt: skip
    return train(model, blocks(4), training, folder, resume=resume)


def test_learns_four_images_and_their_classes(tmp_path):
    model = trained(tmp_path / "run")
    y, cond = blocks(4).y, blocks(4).cond
    drawn = model.sample(8, cond=cond, seed=2)
    assert (drawn.sign() == y.sign()).float().mean() > 0.95
    bits = model.bits_per_dimension(y, cond=cond)
    swapped = model.bits_per_dimension(y, cond=cond.roll(1, 0))
    assert bits.max() < 1 and swapped.min() > bits.max() + 1
    # What was saved draws the same.
    save_model(tmp_path / "model", model, {})
    for folder in (tmp_path / "run", tmp_path / "model"):
        again = load_model(folder)
        assert_equal(again.sample(8, cond=cond, seed=2), drawn)


def test_a_resumed_run_goes_on_with_the_same_bits(tmp_path):
    """The normalization is that of the first batch of the first run."""
    whole = trained(tmp_path / "whole", 6)
    first = trained(tmp_path / "parts", 3)
    parts = trained(tmp_path / "parts", 6, resume=True)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    norm = first.levels[0].maps[0].norm
    assert norm.initialized and not torch.equal(norm.scale, torch.ones_like(norm.scale))


def test_learns_two_modes_of_points(tmp_path):
    """Both, and little between them; training takes points one by one too."""
    generator = torch.Generator().manual_seed(0)
    y = 0.2 * torch.randn(512, 2, 1, 1, generator=generator)
    y[::2, 0] += 0.8
    y[1::2, 0] -= 0.8
    config = FlowConfig(event_shape=(2, 1, 1), steps=(4,), width=16, levels=0)
    model = make_model(ConditionalFlow, config, seed=1)
    training = TrainingConfig(steps=120, batch_size=64, learning_rate=5e-3, ema_decay=0.0)
    model = train(model, Dataset("two", y), training, tmp_path / "run")
    x = model.sample(500, seed=3)[:, 0].flatten()
    assert 0.35 < (x > 0).float().mean() < 0.65
    assert (x.abs() < 0.2).float().mean() < 0.08
    truth = -(math.log(2) + 2 * math.log(0.2) + math.log(2 * math.pi * math.e))
    assert truth - 0.25 < model.log_prob(y).mean() < truth + 0.05


# Errors -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": ()}, "steps must be positive"),
        ({"steps": (2, 0)}, "steps must be positive"),
        ({"width": 2}, "width must be at least 4"),
        ({"depth": 0}, "depth must be positive"),
        ({"blocks": 0}, "blocks must be positive"),
        ({"limit": 0.0}, "limit must be above 0"),
        ({"limit": 100.0}, "limit must be above 0 and at most 80"),
        ({"levels": 1}, "levels must be 0 or from 2"),
        ({"noise": 0.1}, "noise is for real numbers"),
        ({"noise": -0.1, "levels": 0}, "noise must not be negative"),
        ({"cond_kind": "class"}, "num_classes must be positive"),
    ],
)
def test_wrong_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        FlowConfig(**changes)


@pytest.mark.parametrize(
    ("method", "changed", "error", "message"),
    [
        ("loss", {"y": torch.zeros(3, 1, 8, 8)}, ValueError, "y must have shape"),
        ("loss", {"y": torch.zeros(3, 1, 8, 12).long()}, TypeError, "y must be floating"),
        ("loss", {"phase": "generator"}, ValueError, "phase must be one of"),
        ("loss", {"cond": None}, ValueError, "cond must be given"),
        ("loss", {"cond": torch.tensor([0, 3, 1])}, ValueError, r"cond must be in \[0, 2\]"),
        ("loss", {"cond": torch.zeros(2).long()}, ValueError, "cond must have shape"),
        ("log_prob", {"y": torch.zeros(3, 2, 8, 12)}, ValueError, "y must have shape"),
        ("log_prob", {"cond": torch.zeros(3)}, TypeError, "cond must be int64"),
        ("decode", {"z": torch.zeros(3, 95)}, ValueError, "z must have shape"),
        ("sample", {"temperature": -1.0}, ValueError, "temperature must not be negative"),
        ("sample", {"steps": 3}, TypeError, "steps is no option of sample; it has temperature"),
        ("sample", {"cond": None, "n": 2}, ValueError, "cond must be given"),
    ],
)
def test_wrong_arguments(method, changed, error, message):
    y, cond = torch.zeros(3, 1, 8, 12), torch.arange(3)
    fitting = {
        "loss": {"y": y, "cond": cond, "seed": 0}, "log_prob": {"y": y, "cond": cond},
        "decode": {"z": torch.zeros(3, 96), "cond": cond}, "sample": {"cond": cond},
    }  # fmt: skip
    call = {**fitting[method], **changed}
    with pytest.raises(error, match=message):
        getattr(flow("class"), method)(**call)
