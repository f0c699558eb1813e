"""SAFE-RETRY: NaN under AMP ends in one restart with AMP off; NaN again ends the run (docs/method.md section 5)."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from pipeline.runs.records import from_folder
from pipeline.runs.step import execute
from pipeline.training.methods.asib.b_step import BStep
from tests.pipeline.training.builders import HeldUp

pytest_plugins = ["tests.servers"]
PATIENCE = 3
BRIEF = [
    "cfg=quickstart",
    "model/teacher=none",
    "method.kd_alpha=0",
    "method.kd_target=avg",
    "method.num_stages=1",
    "method.student_epochs_per_stage=[3]",
    "schedule.lr_warmup_epochs=0",
    "log_model=false",
    "optim.use_amp=true",
    f"optim.safe_retry_patience={PATIENCE}",
]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    """NaN in the loss from a batch of the second epoch on; only under autocast, or always."""

    def inject(only_under_amp: bool) -> None:
        forward = BStep.forward

        def poisoned(self: BStep, batch: Any, moment: Any, repeat: int = 0) -> dict[str, torch.Tensor]:
            out = forward(self, batch, moment, repeat)
            amp = torch.is_autocast_enabled("cpu")
            if moment.epoch == 1 and moment.batch >= 2 and (amp or not only_under_amp):
                out["loss"] = out["loss"] * float("nan")
            return out

        monkeypatch.setattr(BStep, "forward", poisoned)

    return inject


def run(uri: str, folder: Path) -> tuple[int, Any]:
    code = execute(
        "distill", "pipeline.distill.distill:distill", [*BRIEF, f"tracking.uri={uri}", f"output_dir={folder}"]
    )
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("asib")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    return code, found


def test_nan_under_amp_restarts_once_with_amp_off_and_says_so(sqlite_uri: str, tmp_path: Path, poison: Any) -> None:
    poison(only_under_amp=True)
    code, found = run(sqlite_uri, tmp_path)
    assert (code, found.info.status) == (0, "FINISHED")
    assert "non-finite steps in a row" in found.data.tags["asib.safe_retry"]
    history = MlflowClient(sqlite_uri).get_metric_history(found.info.run_id, "student/acc")
    assert [m.step for m in history] == [0, 1, 2]  # no epoch missing or double
    assert found.data.metrics["train/nonfinite_steps"] == 0
    # epochs after the restart are those of a run without AMP that continues the same first epoch
    (folder,) = tmp_path.glob("*-distill-*")
    states = json.loads((folder / "checkpoints" / "manifest.json").read_text())
    assert len(states["checkpoints"]) == 2
    assert found.data.params["optim.use_amp"] == "true"  # the configuration, and its hash, are as they were


def test_a_restart_waits_for_the_checkpoint_that_is_being_written(
    sqlite_uri: str, tmp_path: Path, poison: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(only_under_amp=True)
    held_up, forward, begun = HeldUp(monkeypatch), BStep.forward, []

    def noted(self: BStep, batch: Any, moment: Any, repeat: int = 0) -> dict[str, torch.Tensor]:
        if moment.batch == 0:
            begun.append(moment.epoch)
        if (moment.epoch, moment.batch) == (1, 1 + PATIENCE):
            threading.Timer(0.5, held_up.go.set).start()  # the run has ended by then
        return forward(self, batch, moment, repeat)

    monkeypatch.setattr(BStep, "forward", noted)
    code, found = run(sqlite_uri, tmp_path)
    assert (code, found.info.status) == (0, "FINISHED")
    assert begun == [0, 1, 1, 2], "from the first epoch's checkpoint"
    history = MlflowClient(sqlite_uri).get_metric_history(found.info.run_id, "student/acc")
    assert [m.step for m in history] == [0, 1, 2]


def test_nan_without_amp_too_ends_the_run_with_step_terms_and_images(
    sqlite_uri: str, tmp_path: Path, poison: Any
) -> None:
    poison(only_under_amp=False)
    code, found = run(sqlite_uri, tmp_path)
    assert (code, found.info.status) == (1, "FAILED")
    assert "asib.safe_retry" in found.data.tags
    error = found.data.tags["asib.error"]
    for part in (f"{PATIENCE} non-finite steps in a row", "b-epoch 2", "batch 5", "loss=nan", "ce=", "images ["):
        assert part in error, error


def test_a_divergence_that_patience_does_not_see_is_a_failed_run_of_one_line(tmp_path: Path) -> None:
    """Fewer updates than `safe_retry_patience`: neither an accuracy of chance nor a complaint about ONNX."""
    more = ["optim.use_amp=false", "optim.safe_retry_patience=1000", "log_model=true"]
    more += ["optim.student_lr=1e6", "optim.student_weight_decay=1e6"]  # AdamW: -1e12 times each weight in every step
    where = ["tracking.mode=offline", f"output_dir={tmp_path}"]
    code = execute("distill", "pipeline.distill.distill:distill", [*BRIEF, *more, *where])
    (folder,) = tmp_path.glob("*-distill-*")
    found = from_folder(folder)
    assert (code, found.status) == (1, "FAILED")
    assert not any("acc" in name for name in found.metrics)
    said = (folder / "run.log").read_text()
    assert said.count("student: 200 of 200 outputs in evaluation are not finite: it has diverged; lower its ") == 1
    assert "Traceback" not in said
    assert "onnx" not in said.lower()
