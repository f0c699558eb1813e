"""What the loop drives: a task, its plan of epochs, and its phases, each with an objective and an optimiser."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from pipeline.config import OptimConfig
from pipeline.data.augmentations import MixKind
from pipeline.data.batches import Batch, TrainBatches
from pipeline.training.costs import Costs
from pipeline.training.objective import Objective


class Epoch(NamedTuple):
    """One epoch of the plan."""

    phase: str
    stage: int
    in_stage: int
    in_phase: int
    """a, b, or the fine-tuning epoch: the counter that random streams and schedules go by."""
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


class Task(Protocol):
    """What the loop drives."""

    plan: list[Epoch]
    phases: dict[str, Phase]
    batches: TrainBatches
    optim: OptimConfig
    costs: Costs

    def begin_phase(self, epoch: Epoch) -> None:
        """Called before the first batch of a phase; what it decides is part of the state."""

    def begin_epoch(self, epoch: Epoch) -> None:
        """Called before every epoch, also a continued one: set what follows from counters and state."""

    def end_epoch(self, epoch: Epoch) -> dict[str, float]:
        """Called after an epoch's last batch: evaluate, and return metrics."""

    def epoch_batches(self, epoch: Epoch, start: int) -> Iterator[Batch]:
        """The batches of an epoch from batch `start` on."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
