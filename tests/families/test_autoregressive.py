"""The autoregressive model: exact likelihoods, and samples that depend on (seed, index) alone."""

import dataclasses
import itertools
import math
from unittest import mock

import pytest
import torch

import cgkernels
from cgm.families.autoregressive import (
    AutoregressiveConfig,
    ConditionalTransformer,
    dequantize,
    quantize,
)
from cgm.model import make_model
from cgm.sampling.decoding import SamplingConfig

SMALL = {"event_shape": (1, 3, 4), "levels": 4, "depth": 2, "width": 16, "heads": 2, "hidden": 24}
CONDITIONS = {
    "none": {},
    "class": {"num_classes": 3},
    "image": {"cond_shape": (1, 2, 4)},
    "tokens": {"num_classes": 5, "cond_shape": (4,)},
}
PALETTE = ((-0.5, 0.5), (0.25, 0.0), (0.75, -0.75))
POSITIONS = ("rotary", "rotary_2d", "learned")


def small(kind="class", **changes):
    """With weights large enough that everything matters to the result."""
    config = AutoregressiveConfig(**{**SMALL, "cond_kind": kind, **CONDITIONS[kind], **changes})
    model = make_model(ConditionalTransformer, config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    return model


def condition(kind, rows):
    generator = torch.Generator().manual_seed(rows)
    if kind == "none":
        return None
    if kind == "image":
        return 2 * torch.rand(rows, *CONDITIONS[kind]["cond_shape"], generator=generator) - 1
    high = CONDITIONS[kind]["num_classes"]
    return torch.randint(high, (rows, *CONDITIONS[kind].get("cond_shape", ())), generator=generator)


# Likelihood ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", CONDITIONS)
def test_probabilities_of_all_images_sum_to_one(kind, positions):
    model = small(kind, event_shape=(1, 2, 3), levels=2, positions=positions)
    everything = torch.tensor(list(itertools.product((0, 1), repeat=6)))
    y = dequantize(everything, 2, (1, 2, 3))
    cond = condition(kind, 1)
    cond = None if cond is None else cond.expand(64, *cond.shape[1:])
    log_prob = model.log_prob(y, cond=cond)
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert log_prob.std() > 0.1


def test_colors_of_a_pixel_are_drawn_one_after_another():
    y = torch.arange(12.0).view(1, 3, 2, 2) / 127.5 - 1
    assert quantize(y, 256).tolist() == [[0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]]
    assert torch.equal(dequantize(quantize(y, 256), 256, (3, 2, 2)), y)
    model = small("none", event_shape=(3, 1, 2), levels=2)
    everything = torch.tensor(list(itertools.product((0, 1), repeat=6)))
    log_prob = model.log_prob(dequantize(everything, 2, (3, 1, 2)))
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("levels", [2, 5, 16, 256])
def test_quantization(levels):
    y = torch.arange(256.0).view(1, 1, 16, 16) / 127.5 - 1
    values = quantize(y, levels)
    counts = values.flatten().bincount(minlength=levels)
    assert len(counts) == levels and counts.max() - counts.min() <= 1
    back = dequantize(values, levels, (1, 16, 16))
    assert (back - y).abs().max() <= (128 / levels + 0.5) / 127.5
    assert torch.equal(quantize(back, levels), values)
    assert quantize(torch.tensor([[[[-7.0, 9.0]]]]), levels).tolist() == [[0, levels - 1]]


def test_loss_is_minus_log_prob():
    model, y, cond = small(), 2 * torch.rand(5, 1, 3, 4) - 1, condition("class", 5)
    model.config = dataclasses.replace(model.config, cond_dropout=0.0)
    loss = model.loss(y, cond=cond, seed=0)
    nats = -model.log_prob(y, cond=cond) / 12
    torch.testing.assert_close(loss["total"], nats)
    torch.testing.assert_close(loss["bits"], nats / math.log(2))


def test_conditions_are_dropped_by_seed_and_index():
    model, y, cond = small(cond_dropout=0.5), 2 * torch.rand(8, 1, 3, 4) - 1, condition("class", 8)
    with_cond, without = (-model.log_prob(y, cond=c) / 12 for c in (cond, None))
    index = torch.arange(100, 108)
    total = model.loss(y, cond=cond, seed=3, index=index)["total"].detach()
    dropped = (total - without).abs() < 1e-5
    assert 0 < dropped.sum() < 8
    torch.testing.assert_close(total, torch.where(dropped, without, with_cond))
    part = model.loss(y[5:], cond=cond[5:], seed=3, index=index[5:])["total"].detach()
    torch.testing.assert_close(part, total[5:])


def test_a_value_depends_on_earlier_ones_only():
    model = small("none")
    y = 2 * torch.rand(1, 1, 3, 4) - 1
    prefix = model._prefix(None, 1, y.device)
    before = model._log_probs(y, prefix)
    changed = y.clone()
    changed[0, 0, 1, 2] = -changed[0, 0, 1, 2].sign()  # the seventh value
    after = model._log_probs(changed, prefix)
    assert torch.equal(before[0, :6], after[0, :6]) and not torch.equal(before[0, 6:], after[0, 6:])


# Samples ------------------------------------------------------------------------------------------
def slow_sample(model, cond, *, given=None, rows=None, guidance=1.0, seed=0, index=None, **options):
    """Every value from a run over the whole sequence, without any cache."""
    config = model.config
    index = torch.arange(rows) if index is None else index
    values = torch.zeros(rows, math.prod(config.sequence_shape), dtype=torch.int64)
    known = 0
    if given is not None:
        first = model._values(given)
        known = first.shape[1]
        values[:, :known] = first
    conds = [cond] if guidance == 1 else [None, cond]
    for position in range(known, values.shape[1]):
        logits = []
        for c in conds:
            prefix = model._prefix(c, rows, values.device)
            inputs = torch.cat([prefix, model._tokens(values)[:, :-1]], 1)
            every = model.transformer(inputs, model._rope(values.device))
            logits.append(every[:, prefix.shape[1] - 1 + position])
        if guidance != 1:
            options["scale"] = guidance
        token, _ = cgkernels.sample_logits(
            torch.cat(logits), seed=seed, index=index, position=position, **options
        )
        values[:, position] = token
    return model._images(values)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", CONDITIONS)
def test_cached_samples_are_those_of_whole_runs(kind, positions):
    model = small(kind, positions=positions)
    cond = condition(kind, 3)
    drawn = model.sample(3 if cond is None else None, cond=cond, seed=5, temperature=0.9)
    index = torch.arange(3) * (2**32 if cond is None else 1)
    with torch.no_grad():
        slow = slow_sample(model, cond, rows=3, seed=5, index=index, temperature=0.9)
    assert torch.equal(drawn, slow) and drawn.std() > 0.1


@pytest.mark.parametrize("changes", [{"kv_heads": 1}, {"norm": "layer", "activation": "gelu"}])
def test_kinds_of_the_network(changes):
    model, cond = small(**changes), condition("class", 2)
    with torch.no_grad():
        slow = slow_sample(model, cond, rows=2)
    assert torch.equal(model.sample(cond=cond), slow)


def test_a_palette_is_one_choice_for_a_pixel():
    model = small(
        "image", event_shape=(2, 2, 2), cond_shape=(1, 2, 2), palette=PALETTE, rope_base=9
    )
    colors = torch.tensor(PALETTE)
    everything = torch.tensor(list(itertools.product(range(3), repeat=4)))
    y = colors[everything].movedim(1, 2).unflatten(2, (2, 2))
    assert torch.equal(model._values(y + 0.05), everything)  # the nearest color
    cond = 2 * torch.rand(3, 1, 2, 2) - 1
    log_prob = model.log_prob(y, cond=cond[:1].expand(81, -1, -1, -1))
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-5) and log_prob.std() > 0.1
    bits = model.loss(y[:1], cond=cond[:1], seed=0)["bits"] * 8 * math.log(2)
    assert bits.item() == pytest.approx(-log_prob[0].item(), rel=1e-5)
    drawn = model.sample(5, cond=cond, seed=3)
    assert torch.cdist(drawn.movedim(2, 4).reshape(-1, 2), colors).amin(1).max() == 0
    with torch.no_grad():
        assert torch.equal(
            model.sample(cond=cond, seed=3), slow_sample(model, cond, rows=3, seed=3)
        )
        given = drawn[0, :, :, :1]
        slow = slow_sample(model, cond, given=given, rows=3, seed=3)
    again = model.sample(cond=cond, given=given, seed=3)
    assert torch.equal(again, slow) and torch.equal(again[:, :, :1], given)


