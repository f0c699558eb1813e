"""A run that was interrupted and continued ends as one that nothing disturbed, bit for bit (docs/tracking.md)."""

from __future__ import annotations

import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from pipeline.journal import Journal
from pipeline.training import checkpoint
from tests.steps.lab import (
    BATCHES,
    PER_EPOCH,
    Done,
    Lab,
    deliver,
    ending,
    journal,
    points,
    refused,
    run_id,
    same_run,
    same_tensors,
    see,
    signal_at,
)

EVERY_BATCH = "checkpoint.every_seconds=1e-6"


@pytest.mark.parametrize(
    ("question", "place"),
    [
        pytest.param(2, "epoch 0, batch 2", id="in the first A-step"),
        pytest.param(PER_EPOCH, "epoch 1, batch 0", id="between two epochs"),
        pytest.param(4 * PER_EPOCH, "epoch 4, batch 0", id="after the last batch"),
    ],
)
def test_a_run_ended_by_sigterm_and_continued_equals_an_undisturbed_one(
    ready_lab: Lab, undisturbed: Done, sqlite_uri: str, question: int, place: str
) -> None:
    killed = ready_lab.disturbed(signal_at(question), "distill")
    assert killed.code == 143
    assert ending(killed.folder) == ("KILLED", "killed", 143)
    assert not (killed.folder / "results.json").exists()
    other = refused(ready_lab.step("distill", f"resume={killed.folder}", "method.tau=9"), "differ in method.tau;")
    assert "to continue: " + other.partition("; to continue: ")[2] in killed.err
    deliver(sqlite_uri, killed.folder)
    before = see(sqlite_uri, run_id(killed.folder))
    assert (before.status, before.tags["asib.outcome"], before.tags["asib.exit_code"]) == ("KILLED", "killed", "143")
    epochs = {step: values[0] for (name, step), values in before.metrics.items() if name == "student/acc"}
    last = max(epochs, default=0)
    said = f" after epoch {last + 1}, at {epochs[last]:.2f} % on validation images" if epochs else ""
    assert before.tags["mlflow.note.content"].startswith(f"**killed**{said}\n\nContinue: ")

    resumed = ready_lab.step("distill", f"resume={before.id[:8]}")
    assert (resumed.code, resumed.new) == (0, []), resumed.err
    tags = [entry.data["values"] for entry in journal(killed.folder) if entry.kind == "tags"]
    notes = [values["mlflow.note.content"] for values in tags if "mlflow.note.content" in values]
    assert notes[-2].startswith(f"**running** again, from {place}"), "until it ends, and not what it was killed with"
    same_run(killed.folder, undisturbed.folder)
    deliver(sqlite_uri, killed.folder)
    after = see(sqlite_uri, before.id)
    assert after.steady == points(undisturbed.folder)
    assert (after.status, after.tags["asib.outcome"], after.tags["asib.exit_code"]) == ("FINISHED", "completed", "0")
    assert after.tags["asib.resumed_from"] == place
    assert {len(values) for values in after.metrics.values()} == {1}


@pytest.mark.slow
def test_a_run_interrupted_again_and_again_equals_an_undisturbed_one(ready_lab: Lab, undisturbed: Done) -> None:
    """SIGINT after every third batch, with a checkpoint after every batch besides."""
    done = ready_lab.disturbed(signal_at(3, signal.SIGINT), "distill", EVERY_BATCH)
    folder, starts = done.folder, 1
    while done.code == 130:
        assert ending(folder) == ("KILLED", "killed", 130)
        done = ready_lab.disturbed(signal_at(4, signal.SIGINT), "distill", EVERY_BATCH, f"resume={folder}")
        starts += 1
        assert starts < 12, done.err
    assert done.code == 0, done.err
    assert starts >= 5
    same_run(folder, undisturbed.folder)


