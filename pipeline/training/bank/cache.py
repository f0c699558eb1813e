"""The folder of all teacher banks: content-addressed, checked when opened, limited in size.

A bank's folder is named by the SHA-256 of its key (what was computed, from which data, in which views), which is also
in its `header.json`. Opening, evicting and granting space happen under one lock of the folder.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from pipeline.files import locked
from pipeline.training.bank.store import IN_USE, INDEX, Bank

logger = logging.getLogger("asib")
FORMAT = "asib-bank-1"
HEADER = "header.json"
RESERVE = 10**9
"""Free bytes of the disk that are reserved for checkpoints and other files."""
STRIDE = 64 * 2**20
"""Bytes granted at a time: how far each of several processes may exceed the limit."""


class BankCache:
    """The banks in `folder`, together at most `limit` bytes; least recently used ones go first, never one in use."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder.absolute(), limit

    def open(self, key: Mapping[str, Any], cells: int, width: int) -> Bank:
        """Open the bank of a key; create it if it is missing.

        A folder with a wrong header or index is discarded and recreated.

        Args:
            key: JSON values that determine every record.
            cells, width: as for `Bank`.

        Raises:
            OSError: the folder cannot be used, or a damaged one is in use.
        """
        header = json.dumps({"format": FORMAT, **key, "cells": cells, "width": width}, sort_keys=True)
        with self._locked():
            path = self.folder / hashlib.sha256(header.encode()).hexdigest()[:32]
            if path.exists() and not _is_whole(path, header, cells):
                logger.warning("teacher bank %s is damaged: rebuilding it", path)
                if not self._remove(path):
                    raise OSError(None, "it is damaged, and another process uses it", str(path))
            if not path.exists():
                _make(path, header, cells)
            return Bank(path, cells, width, self._grant)

    def used(self) -> int:
        """Bytes on disk, not counting holes."""
        return sum(file.stat().st_blocks * 512 for path in self._banks() for file in path.iterdir())

    def _banks(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.is_dir()] if self.folder.exists() else []

    def _grant(self, needed: int) -> int:
        """Bytes that may be written: at least `needed`, or 0 if there is no room."""
        with self._locked():
            room = self._room()
            if room < needed:
                for path in sorted(self._banks(), key=_last_use):
                    if self._remove(path):
                        logger.info("teacher bank %s made room", path)
                        room = self._room()
                    if room >= needed:
                        break
            return min(room, max(needed, STRIDE)) if room >= needed else 0

    def _room(self) -> int:
        return min(self.limit - self.used(), shutil.disk_usage(self.folder).free - RESERVE)

    def _remove(self, path: Path) -> bool:
        """Remove a bank unless it is in use; return whether it is gone."""
        with suppress(OSError), locked(path / IN_USE, patience=0) as unused:
            if unused:
                shutil.rmtree(path)
            return unused
        return False

    def _locked(self) -> AbstractContextManager[bool]:
        self.folder.mkdir(parents=True, exist_ok=True)
        return locked(self.folder / ".lock")


def _make(path: Path, header: str, cells: int) -> None:
    """Create an empty bank. The header comes last: without one, a bank is incomplete and is recreated."""
    path.mkdir()
    with (path / INDEX).open("wb") as file:
        file.truncate(4 * cells)  # a hole: it takes up space only as it is filled
    (path / HEADER).write_text(header)


def _is_whole(path: Path, header: str, cells: int) -> bool:
    try:
        # read as bytes: a damaged header may not be text
        return (path / HEADER).read_bytes() == header.encode() and (path / INDEX).stat().st_size == 4 * cells
    except OSError:
        return False


def _last_use(path: Path) -> float:
    mark = path / IN_USE
    return mark.stat().st_mtime if mark.exists() else 0.0
