"""Files on disk: written whole or not at all, locked, and read back when they hold a process's state.

Every new file has the permissions that the umask asks for.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

logger = logging.getLogger("asib")
PART = ".part"
"""Suffix of a file that is still being written; a leading dot and a process id make its name unique."""
POLL_S = 0.05
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
"""Errors of a disk that accepts no more data."""


def write_atomically(path: Path, content: bytes | str, key: str = "output_dir") -> None:
    """Write, sync and rename: after a crash there is the old file or the new one, whole.

    The file's folder must exist: one that was removed meanwhile must not reappear half filled. Raises UserError, which
    names the `key` that sets the place: the disk is full, or the file may not be written; the temporary file is gone.
    """
    data = content.encode() if isinstance(content, str) else content
    with replacing(path, key, len(data)) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: Path, key: str = "output_dir", size: int | None = None) -> Iterator[Path]:
    """Yield an empty file beside `path` to fill, renamed to `path` when the block succeeds; else as `write_atomically`.

    `size`: its bytes, for the message.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    with explained(path, key, size):
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            mode = os.fstat(fd).st_mode & 0o777
            os.close(fd)
            yield temporary
            if temporary.stat().st_mode & 0o777 != mode:  # the writer replaces the file with its own
                temporary.chmod(mode)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextmanager
def explained(path: Path, key: str = "output_dir", size: int | None = None) -> Iterator[None]:
    """Turn an OSError from writing `path` into a one-line UserError with its size, the free space, the key to change.

    This includes exceptions from libraries that are not written in Python, which say «(os error 28)».
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _number(error)
        if number is None:
            raise
        raise UserError(_sentence(path, key, size, number)) from error


def disk_trouble(error: Exception, folder: Path, key: str = "output_dir") -> UserError | None:
    """The UserError for an error caused by a full disk or by the removal of `folder`; None for any other error."""
    cause: BaseException | None = error
    while isinstance(cause, Exception):
        number = _number(cause)
        name = getattr(cause, "filename", None)
        ours = isinstance(name, str) and Path(name).is_relative_to(folder)
        if number in FULL or (ours and number in (errno.EACCES, errno.EPERM)):
            return UserError(_sentence(Path(name) if isinstance(name, str) else folder / "…", key, None, number))
        if number == errno.ENOENT and not folder.is_dir():
            return UserError(f"{folder}: it was removed while it was being written")
        cause = cause.__cause__ or cause.__context__
    return None


def _number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _sentence(path: Path, key: str, size: int | None, number: int) -> str:
    what = "" if size is None else f"a file of {size / 1e6:.1f} MB "
    if number in (errno.ENOENT, errno.ENOTDIR) and not path.parent.is_dir():
        return f"{path}: {what}could not be written: its folder is not there (removed meanwhile?)"
    with suppress(OSError):
        free = shutil.disk_usage(path.parent).free
        reason = os.strerror(number) if number else "input/output error"
        return (
            f"{path}: {what}could not be written ({reason}; {free / 1e6:.1f} MB free): "
            f"make room, or set {key} to another disk"
        )
    return f"{path}: {what}could not be written ({os.strerror(number)}): set {key} to a folder that can be"


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_parts(folder: Path) -> None:
    """Remove what killed writers left behind; nobody may be writing in `folder`."""
    for part in folder.glob(f".*{PART}"):
        part.unlink(missing_ok=True)


# Locks ----------------------------------------------------------------------------------------------------------------


def acquire(path: Path, *, shared: bool = False, patience: float | None = None) -> int | None:
    """Lock a file, created if missing and never replaced; the lock ends with `release` or with the process.

    The package `filelock` falls short: here forked workers keep the lock of a killed trainer, readers share it, its
    descriptor passes from one journal to the next, and a file that was removed while we waited does not count.

    Args:
        path: a file that serves only as a lock, in an existing folder. Raises OSError if it cannot be made.
        shared: several holders may share it.
        patience: seconds to wait; None waits forever.

    Returns:
        A descriptor for `release`; None if the wait was too long.
    """
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = None if patience is None else time.monotonic() + patience
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            while True:
                try:
                    fcntl.flock(fd, how | (0 if deadline is None else fcntl.LOCK_NB))
                    break
                except BlockingIOError:
                    if deadline is not None and time.monotonic() >= deadline:
                        os.close(fd)
                        return None
                    time.sleep(POLL_S)
        except BaseException:  # a signal's exception while waiting
            with suppress(OSError):
                os.close(fd)
            raise
        if _is(fd, path):
            return fd
        os.close(fd)  # the file was removed meanwhile, perhaps with its folder: a lock on it excludes nobody


def release(fd: int) -> None:
    """Free the lock, even if forked processes have inherited the descriptor."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


@contextmanager
def locked(path: Path, *, shared: bool = False, patience: float | None = None) -> Iterator[bool]:
    """Hold a lock (see `acquire`) for a block; yields False if it was not available in time."""
    fd = acquire(path, shared=shared, patience=patience)
    try:
        yield fd is not None
    finally:
        if fd is not None:
            release(fd)


def is_locked(path: Path) -> bool:
    """Whether a process on this machine holds the lock exclusively; a missing file is not locked."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _is(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


# State ----------------------------------------------------------------------------------------------------------------


def read_state(path: Path) -> dict[str, Any] | None:
    """The JSON object that a process keeps in a file; None if it is missing or, with a warning, damaged."""
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        warn_once(f"{path} cannot be read ({type(error).__name__}): skipped")
        return None
    if not isinstance(values, dict):
        warn_once(f"{path} holds no JSON object: skipped")
        return None
    return values


@lru_cache(maxsize=1000)
def warn_once(line: str) -> None:
    """Warn only once about a file of another run, however often the runs are read."""
    logger.warning("%s", line)
