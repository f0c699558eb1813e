"""Keep freed memory with the process: on CPUs every layer allocates and frees megabytes.

glibc maps blocks above 32 MB (smaller ones too, at first) for each allocation and unmaps them when freed. Their
pages then come one fault at a time, zeroed, for every layer of every pass (benchmarks/README.md, «Page faults»).
"""

import ctypes

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Parameters of mallopt(3)."""
MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Reuse freed memory from now on instead of returning it to the system; return whether glibc accepted that.

    To be called once all data is in memory: what loading freed should be returned first. Allocators other than glibc's
    (jemalloc, musl, macOS) are left alone.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, MOST))
