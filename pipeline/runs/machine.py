"""`tracking.system_metrics`: what the machine does while a run works, named as MLflow's UI expects on its own tab."""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    import torch

    from pipeline.runs.run import Run

logger = logging.getLogger("asib")
EVERY_S = 10.0
MB = 1e6


@contextmanager
def watched(run: "Run") -> Iterator[None]:
    """Log readings to the run every `EVERY_S` seconds, and once at the end, where its configuration asks for them.

    Steps of these metrics are seconds since the run was first begun, so that a continued run goes on.
    """
    if not run.config.tracking.system_metrics:
        yield
        return
    from pipeline.training.devices import DEVICELESS, device_of  # late: it imports torch

    gpus = [] if run.step in DEVICELESS else gpus_of(device_of(run.config))
    ended = threading.Event()

    def watch() -> None:
        last = False
        while not last:
            last = ended.wait(EVERY_S)
            try:
                run.journal.metrics(readings(gpus), int(time.time() - run.journal.header.time / 1000))
            except (OSError, RuntimeError, UserError) as error:  # whoever needs the disk or the GPU says it better
                logger.warning("tracking.system_metrics ends: %s", error)
                return

    thread = threading.Thread(target=watch, name="system metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def gpus_of(device: "torch.device") -> list[int]:
    """The GPUs that the run's processes on this machine use: one for each rank."""
    if device.type != "cuda":
        return []
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return list(range(ranks)) if ranks > 1 else [device.index or 0]


def readings(gpus: list[int]) -> dict[str, float]:
    """Shares in percent, memory in 10⁶ bytes, power in watts; the processor has its share since the last call."""
    import psutil

    memory = psutil.virtual_memory()
    found = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MB,
        "system_memory_usage_percentage": memory.percent,
    }
    for gpu in gpus:
        import torch

        found |= {
            f"gpu_{gpu}_utilization_percentage": float(torch.cuda.utilization(gpu)),
            f"gpu_{gpu}_memory_usage_megabytes": torch.cuda.device_memory_used(gpu) / MB,
            f"gpu_{gpu}_power_usage_watts": torch.cuda.power_draw(gpu) / 1000,
        }
    return {f"system/{name}": value for name, value in found.items()}
