"""Entropy-based weights of K teachers (EBKD; Kwon et al. 2020, as CA-MKD compares with it): sum_k w_k KD_k with
w_k = (1 - H_k / sum_l H_l) / (K - 1), H_k the entropy of softmax(t_k), per sample.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.features import Features
from pipeline.config.methods.ebkd import EbkdConfig
from pipeline.data.batches import Batch
from pipeline.training import losses
from pipeline.training.objective import Moment
from pipeline.training.step import Lesson, StudentStep


def entropy_weights(logits: Sequence[Tensor], as_published: bool = False) -> Tensor:
    """w_k of K teachers' logits (B, N): (B, K), rows sum to 1.

    A single teacher has 1; where every entropy is 0, all are equal.

    Args:
        as_published: the public code leaves out 1 / (K - 1) and divides the loss by K: rows sum to (K - 1) / K.
    """
    k = len(logits)
    log_p = torch.stack([F.log_softmax(t.float(), dim=1) for t in logits], dim=1)
    entropies = -(log_p.exp() * log_p).sum(dim=2)
    total = entropies.sum(dim=1, keepdim=True)
    share = torch.where(total > 0, entropies / total.clamp_min(torch.finfo(total.dtype).tiny), 1 / k)
    if as_published:
        return (1 - share) / k
    return (1 - share) / (k - 1) if k > 1 else torch.ones_like(share)


def ebkd(logits: Tensor, targets: Tensor, weights: Tensor, tau: float) -> Tensor:
    """sum_k w_k KD(s <- p_k; tau), (B,), from logits (B, N), probability vectors (B, K, N) and weights (B, K)."""
    return (weights * losses.kl_to_each(logits, targets, tau)).sum(dim=1)


class Ebkd(StudentStep):
    """Lesson: `p` (n, K, N), softmax(t_k / tau), and `share` (n, K), the weights, of the logits as they are."""

    method: EbkdConfig

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        p = losses.softened([self.compared(s.logits) for s in seen], self.method.tau)
        return {"p": p, "share": entropy_weights([s.logits for s in seen], self.method.as_published)}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        self.weighed = lesson["share"]
        return {"ebkd": ebkd(self.compared(student.logits), lesson["p"], lesson["share"], self.method.tau)}
