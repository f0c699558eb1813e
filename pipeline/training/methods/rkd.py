"""Relational knowledge distillation (Park et al. 2019): distances of pairs and angles of triplets of features."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.features import Features
from pipeline.data.batches import Batch
from pipeline.training.objective import Moment, whole
from pipeline.training.step import Lesson, StudentStep


def differences(feature: Tensor) -> tuple[Tensor, Tensor]:
    """f_i - f_j at [j, i] (B, B, d), and their lengths (B, B), of features (B, d).

    The lengths come from the differences: a Gram matrix would lose those of near neighbours to rounding. Where two
    samples coincide the length is 0 and its gradient too.
    """
    between = feature.float()[None] - feature.float()[:, None]
    square = between.square().sum(dim=2)
    apart = square > 0
    return between, torch.where(apart, square, 1.0).sqrt() * apart


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 of the pairs' distances, each network's over its own mean (Park et al. 2019).

    Args:
        student, teacher: the lengths (B, B) from `differences`.

    Returns:
        The mean over all B^2 entries, as in the public code whose weight of 25 this is; a sample has no distance
        from itself and does not enter the mean distance. 0 for one sample.
    """
    return F.smooth_l1_loss(_over_mean(student), _over_mean(teacher))


def _over_mean(length: Tensor) -> Tensor:
    n = len(length)
    mean = length.sum() / max(n * (n - 1), 1)
    return length / mean.clamp_min(torch.finfo(length.dtype).tiny)


def angles(between: Tensor, length: Tensor) -> Tensor:
    """cos of the angle at j between i and k, at [j, i, k] (B, B, B); 0 where j coincides with i or k."""
    direction = between / torch.where(length > 0, length, 1.0)[..., None]
    return direction @ direction.transpose(1, 2)


def rkd(student: Tensor, teacher: Tensor, distance_alpha: float, angle_alpha: float) -> dict[str, Tensor]:
    """The two terms of pooled features (B, d_s) and (B, d_t), by name; one of weight 0 is left out.

    Angles are compared by smooth L1, in the mean over all B^3 entries (Park et al. 2019).
    """
    terms: dict[str, Tensor] = {}
    s, t = differences(student), differences(teacher)
    if distance_alpha > 0:
        terms["rkd_distance"] = distance_loss(s[1], t[1])
    if angle_alpha > 0:
        terms["rkd_angle"] = F.smooth_l1_loss(angles(*s), angles(*t))
    return terms


class Rkd(StudentStep):
    """Relations among the pooled features of the global batch."""

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        return {"feature": seen[0].feat_2d}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        m = self.method
        features = whole(student.feat_2d, batch), whole(lesson["feature"], batch)
        return rkd(*features, m.distance_alpha, m.angle_alpha)
