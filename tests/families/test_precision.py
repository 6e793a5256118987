"""Every family in every precision: dtypes, values near those of float32, rows alone and in batches.

A model in bfloat16 is compared with a float32 one of the same, rounded, weights.
"""

import contextlib
import dataclasses

import pytest
import torch
from torch import Tensor

from cgm.model import FAMILIES, Model, make_model
from tests.families.test_protocol import CONDS, STEPS, calls, every, images, kinds_of, made

PRECISIONS = ("bfloat16", "float16", "float64", "autocast")
# Largest mean difference from float32 in units of the values, and for losses relative to them.
TOLERANCE = {"bfloat16": 0.06, "float16": 0.01, "float64": 1e-4, "autocast": 0.06}
# Their samples are choices: round-off changes few of them, and these by any amount.
CHOOSING = ("autoregressive", "mixture_density", "quantized_classifier")
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.cuda))

precisions = pytest.mark.parametrize("precision", PRECISIONS)
devices = pytest.mark.parametrize("device", DEVICES)


def lively(family: str, kind: str, **fields) -> Model:
    """A model with such fields in its config whose every layer acts."""
    model = made(family, kind)
    if fields:
        config = dataclasses.replace(model.config, **fields)
        model = make_model(type(model), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


class Case:
    """A model in a precision, its float32 twin, and what both are given."""

    def __init__(self, family: str, kind: str, precision: str, device: str) -> None:
        self.dtype = torch.float32 if precision == "autocast" else getattr(torch, precision)
        if device == "cuda" and precision == "float64":
            pytest.skip("float64 is for the CPU")
        self.autocast, self.device = precision == "autocast", device
        self.model = lively(family, kind).to(device, self.dtype)
        self.twin = lively(family, kind).to(device, self.dtype).float()
        self.cond = CONDS[kind] if CONDS[kind] is None else CONDS[kind].to(device)
        self.y, self.options = images.to(device), STEPS.get(family, {})

    def context(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.autocast)

    def given(self, model: Model) -> tuple[Tensor, Tensor | None]:
        """y and cond as this model takes them."""
        cond = self.cond
        if cond is not None and cond.is_floating_point():
            cond = cond.to(model.dtype)
        return self.y.to(model.dtype), cond

    def sample(self, model: Model, n: int | None = 3, **options) -> Tensor:
        return model.sample(n, cond=self.given(model)[1], seed=1, **self.options, **options)


@every
@precisions
@devices
def test_samples_in_every_precision(family, kind, precision, device):
    case = Case(family, kind, precision, device)
    model, tolerance = case.model, TOLERANCE[precision]
    if model.sampling_config is None:
        return
    with case.context():
        drawn, none = case.sample(model), case.sample(model, 0)
    assert drawn.dtype == none.dtype == case.dtype
    assert drawn.isfinite().all()
    expected = case.sample(case.twin)
    difference = (drawn.double() - expected.double()).abs()
    if family in CHOOSING:
        assert (difference > 10 * tolerance).double().mean() <= tolerance
    else:
        assert difference.mean() <= tolerance * max(1.0, expected.std().item())


@every
@precisions
@devices
def test_a_sample_is_the_same_alone_in_every_precision(family, kind, precision, device):
    case = Case(family, kind, precision, device)
    model = case.model
    if model.sampling_config is None:
        return
    _, cond = case.given(model)
    with case.context():
        drawn = case.sample(model)
        one = torch.tensor([2**32 * 2 + (0 if cond is None else 1)], device=device)
        alone = {"seed": 1, "index": one, **case.options}
        if cond is None:
            found, row = model.sample(1, **alone)[0], drawn[2]
        else:
            found, row = model.sample(cond=cond[1:], **alone)[0], drawn[2, 1]
    difference = (found.double() - row.double()).abs()
    # Of a row alone a matrix product may be summed in another order.
    if family in CHOOSING:
        assert (difference > 0.05).double().mean() <= 0.02
    else:
        assert difference.max() <= 2 * TOLERANCE[precision] * max(1.0, row.abs().max().item())


@every
@precisions
@devices
def test_losses_and_likelihoods_in_every_precision(family, kind, precision, device):
    case = Case(family, kind, precision, device)
    tolerance = TOLERANCE[precision]
    names = {name for name, _ in calls(case.twin)} - {"loss"}  # in float32 all are found
    for name, options in [("loss", {"phase": p, "seed": 0}) for p in case.model.phases] + [
        (name, {}) for name in sorted(names)
    ]:
        (y, cond), (wide_y, wide_cond) = case.given(case.model), case.given(case.twin)
        with case.context():
            found = getattr(case.model, name)(y, cond=cond, **options)
        expected = getattr(case.twin, name)(wide_y, cond=wide_cond, **options)
        if name == "loss":
            case.model.zero_grad()
            found["total"].sum().backward()
            gradients = [p.grad for p in case.model.parameters() if p.grad is not None]
            assert gradients and all(g.isfinite().all() for g in gradients)
            found, expected = list(found.values()), list(expected.values())
        elif name == "encode":
            found, expected = ([t] if isinstance(t, Tensor) else list(t) for t in (found, expected))
        else:
            found, expected = [found], [expected]
        for value, right in zip(found, expected, strict=True):
            assert value.isfinite().all()
            if name != "encode":
                assert value.dtype in (torch.float32, torch.float64), name
            scale = right.abs().max().item()
            assert (value.double() - right.double()).abs().max() <= tolerance * (1 + scale), name


@every
@precisions
@devices
def test_point_predictions_in_every_precision(family, kind, precision, device):
    case = Case(family, kind, precision, device)
    for name in ("predict", "variance"):
        if not hasattr(case.model, name):
            continue
        with case.context():
            found = getattr(case.model, name)(cond=case.given(case.model)[1])
        assert found.dtype == case.dtype
        expected = getattr(case.twin, name)(cond=case.given(case.twin)[1])
        torch.testing.assert_close(
            found.double(), expected.double(), atol=TOLERANCE[precision], rtol=TOLERANCE[precision]
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_dtype_does_not_matter(family):
    kind = kinds_of(family)[-1]
    model = lively(family, kind)
    case = Case(family, kind, "bfloat16", "cpu")
    if model.sampling_config is None:
        return
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            results.append([case.sample(case.twin), case.sample(case.model)])
        finally:
            torch.set_default_dtype(torch.float32)
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_and_states_of_a_half_model_stay_in_float32(family):
    model = made(family, kinds_of(family)[0])
    tables = {
        name: buffer.clone()
        for name, buffer in model.named_buffers()
        if name.endswith(("_table", "loss_weights", "values", "log_scale", "chains.y"))
    }
    for dtype in (torch.bfloat16, torch.float16):
        halved = model.to(dtype)
        assert halved.dtype == dtype
        for name, table in tables.items():
            assert torch.equal(halved.get_buffer(name), table)
    assert all(model.double().get_buffer(name).dtype == torch.float64 for name in tables)
    assert all(torch.equal(model.float().get_buffer(name), t) for name, t in tables.items())


# family, kind, fields of its config, solver options: what the small ones leave out
VARIANTS = [
    ("diffusion", "class", {"learned_variance": True}, {"sampler": "ddpm", "guidance": 2.0}),
    ("diffusion", "image", {}, {"sampler": "dpmpp_2m", "guidance": 2.0}),
    ("diffusion", "tokens", {"attention_depth": 1}, {"sampler": "euler_ancestral"}),
    ("flow", "class", {"levels": 0, "noise": 0.1}, {"temperature": 0.5}),
    ("flow", "image", {"steps": (1, 1), "additive": True}, {}),
    ("gan", "class", {"penalty_weight": 10.0}, {"truncation": 0.5}),
    ("gan", "image", {"penalty_weight": 10.0, "loss": "wgan"}, {}),
    ("least_squares", "class", {"error": "l1"}, {}),
    ("pix2pix", "image", {"generator": "resnet", "depth": 1, "dropout": True}, {}),
    ("pix2pix", "image", {"norm": "instance", "r1_weight": 1.0}, {}),
    ("quantized_classifier", "class", {}, {"temperature": 0.5}),
    ("vae", "class", {"prior": "learned"}, {"noise": True}),
    ("vae", "image", {"likelihood": "bernoulli"}, {"noise": True}),
    ("vae", "none", {"likelihood": "discretized_logistic", "learn_scale": True}, {"noise": True}),
]


@pytest.mark.parametrize(("family", "kind", "fields", "options"), VARIANTS)
@precisions
@devices
def test_variants_in_every_precision(family, kind, fields, options, precision, device):
    case = Case(family, kind, precision, device)
    config = dataclasses.replace(case.model.config, **fields)
    model = make_model(type(case.model), config).to(device, case.dtype)
    y, cond = case.given(model)
    with case.context():
        for phase in model.phases:
            parts = model.loss(y, cond=cond, phase=phase, seed=0)
            parts["total"].sum().backward()
            assert all(value.isfinite().all() for value in parts.values())
        drawn = case.sample(model.eval(), **options)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert drawn.dtype == case.dtype
    assert drawn.isfinite().all()


@precisions
@devices
def test_other_results_of_the_families_in_every_precision(precision, device):
    case = Case("energy", "class", precision, device)
    y, cond = case.given(case.model)
    with case.context():
        ratio = case.model.log_ratio(y, y.flip(0), cond=cond)
        partition = case.model.log_partition(cond=cond, chains=2, temperatures=2)
        started = case.sample(case.model, start=y)
    assert ratio.isfinite().all()
    assert partition.isfinite().all()
    assert started.dtype == case.dtype
    case = Case("flow", "class", precision, device)
    y, cond = case.given(case.model)
    with case.context():
        z, _ = case.model.encode(y, cond=cond)
        back = case.model.decode(z, cond=cond)
    assert back.dtype == case.dtype  # what was y, whatever the networks of the couplings round
    torch.testing.assert_close(back.double(), y.double(), atol=0.02, rtol=0.02)
    case = Case("vae", "class", precision, device)
    y, cond = case.given(case.model)
    with case.context():
        mean, log_variance = case.model.encode(y, cond=cond)
        back = case.model.decode(mean, cond=cond)
        bound = case.model.elbo(y, cond=cond, draws=3)
    assert mean.dtype == log_variance.dtype == back.dtype == case.dtype
    assert bound.isfinite().all()
