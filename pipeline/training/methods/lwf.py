"""Learning without forgetting (Li and Hoiem 2016, eq. 2): KD(s <- p; tau) over the classes known before the task.

p is the student's as it was before the task. Its tau^2 makes a weight of w here one of w tau^2 in PyCIL's loss.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from models.features import Features
from pipeline.config.methods.lwf import LwfConfig
from pipeline.data.batches import Batch
from pipeline.training import losses
from pipeline.training.objective import Moment
from pipeline.training.step import Lesson, Setup, StudentStep


class Lwf(StudentStep):
    """Lesson: `p` (n, M'), softmax(t / tau) over the known classes or all; `counts` (n,), 1 for images distilled."""

    method: LwfConfig

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        (past,) = setup.teachers
        self._known = past.num_classes if past.view is None else past.view.taught  # they come before the new ones
        self._compared = self._known if self.method.logits == "old" else past.num_classes

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        p = F.softmax(self.compared(seen[0].logits[:, : self._compared]) / self.method.tau, dim=1)
        wanted = {"all": y >= 0, "new": y >= self._known, "old": y < self._known}[self.method.samples]
        return {"p": p, "counts": wanted.float()}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        logits = self.compared(student.logits[:, : self._compared])
        return {"lwf": lesson["counts"] * losses.kl_to(logits, lesson["p"], self.method.tau)}
