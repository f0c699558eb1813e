"""The dimensions of a search space: ranges of numbers, and listed values. Needs pydantic only."""

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.config.identity import canonical
from pipeline.config.numbers import EXACT, AtLeastOne, Positive, Real, Whole
from pipeline.config.words import written


class Part(BaseModel):
    """One immutable group of keys of a sweep; unknown keys are an error, and `true` and `"4"` are no numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, strict=True)


AtLeastTwo = Annotated[AtLeastOne, Field(ge=2)]
Value = bool | int | float | str | list[Any] | dict[Any, Any] | None


class _Range(Part):
    @model_validator(mode="after")
    def _rules(self: Any) -> Any:
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}: give the smaller one as low")
        if self.log and self.low <= 0:
            raise ValueError(f"log=true with low={self.low}: a logarithmic range begins above 0")
        if self.log and self.step is not None:
            raise ValueError(f"log=true with step={self.step}: a range has one of them; leave the other out")
        return self


class FloatRange(_Range):
    """Numbers from `low` to `high`, both included; with `step` only low, low + step, …"""

    type: Literal["float"] = "float"
    low: Real
    high: Real
    log: bool = False
    step: Positive | None = None

    def size(self) -> int | None:
        """How many values there are; None: infinitely many."""
        if self.step is None:
            return 1 if self.low == self.high else None
        return int((_decimal(self.high) - _decimal(self.low)) // _decimal(self.step)) + 1

    def at(self, index: int) -> float:
        """The value at a position in a finite range, as written: 0.3, although low + 2·step is 0.30000000000000004."""
        return float(_decimal(self.low) + index * _decimal(self.step or 0))

    def nearest(self, value: float) -> float:
        """The range's value nearest to one that a sampler has computed."""
        return value if self.step is None else self.at(round((value - self.low) / self.step))

    def values(self) -> list[float]:
        """All values of a finite range."""
        return [self.at(index) for index in range(self.size() or 0)]

    @property
    def extremes(self) -> dict[str, float]:
        size = self.size()
        return {"low": self.low, "high": self.high if size is None else self.at(size - 1)}


class IntRange(_Range):
    """Whole numbers from `low` to `high`, both included; with `step` only low, low + step, …"""

    type: Literal["int"] = "int"
    low: Whole
    high: Whole
    log: bool = False
    step: AtLeastOne | None = None

    def values(self) -> range:
        return range(self.low, self.high + 1, self.step or 1)

    def size(self) -> int:
        return len(self.values())

    @property
    def extremes(self) -> dict[str, int]:
        return {"low": self.low, "high": self.values()[-1]}


class _Listed(Part):
    """Listed values, under the key `word`; a list or a group of keys is a value too, and Optuna sees its text."""

    word: ClassVar[str]

    def listed(self) -> Sequence[Any]:
        found: Sequence[Any] = getattr(self, self.word)
        return found

    @model_validator(mode="after")
    def _rules(self) -> "_Listed":
        word = self.word
        if not self.listed():
            raise ValueError(f"{word} is empty: list at least one value")
        for value in self.listed():
            _check_value(word, value)
        labels = self.labels()
        for index, label in enumerate(labels):
            if label in labels[:index]:
                raise ValueError(f"{word} holds {written(label)} twice")
        return self

    def size(self) -> int:
        return len(self.listed())

    def labels(self) -> list[Any]:
        """What represents each value in Optuna, which takes only numbers, texts, true, false and null."""
        return [canonical_text(v) if isinstance(v, list | dict) else v for v in self.listed()]

    def value(self, label: Any) -> Any:
        """The value that a label represents."""
        return self.listed()[self.labels().index(label)]


class Categorical(_Listed):
    """One of `choices`."""

    word = "choices"
    type: Literal["categorical"] = "categorical"
    choices: tuple[Value, ...] = Field(strict=False)


class GridValues(_Listed):
    """One of `values`: a dimension of a grid; other samplers treat it as choices."""

    word = "values"
    type: Literal["grid"] = "grid"
    values: tuple[Value, ...] = Field(strict=False)


Range = FloatRange | IntRange
Dimension = Annotated[FloatRange | IntRange | Categorical | GridValues, Field(discriminator="type")]


def _check_value(word: str, value: Any) -> None:
    """Allow only what a configuration file may hold, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{word} holds {value}: give numbers")
    if isinstance(value, int | float) and abs(value) > EXACT:
        raise ValueError(f"{word} holds {written(value)[:80]}: give numbers up to {EXACT} in size")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{word} holds a group with the key {written(key)}: keys are texts")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_value(word, item)


def canonical_text(value: Any) -> str:
    """A list or a group of keys on one line, the same for the same content: `[6,6]`."""
    return canonical({"": value})[len('{"":') : -1]


def _decimal(number: float) -> Decimal:
    return Decimal(str(number))
