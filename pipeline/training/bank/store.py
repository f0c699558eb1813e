"""The teacher bank on disk: one frozen teacher's outputs for each clean view of each image, as fp16 records.

A cell is (image, view); `records.bin` holds the records one after the other in the order in which they were asked for
(the order in which the next run with the same seed asks again), `index.bin` where each cell's record lies. Both are
memory-mapped for reading. A record carries its cell and a checksum, which are verified whenever it is read: one that
is torn, damaged or misplaced counts as absent, and is computed and written again. So writers need no order and no sync,
only a lock while they append. They never write through a mapping, where a full disk would be a crash.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.files import acquire, locked, release

logger = logging.getLogger("asib")
RECORDS, INDEX, LOCK, IN_USE = "records.bin", "index.bin", "write.lock", "in_use.lock"
HEADER_WORDS = 2
"""Words (8 bytes) before the values: checksum and cell."""
Cells = NDArray[np.int64]
Values = NDArray[np.float16]


class Bank:
    """One teacher's records; made by `BankCache.open`, which has checked that the folder is this teacher's.

    Args:
        folder: with the files.
        cells: how many there are: images × views.
        width: number of values in a record.
        grant: asked for disk space before the file grows: bytes needed -> bytes that may be written; fewer than
            needed: nothing may be written.
    """

    def __init__(self, folder: Path, cells: int, width: int, grant: Callable[[int], int]) -> None:
        self.folder, self.cells, self.width = folder, cells, width
        self.full = False
        """Whether writing has stopped: the limit is reached, or the disk is full."""
        self._words = HEADER_WORDS + -(-width // 4)
        self._grant, self._granted = grant, 0
        rng = np.random.default_rng(20)  # a constant of the format
        self._factors = rng.integers(0, 2**63, self._words, dtype=np.uint64) << np.uint64(1) | np.uint64(1)
        self._open = [os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666) for name in (RECORDS, INDEX)]
        self._records_fd, self._index_fd = self._open
        self._index = np.asarray(np.memmap(folder / INDEX, dtype=np.uint32, mode="r", shape=(cells,)))
        self._mapped: NDArray[np.uint64] = np.zeros((0, self._words), np.uint64)
        self._in_use = acquire(folder / IN_USE, shared=True)  # while it is held, no other process evicts the folder
        os.utime(folder / IN_USE)

    @property
    def record_bytes(self) -> int:
        return 8 * self._words

    def close(self) -> None:
        """Close the bank; what was read stays valid."""
        for fd in self._open:
            os.close(fd)
        self._open = []
        if self._in_use is not None:
            release(self._in_use)
            self._in_use = None

    # reading ---------------------------------------------------------------------------------------------------------

    def read(self, cells: Cells) -> tuple[Values, NDArray[np.bool_]]:
        """Read `cells` (n,): values (n, width), and (n,) whether each is held; missing cells have values 0."""
        rows = self._index[cells].astype(np.int64) - 1
        mapped = self._records_up_to(int(rows.max(initial=-1)) + 1)
        there = (rows >= 0) & (rows < len(mapped))
        found = mapped[rows[there]]  # a copy: what is checked is what is returned
        whole = (found[:, 0] == self._check(found)) & (found[:, 1] == cells[there].astype(np.uint64))
        values = np.zeros((len(cells), self.width), np.float16)
        there[there] = whole
        values[there] = found[whole, HEADER_WORDS:].view(np.float16)[:, : self.width]
        return values, there

    def _records_up_to(self, count: int) -> NDArray[np.uint64]:
        """A mapping with at least `count` records, if the file has that many."""
        if count > len(self._mapped):
            whole = os.fstat(self._records_fd).st_size // self.record_bytes
            if whole > len(self._mapped):
                shape = (whole, self._words)
                self._mapped = np.asarray(np.memmap(self.folder / RECORDS, dtype=np.uint64, mode="r", shape=shape))
        return self._mapped

    def _check(self, records: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """(n,): a multilinear hash of cell and values modulo 2^64; with odd factors no changed word escapes it."""
        sums = (records[:, 1:] * self._factors[1:]).sum(axis=1, dtype=np.uint64)
        return np.asarray(sums + self._factors[0], np.uint64)  # an empty page is not a record

    # writing ---------------------------------------------------------------------------------------------------------

    def add(self, cells: Cells, values: Values) -> Values:
        """Store the values (n, width) of distinct `cells` (n,); return what the bank holds for them from now on.

        The first writer wins: a value that another process has written meanwhile replaces the given one, so that all
        runs see the same bits. Values that are not finite in fp16 are not kept.
        """
        if self.full:
            return values
        try:
            with locked(self.folder / LOCK):
                held, there = self.read(cells)
                new = ~there & np.isfinite(values).all(axis=1)
                if new.any():
                    self._append(cells[new], values[new])
        except OSError as error:
            self._stop(f"cannot be written ({error.strerror})")
            return values
        held[~there] = values[~there]
        return held

    def _append(self, cells: Cells, values: Values) -> None:
        records = np.zeros((len(cells), self._words), np.uint64)
        records[:, 1] = cells
        records[:, HEADER_WORDS:].view(np.float16)[:, : self.width] = values
        records[:, 0] = self._check(records)
        if self._granted < records.nbytes:
            self._granted = self._grant(records.nbytes)
            if self._granted < records.nbytes:
                self._stop("has reached bank_gb, or the disk's last gigabyte")
                return
        self._granted -= records.nbytes
        first = os.fstat(self._records_fd).st_size // self.record_bytes  # a torn record at the end is overwritten
        try:
            _write_all(self._records_fd, records.tobytes(), first * self.record_bytes)
            for number, cell in enumerate(cells.tolist(), start=first + 1):
                _write_all(self._index_fd, np.uint32(number).tobytes(), 4 * cell)
        except OSError:
            # stale index entries lead to no record, or to one of a different cell
            os.ftruncate(self._records_fd, first * self.record_bytes)
            raise

    def _stop(self, why: str) -> None:
        self.full = True
        logger.warning("teacher bank %s %s: what it lacks is computed and not kept", self.folder, why)


class NoBank:
    """Stands in for a bank that cannot be opened: holds nothing and stores nothing."""

    def __init__(self, width: int) -> None:
        self.width = width

    def read(self, cells: Cells) -> tuple[Values, NDArray[np.bool_]]:
        return np.zeros((len(cells), self.width), np.float16), np.zeros(len(cells), np.bool_)

    def add(self, cells: Cells, values: Values) -> Values:
        return values

    def close(self) -> None:
        pass


def _write_all(fd: int, content: bytes, at: int) -> None:
    """Write all of it; a full disk raises OSError."""
    view = memoryview(content)
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done
