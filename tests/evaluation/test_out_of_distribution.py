"""Densities of clothes against those of images that are none."""

import math
from types import SimpleNamespace

import pytest
import torch

from cgm.data import load_task, synthetic
from cgm.evaluation.out_of_distribution import anomaly_scores, auroc, has_density, log_density
from cgm.families.autoregressive import AutoregressiveConfig, ConditionalTransformer
from cgm.families.flow import ConditionalFlow, FlowConfig
from cgm.model import Model, family_class, make_model
from cgm.studies.compare import CONTESTS, entry_config


class Templates(Model):
    """Unit Gaussians around an image of each class, by the name that it is given."""

    family = "templates"

    def __init__(self, kind: str, classes: int = 0) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            event_shape=(1, 28, 28), cond_kind="class" if classes else "none",
            num_classes=classes, values=256,
        )  # fmt: skip
        self.kind = kind
        self.centers = torch.nn.Parameter(torch.linspace(-1, 1, max(classes, 1)))
        if kind == "elbo":
            self.elbo = lambda y, *, cond, seed: self.of(y, cond) - 1
        if kind == "energy":
            self.energy = lambda y, *, cond: -self.of(y, cond)

    @property
    def density(self):
        return {"elbo": "bound", "energy": "energy", "none": None}[self.kind]

    def of(self, y, cond):
        center = self.centers[0] if cond is None else self.centers[cond][:, None, None, None]
        return -(y - center).square().sum((1, 2, 3)) / 2


def test_auroc_is_the_share_of_pairs_in_order():
    a, b = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2.0, 0.0, -math.inf, 5.0])
    pairs = (a[:, None] > b).double() + (a[:, None] == b).double() / 2
    assert auroc(a, b) == pytest.approx(pairs.mean().item())
    assert auroc(a, a) == 0.5 and auroc(a + 9, b) == 1 and auroc(b - 9, a) == 0
    with pytest.raises(ValueError, match="must not be empty, got 3 and 0"):
        auroc(a, b[:0])
    with pytest.raises(ValueError, match="no NaN"):
        auroc(a, torch.tensor([math.nan]))


@pytest.mark.parametrize("kind", ["elbo", "energy"])
def test_classes_are_averaged_over(kind):
    y = torch.rand(60, 1, 28, 28) * 2 - 1
    model, less = Templates(kind, 3), float(kind == "elbo")
    each = torch.stack([model.of(y, torch.full((60,), c)).double() for c in range(3)])
    expected = each.logsumexp(0) - math.log(3) - less
    torch.testing.assert_close(log_density(model, y), expected.detach())
    alone = Templates(kind)
    torch.testing.assert_close(log_density(alone, y), alone.of(y, None).double().detach() - less)


def test_an_exact_density_is_taken_first():
    config = AutoregressiveConfig(
        (1, 4, 4), "class", 2, levels=4, depth=1, width=8, heads=1, hidden=8, positions="learned"
    )
    model = make_model(ConditionalTransformer, config).eval()
    y = torch.rand(3, 1, 4, 4) * 2 - 1
    each = [model.log_prob(y, cond=torch.full((3,), c)).double() for c in (0, 1)]
    expected = torch.stack(each).logsumexp(0) - math.log(2)
    torch.testing.assert_close(log_density(model, y), expected.detach())


def test_images_near_the_density_are_found_likelier():
    clothes = load_task("class_to_image", "test").batch(torch.arange(60))["y"]
    model = Templates("energy")
    torch.nn.init.constant_(model.centers, clothes.mean().item())
    scores = anomaly_scores(model, clothes)
    assert scores.keys() == {"digits", "noise"}
    # By this density what is brighter or darker than the mean everywhere is unlikely.
    torch.nn.init.constant_(model.centers, -1.0)
    dark = anomaly_scores(model, clothes)
    assert dark["noise"] > 0.7 and dark["digits"] < 0.4  # digits are darker than clothes


def test_a_model_without_density_or_of_images_is_refused():
    y = torch.zeros(2, 1, 28, 28)
    assert has_density(Templates("elbo")) and not has_density(Templates("none"))
    with pytest.raises(ValueError, match="a templates has none"):
        log_density(Templates("none"), y)
    model = Templates("energy")
    model.config.cond_kind = "image"
    with pytest.raises(ValueError, match="a class or no condition, got 'image'"):
        log_density(model, y)


@pytest.mark.parametrize("entry", CONTESTS["class_to_image"].entries, ids=lambda e: e.family)
def test_which_families_have_a_density(entry):
    """All that are compared but point predictions and generators, and they give it as a number."""
    dataset = load_task("class_to_image", "test")
    model = make_model(family_class(entry.family), entry_config(entry, dataset)).eval()
    has = entry.family not in ("least_squares", "diffusion", "gan")
    assert has_density(model) == has
    if has:
        y = dataset.batch(torch.arange(2))["y"]
        assert log_density(model, y).isfinite().all()


def test_digits_are_strokes_that_differ():
    drawn = synthetic.digits(20)
    assert drawn.shape == (20, 1, 28, 28) and drawn.min() == -1 and drawn.max() == 1
    ink = (drawn > 0).double().mean((1, 2, 3))
    assert ink.min() > 0.01 and ink.max() < 0.3
    assert ink[1] < ink[8] and not torch.equal(drawn[0], drawn[10])
    assert torch.equal(synthetic.digits(5), drawn[:5])
    assert not torch.equal(synthetic.digits(5, seed=1), drawn[:5])


def test_of_a_flow_the_bound_is_taken_where_it_learned_images():
    y = torch.rand(3, 1, 4, 4) * 2 - 1
    sizes = {"steps": (1,), "width": 4, "depth": 1}
    image = make_model(ConditionalFlow, FlowConfig((1, 4, 4), **sizes)).eval()
    expected = image.elbo(y, seed=3).double().detach()
    torch.testing.assert_close(log_density(image, y, seed=3), expected)
    real = make_model(ConditionalFlow, FlowConfig((1, 4, 4), levels=0, **sizes)).eval()
    torch.testing.assert_close(log_density(real, y), real.log_prob(y).double().detach())
