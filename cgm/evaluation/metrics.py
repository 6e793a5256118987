"""How samples compare with real images: measures of feature matrices, in float64 on the CPU.

frechet_distance   |m - m'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2)      copies win it
kernel_distance    unbiased squared MMD, kernel (x . y / d + 1)^3
InceptionScore     exp(mean KL(p(class | x) || p(class)))                knows no real image
PrecisionRecall    precision, recall, density, coverage: balls around neighbors
Memorization       are samples closer to the training images than unseen images are?
Birthday           1 / sum p^2 of what is drawn, from the duplicates among draws
best_of_n          smallest of the first n distances to the real y, for each condition
diversity          mean distance of two draws for one condition

Features are rows (N, d); no measure makes them. Each has a blind side: training images returned
as samples have a perfect Frechet distance, noise may have a good precision, one good image a
density above 1. They are to be read together, and beside the same measure of real images that
were kept from training, at the same number of rows: the Frechet distance of two sets of real
images is not 0, but falls like 1 / N.

Samples come in parts, any number of them: `add` them one part after another. The result depends on
the rows and their order, not on the parts, and memory does not grow with the rows. What measures
keep are the features of the real rows and, where pairs of samples count (recall; the rows for
`kernel_distance`), a fixed number of sample rows, which Philox chooses by their number. Wrong
arguments raise ValueError or TypeError.

Source   M. Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash
         equilibrium", arXiv:1706.08500 (Frechet distance).
         M. Binkowski et al., "Demystifying MMD GANs", arXiv:1801.01401 (kernel distance).
         T. Salimans et al., "Improved techniques for training GANs", arXiv:1606.03498 (Inception
         score).
         T. Kynkaanniemi et al., "Improved precision and recall metric for assessing generative
         models", arXiv:1904.06991.
         M. F. Naeem et al., "Reliable fidelity and diversity metrics for generative models",
         arXiv:2002.09797 (density, coverage).
         C. Meehan, K. Chaudhuri, S. Dasgupta, "A non-parametric test to detect data-copying in
         generative models", arXiv:2004.05675 (memorization, of which we take one cell).
         S. Arora, Y. Zhang, "Do GANs actually learn the distribution? An empirical study",
         arXiv:1706.08224 (birthday paradox).
         T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise algorithm for
         computing sample variances", 1979 (moments in parts).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cgkernels.checks import SMALLEST, check_int, check_number
from cgkernels.random import STREAM_MEASURES, uniform
from cgm.evaluation.distances import BLOCK, TIE, as_rows, balls_of, nearest, squares_of

# What the measures draw, one step number of their stream each.
_STEP_KEEP, _STEP_SPLIT, _STEP_REAL, _STEP_GENERATED = 0, 1, 2, 3


# Frechet distance ---------------------------------------------------------------------------------
class Moments:
    """Mean (d,) and covariance (d, d) of rows that come in parts."""

    def __init__(self) -> None:
        self.n = 0
        self.mean = self._scatter = torch.zeros(0, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Takes rows (n, d), n may be 0."""
        rows = as_rows("rows", rows, like=self.mean if self.n else None)
        if len(rows):
            mean = rows.mean(0)
            centered = rows - mean
            self._add(len(rows), mean, centered.T @ centered)

    def merge(self, other: "Moments") -> None:
        """Takes the rows that another has seen."""
        if other.n:
            if self.n and len(other.mean) != len(self.mean):
                raise ValueError(
                    f"other must be of {len(self.mean)} features, got {len(other.mean)}"
                )
            self._add(other.n, other.mean, other._scatter)

    def _add(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        if self.n == 0:
            self.n, self.mean, self._scatter = n, mean.clone(), scatter.clone()
            return
        total = self.n + n
        apart = mean - self.mean
        self._scatter += scatter + apart.outer(apart) * (self.n * n / total)
        self.mean = self.mean + apart * (n / total)
        self.n = total

    @property
    def covariance(self) -> Tensor:
        """(d, d), divided by n - 1."""
        if self.n < 2:
            raise ValueError(f"rows must be at least 2 for a covariance, got {self.n}")
        return self._scatter / (self.n - 1)


def frechet_distance(one: Moments, other: Moments) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2), the "FID" of any features.

    The trace of the root is the sum of the singular values of R^T R' with S = R R^T, S' = R' R'^T,
    without the directions in which a covariance is 0 but for round-off, whose root is no small
    number: right to all digits also where there are fewer rows than features. The distance of
    finite samples is too large by about 1 / n, the more the more features there are: compare at
    equal n.
    """
    if one.n and other.n and len(one.mean) != len(other.mean):
        raise ValueError(f"other must be of {len(one.mean)} features, got {len(other.mean)}")
    first, second = one.covariance, other.covariance
    shared = torch.linalg.svdvals(_root(first).T @ _root(second)).sum()
    apart = (one.mean - other.mean).square().sum()
    return max(0.0, (apart + first.trace() + second.trace() - 2 * shared).item())


def _root(covariance: Tensor) -> Tensor:
    """R (d, rank) with R R^T the covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


