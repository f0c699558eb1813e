"""What every objective has in common: timm's TrainingTask, with a batch and a moment instead of input and target."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.freeze import Frozen
from pipeline.data.batches import Batch, Known, Seen
from pipeline.training import distributed
from pipeline.training.losses import cross_entropy


class Moment(NamedTuple):
    """A batch's position in the run: the key of its random streams."""

    phase: str
    epoch: int
    batch: int


class Objective(TrainingTask):
    """One training objective: `forward(batch, moment)` returns `loss`, `output` and its named terms.

    `trainable_module` is what is optimised, clipped, averaged and wrapped for several processes; `frozen` networks
    stay in eval mode whatever mode the objective is in, and never enter its state.
    """

    trainable_module: nn.Module

    def __init__(
        self,
        trainable: nn.Module,
        frozen: list[nn.Module],
        device: torch.device,
        held: Sequence[tuple[Frozen, nn.Module]] = (),
    ) -> None:
        super().__init__(device=device, verbose=False)
        self.trainable_module = trainable
        self.eval_model = trainable
        self._frozen = tuple(frozen)  # a tuple: not registered as sub-modules
        self.own = nn.ModuleDict()
        """What else is trained and checkpointed with it: projectors, regressors, a memory. No part of its average."""
        self.held = held
        """Partly frozen networks: their frozen normalisation layers stay in eval mode."""

    def train(self, mode: bool = True) -> "Objective":
        super().train(mode)
        for net in self._frozen:
            net.eval()
        for policy, net in self.held:
            policy.hold(net)
        return self

    def refreeze(self, trainable: nn.Module, frozen: Frozen) -> None:
        """Train `trainable` as far as `frozen` allows; any wrapper for several processes is removed."""
        self.trainable_module, self.held = trainable, [(frozen, trainable)]

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp_kwargs: Any) -> "Objective":
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        for name, module in self.own.items():
            if any(p.requires_grad for p in module.parameters()) and not isinstance(module, DistributedDataParallel):
                self.own[name] = DistributedDataParallel(module, device_ids=device_ids)
        return self

    @property
    def trained(self) -> nn.ModuleList:
        """All that it trains."""
        return nn.ModuleList([self.trainable_module, self.own])

    def own_state(self) -> dict[str, Any]:
        """The state of each of its own modules."""
        return {name: unwrap_model(module).state_dict() for name, module in self.own.items()}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `own_state` gave."""
        for name, module in self.own.items():
            unwrap_model(module).load_state_dict(state[name])

    def updated(self, skipped: Tensor, lr: float) -> None:
        """Called after each update, made at learning rate `lr`; `skipped`: a bool scalar, whether it was left out: then
        nothing may change.
        """

    def forward(self, batch: Batch, moment: Moment, repeat: int = 0) -> dict[str, Tensor]:
        """`repeat` counts several updates on one batch, from 0."""
        raise NotImplementedError

    def summarise(self, means: dict[str, float]) -> dict[str, float]:
        """The epoch's means of all terms, as they are logged."""
        return means


def teacher_outputs(
    teachers: Sequence[nn.Module], x: Tensor, known: Known | None, rows: Tensor | None = None
) -> Sequence[Seen]:
    """The outputs of frozen teachers for images x (n,C,H,W): from the bank for these rows, or by running each."""
    if known is not None:
        return known(rows)
    return [Seen(out.logits, out.feat_2d) for out in (teacher(x) for teacher in teachers)]


def batch_mean(values: Tensor, batch: Batch) -> Tensor:
    """The mean over the global batch of per-sample `values` (b,), such that the average over processes is right.

    Gradients are averaged over processes, whose slices may be uneven: the local sum is scaled by processes / B.
    """
    return values.sum() * (distributed.world().size / batch.global_size)


def whole(values: Tensor, batch: Batch) -> Tensor:
    """The global batch's rows (B, ...) from this process's (b, ...), for losses that relate samples to one another.

    The gradient reaches this process's own rows, scaled by the number of processes, over which gradients are averaged:
    every process may then compute the loss of the global batch.
    """
    size = distributed.world().size
    if size == 1:
        return values
    everyone = distributed.gather_rows(values.detach(), batch.rows, batch.global_size)
    own = values.detach() + size * (values - values.detach())
    return torch.cat([everyone[: batch.rows.start], own, everyone[batch.rows.stop :]])


def mixed_cross_entropy(logits: Tensor, batch: Batch, label_smoothing: float, first_class: int = 0) -> Tensor:
    """mean_i[lambda CE(s, y_a) + (1 - lambda) CE(s, y_b)]: both labels of a mixed sample (docs/method.md section 3).

    `first_class`: classes before it are left out, of the logits (b, N) and of the labels.
    """
    y, y_b = batch.y, batch.y_b
    if first_class:
        logits, y, y_b = logits[:, first_class:], y - first_class, y_b - first_class
    first = cross_entropy(logits, y, label_smoothing)
    if batch.partner is None:
        return batch_mean(first, batch)
    second = cross_entropy(logits, y_b, label_smoothing)
    return batch_mean(batch.lam * first + (1 - batch.lam) * second, batch)
