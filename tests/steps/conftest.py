"""Fixtures of the steps' tests: a workplace per session with teachers already fine-tuned, and one per test."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.ablate import ablate
from pipeline.config import DatasetConfig
from pipeline.data import sources
from pipeline.data.sources import ImageData
from tests.steps.desk import Desk, Students, make_desk, make_students
from tests.steps.lab import PER_EPOCH, Done, Lab, ending, signal_at
from tests.warm import Fork


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_TRACKING_URI", "RANK", "WORLD_SIZE", "ASIB_STORAGE")
    for name in (*tracking, "TEACHER_PAIR", "STUDENT", "METHOD", "SEED", "DRY_RUN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def deliveries(monkeypatch: pytest.MonkeyPatch) -> list[Fork]:
    """The delivery processes of steps in this process, as they are started."""
    started: list[Fork] = []

    def start(*arguments: Any, **named: Any) -> Fork:
        started.append(Fork(*arguments, **named))
        return started[-1]

    monkeypatch.setattr("tests.steps.lab.Fork", start)
    return started


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The session's workplace; its first distillation (`undisturbed`) fine-tunes the teachers that others find."""
    return Lab(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="session")
def undisturbed(bench: Lab) -> Done:
    """A distillation, off line, that nothing disturbs; its teachers are nested runs."""
    done = bench.step("distill")
    assert done.code == 0, done.err
    return done


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """An empty workplace: no teachers are fine-tuned yet."""
    return Lab(tmp_path / "lab")


@pytest.fixture
def ready_lab(lab: Lab, bench: Lab, undisturbed: Done) -> Lab:
    """A workplace where the teachers are there."""
    shutil.copytree(bench.runs / "teachers", lab.runs / "teachers")
    return lab


@pytest.fixture(scope="session")
def stopped(bench: Lab, undisturbed: Done) -> Path:
    """The folder of a distillation that SIGTERM has ended in its second epoch."""
    done = bench.disturbed(signal_at(PER_EPOCH + 2), "distill")
    assert (done.code, ending(done.folder)) == (143, ("KILLED", "killed", 143))
    return done.folder


@pytest.fixture
def killed(ready_lab: Lab, stopped: Path) -> Path:
    """A copy of it in a workplace of the test's own."""
    return Path(shutil.copytree(stopped, ready_lab.runs / stopped.name))


@pytest.fixture(scope="session")
def task(bench: Lab) -> ImageData:
    """The workplace's data, read."""
    return sources.load(DatasetConfig(name="npz", path=str(bench.data)))


@pytest.fixture(scope="session")
def students(task: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Students:
    """Students to be registered, whose accuracies are known."""
    return make_students(task, tmp_path_factory.mktemp("students"))


@pytest.fixture
def desk(lab: Lab, task: ImageData, students: Students, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A workplace with a registry of its own."""
    return make_desk(lab, sqlite_uri, task, students, monkeypatch)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the nested runs that a ladder or a table trains."""
    names: list[str] = []
    original: Callable[..., None] = ablate._train

    def noted(run: object, child: ablate.Child) -> None:
        names.append(child.name)
        original(run, child)

    monkeypatch.setattr(ablate, "_train", noted)
    return names
