"""What a trial's training asks after each epoch: report it to the study, go on, be pruned, or leave."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import Taken
from pipeline.sweep.space.space import SweepConfig
from pipeline.sweep.study.claim import Claim

if TYPE_CHECKING:
    from pipeline.training.loop import Verdict


class TrialWatch:
    """Report a trial's epochs to the study, and tell when it is pruned or taken by another worker.

    Of a trial with several seeds no epochs are reported: its pruner compares whole seeds.
    """

    def __init__(self, claim: Claim, sweep: SweepConfig, folder: Path) -> None:
        self.reason = ""
        self._claim, self._folder, self._linked = claim, folder, False
        self._metric = sweep.objectives[0].reported if len(sweep.objectives) == sweep.seeds == 1 else None
        self._pruner = sweep.pruner.name

    def __call__(self, epoch: int, metrics: Mapping[str, float]) -> "Verdict":
        from pipeline.training.loop import Verdict

        try:
            if not self._linked:
                self._linked = note_run(self._claim, self._folder)
            value = metrics.get(self._metric) if self._metric else None
            if value is None or not math.isfinite(value):  # a mean spoilt by one skipped step is meaningless
                self._claim.check()
                return Verdict.GO_ON
            self._claim.report(value, epoch)
            if not self._claim.should_prune():
                return Verdict.GO_ON
        except Taken:
            return Verdict.LEAVE
        self.reason = f"{self._metric} {value:.4g} was too low for the {self._pruner} pruner"
        return Verdict.PRUNE

    def still_ours(self) -> bool:
        try:
            self._claim.check()
        except Taken:
            return False
        return True


class Silent:
    """The watch of torchrun's other processes, which follow the first one's decisions."""

    reason = ""

    def __call__(self, epoch: int, metrics: Mapping[str, float]) -> "Verdict":
        raise RuntimeError("only the first process asks")

    def still_ours(self) -> bool:
        raise RuntimeError("only the first process asks")


def note_run(claim: Claim, folder: Path) -> bool:
    """Link the trial to its MLflow run once delivery knows it; training does not wait for it."""
    from pipeline.runs import records

    run_id = records.delivered_as(folder)
    if run_id:
        claim.note(run_id=run_id)
    return bool(run_id)
