"""What a sweep will cost in time and disk, from a few real updates of a trial's own phases, before it starts."""

import copy
import hashlib
import math
import shutil
import tempfile
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import nn

from models.features import FeatureNet
from pipeline.config import Config
from pipeline.data.batches import Batch, EpochDraws, Seen, batch_bounds
from pipeline.data.sources import ImageData
from pipeline.data.views import Views
from pipeline.distill import networks
from pipeline.distill.train import ALL_THREADS
from pipeline.journal import CheckpointRecorder
from pipeline.sweep.launch.local import cores
from pipeline.training.bank.cache import BankCache
from pipeline.training.bank.lookup import WINDOW
from pipeline.training.bank.policy import bank_use, different, shared
from pipeline.training.checkpoint import pack
from pipeline.training.evaluation import unchecked
from pipeline.training.loop import Epoch, Loop, Precision
from pipeline.training.methods.asib.task import Distillation

UPDATES_S, EVALUATION_S = 3.0, 1.0
"""How long may be measured: updates of all kinds of epochs, and evaluation."""
TIMED = 6
"""Batches of each kind that are timed, after one to warm up."""
SMALL = 16
"""Images of a first, small batch, which tells whether whole batches can be afforded."""
AROUND_S = 2.0
"""What a trial takes beside training and evaluation, at most (benchmarks/)."""
OTHER_BYTES = 1_000_000
"""Journal, configuration, log, difference to the commit, results."""


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes of one trial, and of all `trials` on `workers`; bytes are those of the folders of the runs.

    Attributes:
        filling: seconds, among `seconds`, until a bank that begins empty has what trials share; 0 without one.
    """

    seconds_per_trial: float
    seconds: float
    bytes_per_trial: int
    bytes: int
    trials: int
    workers: int
    filling: float = 0.0


@dataclass(frozen=True)
class Work:
    """What one trial does.

    Attributes:
        batches: kind of epoch -> batches of all epochs of that kind.
        images: network -> images that it sees in evaluations. The fusion, which works on their features, is left out.
        checkpoints: how many are written.
        asked: images that the teachers are asked about in training.
    """

    batches: Mapping[Hashable, int]
    images: Mapping[str, int]
    checkpoints: int
    asked: int = 0


@dataclass(frozen=True)
class Rates:
    """Measured seconds: of a batch of each kind of epoch, of an image in evaluation, of a checkpoint.

    Attributes:
        looked_up: of an image that all teachers are asked about, where a bank answers and batches leave them out.
    """

    batch: Mapping[Hashable, float]
    image: Mapping[str, float]
    checkpoint: float
    looked_up: float = 0.0

    def seconds(self, work: Work) -> float:
        """Of one trial."""
        training = sum(n * self.batch[kind] for kind, n in work.batches.items()) + work.asked * self.looked_up
        evaluation = sum(n * self.image[name] for name, n in work.images.items())
        return AROUND_S + training + evaluation + work.checkpoints * self.checkpoint


def estimate(
    config: Config, data: ImageData, teachers: Sequence[FeatureNet], trials: int, workers: int, seeds: int = 1
) -> Estimate:
    """Measure what a trial of `config` takes, in about five seconds.

    The base configuration is measured with its gate open and every epoch in it; what the search space changes of the
    cost (networks, epochs) is not foreseen. Where trials share a teacher bank, what fills it counts once and is taken
    to begin with nothing. Teachers and all random states are left as they are.

    Args:
        teachers: those of the configuration, on its device.
        trials: how many are left to be run.
        workers: at a time, on this machine: its threads are divided among them.
        seeds: that these trials have: those of another seed ask for other views.
    """
    banked = bank_use(shared(config)).on
    threads = config.threads or min(ALL_THREADS, max(1, cores() // workers))  # as launch_local divides them
    with _undisturbed(threads):
        whole = _Probe(config, data, teachers, config.dataset.batch_size, banked)
        small = _Probe(config, data, teachers, SMALL, banked) if config.dataset.batch_size > SMALL else whole
        rates = _rates(whole, small)
        size = small.bytes()
    does = work(whole.task)
    filling = 0.0
    if banked:
        with _undisturbed(torch.get_num_threads()):  # with several workers the driver does it, which is this process
            filling = _views(whole.task, does, seeds) * small.teachers_seconds()
    crowded = max(1.0, workers * threads / cores()) if whole.task.device.type == "cpu" else 1.0
    each = rates.seconds(does) * crowded
    together = filling + math.ceil(trials / workers) * each
    return Estimate(each, together, size, trials * size, trials, workers, filling)


@contextmanager
def _undisturbed(threads: int) -> Iterator[None]:
    """With as many threads as a worker has; the generators' states and the number of threads are restored."""
    before = torch.get_num_threads()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


# what a trial does ---------------------------------------------------------------------------------------------------


