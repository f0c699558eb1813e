"""The gate: whether synergy targets are good enough to be taught (docs/method.md section 3, "Gate")."""

from dataclasses import dataclass
from typing import Any

from pipeline.config.rules import gate_offset


@dataclass
class SynergyAccuracy:
    """What is known of the synergy's accuracy, in percent.

    `current` belongs to the weights in use; `ema` is smoothed, ema <- alpha ema + (1 - alpha) acc, and starts at the
    first value; epochs without evaluation leave it alone.
    """

    alpha: float
    current: float | None = None
    ema: float | None = None

    def update(self, accuracy: float) -> None:
        self.current = accuracy
        self.ema = accuracy if self.ema is None else self.alpha * self.ema + (1 - self.alpha) * accuracy

    def state_dict(self) -> dict[str, Any]:
        return {"current": self.current, "ema": self.ema}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.current, self.ema = state["current"], state["ema"]


def threshold(setting: float | str, average_accuracy: float) -> float:
    """The gate's threshold in percent: a fraction, or relative to the averaged teachers (`avg-0.02`).

    Args:
        average_accuracy: of the averaged teachers, in percent, on the same split.
    """
    offset = gate_offset(setting)
    return 100.0 * float(setting) if offset is None else average_accuracy + 100.0 * offset


def is_open(accuracy: float | None, threshold: float) -> bool:
    """Open iff the accuracy is known, above 0 and at least the threshold."""
    return accuracy is not None and accuracy > 0 and accuracy >= threshold
