"""Fixtures of the tests of pipeline."""

import logging
import threading
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def hearts_that_a_test_leaves_beating() -> Iterator[None]:
    """Stopped, so that they do not knock at databases that are gone."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("heartbeat of trial"):
            thread._target.__self__._ended.set()  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """A step that runs in this process shows its log on a standard error that is gone with its test."""
    log = logging.getLogger("asib")
    before = log.handlers[:], log.propagate, log.level
    yield
    log.handlers[:], log.propagate = before[0], before[1]
    log.setLevel(before[2])
