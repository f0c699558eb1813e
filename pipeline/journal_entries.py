"""Reading journals: the lines of the record on disk, as entries."""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

FILE = "journal.jsonl"
VERSION = 1
STATUSES = ("FINISHED", "FAILED", "KILLED")
OUTCOMES = ("completed", "killed", "failed", "pruned", "refused", "promoted")


@dataclass(frozen=True)
class Entry:
    """One line of a journal. `time`: ms since 1970. `end`: the byte offset just behind the line."""

    kind: str
    time: int
    data: Mapping[str, Any] = field(hash=False)
    end: int = 0


@dataclass(frozen=True)
class Carrier:
    """The run that a carrier journal stands for, which has a journal and a delivery of its own elsewhere.

    Attributes:
        run: its MLflow run id; "" when it has none yet.
        journal: its journal's id.
        experiment: the MLflow experiment's name.
        folder: its folder, for the message that it is to be delivered first; it need not be on this machine.
    """

    run: str
    journal: str
    experiment: str
    folder: Path | None = None

    def link(self, folder: Path) -> dict[str, str]:
        """What leads from `folder` to it."""
        where = os.path.relpath(self.folder.absolute(), folder) if self.folder else ""
        return {"journal": self.journal, "folder": where, "run": self.run}


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def encode_number(value: float) -> float | str:
    """JSON has no NaN and no infinity: they travel as the strings "nan", "inf" and "-inf"."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def decode_number(value: float | str) -> float:
    return float(value)


def check_end(status: str, outcome: str) -> None:
    """Raises ValueError for a status or an outcome that no run can have."""
    if status not in STATUSES or outcome not in OUTCOMES:
        raise ValueError(f"status is one of {STATUSES}, outcome one of {OUTCOMES}: got {status}, {outcome}")


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


def parent_link(parent: Entry, above: Path, folder: Path) -> dict[str, str]:
    """What leads from a nested run's `folder` to its parent, whose header and absolute folder are given.

    It leads past a carrier to the run itself: carriers come and go with the processes that have them.
    """
    carried = parent.data.get("carrier")
    if carried:
        where = os.path.relpath(above / carried["folder"], folder) if carried["folder"] else ""
        return {**carried, "folder": where}
    return {"journal": parent.data["journal"], "folder": os.path.relpath(above, folder)}


def generations(entries: Sequence[Entry]) -> list[str]:
    """The marks of those who have written a journal's text, in their order; the last is its present writer's."""
    begun = entries[0].data
    return [begun.get("generation") or begun["journal"], *(e.data["generation"] for e in entries if e.kind == "resume")]


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