# Kernel distance ----------------------------------------------------------------------------------
def kernel_distance(
    real: Tensor, generated: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and population standard deviation, over random subsets, of the unbiased squared MMD.

    With k(x, y) = (x . y / d + 1)^3 and subsets of `size` rows each, at most all rows:
        sum_{i != j} (k(x_i, x_j) + k(y_i, y_j)) / (size (size - 1)) - 2 mean k(x_i, y_j)
    Its expectation is 0 for equal distributions at any size; a value may be negative. It grows
    with the sixth power of the features' scale: `standardize` them to compare extractors. The
    deviation is customary, but no standard error: subsets overlap.
    """
    real = as_rows("real", real, least=2)
    generated = as_rows("generated", generated, like=real[0], least=2)
    check_int("subsets", subsets, 1)
    check_int("size", size, 2)
    size = min(size, len(real), len(generated))
    found = []
    for subset in range(subsets):
        x = real[_chosen(len(real), size, seed, subset, _STEP_REAL)]
        y = generated[_chosen(len(generated), size, seed, subset, _STEP_GENERATED)]
        xx, yy, xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
        found.append(within / (size * (size - 1)) - 2 * xy.mean())
    values = torch.stack(found)
    return values.mean().item(), values.std(correction=0).item()


def standardize(rows: Tensor, real: Moments) -> Tensor:
    """(rows - mean) / scale with the mean of the real rows, and their mean variance = scale^2.

    One scale for all features: a feature that hardly varies among real rows is not blown up.
    """
    rows = as_rows("rows", rows, like=real.mean if real.n else None)
    scale = real.covariance.diagonal().mean().sqrt().item()
    return (rows - real.mean) / (scale or 1.0)


def choose(n: int, size: int, seed: int = 0) -> Tensor:
    """Numbers of `size` of n rows, all if there are fewer, ascending: a function of its arguments.

    Of the real rows, to compare as many as there are samples.
    """
    return _chosen(n, min(n, size), seed, 0, _STEP_KEEP).sort().values


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _chosen(n: int, size: int, seed: int, number: int, step: int) -> Tensor:
    return _uniform((1, n), seed, torch.tensor([number]), step)[0].argsort(stable=True)[:size]


class Kept:
    """A uniformly random choice of at most `size` rows, of any number that come in parts.

    Kept are the rows with the smallest Philox uniforms; that of a row is a function of its number
    and the seed.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        check_int("size", size, 1)
        self.size, self.seed, self.n = size, seed, 0
        self._rows = torch.zeros(0, dtype=torch.float64)
        self._u = torch.zeros(0, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Takes rows (n, d), n may be 0."""
        rows = as_rows("rows", rows, like=self._rows[0] if self.n else None)
        index = torch.arange(self.n, self.n + len(rows))
        u = _uniform((len(rows), 1), self.seed, index, _STEP_KEEP)
        all_u = torch.cat([self._u, u[:, 0]])
        all_rows = torch.cat([self._rows, rows]) if self.n else rows
        kept = all_u.argsort(stable=True)[: self.size].sort().values
        self._u, self._rows, self.n = all_u[kept], all_rows[kept], self.n + len(rows)

    @property
    def rows(self) -> Tensor:
        """(min(n, size), d) float64, in the order they came in."""
        return self._rows


# Inception score ----------------------------------------------------------------------------------
class InceptionScore:
    """exp(mean KL(p(class | x) || p(class))) of class probabilities, in `splits` parts of the rows.

    The probabilities come from any classifier; the score is between 1 and the number of classes.
    Of each `splits` rows that follow one another each split gets one, by Philox: splits are equal,
    and an order of the rows (by class, say) does no harm. The score sees no real image, and is
    as high for copies or a hundred images repeated as for real ones.
    """

    def __init__(self, splits: int = 10, seed: int = 0) -> None:
        check_int("splits", splits, 1)
        self.splits, self.seed, self.n = splits, seed, 0
        self._count = torch.zeros(splits, dtype=torch.float64)
        self._entropy = torch.zeros(splits, dtype=torch.float64)  # sums of p ln p
        self._sum = torch.zeros(splits, 0, dtype=torch.float64)  # sums of p

    def add(self, probabilities: Tensor) -> None:
        """Takes class probabilities (n, classes), n may be 0."""
        p = as_rows("probabilities", probabilities, like=self._sum[0] if self.n else None)
        if len(p) and (p.min() < 0 or (p.sum(1) - 1).abs().max() > 1e-3):
            raise ValueError("probabilities must not be negative, and sum to 1 in each row")
        if self.n == 0:
            self._sum = torch.zeros(self.splits, p.shape[1], dtype=torch.float64)
        split = self._split_of(torch.arange(self.n, self.n + len(p)))
        self._count.index_add_(0, split, torch.ones(len(p), dtype=torch.float64))
        self._entropy.index_add_(0, split, torch.xlogy(p, p).sum(1))
        self._sum.index_add_(0, split, p)
        self.n += len(p)

    def _split_of(self, rows: Tensor) -> Tensor:
        groups, group = torch.unique(rows // self.splits, return_inverse=True)
        u = _uniform((len(groups), self.splits), self.seed, groups, _STEP_SPLIT)
        return u.argsort(dim=1, stable=True)[group, rows % self.splits]

    def result(self) -> tuple[float, float]:
        """Mean and population standard deviation over the splits."""
        if self.n < self.splits:
            raise ValueError(f"rows must be at least one for each split, got {self.n}")
        mean = self._sum / self._count[:, None]
        scores = (self._entropy / self._count - torch.xlogy(mean, mean).sum(1)).exp()
        return scores.mean().item(), scores.std(correction=0).item()


# Precision, recall, density, coverage -------------------------------------------------------------
class Neighborhoods(NamedTuple):
    """What `PrecisionRecall` found."""

    precision: float
    recall: float
    density: float
    coverage: float


class PrecisionRecall:
    """Balls around rows, as far as their k-th nearest neighbor among their own kind.

        precision   share of samples that lie in a ball of a real row
        recall      share of real rows that lie in a ball of a sample
        density     mean number of real balls that a sample lies in, / k
        coverage    share of real balls with a sample in them

    Precision and recall with k = 3 and <=; density and coverage with k = 5 and <, as their sources
    have them, where squared distances that differ by 1e-12 of the rows' squared lengths are equal:
    no round-off decides of a tie. A row is not its own neighbor. Compare as many real rows as
    samples: all four depend on both numbers. Noise or one image may have a high precision and
    density; their recall and coverage are near 0.

    held: recall is of so many samples at most, a random choice. The others are of all samples.
    """

    def __init__(
        self, real: Tensor, *, k: int = 3, density_k: int = 5, held: int = 10_000, seed: int = 0
    ) -> None:
        check_int("k", k, 1)
        check_int("density_k", density_k, 1)
        self._real = as_rows("real", real, least=max(k, density_k) + 1)
        self._k, self._density_k = k, density_k
        self._narrow, self._wide = balls_of(self._real, k, density_k)
        self._kept = Kept(held, seed)
        self._precise, self._inside = 0, 0
        self._covered = torch.zeros(len(self._real), dtype=torch.bool)

    def add(self, generated: Tensor) -> None:
        """Takes samples (n, d), n may be 0."""
        generated = as_rows("generated", generated, like=self._real[0])
        self._kept.add(generated)
        for block in generated.split(BLOCK):
            squares, error = squares_of(block, self._real)
            self._precise += int((squares - error <= self._narrow.most).any(1).sum())
            inside = squares + error < self._wide.least
            self._inside += int(inside.sum())
            self._covered |= inside.any(0)

    def result(self) -> Neighborhoods:
        """Of the samples so far, of which there must be more than k."""
        n, kept = self._kept.n, self._kept.rows
        if n <= self._k:
            raise ValueError(f"generated must be more than k = {self._k} rows, got {n}")
        (balls,) = balls_of(kept, self._k)
        recalled = []
        for block in self._real.split(BLOCK):
            squares, error = squares_of(block, kept)
            recalled.append((squares - error <= balls.most).any(1))
        return Neighborhoods(
            precision=self._precise / n,
            recall=torch.cat(recalled).double().mean().item(),
            density=self._inside / (n * self._density_k),
            coverage=self._covered.double().mean().item(),
        )


# Memorization -------------------------------------------------------------------------------------
class Copying(NamedTuple):
    """What `Memorization` found: see there."""

    z: float
    close: float
    nearer_training: float
    expected: float


class Memorization:
    """Are samples closer to the training rows than rows are that training never saw?

        z                 Mann-Whitney statistic of the distances d to the nearest training row, of
                          n samples and m unseen rows: (U - nm / 2) / sqrt(nm (n + m + 1) / 12),
                          U = number of pairs in which the sample is farther, ties one half
        close             share of samples with d below the 1 % quantile of the unseen rows
        nearer_training   share of samples that are nearer to a training row than to any unseen one
        expected          of that share, N / (N + m): training and unseen rows are alike to a model
                          that has learned their distribution

    Of unseen rows z is a standard normal and `close` 0.01; of a model that returns training
    images z is far below -10, and `close` near 1. Without a correction for ties |z| is a little
    too small where copies are exact. A z below 0 alone is no proof: images that are smoother than
    real ones are close to all images. Of them `nearer_training` is as expected, of copies it is
    near 1. It means nothing of samples that were made from the unseen rows' own conditions, and
    are near them for that reason.

    Test in pixels and in features: copies with a blur are far from their originals in the features
    of a classifier.
    """

    def __init__(self, training: Tensor, unseen: Tensor) -> None:
        self._training = as_rows("training", training, least=1)
        self._unseen = as_rows("unseen", unseen, like=self._training[0], least=2)
        self._limits = nearest(self._unseen, self._training)[0].sort().values
        self._quantile = self._limits.quantile(0.01)
        self._n, self._u, self._close, self._nearer = 0, 0.0, 0, 0

    def add(self, generated: Tensor) -> tuple[Tensor, Tensor]:
        """Takes samples (n, d), n may be 0; returns what `nearest` says of them."""
        generated = as_rows("generated", generated, like=self._training[0])
        distance, row = nearest(generated, self._training)
        below = torch.searchsorted(self._limits, distance * (1 - TIE))
        up_to = torch.searchsorted(self._limits, distance * (1 + TIE), right=True)
        self._u += (below + up_to).sum().item() / 2
        self._close += int((distance < self._quantile * (1 - TIE)).sum())
        unseen = nearest(generated, self._unseen)[0]
        self._nearer += int((distance < unseen * (1 - TIE)).sum())
        self._n += len(generated)
        return distance, row

    def result(self) -> Copying:
        """Of the samples so far."""
        n, m = self._n, len(self._limits)
        if n == 0:
            raise ValueError("generated must be at least one row, got none")
        z = (self._u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)
        expected = len(self._training) / (len(self._training) + m)
        return Copying(z, self._close / n, self._nearer / n, expected)


# Birthday paradox ---------------------------------------------------------------------------------
class Support(NamedTuple):
    """What `Birthday` found: see there."""

    estimate: float | None
    at_least: float
    duplicates: int
    pairs: int


class Birthday:
    """The size of the support of what is drawn, from the duplicates among draws.

    Two of the draws are equal with probability sum p^2, so that of R batches of s draws
        estimate = (R s (s - 1) / 2) / duplicates,      an estimate of 1 / sum p^2:
    the number of different samples if all are equally probable, and less if they are not: a lower
    bound of the support. Its relative error is about 1 / sqrt(duplicates). If no duplicate was
    found it is None, and 1 / sum p^2 is larger than at_least with 95 % confidence.

    Duplicates are rows nearer than `threshold`. If a share a of the pairs of different rows is
    nearer too, no estimate exceeds 1 / a: measure real rows as well, which says how far it reaches.
    """

    def __init__(self, size: int, threshold: float) -> None:
        check_int("size", size, 2)
        check_number("threshold", threshold, SMALLEST)
        self.size, self.threshold = size, threshold
        self._waiting = torch.zeros(0, dtype=torch.float64)
        self._duplicates, self._batches = 0, 0

    def add(self, generated: Tensor) -> None:
        """Takes samples (n, d), n may be 0: `size` that follow one another are a batch."""
        like = self._waiting[0] if len(self._waiting) else None
        rows = as_rows("generated", generated, like=like)
        rows = torch.cat([self._waiting, rows]) if len(self._waiting) else rows
        while len(rows) >= self.size:
            batch, rows = rows[: self.size], rows[self.size :]
            self._duplicates += int((torch.pdist(batch) < self.threshold).sum())
            self._batches += 1
        self._waiting = rows.clone()

    def result(self) -> Support:
        """Of the whole batches so far; what is left over does not count."""
        if self._batches == 0:
            raise ValueError(f"generated must be at least size = {self.size} rows")
        pairs = self._batches * self.size * (self.size - 1) // 2
        found = self._duplicates
        # Poisson with mean -ln 0.05 has no event with probability 0.05.
        at_least = pairs / -math.log(0.05)
        return Support(pairs / found if found else None, at_least, found, pairs)


# For each condition -------------------------------------------------------------------------------
def best_of_n(distances: Tensor) -> Tensor:
    """(n,) means over conditions of the smallest of the first 1, 2, .. n distances (n, B).

    distances: of n draws for each of B conditions to the real y. More draws lower it if they
    differ; a model without noise gains nothing.
    """
    return as_rows("distances", distances, least=1).cummin(0).values.mean(1)


def diversity(draws: Tensor) -> float:
    """Mean distance of two of the draws (n, d) for one condition; 0 if all are equal.

    Divided by that of real rows that share the condition it is 1 for the right diversity.
    """
    return torch.pdist(as_rows("draws", draws, least=2)).mean().item()


def _uniform(shape: tuple[int, int], seed: int, index: Tensor, step: int) -> Tensor:
    """Philox uniforms in float64: a row depends on the seed, its index (N,) and the step alone."""
    return uniform(
        shape, seed=seed, index=index, step=step, stream=STREAM_MEASURES, dtype=torch.float64
    )
