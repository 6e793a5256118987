"""Measures of feature matrices: closed forms, parts, and what is known of samples that we make."""

import math

import pytest
import torch
import torch.nn.functional as F

from cgm.data import load_task
from cgm.evaluation.classifier import load_classifier
from cgm.evaluation.metrics import (
    Birthday,
    InceptionScore,
    Kept,
    Memorization,
    Moments,
    PrecisionRecall,
    best_of_n,
    choose,
    diversity,
    frechet_distance,
    kernel_distance,
    nearest,
    standardize,
)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def moments(rows):
    found = Moments()
    found.add(rows)
    return found


def result(meter, *parts):
    for part in parts:
        meter.add(part)
    return meter.result()


def parts_of(rows):
    """In uneven parts, one of them empty."""
    return rows.split([0, 1, 30, 7, len(rows) - 38])


# Frechet distance ---------------------------------------------------------------------------------
def test_moments():
    rows = normals(100, 5) * 3 + 7
    found = moments(rows)
    torch.testing.assert_close(found.mean, rows.mean(0))
    torch.testing.assert_close(found.covariance, rows.T.cov())
    assert found.n == 100


def test_moments_in_parts_and_merged():
    rows = normals(100, 5) + 1000
    expected = moments(rows)
    in_parts, merged, last = Moments(), Moments(), Moments()
    for part in parts_of(rows):
        in_parts.add(part)
    for part in rows[:60].split(25):
        merged.add(part)
    last.add(rows[60:])
    merged.merge(Moments())
    merged.merge(last)
    for found in (in_parts, merged):
        assert found.n == 100
        torch.testing.assert_close(found.mean, expected.mean)
        torch.testing.assert_close(found.covariance, expected.covariance)
    assert last.n == 40, "what was merged stays as it was"
    empty = Moments()
    empty.merge(last)
    last.add(rows)
    assert empty.n == 40
    torch.testing.assert_close(empty.covariance, rows[60:].T.cov())


def test_frechet_distance_of_numbers():
    """(m - m')^2 + (s - s')^2."""
    one, other = column(0, 2, 4), column(5, 5 + math.sqrt(2))
    expected = (5 + math.sqrt(0.5) - 2) ** 2 + (2 - 1) ** 2
    assert frechet_distance(moments(one), moments(other)) == pytest.approx(expected)


def test_frechet_distance_of_two_features():
    """Of 2 x 2 matrices tr (A B)^1/2 = sqrt(tr AB + 2 sqrt(det AB)); these do not commute."""
    one, other = (
        normals(50, 2),
        normals(40, 2, seed=1) @ torch.tensor([[2.0, 1], [0, 0.3]]).double(),
    )
    a, b = one.T.cov(), other.T.cov()
    shared = ((a @ b).trace() + 2 * (a.det() * b.det()).sqrt()).sqrt()
    expected = (one.mean(0) - other.mean(0)).square().sum() + a.trace() + b.trace() - 2 * shared
    for x, y in ((one, other), (other, one)):
        assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected.item())


@pytest.mark.parametrize("rows", [20, 300])
def test_frechet_distance_of_a_covariance_without_full_rank(rows):
    """To all digits: of a shifted set, of one twice as wide, and of sets in other directions."""
    x = normals(rows, 64)
    spread = moments(x).covariance.trace().item()
    assert frechet_distance(moments(x), moments(x + 1e-3)) == pytest.approx(64e-6, rel=1e-6)
    wide = moments(2 * x - x.mean(0))
    assert frechet_distance(moments(x), wide) == pytest.approx(spread, rel=1e-12)
    one = moments(x[:, :1])
    expected = 2 * (one.covariance.item() + one.mean.item() ** 2)
    apart = [moments(x[:, :1] * torch.eye(64, dtype=x.dtype)[i]) for i in (3, 7)]
    assert frechet_distance(*apart) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_with_more_features_than_rows():
    rows = normals(10, 40)
    assert frechet_distance(moments(rows), moments(rows.flip(0))) < 1e-5
    assert frechet_distance(moments(rows), moments(rows + 2)) == pytest.approx(160, abs=1e-5)


