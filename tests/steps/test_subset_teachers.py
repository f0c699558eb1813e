"""A distillation from teachers of class subsets, killed in each of its parts, ends as an undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.steps.lab import Lab, journal, same_run, same_tensors, signal_at

HALF = ("model.overlap=0.5", "model.unseen=masked", "bank=lazy")


@pytest.mark.slow
def test_teachers_of_subsets_and_their_student_survive_being_killed(lab: Lab, tmp_path: Path) -> None:
    whole = Lab(tmp_path / "whole").step("distill", *HALF)
    assert whole.code == 0, whole.err
    assert "of 3 of 4 classes" in whole.err
    killed = lab.disturbed(signal_at(2), "distill", *HALF)
    assert killed.code == 143
    assert not (killed.folder / "teacher_1").exists(), "in the first teacher's fine-tuning"
    again = lab.disturbed(signal_at(6), "distill", *HALF, f"resume={killed.folder}")
    assert again.code == 143
    assert (killed.folder / "teacher_1/results.json").exists(), "in distillation"
    done = lab.step("distill", *HALF, f"resume={killed.folder}")
    assert done.code == 0, done.err
    same_run(killed.folder, whole.folder)
    for index in (0, 1):
        weights = f"teacher_{index}/checkpoints/teacher.safetensors"
        assert same_tensors(killed.folder / weights, whole.folder / weights)
    tags = [{k: v for e in journal(f) if e.kind == "tags" for k, v in e.data["values"].items()} for f in
            (killed.folder, whole.folder)]  # fmt: skip
    assert tags[0]["asib.teachers"] == tags[1]["asib.teachers"]
