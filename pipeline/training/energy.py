"""Joules that a machine's own meters count: RAPL of its processors (Linux), NVML of an NVIDIA GPU.

Both are running totals, so a difference costs two readings, and nothing has to run in between. RAPL counts whole
processors and their memory: what other programs use is in it.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.training import distributed

POWERCAP = Path("/sys/class/powercap")


class Meter(NamedTuple):
    """A running total.

    Attributes:
        of: "cpu" or "gpu".
        read: its value; raises OSError.
        unit: joules of 1.
        ends: the value after which it starts again at 0: seldom less than ten minutes away.
    """

    of: str
    read: Callable[[], int]
    unit: float
    ends: int


class Meters:
    """The meters of what this process trains on; of a machine's processors in its first process only."""

    def __init__(self, device: torch.device) -> None:
        found = list(_processors()) if distributed.world().local_rank == 0 else []
        self._meters = found + (list(_gpu(device)) if device.type == "cuda" else [])
        self._before: list[int] | None = None
        self.used()

    def used(self) -> dict[str, float]:
        """Joules since this was last asked, by what used them; empty where nothing can be read."""
        try:
            now = [meter.read() for meter in self._meters]
        except (OSError, ValueError):
            self._before = None
            return {}
        before, self._before = self._before or now, now
        found: dict[str, float] = {}
        for meter, a, b in zip(self._meters, before, now, strict=True):
            found[meter.of] = found.get(meter.of, 0.0) + (b - a) % meter.ends * meter.unit
        return found


def _processors() -> Iterator[Meter]:
    """Packages, and memory where it is metered apart; other zones are parts of a package or contain it."""
    for zone in sorted(POWERCAP.glob("intel-rapl:*")):  # AMD's are called so too
        with contextlib.suppress(OSError, ValueError):
            if (zone / "name").read_text().strip().startswith(("package", "dram")):
                read = partial(_number, zone / "energy_uj")
                read()  # most systems show it to root alone
                yield Meter("cpu", read, 1e-6, _number(zone / "max_energy_range_uj"))


def _number(file: Path) -> int:
    return int(file.read_text())


def _gpu(device: torch.device) -> Iterator[Meter]:
    """By NVML's C interface, since its Python package is not among the project's; none for a part of a GPU (MIG)."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return
    handle, value = ctypes.c_void_p(), ctypes.c_ulonglong()
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()

    def read() -> int:
        if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(value)):
            raise OSError("this GPU has no meter")
        return value.value

    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
        return
    with contextlib.suppress(OSError):
        read()
        yield Meter("gpu", read, 1e-3, 2**64)
