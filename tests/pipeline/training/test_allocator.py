"""Freed memory is used again: counted in page faults, in a process of its own."""

import json
import sys

import pytest

from tests.page_faults import PAGES, printed_by

TIMES = 20
PROGRAM = f"""
import json
from pipeline.training.allocator import keep_freed_memory
from tests.page_faults import faults
print(json.dumps([%s, faults({TIMES})]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize(("how", "expected"), [("kept", PAGES), ("plain", TIMES * PAGES)])
def test_pages_of_freed_blocks_are_taken_once(how: str, expected: int) -> None:
    kept, faults = json.loads(printed_by(PROGRAM % ("keep_freed_memory()" if how == "kept" else "None")))
    assert kept is (True if how == "kept" else None)
    assert faults == pytest.approx(expected, rel=0.05)
