"""The evaluate step: students of runs and of files, and a published checkpoint that scores what was published."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.steps.lab import Done, Lab, deliver, points, run_id, see

STUDENT = "checkpoints/student.safetensors"
SHARED = Path(__file__).resolve().parents[2].parent / "shared"


def test_a_students_file_scores_what_its_run_found(bench: Lab, undisturbed: Done) -> None:
    done = bench.step("evaluate", f"student={undisturbed.folder / STUDENT}")
    assert done.code == 0, done.err
    found = points(done.folder)
    assert found["test/acc", 0] == points(undisturbed.folder)["final/acc_val_selected", 3]
    assert found["test/top5", 0] == [100.0]  # of four classes
    results = json.loads((done.folder / "results.json").read_text())["metrics"]
    assert [results["test/nll"]] == found["test/nll", 0]
    shown = dict(line.split() for line in done.out.splitlines() if line.startswith("test/"))
    assert float(shown["test/acc"]) == pytest.approx(found["test/acc", 0][0], abs=0.005)
    assert (done.folder / "confusion.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_runs_student_is_fetched_and_linked(bench: Lab, undisturbed: Done, lab: Lab, sqlite_uri: str) -> None:
    deliver(sqlite_uri, undisturbed.folder)
    source = run_id(undisturbed.folder)
    done = lab.step("evaluate", "tracking.mode=online", f"tracking.uri={sqlite_uri}", f"student=runs:/{source}")
    assert done.code == 0, done.err
    seen = see(sqlite_uri, run_id(done.folder))
    assert seen.steady == points(done.folder)
    assert seen.metrics["test/acc", 0] == see(sqlite_uri, source).metrics["final/acc_val_selected", 3]
    assert seen.tags["asib.student"] == source
    assert seen.tags["asib.weights"] == see(sqlite_uri, source).tags["asib.weights"]


@pytest.mark.slow
def test_an_unknown_runs_student_is_refused(lab: Lab, sqlite_uri: str) -> None:
    unknown = lab.step("evaluate", "tracking.mode=online", f"tracking.uri={sqlite_uri}", "student=runs:/" + 32 * "0")
    assert unknown.code == 2
    assert len(unknown.lines) == 1
    assert "runs:/" + 32 * "0" in unknown.lines[0]
    assert unknown.new == []


def test_the_baseline_is_the_main_jobs_student_alone(bench: Lab) -> None:
    """Cross-entropy only, although the configuration names teachers and distils."""
    done = bench.step("baseline")
    assert done.code == 0, done.err
    found = points(done.folder)
    assert {step for name, step in found if name == "student/acc"} == {0, 1}
    assert not [name for name, _ in found if name.startswith(("a_step/", "teacher/", "synergy/"))]
    assert found["b_step/loss", 0] == found["b_step/ce", 0]
    assert found["b_step/kd", 0] == [0.0]
    assert "student alone" in done.out or "trained student" in done.out


@pytest.mark.slow
def test_the_published_resnet56_scores_the_published_accuracy(lab: Lab, tmp_path: Path) -> None:
    weights = SHARED / "weights/cifar100_resnet56-f2eff4c8.pt"
    unpack = SHARED / "data/unpack_cifar100.py"
    if not weights.exists() or not unpack.exists():
        pytest.skip(f"{SHARED} with the published weights and the packed CIFAR-100 is not beside this repository")
    subprocess.run([sys.executable, unpack, tmp_path / "data"], check=True)
    arguments = [
        "dataset=cifar100",
        f"dataset.root={tmp_path / 'data'}",
        "model.student.name=cifar_resnet56",
        f"student={weights}",
        "tracking=offline",
        f"output_dir={lab.runs}",
    ]
    done = lab.raw("evaluate", arguments)
    assert done.code == 0, done.err
    found = points(done.folder)
    assert found["test/acc", 0] == [pytest.approx(72.63, abs=0.0049)]
    assert found["test/top5", 0][0] > 90
