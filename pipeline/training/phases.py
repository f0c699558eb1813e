"""What a task consists of: a plan of epochs, and phases, each with an objective and an optimiser."""

from dataclasses import dataclass
from typing import NamedTuple

from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from pipeline.data.augmentations import MixKind
from pipeline.training.objective import Objective


class Epoch(NamedTuple):
    """One epoch of the plan."""

    phase: str
    stage: int
    in_stage: int
    in_phase: int
    """a, b, or the fine-tuning epoch: the counter that random streams and schedules use."""
    overall: int
    """e: the step under which its metrics are logged."""
    first: bool
    last: bool


@dataclass
class Phase:
    """One kind of update: what is optimised, how, and the name of its metrics."""

    metrics: str
    objective: Objective
    optimizer: Optimizer
    scheduler: Scheduler
    mix: MixKind | None = None
    mix_alpha: float = 0.0
    repeats: int = 1
    """Updates per batch."""
    clip: float = 0.0
    """Bound of the gradient's norm; 0: none."""
    title: str = ""
    """What people call it, if not by the name of its metrics."""
