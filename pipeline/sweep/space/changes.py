"""A configuration with some of its keys changed, as overrides of the command line would change them."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from pipeline.config import Config, configure, explain, known_names, methods, schema_for
from pipeline.config.rules import derive
from pipeline.config.words import field_at, unknown_key
from pipeline.errors import UserError

_WIDTHS = ("ib_mbm_out_dim", "distill_out_dim")
_WIDTHS_FOLLOW = ("model.student.name", "method.distill_out_dim")


def apply(base: Config, values: Mapping[str, Any]) -> Config:
    """`base` with the values of dotted keys, validated; keys lead into lists too (`model.teachers.0.name`).

    A list replaces a list, a group of keys is merged into the group, and distillation widths that only followed from
    the student follow from the new one. It depends only on the two arguments' values, so that every worker of a
    study makes the same configuration, however it got `base`; weights that `renorm_ce_kd` has rescaled in
    `base` are rescaled again from there.

    Raises:
        UserError: one line that names the key and what to give instead.
    """
    try:
        return validated(base, values)
    except ValidationError as error:
        raise UserError(explain(error, base)) from error


def validated(base: Config, values: Mapping[str, Any]) -> Config:
    """`apply`. Raises ValidationError for values that the schema refuses, UserError for keys that lead nowhere."""
    plain: dict[str, Any] = base.model_dump(mode="json")
    if any(_reaches(key, source) for key in values for source in _WIDTHS_FOLLOW):
        _forget_widths(plain)
    for key in sorted(values):  # a group before its contents
        _put(plain, key, values[key])
    return configure(plain)


def takes(key: str) -> tuple[Any, list[str]]:
    """The schema's field that a dotted key names, and the parts of the key that lead into its list (or none).

    Raises:
        UserError: there is no such key; the nearest one is named.
    """
    path = key.split(".")
    found = field_at(path, Config)
    rest = [] if found is None else path[found[1] :]
    if found is None or (rest and not (len(rest) == 1 and rest[0].isdecimal() and "tuple" in str(found[0].annotation))):
        raise UserError(unknown_key(key, known_names()))
    return found[0], rest


def _reaches(key: str, other: str) -> bool:
    """Whether a value of `key` may set `other`."""
    return other == key or other.startswith(f"{key}.")


def _forget_widths(plain: dict[str, Any]) -> None:
    """Leave out what the schema would fill in by itself."""
    schema = schema_for(plain)
    fields = methods.settings(plain["method"]["name"], plain["method"]["module"]).model_fields
    for name in filter(fields.__contains__, _WIDTHS):
        without = {k: v for k, v in plain["method"].items() if k != name}
        derived = derive({"model": plain["model"], "method": without}, schema)["method"]
        default = fields[name].default
        if derived.get(name, default) == plain["method"][name]:
            plain["method"] = without


def _put(plain: dict[str, Any], key: str, value: Any) -> None:
    takes(key)
    *parents, last = key.split(".")
    node: Any = plain
    for depth, part in enumerate([*parents, last]):
        where = ".".join(parents[:depth])
        if isinstance(node, list) and (not part.isdecimal() or int(part) >= len(node)):
            raise UserError(f"{key}: {where} has {len(node)} entries, numbered from 0; set the whole {where}=[…]")
        if not isinstance(node, list | dict):
            raise UserError(f"{key}: there is no list yet; set the whole {where}=[…]")
        if depth < len(parents):
            node = node[int(part)] if isinstance(node, list) else node[part]
    index: Any = int(last) if isinstance(node, list) else last
    before = node[index] if isinstance(node, list) else node.get(index)
    node[index] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value


def _merged(before: Mapping[str, Any], value: Mapping[str, Any]) -> dict[str, Any]:
    inner = {
        k: _merged(before[k], v) if isinstance(v, dict) and isinstance(before.get(k), dict) else v
        for k, v in value.items()
    }
    return {**before, **inner}
