"""Correlation congruence (Peng et al. 2019): how samples of a batch correlate, in learned embeddings."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.features import Features
from pipeline.data.batches import Batch
from pipeline.training.objective import Moment, whole
from pipeline.training.step import Lesson, Setup, StudentStep


def neighbours(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_i |e_s,i . e_s,i+1 - e_t,i . e_t,i+1| of embeddings (B, d): each sample and the next; 0 for one sample."""
    s, t = student.float(), teacher.float()
    if len(s) < 2:
        return (s - t).sum() * 0.0
    return ((s[:-1] * s[1:]).sum(dim=1) - (t[:-1] * t[1:]).sum(dim=1)).abs().mean()


def published(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_i |delta_i| . |delta_i+1| with delta = e_s - e_t, embeddings (B, d): what the published tables ran.

    RepDistiller has it from the paper's authors, and tuned its weight of 0.02 with it.
    """
    delta = (student.float() - teacher.float()).abs()
    return (delta[:-1] * delta[1:]).sum() / max(len(delta) - 1, 1)


def kernel(student: Tensor, teacher: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    """||C_s - C_t||_F^2 / B^2 of embeddings (B, d), C_ij = exp(-gamma ||e_i - e_j||^2) (Peng et al. 2019).

    Embeddings are normalised, and the kernel is its Taylor series up to `order` in their product, as in the paper.
    """

    def congruence(embedding: Tensor) -> Tensor:
        unit = F.normalize(embedding.float(), dim=1)
        product = unit @ unit.T
        terms = [(2 * gamma) ** p / math.factorial(p) * product**p for p in range(order + 1)]
        return math.exp(-2 * gamma) * torch.stack(terms).sum(dim=0)

    return (congruence(student) - congruence(teacher)).square().mean()


FORMS = {"neighbours": neighbours, "published": published, "kernel": kernel}


class Cc(StudentStep):
    """Linear embeddings of both networks' pooled features; both are trained."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        width = self.method.embed_dim
        self.own["embed_student"] = nn.Linear(setup.student.feature_dim, width)
        self.own["embed_teacher"] = nn.Linear(setup.teachers[0].feature_dim, width)

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        return {"feature": seen[0].feat_2d}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        s, t = self.own["embed_student"](student.feat_2d), self.own["embed_teacher"](lesson["feature"])
        return {"cc": FORMS[self.method.form](whole(s, batch), whole(t, batch))}
