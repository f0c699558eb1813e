"""Normalised distillation (NKD; Yang et al. 2023, eq. 7): -T_y log S_y - gamma tau^2 sum_{j != y} T'_j log S'_j.

S and T are softmax(s) and softmax(t); S' and T' are softmax(s / tau) and softmax(t / tau) over the classes other than
the label y.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.features import Features
from pipeline.config.methods.nkd import NkdConfig
from pipeline.data.batches import Batch
from pipeline.training.losses import cross_entropy
from pipeline.training.objective import Moment
from pipeline.training.step import Lesson, StudentStep


def nkd(logits: Tensor, target_logits: Tensor, y: Tensor, tau: float, gamma: float) -> Tensor:
    """NKD per sample, (B,), from logits (B, N), those of the target held fixed, and labels y (B,).

    Cross-entropies, not divergences: equal logits give a constant above 0 (but no gradient from the other classes).
    With N = 2 a single class is left beside the label, and its term is 0.
    """
    s, t = logits.float(), target_logits.detach().float()
    label = F.one_hot(y, s.shape[1]).bool()

    def others(x: Tensor) -> Tensor:
        return F.log_softmax((x / tau).masked_fill(label, -torch.inf), dim=1).masked_fill(label, 0.0)

    sure = F.softmax(t, dim=1).gather(1, y[:, None]).squeeze(1)
    rest = others(t).exp().masked_fill(label, 0.0)
    soft = sure * cross_entropy(s, y)
    return soft - gamma * tau**2 * (rest * others(s)).sum(dim=1)


class Nkd(StudentStep):
    """Lesson: the teacher's logits `t` (n, N), and the labels `y` (n,) that set the target class."""

    method: NkdConfig

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        return {"t": self.compared(seen[0].logits), "y": y}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        m, y = self.method, lesson["y"].long()  # lessons of gated samples arrive as floats
        return {"nkd": nkd(self.compared(student.logits), lesson["t"], y, m.tau, m.gamma)}
