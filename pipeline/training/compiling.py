"""Whether a run's networks go through torch.compile, and what that takes."""

import torch

from pipeline.config import Config
from pipeline.errors import UserError

LONG = 40
"""`auto` compiles on a GPU for runs of at least so many epochs; compiling takes about a minute."""


def check_device(config: Config, device: torch.device) -> None:
    """UserError where `optim.compile` asks for what the device does not have."""
    if config.optim.compile == "graphs" and device.type != "cuda":
        raise UserError(
            f"optim.compile=graphs: CUDA graphs are a GPU's, and device={config.device} is {device.type} here; use "
            "optim.compile=true or auto"
        )


def compiles(config: Config, device: torch.device) -> bool:
    """What `optim.compile` comes to here.

    On processors `auto` is off: what it brings there is little (benchmarks/README.md), and it needs a C++ compiler.
    """
    asked = config.optim.compile
    if asked != "auto":
        return bool(asked)
    m = config.method
    epochs = sum(m.student_epochs_per_stage) + m.num_stages * m.teacher_adapt_epochs
    return device.type == "cuda" and epochs >= LONG


class CompileClock:
    """Counts what this process spends compiling from now on."""

    def __init__(self) -> None:
        self._before = _spent()

    def seconds(self) -> float:
        """By the clock on the wall: tracing, code generation and compilers, of forward and backward passes."""
        return _spent() - self._before


def _spent() -> float:
    """Since the process began. Torch keeps the sum, but has no public name for it."""
    from torch._dynamo.utils import calculate_time_spent  # late: a second, which eager runs need not wait

    return float(calculate_time_spent()["total_wall_time"])
