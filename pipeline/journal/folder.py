"""The journal on disk: the lock of a run's folder, paths inside it, whole lines at a file's end."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import acquire, explained

LOCK = "run.lock"
"""Locked by the process that writes the run; unlike the journal, this file is never replaced."""
SLOTS = ("manifest.json", "slot0.safetensors", "slot1.safetensors")
"""The files of a run's checkpoints, the manifest first."""
PATIENCE_S = 10.0
"""How long to wait for the previous writer: a killed trainer's worker processes hold its lock for some seconds."""


def relative(path: Path, folder: Path) -> str:
    """`path` relative to the run's folder; a relative one lies in the working directory, else in that folder.

    Raises:
        ValueError: it lies outside.
    """
    absolute = Path(os.path.normpath(path.absolute()))
    if not path.is_absolute() and not absolute.is_relative_to(folder):
        absolute = Path(os.path.normpath(folder / path))
    try:
        return absolute.relative_to(folder).as_posix()
    except ValueError:
        raise ValueError(f"{path} lies outside the run's folder {folder}") from None


def take(folder: Path, patience: float | None = None) -> int:
    """Become the writer of the run in `folder`; read what is to be continued only afterwards.

    Returns:
        The lock, for `Journal` or `files.release`.

    Raises:
        UserError: another process is writing it, or the file system refuses.
    """
    with explained(folder / LOCK):
        lock = acquire(folder / LOCK, patience=PATIENCE_S if patience is None else patience)
    if lock is None:
        raise UserError(f"another process is writing {folder}: wait for it or end it")
    return lock


def append(fd: int, path: Path, data: bytes) -> None:
    """Write whole lines at the end of the journal `path`, which `fd` has open.

    Raises:
        UserError: the disk is full; a partly written line is cut off again.
    """
    done = 0
    with explained(path):
        try:
            while done < len(data):
                done += os.write(fd, data[done:])
        except OSError:
            torn = done - (data.rfind(b"\n", 0, done) + 1)
            with contextlib.suppress(OSError):
                os.ftruncate(fd, os.fstat(fd).st_size - torn)
            raise
