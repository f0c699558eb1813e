"""What `python -m steps.tidy` lists and removes, and what it never touches."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.journal import SLOTS, Journal
from steps.tidy import main

OURS = (*SLOTS, "student.safetensors")


def run(root: Path, name: str, end: tuple[str, str, int] | None, keep: bool = False, step: str = "distill") -> Journal:
    journal = Journal.create(root / name, experiment="e", tags={"asib.step": step})
    journal.params({"checkpoint.keep": str(keep).lower()})
    (root / name / "checkpoints").mkdir()
    for file in OURS:
        (root / name / "checkpoints" / file).write_bytes(bytes(1_000_000))
    if end is not None:
        journal.end(*end)
    return journal


def test_only_what_ended_runs_need_no_more_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished, killed = ("FINISHED", "completed", 0), ("KILLED", "killed", 143)
    run(tmp_path, "finished", finished)
    run(tmp_path, "kept", finished, keep=True)
    run(tmp_path, "pruned", ("KILLED", "pruned", 0))
    run(tmp_path, "interrupted", killed)
    run(tmp_path, "vanished", None).close()
    alive = run(tmp_path, "alive", None)
    before = sorted(tmp_path.rglob("*"))

    assert main([f"output_dir={tmp_path}"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == f"7.0 MB in 4 places of {tmp_path} can go: apply=true removes it"
    assert [line.split()[0] for line in listed[2:]] == [
        "pruned/checkpoints",
        *(f"finished/checkpoints/{s}" for s in SLOTS),
    ]
    assert sorted(tmp_path.rglob("*")) == before

    assert main([f"output_dir={tmp_path}", "apply=true"]) == 0
    assert capsys.readouterr().out.startswith("removed 7.0 MB")
    gone = {tmp_path / "pruned/checkpoints", *(tmp_path / "pruned/checkpoints" / name for name in OURS)}
    gone |= {tmp_path / "finished/checkpoints" / name for name in SLOTS}
    assert set(before) - set(tmp_path.rglob("*")) == gone
    assert main([f"output_dir={tmp_path}"]) == 0
    assert capsys.readouterr().out.startswith(f"0.0 MB in 0 places of {tmp_path}")
    alive.close()


@pytest.mark.parametrize(
    ("keep", "gone"),
    [
        ("all", set()),
        ("best", {"sweep/trials/0", "sweep/trials/1"}),
        ("last", {"sweep", "sweep/trials/0"}),
        ("none", {"sweep", "sweep/trials/0", "sweep/trials/1", "ladder/rung"}),
    ],
)
def test_students_of_trials_and_rungs_go_where_the_user_says_so(tmp_path: Path, keep: str, gone: set[str]) -> None:
    finished = ("FINISHED", "completed", 0)
    for name, step in (("sweep", "sweep"), ("unfinished", "sweep"), ("ladder", "ablate"), ("alone", "distill")):
        run(tmp_path, name, None if name == "unfinished" else finished, step=step).close()
    for name in ("sweep/trials/0", "sweep/trials/1", "unfinished/trials/0", "ladder/rung"):
        run(tmp_path, name, finished).close()
    student = "checkpoints/student.safetensors"
    (tmp_path / "ladder" / student).unlink()  # with log_model=false it has no copy of its best rung
    before = set(tmp_path.rglob("student.safetensors"))
    assert main([f"output_dir={tmp_path}", "apply=true", f"keep={keep}"]) == 0
    assert before - set(tmp_path.rglob("student.safetensors")) == {tmp_path / name / student for name in gone}
