"""Reading a sweep: its file, the command line's `sweep.…=` settings on top, and what is wrong with them in one line."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from pipeline.compose import settings as settings_files
from pipeline.compose.groups import locate
from pipeline.config.describe import takes, written
from pipeline.config.names import near_miss
from pipeline.errors import UserError
from pipeline.paths import printable
from pipeline.sweep.space.config import KINDS, Constraint, Objective, SweepConfig, short_forms

NAMING = {"space": "type", "sampler": "name", "pruner": "name"}
"""The key that says which knobs there are."""
DIMENSION = "{type: float, low: …, high: …}, or {type: categorical, choices: […]}"
SHAPES = {
    "space": "keys with their ranges, such as method.tau: {type: float, low: 1, high: 8}",
    "sampler": "such as {name: tpe, seed: 0}",
    "pruner": "such as {name: median, startup_trials: 5}",
    "objectives": "a list of {metric: …, direction: maximize}",
    "constraints": "a list of {metric: …, min: …, max: …}",
    "choices": "a list",
    "values": "a list",
}


def load(name_or_path: str, settings: Mapping[str, str] = MappingProxyType({})) -> SweepConfig:
    """A sweep of conf/sweep, or of a YAML file anywhere, with the command line's settings.

    Args:
        settings: by key of the sweep, as texts: `{"trials": "10", "space.method.tau.high": "6", "pruner": "none"}`.
            Another `sampler.name`, `pruner.name` or `type` drops the file's knobs that it does not have; a dimension
            set to null leaves the space.

    Raises:
        UserError: one line that names the key and says what would do.
    """
    file = locate("sweep", name_or_path)
    source = f"sweep={name_or_path}"
    content = _yaml(file, source)
    if "name" in content:
        raise UserError(f"{source}: name={content['name']}: a sweep is named after its file; leave the key out")
    try:
        content = short_forms(content)
        for key in sorted(settings, key=lambda key: not key.endswith((".name", ".type"))):
            _set(content, re.sub(r"\[(\d+)\]", r".\1", key), " ".join(settings[key].split()))
        return SweepConfig.model_validate({**content, "name": file.stem})
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error)}") from error
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def _yaml(text: Path | str, source: str) -> dict[str, Any]:
    """A mapping of YAML as OmegaConf reads it: 1e-3 is a number, and no key may be there twice."""
    if isinstance(text, Path):
        content = settings_files.read_yaml(text, source)
    else:
        content = settings_files.parse_yaml(text, source)
    if not isinstance(content, DictConfig):
        raise UserError(f"{source}: holds no groups of keys; give at least space")
    try:
        plain: Any = OmegaConf.to_container(content, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: no valid YAML: {' '.join(str(error).split())}") from error
    return dict(plain)


# settings ------------------------------------------------------------------------------------------------------------


def _set(content: dict[str, Any], key: str, text: str) -> None:
    """One setting of the command line. Raises UserError."""
    value = _value(key, text)
    path = _path(content, key)
    if path[0] not in SweepConfig.model_fields or path == ["name"]:
        near = near_miss(path[0], SweepConfig.model_fields)
        known = ", ".join(name for name in SweepConfig.model_fields if name != "name")
        hint = f"did you mean sweep.{near}? " if near and near != "name" else ""
        raise UserError(f"sweep.{key}: unknown key; {hint}there are {known}")
    if len(path) == 2 and path[0] == "space" and value is None:
        if path[1] not in content.get("space", {}):
            raise UserError(f"sweep.{key}={text}: the space has no {path[1]}; a new one is given whole, {DIMENSION}")
        del content["space"][path[1]]
        return
    node: Any = content
    for depth, part in enumerate(path[:-1], start=1):
        inside = path[depth]
        if isinstance(node, dict) and part in NAMING:
            node.setdefault(part, {})
        child = node[int(part)] if isinstance(node, list) else node.get(part)
        if not isinstance(child, dict | list):
            raise UserError(f"sweep.{key}={text}: {'.'.join(path[:depth])} has no keys; give it whole")
        if isinstance(child, list) and (not inside.isdecimal() or int(inside) >= len(child)):
            raise UserError(f"sweep.{key}: {'.'.join(path[:depth])} has {len(child)} entries, numbered from 0")
        node = child
    last: Any = int(path[-1]) if isinstance(node, list) else path[-1]
    node[last] = value
    if path[0] in NAMING and path[-1] == NAMING[path[0]] and isinstance(value, str):
        _drop_foreign(node, KINDS[path[0]].get(value))
    content.update(short_forms(content))


def _value(key: str, text: str) -> Any:
    return _yaml("value: " + text, f"sweep.{key}={text}")["value"]


def _path(content: Mapping[str, Any], key: str) -> list[str]:
    """The parts of a setting's key; keys of the space, which contain dots, are one part: the longest that matches."""
    if not key.startswith("space."):
        return key.split(".")
    rest, space = key.removeprefix("space."), content.get("space", {})
    if not isinstance(space, dict):
        raise UserError(f"space={written(space)}: give {SHAPES['space']}")
    fitting = [name for name in space if rest == name or rest.startswith(f"{name}.")]
    if fitting:
        name = max(fitting, key=len)
        inside = rest.removeprefix(name).removeprefix(".")
        return ["space", name, *(inside.split(".") if inside else [])]
    knobs = {knob for kind in KINDS["space"].values() for knob in kind.model_fields}
    stem, _, last = rest.rpartition(".")
    if stem and last in knobs:
        near = near_miss(stem, space)
        hint = f"did you mean {near}? " if near else ""
        raise UserError(
            f"sweep.{key}: the space has no {stem}; {hint}there are {', '.join(space)}; "
            f"a new one is given whole, sweep.space.{stem}={{type: …}}"
        )
    return ["space", rest]


