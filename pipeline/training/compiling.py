"""Whether a run's networks go through torch.compile."""

import torch

from pipeline.config import Config

LONG = 40
"""`auto` compiles on a GPU for runs of at least so many epochs; compiling takes about a minute."""


def compiles(config: Config, device: torch.device) -> bool:
    """What `optim.compile` comes to here. On processors `auto` is off: in float32 nothing was gained (benchmarks/)."""
    asked = config.optim.compile
    if asked != "auto":
        return asked
    m = config.method
    epochs = sum(m.student_epochs_per_stage) + m.num_stages * m.teacher_adapt_epochs
    return device.type == "cuda" and epochs >= LONG