@pytest.mark.slow
def test_a_run_killed_while_a_checkpoint_is_written_equals_an_undisturbed_one(
    ready_lab: Lab, undisturbed: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What kill -9 leaves is what a copy has that is made of the folder then; training is ahead by that time."""
    first = 13  # of the second B-epoch's checkpoints within the epoch, one after each batch
    places = {
        "before the slot": "epoch 3, batch 1",
        "before the manifest": "epoch 3, batch 1",
        "before the record": "epoch 3, batch 2",
    }
    write, written = checkpoint.write_atomically, Counter[str]()

    def leave(path: Path, moment: str) -> None:
        if written["manifest"] == first and moment in places:
            time.sleep(0.1)
            shutil.copytree(path.parents[1], ready_lab.runs / moment)

    def leaving(path: Path, content: bytes) -> None:
        name = path.stem.rstrip("01")
        leave(path, f"before the {name}")
        write(path, content)
        if name == "manifest":
            leave(path, "before the record")
        written[name] += 1

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_atomically", leaving)
        done = ready_lab.step("distill", EVERY_BATCH)
    assert done.code == 0, done.err
    (folder,) = set(done.new) - {ready_lab.runs / moment for moment in places}
    assert sum(entry.kind == "checkpoint" for entry in journal(folder)) >= 4 * BATCHES
    same_run(folder, undisturbed.folder)
    for moment, place in places.items():
        left = ready_lab.runs / moment
        assert sum(entry.kind == "checkpoint" for entry in journal(left)) == first
        resumed = ready_lab.step("distill", f"resume={left}")
        assert resumed.code == 0, resumed.err
        tags = [entry.data["values"] for entry in journal(left) if entry.kind == "tags"]
        assert [found["asib.resumed_from"] for found in tags if "asib.resumed_from" in found] == [place], moment
        same_run(left, undisturbed.folder)


@pytest.mark.slow
def test_a_signal_within_a_nested_fine_tuning_ends_both_runs_and_both_go_on(
    lab: Lab, undisturbed: Done, sqlite_uri: str
) -> None:
    killed = lab.disturbed(signal_at(PER_EPOCH + 2), "distill")  # the second teacher, batch 2
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
        weights = f"{name}/checkpoints/teacher.safetensors"
        assert same_tensors(folder / weights, undisturbed.folder / weights)


def test_a_finished_run_goes_on_for_more_epochs_when_extended_at_its_end(ready_lab: Lab, undisturbed: Done) -> None:
    assert not list(undisturbed.folder.rglob("slot*")), "what has finished keeps weights alone"
    bare = shutil.copytree(undisturbed.folder, ready_lab.folder / "elsewhere")
    refused(ready_lab.step("distill", f"resume={bare}", "extend=true"), "checkpoint.keep=true")
    shutil.rmtree(bare)

    folder = ready_lab.step("distill", "checkpoint.keep=true").folder
    longer = "method.student_epochs_per_stage=[1,3]"
    refused(ready_lab.step("distill", f"resume={folder}", longer), "extend=true")
    assert ending(folder) == ("FINISHED", "completed", 0)
    record = (folder / "journal.jsonl").read_bytes()
    earlier = ("method.student_epochs_per_stage=[2,1]", "extend=true")
    refused(ready_lab.step("distill", f"resume={folder}", *earlier), "[2, 1]", "[1, 1]", "extend")
    assert (folder / "journal.jsonl").read_bytes() == record

    extended = ready_lab.step("distill", f"resume={folder}", longer, "extend=true")
    assert (extended.code, extended.new) == (0, []), extended.err
    found, before = points(folder), points(undisturbed.folder)
    assert {step for name, step in found if name == "student/acc"} == {1, 3, 4, 5}
    epochs = {key: value for key, value in before.items() if not key[0].startswith("final/")}
    assert {key: found[key] for key in epochs} == epochs
    assert {len(v) for (name, _), v in found.items() if not name.startswith("final/")} == {1}
    assert found["final/acc_last", 5]
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert kept["method"]["student_epochs_per_stage"] == [1, 3], "config.yaml says what was run"


@pytest.mark.slow
def test_a_nested_run_that_its_parent_was_killed_before_naming_is_delivered(
    lab: Lab, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = ("tracking.mode=online", f"tracking.uri={sqlite_uri}")
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "child", lambda journal, folder: None)
        killed = lab.disturbed(signal_at(2), "distill", *online)
    assert killed.code == 143, killed.err
    assert not see(sqlite_uri, run_id(killed.folder)).children
    assert (killed.folder / "teacher_0" / "journal.jsonl").exists()
    again = lab.disturbed(signal_at(2 * PER_EPOCH), "distill", *online, f"resume={killed.folder}")
    assert again.code == 143, again.err
    assert {"teacher_0", "teacher_1"} <= see(sqlite_uri, run_id(killed.folder)).children.keys()
