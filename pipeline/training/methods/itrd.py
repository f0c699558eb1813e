"""Information-theoretic representation distillation (Miles et al. 2022): correlation and mutual information."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.features import Features
from pipeline.data.batches import Batch
from pipeline.training.objective import Moment, whole
from pipeline.training.step import Lesson, Setup, StudentStep


def standardised(feature: Tensor) -> Tensor:
    """Each column at mean 0 and unbiased variance 1 over the batch: (B, d). A constant column becomes 0."""
    centred = feature.float() - feature.float().mean(dim=0)
    variance = centred.square().sum(dim=0) / max(len(feature) - 1, 1)
    return centred * variance.clamp_min(1e-12).rsqrt()


def correlation(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """log2 sum_d (1 - c_d)^(2 alpha), c_d the correlation of the networks' feature d; both (B, d) (Miles et al. 2022).

    As in the public code c_d is a sum over B of columns of unbiased variance 1, at most 1 - 1/B: the loss of equal
    features is log2(d) - 2 alpha log2(B), not minus infinity.
    """
    apart = 1 - (standardised(student) * standardised(teacher)).mean(dim=0)
    return apart.pow(2 * alpha).sum().log2()


def mutual(student: Tensor, teacher: Tensor) -> Tensor:
    """||G_s||_F^2 - ||G_st||_F^2 of pooled features (B, d_s) and (B, d_t) (Miles et al. 2022).

    G are Gram matrices of unit features at trace 1, G_st that of the product G_s * G_t entry by entry: matrix Renyi
    entropies of order 2 without their logarithm. 0 where samples are equal or orthogonal in both networks.
    """
    s, t = (F.normalize(f.float(), dim=1) for f in (student, teacher))
    g_s, g_t = s @ s.T, t @ t.T  # traces are B
    return (g_s.square() * (1 - g_t.square())).mean()


class Itrd(StudentStep):
    """Statistics of the global batch's pooled features; the student's pass through a trained linear embedding."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.own["embed"] = nn.Linear(setup.student.feature_dim, setup.teachers[0].feature_dim)
        self.same_width = setup.student.feature_dim == setup.teachers[0].feature_dim

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        return {"feature": seen[0].feat_2d}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        embedded = whole(self.own["embed"](student.feat_2d), batch)
        plain = whole(student.feat_2d, batch) if self.same_width else embedded  # as published
        teacher = whole(lesson["feature"], batch)
        return {
            "itrd_corr": correlation(embedded, teacher, self.method.alpha_it),
            "itrd_mutual": mutual(plain, teacher),
        }
