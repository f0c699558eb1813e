"""The lines of a journal: written and read as entries."""

from __future__ import annotations

import contextlib
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
"""The kind of entry that replaces a corrupted line."""
CHECK = b', "crc": "'
"""Ends every line, with the CRC-32 (8 hexadecimal digits) of the object before it, and `"}`."""
OUTCOMES = ("completed", "killed", "failed", "pruned", "refused", "promoted")


@dataclass(frozen=True)
class Entry:
    """One line of a journal. `time`: ms since 1970. `end`: the byte offset just after the line."""

    kind: str
    time: int
    data: Mapping[str, Any] = field(hash=False)
    end: int = 0


@dataclass(frozen=True)
class Carrier:
    """The run that a carrier journal represents; the run's own journal and delivery are elsewhere.

    Attributes:
        run: its MLflow run id; "" if it has none yet.
        journal: its journal's id.
        folder: its folder, named in the message that it must be delivered first; may be on another machine.
    """

    run: str
    journal: str
    experiment: str
    folder: Path | None = None

    def link(self, folder: Path) -> dict[str, str]:
        """The link from `folder` to the run."""
        where = os.path.relpath(self.folder.absolute(), folder) if self.folder else ""
        return {"journal": self.journal, "folder": where, "run": self.run}


_latest = 0
"""The latest time returned: setting the clock back must make later entries seem neither earlier nor simultaneous."""


def now_ms(after: int = 0) -> int:
    """The time, ms since 1970; later than any returned before, never earlier than `after`."""
    global _latest
    _latest = max(_latest + 1, after, time.time_ns() // 1_000_000)
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
    """The entries from byte `offset` on, and the offset after the last of them.

    A journal ends at its last line break: a writer killed mid-line leaves a tail without one, and the next writer cuts
    it off. A line whose checksum does not match is an entry of the kind `DAMAGED`; `damage` names it.
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
"""Values that are never masked: our own names, which must stay intact."""


def line_of(kind: str, **values: Any) -> str:
    """An entry with its checksum; secrets of this process's environment are masked wherever they occur."""
    values = secrets.mask_all(values, but=_STRUCTURE)
    text = json.dumps({"kind": kind, "time": now_ms(), **values}, allow_nan=False, ensure_ascii=False)
    return f'{text[:-1]}{CHECK.decode()}{zlib.crc32(text.encode()):08x}"}}'


def damage(path: Path) -> list[str]:
    """One line for each damaged line of a journal: file and number."""
    entries, _ = read_entries(path)
    return [
        f"{path}: line {number} is damaged, and what it recorded is lost; the rest is intact"
        for number, entry in enumerate(entries, start=1)
        if entry.kind == DAMAGED
    ]


def read_header(folder: Path) -> Entry | None:
    """The first entry of the journal in `folder`; None if there is no journal. Raises UserError: as `parse_header`."""
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


def parent_link(parent: Path, folder: Path) -> dict[str, str]:
    """The link from a nested run's `folder` to its parent's.

    It skips a carrier and leads to the run itself: carriers come and go with their processes.

    Raises:
        UserError: the parent has no journal.
    """
    header = read_header(parent)
    if header is None:
        raise UserError(f"no journal in {parent}: start the parent's journal before its child's")
    carried = header.data.get("carrier")
    if carried:
        where = os.path.relpath(parent.absolute() / carried["folder"], folder) if carried["folder"] else ""
        return {**carried, "folder": where}
    return {"journal": header.data["journal"], "folder": os.path.relpath(parent.absolute(), folder)}


def user() -> str:
    """The name of this process's user; "" if the machine has none for it."""
    with contextlib.suppress(KeyError, OSError, ImportError):
        import getpass

        return getpass.getuser()
    return ""


def generations(entries: Sequence[Entry]) -> list[str]:
    """The marks of a journal's writers, in order; the last is the present writer's."""
    begun = entries[0].data
    return [begun.get("generation") or begun["journal"], *(e.data["generation"] for e in entries if e.kind == "resume")]


def writer_alive(folder: Path) -> bool:
    """Whether a process on this machine is writing the run in `folder`."""
    return is_locked(folder / LOCK)


def parse_header(line: str, path: Path) -> Entry:
    """The first entry, which is `line` of the journal `path`. Raises UserError: this version cannot read it."""
    entry = _entry(line.rstrip("\n").encode(), len(line.encode()))
    version = entry.data.get("version")
    if entry.kind == "open" and isinstance(version, int) and version > VERSION:
        raise UserError(f"{path} was written by another version (schema {version}): update this repository")
    if entry.kind != "open" or version != VERSION or not isinstance(entry.data.get("tags"), dict):
        raise UserError(f"{path} is not a journal: its first line is not an `open` entry, or it is damaged")
    return entry
