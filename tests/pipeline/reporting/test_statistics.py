"""Bootstraps and tests against closed forms, hand-made numbers and scipy, and coverage on simulated accuracies."""

import numpy as np
import pytest
from scipy import stats

from pipeline.reporting import statistics
from pipeline.reporting.statistics import Array


def exact_variance(values: Array) -> float:
    """Of a replicate: E[(w' D v)^2] - mean^2, with w and v multinomial shares of rows and columns."""

    def moments(items: int) -> Array:
        share = 1.0 / items
        return (np.eye(items) - share) * share**2 + share**2  # covariance + mean mean'

    rows, columns = values.shape
    second = np.sum(moments(rows) * (values @ moments(columns) @ values.T))
    return float(second - values.mean() ** 2)


@pytest.mark.parametrize(("rows", "columns"), [(1, 40), (3, 25), (8, 60)])
def test_replicates_have_the_exact_mean_and_variance(rows: int, columns: int) -> None:
    values = np.random.default_rng(0).normal(size=(rows, columns)) + np.arange(rows)[:, None]
    found = statistics.replicates(values, count=40_000)
    assert found.mean() == pytest.approx(values.mean(), abs=5 * np.sqrt(exact_variance(values) / 40_000))
    assert found.var() == pytest.approx(exact_variance(values), rel=0.03)


@pytest.mark.parametrize("seed", range(4))
def test_seeds_and_images_are_drawn_independently(seed: int) -> None:
    """E[(c'x)(d'x)] of independent draws is mean^2; draws that are the same add the variance of a mean, x.var() / n."""
    x = np.random.default_rng(6).normal(size=20)
    found = statistics.replicates(np.outer(x, x), count=20_000, seed=seed)
    assert found.mean() == pytest.approx(x.mean() ** 2, abs=0.05 * x.var() / 20)


def test_one_seed_is_the_ordinary_bootstrap_over_images() -> None:
    values = np.random.default_rng(1).normal(size=(1, 100))
    found = statistics.replicates(values, count=20_000)
    assert found.std() == pytest.approx(values.std() / 10, rel=0.03)


def test_images_alone_and_seeds_alone_have_their_own_variance() -> None:
    rng = np.random.default_rng(2)
    images, seeds = rng.normal(size=(1, 200)), rng.normal(size=(10, 1))
    over_images = statistics.replicates(np.repeat(images, 6, axis=0), count=20_000)
    assert over_images.std() == pytest.approx(images.std() / np.sqrt(200), rel=0.03)
    over_seeds = statistics.replicates(np.repeat(seeds, 50, axis=1), count=20_000)
    assert over_seeds.std() == pytest.approx(seeds.std() / np.sqrt(10), rel=0.03)


def coverage(seed_sd: float, image_sd: float, noise_sd: float, trials: int = 200) -> float:
    rng, hits = np.random.default_rng(3), 0  # the draws of four seeds are kept
    for trial in range(trials):
        values = rng.normal(0, seed_sd, (20, 1)) + rng.normal(0, image_sd, (1, 80))
        found = statistics.interval(
            values + rng.normal(0, noise_sd, (20, 80)), count=400, seed=trial % 4
        )  # whose draws are kept
        hits += found.low <= 0 <= found.high
    return hits / trials


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    assert 0.89 <= coverage(1.0, 1.0, 0.3) <= 0.98
    assert 0.92 <= coverage(0.0, 1.0, 0.3) <= 0.98
    assert coverage(0.05, 0.1, 1.0) >= 0.95, "where seeds and images interact, intervals are wide"


def test_a_paired_difference_does_not_see_what_both_have_in_common() -> None:
    rng = np.random.default_rng(4)
    hard = rng.random((1, 500))
    one = (rng.random((4, 500)) < 0.2 + 0.6 * hard).astype(float)
    other = one.copy()
    other[:, :25] = 1 - other[:, :25]
    found = statistics.paired(one, other).interval
    assert found == statistics.interval(one - other)
    assert found.high - found.low < 0.6 * (statistics.interval(one).high - statistics.interval(one).low)


def test_the_same_values_give_the_same_interval_and_equal_values_none() -> None:
    values = np.random.default_rng(5).random((3, 100))
    assert statistics.interval(values) == statistics.interval(values.copy())
    assert statistics.interval(values) != statistics.interval(values, seed=1)
    assert statistics.interval(np.full((3, 100), 0.25)) == (0.25, 0.25, 0.25)


# tests ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_the_paired_t_is_scipys(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    one, other = rng.normal(60, 2, seeds), rng.normal(58, 2, seeds)
    expected = stats.ttest_rel(one, other)
    bounds = expected.confidence_interval(0.95)
    found, p = statistics.paired_t(one - other)
    assert p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found == pytest.approx(((one - other).mean(), bounds.low, bounds.high), rel=1e-9)


