"""Knowledge distillation (Hinton et al. 2015): KD = tau^2 KL(softmax(t / tau) || softmax(s / tau)), `losses.kd`."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from models.features import Features
from pipeline.config.methods.kd import KdConfig
from pipeline.data.batches import Batch
from pipeline.training import losses
from pipeline.training.objective import Moment
from pipeline.training.step import Lesson, StudentStep


class Kd(StudentStep):
    """Lesson: `p` (n, N), softmax(t / tau)."""

    method: KdConfig

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        return {"p": F.softmax(self.compared(seen[0].logits) / self.method.tau, dim=1)}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        return {"kd": losses.kl_to(self.compared(student.logits), lesson["p"], self.method.tau)}
