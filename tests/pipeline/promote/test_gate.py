"""The gate: every criterion at its limit, and its file."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from pipeline.compose.settings import OURS, keys
from pipeline.errors import UserError
from pipeline.promote import criteria as gates
from pipeline.promote import gate as g
from pipeline.promote import report
from pipeline.promote.criteria import Gate
from pipeline.promote.gate import Measured
from pipeline.reporting.statistics import Bools
from tests.rendering import EVIL, leads

CLASSES = ("ash", "birch", "cedar", "date")


def correct(*right: int, of: int = 40) -> Bools:
    """(of,) true on these slices of ten images: `correct(0, 1)` has the first twenty right."""
    return np.isin(np.arange(of) // 10, right)


LABELS = (np.arange(40) // 10).astype(np.int64)  # ten images of each class, in order


def measured(right: Bools, ece: float = 0.1, latency_ms: float = 2.0, parameters: int = 1000) -> Measured:
    return Measured(right, ece, latency_ms, parameters)


def test_class_accuracies_leave_out_classes_without_images() -> None:
    labels = np.array([0, 0, 0, 2, 2], dtype=np.int64)
    found = g.class_accuracies(np.array([True, False, False, True, True]), labels, 4)
    np.testing.assert_allclose(found, [100 / 3, np.nan, 100, np.nan])


# the verdict ---------------------------------------------------------------------------------------------------------


def judged(challenger: Measured, champion: Measured | None, **keys: Any) -> dict[str, bool]:
    verdict = g.judge(Gate.model_validate(keys), LABELS, CLASSES, challenger, champion)
    assert verdict.passed == (not verdict.failed)
    return {criterion.name: criterion.passed for criterion in verdict.criteria}


def test_a_better_challenger_passes_with_the_numbers_behind_it() -> None:
    verdict = g.judge(Gate(), LABELS, CLASSES, measured(correct(0, 1, 2, 3)), measured(correct(2, 3)))
    assert verdict.passed
    assert verdict.numbers["promotion/improvement"] == 50.0
    assert verdict.numbers["promotion/p_value"] == 2.0**-19
    assert verdict.numbers["promotion/challenger_only"] == 20
    assert verdict.numbers["promotion/champion_only"] == 0
    assert verdict.numbers["promotion/worst_class_drop"] == 0.0
    upper = [name for name, _, limit, *_ in report.rows(verdict) if limit.startswith("at most ")]
    assert upper[:3] == ["McNemar test", "drop of a class", "calibration error, increase"]
    assert upper[3:] == ["latency, relative", "parameters, relative"]
    assert 30 < verdict.numbers["promotion/interval_low"] < 50 < verdict.numbers["promotion/interval_high"] < 70


@pytest.mark.parametrize(
    ("challenger", "champion", "note"),
    [((2, 3), (2, 3), "equally good"), ((0, 1), (2, 3), "equally good"), ((3,), (2, 3), "worse")],
)
def test_equal_and_worse_never_pass(challenger: Any, champion: Any, note: str) -> None:
    """Not even a gate that asks for nothing else."""
    nothing = Gate(alpha=None, interval=None, max_class_drop=None)
    verdict = g.judge(nothing, LABELS, CLASSES, measured(correct(*challenger)), measured(correct(*champion)))
    assert [(c.name, c.note) for c in verdict.failed] == [("improvement", note)]


FIVE = correct(0, 1) & (np.arange(40) < 5)  # 12.5 %
SIX = correct(0, 1) & (np.arange(40) < 6)
ONLY: dict[str, Any] = {"alpha": None, "interval": None, "max_class_drop": None, "max_ece_increase": None,
                        "max_latency_ratio": None, "max_parameters_ratio": None}  # fmt: skip


@pytest.mark.parametrize(
    ("criterion", "keys", "better", "passes"),
    [
        ("improvement", {"min_improvement": 2.5}, {}, True),
        ("improvement", {"min_improvement": 2.6}, {}, False),
        ("McNemar test", {"alpha": 0.99}, {}, False),  # one image more: p = 1
        ("bootstrap interval", {"interval": 0.9}, {}, True),  # never below 0
        ("bootstrap interval", {"interval": 0.9, "min_interval_low": 0.1}, {}, False),
        ("calibration error", {"max_ece": 0.1}, {}, True),
        ("calibration error", {"max_ece": 0.09}, {}, False),
        ("calibration error, increase", {"max_ece_increase": 0.05}, {"ece": 0.15}, True),
        ("calibration error, increase", {"max_ece_increase": 0.05}, {"ece": 0.16}, False),
        ("calibration error, increase", {"max_ece_increase": 0.05}, {"ece": float("nan")}, False),
        ("latency", {"max_latency_ms": 2.0}, {}, True),
        ("latency", {"max_latency_ms": 2.0}, {"latency_ms": 2.1}, False),
        ("latency, relative", {"max_latency_ratio": 1.5}, {"latency_ms": 3.0}, True),
        ("latency, relative", {"max_latency_ratio": 1.5}, {"latency_ms": 3.1}, False),
        ("parameters", {"max_parameters": 1000}, {}, True),
        ("parameters", {"max_parameters": 999}, {}, False),
        # where the next number of a float is further away than what is allowed for rounding
        ("parameters", {"max_parameters": 300_000_000}, {"parameters": 300_000_000}, True),
        ("parameters, relative", {"max_parameters_ratio": 1.0}, {"parameters": 1000}, True),
        ("parameters, relative", {"max_parameters_ratio": 1.0}, {"parameters": 1001}, False),
    ],
)
def test_each_criterion_at_its_limit(
    criterion: str, keys: dict[str, Any], better: dict[str, Any], passes: bool
) -> None:
    found = judged(measured(SIX, **better), measured(FIVE), **{**ONLY, **keys})
    assert found[criterion] is passes
    assert all(passed for name, passed in found.items() if name != criterion)


def test_no_class_may_fall_by_more_than_allowed() -> None:
    one = correct(0, 1, 2) | (np.arange(40) >= 38)  # two of ten dates
    other = correct(3)
    for allowed, passes in ((80.0, True), (79.0, False)):
        found = g.judge(Gate(max_class_drop=allowed), LABELS, CLASSES, measured(one), measured(other))
        (drop,) = [c for c in found.criteria if c.name == "drop of a class"]
        assert (drop.value, drop.note, drop.passed) == (80.0, "date", passes)


def test_a_first_version_has_thresholds() -> None:
    keys = {"first": {"min_acc": 12.5, "min_class_acc": 0.0}, "max_ece": 0.05}
    assert judged(measured(FIVE, ece=0.04), None, **keys) == {
        "accuracy": True,
        "accuracy of a class": True,
        "calibration error": True,
    }
    keys = {"first": {"min_acc": 12.6, "min_class_acc": 1.0}, "max_ece": 0.05, "max_latency_ms": 1.0}
    assert set(judged(measured(FIVE), None, **keys).values()) == {False}


# its file ------------------------------------------------------------------------------------------------------------


def test_the_default_gate_states_every_key(tmp_path: Any) -> None:
    import yaml

    gate = gates.load("default", {})
    text = yaml.safe_load((gates.locate("promotion", "default")).read_text())
    assert {*text, *(f"first.{key}" for key in text.pop("first"))} - {"first"} >= {*keys(Gate, OURS)} - {"replicates"}
    assert gate.name == "default"
    file = tmp_path / "strict.yaml"
    file.write_text("alpha: 0.01\nfirst: {min_acc: 70}\n")
    strict = gates.load(str(file), {"first.min_class_acc": "20", "interval": "null"})
    assert (strict.alpha, strict.first.min_acc, strict.first.min_class_acc, strict.interval) == (0.01, 70.0, 20.0, None)


@pytest.mark.parametrize(
    ("name", "settings", "needles"),
    [
        ("defualt", {}, ["gate=defualt", "did you mean default"]),
        ("default", {"alhpa": "0.1"}, ["gate.alhpa", "did you mean gate.alpha"]),
        ("default", {"alpha": "2"}, ["gate.alpha: got 2", "below 1"]),
        ("default", {"first.min_acc": "high"}, ["gate.first.min_acc: got 'high'", "from 0 to 100"]),
        ("default", {"max_ece": "true"}, ["gate.max_ece: got true"]),
        ("default", {"first": "3"}, ["gate.first: got 3"]),
        ("nowhere/gate.yaml", {}, ["gate=nowhere/gate.yaml: no such file"]),
    ],
)
def test_a_gate_that_is_none_is_refused_in_one_line(name: str, settings: dict[str, str], needles: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        gates.load(name, settings)
    assert "\n" not in str(refused.value)
    for needle in needles:
        assert needle in str(refused.value)


def test_a_gate_names_what_the_command_line_has_changed_of_it(tmp_path: Any) -> None:
    assert gates.load("default", {}).words == "default"
    assert (
        gates.load("default", {"alpha": "0.05", "first.min_acc": "60"}).words
        == "default with first.min_acc=60.0 (15.0)"
    )
    changed = {"alpha": "0.999", "max_ece_increase": "null"}
    assert gates.load("default", changed).words == "default with alpha=0.999 (0.05), max_ece_increase=null (0.05)"
    own = tmp_path / "default.yaml"
    own.write_text("alpha: 0.999\n")
    digest = hashlib.sha256(b"alpha: 0.999\n").hexdigest()[:12]
    assert gates.load(str(own), {}).words == f"default.yaml, sha256 {digest}", "a file of that name is not the default"


@pytest.mark.parametrize("name", EVIL)
def test_a_verdicts_note_loads_nothing_and_leads_nowhere(name: str) -> None:
    worst = g.Criterion("class drop", 3.0, 2.0, False, False, "points", f"most in {name}")
    text = report.note(f"m: {name}", g.Verdict((worst,), {}), f"m: version 2 is refused: {name}", name)
    assert leads(text) == []
    assert "| class drop | +3.00 points | at most +2.00 points | REFUSED |" in text
