"""The bank on disk: what was written is read, whoever wrote it; what is damaged, full or evicted is computed."""

import errno
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.config import AugmentConfig
from pipeline.data.augmentations import crop_flip, draw_crop_flip
from pipeline.data.views import Views
from pipeline.training.bank import cache
from pipeline.training.bank.cache import HEADER, BankCache
from pipeline.training.bank.store import IN_USE, RECORDS, Bank

CELLS, WIDTH = 400, 7


@pytest.fixture(autouse=True)
def _small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "RESERVE", 0)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Bank]:
    bank = open_bank(tmp_path)
    yield bank
    bank.close()


def open_bank(folder: Path, weights: str = "a", limit: int = 10**9) -> Bank:
    return BankCache(folder, limit).open({"weights": weights}, CELLS, WIDTH)


def values(cells: NDArray[np.int64], seed: float = 0.0) -> NDArray[np.float16]:
    """Another number for every cell, column and seed."""
    return (np.sin(cells[:, None] * 1.7 + np.arange(WIDTH) + seed) * 9).astype(np.float16)


def some(*cells: int) -> NDArray[np.int64]:
    return np.array(cells, np.int64)


# views ---------------------------------------------------------------------------------------------------------------


def test_views_number_every_crop_and_flip_once() -> None:
    views = Views.of(AugmentConfig())
    everything = views.draw(torch.arange(162))
    assert everything is not None
    assert len({tuple(v) for v in torch.stack([p.long() for p in everything], dim=1).tolist()}) == views.count == 162
    draw = draw_crop_flip(50, torch.Generator().manual_seed(0))
    again = views.draw(views.numbers(draw, 50))
    x = torch.arange(50 * 3 * 64).reshape(50, 3, 8, 8) % 251
    assert again is not None
    assert torch.equal(crop_flip(x, again), crop_flip(x, draw))


def test_without_augmentation_there_is_one_view() -> None:
    plain = Views.of(AugmentConfig(crop_flip=False))
    assert (plain.count, plain.draw(plain.numbers(None, 3)), plain.numbers(None, 3).tolist()) == (1, None, [0, 0, 0])


# one process ---------------------------------------------------------------------------------------------------------


def test_what_was_added_is_read_by_the_next_opener(tmp_path: Path, opened: Bank) -> None:
    cells = some(3, 399, 0, 17)
    assert not opened.read(cells)[1].any()
    assert np.array_equal(opened.add(cells, values(cells)), values(cells))
    other = open_bank(tmp_path)
    asked = some(17, 5, 399)
    found, there = other.read(asked)
    other.close()
    assert there.tolist() == [True, False, True]
    assert np.array_equal(found[there], values(asked)[there])


def test_the_first_writer_is_right(opened: Bank) -> None:
    first, both = some(1, 2), some(2, 3)
    opened.add(first, values(first))
    found = opened.add(both, values(both, seed=1.0))
    assert np.array_equal(found[:1], values(both)[:1])
    assert np.array_equal(found[1:], values(both, seed=1.0)[1:])


def test_what_half_precision_cannot_hold_is_not_kept(opened: Bank) -> None:
    cells = some(1, 2)
    given = values(cells)
    given[0, 3] = np.inf
    assert np.array_equal(opened.add(cells, given), given)
    assert opened.read(cells)[1].tolist() == [False, True]


@pytest.mark.parametrize("byte", [0, 9, 17, 29])
def test_a_damaged_record_is_refused_and_written_anew(tmp_path: Path, opened: Bank, byte: int) -> None:
    """A flipped bit in checksum, cell or values."""
    cells = some(*range(20))
    opened.add(cells, values(cells))
    path = opened.folder / RECORDS
    content = bytearray(path.read_bytes())
    content[5 * opened.record_bytes + byte] ^= 4
    path.write_bytes(content)
    other = open_bank(tmp_path)
    found, there = other.read(cells)
    assert np.flatnonzero(~there).tolist() == [5]
    assert not found[5].any()
    assert np.array_equal(other.add(cells[5:6], values(cells)[5:6]), values(cells)[5:6])
    assert other.read(cells)[1].all()
    other.close()


def test_a_torn_end_is_written_over(tmp_path: Path, opened: Bank) -> None:
    cells = some(1, 2, 3)
    opened.add(cells, values(cells))
    with (opened.folder / RECORDS).open("rb+") as file:
        file.truncate(3 * opened.record_bytes - 10)
    other = open_bank(tmp_path)
    assert other.read(cells)[1].tolist() == [True, True, False]
    other.add(cells[2:], values(cells)[2:])
    assert np.array_equal(other.read(cells)[0], values(cells))
    other.close()


