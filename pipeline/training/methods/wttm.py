"""Weighted transformed teacher matching (WTTM; Zheng & Yang 2024): U KL(p || softmax(s)) with p = softmax(t)^gamma / U,
where gamma = 1 / tau and U = sum_j softmax(t)_j^gamma, the power sum: the less certain a teacher, the more a sample
counts.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.features import Features
from pipeline.config.methods.wttm import WttmConfig
from pipeline.data.batches import Batch
from pipeline.training import losses
from pipeline.training.objective import Moment
from pipeline.training.step import Lesson, StudentStep


def powered(logits: Tensor, gamma: float) -> Tensor:
    """softmax(t)^gamma, (B, N) from logits (B, N): U p, not normalised."""
    return torch.exp(gamma * F.log_softmax(logits.float(), dim=1))


def wttm(logits: Tensor, power: Tensor) -> Tensor:
    """U KL(power / U || softmax(s)), (B,), from the student's logits (B, N) and the teacher's `powered` (B, N).

    0 where `power` is, as in a sample without a lesson.
    """
    total = power.sum(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return total * losses.kl_to(logits, power / total[:, None], 1.0)


class Wttm(StudentStep):
    """Lesson: `power` (n, N), which holds target and weight; that of mixed images is the mixture of both."""

    method: WttmConfig

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        return {"power": powered(self.compared(seen[0].logits), 1 / self.method.tau)}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        return {"wttm": wttm(self.compared(student.logits), lesson["power"])}