def _drop_foreign(part: dict[str, Any], kind: type[BaseModel] | None) -> None:
    """Leave out the knobs that a newly chosen kind does not have."""
    for knob in [] if kind is None else [knob for knob in part if knob not in kind.model_fields]:
        del part[knob]


# errors --------------------------------------------------------------------------------------------------------------


def explain(error: ValidationError) -> str:
    """One line: key, value, what would do; at most three problems."""
    lines = list(dict.fromkeys(_explain(problem) for problem in error.errors(include_url=False)))
    return "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")


def _explain(problem: Any) -> str:
    loc = list(problem["loc"])
    model, key = _place(loc)
    what = problem["type"]
    if what == "value_error":
        message = str(problem["ctx"]["error"])
        return f"{key}.{message}" if key else message
    if what == "extra_forbidden":
        return _unknown(model, key, loc)
    if what in ("union_tag_invalid", "union_tag_not_found"):
        return _no_kind(problem, loc, key)
    wanted = _wanted(problem, loc, model)
    if what == "missing":
        return f"{key} is missing: give {wanted}"
    value = problem["input"]
    shown = repr(value) if isinstance(value, str) else written(value)
    return f"{key}={printable(shown, 80)}: give {wanted}"


def _wanted(problem: Any, loc: list[Any], model: type[BaseModel]) -> str:
    """What does at the place of a problem, in words."""
    name = str(loc[-1] if isinstance(loc[-1], str) else loc[-2])
    if loc[0] == "space" and len(loc) == 2:
        return DIMENSION
    if name in SHAPES:
        return SHAPES[name]
    return takes(problem, model.model_fields[name]) if name in model.model_fields else "a list"


def _place(loc: list[Any]) -> tuple[type[BaseModel], str]:
    """The section in which a problem lies, and its dotted key, without what pydantic adds for the kind."""
    if loc and loc[0] in NAMING:
        at = 2 if loc[0] == "space" else 1
        if len(loc) > at:
            kind: type[BaseModel] = KINDS[str(loc[0])][str(loc[at])]
            return kind, ".".join(map(str, [*loc[:at], *loc[at + 1 :]]))
    sections: dict[str, type[BaseModel]] = {"objectives": Objective, "constraints": Constraint}
    return sections.get(str(loc[0]) if loc else "", SweepConfig), ".".join(map(str, loc))


def _unknown(model: type[BaseModel], key: str, loc: list[Any]) -> str:
    known = [name for name in model.model_fields if (model, name) != (SweepConfig, "name")]
    own = NAMING.get(str(loc[0]))
    near = near_miss(str(loc[-1]), known)
    hint = f"did you mean {near}? " if near else ""
    if own is None:
        return f"{key}: unknown key; {hint}there are {', '.join(known)}"
    kind = model.model_fields[own].default
    takes = ", ".join(name for name in known if name != own) or "nothing else"
    return f"{key}: {kind} has no {loc[-1]}; {hint}it takes {takes}"


def _no_kind(problem: Any, loc: list[Any], key: str) -> str:
    kinds = list(KINDS[str(loc[0])])
    if problem["type"] == "union_tag_not_found":
        return f"{key} has no {NAMING[str(loc[0])]}: give one of {', '.join(kinds)}"
    given = str(problem["input"].get(NAMING[str(loc[0])]))
    near = near_miss(given, kinds)
    hint = f" (did you mean {near}?)" if near else ""
    return f"{key}.{NAMING[str(loc[0])]}={given}: give one of {', '.join(kinds)}{hint}"
