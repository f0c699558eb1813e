"""The journal: what is written is read, whatever cut the writer off."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.journal import (
    FILE,
    Carrier,
    Journal,
    damage,
    decode_number,
    generations,
    read_entries,
    read_header,
    writer_alive,
)
from pipeline.journal import folder as journal_files


def kinds(folder: Path) -> list[str]:
    return [entry.kind for entry in read_entries(folder / FILE)[0]]


def test_entries_come_back_in_order_with_their_values(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "run", experiment="e", name="n", tags={"asib.step": "distill"})
    journal.params({"method.kd_alpha": 0.4, "amp": None})
    journal.metrics({"a": 1.5, "nan": math.nan, "up": math.inf, "down": -math.inf}, step=3)
    journal.artifact(tmp_path / "run" / "config.yaml")
    journal.end("FINISHED", "completed", 0)
    text = (tmp_path / "run" / FILE).read_text()
    for line in text.splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    header, params, metrics, artifact, end = read_entries(tmp_path / "run" / FILE)[0]
    assert (header.kind, header.data["experiment"], header.data["name"]) == ("open", "e", "n")
    assert header.data["journal"] == journal.id
    assert params.data["values"] == {"method.kd_alpha": "0.4", "amp": "None"}
    values = {key: decode_number(value) for key, value in metrics.data["values"].items()}
    assert values["a"] == 1.5
    assert math.isnan(values["nan"])
    assert (values["up"], values["down"]) == (math.inf, -math.inf)
    assert artifact.data == {"path": "config.yaml", "to": ""}
    assert end.data == {"status": "FINISHED", "outcome": "completed", "exit_code": 0, "message": None}
    assert [entry.time for entry in (header, params, metrics, end)] == sorted(
        entry.time for entry in (header, params, metrics, end)
    )


def test_reading_goes_on_from_any_offset(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, experiment="e")
    first, offset = read_entries(tmp_path / FILE)
    assert len(first) == 1
    assert first[0].end == offset == (tmp_path / FILE).stat().st_size
    journal.tags({"t": "ä"})
    second, end = read_entries(tmp_path / FILE, offset)
    assert [entry.kind for entry in second] == ["tags"]
    assert end == (tmp_path / FILE).stat().st_size
    assert read_entries(tmp_path / FILE, end) == ([], end)


@pytest.mark.parametrize("tail", [b'{"kind":"metr', b'{"kind":"metrics","time":1', b"\0\0\0"])
def test_a_torn_end_is_passed_over_and_cut_by_the_next_writer(tmp_path: Path, tail: bytes) -> None:
    journal = Journal.create(tmp_path, experiment="e")
    journal.params({"a": 1})
    journal.close()
    with (tmp_path / FILE).open("ab") as file:
        file.write(tail)
    assert kinds(tmp_path) == ["open", "params"]
    again = Journal.reopen(tmp_path)
    assert again.id == journal.id
    again.params({"b": 2})
    assert kinds(tmp_path) == ["open", "params", "params"]


def damaged_journal(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    """A finished run of twenty metrics, the ninth of which is changed on disk."""
    journal = Journal.create(folder, experiment="e")
    for step in range(20):
        journal.metrics({"acc": step / 7}, step)
    journal.end("FINISHED", "completed", 0)
    path = folder / FILE
    lines = path.read_bytes().split(b"\n")
    lines[9] = change(lines[9])
    path.write_bytes(b"\n".join(lines))
    return path


DAMAGES = {
    "a digit": lambda line: line.replace(b'"step": 8', b'"step": 3'),
    "bits": lambda line: bytes([line[0] ^ 0x80]) + line[1:],
    "zeros": lambda line: bytes(len(line)),
    "cut": lambda line: line[:20],
    "its end": lambda line: line[:-3] + (b'1"}' if line[-3:] == b'0"}' else b'0"}'),
    "not an object": lambda line: b"[1]",
}


@pytest.mark.parametrize("change", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_line_is_named_and_nothing_else_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[bytes], bytes]
) -> None:
    path = damaged_journal(tmp_path, change)
    size = path.stat().st_size
    steps = [entry.data["step"] for entry in read_entries(path)[0] if entry.kind == "metrics"]
    assert steps == [*range(8), *range(9, 20)]
    (said,) = damage(path)
    assert f"{path}: line 10 " in said
    Journal.reopen(tmp_path).close()
    assert caplog.messages == [said]
    assert path.stat().st_size > size, "only what came was added"
    assert kinds(tmp_path)[-2:] == ["end", "resume"]
    assert len(damage(path)) == 1


def test_every_changed_byte_of_a_line_is_noticed(tmp_path: Path) -> None:
    """But in the name of the checksum's own field, where the rest of the line is what it was."""
    journal = Journal.create(tmp_path, experiment="e")
    journal.metrics({"acc": 12.5}, step=7)
    path = tmp_path / FILE
    head, line, _ = path.read_bytes().split(b"\n")
    written = read_entries(path)[0][1].data
    for index in range(len(line)):
        for bit in (1, 32):
            changed = line[:index] + bytes([line[index] ^ bit]) + line[index + 1 :]
            path.write_bytes(head + b"\n" + changed.replace(b"\n", b" ") + b"\n")
            found = read_entries(path)[0][1]
            assert found.kind == "damaged" or found.data["values"] == written["values"], changed


