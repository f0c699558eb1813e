"""Records stay whole: two resumes at once, folders that vanish, disks that fill, neighbours that are damaged."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.distill import export, networks, results
from pipeline.files import release
from pipeline.journal import folder as journal_files
from pipeline.journal import read_header, take
from tests.steps.lab import PER_EPOCH, At, Done, Lab, all_runs, ending, refused, same_run, signal_at
from tests.warm import Fork

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


def test_who_has_waited_does_not_train_a_finished_run_again(
    ready_lab: Lab, killed: Path, undisturbed: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, waits, acquire = take(killed), threading.Event(), journal_files.acquire

    def waiting(*arguments: Any, **named: Any) -> int | None:
        waits.set()
        return acquire(*arguments, **named)

    def finish() -> None:
        waits.wait(60)
        for name in ("journal.jsonl", "checkpoints"):
            source = undisturbed.folder / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, killed / f"new-{name}")
        shutil.rmtree(killed / "checkpoints")
        for name in ("journal.jsonl", "checkpoints"):
            os.replace(killed / f"new-{name}", killed / name)
        release(lock)

    monkeypatch.setattr(journal_files, "acquire", waiting)
    winner = threading.Thread(target=finish)
    winner.start()
    done = ready_lab.step("distill", f"resume={killed}")
    winner.join()
    refused(done, "finished", "extend=true")
    assert (killed / "journal.jsonl").read_bytes() == (undisturbed.folder / "journal.jsonl").read_bytes()


@pytest.mark.slow
def test_of_two_resumes_at_once_one_trains(ready_lab: Lab, killed: Path, undisturbed: Done) -> None:
    """Real processes; ASIB_ROUNDS pairs."""
    for number in range(int(os.environ.get("ASIB_ROUNDS", "2"))):
        folder = ready_lab.runs / f"pair{number}"
        shutil.copytree(killed, folder)
        logs = [ready_lab.folder / f"{number}-{k}.log" for k in (0, 1)]
        pair = {ready_lab.start("distill", f"resume={folder}", log=log): log for log in logs}
        ended = {process.wait(300): log.read_text() for process, log in pair.items()}
        assert ended.keys() == {0, 2}
        assert len(ended[2].splitlines()) == 1, ended[2]
        same_run(folder, undisturbed.folder)


# what is in the way ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", [2, 4 * PER_EPOCH])
def test_a_folder_that_is_removed_while_training_is_an_error(ready_lab: Lab, question: int) -> None:
    def remove() -> None:
        (folder,) = ready_lab.run_folders()
        folder.rename(ready_lab.folder / "gone")  # at once: a checkpoint may be written just now

    refused(ready_lab.disturbed(At(question, remove), "distill"), str(ready_lab.runs))
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


WRITERS: list[tuple[Any, str]] = [
    (networks, "save"),
    (export, "save_fusion"),
    (results, "curves"),
    (results, "predictions"),
    (results, "confusion"),
    (results, "write_results"),
]


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_write_is_one_line_and_the_run_goes_on_later(
    bench: Lab, undisturbed: Done, small_disk: Callable[[float], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk(24)
    shutil.copytree(bench.runs / "teachers", disk / "teachers")
    there = f"output_dir={disk}"
    ended = bench.disturbed(signal_at(4 * PER_EPOCH), "distill", there)  # in time for all that comes after training
    assert ended.code == 143, ended.err
    (folder,) = disk.glob("*-distill-*")
    for module, name in WRITERS:
        write = getattr(module, name)

        def filled(*arguments: Any, write: Callable[..., Any] = write, **named: Any) -> Any:
            with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
                while True:
                    filler.write(b"x" * 4096)
            return write(*arguments, **named)

        with monkeypatch.context() as patched:
            patched.setattr(module, name, filled)
            done = bench.step("distill", there, f"resume={folder}")
        refused(done, "No space left on device", "output_dir", str(disk))
        assert "Traceback" not in done.err, name
        assert not list(disk.rglob("*.part")), name
        (disk / "filler").unlink()
    again = bench.step("distill", there, f"resume={folder}")
    assert again.code == 0, again.err
    same_run(folder, undisturbed.folder)


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
def test_everything_a_run_leaves_has_the_permissions_that_the_umask_asks_for(lab: Lab) -> None:
    umask = 0o027  # neither what temporary files have, nor the usual one
    before = os.umask(umask)
    try:
        uri = f"sqlite:///{lab.folder}/tracked/mlflow.db"
        done = lab.step("distill", "checkpoint.keep=true", "tracking.mode=online", f"tracking.uri={uri}")
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


def test_a_refusal_leaves_no_run_on_the_server_either(lab: Lab, sqlite_uri: str, deliveries: list[Fork]) -> None:
    online = ("tracking.mode=online", f"tracking.uri={sqlite_uri}")
    refused(lab.step("baseline", *online, "model.student.name=cifar_resnet9"), "cifar_resnet9")
    (delivery,) = deliveries
    delivery.wait(60)
    assert all_runs(sqlite_uri) == {}
    assert lab.run_folders() == []
