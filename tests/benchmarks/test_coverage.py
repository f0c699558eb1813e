"""The simulation of coverage: its truth against a brute-force average, its numbers against those in the README."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from benchmarks import coverage

BENCHMARKS = Path(coverage.__file__).parent


@pytest.mark.parametrize("points", coverage.SEED_SD)
def test_the_truth_is_the_average_over_many_seeds_and_images(points: float) -> None:
    threshold = float(norm.isf(coverage.ACCURACY))
    sigma = coverage.latent_sd(points, threshold)
    rng = np.random.default_rng(0)
    common = np.sqrt(coverage.COMMON) * rng.standard_normal(20_000)
    drawn = coverage.draw(rng, common, 60, sigma, threshold, 0.05)
    error = 3 * np.hypot(100 * 0.45 / np.sqrt(20_000), points / np.sqrt(60))
    assert drawn.mean() == pytest.approx(100 * coverage.truth(threshold, 0.05, sigma), abs=error)


def test_seeds_vary_by_as_many_points_as_they_are_said_to() -> None:
    threshold = float(norm.isf(coverage.ACCURACY))
    rng = np.random.default_rng(1)
    common = np.sqrt(coverage.COMMON) * rng.standard_normal(20_000)
    drawn = coverage.draw(rng, common, 200, coverage.latent_sd(0.5, threshold), threshold, 0.0)
    # the finite test set adds half the variance of two seeds' disagreement per image
    differ = float(np.mean(drawn[0] != drawn[1]))
    assert drawn.mean(axis=1).std() == pytest.approx(np.hypot(0.5, 100 * np.sqrt(differ / 2 / 20_000)), rel=0.15)


def test_the_numbers_in_the_readme_are_those_of_the_results() -> None:
    readme = (BENCHMARKS / "README.md").read_text()
    kept = json.loads((BENCHMARKS / "results/coverage.json").read_text())
    assert {(r["seeds"], r["points"]) for r in kept} == {(s, p) for s in coverage.SEEDS for p in coverage.SEED_SD}
    for result in kept:
        found = coverage.Coverage(*(result[name] for name in coverage.Coverage._fields))
        assert coverage.row(result["seeds"], result["points"], found) in readme


@pytest.mark.step  # a simulation of seconds
def test_few_simulated_comparisons_agree_with_the_kept_ones() -> None:
    kept = json.loads((BENCHMARKS / "results/coverage.json").read_text())
    (of_three,) = (r for r in kept if (r["seeds"], r["points"]) == (3, 0.5))
    found = coverage.coverage(3, 0.5, trials=12)
    assert found.bootstrap_width == pytest.approx(of_three["bootstrap_width"], rel=0.2)
    assert found.bootstrap >= of_three["bootstrap"] - 4 * np.sqrt(0.25 / 12)
