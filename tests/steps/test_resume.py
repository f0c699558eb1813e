"""A run that was interrupted and continued ends as one that nothing disturbed, bit for bit (docs/tracking.md)."""

from __future__ import annotations

import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from pipeline.distill import train
from pipeline.journal import Journal
from pipeline.training import checkpoint
from tests.steps.lab import (
    BATCHES,
    Done,
    Lab,
    deliver,
    ending,
    journal,
    points,
    run_id,
    same_tensors,
    see,
    signal_at,
)

STUDENT, FUSION = "checkpoints/student.safetensors", "checkpoints/fusion.safetensors"
PER_EPOCH = BATCHES + 1  # the loop's questions


def same_run(one: Path, other: Path) -> None:
    """Weights bit for bit, and every metric of every epoch once, with the same value."""
    assert same_tensors(one / STUDENT, other / STUDENT)
    assert same_tensors(one / FUSION, other / FUSION)
    found, expected = points(one), points(other)
    assert found == expected
    assert {len(values) for values in found.values()} == {1}


@pytest.mark.parametrize(
    ("question", "place"),
    [
        pytest.param(2, "epoch 0, batch 2", id="in the first A-step"),
        pytest.param(PER_EPOCH, "epoch 1, batch 0", id="between two epochs"),
        pytest.param(PER_EPOCH + 3, "epoch 1, batch 3", id="in a B-step"),
        pytest.param(2 * PER_EPOCH + 1, "epoch 2, batch 1", id="in the second A-step"),
        pytest.param(4 * PER_EPOCH - 1, "epoch 4, batch 0", id="after the last batch"),
    ],
)
def test_a_run_ended_by_sigterm_and_continued_equals_an_undisturbed_one(
    ready_lab: Lab, undisturbed: Done, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch, question: int, place: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(train, "Loop", signal_at(question).loop)
        killed = ready_lab.step("distill")
    assert killed.code == 143
    assert ending(killed.folder) == ("KILLED", "killed", 143)
    assert not (killed.folder / "results.json").exists()
    deliver(sqlite_uri, killed.folder)
    before = see(sqlite_uri, run_id(killed.folder))
    assert (before.status, before.tags["asib.outcome"], before.tags["asib.exit_code"]) == ("KILLED", "killed", "143")

    resumed = ready_lab.step("distill", f"resume={before.id}")
    assert (resumed.code, resumed.new) == (0, []), resumed.err
    same_run(killed.folder, undisturbed.folder)
    deliver(sqlite_uri, killed.folder)
    after = see(sqlite_uri, before.id)
    assert after.steady == points(undisturbed.folder)
    assert (after.status, after.tags["asib.outcome"], after.tags["asib.exit_code"]) == ("FINISHED", "completed", "0")
    assert after.tags["asib.resumed_from"] == place
    assert {len(values) for values in after.metrics.values()} == {1}


def test_a_run_interrupted_again_and_again_equals_an_undisturbed_one(
    ready_lab: Lab, undisturbed: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGINT after every third batch, with a checkpoint after every batch besides."""
    arguments = ["checkpoint.every_seconds=1e-6"]
    monkeypatch.setattr(train, "Loop", signal_at(3, signal.SIGINT).loop)
    done = ready_lab.step("distill", *arguments)
    folder, starts = done.folder, 1
    while done.code == 130:
        assert ending(folder) == ("KILLED", "killed", 130)
        monkeypatch.setattr(train, "Loop", signal_at(4, signal.SIGINT).loop)
        done = ready_lab.step("distill", *arguments, f"resume={folder}")
        starts += 1
        assert starts < 12, done.err
    assert done.code == 0, done.err
    assert starts >= 5
    same_run(folder, undisturbed.folder)


@pytest.mark.parametrize(
    ("moment", "place"),
    [
        pytest.param("before the slot", "epoch 1, batch 1", marks=pytest.mark.slow),
        ("before the manifest", "epoch 1, batch 1"),
        pytest.param("before the record", "epoch 1, batch 2", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_while_a_checkpoint_is_written_equals_an_undisturbed_one(
    ready_lab: Lab, undisturbed: Done, monkeypatch: pytest.MonkeyPatch, moment: str, place: str
) -> None:
    """What kill -9 leaves is what a copy has that is made of the folder then; training is ahead by that time."""
    write, left, written = checkpoint.write_atomically, ready_lab.runs / "left", Counter[str]()

    def leave(path: Path, now: str) -> None:
        if written["manifest"] == 5 and now == moment:
            time.sleep(0.1)
            shutil.copytree(path.parents[1], left)

    def leaving(path: Path, content: bytes) -> None:
        name = path.stem.rstrip("01")
        leave(path, f"before the {name}")
        write(path, content)
        if name == "manifest":
            leave(path, "before the record")
        written[name] += 1

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_atomically", leaving)
        assert ready_lab.step("distill", "checkpoint.every_seconds=1e-6").code == 0
    assert sum(entry.kind == "checkpoint" for entry in journal(left)) == 5
    resumed = ready_lab.step("distill", f"resume={left}")
    assert resumed.code == 0, resumed.err
    tags = [entry.data["values"] for entry in journal(left) if entry.kind == "tags"]
    assert [found["asib.resumed_from"] for found in tags if "asib.resumed_from" in found] == [place]
    same_run(left, undisturbed.folder)


def test_a_signal_within_a_nested_fine_tuning_ends_both_runs_and_both_go_on(
    lab: Lab, undisturbed: Done, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(train, "Loop", signal_at(PER_EPOCH + 2).loop)  # the second teacher, batch 2
        killed = lab.step("distill")
    folder = killed.folder
    assert killed.code == 143
    assert ending(folder) == ending(folder / "teacher_1") == ("KILLED", "killed", 143)
    assert ending(folder / "teacher_0") == ("FINISHED", "completed", 0)
    deliver(sqlite_uri, folder)
    before = see(sqlite_uri, run_id(folder))
    assert {name: child.status for name, child in before.children.items()} == {
        "teacher_0": "FINISHED",
        "teacher_1": "KILLED",
    }

    resumed = lab.step("distill", f"resume={before.id}")
    assert resumed.code == 0, resumed.err
    same_run(folder, undisturbed.folder)
    deliver(sqlite_uri, folder)
    after = see(sqlite_uri, before.id)
    assert after.steady == points(undisturbed.folder)
    assert after.status == "FINISHED"
    for name in ("teacher_0", "teacher_1"):
        assert after.children[name].status == "FINISHED"
        assert after.children[name].steady == points(undisturbed.folder / name)
        assert after.children[name].id == before.children[name].id
        assert same_tensors(
            folder / name / "checkpoints/teacher.safetensors",
            undisturbed.folder / name / "checkpoints/teacher.safetensors",
        )


def test_a_finished_run_goes_on_for_more_epochs_when_extended(ready_lab: Lab, undisturbed: Done) -> None:
    first = ready_lab.step("distill")
    longer = "method.student_epochs_per_stage=[1,3]"
    refused = ready_lab.step("distill", f"resume={first.folder}", longer)
    assert refused.code == 2
    assert "extend=true" in refused.err
    assert ending(first.folder) == ("FINISHED", "completed", 0)

    extended = ready_lab.step("distill", f"resume={first.folder}", longer, "extend=true")
    assert (extended.code, extended.new) == (0, []), extended.err
    found, before = points(first.folder), points(undisturbed.folder)
    assert {step for name, step in found if name == "student/acc"} == {1, 3, 4, 5}
    epochs = {key: value for key, value in before.items() if not key[0].startswith("final/")}
    assert {key: found[key] for key in epochs} == epochs
    assert {len(v) for (name, _), v in found.items() if not name.startswith("final/")} == {1}
    assert found["final/acc_last", 5]
    import yaml

    kept = yaml.safe_load((first.folder / "config.yaml").read_text())
    assert kept["method"]["student_epochs_per_stage"] == [1, 3], "config.yaml says what was run"


def test_a_checkpoint_within_an_epoch_is_taken_when_the_time_has_come(ready_lab: Lab, undisturbed: Done) -> None:
    done = ready_lab.step("distill", "checkpoint.every_seconds=1e-6")
    assert done.code == 0, done.err
    assert sum(entry.kind == "checkpoint" for entry in journal(done.folder)) >= 4 * BATCHES
    same_run(done.folder, undisturbed.folder)


@pytest.mark.slow
def test_a_nested_run_that_its_parent_was_killed_before_naming_is_delivered(
    lab: Lab, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = ("tracking.mode=online", f"tracking.uri={sqlite_uri}")
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "child", lambda journal, folder: None)
        patched.setattr(train, "Loop", signal_at(2).loop)
        killed = lab.step("distill", *online)
    assert killed.code == 143, killed.err
    assert not see(sqlite_uri, run_id(killed.folder)).children
    assert (killed.folder / "teacher_0" / "journal.jsonl").exists()
    done = lab.step("distill", *online, f"resume={killed.folder}")
    assert done.code == 0, done.err
    assert {"teacher_0", "teacher_1"} <= see(sqlite_uri, run_id(killed.folder)).children.keys()
