"""What every worker does, whatever its work: it handles signals, and delivers its runs for the run that started it."""

import gc
import os
import secrets
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.journal import Carrier
from pipeline.launch.entry import PREEMPTION
from pipeline.runs.run_log import log_to_terminal
from pipeline.runs.signals import Stop

if TYPE_CHECKING:
    from pipeline.runs.run import Run


def begin() -> Stop:
    """Make this process a worker's; return what knows its signals."""
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):  # the driver's, not the worker's
        os.environ.pop(name, None)
    log_to_terminal()
    stop = Stop()
    stop.install()
    signal.signal(PREEMPTION, stop.arrived)
    return stop


def carrier(config: Config, home: Path, stands_for: Carrier, stop: Stop) -> "Run":
    """What a worker has instead of a run: its nested runs become those of `stands_for`, the driver's.

    `home`: where workers have their folders, named after host and process. Close it in the end: that waits until its
    delivery has sent the rest.
    """
    from pipeline.runs import opening  # late: it imports torch

    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
    return opening.carrier(config, home / "workers" / name, stands_for, stop)


def free_memory() -> None:
    """Give back what this process no longer needs of its GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