@pytest.mark.parametrize("kind", ["class", "image"])
def test_guidance_mixes_logits(kind):
    model, cond = small(kind), condition(kind, 3)
    with torch.no_grad():
        slow = slow_sample(model, cond, rows=3, guidance=2.5, top_k=3)
    assert torch.equal(model.sample(cond=cond, guidance=2.5, top_k=3), slow)
    assert not torch.equal(model.sample(cond=cond, top_k=3), slow)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_given_rows_are_kept(guidance):
    model, cond = small(), condition("class", 2)
    given = dequantize(torch.randint(4, (2, 8)), 4, (1, 2, 4))
    drawn = model.sample(3, cond=cond, given=given, guidance=guidance)
    assert torch.equal(drawn[:, :, :, :2], given.expand(3, -1, -1, -1, -1))
    with torch.no_grad():
        slow = slow_sample(model, cond, given=given, rows=2, guidance=guidance)
    assert torch.equal(drawn[0], slow)
    alone = small("none").sample(4, given=given[:1])
    assert torch.equal(alone[:, :, :2], given[:1].expand(4, -1, -1, -1))


def test_a_sample_depends_on_seed_and_index_only():
    model, cond = small(), torch.tensor([2, 0, 1, 2])
    drawn = model.sample(3, cond=cond, seed=7)
    assert drawn.shape == (3, 4, 1, 3, 4)
    alone = model.sample(cond=cond[2:3], seed=7, index=torch.tensor([2]))
    assert torch.equal(alone[0], drawn[0, 2])
    draw = model.sample(cond=cond[2:3], seed=7, index=torch.tensor([2 + 2**32]))
    assert torch.equal(draw[0], drawn[1, 2])
    assert torch.equal(model.sample(2, cond=cond, seed=7), drawn[:2])
    assert not torch.equal(model.sample(3, cond=cond, seed=8), drawn)
    with cgkernels.reference():
        assert torch.equal(model.sample(3, cond=cond, seed=7), drawn)