def test_a_journal_can_be_searched_and_read_by_any_reader_of_json(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, experiment="e")
    journal.tags({"place": "Zürich"})
    with pytest.raises(ValueError, match="JSON"):  # RFC 8259 has no NaN
        journal.dataset("d", "0" * 8, "test", "d.npz", {"mean": math.nan})
    assert "Zürich" in (tmp_path / FILE).read_text()
    assert kinds(tmp_path) == ["open", "tags"]


def test_a_journal_without_checksums_is_read_and_goes_on_with_them(tmp_path: Path) -> None:
    lines = [
        {"kind": "open", "time": 1, "version": 1, "journal": "j", "name": None, "experiment": "e", "tags": {}},
        {"kind": "metrics", "time": 2, "step": 0, "values": {"acc": 1.0}},
    ]
    (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    journal = Journal.reopen(tmp_path)
    journal.metrics({"acc": 2.0}, 1)
    assert kinds(tmp_path) == ["open", "metrics", "metrics"]
    assert damage(tmp_path / FILE) == []
    assert Journal.restore(tmp_path / "b", journal.snapshot()).id == "j"


def test_time_in_a_journal_goes_on_when_the_clock_is_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.journal.entries._latest", 0)
    journal = Journal.create(tmp_path, experiment="e")
    journal.metrics({"acc": 1.0}, 0)
    ahead = time.time_ns() + 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: ahead)
    journal.metrics({"acc": 2.0}, 1)
    monkeypatch.setattr(time, "time_ns", lambda: ahead - 7200 * 10**9)
    monkeypatch.setattr("pipeline.journal.entries._latest", 0)  # as in another process
    journal.close()
    Journal.reopen(tmp_path).end("FINISHED", "completed", 0)
    times = [entry.time for entry in read_entries(tmp_path / FILE)[0]]
    assert times == sorted(set(times))  # delivery takes a checkpoint of the same moment for one that it has


def test_a_pending_journal_leaves_no_file(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, experiment="e", pending=True)
    journal.params({"a": 1})
    assert writer_alive(tmp_path)
    assert not (tmp_path / FILE).exists()
    journal.begin()
    journal.tags({"t": "1"})
    assert kinds(tmp_path) == ["open", "params", "tags"]
    Journal.create(tmp_path / "b", experiment="e", pending=True).close()
    assert not (tmp_path / "b" / FILE).exists()


def test_a_full_disk_is_one_line_and_leaves_whole_lines(small_disk: Callable[[float], Path]) -> None:
    disk = small_disk(0.0625)
    journal = Journal.create(disk / "run", experiment="e")
    values = {f"m{k}": 1 / 7 for k in range(9)}
    with pytest.raises(UserError, match=r"journal\.jsonl.*No space left.*output_dir") as said:
        list(map(journal.metrics, [values] * 10_000, range(10_000)))
    journal.close()
    assert "\n" not in str(said.value)
    entries, end = read_entries(disk / "run" / FILE)
    assert end == (disk / "run" / FILE).stat().st_size
    assert len(entries) > 10
    (disk / "filler").write_bytes(b"")
    with pytest.raises(UserError, match="No space left"):
        Journal.create(disk / "other", experiment="x" * 200_000)
    assert not (disk / "other" / FILE).exists()


def test_a_folder_that_is_removed_is_an_error(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "run", experiment="e")
    shutil.rmtree(tmp_path / "run")
    journal.metrics({"acc": 1.0}, 0)
    with pytest.raises(UserError, match="its folder is not there"):
        journal.end("FINISHED", "completed", 0)
    assert not (tmp_path / "run").exists()