def test_equal_differences_are_certain_and_none_is_no_difference() -> None:
    assert statistics.paired_t(np.array([0.0, 0.0, 0.0])) == ((0.0, 0.0, 0.0), 1.0)
    assert statistics.paired_t(np.array([2.0, 2.0])) == ((2.0, 2.0, 2.0), 0.0)


def test_holm_is_that_of_a_hand_computed_table() -> None:
    """Sorted .005 .010 .030 .040 times 4 3 2 1: .020 .030 .060 .040, and the last may not fall below the one before."""
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.4, 0.6]) == pytest.approx([0.8, 0.8])
    assert statistics.holm([0.7, 0.6]) == [1.0, 1.0]
    assert statistics.holm([0.2]) == [0.2]
    assert statistics.holm([]) == []


def test_the_bootstraps_p_is_the_normal_one_for_many_images() -> None:
    values = np.random.default_rng(6).normal(size=(1, 1000))
    values += 2.0 * values.std() / np.sqrt(1000) - values.mean()  # two standard errors from 0
    assert statistics.bootstrap_p(values, count=8000) == pytest.approx(2 * stats.norm.sf(2.0), abs=0.01)
    assert statistics.bootstrap_p(values - values.mean()) > 0.9
    assert statistics.bootstrap_p(np.full((6, 10), 3.0), count=999) == pytest.approx(2 / 1000)
    assert statistics.bootstrap_p(np.zeros((6, 10))) == 1.0


def test_from_five_seeds_on_the_bootstrap_stands_alone() -> None:
    rng = np.random.default_rng(7)
    one, other = rng.random((6, 30)), rng.random((6, 30))
    for seeds in (2, 4):
        found = statistics.paired(one[:seeds], other[:seeds])
        means = one[:seeds].mean(1), other[:seeds].mean(1)
        assert (found.p, found.seeds) == (pytest.approx(stats.ttest_rel(*means).pvalue), seeds)
        assert found.student is not None
    for seeds in (1, 5, 6):
        found = statistics.paired(one[:seeds], other[:seeds])
        assert found.student is None
        assert found.p == statistics.bootstrap_p(one[:seeds] - other[:seeds])


# two classifiers on the same images ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alone", "other", "p"),
    [
        (10, 0, 2 / 1024),
        (0, 10, 2 / 1024),
        (8, 2, 112 / 1024),
        (5, 3, 186 / 256),
        (4, 4, 1.0),
        (0, 0, 1.0),
        (1, 0, 1.0),
    ],
)
def test_mcnemar_counts_the_tosses_of_a_fair_coin(alone: int, other: int, p: float) -> None:
    assert statistics.mcnemar(statistics.Pairs(50, alone, other, 30)) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize(("alone", "other"), [(310, 250), (3, 900), (77, 78)])
def test_mcnemar_is_twice_the_binomial_tail(alone: int, other: int) -> None:
    expected = min(1.0, 2 * stats.binom.cdf(min(alone, other), alone + other, 0.5))
    assert statistics.mcnemar(statistics.Pairs(0, alone, other, 0)) == pytest.approx(expected, rel=1e-9)


def test_the_bootstrap_has_the_mean_and_the_variance_of_a_paired_difference() -> None:
    found = statistics.Pairs(700, 120, 80, 100)
    drawn = statistics.replicates_of_pairs(found, 200_000)
    plus, minus, n = 0.12, 0.08, 1000
    sd = 100 * np.sqrt((plus + minus - (plus - minus) ** 2) / n)
    assert drawn.mean() == pytest.approx(4.0, abs=4 * sd / np.sqrt(200_000))
    assert drawn.std() == pytest.approx(sd, rel=0.01)
    low, high = statistics.percentiles(drawn, 0.95)
    # normal at this size; a bound is a multiple of a tenth of a point
    assert (low, high) == (pytest.approx(4 - 1.96 * sd, abs=0.11), pytest.approx(4 + 1.96 * sd, abs=0.11))


def test_drawing_counts_is_drawing_images() -> None:
    """The same interval as resampling the images themselves gives, as comparisons of runs do."""
    one, other = np.zeros(300, bool), np.zeros(300, bool)
    one[:200], other[30:215] = True, True
    found = statistics.pairs(one, other)
    assert found == statistics.Pairs(170, 30, 15, 85)
    low, high = statistics.percentiles(statistics.replicates_of_pairs(found, 50_000), 0.9)
    images = statistics.interval(100.0 * one[None] - 100.0 * other[None], level=0.9, count=20_000)
    assert images.mean == pytest.approx(found.gain)
    assert (low, high) == (pytest.approx(images.low, abs=0.34), pytest.approx(images.high, abs=0.34))


def test_pairs_need_the_same_images() -> None:
    with pytest.raises(ValueError, match="same images"):
        statistics.pairs(np.ones(40, bool), np.ones(30, bool))
    with pytest.raises(ValueError, match="at least one"):
        statistics.pairs(np.zeros(0, bool), np.zeros(0, bool))
