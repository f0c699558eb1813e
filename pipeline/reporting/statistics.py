"""Accuracies that vary with the seed of the run and with the images: bootstrap intervals, tests, adjustments."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]
REPLICATES = 2000
LEVEL = 0.95


class Interval(NamedTuple):
    """A mean with the bounds of its bootstrap interval."""

    mean: float
    low: float
    high: float


def replicates(values: Array, count: int = REPLICATES, seed: int = 0) -> Array:
    """Bootstrap replicates (count,) of the mean of `values` (S, n), one row per seed and one column per image.

    A replicate draws S seeds and, independently, n images, both with replacement, and averages over the drawn rows and
    columns: with draw counts c over seeds and d over images, sum_si c_s d_i values_si / (S n). Its variance counts
    that of the seeds and that of the images once each and that of their interaction up to three times (Owen, «The
    pigeonhole bootstrap», 2007): intervals are never too narrow for many seeds, and too narrow by sqrt((S-1)/S) for
    the seeds' part alone. With one seed only images are drawn: nothing is said about other seeds.
    """
    rows, columns = values.shape
    picked, drawn = _draws(rows, count, 2 * seed), _draws(columns, count, 2 * seed + 1)
    return np.asarray(((picked @ values) * drawn).sum(axis=1) / (rows * columns))


@lru_cache(maxsize=8)
def _draws(items: int, count: int, seed: int) -> Array:
    """How often each item is drawn in each replicate, (count, items)."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(items, np.full(items, 1.0 / items), size=count).astype(np.float64)


def interval(values: Array, level: float = LEVEL, count: int = REPLICATES, seed: int = 0) -> Interval:
    """Mean and two-level (seed x image) percentile interval of `values` (S, n)."""
    return Interval(float(values.mean()), *percentiles(replicates(values, count, seed), level))


def percentiles(found: Array, level: float) -> tuple[float, float]:
    """Bounds of the percentile interval of bootstrap replicates (count,)."""
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson(share: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval of a share of n images, in [0, 1]: what other images of the same kind would give."""
    from scipy import stats  # late: it takes half a second

    found = stats.binomtest(round(share * n), n).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


# two classifiers on the same images ----------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """How n images are classified: both classifiers right, one alone, the other alone, or neither."""

    both: int
    one_alone: int
    other_alone: int
    neither: int

    @property
    def images(self) -> int:
        return sum(self)

    @property
    def gain(self) -> float:
        """Points of top-1 by which one is above the other."""
        return 100.0 * (self.one_alone - self.other_alone) / self.images


def pairs(one: Bools, other: Bools) -> Pairs:
    """Count the images (n,) by who classified them correctly.

    Raises ValueError: there are no images, or not the same for both.
    """
    if one.shape != other.shape or one.size == 0:
        raise ValueError(f"the same images for both, and at least one: got {one.shape} and {other.shape}")
    return Pairs(*(int(cell.sum()) for cell in (one & other, one & ~other, ~one & other, ~one & ~other)))


def mcnemar(found: Pairs) -> float:
    """p of the exact two-sided McNemar test: were the images on which the two differ a fair coin?

    Under the null hypothesis the number that one alone gets right is binomial with 1/2 among those that exactly one
    gets right (McNemar 1947, with the exact distribution instead of chi-squared). 1 where they never differ.
    """
    from scipy import stats  # late: no other command needs it

    differing = found.one_alone + found.other_alone
    return 1.0 if differing == 0 else float(stats.binomtest(found.one_alone, differing, 0.5).pvalue)


def replicates_of_pairs(found: Pairs, count: int, seed: int = 0) -> Array:
    """Bootstrap replicates (count,) of the gain in points: images drawn with replacement, as pairs.

    With one seed `replicates` draws from the same distribution, image by image. An image contributes +1, -1 or 0 here,
    so that n images are one draw of a multinomial over these three, whatever n.
    """
    n = found.images
    shares = [found.one_alone / n, found.other_alone / n, (found.both + found.neither) / n]
    drawn = np.random.default_rng(seed).multinomial(n, shares, size=count)
    return np.asarray(100.0 * (drawn[:, 0] - drawn[:, 1]) / n)


# tests ---------------------------------------------------------------------------------------------------------------

ENOUGH = 5
"""Number of seeds from which on the bootstrap's interval stands alone."""


class Difference(NamedTuple):
    """A paired difference: its bootstrap interval, a two-sided p, the number of seeds, and Student's interval."""

    interval: Interval
    p: float
    seeds: int
    student: Interval | None
    """Student's interval over the seeds alone, for 2 or more seeds and fewer than `ENOUGH`."""


def paired(one: Array, other: Array) -> Difference:
    """Compare two methods on the same seeds and images, both (S, n).

    With S >= 5 the p is the bootstrap's, with 2 to 4 seeds that of Student's paired test over the seeds' means, since
    resampling so few rows says little about other seeds; with one seed it is about other images only.
    """
    values = one - other
    found = interval(values)
    if 2 <= len(values) < ENOUGH:
        student, p = paired_t(values.mean(axis=1))
        return Difference(found, p, len(values), student)
    return Difference(found, bootstrap_p(values), len(values), None)


def paired_t(differences: Array) -> tuple[Interval, float]:
    """Student's interval and two-sided p of the mean of paired differences (S,), S >= 2."""
    from scipy import stats  # late: no other command needs it

    mean = float(differences.mean())
    if np.ptp(differences) == 0:
        return Interval(mean, mean, mean), float(mean == 0)
    found = stats.ttest_1samp(differences, 0.0)
    low, high = found.confidence_interval(LEVEL)
    return Interval(mean, float(low), float(high)), float(found.pvalue)


def bootstrap_p(values: Array, count: int = REPLICATES, seed: int = 0) -> float:
    """Two-sided p of a mean of 0: twice the smaller share of replicates on one side of it (Efron & Tibshirani 1993).

    Never below 2 / (count + 1): what does not occur in `count` replicates is not impossible.
    """
    found = replicates(values, count, seed)
    side = min(int((found <= 0).sum()), int((found >= 0).sum()))
    return min(1.0, 2.0 * (side + 1) / (count + 1))


def holm(ps: Sequence[float]) -> list[float]:
    """p values adjusted for their number (Holm 1979): the i-th smallest of m times m - i + 1, rising, at most 1."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = highest
    return adjusted