def test_samples_follow_the_likelihood():
    """Frequencies of all eight images against their probabilities: chi-square, 7 degrees."""
    model = small(event_shape=(1, 1, 3), levels=2)
    n = 4000
    cond = torch.tensor([1])
    drawn = quantize(model.sample(n, cond=cond)[:, 0], 2) @ torch.tensor([4, 2, 1])
    everything = dequantize(torch.tensor(list(itertools.product((0, 1), repeat=3))), 2, (1, 1, 3))
    expected = n * model.log_prob(everything, cond=cond.expand(8)).exp()
    chi = ((drawn.bincount(minlength=8) - expected) ** 2 / expected).sum().item()
    assert chi < 24.3  # one in a thousand


def test_learns_four_images_and_their_classes():
    config = AutoregressiveConfig(
        (1, 4, 4), "class", 4, levels=2, depth=1, width=32, heads=2, hidden=64,
        positions="learned", cond_dropout=0.0,
    )  # fmt: skip
    model = make_model(ConditionalTransformer, config, seed=1)
    generator = torch.Generator().manual_seed(0)
    y, cond = torch.randn(4, 1, 4, 4, generator=generator).sign(), torch.arange(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(150):
        loss = model.loss(y, cond=cond, seed=step)["total"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    right, shuffled = model.log_prob(y, cond=cond), model.log_prob(y, cond=cond.roll(1))
    assert right.min() > -4 and (right - shuffled).min() > 4
    samples = model.sample(8, cond=cond, seed=2)
    assert (samples.sign() == y).float().mean() > 0.85


def test_temperature_zero_is_the_most_likely():
    model, cond = small(), condition("class", 2)
    assert torch.equal(
        model.sample(cond=cond, seed=1, temperature=0.0), model.sample(cond=cond, temperature=0.0)
    )


def test_empty_batches():
    model = small()
    assert model.sample(0, cond=condition("class", 2)).shape == (0, 2, 1, 3, 4)
    assert model.sample(cond=torch.empty(0, dtype=torch.int64)).shape == (0, 1, 3, 4)
    assert small("none").sample(0).shape == (0, 1, 3, 4)


@pytest.mark.cuda
def test_a_graph_draws_what_eager_steps_draw():
    model, cond = small().cuda(), torch.tensor([0, 1], device="cuda")
    eager = model.sample(3, cond=cond, guidance=2.0, graph=False)
    assert torch.equal(model.sample(3, cond=cond, guidance=2.0), eager)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"cond": torch.tensor([3])}, ValueError, "cond must be in [0, 2]"),
        ({"cond": torch.tensor([0.5])}, TypeError, "cond must be int64 ids"),
        ({"cond": torch.tensor([[0]])}, ValueError, "cond must have shape (1,)"),
        ({"guidance": 2.0, "n": 1}, ValueError, "guidance must be 1 without cond"),
        ({}, ValueError, "n must be given without cond"),
        ({"n": -1}, ValueError, "n must be None or an int"),
        ({"n": 1, "steps": 3}, TypeError, "steps is no option of sample; it has guidance, temp"),
        ({"n": 1, "temperature": -1.0}, ValueError, "temperature"),
        ({"n": 1, "top_p": 1.5}, ValueError, "top_p"),
        (
            {"n": 1, "given": torch.zeros(1, 1, 3, 4)},
            ValueError,
            "given must have from 1 to 2",
        ),
        ({"n": 1, "given": torch.zeros(2, 1, 1, 4)}, ValueError, "given must have shape (1, 1, 1,"),
        ({"n": 1, "index": torch.tensor([0, 1])}, ValueError, "index must have shape (1,)"),
    ],
)
def test_wrong_arguments(arguments, error, words):
    with pytest.raises(error) as caught:
        small().sample(**arguments)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"levels": 1}, "levels must be from 2 to 256"),
        ({"levels": 257}, "levels must be from 2 to 256"),
        ({"palette": PALETTE}, "palette must be () but for two channels"),
        ({"heads": 3}, "heads must"),
        ({"width": 12, "heads": 2}, "heads must leave a multiple of 4"),
        ({"kv_heads": 4}, "kv_heads must divide heads"),
        ({"num_classes": 0}, "num_classes must be positive"),
        ({"cond_dropout": 1.0}, "cond_dropout must be in [0, 1)"),
        ({"event_shape": (1, 0, 4)}, "event_shape must be"),
    ],
)
def test_wrong_configs(changes, words):
    with pytest.raises(ValueError) as caught:
        small(**changes)
    assert words in str(caught.value)


