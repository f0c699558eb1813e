"""Coverage of a comparison's 95 % intervals: how often they hold the true difference of two methods, simulated.

    python -m benchmarks.coverage [--trials 1000] [--json benchmarks/results/coverage.json]

Image i is classified correctly by seed s of method m if c_i + m_i + u_s + r_is lies above a threshold (a probit model
with variances `COMMON`, `OWN`, sigma_u^2 and `NOISE`): images are difficult for all, or for one method; seeds are good
throughout, or lucky on an image. Two seeds of a method then differ on 17 % of the images. The truth, over all images
and seeds, is a difference of two normal probabilities in closed form. Both methods have the same number of seeds, which
share nothing; the test set has 10,000 images, as CIFAR-100's.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from pipeline.reporting import statistics
from pipeline.reporting.statistics import Array

IMAGES = 10_000
SEEDS = (3, 5, 10)
SEED_SD = (0.0, 0.2, 0.5)
"""Standard deviations of a method's true accuracy over seeds, in points; 0.3 more come from the finite test set."""
COMMON, OWN, NOISE = 0.75, 0.05, 0.20
"""Shares of the latent variance: an image's difficulty, the same for one method only, seed by image."""
ACCURACY, GAIN = 0.73, 0.01


class Coverage(NamedTuple):
    """Shares of trials whose interval holds the truth, and mean widths in points."""

    bootstrap: float
    student: float
    bootstrap_width: float
    student_width: float


def truth(threshold: float, shift: float, sigma: float) -> float:
    """The expected accuracy: P(shift + latent > threshold), a normal probability."""
    return float(norm.sf((threshold - shift) / np.sqrt(COMMON + OWN + NOISE + sigma**2)))


def latent_sd(points: float, threshold: float) -> float:
    """The latent deviation over seeds that moves the accuracy by these points: the density at the threshold."""
    return points / 100 / float(norm.pdf(threshold))


def draw(rng: np.random.Generator, common: Array, seeds: int, sigma: float, threshold: float, shift: float) -> Array:
    """Top-1 in points, 0 or 100, of a method's seeds on all images: (seeds, images)."""
    images = len(common)
    latent = common + shift + np.sqrt(OWN) * rng.standard_normal(images)
    latent = latent + sigma * rng.standard_normal((seeds, 1)) + np.sqrt(NOISE) * rng.standard_normal((seeds, images))
    return 100.0 * (latent > threshold)


def coverage(seeds: int, points: float, trials: int, images: int = IMAGES) -> Coverage:
    """Simulate `trials` comparisons with this number of seeds and deviation over seeds in points."""
    rng = np.random.default_rng([seeds, round(10 * points)])
    threshold = float(norm.isf(ACCURACY))
    shift = threshold - float(norm.isf(ACCURACY + GAIN))
    sigma = latent_sd(points, threshold)
    true = 100 * (truth(threshold, shift, sigma) - truth(threshold, 0.0, sigma))
    hits, widths = np.zeros(2), np.zeros(2)
    for _ in range(trials):
        common = np.sqrt(COMMON) * rng.standard_normal(images)
        one, other = (draw(rng, common, seeds, sigma, threshold, s) for s in (shift, 0.0))
        difference = one - other
        found = statistics.interval(difference), statistics.paired_t(difference.mean(axis=1))[0]
        hits += [i.low <= true <= i.high for i in found]
        widths += [i.high - i.low for i in found]
    return Coverage(*(hits / trials), *(widths / trials))


def row(seeds: int, points: float, found: Coverage) -> str:
    """A line of the table."""
    return (
        f"| {seeds} | {points} | {100 * found.bootstrap:.1f} % | {100 * found.student:.1f} % "
        f"| {found.bootstrap_width:.2f} | {found.student_width:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="where the numbers are kept")
    options = parser.parse_args()
    print(
        "| seeds | deviation over seeds, points | bootstrap holds the truth | Student's t | width of the bootstrap's "
        "| of t's |"
    )
    print("|--:|--:|--:|--:|--:|--:|")
    kept = []
    for seeds in SEEDS:
        for points in SEED_SD:
            found = coverage(seeds, points, options.trials)
            kept.append({"seeds": seeds, "points": points, "trials": options.trials, **found._asdict()})
            print(row(seeds, points, found), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
