"""Settings files: YAML read with bounds, and a section of the schema built from a file and the command line.

A user's own file may refer to its other values and to the environment (`${…}`), except for variables whose names look
like secrets. Somebody else's file may not: see `foreign.py`.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from pipeline import secrets, yaml_data
from pipeline.config.words import is_text, near_miss, one_line, shown, suggestion, takes
from pipeline.errors import UserError


def read_yaml(path: Path, source: str) -> DictConfig | ListConfig:
    """A user's own file as OmegaConf reads it: 1e-3 is a number, duplicate keys are refused, `${…}` is resolved later.

    Raises UserError: one line that begins with `source`, which is what named the file: `cfg=my.yaml`.
    """
    return parse_yaml(yaml_data.text_of(path, source), source)


def parse_yaml(text: str, source: str) -> DictConfig | ListConfig:
    """As `read_yaml`, for a text."""
    data = parse_data(text, source)
    if data is not None and not isinstance(data, dict | list):
        raise UserError(f"{source}: holds a single value, not groups of keys")
    try:
        return OmegaConf.create({} if data is None else data)
    except OmegaConfBaseException as error:
        raise yaml_data.refusal(source, error) from error


def read_data(path: Path, source: str) -> Any:
    """Somebody else's file as plain data, `${…}` as text. Raises UserError."""
    return parse_data(yaml_data.text_of(path, source), source)


def parse_data(text: str, source: str) -> Any:
    """As `read_data`, for a text, which may also be a value of the command line."""
    return yaml_data.parse(text, source, _loader())


@functools.cache
def _loader() -> Any:
    """OmegaConf's loader on libyaml, several times as fast, where that is there.

    `get_yaml_loader` is private API of omegaconf, checked with 2.3.1.
    """
    theirs: Any = get_yaml_loader()
    return type("Loader", (yaml.CSafeLoader, theirs), {}) if yaml.__with_libyaml__ else theirs


# sections ------------------------------------------------------------------------------------------------------------

OURS = ("name", "changes")
"""Fields that a section's reader fills in; its file may not set them."""
TAGS = ("kind", "name", "type")
"""Keys that choose between groups of keys. They are set first, because they drop the keys of the group not chosen."""


def read_section(
    schema: Any,
    key: str,
    given: str,
    file: Path,
    overrides: Mapping[str, str],
    normal: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    **own: Any,
) -> Any:
    """A validated section from a YAML file, with the command line's `<key>.<name>=<text>` on top.

    Args:
        schema: a pydantic model, or a union of models that one of their keys tells apart.
        key, given: what the command line calls the section, and a name or a path, for errors: `cluster=slurm`.
        overrides: `{"partition": "gpu", "space.method.tau.high": "6"}`. Another `kind`, `name` or `type` drops the keys
            that only the previous one has; `null` removes an entry of a group whose names are free.
        normal: expands short forms; may raise ValueError.
        own: values of `OURS`.

    Raises:
        UserError: one line with the key, its value and what to give instead.
    """
    source, root = f"{key}={given}", Place.of(schema)
    content = read_yaml(file, source)
    if not isinstance(content, DictConfig):
        raise UserError(f"{source}: holds no groups of keys")
    plain = _plain(content, source)
    for name in sorted(plain.keys() & set(OURS)):
        raise UserError(f"{source}: {name}={plain[name]}: a {key} is named after its file; leave the key out")
    try:
        plain = normal(plain)
        for name in sorted(overrides, key=lambda name: name.rpartition(".")[2] not in TAGS):
            _override(plain, schema, key, re.sub(r"\[(\d+)\]", r".\1", name), " ".join(overrides[name].split()))
            plain = normal(plain)
        section = root.section(plain)
        if section is None:
            raise UserError(_no_kind(root, plain, key, source))
        return section.model_validate({**plain, **own})
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise UserError(one_line(_problem(problem, root, Place(section), key) for problem in problems)) from error
    except ValueError as error:
        raise UserError(f"{key}.{error}") from error


def _plain(content: DictConfig | ListConfig, source: str) -> dict[str, Any]:
    try:
        plain: Any = OmegaConf.to_container(content, resolve=True)
    except OmegaConfBaseException as error:
        raise yaml_data.refusal(source, error) from error
    return {str(name): value for name, value in plain.items()}


