"""A run that takes a second."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import Config
from pipeline.data import sources
from pipeline.distill import networks


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    """A student, a teacher with a checkpoint, 24 images of 16 x 16."""
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8) for n in (24, 9))
    np.savez(tmp_path / "data.npz", x_train=train, x_test=test, y_train=np.arange(24) % 3, y_test=np.arange(9) % 3)
    found: dict[str, Any] = {
        "output_dir": str(tmp_path / "runs"),
        "device": "cpu",
        "threads": 1,
        "log_model": False,
        "dataset": {"name": "npz", "path": str(tmp_path / "data.npz"), "batch_size": 8, "val_fraction": 0.25},
        "model": {
            "student": {"name": "cifar_resnet8"},
            "teachers": [{"name": "cifar_resnet8", "checkpoint": str(tmp_path / "teacher.safetensors")}],
        },
        "method": {"student_epochs_per_stage": [2], "kd_alpha": 0.5, "kd_target": "avg"},
        "tracking": {"mode": "offline"},
    }
    config = Config.model_validate(found)
    data = sources.load(config.dataset)
    networks.save(networks.build_teacher(config, data, 0), tmp_path / "teacher.safetensors", config, data)
    return found
