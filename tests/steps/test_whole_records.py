"""Records stay whole: two resumes at once, folders that vanish, disks that fill, neighbours that are damaged."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.distill import export, networks, results, train
from pipeline.files import release
from pipeline.journal import folder as journal_files
from pipeline.journal import read_header, take
from tests.steps.lab import BATCHES, At, Done, Lab, client, ending, points, same_tensors, signal_at

PER_EPOCH = BATCHES + 1
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def killed(ready_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that ended in its second epoch."""
    with monkeypatch.context() as patched:
        patched.setattr(train, "Loop", signal_at(PER_EPOCH + 2).loop)
        done = ready_lab.step("distill")
    assert done.code == 143
    return done.folder


def refused(done: Done, *needles: str) -> None:
    assert done.code == 2, done.err
    assert len(done.lines) == 1, done.err
    for needle in needles:
        assert needle in done.lines[0]


# two at once -------------------------------------------------------------------------------------------------------


def test_the_second_resume_is_one_line_and_changes_nothing(
    ready_lab: Lab, killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (killed / "journal.jsonl").read_bytes()
    monkeypatch.setattr(journal_files, "PATIENCE_S", 0.2)
    lock = take(killed)
    refused(ready_lab.step("distill", f"resume={killed}"), f"another process is writing {killed}")
    assert (killed / "journal.jsonl").read_bytes() == before
    release(lock)


def test_who_has_waited_does_not_train_a_finished_run_again(ready_lab: Lab, killed: Path, undisturbed: Done) -> None:
    lock = take(killed)

    def finish() -> None:
        time.sleep(1)
        for name in ("journal.jsonl", "checkpoints"):
            source = undisturbed.folder / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, killed / f"new-{name}")
        shutil.rmtree(killed / "checkpoints")
        for name in ("journal.jsonl", "checkpoints"):
            os.replace(killed / f"new-{name}", killed / name)
        release(lock)

    winner = threading.Thread(target=finish)
    winner.start()
    done = ready_lab.step("distill", f"resume={killed}")
    winner.join()
    refused(done, "finished", "extend=true")
    assert (killed / "journal.jsonl").read_bytes() == (undisturbed.folder / "journal.jsonl").read_bytes()


@pytest.mark.slow
def test_of_two_resumes_at_once_one_trains(ready_lab: Lab, killed: Path, undisturbed: Done) -> None:
    """Real processes; ASIB_ROUNDS pairs."""
    rounds, codes = int(os.environ.get("ASIB_ROUNDS", "2")), []
    for number in range(rounds):
        folder = ready_lab.runs / f"pair{number}"
        shutil.copytree(killed, folder)
        command = [sys.executable, "-m", "steps.distill", *ready_lab.arguments(f"resume={folder}")]
        pair = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        said = [process.communicate(timeout=300)[1] for process in pair]
        codes.append(sorted(process.returncode for process in pair))
        (loser,) = [text for process, text in zip(pair, said, strict=True) if process.returncode == 2]
        assert len(loser.splitlines()) == 1, loser
        assert points(folder) == points(undisturbed.folder)
        assert {len(values) for values in points(folder).values()} == {1}
        assert same_tensors(
            folder / "checkpoints/student.safetensors", undisturbed.folder / "checkpoints/student.safetensors"
        )
    assert codes == [[0, 2]] * rounds


# what is in the way ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", [2, 4 * PER_EPOCH - 1])
def test_a_folder_that_is_removed_while_training_is_an_error(
    ready_lab: Lab, monkeypatch: pytest.MonkeyPatch, question: int
) -> None:
    def remove() -> None:
        (folder,) = ready_lab.run_folders()
        shutil.rmtree(folder)

    monkeypatch.setattr(train, "Loop", At(question, remove).loop)
    refused(ready_lab.step("distill"), str(ready_lab.runs))
    assert ready_lab.run_folders() == []


