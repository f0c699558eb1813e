"""Files on a real file system that is full, under real umasks, locked by real processes."""

import json
import multiprocessing
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipeline import files
from pipeline.errors import UserError


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def save_tensor(path: Path, count: int) -> None:
    with files.replacing(path) as part:
        safetensors.torch.save_file({"x": torch.zeros(count)}, part)


@pytest.mark.parametrize(("umask", "expected"), [(0o077, 0o600), (0o002, 0o664), (0o027, 0o640)], indirect=["umask"])
def test_new_files_have_the_permissions_that_the_umask_asks_for(tmp_path: Path, umask: int, expected: int) -> None:
    files.write_atomically(tmp_path / "text", "text")
    save_tensor(tmp_path / "tensor", 4)
    with files.replacing(tmp_path / "moved") as part:
        part.unlink()
        part.touch(mode=0o600)  # as libraries do that make a temporary file of their own
    with files.locked(tmp_path / "lock"):
        pass
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == dict.fromkeys(
        ["text", "tensor", "moved", "lock"], expected
    )


def test_a_full_disk_is_one_line_and_leaves_what_was_there(small_disk: Callable[[float], Path]) -> None:
    path = small_disk(0.0625) / "file"
    files.write_atomically(path, "old")
    with pytest.raises(
        UserError, match=r"file: a file of 0\.2 MB could not .*No space left.* MB free.*output_dir"
    ) as said:
        files.write_atomically(path, b"x" * 200_000)
    assert "\n" not in str(said.value)
    with pytest.raises(UserError, match=r"No space left.*output_dir"):
        save_tensor(path, 50_000)  # written by Rust
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_folder_that_is_gone_is_named_and_does_not_come_back(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its folder is not there"):
        files.write_atomically(tmp_path / "run" / "file", "text")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_stay_what_they_are_and_leave_nothing(tmp_path: Path) -> None:
    for error in (KeyboardInterrupt(), ValueError("no number")):
        with suppress(type(error)), files.replacing(tmp_path / "file") as part:
            part.write_text("half")
            raise error
    assert list(tmp_path.iterdir()) == []


def _count(folder: Path, times: int) -> None:
    for _ in range(times):
        with files.locked(folder / "lock"):
            value = int((folder / "count").read_text())
            (folder / "count").write_text(str(value + 1))


def test_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    context = multiprocessing.get_context("fork")
    several = [context.Process(target=_count, args=(tmp_path, 100)) for _ in range(4)]
    for process in several:
        process.start()
    for process in several:
        process.join(60)
    assert (tmp_path / "count").read_text() == "400"


def test_a_lock_is_shared_or_not_and_freed_though_a_child_has_inherited_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second = files.acquire(path, shared=True), files.acquire(path, shared=True, patience=0)
    assert first is not None
    assert second is not None
    assert files.acquire(path, patience=0.1) is None
    files.release(first)
    files.release(second)
    alone = files.acquire(path, patience=0)
    assert alone is not None
    assert files.is_locked(path)
    child = os.fork()
    if child == 0:
        os.read(os.pipe()[0], 1)  # until it is killed
    files.release(alone)
    assert not files.is_locked(path)
    os.kill(child, 9)
    os.waitpid(child, 0)


def test_a_lock_whose_file_was_removed_excludes_the_next_one_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    old = files.acquire(path)
    path.unlink()
    new = files.acquire(path, patience=0)
    assert new is not None
    assert files.acquire(path, patience=0) is None
    for fd in (old, new):
        files.release(fd or 0)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_damaged_state_is_passed_over_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    path = tmp_path / "delivery.json"
    assert files.read_state(path) is None
    assert caplog.messages == [], "what is missing is no news"
    path.write_bytes(content)
    assert files.read_state(path) is None
    assert [str(path) in line and "\n" not in line for line in caplog.messages] == [True]
    path.write_text(json.dumps({"run_id": "1"}))
    assert files.read_state(path) == {"run_id": "1"}
