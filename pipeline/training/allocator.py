"""Memory that was freed stays with the process: on processors, where every layer takes and frees tensors of megabytes.

glibc maps blocks above 32 MB (smaller ones too, at first) for each allocation and unmaps them when freed. Their
pages then come one fault at a time, zeroed, for every layer of every pass (benchmarks/README.md, «Page faults»).
"""

import ctypes

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Of mallopt(3)."""
MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """From now on freed memory is used again, never given back before the process ends.

    Called when all data is in memory: what loading frees should go back. Another allocator than glibc's (jemalloc,
    musl, macOS) is left as it is.

    Returns:
        Whether glibc took it.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, MOST))
