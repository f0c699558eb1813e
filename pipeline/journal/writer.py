"""The record of a run on disk: an append-only file of JSON lines that training writes and delivery reads.

Needs the standard library only. Nothing here knows MLflow; `pipeline.tracking` brings it there.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UserError
from pipeline.files import explained, release, write_atomically
from pipeline.journal.entries import (
    FILE,
    VERSION,
    Carrier,
    Entry,
    check_end,
    damage,
    encode_number,
    line_of,
    now_ms,
    parent_link,
    parse_header,
    read_entries,
    read_header,
    user,
)
from pipeline.journal.folder import append, relative, take

logger = logging.getLogger("asib")
PLACE = '{"kind": "checkpoint_here"'


class Journal:
    """A run's record; a `Recorder`. Made by `create`, `reopen` or `restore`; usable from several threads.

    Entries are written at once unless `hold` was called: then they wait in memory for the `checkpoint` of the next
    `snapshot`, so that the file never holds an epoch's entries before the checkpoint that contains them.

    Args:
        lock: of the folder, as `take` gives it; freed when the journal is closed.
    """

    def __init__(self, folder: Path, header: Entry, lock: int) -> None:
        self.folder = folder
        self.id: str = header.data["journal"]
        self.header = header
        self._fd = -1
        self._folder_lock: int | None = lock
        self._pending: list[str] | None = None
        """Lines waiting for the file to be made; None once it exists."""
        self._lock = threading.RLock()
        self._holding = False
        self._held: list[str] = []
        self._covered = 0
        """How many of the held lines, from the first, the last snapshot contains."""

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        experiment: str,
        name: str | None = None,
        usual_name: str | None = None,
        tags: Mapping[str, str] | None = None,
        parent: Path | None = None,
        journal: str | None = None,
        carrier: Carrier | None = None,
        pending: bool = False,
    ) -> Journal:
        """Start the journal of a new run.

        Args:
            folder: the run's folder, created if missing; everything recorded later lies in it.
            name: what its user calls the run.
            usual_name: its name if `name` is None; None leaves it to MLflow.
            tags: set when the run is created.
            parent: the folder of the run that this one is nested in, or of a carrier of that run.
            journal: the journal's id, if another machine has begun this run; None makes a new one.
            carrier: the journal is not a run of its own: it represents this one, and only its children count. Thus a
                process without access to a run's journal can add nested runs to it.
            pending: write no file until `begin`: the run may still be refused.

        Raises:
            UserError: the folder already holds a journal, the parent's has none, or the file system refuses.
        """
        folder = folder.absolute()
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        line = line_of(
            "open",
            version=VERSION,
            journal=journal or uuid.uuid4().hex,
            name=name,
            usual_name=usual_name,
            experiment=experiment,
            tags=dict(tags or {}),
            # Starting a known run again makes a different writer from the one that began it.
            generation=uuid.uuid4().hex if journal else None,
            parent=None if parent is None else parent_link(parent, folder),
            carrier=carrier and carrier.link(folder),
            user=user(),
            source=sys.argv[0] if sys.argv else "",
        )
        taken = UserError(f"{folder} already holds a run: give resume=<its id>, or another folder")
        if (folder / FILE).exists():
            raise taken
        lock = take(folder, 0.0)
        if (folder / FILE).exists():
            release(lock)
            raise taken
        made = cls(folder, parse_header(line, folder / FILE), lock)
        made._pending = [line]
        if not pending:
            made.begin()
        return made

    def begin(self) -> None:
        """Make the file of a pending journal, with everything recorded so far. Raises UserError: it cannot be made."""
        with self._lock:
            if self._pending is None:
                return
            path = self.folder / FILE
            try:
                write_atomically(path, "".join(line + "\n" for line in self._pending))
                self._open()
            except BaseException:
                path.unlink(missing_ok=True)
                self.close()
                raise
            self._pending = None

    def _open(self) -> None:
        with explained(self.folder / FILE):
            self._fd = os.open(self.folder / FILE, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)

    @classmethod
    def reopen(cls, folder: Path, lock: int | None = None) -> Journal:
        """Continue a journal at its end: cut off a torn last line, follow an `end` with a `resume`.

        Args:
            lock: of the folder, if the caller holds it; the journal takes it over, and it is freed on failure.

        Raises:
            UserError: no journal, or another process is writing it.
        """
        folder = folder.absolute()
        path = folder / FILE
        nothing = UserError(f"no journal in {folder}: nothing to resume")
        if lock is None and not path.exists():
            raise nothing
        lock = take(folder) if lock is None else lock
        try:
            header = read_header(folder)
            if header is None:
                raise nothing
            journal = cls(folder, header, lock)
            journal._open()
        except BaseException:
            release(lock)
            raise
        entries, end = read_entries(path)
        os.ftruncate(journal._fd, end)
        now_ms(after=entries[-1].time)
        for sentence in damage(path):
            logger.warning("%s", sentence)
        lifecycle = [entry.kind for entry in entries if entry.kind in ("end", "resume")]
        if lifecycle[-1:] == ["end"]:
            journal._write([journal._mark()])
            journal.sync()
        return journal

    @classmethod
    def restore(
        cls,
        folder: Path,
        text: str,
        checkpoint: tuple[Path, str, int] | None = None,
        lock: int | None = None,
    ) -> Journal:
        """Make `text` (a `snapshot`) the journal of `folder`, replacing any other, and continue it.

        Args:
            folder: may be on another machine than the snapshot's.
            checkpoint: (path, sha256, slot) of the checkpoint that held the text. Its entry fills the place that
                `snapshot` left for it, so that delivery uploads it before the entries that it covers.
            lock: as for `reopen`.

        Raises:
            UserError: the text is not a journal, or another process is writing the folder's journal.
        """
        folder = folder.absolute()
        path = folder / FILE
        header = parse_header(text.split("\n", 1)[0], path)
        now_ms(after=header.time)
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        lock = take(folder) if lock is None else lock
        journal = cls(folder, header, lock)
        try:
            lines = [line for line in text.split("\n") if line]
            if checkpoint is not None:
                file, sha256, slot = checkpoint
                real = line_of("checkpoint", path=relative(file, folder), sha256=sha256, slot=slot)
                lines = [real if line.startswith(PLACE) else line for line in lines]
            lines.append(journal._mark())
            write_atomically(path, "".join(line + "\n" for line in lines))
            journal._open()
        except BaseException:
            journal.close()
            raise
        entries, _ = read_entries(path)
        now_ms(after=max(entry.time for entry in entries))
        return journal

    # What a Recorder does

    def params(self, values: Mapping[str, object]) -> None:
        self._add("params", values={str(key): str(value) for key, value in values.items()})

    def tags(self, values: Mapping[str, str]) -> None:
        self._add("tags", values={str(key): str(value) for key, value in values.items()})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record values of one step, stamped with the current time, which they keep wherever they are sent."""
        self._add("metrics", step=int(step), values={key: encode_number(value) for key, value in values.items()})

    def artifact(self, path: Path, to: str = "") -> None:
        """Record a file or folder inside the run's folder; `to` is the directory among the run's artifacts.

        Delivery reads it when it gets there: a file that changes before then is sent as changed. Raises ValueError:
        the path lies outside the run's folder.
        """
        self._add("artifact", path=relative(path, self.folder), to=to)

    def sync(self) -> None:
        """Flush what is written to the disk. Held entries stay held."""
        with self._lock:
            self.begin()
            with explained(self.folder / FILE):
                os.fsync(self._fd)
                if os.fstat(self._fd).st_nlink == 0:
                    raise FileNotFoundError(errno.ENOENT, "removed", str(self.folder / FILE))

    # What steps record besides

    def dataset(self, name: str, digest: str, context: str, source: str, profile: Mapping[str, Any]) -> None:
        """Record a data set that the run reads; `context` is training, validation or test, `source` a path or a URL."""
        self._add("dataset", name=name, digest=digest, context=context, source=source, schema=None, profile=profile)

    def model_input(self, run_id: str) -> None:
        """Record a teacher: the model logged by a run (an MLflow run id, or a journal id of an offline run)."""
        self._add("model_input", run_id=run_id)

    def model(
        self,
        folder: Path,
        name: str,
        *,
        kind: Literal["pyfunc", "weights"] = "pyfunc",
        python_model: Path | None = None,
        artifacts: Mapping[str, Path] | None = None,
        input_example: Path | None = None,
        pip_requirements: Sequence[str] = (),
        params: Mapping[str, object] | None = None,
        metrics: Mapping[str, float] | None = None,
        model_type: str | None = None,
    ) -> None:
        """Record a prepared folder that becomes a LoggedModel; every path lies inside the run's folder.

        Args:
            kind: "pyfunc" (servable; needs `python_model`) or "weights" (the folder's files as they are).
            python_model: a file that ends with `mlflow.models.set_model(…)`.
            artifacts: name -> file, as `context.artifacts` gives them to the model.
            input_example: a .json or .npy file.
            metrics: those that the run also has are linked to its points.

        Raises:
            ValueError: a path lies outside.
        """
        self._add(
            "model",
            entry=self._model_entry(name),
            folder=relative(folder, self.folder),
            name=name,
            model_kind=kind,
            python_model=relative(python_model, self.folder) if python_model else None,
            artifacts={key: relative(path, self.folder) for key, path in (artifacts or {}).items()},
            input_example=relative(input_example, self.folder) if input_example else None,
            pip_requirements=list(pip_requirements),
            params={key: str(value) for key, value in (params or {}).items()},
            metrics={key: encode_number(value) for key, value in (metrics or {}).items()},
            tags={},
            model_type=model_type,
            step=0,
        )

    def register(self, registered: str, *, model: str, alias: str, tags: Mapping[str, str] | None = None) -> None:
        """Make a model that was logged before a new version of a registered model, once, with an alias.

        Args:
            registered: the registered model's name; created if missing.
            model: the LoggedModel's name, as given to `model`.
            alias: moved to the new version, unless a newer one has it.
        """
        entry = self._model_entry(model)
        self._add("register", entry=entry, registered=registered, alias=alias, tags=dict(tags or {}))

    def _model_entry(self, name: str) -> str:
        """A model's key, the same when it is logged again."""
        return hashlib.sha256(f"{self.id}/{name}/0".encode()).hexdigest()[:32]

    # Checkpoints

    def hold(self) -> None:
        """Let entries wait for a `checkpoint` that contains them, or for `release` or `end`."""
        self._holding = True

    def release(self) -> None:
        """Write what is held, and stop holding."""
        with self._lock:
            self._holding = False
            self._flush()

    def snapshot(self) -> str:
        """The whole text including held entries, with a place for the entry of the checkpoint that it goes into."""
        with self._lock:
            self.begin()
            self._covered = len(self._held)
            size = os.fstat(self._fd).st_size
            written = os.pread(self._fd, size, 0).decode(errors="replace")  # a damaged line stays damaged
            return written + line_of("checkpoint_here") + "\n" + "".join(line + "\n" for line in self._held)

    def checkpoint(self, path: Path, sha256: str, slot: int, manifest: Mapping[str, Any] | None = None) -> None:
        """Record a checkpoint that is complete on disk, then the held entries in its snapshot, and sync.

        The file must have been renamed into place (never written in place): delivery reads it through a hard link.
        `manifest`: further fields for the `manifest.json` that delivery puts beside it on the server.
        """
        more = {"manifest": dict(manifest)} if manifest else {}
        line = line_of("checkpoint", path=relative(path, self.folder), sha256=sha256, slot=slot, **more)
        with self._lock:
            self.begin()
            self._write([line, *self._held[: self._covered]])
            del self._held[: self._covered]
            self._covered = 0
            self.sync()

    # The end, and what runs beside

    def child(self, folder: Path) -> None:
        """Record a nested run's folder, whose journal the same delivery follows; this entry is never held."""
        folder = folder.absolute()
        inside = folder.is_relative_to(self.folder)
        with self._lock:
            self.begin()
            self._write([line_of("child", folder=str(folder.relative_to(self.folder) if inside else folder))])

    def end(
        self, status: str, outcome: str, exit_code: int, message: str | None = None, *, resumable: bool = True
    ) -> None:
        """Write held entries and the end in one write, sync, and close the journal; `check_end` lists valid ends.

        `resumable`: whether checkpoints stay once the run that this one is nested in is over.
        """
        check_end(status, outcome)
        with self._lock:
            self.begin()
            said = {"status": status, "outcome": outcome, "exit_code": exit_code, "message": message}
            self._flush(line_of("end", **said, **({} if resumable else {"resumable": False})))
            self.sync()
            self.close()

    @property
    def begun(self) -> bool:
        """Whether the journal's file exists."""
        return self._pending is None

    def close(self) -> None:
        """Close without an end: readers will assume that the run was killed. Held entries are lost."""
        with self._lock:
            lock = self.hand_over()
            if lock is not None:
                release(lock)

    def hand_over(self) -> int | None:
        """Close the journal and return its lock for `reopen` or `restore`, so that nobody takes it in between."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            lock, self._folder_lock = self._folder_lock, None
            return lock

    @staticmethod
    def _mark() -> str:
        # The generation tells a reader whether a byte offset it remembers still belongs to this text.
        return line_of("resume", generation=uuid.uuid4().hex)

    def _add(self, kind: str, **values: Any) -> None:
        line = line_of(kind, **values)
        with self._lock:
            if self._holding and self._folder_lock is not None:
                self._held.append(line)
            else:
                self._write([line])

    def _flush(self, *after: str) -> None:
        self._write([*self._held, *after])
        self._held.clear()
        self._covered = 0

    def _write(self, lines: Sequence[str]) -> None:
        if self._folder_lock is None:
            raise ValueError(f"the journal in {self.folder} is closed")
        if self._pending is not None:
            self._pending += lines
            return
        append(self._fd, self.folder / FILE, "".join(line + "\n" for line in lines).encode())
