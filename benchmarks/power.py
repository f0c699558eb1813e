"""Power of a promotion's gate: how often a student that is better by a given number of points passes McNemar's test.

    python -m benchmarks.power

Exact, without simulation. Of n test images the challenger alone gets X right, the champion alone Y, both or neither the
rest: a multinomial whose shares (d + g) / 2 and (d - g) / 2 follow from the disagreement d and the true gain g. The
number D of images on which they differ is binomial (n, d), X given D is binomial (D, (d + g) / 2d). A challenger that
is ahead passes if its exact two-sided p is at most the look's level. The other criteria of a gate can only lower it.
"""

import numpy as np
from scipy.stats import binom

from pipeline.promote import spending

IMAGES = (500, 2_000, 10_000)
GAINS = (1, 2, 3, 5)
"""Points of top-1."""
DISAGREEMENTS = (0.08, 0.15, 0.30)
"""Shares of images that only one of the two gets right: near copies, usual students, weak or very different ones."""
LOOKS = (1, 5, 20)
ALPHA = 0.05


def power(images: int, gain: float, disagreement: float, level: float) -> float:
    """The probability that a challenger that is `gain` points better passes at this level."""
    share = (disagreement + gain / 100) / (2 * disagreement)
    if share > 1:
        return float("nan")  # with so few differing images no student can be this much better
    differing = np.arange(images + 1)
    chance = binom.pmf(differing, images, disagreement)
    kept = np.flatnonzero(chance > 1e-12)
    total = 0.0
    for d in kept:
        ahead = spending.needed(int(d), level)
        if ahead is not None:
            total += chance[d] * binom.sf((d + ahead) // 2 - 1, d, share)
    return float(total)


LEVELS = {"alpha not spent": ALPHA} | {f"look {k}": spending.level(ALPHA, k) for k in LOOKS}


def row(images: int, gain: float) -> str:
    """A line of the table: the range of power over the disagreements at each level."""
    cells = []
    for level in LEVELS.values():
        found = [power(images, gain, d, level) for d in DISAGREEMENTS]
        cells.append(f"{100 * np.nanmin(found):.0f} to {100 * np.nanmax(found):.0f} %")
    return f"| {images:,} | +{gain:g} | " + " | ".join(cells) + " |"


def main() -> None:
    print("| test images | gain | " + " | ".join(LEVELS) + " |")
    print("|---" * (2 + len(LEVELS)) + "|")
    for images in IMAGES:
        for gain in GAINS:
            print(row(images, gain))


if __name__ == "__main__":
    main()
