"""Fixtures of the tests of pipeline."""

import subprocess
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tests.warm import Fork


@pytest.fixture(autouse=True)
def hearts_that_a_test_leaves_beating() -> Iterator[None]:
    """Stopped, so that they do not knock at databases that are gone."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("heartbeat of trial"):
            thread._target.__self__._ended.set()  # type: ignore[attr-defined]


@pytest.fixture
def warm_deliveries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delivery processes are forks of one that has imported MLflow already."""
    warm = SimpleNamespace(**{**vars(subprocess), "Popen": Fork})
    monkeypatch.setattr("pipeline.tracking.pipe.subprocess", warm)
