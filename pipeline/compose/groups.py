"""The groups of conf/ and their options, read from the folders; needs no Hydra, so that `--help` answers at once."""

import os
from pathlib import Path

from pipeline.config.words import near_miss, suggestion
from pipeline.errors import UserError
from pipeline.paths import REPOSITORY, user_path

CONF = REPOSITORY / "conf"
STUDENTS = "models:/<name>@<alias>, models:/<name>/<version>, runs:/<id>, or a logged model's folder"
"""How a step's `model=` names a logged student."""
NOT_GROUPS = ("sweep", "cluster", "promotion", "table")
"""Folders of conf/ that are not part of a run's configuration: search spaces, clusters, gates, tables."""


def groups() -> dict[str, list[str]]:
    """Options by group: `{"model/teacher": ["none", …], …}`."""
    found: dict[str, list[str]] = {}
    for file in sorted(CONF.glob("*/**/*.yaml")):
        group = file.parent.relative_to(CONF).as_posix()
        if group.split("/")[0] not in NOT_GROUPS:
            found.setdefault(group, []).append(file.stem)
    return found


def names(folder: str) -> list[str]:
    """The files of a folder of conf/: `names("sweep")` -> `["accuracy_cost", …]`."""
    return sorted(file.stem for file in (CONF / folder).glob("*.yaml"))


def locate(folder: str, given: str, key: str | None = None) -> Path:
    """The file that `cfg=<given>` or `sweep=<given>` names: of conf/<folder>, or a YAML file anywhere.

    `key` names it on the command line; by default as the folder. Raises UserError, with near misses: no such file.
    """
    key = key or folder
    is_path = given.endswith((".yaml", ".yml")) or os.sep in given
    file = user_path(given, key)
    if is_path and file.is_file():
        return file.resolve()
    named = CONF / folder / f"{given.removesuffix('.yaml')}.yaml"
    if not Path(given).is_absolute() and ".." not in Path(given).parts and named.is_file():
        return named
    if file.is_dir():
        raise UserError(f"{key}={given} is a folder: give a YAML file in it")
    if is_path:
        beside = sorted(p.name for p in file.parent.glob("*.y*ml")) if file.parent.is_dir() else []
        near = near_miss(file.name, beside)
        raise UserError(f"{key}={given}: no such file" + (f"; did you mean {file.parent / near}?" if near else ""))
    known = names(folder)
    raise UserError(
        f"{key}={given}: no such {folder if key == 'cfg' else key}; {suggestion(given, known)}there are "
        f"{', '.join(known)}, or give the path of a YAML file"
    )
