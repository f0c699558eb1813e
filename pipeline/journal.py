"""The record of a run on disk: an append-only file of JSON lines that training writes and delivery reads.

Needs the standard library only. Nothing here knows MLflow; `pipeline.experiment.delivery` brings it there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import UserError
from pipeline.journal_entries import (
    FILE,
    VERSION,
    Entry,
    decode_number,
    encode_number,
    now_ms,
    parse_header,
    read_entries,
    read_header,
    writer_alive,
)

__all__ = [
    "CheckpointRecorder",
    "Entry",
    "Journal",
    "NullJournal",
    "Recorder",
    "decode_number",
    "encode_number",
    "now_ms",
    "read_entries",
    "read_header",
    "writer_alive",
]

STATUSES = ("FINISHED", "FAILED", "KILLED")
OUTCOMES = ("completed", "killed", "failed", "pruned", "refused")


class Recorder(Protocol):
    """What training sees of a run's record."""

    def params(self, values: Mapping[str, object]) -> None: ...
    def tags(self, values: Mapping[str, str]) -> None: ...
    def metrics(self, values: Mapping[str, float], step: int) -> None: ...
    def artifact(self, path: Path, to: str = "") -> None: ...
    def sync(self) -> None: ...


class CheckpointRecorder(Recorder, Protocol):
    """What the code that writes checkpoints sees: the order is hold, entries, snapshot, (the file), checkpoint."""

    def hold(self) -> None: ...
    def release(self) -> None: ...
    def snapshot(self) -> str: ...
    def checkpoint(self, path: Path, sha256: str, slot: int) -> None: ...