# Kernel distance ----------------------------------------------------------------------------------
def test_kernel_distance_of_few_rows():
    x, y = normals(3, 4), normals(3, 4, seed=1)

    def k(a, b):
        return (float(a @ b) / 4 + 1) ** 3

    pairs = [(0, 1), (0, 2), (1, 2)]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs) / 3
    between = sum(k(a, b) for a in x for b in y) / 9
    mean, deviation = kernel_distance(x, y, subsets=3, size=3)
    assert mean == pytest.approx(within - 2 * between)
    assert deviation == pytest.approx(0, abs=1e-12), "every subset has all rows"


def test_kernel_distance_is_0_on_average_of_equal_distributions():
    values = [kernel_distance(normals(30, 4, seed=i), normals(30, 4, seed=i + 500), subsets=1)[0]
              for i in range(100)]  # fmt: skip
    mean = sum(values) / 100
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 99 / 100)
    assert abs(mean) < 3 * error
    moved = kernel_distance(normals(30, 4), normals(30, 4, seed=1) + 1)[0]
    assert moved > max(values)


def test_subsets_are_chosen_by_the_seed():
    x, y = normals(50, 4), normals(60, 4, seed=1)
    torch.manual_seed(0)
    first = kernel_distance(x, y, subsets=5, size=20)
    state = torch.get_rng_state()
    assert kernel_distance(x, y, subsets=5, size=20) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert kernel_distance(x, y, subsets=5, size=20, seed=1) != first
    assert first[1] > 0, "subsets differ"
    assert kernel_distance(x, y, subsets=1, size=90) == kernel_distance(x, y, subsets=1, size=50)


def test_standardize():
    rows = normals(50, 4) * torch.tensor([1.0, 2, 3, 0]).double() + 5
    other = standardize(rows * 10 + 3, moments(rows * 10 + 3))
    torch.testing.assert_close(other, standardize(rows, moments(rows)))
    assert other.var(0).mean().item() == pytest.approx(1)
    assert (standardize(torch.full((3, 2), 4.0), moments(torch.full((3, 2), 4.0))) == 0).all()


def test_rows_are_kept_at_random_but_the_same():
    rows = torch.arange(1000.0)[:, None]
    kept = []
    for parts in (rows.split(1000), rows.split(7), parts_of(rows)):
        choice = Kept(100, seed=3)
        for part in parts:
            choice.add(part)
        assert choice.n == 1000
        kept.append(choice.rows[:, 0])
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])
    assert len(kept[0].unique()) == 100 and (kept[0].diff() > 0).all()
    assert abs(kept[0].mean() - 499.5) < 3 * 289 / 10
    few = Kept(100)
    few.add(rows[:40])
    assert torch.equal(few.rows, rows[:40].double())
    assert torch.equal(choose(5, 9), torch.arange(5)) and len(choose(100, 9).unique()) == 9
    assert not torch.equal(choose(100, 9), choose(100, 9, seed=1))


# Inception score ----------------------------------------------------------------------------------
def test_inception_score_between_1_and_the_number_of_classes():
    assert result(InceptionScore(), torch.full((50, 4), 0.25)) == pytest.approx((1, 0))
    assert result(InceptionScore(), torch.eye(4)[:1].expand(50, -1)) == pytest.approx((1, 0))
    assert result(InceptionScore(1), torch.eye(4).repeat(5, 1)) == pytest.approx((4, 0))


def test_inception_score_of_two_rows():
    """p = (1, 0) and (1/2, 1/2): exp((ln 4/3 + (ln 2/3 + ln 2) / 2) / 2)."""
    score = result(InceptionScore(1), torch.tensor([[1, 0], [0.5, 0.5]]))
    kl = (math.log(4 / 3) + (math.log(2 / 3) + math.log(2)) / 2) / 2
    assert score == pytest.approx((math.exp(kl), 0))


def test_splits_are_equal_and_random():
    """Rows by class: splits of rows that follow one another would have one class each, score 1."""
    rows = torch.eye(10).repeat_interleave(100, 0)
    mean, deviation = result(InceptionScore(), rows)
    assert 9.9 < mean < 10.001 and deviation < 0.1
    by_turns, deviation = result(InceptionScore(), torch.eye(10).repeat(100, 1))
    assert 9 < by_turns < 10 and deviation > 0
    score = InceptionScore(4)
    score.add(rows[:203])
    assert sorted(score._count.tolist()) == [50, 51, 51, 51]
    assert result(InceptionScore(seed=1), torch.eye(10).repeat(100, 1))[0] != by_turns


