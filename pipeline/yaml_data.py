"""YAML by anyone, as plain data: bounded in size, depth and aliases, never self-referential."""

from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError

MAX_BYTES, MAX_DEPTH, MAX_NODES = 1_000_000, 40, 50_000
"""Limits of a settings file: size, nesting depth, and number of values once its aliases are filled in. The
largest that this project writes has 15 kB, 5 levels and 400 values."""
SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse(text: str, source: str, loader: Any = SafeLoader) -> Any:
    """The data of a text. Raises UserError, one line that begins with `source`."""
    check_bounds(text, source)
    try:
        return yaml.load(text, Loader=loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: dates, and numbers of thousands of digits
        raise refusal(source, error) from error


def text_of(path: Path, source: str) -> str:
    """The text of a file. Raises UserError: it cannot be read, is too large, or is not UTF-8."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{source}: larger than {MAX_BYTES // 1_000_000} MB: that is not a settings file")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise refusal(source, error) from error


def refusal(source: str, error: Exception) -> UserError:
    """A parser's error as one line."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        return UserError(f"{source}: not valid YAML{where}: {error.problem}")
    return UserError(f"{source}: not valid YAML: {' '.join(str(error).split())[:300]}")


def check_bounds(text: str, source: str) -> None:
    """Refuse text that would nest, refer to itself or multiply without end, before anything is built from it."""
    sizes: dict[str, tuple[int, int]] = {}  # per anchor: values, levels
    open_: list[tuple[str | None, int, int]] = []  # anchor, values so far, levels so far
    try:
        for event in yaml.parse(text, Loader=SafeLoader):
            anchor = getattr(event, "anchor", None)
            if isinstance(event, yaml.CollectionStartEvent):
                open_.append((anchor, 1, 1))
                if len(open_) > MAX_DEPTH:
                    raise UserError(f"{source}: nested deeper than {MAX_DEPTH} levels: that is not a settings file")
                continue
            if isinstance(event, yaml.CollectionEndEvent):
                anchor, values, levels = open_.pop()
            elif isinstance(event, yaml.AliasEvent):
                if anchor in [name for name, _, _ in open_]:
                    raise UserError(f"{source}: *{anchor} stands inside &{anchor}: a file cannot contain itself")
                values, levels = sizes.get(anchor or "", (1, 1))
                anchor = None
            elif isinstance(event, yaml.ScalarEvent):
                values, levels = 1, 1
            else:
                continue
            if anchor is not None:
                sizes[anchor] = values, levels
            if open_:
                name, so_far, deep = open_[-1]
                open_[-1] = name, so_far + values, max(deep, levels + 1)
                if so_far + values > MAX_NODES:
                    raise UserError(f"{source}: more than {MAX_NODES} values: that is not a settings file")
                if len(open_) + levels > MAX_DEPTH:
                    raise UserError(f"{source}: nested deeper than {MAX_DEPTH} levels: that is not a settings file")
    except yaml.YAMLError as error:
        raise refusal(source, error) from error
