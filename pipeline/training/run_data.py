"""What fine-tuning and distillation share: the resident data of a run, the choice of the epoch that is kept, and what
the loop needs from both.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from models.features import FeatureNet
from pipeline.config import Config
from pipeline.data.batches import Batch, EpochDraws, EvalBatches, Order, Replayed, TrainBatches
from pipeline.data.image_files import Images
from pipeline.data.sources import ImageData
from pipeline.data.splits import split
from pipeline.training import distributed
from pipeline.training.checkpoint import cpu_copy
from pipeline.training.costs import Costs
from pipeline.training.evaluation import Outputs, accuracy, nll, outputs
from pipeline.training.phases import Epoch, Phase
from pipeline.training.rng import Streams

logger = logging.getLogger("asib")


@dataclass(frozen=True)
class Scope:
    """The part of a data set that a task is about.

    Attributes:
        classes: those that are told apart, M of the data's N. Within the task a class's number is its position here.
        new: those whose training images are all trained on; None: `classes`.
        memory: int64 (m,), training images that are trained on besides.
        logits: (m, N) float32, what the student said of each when it was kept; known: int64 (m,), how many of `classes`
            had been seen then.
        share: of each batch that comes from the memory; None: an epoch has each of its images once, too.
        part: a name that gives the task random streams of its own.
        selects: whether the validation split chooses an epoch; it is evaluated anyway.
        first_class: cross-entropy tells apart the classes from this one on.
    """

    classes: tuple[int, ...]
    new: tuple[int, ...] | None = None
    memory: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    logits: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    known: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    share: float | None = None
    part: str = ""
    selects: bool = True
    first_class: int = 0

    def numbered(self, y: Tensor) -> Tensor:
        """Labels (n,) of the data as the task numbers them; -1 for classes that it is not about."""
        numbers = torch.full((max(int(y.max()), *self.classes) + 1,), -1)
        numbers[torch.tensor(self.classes)] = torch.arange(len(self.classes))
        return numbers[y]

    def order(self, new: int, batch_size: int) -> Order | None:
        """What an epoch of `new` images and the memory consists of."""
        if self.share is None or not len(self.memory):
            return None
        return Replayed(new, len(self.memory), self.share, batch_size)


class RunData:
    """Training, evaluation and test batches of one run: resident on the device, or files.

    `scope`: the part of the data that it is about; None: all. The split is that of all the data.

    Per-epoch evaluation is on the validation split; on the test split only if there is no validation split, and then
    nothing is selected by it (docs/method.md section 3).
    """

    def __init__(self, config: Config, data: ImageData, device: torch.device, scope: Scope | None = None) -> None:
        world, self.scope = distributed.world(), scope
        parts = split(data.train_y, config.dataset.val_fraction, data.digest, config.dataset.split_seed)
        self.has_validation = len(parts.val) > 0
        self.selects = self.has_validation and (scope is None or scope.selects)
        train_y, test_y, taking_part, order = data.train_y, data.test_y, parts.train, None
        val, test = parts.val, None
        if scope is not None:
            train_y, test_y = scope.numbered(train_y), scope.numbered(test_y)
            val, test = val[train_y[val] >= 0], (test_y >= 0).nonzero()[:, 0]
            new = torch.tensor(scope.classes if scope.new is None else scope.new)
            taking_part = parts.train[torch.isin(data.train_y[parts.train], new)]
            order = scope.order(len(taking_part), config.dataset.batch_size)
            taking_part = torch.cat([taking_part, scope.memory])
        images, labels = data.train_x.to(device), train_y.to(device)  # once, for training and validation
        self.train = TrainBatches(
            images,
            labels,
            taking_part,
            batch_size=config.dataset.batch_size,
            augment=config.augment,
            rank=world.rank,
            world_size=world.size,
            mean=data.mean,
            std=data.std,
            device=device,
            channels_last=config.optim.use_channels_last,
            order=order,
        )
        size = config.dataset.eval_batch_size

        def in_order(x: Images, y: Tensor, indices: Tensor | None) -> EvalBatches:
            channels_last = config.optim.use_channels_last
            return EvalBatches(x, y, indices, size, data.mean, data.std, device, channels_last)

        self.test = in_order(data.test_x, test_y, test)
        self.eval = in_order(images, labels, val) if self.has_validation else self.test
        self.eval_split = "val" if self.has_validation else "test"


@dataclass
class Selection:
    """The weights of the epoch that validation chose; the last epoch's if there is no validation split."""

    net: nn.Module
    by_validation: bool
    accuracy: float = float("-inf")
    epoch: int = -1
    weights: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, accuracy: float, epoch: int) -> None:
        """Keep the net's weights if they are strictly better (earlier epochs win ties), or simply the newest."""
        if not self.by_validation:
            self.accuracy, self.epoch = accuracy, epoch
        elif accuracy > self.accuracy:
            self.accuracy, self.epoch, self.weights = accuracy, epoch, cpu_copy(self.net.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {"accuracy": self.accuracy, "epoch": self.epoch, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accuracy, self.epoch, self.weights = state["accuracy"], state["epoch"], state["weights"]

    def chosen(self) -> dict[str, Tensor]:
        """The state dict of the chosen epoch, on the CPU."""
        return self.weights or cpu_copy(self.net.state_dict())


class Task:
    """What the loop drives: a network that is trained in phases, and selected by validation.

    Args:
        net: the network; `name`: its name in metrics and errors.
        seed: that of its random streams.
        scope: the part of the data that it is about; None: all.
    """

    compiled = False
    """Whether its networks go through torch.compile."""
    plan: list[Epoch]
    phases: dict[str, Phase]
    costs: Costs
    selection: Selection

    def __init__(
        self,
        config: Config,
        data: ImageData,
        net: FeatureNet,
        name: str,
        device: torch.device,
        seed: int,
        scope: Scope | None = None,
    ) -> None:
        self.config, self.optim, self.device = config, config.optim, device
        self.net, self.name = net, name
        self.data = RunData(config, data, device, scope)
        self.batches = self.data.train
        self.streams = Streams(seed, scope.part if scope is not None else "")
        self._last: dict[str, Tensor] = {}
        """The last epoch's weights, from which a checkpoint continues, once `results` has replaced them."""

    def two_views(self, epoch: Epoch) -> bool:
        """Whether its images also have a second, independent augmentation."""
        return False

    def draws(self, epoch: Epoch) -> EpochDraws:
        """All random numbers of an epoch's images, from streams keyed by (seed, stream, phase, epoch in the phase)."""
        phase = self.phases[epoch.phase]

        def generators(stream: str) -> torch.Generator:
            return self.streams.generator(stream, epoch.phase, epoch.in_phase)

        return self.batches.draw(phase.mix, phase.mix_alpha, generators, self.two_views(epoch))

    def epoch_batches(self, epoch: Epoch, start: int) -> Iterator[Batch]:
        """The batches of an epoch from batch `start` on."""
        return self.batches.epoch(self.draws(epoch), start)

    def begin_phase(self, epoch: Epoch) -> None:
        """Called before the first batch of a phase; its decisions are part of the state."""

    def begin_epoch(self, epoch: Epoch) -> None:
        """Called before every epoch, even a continued one: set whatever follows from counters and state."""

    def end_epoch(self, epoch: Epoch) -> dict[str, float]:
        """Called after an epoch's last batch: evaluate, and return metrics."""
        raise NotImplementedError

    def evaluated(self, out: Outputs) -> dict[str, float]:
        """Accuracy and loss of the network's outputs on the evaluation split."""
        y = self.data.eval.labels
        acc, loss = distributed.first_process_says((accuracy(out.logits, y), nll(out.logits, y, self.name)))
        return {f"{self.name}/acc": acc, f"{self.name}/loss": loss}

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def results(self, test: bool = True) -> dict[str, float]:
        """Final accuracies, in percent, and costs; the network holds the selected weights afterwards.

        Args:
            test: False if the test split must not be seen, as in a sweep.
        """
        found: dict[str, float] = {}
        val, tests = self.data.eval, self.data.test
        if test:
            found["final/acc_last"] = accuracy(outputs(self.net, tests, self.name).logits, tests.labels)
        self._last = cpu_copy(self.net.state_dict())
        self.net.load_state_dict(self.selection.chosen())
        if test:
            found |= self.on_test(outputs(self.net, tests, self.name))
        if self.data.has_validation:
            found["final/val_acc"] = accuracy(outputs(self.net, val, self.name).logits, val.labels)
        return found | self.costs.metrics()

    def on_test(self, selected: Outputs) -> dict[str, float]:
        """Test metrics of the selected network."""
        return {"final/acc_val_selected": accuracy(selected.logits, self.data.test.labels)}


def prepare(phases: dict[str, Phase], device: torch.device, unused: set[str]) -> None:
    """Wrap what the phases train for several processes; in `unused` phases some parameters get no gradient.

    Batch statistics cover the global batch on GPUs; on CPUs they are per process, with a warning.
    """
    if distributed.world().size == 1:
        return
    for name, phase in phases.items():
        net = phase.objective.trainable_module
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules()):
            if device.type == "cuda":
                convert_sync_batchnorm(net)  # timm's: it keeps the activations that timm's batch norms hold
            else:
                logger.warning("%s: on CPU, batch statistics are per process", phase.metrics)
        phase.objective.prepare_distributed(
            [distributed.world().local_rank] if device.type == "cuda" else None, find_unused_parameters=name in unused
        )
