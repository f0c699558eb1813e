"""Alpha spending: however often equal challengers are compared on one test set, alpha bounds the false promotions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from pipeline.promote import gate as g
from pipeline.promote import report, spending
from pipeline.promote.criteria import Gate
from pipeline.promote.gate import Measured

IMAGES, SEQUENCES = 500, 1000


def first_promotions(challengers: int) -> tuple[float, float]:
    """The shares of sequences of equally good challengers in which one is promoted, with alpha spent and without.

    Each network has an image right with a probability that belongs to the image, 0.7 on average: two of them differ on
    14 %. p is McNemar's, and, as the gate asks, the challenger must be ahead. Up to the first promotion, which is the
    false one, the champion stays the same.
    """
    rng = np.random.default_rng(7)
    easy = rng.beta(1.4, 0.6, (SEQUENCES, IMAGES)).astype(np.float32)
    champion = rng.random(easy.shape, np.float32) < easy
    spent, plain = np.zeros((2, SEQUENCES), dtype=bool)
    for look in range(1, challengers + 1):
        challenger = rng.random(easy.shape, np.float32) < easy
        alone, other = (challenger & ~champion).sum(axis=1), (~challenger & champion).sum(axis=1)
        p = 2 * binom.cdf(other, alone + other, 0.5)
        spent |= (alone > other) & (p <= spending.level(0.05, look))
        plain |= (alone > other) & (p <= 0.05)
    return float(spent.mean()), float(plain.mean())


@pytest.mark.parametrize(("challengers", "found_in_use"), [(20, 0.20), (50, 0.30)])
def test_equal_challengers_promote_a_false_one_with_alpha_at_most(challengers: int, found_in_use: float) -> None:
    spent, plain = first_promotions(challengers)
    assert spent <= 0.05
    assert plain == pytest.approx(found_in_use, abs=0.06)


def test_what_is_spent_never_exceeds_alpha() -> None:
    levels = [spending.level(0.05, look) for look in range(1, 10_001)]
    assert sum(levels) == pytest.approx(0.05 * 10_000 / 10_001)
    assert all(earlier > later > 0 for earlier, later in pairwise(levels))
    assert next(look for look in range(1, 40) if spending.used_up(look)) == 19


@pytest.mark.parametrize("at_most", [0.9, 0.05, 0.025, 0.0012, 1e-5])
def test_what_is_needed_is_the_smallest_difference_that_passes(at_most: float) -> None:
    for differing in (0, 1, 5, 6, 17, 60, 139):
        enough = [
            2 * k - differing
            for k in range(differing // 2, differing + 1)
            if 2 * k > differing and binomtest(k, differing).pvalue <= at_most
        ]
        assert spending.needed(differing, at_most) == (min(enough) if enough else None)


def judged(look: int, **keys: object) -> tuple[g.Verdict, Gate]:
    """70 images on which the challenger alone is right, 45 for the champion: p = 0.025."""
    gate = Gate.model_validate({"max_latency_ratio": None, **keys})
    champion, challenger = np.ones((2, IMAGES), dtype=bool)
    champion[:70], challenger[70:115] = False, False
    one, other = (Measured(correct, 0.1, 1.0, 1000) for correct in (challenger, champion))
    return g.judge(gate, np.zeros(IMAGES, dtype=np.int64), ("one",), one, other, look), gate


def test_the_same_numbers_pass_at_the_first_look_only() -> None:
    verdicts = {look: judged(look) for look in (1, 2, 18, 19)}
    assert [verdict.passed for verdict, _ in verdicts.values()] == [True, False, False, False]
    verdict, gate = verdicts[2]
    assert [c.name for c in verdict.failed] == ["McNemar test"]
    assert (verdict.numbers["promotion/look"], verdict.numbers["promotion/alpha"]) == (2, pytest.approx(0.05 / 6))
    needed = spending.needed(115, 0.05 / 6)
    assert report.looks(verdict, gate) == (
        f"look 2 at these 500 test images: of alpha 0.05 it gets 0.0083 (at least {needed} ahead on the 115 where the "
        "two differ)"
    )
    assert [bool(report.warning(*found)) for found in verdicts.values()] == [False, False, False, True]
    assert "used up" in report.warning(*verdicts[19])


def test_a_gate_may_leave_alpha_as_it_is_and_says_so() -> None:
    verdict, gate = judged(40, alpha_spending=False)
    assert verdict.passed
    assert "alpha is not adjusted" in report.looks(verdict, gate)
    assert "used up" in report.warning(verdict, gate)
    assert "promotion/alpha" not in judged(40, alpha=None)[0].numbers
