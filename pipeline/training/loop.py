"""The one training loop: fine-tuning, A-steps and B-steps are phases of a task that it drives epoch by epoch.

The loop owns updates, precision, non-finite steps, checkpoints, interruption and the position in the run; a task owns
networks, objectives and what happens between epochs.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.errors import Interrupted, NonFinite, Pruned, Taken
from pipeline.journal import CheckpointRecorder
from pipeline.training import distributed
from pipeline.training.allocator import keep_freed_memory
from pipeline.training.checkpoint import Slots
from pipeline.training.nonfinite import Kept, statistics, update_average
from pipeline.training.objective import Moment
from pipeline.training.optim import Precision, restore_optimizer, update
from pipeline.training.phases import Epoch, Phase
from pipeline.training.run_data import Task

logger = logging.getLogger("asib")


class Watch(Protocol):
    """A trial's pruner: sees every epoch's metrics before they are kept, and may end the run."""

    reason: str
    """Why the run was pruned."""

    def __call__(self, epoch: int, metrics: Mapping[str, float]) -> "Verdict":
        """`epoch`: the one that `metrics` are logged under. Called in the first process only."""

    def still_ours(self) -> bool:
        """Whether this process may still write the run's record."""


class Verdict(IntEnum):
    """What happens to a run after an epoch."""

    GO_ON = 0
    PRUNE = 1
    LEAVE = 2
    """Another worker has the trial: leave without writing anything more."""


ACCURACIES = ("student/acc", "synergy/acc", "teacher/acc")
QUIET_S = 5.0
"""How long the log is silent between two epochs at least."""


def _title(phase: Phase, epoch: Epoch) -> str:
    return f"{phase.title or phase.metrics} {epoch.in_phase + 1}"