@pytest.mark.parametrize("name", [HEADER, "index.bin"])
def test_a_bank_of_another_shape_is_made_anew_unless_it_is_in_use(tmp_path: Path, name: str) -> None:
    bank, cells = open_bank(tmp_path), some(1)
    bank.add(cells, values(cells))
    (bank.folder / name).write_bytes(b"\xff other")
    with pytest.raises(OSError, match="damaged"):
        open_bank(tmp_path)
    bank.close()
    again = open_bank(tmp_path)
    assert not again.read(cells)[1].any()
    assert json.loads((again.folder / HEADER).read_text())["width"] == WIDTH
    again.close()


def test_a_full_disk_leaves_what_was_kept_whole(opened: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, lost = some(*range(10)), some(*range(10, 30))
    opened.add(kept, values(kept))
    write, room = os.pwrite, [2 * opened.record_bytes + 5]

    def full(fd: int, content: Any, at: int) -> int:
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = write(fd, bytes(content)[: room[0]], at)
        room[0] -= done
        return done

    monkeypatch.setattr(os, "pwrite", full)
    assert np.array_equal(opened.add(lost, values(lost)), values(lost))
    assert opened.full
    monkeypatch.undo()
    assert (opened.folder / RECORDS).stat().st_size == 10 * opened.record_bytes
    assert opened.read(np.concatenate([kept, lost]))[1].tolist() == [True] * 10 + [False] * 20


# the folder ----------------------------------------------------------------------------------------------------------


def test_the_oldest_unused_bank_goes_first_and_none_in_use(tmp_path: Path) -> None:
    cells = np.arange(CELLS)
    folders = {}
    for name in "abc":
        bank = open_bank(tmp_path, name)
        bank.add(cells, values(cells))
        bank.close()
        folders[name] = bank.folder
    limit = BankCache(tmp_path, 0).used() + 8192
    in_use, new = open_bank(tmp_path, "a", limit), open_bank(tmp_path, "d", limit)
    for name, age in (("a", 900), ("b", 500), ("c", 100)):
        used = time.time() - age
        os.utime(folders[name] / IN_USE, (used, used))
    new.add(cells, values(cells))
    assert {name: folder.exists() for name, folder in folders.items()} == {"a": True, "b": False, "c": True}
    assert not new.full
    assert in_use.read(cells)[1].all()
    in_use.close()
    new.close()


def test_a_bank_stops_at_the_limit_and_goes_on_serving(tmp_path: Path) -> None:
    limit = 16_000
    bank = open_bank(tmp_path, limit=limit)
    for first in range(0, 4000, 100):
        cells = np.arange(first, first + 100) % CELLS
        assert np.array_equal(bank.add(cells, values(cells)), values(cells))
    there = bank.read(np.arange(CELLS))[1]
    bank.close()
    assert bank.full
    assert 0 < there.sum() < CELLS
    assert (bank.folder / RECORDS).stat().st_size <= limit


def _ask(folder: Path, seed: int, answers: Any) -> None:
    """Look everything up, window by window, as a run does that computes `seed`'s values."""
    bank = open_bank(folder)
    order = np.random.default_rng(seed % 2).permutation(CELLS)
    used = np.zeros((CELLS, WIDTH), np.float16)
    for cells in np.split(order, 40):
        found, there = bank.read(cells)
        found[~there] = bank.add(cells[~there], values(cells[~there], float(seed)))
        used[cells] = found
    answers.put((seed, used))
    bank.close()


def test_processes_that_build_at_once_all_use_what_the_bank_holds(tmp_path: Path) -> None:
    """Four of them, two and two in the same order, each with values of its own."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=_ask, args=(tmp_path, seed, answers)) for seed in range(4)]
    for process in processes:
        process.start()
    used = dict(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    bank = open_bank(tmp_path)
    held, there = bank.read(np.arange(CELLS))
    size = (bank.folder / RECORDS).stat().st_size
    bank.close()
    assert there.all()
    assert size == CELLS * bank.record_bytes  # nothing was written twice
    for values_used in used.values():
        assert np.array_equal(values_used, held)
    made = np.stack([values(np.arange(CELLS), float(seed)) for seed in range(4)])
    assert (held == made).all(axis=2).any(axis=0).all()
