"""The real thing: the run, the task and the loop of `steps.distill`, stopped after every epoch to let others measure.

A round is one epoch of the run's plan. What is timed lies between the task's `begin_epoch` and `end_epoch`: the epoch's
random draws, all its updates with images, mixing and metrics, and the one reading of the sums. Evaluation, checkpoint
and delivery to MLflow follow as in any run, outside of that window; `benchmarks.overhead` says what they cost.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import update_bn

from benchmarks.steps.cases import Case, weights
from benchmarks.steps.clock import Window
from models.features import FeatureNet
from pipeline.data.sources import ImageData
from pipeline.distill import networks, teachers, train
from pipeline.errors import Pruned
from pipeline.runs.opening import open_run
from pipeline.training.checkpoint import Copy, Saved, Slots
from pipeline.training.loop import Loop, Verdict
from pipeline.training.methods.asib.task import AsibDistillation
from pipeline.training.optim import Precision
from pipeline.training.phases import Epoch
from pipeline.training.student import Distillation


class Clocked(Distillation):
    """The task of a distillation, with a clock around what is training and one around what is evaluation."""

    def __init__(self, window: Window, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.window, self.evaluation_seconds = window, 0.0

    def begin_epoch(self, epoch: Epoch) -> None:
        super().begin_epoch(epoch)
        self.window.open()

    def end_epoch(self, epoch: Epoch) -> dict[str, float]:
        self.window.shut()
        begun = time.perf_counter()
        found = super().end_epoch(epoch)
        self.evaluation_seconds = time.perf_counter() - begun
        return found


class ClockedDistillation(Clocked, AsibDistillation):
    """ASIB's."""


class ClockedSlots(Slots):
    """A run's checkpoints, with a clock in the thread that writes them and one around the waiting for it.

    A loop that is stopped after every epoch has to wait; one that continues does not.
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
    """A watch that ends every epoch like a pruner: its checkpoint is written, and `Loop.run` continues from there."""

    reason = "the benchmark's next contestant"

    def __call__(self, epoch: int, metrics: Mapping[str, float]) -> Verdict:
        return Verdict.PRUNE

    def still_ours(self) -> bool:
        return True


def next_epoch(loop: Loop) -> None:
    """Run the next epoch of a loop that `OneEpoch` watches."""
    with suppress(Pruned):
        loop.run()


class Ours:
    """A tracked run of the case, advanced epoch by epoch.

    Args:
        data: its training images make an epoch.
        rounds: stages of one A-epoch (with a fusion) and one B-epoch.
        more: overrides of the configuration.
        fused: refuse to measure a B-epoch whose gate is closed, which would leave the fusion out.
        window: the clock around training.
        batches: of an epoch; None: all that the images make.

    Attributes:
        evaluation_seconds, saving_seconds: of the last epoch: its evaluation; what its checkpoint and journal take of
            the training thread.
        slots: its clocks say how long the writer of the last checkpoint took.
    """

    def __init__(
        self,
        case: Case,
        data: ImageData,
        rounds: int,
        folder: Path,
        more: Sequence[str] = (),
        fused: bool = True,
        window: Window | None = None,
        batches: int | None = None,
    ) -> None:
        self.fused = fused
        if not weights(folder, 0).exists():
            make_teachers(case, data, folder)
        config = case.config(folder, rounds, more)
        train.prepare(config)
        device = networks.device_of(config)
        self.run = open_run("distill", config)
        self.slots = ClockedSlots(self.run.slots.folder)
        student = networks.build_student(config, data)
        taught = teachers.obtain(self.run, data, student)
        nets = [t.net for t in taught]
        made = ClockedDistillation if case.method == "asib" else Clocked
        self.task = made(window or Window(device), config, data, student, nets, device)
        self.task.batches.bounds = self.task.batches.bounds[:batches]
        header = {"threads": torch.get_num_threads(), "data_digest": data.digest, "teachers": [t.hash for t in taught]}
        precision = Precision(config.optim, device)
        self.loop = Loop(self.task, self.run.journal, self.slots, header, precision, device, watch=OneEpoch())
        self.run.ready()
        self.evaluation_seconds = self.saving_seconds = 0.0
        self.images = len(self.task.data.train.indices)

    def seconds(self, which: str) -> float:
        """Seconds of training in the run's next epoch, which must be of the phase `which`."""
        epoch = self.task.plan[self.loop.epoch]
        if epoch.phase != which:
            raise ValueError(f"the plan continues with an {epoch.phase}-epoch, not with {which}")
        begun, waited = time.perf_counter(), self.slots.waiting_seconds
        next_epoch(self.loop)
        whole = time.perf_counter() - begun - (self.slots.waiting_seconds - waited)
        self.evaluation_seconds = self.task.evaluation_seconds
        self.saving_seconds = whole - self.task.window.seconds - self.evaluation_seconds
        if self.fused and which == "b" and self.task.fusion is not None and not self.task.monitor.gate_open:
            raise RuntimeError("the gate is closed: the step would be measured without its fusion")
        return self.task.window.seconds

    def close(self) -> None:
        """End the run and its delivery."""
        self.run.close()


def make_teachers(case: Case, data: ImageData, folder: Path) -> list[FeatureNet]:
    """The case's teachers, untrained, with batch statistics of the data's images; their weights go to `folder`."""
    config = case.config(folder, 1)
    x = data.train_x[: case.batch].to(networks.device_of(config)).float().div(128).sub(1)
    x = x.contiguous(memory_format=torch.channels_last)
    made = [networks.build_teacher(config, data, index) for index in range(len(case.pair.teachers))]
    for index, net in enumerate(made):
        update_bn([x], net)  # its activations neither vanish nor overflow
        networks.save(net, weights(folder, index), config, data)
    return made
