"""Decoupled distillation (Zhao et al. 2022): tau^2 (alpha TCKD + beta NCKD), `losses.dkd`."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from models.features import Features
from pipeline.config.methods.dkd import DkdConfig
from pipeline.data.batches import Batch
from pipeline.errors import UserError
from pipeline.training import losses
from pipeline.training.objective import Moment
from pipeline.training.step import Lesson, Setup, StudentStep


class Dkd(StudentStep):
    """Lesson: `p` (n, N), softmax(t / tau), and the labels `y` (n,) by which it is decoupled."""

    method: DkdConfig

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        if setup.num_classes < 3:
            raise UserError(
                f"method=dkd: it splits what is not the label, and the data has {setup.num_classes} classes; use kd"
            )

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        return {"p": F.softmax(self.compared(seen[0].logits) / self.method.tau, dim=1), "y": y}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        m, y = self.method, lesson["y"].long()  # lessons of gated samples arrive as floats
        return {"dkd": losses.dkd(self.compared(student.logits), lesson["p"], y, m.tau, m.alpha, m.beta)}
