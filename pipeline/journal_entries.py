"""Reading journals: the lines of the record on disk, as entries."""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

FILE = "journal.jsonl"
VERSION = 1


@dataclass(frozen=True)
class Entry:
    """One line of a journal. `time`: ms since 1970. `end`: the byte offset just behind the line."""

    kind: str
    time: int
    data: Mapping[str, Any] = field(hash=False)
    end: int = 0


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def encode_number(value: float) -> float | str:
    """JSON has no NaN and no infinity: they travel as the strings "nan", "inf" and "-inf"."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def decode_number(value: float | str) -> float:
    return float(value)


def read_entries(path: Path, offset: int = 0) -> tuple[list[Entry], int]:
    """The entries from byte `offset` on, and the offset behind the last of them.

    A journal ends at its first line that is not whole: a writer killed in the middle of a line leaves such a tail,
    and the next writer cuts it off. A missing file is an empty journal.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    entries = []
    for line in data.split(b"\n")[:-1]:
        try:
            values = json.loads(line)
            kind, at = values.pop("kind"), int(values.pop("time"))
        except (ValueError, KeyError, TypeError, AttributeError):
            break
        offset += len(line) + 1
        entries.append(Entry(kind, at, values, offset))
    return entries, offset


def read_header(folder: Path) -> Entry | None:
    """The first entry of the journal in `folder`, None when there is none yet.

    Raises:
        UserError: the file is not a journal that this version can read.
    """
    path = folder / FILE
    try:
        with path.open("rb") as file:
            line = file.readline()
    except FileNotFoundError:
        return None
    if not line.endswith(b"\n"):
        return None
    return parse_header(line.decode(errors="replace"), path)


def writer_alive(folder: Path) -> bool:
    """Whether some process on this machine holds the journal open for writing."""
    try:
        fd = os.open(folder / FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def parse_header(line: str, path: Path) -> Entry:
    try:
        values = json.loads(line)
        kind, at, version = values.pop("kind"), values.pop("time"), values["version"]
    except (ValueError, KeyError, AttributeError):
        raise UserError(f"{path} is not a journal: its first line is not an `open` entry") from None
    if kind != "open" or version > VERSION:
        raise UserError(f"{path} was written by another version (schema {version}): update this repository")
    return Entry(kind, at, values, len(line.encode()))
