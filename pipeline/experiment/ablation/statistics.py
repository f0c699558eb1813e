"""Intervals for accuracies that vary with the seed of the run and with the images they were measured on."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
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
    """Mean and two-level (seed x image) percentile interval of `values` (S, n).

    Example:
        >>> interval(np.ones((3, 50)))
        Interval(mean=1.0, low=1.0, high=1.0)
    """
    found = replicates(values, count, seed)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def difference(one: Array, other: Array, level: float = LEVEL, count: int = REPLICATES, seed: int = 0) -> Interval:
    """Interval of the mean of `one` - `other`, both (S, n): paired, row by row of the same seed, image by image.

    Raises:
        ValueError: the shapes differ, so that nothing is paired.
    """
    if one.shape != other.shape:
        raise ValueError(f"paired values have one shape, got {one.shape} and {other.shape}")
    return interval(one - other, level, count, seed)