def test_every_option_has_a_default_that_changes_nothing():
    model, cond = small(), condition("class", 2)
    named = dataclasses.asdict(SamplingConfig())
    assert torch.equal(model.sample(cond=cond, **named), model.sample(cond=cond))


# Half precision, autocast, NaN --------------------------------------------------------------------
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
COLORED = {"event_shape": (2, 3, 4), "palette": PALETTE}
IMAGES = pytest.mark.parametrize("changes", [{"event_shape": (2, 3, 4)}, COLORED], ids=str)


def images_of(model, rows, seed=0):
    """Images that the model can have drawn."""
    shape = (rows, math.prod(model.config.sequence_shape))
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(model.config.choices, shape, generator=generator)
    return model._images(values.to(model.device))


@IMAGES
@pytest.mark.parametrize("device", DEVICES)
def test_autocast_changes_no_sample(changes, device):
    model, cond = small("image", **changes).to(device), condition("image", 3).to(device)
    given = images_of(model, 3)[:, :, :1]
    calls = [{"n": 2}, {"guidance": 2.0}, {"given": given}, {"int8": True, "temperature": 0}]
    expected = [model.sample(cond=cond, seed=4, **call) for call in calls]
    with torch.autocast(device, torch.bfloat16):
        drawn = [model.sample(cond=cond, seed=4, **call) for call in calls]
    assert all(map(torch.equal, drawn, expected))


@IMAGES
@pytest.mark.parametrize("device", DEVICES)
def test_autocast_likelihoods_are_near_those_without(changes, device):
    """Of bfloat16, 8 bits: the sums of 12 or 24 values differ by some of them each."""
    model, cond = small("image", **changes).to(device), condition("image", 3).to(device)
    y = images_of(model, 3)
    exact, loss = model.log_prob(y, cond=cond), model.loss(y, cond=cond, seed=1)["total"]
    with torch.autocast(device, torch.bfloat16):
        assert (model.log_prob(y, cond=cond) - exact).abs().max() < 0.05 * exact.abs().max()
        rounded = model.loss(y, cond=cond, seed=1)["total"]
    assert (rounded - loss).abs().max() < 0.05 * loss.abs().max()
    rounded.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@IMAGES
