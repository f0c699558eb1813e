"""The gate and what it reads."""

import pytest

from pipeline.training.methods.asib.monitor import is_open, threshold
from tests.pipeline.training.builders import config, distillation


@pytest.mark.parametrize(
    ("setting", "expected"),
    [(0.0, 0.0), (0.8, 80.0), (1.0, 100.0), ("avg", 70.0), ("avg-0.02", 68.0), ("avg+0.01", 71.0)],
)
def test_a_threshold_is_a_fraction_or_relative_to_the_averaged_teachers(setting: float | str, expected: float) -> None:
    assert threshold(setting, 70.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("accuracy", "limit", "expected"),
    [
        (None, 0.0, False),
        (0.0, 0.0, False),
        (0.1, 0.0, True),
        (67.9, 68.0, False),
        (68.0, 68.0, True),
        (5.0, -3.0, True),
    ],
)
def test_unknown_and_zero_accuracy_keep_the_gate_closed(accuracy: float | None, limit: float, expected: bool) -> None:
    assert is_open(accuracy, limit) is expected


def test_the_moving_average_starts_at_the_first_value() -> None:
    monitor = distillation(config(method={"synergy_ema_alpha": 0.8})).monitor
    assert (monitor.accuracy, monitor.smoothed) == (None, None)
    values = []
    for accuracy in (50.0, 60.0, 40.0):
        monitor.update(accuracy)
        values.append(monitor.smoothed)
    assert values == pytest.approx([50.0, 0.8 * 50 + 0.2 * 60, 0.8 * 52 + 0.2 * 40])
    assert monitor.accuracy == 40.0
