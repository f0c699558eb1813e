"""The gate of a promotion: criteria on measurements of two students on the same images.

Pure functions: nothing is loaded, logged or moved.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.promote import spending
from pipeline.promote.criteria import Gate
from pipeline.reporting.statistics import Bools, Pairs, mcnemar, pairs, percentiles, replicates_of_pairs

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
ROUNDING = 1e-9
"""Tolerance: percentages of counts are compared with limits written in decimals."""


@dataclass(frozen=True)
class Measured:
    """A student on the test split.

    Attributes:
        correct: (n,) whether each image was classified correctly.
        ece: expected calibration error, from 0 to 1.
        latency_ms: of one image.
        parameters: how many the network has.
        metrics: all measurements, named as in evaluations (`test/acc`, `speed/latency_ms_1`, …).
    """

    correct: Bools
    ece: float
    latency_ms: float
    parameters: int
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def acc(self) -> float:
        """Top-1 in percent."""
        return 100.0 * float(self.correct.mean())


@dataclass(frozen=True)
class Criterion:
    """One line of the verdict. `value` and `limit` are in `unit`. `at_least`: the value must reach the limit; else it
    must not exceed it. `note`: what the numbers alone do not show.
    """

    name: str
    value: float
    limit: float
    passed: bool
    at_least: bool
    unit: str
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """All criteria that apply, and the numbers behind them (metric name -> value)."""

    criteria: tuple[Criterion, ...]
    numbers: dict[str, float]

    @property
    def passed(self) -> bool:
        return all(criterion.passed for criterion in self.criteria)

    @property
    def failed(self) -> tuple[Criterion, ...]:
        return tuple(criterion for criterion in self.criteria if not criterion.passed)


# the verdict ---------------------------------------------------------------------------------------------------------


def class_accuracies(correct: Bools, labels: Ints, classes: int) -> Floats:
    """Top-1 of each class in percent (classes,); NaN for classes without images."""
    seen = np.bincount(labels, minlength=classes).astype(np.float64)
    right = np.bincount(labels[correct], minlength=classes).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.asarray(100.0 * right / seen)


def judge(
    gate: Gate,
    labels: Ints,
    classes: tuple[str, ...],
    challenger: Measured,
    champion: Measured | None,
    look: int = 1,
) -> Verdict:
    """Judge the challenger against the champion, or alone without one.

    Args:
        labels: (n,) of the images on which both were measured.
        look: how many pairs have been compared on these images, this one included.
    """
    numbers = {"promotion/images": float(len(labels))}
    if champion is None:
        criteria = [*_first(gate, labels, classes, challenger), *_absolute(gate, challenger)]
    else:
        found = pairs(challenger.correct, champion.correct)
        numbers |= _numbers(gate, found) | {"promotion/look": float(look)}
        if gate.alpha is not None:
            numbers["promotion/alpha"] = spending.level(gate.alpha, look) if gate.alpha_spending else gate.alpha
        drops = class_accuracies(champion.correct, labels, len(classes))
        drops -= class_accuracies(challenger.correct, labels, len(classes))
        numbers["promotion/worst_class_drop"] = float(np.nanmax(drops))
        criteria = [
            *_better(gate, found, numbers),
            *_drop(gate, drops, classes),
            *_absolute(gate, challenger),
            *_relative(gate, challenger, champion),
        ]
    return Verdict(tuple(criteria), numbers)


def _numbers(gate: Gate, found: Pairs) -> dict[str, float]:
    numbers = {
        "promotion/improvement": found.gain,
        "promotion/p_value": mcnemar(found),
        "promotion/challenger_only": float(found.one_alone),
        "promotion/champion_only": float(found.other_alone),
    }
    if gate.interval is not None:
        low, high = percentiles(replicates_of_pairs(found, gate.replicates), gate.interval)
        numbers |= {"promotion/interval_low": low, "promotion/interval_high": high}
    return numbers


def _better(gate: Gate, found: Pairs, numbers: dict[str, float]) -> Iterator[Criterion]:
    gain = found.gain
    ahead = found.one_alone > found.other_alone
    note = "" if ahead else "equally good" if gain == 0 else "worse"
    enough = ahead and gain >= gate.min_improvement - ROUNDING
    yield Criterion("improvement", gain, gate.min_improvement, enough, True, "points", note)
    if gate.alpha is not None:
        p, level = numbers["promotion/p_value"], numbers["promotion/alpha"]
        note = f"alone right: challenger {found.one_alone}, champion {found.other_alone}"
        yield Criterion("McNemar test", p, level, p <= level, False, "p", note)
    if gate.interval is not None:
        low, high = numbers["promotion/interval_low"], numbers["promotion/interval_high"]
        note = f"{100 * gate.interval:g} % interval {low:+.2f} to {high:+.2f}"
        yield from _at_least("bootstrap interval", low, gate.min_interval_low, "points", note)


def _drop(gate: Gate, drops: Floats, classes: tuple[str, ...]) -> Iterator[Criterion]:
    worst = int(np.nanargmax(drops))
    return _at_most("drop of a class", drops[worst], gate.max_class_drop, "points", classes[worst])


def _first(gate: Gate, labels: Ints, classes: tuple[str, ...], one: Measured) -> Iterator[Criterion]:
    yield from _at_least("accuracy", one.acc, gate.first.min_acc, "%", "there is no champion yet")
    found = class_accuracies(one.correct, labels, len(classes))
    worst = int(np.nanargmin(found))
    yield from _at_least("accuracy of a class", found[worst], gate.first.min_class_acc, "%", classes[worst])


def _absolute(gate: Gate, one: Measured) -> Iterator[Criterion]:
    yield from _at_most("calibration error", one.ece, gate.max_ece, "")
    yield from _at_most("latency", one.latency_ms, gate.max_latency_ms, "ms")
    yield from _at_most("parameters", one.parameters, gate.max_parameters, "")


def _relative(gate: Gate, one: Measured, other: Measured) -> Iterator[Criterion]:
    note = f"{one.ece:.4f} against {other.ece:.4f}"
    yield from _at_most("calibration error, increase", one.ece - other.ece, gate.max_ece_increase, "", note)
    note = f"{one.latency_ms:.2f} ms against {other.latency_ms:.2f} ms"
    yield from _at_most("latency, relative", one.latency_ms / other.latency_ms, gate.max_latency_ratio, "x", note)
    note = f"{one.parameters:,} against {other.parameters:,}"
    yield from _at_most("parameters, relative", one.parameters / other.parameters, gate.max_parameters_ratio, "x", note)


def _at_least(name: str, value: float, limit: float | None, unit: str, note: str) -> Iterator[Criterion]:
    """The criterion, unless the gate leaves it out."""
    if limit is not None:
        yield Criterion(name, float(value), limit, bool(value >= limit - ROUNDING), True, unit, note)


def _at_most(name: str, value: float, limit: float | None, unit: str, note: str = "") -> Iterator[Criterion]:
    """The criterion, unless the gate leaves it out."""
    if limit is not None:
        yield Criterion(name, float(value), float(limit), bool(value <= limit + ROUNDING), False, unit, note)
