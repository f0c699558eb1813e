"""Pictures in folders through whole steps: the same results with and without workers, continued bit for bit, logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.distill import export, train
from tests.steps.desk import to_onnx
from tests.steps.lab import (
    BATCH,
    BATCHES,
    CLASSES,
    SIZE,
    STUDENT,
    TEST,
    TRAIN,
    Lab,
    ending,
    images,
    points,
    same_run,
    settings,
    signal_at,
)


def write_pictures(root: Path) -> Path:
    """The lab's images as PNG files, a little larger than they are used."""
    for split, count, seed in (("train", TRAIN, 0), ("val", TEST, 1000)):
        for number, (pixels, label) in enumerate(zip(*images(count, seed), strict=True)):
            folder = root / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).resize((20, 18), Image.Resampling.BICUBIC).save(folder / f"{number:03}.png")
    return root


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lab = Lab(tmp_path / "lab")
    root = write_pictures(lab.folder / "pictures")
    content = settings(lab.data)
    content["defaults"][0] = {"override /dataset": "image_folder"}
    content["dataset"] = {"root": str(root), "image_size": SIZE, "batch_size": BATCH, "val_fraction": 0.2, "workers": 2}
    lab.cfg.write_text(yaml.safe_dump(content))
    return lab


@pytest.mark.slow
def test_a_run_does_not_depend_on_its_workers_and_is_continued(lab: Lab) -> None:
    whole = lab.step("distill", "bank=lazy")
    assert whole.code == 0, whole.err
    assert "pictures cropped at random are no fixed set of views" in whole.err
    train._load.cache_clear()  # the next run has its own workers, forked while its record is open
    killed = lab.disturbed(signal_at(BATCHES + 3), "distill")  # in the first B-step
    assert killed.code == 143, killed.err
    assert ending(killed.folder) == ("KILLED", "killed", 143)
    again = lab.step("distill", f"resume={killed.folder}", "dataset.workers=0")
    assert again.code == 0, again.err
    same_run(killed.folder, whole.folder)


@pytest.mark.slow
def test_its_student_is_logged_with_its_crop_and_evaluated(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "to_onnx", to_onnx)
    made = lab.step("distill", "log_model=true")
    assert made.code == 0, made.err
    meta = json.loads((made.folder / "model/meta.json").read_text())
    assert (meta["crop_pct"], meta["image_size"]) == (0.875, SIZE)
    shown = json.loads((made.folder / "model/timm/config.json").read_text())["pretrained_cfg"]
    assert (shown["crop_pct"], shown["crop_mode"]) == (0.875, "center")
    done = lab.step("evaluate", f"student={made.folder / STUDENT}")
    assert done.code == 0, done.err
    accuracy = points(done.folder)["test/acc", 0]
    assert accuracy == points(made.folder)["final/acc_val_selected", 3]
    assert (done.folder / "confused_pairs.png").is_file()
    given: dict[str, Any] = {"model": made.folder / "model", "images": lab.folder / "pictures/val"}
    given |= {"to": lab.folder / "p.csv", "output_dir": lab.runs, "tracking.mode": "offline"}
    predicted = lab.raw("predict", [f"{key}={value}" for key, value in given.items()])
    assert predicted.code == 0, predicted.err
    rows = [line.split(",") for line in (lab.folder / "p.csv").read_text().splitlines()[1:]]
    right = np.mean([row[0].split("/")[0] == row[1] for row in rows])
    assert 100 * right == pytest.approx(accuracy[0])
