"""The real thing: the run, the task and the loop of `steps.distill`, stopped after every epoch to let others measure.

A round is one epoch of the run's plan. What is timed lies between the task's `begin_epoch` and `end_epoch`: the epoch's
random draws, all its updates with images, mixing and metrics, and the one reading of the sums. Evaluation, checkpoint
and delivery to MLflow follow as in any run, outside of that window; `benchmarks.overhead` says what they cost.
"""

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks.steps.cases import Case, settle, weights
from benchmarks.steps.clock import Window
from models.features import FeatureNet
from pipeline.config import Config
from pipeline.data.sources import ImageData
from pipeline.distill import networks, teachers, train
from pipeline.errors import Pruned
from pipeline.runs.opening import open_run
from pipeline.runs.run import Run
from pipeline.training.checkpoint import Copy, Saved, Slots
from pipeline.training.loop import Loop, Verdict
from pipeline.training.methods.asib.task import Distillation
from pipeline.training.optim import Precision
from pipeline.training.phases import Epoch


class ClockedDistillation(Distillation):
    """The task of a distillation, with a clock around what is training and one around what is evaluation."""

    window: Window
    evaluation_seconds: float = 0.0

    def begin_epoch(self, epoch: Epoch) -> None:
        super().begin_epoch(epoch)
        self.window.open()

    def end_epoch(self, epoch: Epoch) -> dict[str, float]:
        self.window.shut()
        begun = time.perf_counter()
        found = super().end_epoch(epoch)
        self.evaluation_seconds = time.perf_counter() - begun
        return found


class ClockedSlots(Slots):
    """A run's checkpoints, with a clock in the thread that writes them and one around the waiting for it.

    A loop that is stopped after every epoch has to wait; one that goes on does not.
    """

    writing_seconds = writer_processor_seconds = waiting_seconds = 0.0

    def settle(self, wait: bool = True) -> Saved | None:
        begun = time.perf_counter()
        saved = super().settle(wait)
        self.waiting_seconds += time.perf_counter() - begun
        return saved

    def _write(self, state: Copy) -> Saved:
        begun, used = time.perf_counter(), time.thread_time()
        saved = super()._write(state)
        self.writing_seconds = time.perf_counter() - begun
        self.writer_processor_seconds = time.thread_time() - used
        return saved


class OneEpoch:
    """A watch that ends every epoch as a pruner would: its checkpoint is written, and `Loop.run` goes on from there."""

    reason = "the benchmark's next contestant"

    def __call__(self, epoch: int, metrics: Mapping[str, float]) -> Verdict:
        return Verdict.PRUNE

    def still_ours(self) -> bool:
        return True


class Ours:
    """A tracked run of the case, advanced epoch by epoch.

    Args:
        data: its training images make an epoch.
        rounds: stages of one A-epoch (with a fusion) and one B-epoch.
        more: overrides of the configuration.
        fused: refuse to measure a B-epoch whose gate is closed, which would leave the fusion out.

    Attributes:
        evaluation_seconds, saving_seconds: of the last epoch: its evaluation; what its checkpoint and journal take of
            the training thread.
        slots: whose clocks say what the last checkpoint took of its writer.
    """

    def __init__(
        self,
        case: Case,
        data: ImageData,
        rounds: int,
        folder: Path,
        device: torch.device,
        more: tuple[str, ...] = (),
        fused: bool = True,
    ) -> None:
        self.fused = fused
        if not weights(folder, 0).exists():
            make_teachers(case, data, folder, device)
        self.config = case.config(folder, rounds, str(device), more)
        train.prepare(self.config)
        self.run = open_run("distill", self.config)
        self.slots = ClockedSlots(self.run.slots.folder)
        self.loop, self.task = make_loop(self.run, self.config, data, device, self.slots)
        self.run.ready()
        self.evaluation_seconds = self.saving_seconds = 0.0
        self.images = len(self.task.data.train.indices)

    def seconds(self, which: str) -> float:
        """Of the training in the run's next epoch, which must be of the phase `which`."""
        epoch = self.task.plan[self.loop.epoch]
        if epoch.phase != which:
            raise ValueError(f"the plan continues with an {epoch.phase}-epoch, not with {which}")
        train.prepare(self.config)  # others in this process train without
        self.slots.waiting_seconds = 0.0
        begun = time.perf_counter()
        with suppress(Pruned):  # by `OneEpoch`
            self.loop.run()
        whole = time.perf_counter() - begun - self.slots.waiting_seconds
        self.evaluation_seconds = self.task.evaluation_seconds
        self.saving_seconds = whole - self.task.window.seconds - self.evaluation_seconds
        if self.fused and which == "b" and self.task.fusion is not None and not self.task.monitor.gate_open:
            raise RuntimeError("the gate is closed: the step would be measured without its fusion")
        return self.task.window.seconds

    def close(self) -> None:
        """End the run and its delivery."""
        self.run.close()


def make_loop(
    run: Run, config: Config, data: ImageData, device: torch.device, slots: Slots
) -> tuple[Loop, ClockedDistillation]:
    """Build a run's loop as `distill` and `train` do, with a watch that stops it after every epoch."""
    student = networks.build_student(config, data)
    found = teachers.obtain(run, data, student)
    task = ClockedDistillation(config, data, student, [t.net for t in found], device)
    task.window = Window(device)
    header = {"threads": torch.get_num_threads(), "data_digest": data.digest, "teachers": [t.hash for t in found]}
    precision = Precision(config.optim, device)
    every = config.checkpoint.every_seconds
    return Loop(task, run.journal, slots, header, precision, device, every_seconds=every, watch=OneEpoch()), task


def make_teachers(case: Case, data: ImageData, folder: Path, device: torch.device) -> list[FeatureNet]:
    """The case's teachers, untrained, with batch statistics of the data's images; their weights go to `folder`."""
    config = case.config(folder, 1, str(device))
    x = data.train_x[: case.batch].to(device).float().div(128).sub(1).contiguous(memory_format=torch.channels_last)
    made = [networks.build_teacher(config, data, index) for index in range(len(case.pair.teachers))]
    for index, net in enumerate(made):
        settle(net, x)
        networks.save(net, weights(folder, index), config, data)
    return made
