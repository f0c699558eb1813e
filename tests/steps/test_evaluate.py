"""The evaluate step: students of runs and of files, and a published checkpoint that scores what was published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.evaluate import speed
from tests.cifar100 import SHARED
from tests.steps.lab import Done, Lab, points

STUDENT = "checkpoints/student.safetensors"


def test_a_students_file_scores_what_its_run_found(
    bench: Lab, undisturbed: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "BUDGET_S", dict.fromkeys(speed.BATCHES, 0.05))
    done = bench.step("evaluate", f"student={undisturbed.folder / STUDENT}")
    assert done.code == 0, done.err
    found = points(done.folder)
    assert found["test/acc", 0] == points(undisturbed.folder)["final/acc_val_selected", 3]
    assert found["test/top5", 0] == [100.0]  # of four classes
    assert found["speed/latency_ms_1", 0] < found["speed/latency_ms_256", 0]
    results = json.loads((done.folder / "results.json").read_text())["metrics"]
    assert [results["test/nll"]] == found["test/nll", 0]
    shown = dict(line.split() for line in done.out.splitlines() if line.startswith("test/"))
    assert float(shown["test/acc"]) == pytest.approx(found["test/acc", 0][0], abs=0.005)
    assert (done.folder / "confusion.png").stat().st_size > 1000


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
def test_the_published_resnet56_scores_the_published_accuracy(lab: Lab, cifar100: Path) -> None:
    weights = SHARED / "weights/cifar100_resnet56-f2eff4c8.pt"
    if not weights.exists():
        pytest.skip(f"{weights} is not beside this repository")
    data = ["dataset=cifar100", f"dataset.root={cifar100}", "model.student.name=cifar_resnet56", "speed=false"]
    done = lab.raw("evaluate", [*data, f"student={weights}", "tracking=offline", f"output_dir={lab.runs}"])
    assert done.code == 0, done.err
    found = points(done.folder)
    assert found["test/acc", 0] == [pytest.approx(72.63, abs=0.0049)]
    assert found["test/top5", 0][0] > 90
