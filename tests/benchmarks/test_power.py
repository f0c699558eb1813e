"""Power of the gate, exactly and simulated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from benchmarks import power

PROMOTION = Path(__file__).resolve().parents[2] / "docs" / "promotion.md"


@pytest.mark.parametrize(("gain", "disagreement", "level"), [(2, 0.15, 0.05), (3, 0.08, 0.025), (5, 0.3, 0.05 / 30)])
def test_the_exact_power_is_that_of_simulated_promotions(gain: float, disagreement: float, level: float) -> None:
    up, down = (disagreement + gain / 100) / 2, (disagreement - gain / 100) / 2
    drawn = np.random.default_rng(3).multinomial(500, [up, down, 1 - up - down], size=40_000)
    alone, other = drawn[:, 0], drawn[:, 1]
    passed = (alone > other) & (2 * binom.cdf(other, alone + other, 0.5) <= level)
    assert power.power(500, gain, disagreement, level) == pytest.approx(passed.mean(), abs=0.01)


def test_what_cannot_be_has_no_power() -> None:
    assert np.isnan(power.power(500, 10, 0.05, 0.05)), "who differs on 5 % of the images is not 10 points better"
    assert power.power(500, 0, 0.15, 0.05) <= 0.025, "and of equals half of the false alarms are worse"


def test_the_table_in_the_docs_is_what_the_script_prints() -> None:
    assert power.row(500, 2) in PROMOTION.read_text()
