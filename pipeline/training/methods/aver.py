"""AVER: the mean over K teachers of tau^2 KL(softmax(t_k / tau) || softmax(s / tau)).

It averages losses, hence probabilities; ASIB's `kd_target=avg` averages logits, and `stack` weights them.
"""

from collections.abc import Sequence

from torch import Tensor

from models.features import Features
from pipeline.config.methods.aver import AverConfig
from pipeline.data.batches import Batch
from pipeline.training import losses
from pipeline.training.objective import Moment
from pipeline.training.step import Lesson, StudentStep


def aver(logits: Tensor, targets: Tensor, tau: float) -> Tensor:
    """mean_k KD(s <- p_k; tau), (B,), from logits (B, N) and the K teachers' probability vectors (B, K, N)."""
    return losses.kl_to_each(logits, targets, tau).mean(dim=1)


class Aver(StudentStep):
    """Lesson: `p` (n, K, N), softmax(t_k / tau)."""

    method: AverConfig

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        return {"p": losses.softened([self.compared(s.logits) for s in seen], self.method.tau)}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        return {"aver": aver(self.compared(student.logits), lesson["p"], self.method.tau)}