# Precision, recall, density, coverage -------------------------------------------------------------
def test_balls_on_a_line():
    """With k = 1 the balls of 0, 1, 3 have radii 1, 1, 2; those of 2, 2.5, 9 have 0.5, 0.5, 6.5."""
    real, generated = column(0, 1, 3), column(2, 2.5, 9)
    found = result(PrecisionRecall(real, k=1, density_k=1), generated)
    # 2 is on the border of the ball of 1, and inside that of 3, as 2.5 is.
    assert found.precision == pytest.approx(2 / 3)
    # 3 is on the border of the ball of 2.5, and inside that of 9.
    assert found.recall == pytest.approx(1 / 3)
    assert found.density == pytest.approx(2 / 3)
    assert found.coverage == pytest.approx(1 / 3)


def test_the_border_of_a_ball():
    """A sample at 2, on the border of the ball of 1 alone: inside with <=, outside with <."""
    found = result(PrecisionRecall(column(0, 1), k=1, density_k=1), column(2, 20, 21))
    assert found.precision == pytest.approx(1 / 3) and found.recall == 1
    assert found.density == found.coverage == 0


def test_density_counts_every_ball():
    """With k = 2 the balls of 0, 1, 2, 3 have radii 2, 1, 1, 2; 1.5 is in all of them."""
    meter = PrecisionRecall(column(0, 1, 2, 3), k=2, density_k=2)
    found = result(meter, column(1.5, 1.5, 99, 99))
    assert found.density == pytest.approx((4 + 4) / (4 * 2)) and found.coverage == 1
    assert found.precision == 0.5


def test_repeated_samples_recall_only_what_they_equal():
    real = normals(30, 5)
    found = result(PrecisionRecall(real), real[:1].repeat(40, 1))
    assert found.precision == 1 and found.recall == pytest.approx(1 / 30)
    assert result(PrecisionRecall(real), real) == pytest.approx((1, 1, 6 / 5, 1), abs=0.3)


def test_recall_of_a_fixed_number_of_samples():
    real, generated = normals(50, 3), normals(400, 3, seed=1)
    few = result(PrecisionRecall(real, held=20, seed=2), *generated.split(90))
    every = result(PrecisionRecall(real, seed=2), generated)
    kept = Kept(20, seed=2)
    kept.add(generated)
    assert few.recall == result(PrecisionRecall(real), kept.rows).recall != every.recall
    assert few._replace(recall=0) == every._replace(recall=0)


def exact_neighborhoods(real, generated, k=3, density_k=5):
    """In whole numbers."""

    def squares(a, b):
        return (a[:, None] - b).square().sum(2)

    def radii(rows, k):
        return squares(rows, rows).sort(1).values[:, k]

    across = squares(generated, real)
    inside = across < radii(real, density_k)
    return (
        (across <= radii(real, k)).any(1).double().mean().item(),
        (radii(generated, k) >= across.T).any(1).double().mean().item(),
        inside.sum().item() / (len(generated) * density_k),
        inside.any(0).double().mean().item(),
    )


@pytest.mark.parametrize("scale", [1.0, 1 / 127.5, 0.1, 1e5])
@pytest.mark.parametrize("offset", [0.0, 3.7])
def test_no_round_off_decides_of_ties(scale, offset):
    """300 rows of 12 numbers in {0, 1, 2}: most distances are there many times over."""
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randint(3, (2, 300, 12), generator=generator)
    measure = PrecisionRecall(real.double() * scale + offset)
    for part in generated.split(90):
        measure.add(part.double() * scale + offset)
    assert measure.result() == pytest.approx(exact_neighborhoods(real, generated), abs=1e-12)


def test_of_equally_near_rows_the_first_is_nearest():
    generator = torch.Generator().manual_seed(0)
    reference, rows = torch.randint(3, (2, 300, 12), generator=generator)
    squares = (rows[:, None] - reference).square().sum(2)
    least = squares.amin(1, keepdim=True)
    for scale in (1.0, 1 / 127.5):
        distance, number = nearest(rows.double() * scale + 0.3, reference.double() * scale + 0.3)
        torch.testing.assert_close(distance, least[:, 0].sqrt().double() * scale)
        assert number.tolist() == (squares == least).byte().argmax(1).tolist()