class Journal:
    """A run's record; a `Recorder`. Made by `create`, `reopen` or `restore`; usable from several threads.

    Entries are written at once unless `hold` was called: then they wait in memory for the next `checkpoint`, so that
    the file never holds an epoch's entries before the checkpoint that contains them.
    """

    def __init__(self, folder: Path, fd: int, header: Entry) -> None:
        self.folder = folder
        self.id: str = header.data["journal"]
        self.header = header
        self._fd = fd
        self._lock = threading.RLock()
        self._holding = False
        self._held: list[str] = []

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
    ) -> Journal:
        """Start the journal of a new run.

        Args:
            folder: the run's folder, made when missing; everything recorded later lies in it.
            experiment: the MLflow experiment's name.
            name: the run's name; None leaves it to MLflow (or to the run that `mlflow run` made).
            tags: tags that the run has from its start.
            parent: the folder of the run that this one is nested in.
            journal: the journal's id, when another machine has begun this run; None makes a new one.

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
            above = {"journal": parent_header.data["journal"], "folder": os.path.relpath(parent.absolute(), folder)}
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
            parent=above,
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
        fd = _open_for_writing(path)
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
        old = _open_for_writing(path) if path.exists() else None
        try:
            lines = [line for line in text.split("\n") if line]
            if checkpoint is not None:
                file, sha256, slot = checkpoint
                real = _line("checkpoint", path=_relative(file, folder), sha256=sha256, slot=slot)
                lines = [real if json.loads(line).get("kind") == "checkpoint_here" else line for line in lines]
            temporary = folder / f".{FILE}.{os.getpid()}"
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o644)
            fcntl.flock(fd, fcntl.LOCK_EX)
            journal = cls(folder, fd, header)
            journal._write(lines)
            journal._resume()
            os.rename(temporary, path)
            _sync_folder(folder)
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
        self._add("artifact", path=_relative(path, self.folder), to=to)

    def sync(self) -> None:
        """Bring what is written onto the disk. Held entries stay held."""
        with self._lock:
            os.fsync(self._fd)

    # Checkpoints

    def hold(self) -> None:
        """From now on entries wait for the next `checkpoint` (or for `release` or `end`)."""
        self._holding = True

    def release(self) -> None:
        """Write what is held, and hold no longer."""
        with self._lock:
            self._holding = False
            self._flush([])

    def snapshot(self) -> str:
        """The whole text including held entries, with a place kept for the entry of the checkpoint it goes into."""
        with self._lock:
            size = os.fstat(self._fd).st_size
            written = os.pread(self._fd, size, 0).decode()
            return written + _line("checkpoint_here") + "\n" + "".join(line + "\n" for line in self._held)

    def checkpoint(self, path: Path, sha256: str, slot: int, manifest: Mapping[str, Any] | None = None) -> None:
        """Record a checkpoint that is complete on disk, then the entries held for it, and sync.

        The file must have been renamed into place (never written in place): delivery reads it through a hard link.
        `manifest`: further fields for the `manifest.json` that delivery puts beside it on the server.
        """
        more = {"manifest": dict(manifest)} if manifest else {}
        with self._lock:
            self._flush([_line("checkpoint", path=_relative(path, self.folder), sha256=sha256, slot=slot, **more)])
            self.sync()

    # What steps add

    def dataset(
        self,
        name: str,
        digest: str,
        context: str,
        source: str,
        schema: Mapping[str, Any] | None = None,
        profile: Mapping[str, Any] | None = None,
    ) -> None:
        """A data set that the run reads; `context` is training, validation or test, `source` a path or a URL."""
        self._add("dataset", name=name, digest=digest, context=context, source=source, schema=schema, profile=profile)

    def model_input(self, run_id: str) -> None:
        """A teacher: the model that the run (an MLflow run id, or a journal id for work off line) has logged."""
        self._add("model_input", run_id=run_id)

    def model(
        self,
        folder: Path,
        name: str,
        *,
        kind: str = "pyfunc",
        python_model: Path | None = None,
        artifacts: Mapping[str, Path] | None = None,
        input_example: Path | None = None,
        pip_requirements: Sequence[str] = (),
        params: Mapping[str, object] | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        model_type: str | None = None,
        step: int = 0,
    ) -> None:
        """A prepared folder to become a LoggedModel; every path lies inside the run's folder.

        Args:
            folder: the prepared files.
            name: the LoggedModel's name.
            kind: "pyfunc" (servable; needs `python_model`) or "weights" (the folder's files as they are).
            python_model: a file that ends with `mlflow.models.set_model(…)`.
            artifacts: name → file, as `context.artifacts` gives them to the model.
            input_example: a .json or .npy file.
            pip_requirements: what the served model needs.
            params, metrics, tags: for the LoggedModel; metrics that the run has too are linked to its points.
            step: the epoch that the model is of.

        Raises:
            ValueError: a path lies outside the run's folder, or kind and python_model do not fit.
        """
        if kind not in ("pyfunc", "weights") or (kind == "pyfunc") != (python_model is not None):
            raise ValueError('a model is of kind "pyfunc" with python_model, or of kind "weights" without')
        self._add(
            "model",
            entry=hashlib.sha256(f"{self.id}/{name}/{step}".encode()).hexdigest()[:32],  # the same when logged again
            folder=_relative(folder, self.folder),
            name=name,
            model_kind=kind,
            python_model=_relative(python_model, self.folder) if python_model else None,
            artifacts={key: _relative(path, self.folder) for key, path in (artifacts or {}).items()},
            input_example=_relative(input_example, self.folder) if input_example else None,
            pip_requirements=list(pip_requirements),
            params={key: str(value) for key, value in (params or {}).items()},
            metrics={key: encode_number(value) for key, value in (metrics or {}).items()},
            tags=dict(tags or {}),
            model_type=model_type,
            step=step,
        )

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
        if status not in STATUSES or outcome not in OUTCOMES:
            raise ValueError(f"status is one of {STATUSES}, outcome one of {OUTCOMES}: got {status}, {outcome}")
        with self._lock:
            self._flush([], _line("end", status=status, outcome=outcome, exit_code=exit_code, message=message))
            self.sync()
            self.close()

    def close(self) -> None:
        """Give the file back without an end: a reader takes the run for killed. Held entries are lost."""
        with self._lock:
            if self._fd >= 0:
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

    def _flush(self, before: list[str], *after: str) -> None:
        self._write([*before, *self._held, *after])
        self._held.clear()

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


def _line(kind: str, **values: Any) -> str:
    return json.dumps({"kind": kind, "time": now_ms(), **values}, allow_nan=False, ensure_ascii=False)


def _relative(path: Path, folder: Path) -> str:
    absolute = Path(os.path.normpath(path.absolute()))
    if not path.is_absolute() and not absolute.is_relative_to(folder):
        absolute = Path(os.path.normpath(folder / path))
    try:
        return absolute.relative_to(folder).as_posix()
    except ValueError:
        raise ValueError(f"{path} lies outside the run's folder {folder}") from None


def _open_for_writing(path: Path, patience: float = 10.0) -> int:
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            # A killed trainer's worker processes hold its files for a few seconds more.
            if time.monotonic() > deadline:
                os.close(fd)
                raise UserError(f"another process is writing {path}: wait for it or end it") from None
            time.sleep(0.1)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _user() -> str:
    with contextlib.suppress(KeyError, OSError, ImportError):
        import getpass

        return getpass.getuser()
    return ""