def _override(content: dict[str, Any], schema: Any, key: str, name: str, text: str) -> None:
    """Set one key of the command line. Raises UserError."""
    given = f"{key}.{name}={text:.100}"
    place, walked, rest = Place.of(schema), key, name
    node: Any = content
    while True:
        if isinstance(node, list):
            part, _, rest = rest.partition(".")
            if not part.isdecimal() or int(part) >= len(node):
                raise UserError(f"{given}: {walked} has {len(node)} entries, numbered from 0")
        elif place.is_free:
            part, rest = _entry(node, place, walked, rest)
        else:
            part, _, rest = rest.partition(".")
            section = place.section(node)
            if section is not None and (part not in section.model_fields or (node is content and part in OURS)):
                raise UserError(_unknown(section, place, walked, part))
        outer, place, walked = place, place.inside(part, node), f"{walked}.{part}"
        index: Any = int(part) if isinstance(node, list) else part
        if not rest:
            break
        child = node[index] if isinstance(node, list) else node.get(index)
        if child is None and place.holds_keys:
            child = node[index] = {}
        if not isinstance(child, dict | list):
            raise UserError(f"{given}: {walked} has no keys; give it whole")
        node = child
    literal = place.field is not None and is_text(place.field) and text != "null"
    value = text if literal else _plain(parse_yaml(f"value: {text}", given), given)["value"]
    if value is None and outer.is_free:
        if part not in node:
            raise UserError(f"{given}: {walked.removesuffix(f'.{part}')} has no {part}; give a new one whole")
        del node[part]
        return
    node[index] = value
    chosen = outer.section(node) if part == outer.tag else None
    if chosen is not None:
        for foreign in node.keys() - chosen.model_fields.keys():
            del node[foreign]


def _entry(node: Mapping[str, Any], place: Place, walked: str, rest: str) -> tuple[str, str]:
    """An entry's name, which may hold dots, and the rest of the path: the longest name that fits, or a new one."""
    fitting = [name for name in node if f"{rest}.".startswith(f"{name}.")]
    if fitting:
        name = max(fitting, key=len)
        return name, rest[len(name) + 1 :]
    stem, _, last = rest.rpartition(".")
    inner = place.inside(stem, node)
    if stem and any(last in kind.model_fields for kind in inner.kinds.values()):
        new = f"give a new one whole, {walked}.{stem}={inner.example}"
        raise UserError(
            f"{walked}.{rest}: {walked} has no {stem}; {suggestion(stem, node)}there are {', '.join(node)}; {new}"
        )
    return rest, ""


# places in a schema --------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """What the schema has at a path."""

    type: Any
    """The annotation without `Annotated`."""
    tag: str = ""
    """The key that tells the sections of a union apart; empty for anything else."""
    field: FieldInfo | None = None
    """The section's field at this place or around it; None at the root."""

    @classmethod
    def of(cls, annotation: Any, tag: Any = None, field: FieldInfo | None = None) -> Place:
        """The place of an annotation."""
        while get_origin(annotation) is Annotated:
            annotation, *extra = get_args(annotation)
            tag = next((item.discriminator for item in extra if isinstance(item, FieldInfo)), tag)
        return cls(annotation, tag or "", field)

    @property
    def kinds(self) -> dict[str, type[BaseModel]]:
        """The sections of a union by their tag."""
        return {kind.model_fields[self.tag].default: kind for kind in get_args(self.type)} if self.tag else {}

    @property
    def is_free(self) -> bool:
        """Whether it is a group of keys with arbitrary names."""
        return get_origin(self.type) is dict

    @property
    def holds_keys(self) -> bool:
        return bool(self.tag) or self.is_free or self.section({}) is not None

    @property
    def items(self) -> Place:
        """The values of a list or of a free group of keys."""
        return Place.of(get_args(self.type)[1 if self.is_free else 0], None, self.field)

    @property
    def is_list(self) -> bool:
        return get_origin(self.type) is tuple

    def section(self, value: Any) -> type[BaseModel] | None:
        """The model of a value here; None if it is not a section, or its tag names none."""
        if self.tag:
            return self.kinds.get(str(value.get(self.tag)))
        return self.type if isinstance(self.type, type) and issubclass(self.type, BaseModel) else None

    def inside(self, part: str, value: Any = None) -> Place:
        """The place that a part of a path leads to from here; in a union, the tag of `value` selects the section."""
        if self.is_free or self.is_list:
            return self.items
        section = self.section(value)
        field = section.model_fields.get(part) if section is not None else None
        return Place(None) if field is None else Place.of(field.annotation, field.discriminator, field)

    @property
    def example(self) -> str:
        """An example of a value for a section or a union of sections: `{type: float, low: …, high: …}`."""
        if self.tag:
            name, kind = next(iter(self.kinds.items()))
            needed = [key for key, field in kind.model_fields.items() if field.is_required()]
            return "{" + ", ".join([f"{self.tag}: {name}", *(f"{key}: …" for key in needed)]) + "}"
        return "{" + ", ".join(f"{key}: …" for key in keys(self.type)) + "}"

    def takes(self, problem: Any) -> str:
        """What to give here, in words."""
        if self.tag:
            return f"such as {self.example}"
        if self.section({}) is not None:
            return f"a group of keys, such as {self.example}"
        if self.is_free and self.items.tag:
            return f"a group of keys with values such as {self.items.example}"
        if self.is_list and self.items.section({}) is not None:
            return f"a list of {self.items.example}"
        if self.is_list and any(get_origin(kind) is dict for kind in get_args(self.items.type)):  # of anything
            return "a list"
        return "a group of keys" if self.field is None else takes(problem, self.field)


