"""The journal's file on disk: its lock, its folder, paths inside it."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from pipeline.errors import UserError


def relative(path: Path, folder: Path) -> str:
    """`path` as seen from the run's folder; a relative one lies in the working directory, else in that folder.

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


def open_for_writing(path: Path, patience: float = 10.0) -> int:
    """A descriptor of an existing journal with its lock, waited for `patience` seconds.

    Raises:
        UserError: another process is writing it.
    """
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


def sync_folder(folder: Path) -> None:
    """Bring a rename in the folder onto the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