# Memorization -------------------------------------------------------------------------------------
def test_mann_whitney_of_few_rows():
    """Distances to 0: samples 1, 4, 2; unseen rows 2, 3, 5, 6. U = 0 + 2 + 1/2."""
    memorization = Memorization(column(0), column(2, 3, 5, -6))
    found = result(memorization, column(-1, 4, 2))
    assert found.z == pytest.approx((2.5 - 6) / math.sqrt(12 * 8 / 12))
    assert found.close == pytest.approx(2 / 3)  # below 2.03
    assert found.nearer_training == pytest.approx(1 / 3) and found.expected == 1 / 5


def test_copies_on_a_line():
    training, unseen = normals(200, 3), normals(50, 3, seed=1)
    found = result(Memorization(training, unseen), training[:100])
    # Ties with nothing, below all: U = 0.
    assert found.z == pytest.approx(-math.sqrt(3 * 100 * 50 / 151))
    assert found.close == found.nearer_training == 1 and found.expected == 0.8


def test_ties_with_unseen_rows_count_one_half():
    """Samples that are as far from training as unseen rows are: z is 0, and none is close."""
    generator = torch.Generator().manual_seed(0)
    training = torch.randint(3, (200, 12), generator=generator)
    unseen = torch.randint(3, (90, 12), generator=generator)
    measure = Memorization(training * 0.1, unseen * 0.1)
    measure.add(unseen * 0.1)
    found = measure.result()
    assert found.z == 0 and found.nearer_training == 0


def test_unseen_rows_are_no_copies():
    """Of 40 draws z has mean 0 and deviation 1, and the share that is expected is found."""
    z, nearer = [], []
    for seed in range(40):
        rows = normals(700, 4, seed=seed)
        found = result(Memorization(rows[:400], rows[400:500]), rows[500:])
        z.append(found.z)
        nearer.append(found.nearer_training)
    mean = sum(z) / 40
    assert abs(mean) < 3 / math.sqrt(40)
    assert 0.6 < sum((v - mean) ** 2 for v in z) / 39 < 1.7
    assert sum(nearer) / 40 == pytest.approx(0.8, abs=0.02)


def test_nearest():
    reference, rows = normals(600, 5), normals(300, 5, seed=1)
    distance, row = nearest(torch.cat([rows, reference[77:78]]), reference)
    every = (rows[:, None] - reference).square().sum(2).sqrt()
    torch.testing.assert_close(distance[:-1], every.amin(1))
    assert torch.equal(row[:-1], every.argmin(1))
    assert distance[-1] == 0 and row[-1] == 77


def test_equal_rows_far_from_0_are_equal():
    """A copy has distance 0, whatever round-off its length leaves."""
    rows = normals(50, 300) * 1e3 + 7e3
    assert (nearest(rows, rows)[0] == 0).all()


# Birthday paradox ---------------------------------------------------------------------------------
def birthdays(weights, seed, size=100, batches=20):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.multinomial(weights, size * batches, replacement=True, generator=generator)
    return result(Birthday(size, 1e-6), ids.double()[:, None])


def test_support_of_a_uniform_distribution():
    """Within 20 % nine times of ten."""
    found = [birthdays(torch.ones(1000), seed).estimate for seed in range(50)]
    assert sum(abs(n - 1000) <= 200 for n in found) >= 45


def test_support_of_another_distribution_is_1_over_the_sum_of_squares():
    weights = 1 / torch.arange(1, 1001).double()
    expected = weights.sum() ** 2 / weights.square().sum()
    assert expected == pytest.approx(34.08, abs=0.01)
    found = [birthdays(weights, seed).estimate for seed in range(10)]
    assert sum(abs(n - expected) <= 0.2 * expected for n in found) >= 9


def test_duplicates_are_counted_within_a_batch():
    found = result(Birthday(3, 0.5), column(0, 0.4, 5, 5, 9, 9), column(9, 0))
    # {0, 0.4, 5} and {5, 9, 9} have one pair each; {9, 0} is left over.
    assert found == (3.0, 6 / -math.log(0.05), 2, 6)
    none = result(Birthday(3, 0.4), column(0, 0.4, 5))
    assert none.estimate is None and none.at_least == pytest.approx(3 / 2.9957, rel=1e-4)


# For each condition -------------------------------------------------------------------------------
def test_best_of_n():
    distances = torch.tensor([[3.0, 1], [2, 4], [5, 0]])
    assert best_of_n(distances).tolist() == [2, 1.5, 1]


def test_diversity():
    assert diversity(column(0, 1, 3)) == pytest.approx((1 + 3 + 2) / 3)
    assert diversity(torch.ones(4, 7)) == 0