def test_damaged_neighbours_are_passed_over_with_a_line(ready_lab: Lab, killed: Path) -> None:
    for name, files in {
        "20200101-000000-distill-aaaaaa": {"journal.jsonl": b"\x00garbage\n"},
        "20200101-000000-distill-bbbbbb": {
            "journal.jsonl": killed.joinpath("journal.jsonl").read_bytes(),
            "delivery.json": b"",
        },
        "20200101-000000-distill-cccccc": {"journal.jsonl": b"", "delivery.json": b"{", "results.json": b""},
        "20200101-000000-distill-dddddd": {"journal.jsonl": b"[" * 9999 + b"\n", "results.json": b"[]"},
    }.items():
        folder = ready_lab.runs / name
        folder.mkdir()
        if name.endswith("dddddd"):
            (folder / "delivery.json").mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content.replace(b'"journal": "', b'"journal": "0'))
    (ready_lab.runs / "20200101-000000-distill-eeeeee" / "journal.jsonl").mkdir(parents=True)
    header = read_header(killed)
    assert header is not None
    done = ready_lab.step("distill", f"resume={header.data['journal']}")
    assert done.code == 0, done.err
    assert ending(killed) == ("FINISHED", "completed", 0)
    assert {line.rsplit("-", 1)[1][:6] for line in done.lines} == {"aaaaaa", "bbbbbb", "cccccc", "dddddd", "eeeeee"}


WRITERS: dict[str, tuple[Any, str]] = {
    "weights": (networks, "save"),
    "fusion": (export, "save_fusion"),
    "curves": (results, "curves"),
    "predictions": (results, "predictions"),
    "confusion matrix": (results, "confusion"),
    "results": (results, "write_results"),
}


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_is_full_at_any_write_is_one_line_and_the_run_goes_on_later(
    bench: Lab,
    undisturbed: Done,
    small_disk: Callable[[float], Path],
    monkeypatch: pytest.MonkeyPatch,
    writer: str,
) -> None:
    disk = small_disk(24)
    shutil.copytree(bench.runs / "teachers", disk / "teachers")
    module, name = WRITERS[writer]
    write = getattr(module, name)

    def filled(*arguments: Any, **named: Any) -> Any:
        with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(b"x" * 4096)
        return write(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, filled)
        done = bench.step("distill", f"output_dir={disk}")
    refused(done, "No space left on device", "output_dir", str(disk))
    assert "Traceback" not in done.err
    assert not list(disk.rglob("*.part"))
    (folder,) = [p for p in disk.iterdir() if (p / "journal.jsonl").exists()]
    (disk / "filler").unlink()
    again = bench.step("distill", f"output_dir={disk}", f"resume={folder}")
    assert again.code == 0, again.err
    assert points(folder) == points(undisturbed.folder)


def test_a_disk_that_is_full_from_the_start_leaves_no_folder(
    bench: Lab, undisturbed: Done, small_disk: Callable[[float], Path]
) -> None:
    disk = small_disk(0.0625)
    (disk / "filler").write_bytes(b"x" * 61_000)  # of 16 pages one is left: for the log, not for the configuration
    done = bench.step("distill", f"output_dir={disk}")
    refused(done, str(disk), "output_dir")
    assert [path.name for path in disk.iterdir()] == ["filler"]


# who may read it ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_everything_a_run_leaves_has_the_permissions_that_the_umask_asks_for(lab: Lab, umask: int) -> None:
    before = os.umask(umask)
    try:
        uri = f"sqlite:///{lab.folder}/tracked/mlflow.db"
        done = lab.step("distill", "tracking.mode=online", f"tracking.uri={uri}")
        assert done.code == 0, done.err
    finally:
        os.umask(before)
    left = [p for p in (*lab.runs.rglob("*"), *(lab.folder / "tracked").rglob("*")) if not p.is_symlink()]
    assert {"journal.jsonl", "mlflow.db", "student.safetensors", "slot0.safetensors"} <= {p.name for p in left}
    wrong = {
        str(p.relative_to(lab.folder)): oct(p.stat().st_mode & 0o777)
        for p in left
        if p.stat().st_mode & 0o777 != (0o777 if p.is_dir() else 0o666) & ~umask
    }
    assert wrong == {}


def test_a_refusal_leaves_no_run_on_the_server_either(lab: Lab, sqlite_uri: str) -> None:
    online = ("tracking.mode=online", f"tracking.uri={sqlite_uri}")
    refused(lab.step("baseline", *online, "model.student.name=cifar_resnet9"), "cifar_resnet9")
    time.sleep(1)
    found = client(sqlite_uri)
    assert found.search_runs([e.experiment_id for e in found.search_experiments()]) == []
    assert lab.run_folders() == []
