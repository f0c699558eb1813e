"""Transformed teacher matching (TTM; Zheng & Yang 2024): KL(p || softmax(s)), without a temperature on the student.

p is the teacher's power transform, softmax(t)^gamma normalised with gamma = 1 / tau, which is softmax(t / tau).
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from models.features import Features
from pipeline.config.methods.ttm import TtmConfig
from pipeline.data.batches import Batch
from pipeline.training import losses
from pipeline.training.objective import Moment
from pipeline.training.step import Lesson, StudentStep


def ttm(logits: Tensor, target: Tensor) -> Tensor:
    """KL(p || softmax(s)), (B,), from the student's logits (B, N) and the transformed teacher p (B, N)."""
    return losses.kl_to(logits, target, 1.0)


class Ttm(StudentStep):
    """Lesson: `p` (n, N), softmax(t / tau)."""

    method: TtmConfig

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        return {"p": F.softmax(self.compared(seen[0].logits) / self.method.tau, dim=1)}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        return {"ttm": ttm(self.compared(student.logits), lesson["p"])}
