"""A run with the teacher bank says so: in its log, its tags, its identity and its metrics."""

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from pipeline.compose import compose
from pipeline.config import Config
from pipeline.distill import distill, export, results, train
from pipeline.runs import records
from pipeline.runs.opening import open_run
from pipeline.training.bank import cache
from pipeline.training.bank.policy import bank_use
from tests.warm import Fork


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(cache, "RESERVE", 0)
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    with (
        mock.patch.object(results, "curves"),
        mock.patch.object(results, "confusion"),
        mock.patch.object(export, "log_student"),
    ):
        yield
    torch.use_deterministic_algorithms(before[0])
    torch.set_num_threads(before[1])


def distilled(keys: dict[str, Any], **more: Any) -> records.Record:
    train._load.cache_clear()
    run = open_run("distill", Config.model_validate(keys | more))
    distill.distill(run)
    run.close()
    return records.from_folder(run.folder)


def test_a_run_states_its_bank(keys: dict[str, Any], caplog: pytest.LogCaptureFixture, capsys: Any) -> None:
    caplog.set_level("INFO", "asib")
    off, auto = distilled(keys, bank="off"), distilled(keys)
    assert "no teacher bank: bank=off" in caplog.text
    assert "it would save" not in caplog.text, "nobody asked"
    assert "it would save" in bank_use(Config.model_validate(keys)).reason
    assert not (Path(keys["output_dir"]) / "bank").exists()
    lazy = distilled(keys, bank="lazy")
    assert "teacher bank: lazy, in" in caplog.text
    ahead = distilled(keys, bank="ahead")
    assert "0 images of all teachers computed ahead" in caplog.text, "the lazy run has left them"
    assert [r.tags["asib.bank"] for r in (off, auto, lazy, ahead)] == ["off", "off", "lazy", "ahead"]
    assert lazy.tags["asib.identity"] == ahead.tags["asib.identity"] != off.tags["asib.identity"]
    assert len({r.tags["asib.config_hash"] for r in (off, lazy, ahead)}) == 1
    assert lazy.metrics["bank/served"] + lazy.metrics["bank/computed"] == 18  # of the last epoch
    assert (ahead.metrics["bank/served"], ahead.metrics["bank/computed"]) == (18, 0)
    assert "bank/served" not in off.metrics
    # the same bits as when it was filled; the costs of the method are those without a bank
    assert lazy.tags["asib.weights"] == ahead.tags["asib.weights"]
    asked = "cost/forward_images/teacher_0"
    assert off.metrics[asked] == lazy.metrics[asked] == ahead.metrics[asked] == 36


def test_a_folder_that_cannot_be_used_leaves_the_run_without_a_bank(
    keys: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    found = distilled(keys, bank="lazy", bank_folder=str(tmp_path / "file"))
    assert found.tags["asib.bank"] == "off"
    assert "bank_folder=… names another" in caplog.text


@pytest.mark.slow
def test_two_runs_that_build_at_once_have_the_same_bits(keys: dict[str, Any], tmp_path: Path) -> None:
    """Steps of their own, begun together on an empty bank; what they used is what a third one is served."""
    file = tmp_path / "run.yaml"
    config = Config.model_validate({**keys, "bank": "lazy"})
    file.write_text(compose.dump(config))
    command = [sys.executable, "-m", "steps.distill", f"cfg={file}"]

    def begin() -> Fork:
        with (tmp_path / "log").open("a") as log:
            return Fork(command, env=os.environ, stdout=log, stderr=log, start_new_session=True)

    processes = [begin(), begin()]
    assert [process.wait(300) for process in processes] == [0, 0], (tmp_path / "log").read_text()
    assert begin().wait(300) == 0
    runs = [records.from_folder(f.parent) for f in Path(keys["output_dir"]).glob("*-distill-*/results.json")]
    assert len(runs) == 3
    assert len({r.tags["asib.weights"] for r in runs}) == 1
    assert min(r.metrics["bank/computed"] for r in runs) == 0
    (content,) = (tmp_path / "runs" / "bank").rglob("records.bin")
    cells = np.fromfile(content, np.uint64).reshape(-1, _words(content))[:, 1]
    assert len(np.unique(cells)) == len(cells), "no view is there twice"


def _words(content: Path) -> int:
    header = json.loads((content.parent / "header.json").read_text())
    return 2 + -(-int(header["width"]) // 4)
