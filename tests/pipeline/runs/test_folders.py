"""The folder of a run, found by its id."""

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.journal import Journal
from pipeline.runs.folders import find_folder


def test_a_run_is_found_by_the_unique_beginning_of_its_id(tmp_path: Path) -> None:
    for known in ("ab" * 16, "ab" * 4 + "cd" * 12, "ef" * 16):
        Journal.create(tmp_path / known[8:12], experiment="e", name=None, journal=known).close()
    assert find_folder(tmp_path, "ef" * 4) == tmp_path / "efef"
    assert find_folder(tmp_path, "ab" * 4 + "c") == tmp_path / "cdcd"
    assert find_folder(tmp_path, "ef" * 3) is None, "too short to mean an id"
    with pytest.raises(UserError, match=f"resume={'ab' * 4}: .* give one of {'ab' * 16}, {'ab' * 4 + 'cd' * 12}"):
        find_folder(tmp_path, "ab" * 4)
