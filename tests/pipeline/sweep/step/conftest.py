"""Sweeps on data of seconds whose workers live in the test process."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from pipeline.distill import distill
from pipeline.launch import worker as launched
from pipeline.runs.run import Run
from pipeline.sweep import driver as sweep
from pipeline.sweep.request import Plan
from pipeline.sweep.study import report
from pipeline.sweep.study.claim import Claim
from pipeline.sweep.study.plots import draw
from tests.pipeline.sweep.step.sweeping import InProcess, WorkerStop, swept
from tests.steps.lab import Lab


@pytest.fixture(scope="session")
def plain_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        tracking = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_TRACKING_URI")
        for name in (*tracking, "RANK", "WORLD_SIZE", "ASIB_STORAGE"):
            patched.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module", autouse=True)
def _workers(plain_environment: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Plan, "launcher", InProcess)
        patched.setattr(launched, "Stop", WorkerStop)
        patched.setattr(sweep, "TICK_S", 0.0)
        yield


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these trials; `finished` has one."""
    monkeypatch.setattr(report, "draw", lambda *_: ())


@pytest.fixture(scope="session")
def teachers(plain_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuned once."""
    lab = Lab(tmp_path_factory.mktemp("teachers"))
    done = lab.step("finetune")
    assert done.code == 0, done.err
    return lab.runs / "teachers"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, teachers: Path) -> Lab:
    """A sweep, off line, that nothing has disturbed; its third trial was pruned. Only to be looked at."""
    lab = Lab(tmp_path_factory.mktemp("finished"))
    shutil.copytree(teachers, lab.runs / "teachers")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "draw", lambda *study: islice(draw(*study), 1))
        patched.setattr(Claim, "should_prune", lambda claim: claim.number == 2)
        swept(lab, pruner={"name": "median"})
    return lab


@pytest.fixture
def lab(tmp_path: Path, teachers: Path) -> Lab:
    lab = Lab(tmp_path / "lab")
    shutil.copytree(teachers, lab.runs / "teachers")
    return lab


@pytest.fixture
def online(sqlite_uri: str) -> tuple[str, str]:
    """Overrides by which the sweep is delivered while it runs."""
    return "tracking.mode=online", f"tracking.uri={sqlite_uri}"


@pytest.fixture
def before_each_trial(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Run], None]], None]:
    """Let something happen where a trial would begin to train."""
    original = distill.trial

    def arrange(act: Callable[[Run], None]) -> None:
        def trial(run: Run, watch: Any) -> dict[str, float]:
            act(run)
            return original(run, watch)

        monkeypatch.setattr(distill, "trial", trial)

    return arrange
