"""Page faults of a process that takes, fills and frees blocks: counted in one of its own, whose heap has no gaps."""

import ctypes
import resource
import subprocess
import sys
from pathlib import Path

PAGES = 40 * 2**20 // 4096
"""Of a block of 40 MB."""
ROOT = Path(__file__).resolve().parents[1]


def faults(times: int) -> int:
    """Page faults of this process while it takes and frees a block `times` times."""
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        block = libc.malloc(PAGES * 4096)
        ctypes.memset(block, 1, PAGES * 4096)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def printed_by(program: str) -> str:
    """What a fresh process prints that runs `program`; `from tests.page_faults import faults` works there."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout
