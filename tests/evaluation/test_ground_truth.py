"""Scores of samples where the truth is known, on samples that are right and wrong on purpose."""

import math

import pytest
import torch

from cgm.data import PINK, TEAL, load_task, synthetic
from cgm.data.tasks import garment_mask
from cgm.evaluation import ground_truth


@pytest.fixture(scope="module")
def garments():
    data = load_task("colorize", "test").batch(torch.arange(40))
    return data["cond"], garment_mask(data["cond"]).float()


def colored(mask, pink):
    """(n, B, 2, H, W) of masks (B, 1, H, W) and pink (n, B, 1 or H, 1 or W), 0 or 1."""
    colors = torch.tensor([TEAL, PINK])[pink.long()].movedim(-1, 2)
    return colors * mask


def coins(*shape, seed=0):
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(seed))


# Colors -------------------------------------------------------------------------------------------
def test_true_colors_score_as_the_truth(garments):
    luminance, mask = garments
    scores = ground_truth.color_scores(colored(mask, coins(64, 40, 1, 1)), luminance)
    for name in ("chroma", "consistency"):
        assert scores[name] == pytest.approx(1, abs=1e-6)
    assert scores["teal"] + scores["pink"] == 1 and abs(scores["teal"] - 0.5) < 0.05
    assert scores["background"] == 0 and scores["best of n"] < 1e-6
    assert scores["calibration error"] == pytest.approx(1 / (2 * math.sqrt(64)), rel=0.3)


def test_each_way_to_be_wrong_has_a_score(garments):
    luminance, mask = garments
    middle = (torch.tensor([TEAL, PINK]).mean(0)[:, None, None] * mask)[None]
    gray = ground_truth.color_scores(middle, luminance)
    assert gray["chroma"] < 1e-6 and gray["teal"] == gray["pink"] == 0
    assert gray["best of n"] == pytest.approx(1)

    speckled = ground_truth.color_scores(colored(mask, coins(4, 40, 28, 28)), luminance)
    pixels = mask.sum((1, 2, 3))
    assert speckled["chroma"] == pytest.approx(1, abs=1e-6)
    expected = (2 / (math.pi * pixels)).sqrt().mean().item()
    assert speckled["consistency"] == pytest.approx(expected, rel=0.2)

    one = ground_truth.color_scores(colored(mask, torch.ones(4, 40, 1, 1)), luminance)
    assert one["pink"] == 1 and one["teal"] == 0 and one["calibration error"] == 0.5
    assert one["best of n"] == pytest.approx(1)  # 0 of the one color, 2 of the other

    everywhere = colored(torch.ones_like(mask), coins(4, 40, 1, 1))
    assert ground_truth.color_scores(everywhere, luminance)["background"] == pytest.approx(
        1, abs=0.1
    )
    with pytest.raises(ValueError, match=r"samples must be \(n, 40, 2"):
        ground_truth.color_scores(middle[:, :3], luminance)


# Points -------------------------------------------------------------------------------------------
def test_densities_integrate_to_one_and_are_those_of_the_points():
    side = torch.linspace(-1.3, 1.3, 1301, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)[:, :, None, None]
    cell = (side[1] - side[0]).item() ** 2
    total = synthetic.eight_gaussians_log_prob(grid).exp().sum() * cell
    assert total.item() == pytest.approx(1, abs=1e-4)
    for moon in (0, 1):
        which = torch.full((len(grid),), moon)
        total = synthetic.two_moons_log_prob(grid, which).exp().sum() * cell
        assert total.item() == pytest.approx(1, abs=5e-3)  # the straight edge cuts cells
    # Were the points of another density, its mean log would differ from the negative entropy.
    y = load_task("eight_gaussians", "train").y
    entropy = math.log(8 * 2 * math.pi * math.e * synthetic.GAUSSIAN_SIGMA**2)
    assert synthetic.eight_gaussians_log_prob(y).mean().item() == pytest.approx(-entropy, abs=0.03)
    moons = load_task("two_moons", "train")
    entropy = math.log(math.pi * synthetic.MOON_RADIUS * synthetic.MOON_SIGMA) + 0.5 * math.log(
        2 * math.pi * math.e
    )
    found = synthetic.two_moons_log_prob(moons.y, moons.cond).mean().item()
    assert found == pytest.approx(-entropy, abs=0.03)


def test_the_energy_test_tells_distributions_apart_and_not_one_from_itself():
    y = load_task("eight_gaussians", "train").y
    p = [
        ground_truth.energy_test(y[i : i + 200], y[i + 200 : i + 400]) for i in range(0, 8000, 400)
    ]
    assert min(p) > 1 / 200 and sum(value < 0.05 for value in p) <= 3  # about 1 of 20
    true = load_task("eight_gaussians", "test").y[:500]
    drawn = y[:500]
    seven = drawn[synthetic.gaussian_centers()[0].float().sub(drawn.flatten(1)).norm(dim=1) > 0.3]
    assert ground_truth.energy_test(seven, true) < 0.05
    assert ground_truth.energy_test(drawn + 0.1, true) < 0.05
    with pytest.raises(ValueError, match="two rows"):
        ground_truth.energy_test(y[:1], y)


def test_lost_and_blurred_gaussians_show():
    y = load_task("eight_gaussians", "train").y[:2000]
    true = load_task("eight_gaussians", "test").y[:1000]
    right = ground_truth.gaussian_scores(y[:1000], true)
    assert right["least share"] > 0.7 and right["on a Gaussian"] == pytest.approx(0.989, abs=0.01)
    half = ground_truth.gaussian_scores(y[y[:, 0, 0, 0] > 0][:1000], true)
    assert half["least share"] == 0 and half["p-value"] == 1 / 200
    blurred = ground_truth.gaussian_scores(y[:1000] + 0.2 * torch.randn(1000, 2, 1, 1), true)
    assert blurred["on a Gaussian"] < 0.7


# The ball -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def balls():
    return synthetic.balls("test")


def test_the_ball_is_where_it_is_said_to_be(balls):
    assert (ground_truth.centroids(balls.before) - balls.position).norm(dim=1).max() < 0.25
    free = ~balls.bounced
    after = ground_truth.centroids(balls.after)
    assert (after - balls.position - balls.velocity)[free].norm(dim=1).max() < 0.5
    assert (after >= 0.5).all() and (after <= 10.5).all()
    assert 0.05 < balls.bounced.double().mean() < 0.25


def test_true_and_mean_futures_score_apart(balls):
    free = ~balls.bounced
    before, position = balls.before[free], balls.position[free]
    true = ground_truth.ball_scores(balls.after[free][None], before, position)
    assert true["speed"] == pytest.approx(2, abs=0.05) and true["right speed"] > 0.98
    assert true["peak"] == pytest.approx(1, abs=0.05)
    assert true["least eighth"] > 0.7 and true["resultant"] < 0.1
    still = ground_truth.ball_scores(before[None], before, position)
    assert still["right speed"] == 0
    # Of all velocities at once: the least-squares answer, a faint ring.
    fainter = ground_truth.ball_scores((balls.after[free][None] + 1) * 0.2 - 1, before, position)
    assert fainter["peak"] == pytest.approx(0.2, abs=0.02)


def test_r_squared_is_that_of_a_linear_regression():
    x = torch.randn(500, 3, dtype=torch.float64)
    y = x @ torch.randn(3, 2, dtype=torch.float64) + 4
    assert ground_truth.r_squared(x, y) == pytest.approx(1)
    assert ground_truth.r_squared(torch.randn(500, 3), y) < 0.05