def _contend(folder: Path, go: Any, tried: Any, won: Any) -> None:
    go.wait()
    try:
        Journal.restore(folder, (folder / "text").read_text())
    except UserError:
        pass
    else:
        with won.get_lock():
            won.value += 1
    tried.wait(30)  # whoever has won keeps the run until all others have been refused


def test_of_several_writers_of_one_run_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`restore` replaces the journal: a lock on that file let the second one in."""
    journal = Journal.create(tmp_path, experiment="e")
    (tmp_path / "text").write_text(journal.snapshot())
    journal.close()
    monkeypatch.setattr(journal_files, "PATIENCE_S", 0.1)
    context = multiprocessing.get_context("fork")
    for _ in range(int(os.environ.get("ASIB_ROUNDS", "3"))):
        go, tried, won = context.Event(), context.Barrier(4), context.Value("i", 0)
        writers = [context.Process(target=_contend, args=(tmp_path, go, tried, won)) for _ in range(4)]
        for process in writers:
            process.start()
        go.set()
        for process in writers:
            process.join(30)
        assert won.value == 1


def test_held_entries_follow_the_checkpoint_that_contains_them(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, experiment="e")
    journal.hold()
    journal.metrics({"acc": 10.0}, step=0)
    assert kinds(tmp_path) == ["open"]
    text = journal.snapshot()
    journal.checkpoint(tmp_path / "checkpoints" / "slot0.safetensors", "ab", 0)
    journal.metrics({"acc": 20.0}, step=1)
    assert kinds(tmp_path) == ["open", "checkpoint", "metrics"]
    restored = Journal.restore(tmp_path / "b", text, (tmp_path / "b" / "checkpoints" / "slot0.safetensors", "ab", 0))
    ours, theirs = read_entries(tmp_path / FILE)[0], read_entries(tmp_path / "b" / FILE)[0]
    assert [entry.kind for entry in theirs] == ["open", "checkpoint", "metrics", "resume"]
    assert [entry.data for entry in theirs[:3]] == [entry.data for entry in ours]
    assert theirs[2].time == ours[2].time  # verbatim: MLflow stores the same point once
    assert restored.id == journal.id


def test_entries_that_come_while_a_checkpoint_is_written_wait_for_the_next(tmp_path: Path) -> None:
    """They are not in its snapshot: a resume from it would record them again."""
    journal = Journal.create(tmp_path, experiment="e")
    slot = tmp_path / "checkpoints" / "slot0.safetensors"
    journal.hold()
    journal.metrics({"acc": 10.0}, step=0)
    text = journal.snapshot()
    journal.tags({"late": "1"})
    journal.artifact(tmp_path / "late.png")
    journal.checkpoint(slot, "ab", 0)
    assert kinds(tmp_path) == ["open", "checkpoint", "metrics"]
    assert "late" not in text
    journal.metrics({"acc": 20.0}, step=1)
    assert journal.snapshot().count("late") == 2
    assert kinds(tmp_path) == ["open", "checkpoint", "metrics"]
    journal.checkpoint(slot, "cd", 1)
    journal.tags({"last": "1"})
    journal.release()
    expected = ["open", "checkpoint", "metrics", "checkpoint", "tags", "artifact", "metrics", "tags"]
    assert kinds(tmp_path) == expected


def test_a_release_while_a_checkpoint_is_written_leaves_it_nothing_to_write(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, experiment="e")
    journal.hold()
    journal.metrics({"acc": 10.0}, step=0)
    journal.snapshot()
    journal.release()
    journal.hold()
    journal.tags({"late": "1"})
    journal.checkpoint(tmp_path / "checkpoints" / "slot0.safetensors", "ab", 0)
    assert kinds(tmp_path) == ["open", "metrics", "checkpoint"]


def test_a_model_stands_at_the_step_at_which_mlflow_itself_logs_models(tmp_path: Path) -> None:
    from mlflow.pyfunc import log_model  # seconds, for this test alone

    Journal.create(tmp_path, experiment="e").model(tmp_path / "student", "student")
    assert read_entries(tmp_path / FILE)[0][-1].data["step"] == signature(log_model).parameters["step"].default


def test_end_writes_what_is_held(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, experiment="e")
    journal.hold()
    journal.metrics({"final/acc_last": 70.0}, step=9)
    journal.end("FINISHED", "completed", 0)
    assert kinds(tmp_path) == ["open", "metrics", "end"]
    with pytest.raises(ValueError, match="closed"):
        journal.tags({"late": "1"})


def test_restore_drops_what_lies_beyond_and_marks_a_new_generation(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, experiment="e")
    journal.metrics({"acc": 1.0}, step=0)
    text = journal.snapshot()
    journal.metrics({"acc": 2.0}, step=1)
    journal.close()
    marks = []
    for _ in range(2):
        Journal.restore(tmp_path, text).close()
        entries = read_entries(tmp_path / FILE)[0]
        assert [entry.data["step"] for entry in entries if entry.kind == "metrics"] == [0]
        marks.append(entries[-1].data["generation"])
    assert marks[0] != marks[1]
    assert not list(tmp_path.glob(".journal*"))


def test_two_writers_are_refused_and_readers_see_a_living_one(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, experiment="e")
    assert writer_alive(tmp_path)
    with pytest.raises(UserError, match="already holds a run"):
        Journal.create(tmp_path, experiment="e")
    journal.close()
    assert not writer_alive(tmp_path)


def test_a_child_names_its_parent(tmp_path: Path) -> None:
    parent = Journal.create(tmp_path / "main", experiment="e")
    child = Journal.create(tmp_path / "main" / "distill", experiment="e", parent=tmp_path / "main")
    parent.child(child.folder)
    assert child.header.data["parent"] == {"journal": parent.id, "folder": ".."}
    assert read_entries(tmp_path / "main" / FILE)[0][-1].data == {"folder": "distill"}
    with pytest.raises(UserError, match="parent"):
        Journal.create(tmp_path / "x", experiment="e", parent=tmp_path / "nowhere")


def test_a_child_of_a_carrier_names_the_run_that_the_carrier_stands_for(tmp_path: Path) -> None:
    stands_for = Carrier("r" * 32, "p" * 32, "e", tmp_path / "sweep")  # whose folder is not here
    carrier = Journal.create(tmp_path / "workers" / "0", experiment="e", carrier=stands_for)
    assert carrier.header.data["carrier"] == {"journal": "p" * 32, "folder": "../../sweep", "run": "r" * 32}
    child = Journal.create(tmp_path / "trials" / "0", experiment="e", parent=carrier.folder)
    assert child.header.data["parent"] == {"journal": "p" * 32, "folder": "../../sweep", "run": "r" * 32}
    nowhere = Journal.create(tmp_path / "1", experiment="e", carrier=Carrier("", "p" * 32, "e"))
    child = Journal.create(tmp_path / "trials" / "1", experiment="e", parent=nowhere.folder)
    assert child.header.data["parent"] == {"journal": "p" * 32, "folder": "", "run": ""}


def test_every_writer_of_a_run_has_a_mark_of_its_own(tmp_path: Path) -> None:
    def marks(journal: Journal) -> list[str]:
        return generations(read_entries(journal.folder / FILE)[0])

    first = Journal.create(tmp_path / "a", experiment="e")
    assert marks(first) == [first.id]
    again = [Journal.create(tmp_path / name, experiment="e", journal=first.id) for name in "bc"]
    resumed = Journal.restore(tmp_path / "d", again[0].snapshot())
    assert marks(resumed)[0] == marks(again[0])[0]
    assert len({mark for journal in (first, *again, resumed) for mark in marks(journal)}) == 4


def test_paths_outside_the_folder_are_refused(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "run", experiment="e")
    for path in (tmp_path / "other.txt", tmp_path / "run" / ".." / "other.txt"):
        with pytest.raises(ValueError, match="outside"):
            journal.artifact(path)
    journal.artifact(Path("config.yaml"))
    assert read_entries(tmp_path / "run" / FILE)[0][-1].data["path"] == "config.yaml"


def test_foreign_and_newer_files_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("hello\n")
    with pytest.raises(UserError, match="not a journal"):
        read_header(tmp_path)
    (tmp_path / FILE).write_text('{"kind":"open","time":1,"version":99,"journal":"x"}\n')
    with pytest.raises(UserError, match="99"):
        Journal.reopen(tmp_path)


def test_a_writer_killed_at_any_moment_leaves_whole_lines(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.journal import Journal\n"
        "j = Journal.create(Path(sys.argv[1]), experiment='e'); print('up', flush=True)\n"
        "i = 0\n"
        "while True:\n"
        "    j.metrics({f'm{k}': i / 7 for k in range(50)}, step=i); i += 1\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    while len(read_entries(tmp_path / "run" / FILE)[0]) < 20:
        pass
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    journal = Journal.reopen(tmp_path / "run")
    journal.end("KILLED", "killed", 137)
    entries, end = read_entries(tmp_path / "run" / FILE)
    assert end == (tmp_path / "run" / FILE).stat().st_size
    assert [entry.data["step"] for entry in entries[1:-1]] == list(range(len(entries) - 2))
