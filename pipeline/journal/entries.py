"""Reading journals: the lines of the record on disk, as entries."""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import secrets
from pipeline.errors import UserError
from pipeline.files import is_locked
from pipeline.journal.folder import LOCK

FILE = "journal.jsonl"
VERSION = 1
STATUSES = ("FINISHED", "FAILED", "KILLED")
DAMAGED = "damaged"
"""The kind of an entry that stands for a line that is not what was written."""
CHECK = b', "crc": "'
"""Ends every line, with the CRC-32 (8 hexadecimal digits) of the object before it, and `"}`."""
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


_latest = 0
"""The latest time that was given: a clock that is set back does not make what comes later seem earlier."""


def now_ms(after: int = 0) -> int:
    """The time, ms since 1970; never before one that was given already, nor before `after`."""
    global _latest
    _latest = max(_latest, after, time.time_ns() // 1_000_000)
    return _latest


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

    A journal ends at its last line break: a writer killed in the middle of a line leaves a tail without one, and the
    next writer cuts it off. A line that is not what was written is an entry of the kind `DAMAGED`; `damage` says which.
    A missing file is an empty journal.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return [], offset
    entries = []
    for line in data.split(b"\n")[:-1]:
        offset += len(line) + 1
        entries.append(_entry(line, offset))
    return entries, offset


def _entry(line: bytes, end: int) -> Entry:
    whole, check, digits = line.rpartition(CHECK)
    try:
        if check and digits != f'{zlib.crc32(whole + b"}"):08x}"}}'.encode():
            raise ValueError("its checksum does not match")
        values = json.loads(line)
        kind, at = values.pop("kind"), int(values.pop("time"))
        values.pop("crc", None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Entry(DAMAGED, 0, {}, end)
    return Entry(kind, at, values, end)


_STRUCTURE = ("journal", "generation", "path", "folder", "to", "sha256", "parent", "carrier", "entry", "python_model")
"""What a journal's entries say of themselves: names that we have made, which must stay as they are."""


def line_of(kind: str, **values: Any) -> str:
    """An entry with its checksum; no secret of this process's environment gets into a record, however it came here."""
    values = secrets.mask_all(values, but=_STRUCTURE)
    text = json.dumps({"kind": kind, "time": now_ms(), **values}, allow_nan=False, ensure_ascii=False)
    return f'{text[:-1]}{CHECK.decode()}{zlib.crc32(text.encode()):08x}"}}'


def damage(path: Path) -> list[str]:
    """One line for each damaged line of a journal: file and number."""
    entries, _ = read_entries(path)
    return [
        f"{path}: line {number} is damaged, and what it recorded is lost; the rest is whole"
        for number, entry in enumerate(entries, start=1)
        if entry.kind == DAMAGED
    ]


def read_header(folder: Path) -> Entry | None:
    """The first entry of the journal in `folder`, None when there is none yet.

    Raises:
        UserError: the file is not a journal that this version can read.
    """
    path = folder / FILE
    try:
        with path.open("rb") as file:
            line = file.readline()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
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
    """Whether some process on this machine writes the run in `folder`."""
    return is_locked(folder / LOCK)


def parse_header(line: str, path: Path) -> Entry:
    whole = line.rstrip("\n").encode()
    entry = _entry(whole, len(line.encode()))
    version = entry.data.get("version")
    if entry.kind == "open" and isinstance(version, int) and version > VERSION:
        raise UserError(f"{path} was written by another version (schema {version}): update this repository")
    if entry.kind != "open" or version != VERSION or not isinstance(entry.data.get("tags"), dict):
        raise UserError(f"{path} is not a journal: its first line is not an `open` entry, or it is damaged")
    return entry