def add(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Add to running sums of an epoch's terms, which stay on the device, in float64."""
    for name, value in values.items():
        value = value.detach().to(torch.float64)
        sums[name] = sums[name] + value if name in sums else value


@dataclass
class Loop:
    """Drives a task from its position to the end of its plan.

    Args:
        task: networks, phases, plan.
        recorder: the run's journal.
        slots: where checkpoints go; None: nowhere (all processes but the first).
        header: what every checkpoint states about the run (hashes, threads).
        stop: the number of a signal that arrived, or 0.
        every_seconds: how often to write a checkpoint within long epochs.
        watch: may end the run after an epoch.
    """

    task: Task
    recorder: CheckpointRecorder
    slots: Slots | None
    header: dict[str, Any]
    precision: Precision
    device: torch.device
    stop: Callable[[], int] = lambda: 0
    every_seconds: float = 600.0
    watch: Watch | None = None
    epoch: int = 0
    batch: int = 0
    finished: bool = False
    sums: dict[str, Tensor] = field(default_factory=dict)
    _streak: Tensor = field(init=False)
    """Non-finite steps in a row, on the device."""
    _told: float = 0.0
    """When the log last said how training goes."""

    def __post_init__(self) -> None:
        self._streak = torch.zeros((), device=self.device)

    # state -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        scaler = self.precision.scaler
        return {
            "header": self.header,
            "position": {"epoch": self.epoch, "batch": self.batch, "streak": int(self._streak)},
            "finished": self.finished,
            "sums": self.sums,
            "costs": self.task.costs.state_dict(),
            "optimizers": {name: phase.optimizer.state_dict() for name, phase in self.task.phases.items()},
            "scaler": scaler.state_dict() if scaler is not None else None,
            "task": self.task.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        position = state["position"]
        self.epoch, self.batch = position["epoch"], position["batch"]
        self._streak = torch.tensor(float(position["streak"]), device=self.device)
        self.finished = state["finished"]
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.task.costs.load_state_dict(state["costs"])
        for name, phase in self.task.phases.items():
            restore_optimizer(phase.optimizer, state["optimizers"][name])
        if self.precision.scaler is not None and state["scaler"] is not None:
            self.precision.scaler.load_state_dict(state["scaler"])
        self.task.load_state_dict(state["task"])

    def _save(self, metrics: dict[str, float] | None, step: int) -> None:
        """Begin a checkpoint of the current state that covers the metrics; it is written while training continues."""
        if self.slots is None:
            return
        self._settle()
        if metrics:
            self.recorder.metrics(metrics, step)
        self.slots.write({**self.state_dict(), "journal": self.recorder.snapshot()})

    def _settle(self, wait: bool = True) -> None:
        """Record the pending checkpoint and what it covers, if it has been written; `wait`: wait until it has.

        Raises:
            UserError: it could not be written.
        """
        saved = None if self.slots is None else self.slots.settle(wait)
        if saved is not None:
            self.recorder.checkpoint(*saved)

    # running ---------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end of the plan. However this ends, no checkpoint is still being written afterwards.

        Raises:
            Interrupted, NonFinite, Pruned, Taken.
            UserError: a checkpoint could not be written.
        """
        plan, batches = self.task.plan, len(self.task.batches)
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.slots is not None:
            self.recorder.hold()  # an epoch's entries wait for the checkpoint that covers them
        done = self.epoch * batches + self.batch
        # tqdm hides itself without a terminal
        with tqdm(total=len(plan) * batches, initial=done, disable=None, unit="batch", leave=False) as bar:
            try:
                while self.epoch < len(plan):
                    self._run_epoch(plan[self.epoch], bar)
            except Taken:
                if self.slots is not None:
                    self.slots.settle()  # but not recorded: the record belongs to another process now
                raise
            finally:
                self._settle()

    def finish(self, results: dict[str, float]) -> None:
        """Log the final metrics, covered by a last checkpoint: a run continued from it does not log them again."""
        try:
            if not self.finished:
                self.finished = True
                self._save(results, max(len(self.task.plan) - 1, 0))
        finally:
            self._settle()
        self.recorder.release()

    def _run_epoch(self, epoch: Epoch, bar: Any) -> None:
        task, phase = self.task, self.task.phases[epoch.phase]
        bar.set_description(f"{_title(phase, epoch)} (epoch {epoch.overall + 1}/{len(task.plan)})")
        if epoch.first and self.batch == 0:
            task.begin_phase(epoch)
        task.begin_epoch(epoch)
        phase.objective.train()
        first, saved = self.batch, time.monotonic()
        task.costs.start(self.device)
        for output in self._updates(epoch, phase):
            add(self.sums, output)
            bar.update()
            self._settle(wait=False)
            # several processes must agree on when to stop; since that costs time, they do so every 20 batches
            if self.batch == len(task.batches) or (distributed.world().size > 1 and self.batch % 20):
                continue
            if distributed.anyone(bool(self.stop()) or time.monotonic() - saved > self.every_seconds):
                task.costs.lap()
                self._leave_if_taken()
                self._save(None, epoch.overall)
                saved = time.monotonic()
                self._leave_if_stopped()
        before = task.costs.seconds
        task.costs.lap()
        images = sum(stop - start for start, stop in task.batches.bounds[first:])
        metrics = self._means(phase)
        metrics |= task.end_epoch(epoch)
        metrics["train/images_per_second"] = images / max(task.costs.seconds - before, 1e-9)
        metrics["schedule/lr"] = phase.optimizer.param_groups[0]["lr"]
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, {}
        self._tell(epoch, phase, metrics, bar)
        verdict = self._verdict(epoch.overall, metrics)
        if verdict == Verdict.LEAVE:
            raise Taken
        self._save(metrics, epoch.overall)
        if verdict == Verdict.PRUNE:
            assert self.watch is not None
            raise Pruned(epoch.overall, self.watch.reason)
        self._leave_if_stopped()

    def _tell(self, epoch: Epoch, phase: Phase, metrics: Mapping[str, float], bar: Any) -> None:
        """Show how training goes: beside the bar, or without a terminal in a line every few seconds."""
        shown = {"loss": metrics.get(f"{phase.metrics}/loss")} | {name: metrics.get(name) for name in ACCURACIES}
        words = ", ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)
        bar.set_postfix_str(words)
        now, last = time.monotonic(), epoch.overall + 1 == len(self.task.plan)
        if bar.disable and (last or now - self._told > QUIET_S):
            self._told = now
            logger.info("epoch %d/%d (%s): %s", epoch.overall + 1, len(self.task.plan), _title(phase, epoch), words)

    def _verdict(self, epoch: int, metrics: Mapping[str, float]) -> Verdict:
        """Ask in the first process, and tell all."""
        if self.watch is None:
            return Verdict.GO_ON
        found = self.watch(epoch, metrics) if distributed.world().rank == 0 else Verdict.GO_ON
        return distributed.first_process_says(found)

    def _leave_if_taken(self) -> None:
        if self.watch is not None:
            ours = distributed.world().rank > 0 or self.watch.still_ours()
            if not distributed.first_process_says(ours):
                raise Taken

    def _leave_if_stopped(self) -> None:
        if distributed.anyone(bool(self.stop())):
            self._settle()
            distributed.barrier()  # torchrun soon kills the first process once another one has left
            raise Interrupted(self.stop() or 15)

    def _updates(self, epoch: Epoch, phase: Phase) -> Iterator[dict[str, Tensor]]:
        """Make the rest of an epoch's updates; yield each batch's terms."""
        task, size, repeats = self.task, distributed.world().size, phase.repeats
        kept = Kept(statistics(phase.objective.trained))
        for batch in task.epoch_batches(epoch, self.batch):
            images, total = batch.global_size / size, dict[str, Tensor]()
            for repeat in range(repeats):
                done = (epoch.in_phase * len(task.batches) + self.batch) * repeats + repeat
                phase.scheduler.step_update(done)
                moment = Moment(epoch.phase, epoch.in_phase, self.batch)
                kept.save()
                with task.costs.counting(), self.precision.autocast():
                    output = phase.objective(batch, moment, repeat)
                bad = update(phase, output["loss"], self.precision, kept)
                with task.costs.counting():
                    phase.objective.updated(bad, phase.optimizer.param_groups[0]["lr"])
                task.costs.updated(epoch.phase)
                if phase.objective.has_ema() and (done + 1) % task.optim.ema_update_every == 0:
                    update_average(phase.objective, (done + 1) // task.optim.ema_update_every, bad)
                terms = {k: v.detach() for k, v in output.items() if k != "output"}
                self._end_if_diverged(bad, epoch, terms, batch.index)
                add(total, {k: v * images for k, v in terms.items()})
                add(total, {"images": torch.tensor(images, device=self.device), "nonfinite": bad / size})
            self.batch += 1
            yield total

    def _end_if_diverged(self, bad: Tensor, epoch: Epoch, terms: dict[str, Tensor], index: Tensor) -> None:
        """End the run after `safe_retry_patience` bad steps in a row; a GPU is synchronised only that often."""
        patience, done = self.task.optim.safe_retry_patience, self.batch + 1
        self._streak = (self._streak + 1) * bad
        if self.device.type != "cpu" and done % patience and done < len(self.task.batches):
            return
        if self._streak >= patience:
            values = ", ".join(f"{k}={v.item():.4g}" for k, v in terms.items())
            raise NonFinite(
                f"{int(self._streak)} non-finite steps in a row at {epoch.phase}-epoch {epoch.in_phase + 1}, batch "
                f"{done}: {values}; images {index[:8].tolist()}…: lower the learning rate, or use_amp=false"
            )

    def _means(self, phase: Phase) -> dict[str, float]:
        """One transfer: the sums over all processes, as means over the images."""
        numbers = distributed.total(torch.stack([*self.sums.values()])).tolist() if self.sums else []
        totals = dict(zip(self.sums, numbers, strict=True))
        images, nonfinite = totals.pop("images", 0.0), totals.pop("nonfinite", 0.0)
        means = phase.objective.summarise({k: v / max(images, 1.0) for k, v in totals.items()})
        return {f"{phase.metrics}/{k}": v for k, v in means.items()} | {"train/nonfinite_steps": nonfinite}
