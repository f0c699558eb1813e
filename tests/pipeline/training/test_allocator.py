"""Freed memory is used again: counted in page faults, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = 40 * 2**20 // 4096
"""Of a block of 40 MB."""
TIMES = 20
PROGRAM = f"""
import ctypes, json, resource, sys
from pipeline.training.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "kept" else None
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({TIMES}):
    block = libc.malloc({PAGES} * 4096)
    ctypes.memset(block, 1, {PAGES} * 4096)
    libc.free(block)
print(json.dumps([kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize(("how", "expected"), [("kept", PAGES), ("plain", TIMES * PAGES)])
def test_pages_of_freed_blocks_are_taken_once(how: str, expected: int) -> None:
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], cwd=root, capture_output=True, text=True, check=True)
    kept, faults = json.loads(done.stdout)
    assert kept is (True if how == "kept" else None)
    assert faults == pytest.approx(expected, rel=0.05)
