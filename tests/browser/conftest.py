"""Pictures are looked at here, so they are drawn."""

from collections.abc import Iterator

import pytest

from pipeline.reporting import figures


@pytest.fixture(autouse=True, scope="module")
def _drawn() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tests.steps.lab._undrawn", figures.png)
        yield
