"""Settings that somebody else wrote, from a tracking server: no `${…}` is resolved, and only keys that change the
computation are kept.
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.compose.groups import groups
from pipeline.compose.settings import parse_data, read_data
from pipeline.config import Config, flatten
from pipeline.config.identity import NOT_COMPUTATION, listed
from pipeline.errors import UserError

FOREIGN_GROUPS = ("dataset", "model/student", "model/teacher", "method", "optim", "schedule", "augment")
NUMERICS = ("threads", "bank", "optim.use_amp", "optim.compile", "dataset.eval_batch_size")
"""Keys outside the configuration's hash that still decide a result's last bits; they name no place or program."""
_RUN = re.compile(r"runs:/[0-9a-f]{32}(/(?!\.+(/|$))[\w.-]+)*")


def foreign(path: Path, source: str, given: Collection[str] = ()) -> tuple[str, list[str]]:
    """Somebody else's configuration as YAML that may be composed, and the keys left out of it.

    Kept are group choices and keys that change the computation, and teachers' checkpoints of the form `runs:/<id>`,
    which are fetched from the same server. Left out is whatever says where to read, write or send, or what to run.

    Args:
        given: the keys that the command line sets.

    Raises:
        UserError: a kept value contains a reference (`${…}`); a defaults list leads elsewhere; a teacher's checkpoint
            is a file of another machine, and the command line names none.
    """
    content = read_data(path, source)
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{source}: holds {'a list' if isinstance(content, list) else 'a single value'}, not keys")
    defaults = content.pop("defaults", None)
    left_out: dict[str, Any] = {}
    kept = _kept(content, "", left_out, source)
    for key, value in left_out.items():  # without its teachers it would be a different computation
        if key.endswith(".checkpoint") and not {key, "model.teachers", "model/teacher"}.intersection(given):
            raise UserError(
                f"{source}: {key}={value} is a file on another machine: say where it is here, with {key}=<file>"
            )
    if defaults is not None:
        kept = {"defaults": [*_known(defaults, source)], **kept}
    plain = flatten(Config())
    named = [key for key, value in left_out.items() if value != plain.get(key)]  # others would change nothing
    return "# @package _global_\n" + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True), named


def _kept(value: Any, key: str, left_out: dict[str, Any], source: str) -> Any:
    """The part of a value that is kept; the other keys go to `left_out`."""
    if isinstance(value, list):
        return [_kept(item, f"{key}.{i}", left_out, source) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        if "${" in f"{value} {key}":
            raise UserError(f"{source}: {key} contains a reference (${{…}}), which only your own file may")
        return value
    kept = {}
    for name, inner in value.items():
        path = f"{key}.{name}" if key else str(name)
        on_server = inner is None or (isinstance(inner, str) and _RUN.fullmatch(inner))
        where = path not in NUMERICS and listed(path, NOT_COMPUTATION)
        where |= path.endswith(".checkpoint") and not on_server
        where |= path == "method.module" and inner is not None  # a name of code to run
        if where and not (isinstance(inner, dict) and inner):
            left_out[path] = inner
            continue
        found = _kept(inner, path, left_out, source)
        if not where:
            kept[name] = found
    return kept


def check_refers_to_nothing(text: str, source: str) -> None:
    """Raise UserError for a live `${` in a dumped configuration, in which all are escaped."""

    def walk(value: Any) -> None:
        for item in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(item)
        if isinstance(value, str) and re.search(r"(?<!\\)(\\\\)*\$\{", value):
            raise UserError(f"{source}: contains a reference (${{…}}), which only your own file may")

    walk(parse_data(text, source))


def _known(defaults: Any, source: str) -> Iterator[Any]:
    """The entries of a defaults list that lead to groups of this repository."""
    options = groups()
    for entry in defaults if isinstance(defaults, list) else [defaults]:
        if entry == "_self_" or (isinstance(entry, str) and entry in options["experiment"]):
            yield entry
            continue
        if isinstance(entry, dict) and len(entry) == 1:
            ((name, option),) = entry.items()
            group = str(name).removeprefix("override ").strip().removeprefix("/")
            if group in FOREIGN_GROUPS and option in options.get(group, []):
                yield {f"override /{group}": option}
                continue
        raise UserError(f"{source}: defaults: {entry!s:.100} is not a choice of {', '.join(FOREIGN_GROUPS)}")
