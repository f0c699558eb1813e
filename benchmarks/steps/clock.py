"""Measuring fairly: windows that wait for the device, quiet between contestants, interleaved rounds, spread."""

import ctypes
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import psutil
import torch

from pipeline.training.allocator import MMAP_MAX, TRIM_THRESHOLD, keep_freed_memory

K = TypeVar("K")
T = TypeVar("T")
MMAP_THRESHOLD = -3
"""Parameter of mallopt(3)."""
QUIET_SECONDS, QUIET_USE = 0.2, 0.02
"""Processes started here are at rest when, for QUIET_SECONDS, they use at most QUIET_USE seconds of processor time."""
LONGEST_WAIT = 8.0
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
"""What windows read. This process's processor time says more where others use the machine, but nothing of workers."""


class Window:
    """Seconds between `open` and `shut`; both wait until the device has finished its work."""

    clock = staticmethod(CLOCKS["wall"])

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def open(self) -> None:
        self._begun = self._now()

    def shut(self) -> float:
        """Close the window and return its seconds."""
        self.seconds = self._now() - self._begun
        return self.seconds

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()


def timed(device: torch.device, act: Callable[[], object], times: int = 1) -> float:
    """The seconds that `times` calls take."""
    window = Window(device)
    window.open()
    for _ in range(times):
        act()
    return window.shut()


@contextmanager
def algorithms(deterministic: bool) -> Iterator[None]:
    """Set whether torch uses deterministic kernels only; the bare limit and the plain loop need not."""
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


def in_turn(names: Iterable[K], number: int) -> list[K]:
    """The order of a round: each begins with a different contestant, so that drift affects all alike."""
    order = deque(names)
    order.rotate(-number)
    return list(order)


def interleaved(contestants: Mapping[K, Callable[[], T]], rounds: int) -> dict[K, list[T]]:
    """What each contestant returns in each round."""
    found: dict[K, list[T]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in in_turn(contestants, number):
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
    """Ratios of two contestants, round by round."""
    return spread([value / other for value, other in zip(values, to, strict=True)], 4)


def wait_until_quiet() -> None:
    """Wait for the processes that this one has started (delivery, loader workers) to come to rest."""
    end = time.monotonic() + LONGEST_WAIT
    used = children_seconds()
    while time.monotonic() < end:
        time.sleep(QUIET_SECONDS)
        now = children_seconds()
        if now - used <= QUIET_USE:
            return
        used = now


def children_seconds() -> float:
    """Processor time that the processes started by this one, and by those, have used; only those that still run."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total
