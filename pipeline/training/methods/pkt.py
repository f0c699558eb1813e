"""Probabilistic knowledge transfer (Passalis and Tefas 2018): who resembles whom, as probabilities."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.features import Features
from pipeline.data.batches import Batch
from pipeline.training.objective import Moment, whole
from pipeline.training.step import Lesson, StudentStep

LEAST = 1e-7
"""The smallest probability: opposite features have none, and the teacher's may still be positive."""


def affinities(feature: Tensor) -> Tensor:
    """p_ij = (cos(f_i, f_j) + 1) / 2 over its row's sum: (B, B) from (B, d), itself included as in the public code."""
    unit = F.normalize(feature.float(), dim=1)
    similar = (unit @ unit.T + 1) / 2
    return (similar / similar.sum(dim=1, keepdim=True)).clamp_min(LEAST)


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_ij p_t log(p_t / p_s) of pooled features (B, d_s) and (B, d_t) (Passalis and Tefas 2018).

    The mean over B^2 entries, as in the public code whose weight of 30000 this is.
    """
    p, q = affinities(teacher), affinities(student)
    # sum p log(p/q) = sum q ((1+u) log(1+u) - u) with u = (p-q)/q: rows sum to 1, and for p near q, where the logarithm
    # of p/q would leave rounding only, each entry is of second order like the sum
    u = (p - q) / q
    return (q * (torch.special.xlog1py(1 + u, u) - u)).mean()


class Pkt(StudentStep):
    """Affinities among the pooled features of the global batch."""

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        return {"feature": seen[0].feat_2d}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        return {"pkt": pkt(whole(student.feat_2d, batch), whole(lesson["feature"], batch))}