# Parts --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "make",
    [
        lambda: PrecisionRecall(normals(80, 6)),
        lambda: PrecisionRecall(normals(80, 6), held=50),
        lambda: Memorization(normals(80, 6), normals(30, 6, seed=2)),
        lambda: Birthday(20, 1.5),
        InceptionScore,
    ],
)
def test_parts_change_nothing(make):
    rows = normals(500, 6, seed=1)
    rows = rows.softmax(1) if make is InceptionScore else rows
    assert result(make(), *parts_of(rows)) == pytest.approx(result(make(), rows), rel=1e-12)


# Errors -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: Moments().add(x[0]), r"rows must be \(N, d\) with d > 0, got \(4,\)"),
        (lambda x: Moments().add(x[:, :0]), r"rows must be \(N, d\) with d > 0, got \(9, 0\)"),
        (lambda x: Moments().add(x / 0), "rows must be finite"),
        (lambda x: moments(x).add(x[:, :2]), r"rows must be \(N, 4\), got \(9, 2\)"),
        (lambda x: moments(x).merge(moments(x[:, :2])), "other must be of 4 features, got 2"),
        (lambda x: moments(x[:1]).covariance, "rows must be at least 2 for a covariance, got 1"),
        (
            lambda x: frechet_distance(moments(x), moments(x[:, 1:])),
            "other must be of 4 features, got 3",
        ),
        (lambda x: kernel_distance(x, x[:, 1:]), r"generated must be \(N, 4\)"),
        (lambda x: kernel_distance(x[:1], x), "real must be at least 2 rows, got 1"),
        (lambda x: kernel_distance(x, x, size=1), "size must be an int of at least 2, got 1"),
        (lambda x: Kept(0), "size must be an int of at least 1, got 0"),
        (lambda x: InceptionScore(0), "splits must be an int of at least 1, got 0"),
        (lambda x: InceptionScore().add(x), "probabilities must not be negative, and sum to 1"),
        (lambda x: result(InceptionScore(), x.softmax(1)), "at least one for each split, got 9"),
        (lambda x: PrecisionRecall(x, k=0), "k must be an int of at least 1, got 0"),
        (lambda x: PrecisionRecall(x[:5]), "real must be at least 6 rows, got 5"),
        (lambda x: PrecisionRecall(x).add(x[:, 1:]), r"generated must be \(N, 4\)"),
        (lambda x: result(PrecisionRecall(x), x[:3]), "generated must be more than k = 3 rows"),
        (lambda x: Memorization(x, x[:1]), "unseen must be at least 2 rows, got 1"),
        (lambda x: result(Memorization(x, x)), "generated must be at least one row"),
        (lambda x: nearest(x, x[:0]), "reference must be at least 1 rows, got 0"),
        (lambda x: Birthday(1, 1.0), "size must be an int of at least 2, got 1"),
        (lambda x: Birthday(5, math.nan), "threshold must be a number above 0"),
        (lambda x: result(Birthday(10, 1.0), x), "generated must be at least size = 10 rows"),
        (lambda x: best_of_n(x[:0]), "distances must be at least 1 rows"),
        (lambda x: diversity(x[:1]), "draws must be at least 2 rows, got 1"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call(normals(9, 4))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: Kept(2.5), "size"),
        (lambda x: InceptionScore(True), "splits"),
        (lambda x: PrecisionRecall(x, k=2.5), "k"),
        (lambda x: PrecisionRecall(x, density_k=True), "density_k"),
        (lambda x: kernel_distance(x, x, subsets=True), "subsets"),
        (lambda x: Birthday(2.5, 1.0), "size"),
        (lambda x: Birthday(5, "1"), "threshold"),
    ],
)
def test_counts_are_whole_numbers(call, name):
    with pytest.raises(TypeError, match=f"^{name} must be"):
        call(normals(9, 4))


def test_integers_are_no_features():
    with pytest.raises(TypeError, match=r"rows must be floating, got torch\.int64"):
        Moments().add(torch.ones(3, 2, dtype=torch.int64))


# Known samples ------------------------------------------------------------------------------------
N = 400