@pytest.mark.parametrize("device", DEVICES)
def test_models_in_bfloat16(changes, device):
    """Near a float64 model of the same weights, in images of their own dtype."""
    model = small("image", **changes).to(device, torch.bfloat16)
    wide = small("image", **changes).double()
    wide.load_state_dict(model.state_dict())
    cond = condition("image", 3).to(device, torch.bfloat16)
    drawn = model.sample(2, cond=cond, seed=3)
    assert drawn.dtype == torch.bfloat16 and drawn.isfinite().all() and len(drawn.unique()) > 2
    assert torch.equal(
        model.sample(cond=cond[1:], seed=3, index=torch.tensor([1, 2])), drawn[0, 1:]
    )
    upper = model.sample(cond=cond, seed=3, given=drawn[0, :, :, :1])
    assert torch.equal(upper[:, :, :1], drawn[0, :, :, :1])
    y, exact = drawn[0], wide.log_prob(drawn[0].double().cpu(), cond=cond.double().cpu())
    rounded = model.log_prob(y, cond=cond)
    assert (rounded.cpu() - exact).abs().max() < 0.05 * exact.abs().max()
    model.loss(y, cond=cond, seed=0)["total"].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("levels", [2, 100, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_values_survive_every_dtype(levels, dtype):
    values = torch.arange(levels)[None]
    images = dequantize(values, levels, (1, 1, levels)).to(dtype)
    assert torch.equal(quantize(images, levels), values)


@IMAGES
@pytest.mark.parametrize("kind", CONDITIONS)
def test_without_a_distribution_a_sample_is_nan(changes, kind):
    model, cond = small(kind, **changes), condition(kind, 2)
    model.transformer.head.weight.data[0, 0] = torch.nan
    n = 2 if cond is None else 1
    for options in ({}, {"temperature": 0}, {"top_k": 2, "top_p": 0.9}):
        assert model.sample(n, cond=cond, seed=0, **options).isnan().all()
    y = images_of(model, 2)
    assert model.log_prob(y, cond=cond).isnan().all()
    assert model.loss(y, cond=cond, seed=0)["total"].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@IMAGES
def test_what_no_check_can_see_comes_out_as_nan(changes, bad):
    """In a compiled graph, as on a GPU, no value is looked at; the other rows are as ever."""
    model, cond = small("image", cond_dropout=0.0, **changes), condition("image", 3)
    y = images_of(model, 3)
    spoiled_y, spoiled_cond = y.clone(), cond.clone()
    spoiled_y[1, 0, 2, 3] = spoiled_cond[2, 0, 1, 1] = bad
    with pytest.raises(ValueError, match="y must be finite"):
        model.loss(spoiled_y, cond=cond, seed=0)
    for call in (model.sample, lambda cond: model.log_prob(y, cond=cond)):
        with pytest.raises(ValueError, match="cond must be finite"):
            call(cond=spoiled_cond)
    with pytest.raises(ValueError, match="given must be finite"):
        model.sample(cond=cond, given=spoiled_y[:, :, 2:])
    expected = model.log_prob(y, cond=cond)
    with mock.patch("cgm.model.base.readable", lambda _: False), mock.patch(
        "cgm.families.autoregressive.readable", lambda _: False
    ):  # fmt: skip
        losses = model.loss(spoiled_y, cond=spoiled_cond, seed=0)["total"]
        found = model.log_prob(spoiled_y, cond=spoiled_cond)
        drawn = model.sample(2, cond=spoiled_cond, seed=0)
    assert losses.isnan().tolist() == found.isnan().tolist() == [False, True, True]
    assert found[0] == expected[0]
    assert drawn[:, 2].isnan().all()
    assert torch.equal(drawn[:, :2], model.sample(2, cond=cond, seed=0)[:, :2])


def test_a_compiled_loss_of_nan_is_nan():
    model, y = small("none"), images_of(small("none"), 2)
    loss = torch.compile(lambda y: model.loss(y, seed=0)["total"], backend="eager")
    torch.testing.assert_close(loss(y), model.loss(y, seed=0)["total"])
    y[1, 0, 0, 0] = math.nan
    assert loss(y).isnan().tolist() == [False, True]
