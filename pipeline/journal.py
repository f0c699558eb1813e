"""The record of a run on disk: an append-only file of JSON lines that training writes and delivery reads.

Needs the standard library only. Nothing here knows MLflow; `pipeline.experiment.delivery` brings it there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipeline import secrets
from pipeline.errors import UserError
from pipeline.journal_entries import (
    FILE,
    VERSION,
    Carrier,
    Entry,
    check_end,
    decode_number,
    encode_number,
    generations,
    now_ms,
    parent_link,
    parse_header,
    read_entries,
    read_header,
    writer_alive,
)
from pipeline.journal_files import open_for_writing, relative, sync_folder
from pipeline.journal_steps import StepEntries

__all__ = [
    "Carrier",
    "CheckpointRecorder",
    "Entry",
    "Journal",
    "NullJournal",
    "Recorder",
    "check_end",
    "decode_number",
    "encode_number",
    "generations",
    "now_ms",
    "read_entries",
    "read_header",
    "writer_alive",
]


class Recorder(Protocol):
    """What training sees of a run's record."""

    def params(self, values: Mapping[str, object]) -> None: ...
    def tags(self, values: Mapping[str, str]) -> None: ...
    def metrics(self, values: Mapping[str, float], step: int) -> None: ...
    def artifact(self, path: Path, to: str = "") -> None: ...
    def sync(self) -> None: ...


class CheckpointRecorder(Recorder, Protocol):
    """What the code that writes checkpoints sees: the order is hold, entries, snapshot, (the file), checkpoint.

    Entries may come while the file is written: the next checkpoint covers them.
    """

    def hold(self) -> None: ...
    def release(self) -> None: ...
    def snapshot(self) -> str: ...
    def checkpoint(self, path: Path, sha256: str, slot: int) -> None: ...


