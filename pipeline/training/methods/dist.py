"""DIST (Huang et al. 2022): beta tau^2 (1 - mean_i r(q_i, p_i)) + gamma tau^2 (1 - mean_c r(q_.c, p_.c)), where r is
Pearson's correlation, q = softmax(s / tau) and p = softmax(t / tau).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.features import Features
from pipeline.config.methods.dist import DistConfig
from pipeline.data.batches import Batch
from pipeline.training.objective import Moment, whole
from pipeline.training.step import Lesson, StudentStep


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of each row of a with that row of b, (R,) from (R, L).

    A row that is constant up to float32's rounding correlates with nothing: 0, without gradient. The formula has 0 / 0
    there, and next to it a gradient without bound.
    """

    def unit(x: Tensor) -> tuple[Tensor, Tensor]:
        centred = x - x.mean(dim=1, keepdim=True)
        length = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
        least = (1e-6 * torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True)).clamp_min(1e-18)
        return centred / torch.maximum(length, least), (length > least).squeeze(1)

    (u, u_varies), (v, v_varies) = unit(a), unit(b)
    return torch.where(u_varies & v_varies, (u * v).sum(dim=1), 0.0)


def between_classes(q: Tensor, p: Tensor, tau: float) -> Tensor:
    """tau^2 (1 - r) of each sample's probabilities, (B,) from (B, N): the paper's inter-class relation."""
    return tau**2 * (1 - pearson(q, p))


def within_classes(q: Tensor, p: Tensor, tau: float) -> Tensor:
    """tau^2 (1 - mean_c r) of each class's probabilities over the batch, () from (B, N): the intra-class relation."""
    return tau**2 * (1 - pearson(q.T, p.T).mean())


class Dist(StudentStep):
    """Lesson: `p` (n, N), softmax(t / tau)."""

    method: DistConfig

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        return {"p": F.softmax(self.compared(seen[0].logits) / self.method.tau, dim=1)}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        tau = self.method.tau
        q, p = F.softmax(self.compared(student.logits) / tau, dim=1), lesson["p"]
        within = within_classes(whole(q, batch), whole(p, batch), tau)
        return {"dist_between": between_classes(q, p, tau), "dist_within": within}
