"""The gate of a promotion as settings: conf/promotion/<name>.yaml or any YAML file, and `-P gate.<key>=<value>`.

Needs pydantic and OmegaConf only, so that a bad request is refused before torch is imported.
"""

import hashlib
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from pipeline.compose.groups import CONF, locate
from pipeline.compose.settings import OURS, keys, read_section
from pipeline.config import Section, flatten, key
from pipeline.config.numbers import AtLeastOne, Fraction, NonNegative, Parameters, Percent, Points, Positive
from pipeline.config.words import written

Inner = Annotated[float, Field(gt=0, lt=1)]


class FirstGate(Section):
    """Thresholds for a first version, which has no champion to beat."""

    min_acc: Percent = key(0.0, "lowest test top-1, in percent")
    min_class_acc: Percent | None = key(None, "lowest test top-1 of any class, in percent")


class Gate(Section):
    """The criteria of a promotion: all that are not null must hold.

    Percentages and points are of test top-1. `name` is the file's, without folder and suffix; outside of
    conf/promotion it includes the beginning of the file's SHA-256. `changes`: what the command line changed, such as
    `alpha=0.01 (0.05)`, the file's value in parentheses.
    """

    name: str = Field(default="", exclude=True)
    changes: tuple[str, ...] = Field(default=(), exclude=True)
    min_improvement: NonNegative = key(0.0, "points above the champion; an equally good challenger never passes")
    alpha: Inner | None = key(0.05, "the two-sided exact McNemar test must give at most this p")
    alpha_spending: bool = key(True, "spend alpha over all looks at one test set; false: each look gets all of it")
    interval: Inner | None = key(0.95, "level of the paired bootstrap interval of the improvement")
    min_interval_low: Points = key(0.0, "lowest lower bound of that interval, in points")
    replicates: AtLeastOne = key(10_000, "replicates of that bootstrap")
    max_class_drop: NonNegative | None = key(20.0, "largest drop of any class, in points")
    max_ece: Fraction | None = key(None, "upper bound of the expected calibration error")
    max_ece_increase: Fraction | None = key(0.05, "upper bound of its increase over the champion's")
    max_latency_ms: Positive | None = key(None, "upper bound for one image, timed on the promoting machine")
    max_latency_ratio: Positive | None = key(1.5, "upper bound relative to the champion's latency")
    max_parameters: Parameters | None = key(None, "upper bound of the number of parameters")
    max_parameters_ratio: Positive | None = key(1.5, "upper bound relative to the champion's number")
    first: FirstGate = key(FirstGate(), "thresholds for a first version")

    @property
    def words(self) -> str:
        """The name and every change made to it: `default with alpha=0.01 (0.05)`."""
        return " with ".join(filter(None, [self.name, ", ".join(self.changes)]))


def load(name_or_path: str, settings: Mapping[str, str]) -> Gate:
    """Read a gate's file, or one of conf/promotion by its name, and apply the settings of the command line.

    `settings`: `{"alpha": "0.01", "first.min_acc": "60"}`, as `-P gate.alpha=0.01` gives them.

    Raises UserError: no such file, an unknown key, a value that does not fit.
    """
    file = locate("promotion", name_or_path, "gate")
    ours = file.parent == CONF / "promotion"
    name = file.stem if ours else f"{file.name}, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
    plain: Gate = read_section(Gate, "gate", name_or_path, file, {}, name=name)
    found: Gate = read_section(Gate, "gate", name_or_path, file, settings, name=name)
    before, after = flatten(plain), flatten(found)
    changes = [f"{k}={written(after[k])} ({written(before[k])})" for k in keys(Gate, OURS) if after[k] != before[k]]
    return found.model_copy(update={"changes": tuple(changes)})