class Journal(StepEntries):
    """A run's record; a `Recorder`. Made by `create`, `reopen` or `restore`; usable from several threads.

    Entries are written at once unless `hold` was called: then they wait in memory for the `checkpoint` of the next
    `snapshot`, so that the file never holds an epoch's entries before the checkpoint that contains them.
    """

    def __init__(self, folder: Path, fd: int, header: Entry) -> None:
        self.folder = folder
        self.id: str = header.data["journal"]
        self.header = header
        self._fd = fd
        self._lock = threading.RLock()
        self._holding = False
        self._held: list[str] = []
        self._covered = 0
        """So many of them, the first, are in the last snapshot."""

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        experiment: str,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
        parent: Path | None = None,
        journal: str | None = None,
        carrier: Carrier | None = None,
    ) -> Journal:
        """Start the journal of a new run.

        Args:
            folder: the run's folder, made when missing; everything recorded later lies in it.
            experiment: the MLflow experiment's name.
            name: the run's name; None leaves it to MLflow (or to the run that `mlflow run` made).
            tags: tags that the run has from its start.
            parent: the folder of the run that this one is nested in, or of a carrier of that run.
            journal: the journal's id, when another machine has begun this run; None makes a new one.
            carrier: the journal is no run of its own: it stands for this one, and only its children count. So a
                process that has no access to a run's journal adds nested runs to it.

        Raises:
            UserError: the folder already holds a journal, or the parent's has none.
        """
        folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        above = None
        if parent is not None:
            parent_header = read_header(parent)
            if parent_header is None:
                raise UserError(f"no journal in {parent}: start the parent's journal before its child's")
            above = parent_link(parent_header, parent.absolute(), folder)
        try:
            fd = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            raise UserError(f"{folder} already holds a run: give resume=<its id>, or another folder") from None
        fcntl.flock(fd, fcntl.LOCK_EX)
        line = _line(
            "open",
            version=VERSION,
            journal=journal or uuid.uuid4().hex,
            name=name,
            experiment=experiment,
            tags=dict(tags or {}),
            # Whoever begins a known run again is another writer than the one that began it.
            generation=uuid.uuid4().hex if journal else None,
            parent=above,
            carrier=carrier and carrier.link(folder),
            user=_user(),
            source=sys.argv[0] if sys.argv else "",
        )
        made = cls(folder, fd, parse_header(line, folder / FILE))
        made._write([line])
        made.sync()
        return made

    @classmethod
    def reopen(cls, folder: Path) -> Journal:
        """Go on writing at the end of a journal; a torn last line is cut off, an `end` is followed by a `resume`.

        Raises:
            UserError: there is no journal, or another process is writing it.
        """
        folder = folder.absolute()
        path = folder / FILE
        header = read_header(folder)
        if header is None:
            raise UserError(f"no journal in {folder}: nothing to go on with")
        fd = open_for_writing(path)
        entries, end = read_entries(path)
        os.ftruncate(fd, end)
        journal = cls(folder, fd, header)
        lifecycle = [entry.kind for entry in entries if entry.kind in ("end", "resume")]
        if lifecycle[-1:] == ["end"]:
            journal._resume()
        return journal

    @classmethod
    def restore(cls, folder: Path, text: str, checkpoint: tuple[Path, str, int] | None = None) -> Journal:
        """Make `text` (a `snapshot`) the journal of `folder`, whatever was there, and go on writing behind it.

        Args:
            folder: the run's folder, on this machine or another than the snapshot's.
            text: what `snapshot` returned.
            checkpoint: (path, sha256, slot) of the checkpoint that held the text: it takes the place that
                `snapshot` left for it, so that delivery uploads it before the entries that it covers.

        Raises:
            UserError: the text is not a journal, or another process is writing the folder's journal.
        """
        folder = folder.absolute()
        path = folder / FILE
        header = parse_header(text.split("\n", 1)[0], path)
        folder.mkdir(parents=True, exist_ok=True)
        # The old file's lock is kept until the new one is in place, so that no second writer slips in between.
        old = open_for_writing(path) if path.exists() else None
        try:
            lines = [line for line in text.split("\n") if line]
            if checkpoint is not None:
                file, sha256, slot = checkpoint
                real = _line("checkpoint", path=relative(file, folder), sha256=sha256, slot=slot)
                lines = [real if json.loads(line).get("kind") == "checkpoint_here" else line for line in lines]
            temporary = folder / f".{FILE}.{os.getpid()}"
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o644)
            fcntl.flock(fd, fcntl.LOCK_EX)
            journal = cls(folder, fd, header)
            journal._write(lines)
            journal._resume()
            os.rename(temporary, path)
            sync_folder(folder)
        finally:
            if old is not None:
                os.close(old)
        return journal

    # What a Recorder does

    def params(self, values: Mapping[str, object]) -> None:
        self._add("params", values={str(key): str(value) for key, value in values.items()})

    def tags(self, values: Mapping[str, str]) -> None:
        self._add("tags", values={str(key): str(value) for key, value in values.items()})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Values of one step, stamped with the present time, which they keep wherever they are sent."""
        self._add("metrics", step=int(step), values={key: encode_number(value) for key, value in values.items()})

    def artifact(self, path: Path, to: str = "") -> None:
        """A file or folder inside the run's folder; `to` is the directory among the run's artifacts.

        Delivery reads it when it comes to it: a file that changes later is sent as it is then.

        Raises:
            ValueError: the path lies outside the run's folder.
        """
        self._add("artifact", path=relative(path, self.folder), to=to)

    def sync(self) -> None:
        """Bring what is written onto the disk. Held entries stay held."""
        with self._lock:
            os.fsync(self._fd)

    # Checkpoints

    def hold(self) -> None:
        """From now on entries wait for a `checkpoint` that contains them (or for `release` or `end`)."""
        self._holding = True

    def release(self) -> None:
        """Write what is held, and hold no longer."""
        with self._lock:
            self._holding = False
            self._flush()

    def snapshot(self) -> str:
        """The whole text including held entries, with a place kept for the entry of the checkpoint it goes into."""
        with self._lock:
            self._covered = len(self._held)
            size = os.fstat(self._fd).st_size
            written = os.pread(self._fd, size, 0).decode()
            return written + _line("checkpoint_here") + "\n" + "".join(line + "\n" for line in self._held)

    def checkpoint(self, path: Path, sha256: str, slot: int, manifest: Mapping[str, Any] | None = None) -> None:
        """Record a checkpoint that is complete on disk, then the held entries that its snapshot contains, and sync.

        The file must have been renamed into place (never written in place): delivery reads it through a hard link.
        `manifest`: further fields for the `manifest.json` that delivery puts beside it on the server.
        """
        more = {"manifest": dict(manifest)} if manifest else {}
        line = _line("checkpoint", path=relative(path, self.folder), sha256=sha256, slot=slot, **more)
        with self._lock:
            self._write([line, *self._held[: self._covered]])
            del self._held[: self._covered]
            self._covered = 0
            self.sync()

    # The end, and what runs beside

    def child(self, folder: Path) -> None:
        """A nested run's folder, whose journal the same delivery follows. Written at once, also while holding."""
        folder = folder.absolute()
        inside = folder.is_relative_to(self.folder)
        with self._lock:
            self._write([_line("child", folder=str(folder.relative_to(self.folder) if inside else folder))])

    def end(self, status: str, outcome: str, exit_code: int, message: str | None = None) -> None:
        """The last entry: held entries and the end in one write, synced; then the journal is closed.

        Raises:
            ValueError: an unknown status (FINISHED, FAILED, KILLED) or outcome.
        """
        check_end(status, outcome)
        with self._lock:
            self._flush(_line("end", status=status, outcome=outcome, exit_code=exit_code, message=message))
            self.sync()
            self.close()

    def close(self) -> None:
        """Give the file back without an end: a reader takes the run for killed. Held entries are lost."""
        with self._lock:
            if self._fd >= 0:
                fcntl.flock(self._fd, fcntl.LOCK_UN)  # forked processes (data workers) hold the descriptor too
                os.close(self._fd)
                self._fd = -1

    def _resume(self) -> None:
        # The generation tells a reader whether a byte offset it remembers still belongs to this text.
        self._write([_line("resume", generation=uuid.uuid4().hex)])
        self.sync()

    def _add(self, kind: str, **values: Any) -> None:
        line = _line(kind, **values)
        with self._lock:
            if self._holding and self._fd >= 0:
                self._held.append(line)
            else:
                self._write([line])

    def _flush(self, *after: str) -> None:
        self._write([*self._held, *after])
        self._held.clear()
        self._covered = 0

    def _write(self, lines: Sequence[str]) -> None:
        if self._fd < 0:
            raise ValueError(f"the journal in {self.folder} is closed")
        data = "".join(line + "\n" for line in lines).encode()
        while data:
            data = data[os.write(self._fd, data) :]


class NullJournal:
    """The record of a process that keeps none: all but the first of several training together. Takes any call."""

    def __getattr__(self, name: str) -> Any:
        return lambda *values, **named: ""


_STRUCTURE = ("journal", "generation", "path", "folder", "to", "sha256", "parent", "carrier", "entry", "python_model")
"""What a journal's entries say of themselves: names that we have made, which must stay as they are."""


def _line(kind: str, **values: Any) -> str:
    """An entry; no secret of this process's environment gets into a record, whichever way it came here."""
    values = secrets.mask_all(values, but=_STRUCTURE)
    return json.dumps({"kind": kind, "time": now_ms(), **values}, allow_nan=False, ensure_ascii=False)


def _user() -> str:
    with contextlib.suppress(KeyError, OSError, ImportError):
        import getpass

        return getpass.getuser()
    return ""
