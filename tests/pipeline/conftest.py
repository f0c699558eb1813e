"""Fixtures of the tests of pipeline."""

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
