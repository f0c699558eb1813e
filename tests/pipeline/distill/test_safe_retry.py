"""SAFE-RETRY: NaN under AMP ends in one restart with AMP off; NaN again ends the run (docs/method.md section 5)."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.distill import train
from pipeline.journal import read_entries
from pipeline.runs.records import Record, from_folder
from pipeline.training.methods.asib.b_step import BStep
from steps import distill
from tests.pipeline.training.builders import HeldUp

PATIENCE = 3
BRIEF = f"""
    dataset=npz dataset.batch_size=4 dataset.val_fraction=0.25 model/student=cifar_resnet8 model/teacher=none
    method.kd_alpha=0 method.kd_target=avg method.num_stages=1 method.student_epochs_per_stage=[3]
    schedule.lr_warmup_epochs=0 log_model=false tracking.mode=offline device=cpu
    optim.use_amp=true optim.safe_retry_patience={PATIENCE}
""".split()


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


def run(keys: dict[str, Any], *more: str) -> tuple[int, Record, Path]:
    train._load.cache_clear()
    where = [f"dataset.path={keys['dataset']['path']}", f"output_dir={keys['output_dir']}"]
    code = distill.main([*BRIEF, *more, *where])
    (folder,) = Path(keys["output_dir"]).glob("*-distill-*")
    return code, from_folder(folder), folder


def accuracies(found: Record) -> list[int]:
    """The epochs under which the record has the student's accuracy."""
    return [epoch for epoch, _ in found.histories["student/acc"]]


def test_nan_under_amp_restarts_once_with_amp_off_and_says_so(keys: dict[str, Any], poison: Any) -> None:
    poison(only_under_amp=True)
    code, found, folder = run(keys, "checkpoint.keep=true")
    assert (code, found.status) == (0, "FINISHED")
    assert "non-finite steps in a row" in found.tags["asib.safe_retry"]
    assert accuracies(found) == [0, 1, 2], "no epoch missing or double"
    assert found.metrics["train/nonfinite_steps"] == 0
    assert len(json.loads((folder / "checkpoints/manifest.json").read_text())["checkpoints"]) == 2
    assert found.config["optim.use_amp"] == "true", "the configuration, and its hash, are as they were"


def test_a_restart_waits_for_the_checkpoint_that_is_being_written(
    keys: dict[str, Any], poison: Any, monkeypatch: pytest.MonkeyPatch
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
    code, found, _ = run(keys)
    assert (code, found.status) == (0, "FINISHED")
    assert begun == [0, 1, 1, 2], "from the first epoch's checkpoint"
    assert accuracies(found) == [0, 1, 2]


def test_nan_without_amp_too_ends_the_run_with_step_terms_and_images(keys: dict[str, Any], poison: Any) -> None:
    poison(only_under_amp=False)
    code, found, folder = run(keys)
    assert (code, found.status) == (1, "FAILED")
    assert "asib.safe_retry" in found.tags
    error = str(read_entries(folder / "journal.jsonl")[0][-1].data)
    for part in (f"{PATIENCE} non-finite steps in a row", "b-epoch 2", "batch 5", "loss=nan", "ce=", "images ["):
        assert part in error, error


def test_a_divergence_that_patience_does_not_see_is_a_failed_run_of_one_line(keys: dict[str, Any]) -> None:
    """Fewer updates than `safe_retry_patience`: neither an accuracy of chance nor a complaint about ONNX."""
    more = ["optim.use_amp=false", "optim.safe_retry_patience=1000", "log_model=true"]
    more += ["optim.student_lr=1e6", "optim.student_weight_decay=1e6"]  # AdamW: -1e12 times each weight in every step
    code, found, folder = run(keys, *more)
    assert (code, found.status) == (1, "FAILED")
    assert not any("acc" in name for name in found.metrics)
    said = (folder / "run.log").read_text()
    assert said.count("student: 6 of 6 outputs in evaluation are not finite: it has diverged; lower its ") == 1
    assert "Traceback" not in said
    assert "onnx" not in said.lower()
