"""Measuring fairly: windows that wait for the device, quiet between contestants, interleaved rounds, spread."""

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.training.allocator import MMAP_MAX, TRIM_THRESHOLD, keep_freed_memory

MMAP_THRESHOLD = -3
"""Of mallopt(3)."""
QUIET_SECONDS, QUIET_USE = 0.2, 0.02
"""Processes started here are at rest when, for QUIET_SECONDS, they use at most QUIET_USE seconds of processor time."""
LONGEST_WAIT = 8.0


class Window:
    """Seconds between `open` and `shut`: by CUDA events on a GPU, by the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0
        self._begun = 0.0
        self._events: tuple[Any, Any] | None = None

    def open(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            event: Any = torch.cuda.Event
            self._events = (event(enable_timing=True), event(enable_timing=True))
            self._events[0].record()
        self._begun = time.perf_counter()

    def shut(self) -> float:
        """The seconds; on a GPU from event to event, once the second one has come to pass."""
        if self._events is None:
            self.seconds = time.perf_counter() - self._begun
            return self.seconds
        self._events[1].record()
        torch.cuda.synchronize(self.device)
        self.seconds = max(self._events[0].elapsed_time(self._events[1]) / 1000, 1e-9)
        self._events = None
        return self.seconds


@contextmanager
def algorithms(deterministic: bool) -> Iterator[None]:
    """Whether torch takes only deterministic kernels; the bare limit and the plain loop are not held to that."""
    before, searched = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = searched


@contextmanager
def untouched_memory(device: torch.device) -> Iterator[None]:
    """glibc's allocator as the plain loop would have it: what this process keeps by ours is given back before.

    A process that leaves the allocator alone comes to these limits, at most, by what it frees (mallopt(3)). Gaps in
    the heap stay with the process, more than the plain loop alone would have.
    """
    if device.type != "cpu" or not keep_freed_memory():  # another allocator than glibc's
        yield
        return
    libc = ctypes.CDLL("libc.so.6")
    for limit, value in ((MMAP_MAX, 65536), (MMAP_THRESHOLD, 32 << 20), (TRIM_THRESHOLD, 64 << 20)):
        libc.mallopt(limit, value)
    libc.malloc_trim(0)
    try:
        yield
    finally:
        keep_freed_memory()


def interleaved(
    contestants: Mapping[str, Callable[[], float]], rounds: int, before: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """What each contestant returns in each round; every round begins with another one, so that drift hits all alike.

    Args:
        before: called before each contestant's turn.
    """
    names = list(contestants)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            before()
            found[name].append(contestants[name]())
    return found


def spread(values: Sequence[float], digits: int = 2) -> dict[str, Any]:
    """Median, least, greatest and all values."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "rounds": [round(value, digits) for value in values],
    }


def ratios(values: Sequence[float], to: Sequence[float]) -> dict[str, Any]:
    """Of two contestants, round by round."""
    return spread([value / other for value, other in zip(values, to, strict=True)], 4)


def wait_until_quiet() -> None:
    """Wait for the processes that this one has started (delivery, loader workers) to come to rest."""
    end = time.monotonic() + LONGEST_WAIT
    used = processor_seconds(descendants())
    while time.monotonic() < end:
        time.sleep(QUIET_SECONDS)
        now = processor_seconds(descendants())
        if now - used <= QUIET_USE:
            return
        used = now


def descendants() -> list[int]:
    """Processes started by this one, and by those."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        fields = _stat(int(name)) if name.isdecimal() else None
        if fields is not None:
            parents[int(name)] = int(fields[1])
    found, ask = [], [os.getpid()]
    while ask:
        children = [pid for pid, parent in parents.items() if parent == ask[-1]]
        ask.pop()
        found += children
        ask += children
    return found


def processor_seconds(pids: Sequence[int]) -> float:
    """User and system time that processes have used; those that have ended count nothing."""
    tick = os.sysconf("SC_CLK_TCK")
    fields = [_stat(pid) for pid in pids]
    return sum((int(f[11]) + int(f[12])) / tick for f in fields if f is not None)


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat from the state on: the third of the manual is the first here."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None