def keys(section: type[BaseModel], but: Collection[str] = ()) -> list[str]:
    """The keys of a section, with dots for those of inner sections, except `but`."""
    found: list[str] = []
    for name, field in section.model_fields.items():
        inner = Place.of(field.annotation, field.discriminator).section({}) if not field.discriminator else None
        found += [] if name in but else [name] if inner is None else [f"{name}.{key}" for key in keys(inner)]
    return found


# errors --------------------------------------------------------------------------------------------------------------


def _problem(problem: Any, union: Place, place: Place, key: str) -> tuple[str, str]:
    """The key that a problem of pydantic's is about, and the line that says so; `union`: what `place` may be one of."""
    outer, name = place, key
    for part in map(str, problem["loc"]):
        if place.tag:  # pydantic names the chosen section
            union, place = place, Place(place.kinds[part])
        elif place.holds_keys or (place.is_list and place.items.holds_keys):
            outer, place, name = place, place.inside(part), f"{name}.{part}"
        else:
            break  # an item of a plain list, or the member of a union
    what, value = problem["type"], problem["input"]
    section = outer.section({})
    if what == "value_error":  # raised by a rule, whose message is complete
        return name, f"{name}.{problem['ctx']['error']}"
    if what == "extra_forbidden" and section is not None:
        return name, _unknown(section, union, *name.rsplit(".", 1))
    if what in ("union_tag_not_found", "union_tag_invalid"):
        return name, _no_kind(place, value, name, name)
    if what == "missing":
        return name, f"{name} is missing: give {place.takes(problem)}"
    return name, f"{name}: got {shown(value)}; give {place.takes(problem)}"


def _no_kind(union: Place, value: Mapping[str, Any], name: str, source: str) -> str:
    """The line for a section whose tag names no member of a union."""
    choices = ", ".join(union.kinds)
    if union.tag not in value:
        return f"{source} has no {union.tag}: give one of {choices}"
    given = value[union.tag]
    hint = suggestion(str(given), union.kinds)
    return f"{name}.{union.tag}: got {shown(given)}; {hint}give one of {choices}"


def _unknown(section: type[BaseModel], union: Place, walked: str, part: str) -> str:
    """The line for a key that a section does not have; `union`: what the section may be one of."""
    known = keys(section, () if "." in walked else OURS)
    near = near_miss(part, known)
    hint = f"did you mean {walked}.{near}? " if near else ""
    kind = next((name for name, other in union.kinds.items() if other is section), None)
    if kind is None:
        return f"{walked}.{part}: unknown key; {hint}there are {', '.join(known)}"
    others = [name for name, other in union.kinds.items() if part in keys(other, OURS)]
    hint = hint or (f"it is a key of {', '.join(others)}; " if others else "")
    taken = ", ".join(name for name in known if name != union.tag) or "nothing else"
    return f"{walked}.{part}: {kind} has no {part}; {hint}it takes {taken}"


# the environment -----------------------------------------------------------------------------------------------------


def _variable(name: str, *default: str | None) -> str | None:
    """`${oc.env:NAME}` as OmegaConf has it, but never a secret: MLflow shows every value of a configuration."""
    if secrets.looks_secret(name):
        raise UserError(f"${{oc.env:{name}}} looks like a secret, and a run's parameters are shown to everybody")
    if name in os.environ:
        return os.environ[name]
    if default:
        return None if default[0] is None else str(default[0])
    raise KeyError(f"Environment variable '{name}' not found")


OmegaConf.register_new_resolver("oc.env", _variable, replace=True)


# the student ---------------------------------------------------------------------------------------------------------


def _by_student(usual: Any, table: Mapping[str, Any], *, _root_: DictConfig) -> Any:
    """`${by_student:0.05,{cifar_shufflenet_*: 0.01}}`: the value of the first pattern that the student's name matches.

    Names may lack their `cifar_`. A run's configuration holds the value, and an override of the key replaces the table.
    """
    name = str(OmegaConf.select(_root_, "model.student.name"))
    return next((value for pattern, value in table.items() if _matches(name, pattern)), usual)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(f"cifar_{name}", pattern)


OmegaConf.register_new_resolver("by_student", _by_student, replace=True)