def work(task: Distillation) -> Work:
    """Count what a run of the task's plan does, as a sweep's trial: the test split is not seen."""
    batches = len(batch_bounds(len(task.data.train.indices), task.data.train.batch_size))
    by_kind = kinds(task)
    counted: dict[Hashable, int] = {kind: len(epochs) * batches for kind, epochs in by_kind.items()}
    m, evaluated = task.method, len(task.data.eval.labels)
    adapted = sum(e.phase == "a" and ((e.in_stage + 1) % m.teacher_eval_every == 0 or e.last) for e in task.plan)
    # a student that no B-epoch has changed since is not evaluated again
    alone = int(adapted > 0 and task.plan[0].phase == "a")
    distilled = sum(e.phase == "b" for e in task.plan) * (1 if task.optim.ema_decay is None else 2)
    images = {"student": (alone + distilled + task.data.has_validation) * evaluated}
    # frozen teachers are run once; others after every A-epoch, and again when the best snapshot is brought back
    again = adapted + m.num_stages if m.use_teacher_finetuning else 0
    images |= {f"teacher_{k}": (1 + again) * evaluated for k in range(len(task.teachers))}
    asked = sum(len(epochs) * kind.looks for kind, epochs in by_kind.items()) * len(task.data.train.indices)
    return Work(counted, images, len(task.plan), asked)


class Kind(NamedTuple):
    """What decides about an epoch's cost; `trained`: how many of the student's tensors."""

    phase: str
    distils: bool = True
    two_views: bool = False
    trained: int = 0

    @property
    def looks(self) -> int:
        """How many views of each image the teachers are asked about."""
        return self.distils * (1 + self.two_views)


def kinds(task: Distillation) -> dict[Kind, list[Epoch]]:
    """The plan's epochs by what decides about their cost."""
    found: dict[Kind, list[Epoch]] = {}
    for epoch in task.plan:
        task.begin_epoch(epoch)
        kind = Kind(epoch.phase)
        if epoch.phase == "b":
            weights = task.phases["b"].objective.weights
            trained = sum(p.requires_grad for p in task.student.parameters())
            kind = Kind("b", weights.scale > 0, weights.two_view, trained)
        found.setdefault(kind, []).append(epoch)
    return found


