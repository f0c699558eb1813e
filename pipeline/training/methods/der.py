"""Dark experience replay++ (Buzzega et al. 2020, eq. 6): || z - z_kept ||^2 / N' of kept images, beside cross-entropy.

The paper draws kept images twice, for logits and for labels, and keeps logits in the middle of training; here one draw
serves both, and logits are those of the end of the image's task (docs/continual.md).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.features import Features
from pipeline.config.methods.der import DerConfig
from pipeline.data.batches import Batch
from pipeline.training import distributed
from pipeline.training.objective import Moment, batch_mean
from pipeline.training.step import Lesson, Setup, StudentStep


def squared_difference(logits: Tensor, kept: Tensor, known: Tensor) -> Tensor:
    """Mean over the classes in `known` (b, M) of (z - z_kept)^2, (b,), from logits (b, M); 0 where none is known."""
    difference = ((logits - kept) ** 2).masked_fill(~known, 0.0).sum(dim=1)
    return difference / known.sum(dim=1).clamp_min(1)


class Der(StudentStep):
    """No lesson: what is compared with was kept. The mean is over the kept images of a batch."""

    method: DerConfig

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        scope, labels = setup.data.scope, setup.data.train.labels
        assert scope is not None
        self._row = torch.full((len(labels),), -1, dtype=torch.int64, device=setup.device)
        self._row[scope.memory.to(setup.device)] = torch.arange(len(scope.memory), device=setup.device)
        self._kept = scope.logits[:, torch.tensor(scope.classes)].to(setup.device)
        number = torch.arange(len(scope.classes))
        known = number < (scope.known[:, None] if self.method.logits == "old" else len(scope.classes))
        self._known = known.expand_as(self._kept).to(setup.device)

    def lesson(self, seen: Sequence[Any], y: Tensor) -> Lesson:
        return {}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        rows = self._row[batch.index]
        found = squared_difference(student.logits.float(), self._kept[rows], self._known[rows])
        kept = (rows >= 0).float()
        share = distributed.mean(batch_mean(kept, batch))  # of the global batch
        return {"der": torch.where(rows >= 0, found / share.clamp_min(1 / batch.global_size), 0.0)}
