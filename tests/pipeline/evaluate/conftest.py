"""A workplace with one distillation that ran to its end, for the tests of the job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.steps.lab import Done, Lab

TRACKING = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_TRACKING_URI", "RANK", "WORLD_SIZE")
SHORTCUTS = ("TEACHER_PAIR", "STUDENT", "METHOD", "SEED", "DRY_RUN")


@pytest.fixture(autouse=True, scope="session")
def _environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        for name in (*TRACKING, *SHORTCUTS):
            patched.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory, _environment: None) -> Lab:
    """The session's workplace."""
    return Lab(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="session")
def distilled(bench: Lab) -> Done:
    """A distillation, off line; its teachers stay beside it for others."""
    done = bench.step("distill")
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="session")
def student(distilled: Done) -> Path:
    """Its student's weights."""
    return distilled.folder / "checkpoints/student.safetensors"