def _views(task: Distillation, work: Work, seeds: int) -> float:
    """Different views of all images that trials of so many seeds ask the teachers about, on average."""
    images = len(task.data.train.indices)
    return images * different(Views.of(task.data.train.augment).count, seeds * work.asked // images)


# measuring -----------------------------------------------------------------------------------------------------------


class _Probe:
    """A trial's task and loop, made as `jobs.trial` makes them, on copies of the teachers.

    Args:
        banked: leave the teachers out of updates.
    """

    def __init__(
        self, config: Config, data: ImageData, teachers: Sequence[FeatureNet], batch_size: int, banked: bool
    ) -> None:
        dataset = config.dataset.model_copy(update={"batch_size": batch_size})
        optim = config.optim.model_copy(update={"safe_retry_patience": 10**9})  # a few bad steps end no estimate
        config = config.model_copy(update={"dataset": dataset, "optim": optim})
        device = networks.device_of(config)
        student = networks.build_student(config, data)
        self.task = Distillation(config, data, student, [copy.deepcopy(t) for t in teachers], device)
        self.task.monitor.gate_open, self.task.monitor.share = True, 0.5
        recorder = cast(CheckpointRecorder, None)  # nothing is recorded without slots
        self.loop = Loop(self.task, recorder, None, {}, Precision(optim, device), device)
        self.kinds, self.banked = kinds(self.task), banked
        if banked:
            self.task.batches.companion = self._answered

    def _answered(self, batches: Iterator[Batch], draws: EpochDraws, start: int) -> Iterator[Batch]:
        """Batches with anything in the place of the teachers' outputs."""

        def say(images: int) -> list[Seen]:
            sizes = [(net.num_classes, net.feature_dim) for net in self.task.teachers]
            return [Seen(*(torch.randn(images, n, device=self.task.device) for n in size)) for size in sizes]

        for batch in batches:
            known = partial(say, len(batch.y))
            yield batch._replace(known=known, known_second=None if batch.x_second is None else known)

    def batch_seconds(self, epoch: Epoch, limit: float) -> float:
        """The median of a few whole batches, within about `limit` seconds."""
        task, phase, times = self.task, self.task.phases[epoch.phase], list[float]()
        whole = max(1, len(task.data.train.indices) // task.data.train.batch_size)
        task.begin_epoch(epoch)
        phase.objective.train()
        while len(times) <= TIMED and (len(times) < 2 or sum(times) < limit):
            self.loop.batch, began = 0, self._now()
            for _ in islice(self.loop._updates(epoch, phase), min(whole, TIMED + 1 - len(times))):
                times.append((now := self._now()) - began)
                began = now
                if len(times) > 1 and sum(times) > limit:
                    break
        return median(times[1:])

    def image_seconds(self, net: FeatureNet, limit: float) -> float:
        """Of an image in evaluation, by growing batches up to a whole one, within about `limit` seconds."""
        everything, part = self.task.data.eval, copy.copy(self.task.data.eval)
        count, most, spent = SMALL, min(everything.batch_size, len(everything.labels)), 0.0
        part.indices, part.labels = everything.indices[:1], everything.labels[:1]
        unchecked(net, part)  # where images are files, workers first end what was asked of them before
        while True:
            count = min(count, most)
            part.indices, part.labels = everything.indices[:count], everything.labels[:count]
            began = self._now()
            unchecked(net, part)
            took = self._now() - began
            spent += took
            if count == most or spent + 2 * took > limit:
                return took / count
            count *= 2

    def teachers_seconds(self) -> float:
        """Of an image that all teachers see."""
        nets = self.task.teachers
        return sum(self.image_seconds(net, EVALUATION_S / len(nets)) for net in nets)

    def looked_up_seconds(self) -> float:
        """Of an image in a bank of every teacher, read as training reads it; 0 without banks."""
        if not self.banked:
            return 0.0
        cells = np.arange(WINDOW)
        with tempfile.TemporaryDirectory(prefix="asib-estimate-") as folder:
            cache = BankCache(Path(folder), 10**9)
            widths = [net.num_classes + net.feature_dim for net in self.task.teachers]
            banks = [cache.open({"teacher": k}, WINDOW, width) for k, width in enumerate(widths)]
            for bank in banks:
                bank.add(cells, np.zeros((WINDOW, bank.width), np.float16))
            began = self._now()
            for bank in banks:
                torch.from_numpy(bank.read(cells)[0]).to(self.task.device).float()
            took = self._now() - began
            for bank in banks:
                bank.close()
        return took / WINDOW

    def checkpoint_seconds(self) -> float:
        """Of making one, without the disk's share."""
        began = self._now()
        hashlib.sha256(pack(self.loop.state_dict()))
        return self._now() - began

    def _now(self) -> float:
        if self.task.device.type == "cuda":
            torch.cuda.synchronize(self.task.device)
        return time.perf_counter()

    def bytes(self) -> int:
        """Of the run's folder at the trial's end: two checkpoints with their best snapshots, and the kept weights.

        Optimisers hold their moments once every phase was updated.
        """
        task = self.task
        kept = [task.student, *([task.fusion] if task.fusion is not None else [])]
        snapshot = [*kept, *(task.teachers if task.method.use_teacher_finetuning and task.fusion is not None else [])]
        slot = len(pack(self.loop.state_dict())) + sum(map(_bytes, snapshot))
        return 2 * slot + sum(map(_bytes, kept)) + OTHER_BYTES


def _bytes(module: nn.Module) -> int:
    return sum(v.numel() * v.element_size() for v in module.state_dict().values())


def _rates(whole: _Probe, small: _Probe) -> Rates:
    """Of whole batches where they can be afforded; else small ones, taken to cost as much for each image."""
    scale = whole.task.data.train.batch_size / small.task.data.train.batch_size
    seconds: dict[Hashable, float] = {
        kind: scale * small.batch_seconds(epochs[0], 0.0) for kind, epochs in small.kinds.items()
    }
    share = UPDATES_S / max(len(seconds), 1)
    for kind, epochs in whole.kinds.items():
        if 2 * seconds[kind] <= share:
            seconds[kind] = whole.batch_seconds(epochs[0], share)
    nets = {"student": small.task.student} | {f"teacher_{k}": t for k, t in enumerate(small.task.teachers)}
    images = {name: small.image_seconds(net, EVALUATION_S / len(nets)) for name, net in nets.items()}
    return Rates(seconds, images, small.checkpoint_seconds(), small.looked_up_seconds())


# words ---------------------------------------------------------------------------------------------------------------


def words(estimate: Estimate, folder: Path) -> str:
    """One line for people; `folder`: where the runs go."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    fits = "" if estimate.bytes < free else ": that does not fit, make room or choose another output_dir"
    filling, saves = "", "pruning saves part of it"
    if estimate.filling:
        filling = f" after {_duration(estimate.filling)} for the teacher bank"
        saves = "pruning and what the bank holds already save part of it"
    return (
        f"{_plural(estimate.trials, 'trial')} of about {_duration(estimate.seconds_per_trial)} with "
        f"{_plural(estimate.workers, 'worker')}{filling}: about {_duration(estimate.seconds)} (upper bound: {saves}); "
        f"{_size(estimate.bytes_per_trial)} each, {_size(estimate.bytes)} together, {_size(free)} free in "
        f"{folder}/{fits}"
    )


def _plural(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _duration(seconds: float) -> str:
    for unit, length, until in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < until * length:
            count = seconds / length
            return f"{count:.1f} {unit}" if count < 9.95 and unit != "s" else f"{max(count, 1):.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def _size(count: int) -> str:
    for unit, length in (("TB", 10**12), ("GB", 10**9)):
        if count >= length:
            return f"{count / length:.0f} {unit}" if count >= 10 * length else f"{count / length:.1f} {unit}"
    return f"{max(1, round(count / 10**6))} MB"
