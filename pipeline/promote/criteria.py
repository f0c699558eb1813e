"""What a challenger must be: conf/promotion/<name>.yaml or a YAML file anywhere, and `-P gate.<key>=<value>`.

Needs pydantic and OmegaConf only, so that a promotion that cannot be is refused before torch is imported.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from pydantic import Field, ValidationError

from pipeline.compose.groups import CONF, locate
from pipeline.compose.settings import parse_data, read_yaml
from pipeline.config.describe import field_at, section_of, takes, written
from pipeline.config.names import near_miss
from pipeline.config.numbers import AtLeastOne, Fraction, NonNegative, Parameters, Percent, Points, Positive
from pipeline.config.schema import Section, key
from pipeline.errors import UserError

Inner = Annotated[float, Field(gt=0, lt=1)]
OURS = {"name", "changes"}
"""Fields that say where a gate comes from."""


class FirstGate(Section):
    """What the first version must reach, which has no champion to beat."""

    min_acc: Percent = key(0.0, "test top-1 in percent")
    min_class_acc: Percent | None = key(None, "the same for every class alone")


class Gate(Section):
    """The criteria of a promotion, all of which must hold; those that are null are not asked for.

    Percentages and points are of test top-1. `name` is the file's, without its folder and suffix; of a file outside
    conf/promotion also the beginning of its SHA-256. `changes`: what the command line changed, such as
    `alpha=0.01 (0.05)`, the file's value in parentheses.
    """

    name: str = Field(default="", exclude=True)
    changes: tuple[str, ...] = Field(default=(), exclude=True)
    min_improvement: NonNegative = key(0.0, "points above the champion; an equally good challenger never passes")
    alpha: Inner | None = key(0.05, "the two-sided exact McNemar test must give at most this p")
    alpha_spending: bool = key(True, "alpha is for all looks at one test set together; false: for each of them")
    interval: Inner | None = key(0.95, "level of the paired bootstrap interval of the improvement")
    min_interval_low: Points = key(0.0, "points below which that interval must not reach")
    replicates: AtLeastOne = key(10_000, "draws of that bootstrap")
    max_class_drop: NonNegative | None = key(20.0, "points that no class may lose")
    max_ece: Fraction | None = key(None, "expected calibration error at most")
    max_ece_increase: Fraction | None = key(0.05, "the same above the champion's at most")
    max_latency_ms: Positive | None = key(None, "for one image, on the machine that promotes")
    max_latency_ratio: Positive | None = key(1.5, "the same relative to the champion's")
    max_parameters: Parameters | None = key(None, "numbers in the network at most")
    max_parameters_ratio: Positive | None = key(1.5, "the same relative to the champion's")
    first: FirstGate = key(FirstGate(), "a first version")

    @property
    def words(self) -> str:
        """Its name and every change of it: `default with alpha=0.01 (0.05)`."""
        return " with ".join(filter(None, [self.name, ", ".join(self.changes)]))


def load(name_or_path: str, settings: Mapping[str, str]) -> Gate:
    """A gate's file with what was set on the command line.

    Args:
        name_or_path: a name in conf/promotion, or the path of a YAML file.
        settings: `{"alpha": "0.01", "first.min_acc": "60"}`, as `-P gate.alpha=0.01` gives them.

    Raises:
        UserError: no such file, an unknown key, a value that does not fit.
    """
    file = locate("promotion", name_or_path, "gate")
    content = _read(file, name_or_path)
    ours = file.parent == CONF / "promotion"
    name = file.stem if ours else f"{file.name}, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
    try:
        found = plain = Gate.model_validate({**content, "name": name})
        if settings:
            for changed, text in settings.items():
                _set(content, changed, text)
            found = Gate.model_validate({**content, "name": name})
    except ValidationError as error:
        raise UserError(_explain(error)) from error
    changes = [f"{k}={_shown(found, k)} ({_shown(plain, k)})" for k in keys() if _at(found, k) != _at(plain, k)]
    return found.model_copy(update={"changes": tuple(changes)})


def _at(gate: Gate, name: str) -> Any:
    value: Any = gate
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _shown(gate: Gate, name: str) -> str:
    return written(_at(gate, name))


def _read(file: Path, given: str) -> dict[str, Any]:
    content = read_yaml(file, f"gate={given}")
    if not isinstance(content, DictConfig):
        raise UserError(f"gate={given}: holds no keys; begin with such as alpha: 0.05")
    plain: Any = OmegaConf.to_container(content)
    for ours in sorted(OURS & plain.keys()):
        raise UserError(f"gate={given}: {ours}={plain[ours]}: a gate is named after its file; leave the key out")
    return {str(name): value for name, value in plain.items()}


def _set(content: dict[str, Any], name: str, text: str) -> None:
    path = name.split(".")
    found = field_at(path, Gate)
    if found is None or found[1] < len(path) or name in OURS:
        raise UserError(_unknown(name))
    value = parse_data(text, f"gate.{name}={text:.100}")
    node = content
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"gate.{name}: {part} is {written(node)} in the file, not a group of keys")
    node[path[-1]] = value


def keys() -> list[str]:
    """All keys of a gate, those of the first version with their group."""
    own = [name for name, field in Gate.model_fields.items() if name not in OURS and section_of(field) is None]
    return [*own, *(f"first.{name}" for name in FirstGate.model_fields)]


def _unknown(name: str) -> str:
    near = near_miss(name, keys())
    return f"gate.{name}: unknown key; " + (f"did you mean gate.{near}?" if near else f"there are {', '.join(keys())}")


def _explain(error: ValidationError) -> str:
    """One line for the first problem."""
    problem = error.errors(include_url=False)[0]
    name = ".".join(map(str, problem["loc"]))
    found = field_at(name.split("."), Gate)
    if problem["type"] == "extra_forbidden" or found is None:
        return _unknown(name)
    value = problem["input"]
    shown = repr(value) if isinstance(value, str) else written(value)
    return f"gate.{name}: got {shown}; give {takes(problem, found[0])}"