@pytest.fixture(scope="module")
def known():
    """{name: images (N, 1, 28, 28)} made of images held out, the others, and training."""
    test, train = load_task("class_to_image", "test"), load_task("class_to_image")
    batch = test.batch(torch.arange(1000))
    real, rest, labels = batch["y"][:N], batch["y"][-N:], batch["cond"][:N]
    training = train.batch(torch.arange(1200))["y"]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(real.shape, generator=generator)
    copied = torch.randperm(1200, generator=generator)[:N]
    half = real[labels < 5]
    samples = {
        "training copies": training[copied],
        "held out": real,
        "noise .1": real + 0.1 * noise,
        "blur": F.avg_pool2d(F.pad(real, (1,) * 4, value=-1.0), 3, 1),
        "noise .3": real + 0.3 * noise,
        "classes dropped": torch.cat([half, half, half])[:N],
        "uniform noise": 2 * torch.rand(real.shape, generator=generator) - 1,
        "one image": real[:1].expand(N, -1, -1, -1),
        "40 repeated": real[:40].repeat(10, 1, 1, 1),
        "copies, noise .05": training[copied] + 0.05 * noise,
    }
    return samples, rest, training


@pytest.fixture(scope="module")
@torch.no_grad()
def features(known):
    model = load_classifier()

    def extract(images):
        return torch.cat([model.features(part) for part in images.split(500)])

    samples, rest, training = known
    return {k: extract(v) for k, v in samples.items()}, extract(rest), extract(training)


def test_orders_of_the_frechet_distance(features):
    samples, _, training = features
    real = moments(training)
    order = list(samples)[:8]
    found = [frechet_distance(real, moments(samples[name])) for name in order]
    assert found == sorted(found), dict(zip(order, found, strict=True))


def test_orders_of_the_kernel_distance(features):
    samples, _, training = features
    real = moments(training)
    found = {
        name: kernel_distance(standardize(training, real), standardize(rows, real), subsets=3)[0]
        for name, rows in samples.items()
    }
    assert abs(found["held out"]) < found["noise .1"] / 2 < found["noise .3"] / 4
    assert found["noise .3"] < found["uniform noise"]


def test_orders_of_recall_and_coverage(features):
    samples, _, training = features
    real = training[choose(len(training), N)]
    found = {name: result(PrecisionRecall(real), rows) for name, rows in samples.items()}
    held_out = found["held out"]
    assert held_out.recall > 0.75 and held_out.coverage > 0.9
    assert found["classes dropped"].recall < held_out.recall - 0.25
    assert found["classes dropped"].coverage < held_out.coverage - 0.25
    assert found["40 repeated"].recall < 0.01 and found["40 repeated"].coverage < 0.4
    for name in ("uniform noise", "one image"):
        assert found[name].recall < 0.05 and found[name].coverage < 0.05


@torch.no_grad()
def test_inception_scores(features):
    head = load_classifier().head
    samples = features[0]
    found = {
        name: result(InceptionScore(), head(rows).softmax(1))[0] for name, rows in samples.items()
    }
    assert found["one image"] == pytest.approx(1) and found["uniform noise"] < 2
    assert found["classes dropped"] < found["held out"] - 1
    assert found["training copies"] > found["held out"] - 0.3  # it sees no copying


@pytest.mark.parametrize("space", ["pixels", "features"])
def test_memorization_catches_copies_and_passes_held_out_images(known, features, space):
    samples, rest, training = known if space == "pixels" else features

    def found(name):
        rows = samples[name].flatten(1)
        return result(Memorization(training.flatten(1), rest.flatten(1)), rows)

    held_out = found("held out")
    assert abs(held_out.z) < 3 and held_out.close < 0.05
    assert held_out.nearer_training == pytest.approx(held_out.expected, abs=0.06)
    for name in ("training copies", "copies, noise .05"):
        copies = found(name)
        assert copies.z < -10 and copies.nearer_training > 0.97 > held_out.expected + 0.1, name
    assert found("training copies").close == 1
    assert found("uniform noise").z > 10


def test_birthday_of_images_that_repeat(known):
    """With noise that hides the copies from equality: 60 images, or as many as are drawn."""
    samples, rest, _ = known
    real = samples["held out"].flatten(1)
    threshold = nearest(real[:200], real[200:])[0].quantile(0.01).item()
    generator = torch.Generator().manual_seed(0)
    drawn = real[torch.randint(60, (N,), generator=generator)]
    drawn = drawn + 0.02 * torch.randn(drawn.shape, generator=generator)
    assert result(Birthday(100, threshold), drawn).estimate == pytest.approx(60, rel=0.2)
    assert result(Birthday(N, threshold), rest.flatten(1)).estimate > 1000
