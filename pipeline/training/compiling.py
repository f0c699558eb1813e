"""Whether a run's networks go through torch.compile, and what that takes."""

import torch

from pipeline.config import Config
from pipeline.errors import UserError

LONG = 40
"""Epochs from which `auto` compiles on a GPU; compiling takes about a minute."""


def check_device(config: Config, device: torch.device) -> None:
    """Raise UserError if `optim.compile` asks for something that the device lacks."""
    if config.optim.compile == "graphs" and device.type != "cuda":
        raise UserError(
            f"optim.compile=graphs: CUDA graphs are a GPU's, and device={config.device} is {device.type} here; use "
            "optim.compile=true or auto"
        )


def compiles(config: Config, device: torch.device) -> bool:
    """Resolve `optim.compile` for this device.

    `auto` is off on CPUs: it gains little there (benchmarks/README.md) and needs a C++ compiler.
    """
    asked = config.optim.compile
    if asked != "auto":
        return bool(asked)
    epochs = config.method.b_epochs + config.method.a_epochs
    return device.type == "cuda" and epochs >= LONG


def compile_seconds() -> float:
    """Seconds that this process has spent compiling: tracing, code generation and compilers, for both passes.

    Torch keeps the sum, but has no public name for it: private API, checked with torch 2.14.1.
    """
    from torch._dynamo.utils import calculate_time_spent  # late: takes a second, which eager runs need not pay

    return float(calculate_time_spent()["total_wall_time"])
