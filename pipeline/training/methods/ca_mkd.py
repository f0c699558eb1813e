"""Confidence-aware multi-teacher distillation (Zhang et al. 2022): teachers count by how well they know the label."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.features import FeatureNet, Features
from pipeline.data.batches import Batch
from pipeline.errors import UserError
from pipeline.training.losses import cross_entropy, kd
from pipeline.training.methods.maps import squared_distance
from pipeline.training.objective import Moment
from pipeline.training.step import Lesson, Setup, StudentStep


def confidence_weights(ce: Tensor) -> Tensor:
    """w_k = (1 - softmax_k(CE_k)) / (K - 1), (K, B) from cross-entropies (K, B); they sum to 1. 1 for one teacher."""
    return (1 - F.softmax(ce, dim=0)) / (len(ce) - 1) if len(ce) > 1 else torch.ones_like(ce)


def weighted_kd(student: Tensor, teachers: Tensor, weights: Tensor, tau: float) -> Tensor:
    """sum_k w_k tau^2 KL(softmax(t_k / tau) || softmax(s / tau)), (B,); logits (B, N), (K, B, N), weights (K, B)."""
    return (weights * torch.stack([kd(student, t, tau) for t in teachers])).sum(dim=0)


def weighted_distance(projected: Sequence[Tensor], maps: Sequence[Tensor], weights: Tensor) -> Tensor:
    """sum_k w_k mean_chw (P_k(F_s) - F_k)^2: (B,) from K maps (B, C_k, h_k, w_k) of each kind and weights (K, B)."""
    each = [squared_distance(p, f) for p, f in zip(projected, maps, strict=True)]
    return (weights * torch.stack(each)).sum(dim=0)


class Projector(nn.Module):
    """The student's map (B, C_s, h_s, w_s) to a teacher's shape: pooled or enlarged, then 1×1 convolution, BN, ReLU."""

    def __init__(self, student: tuple[int, int, int], teacher: tuple[int, int, int]) -> None:
        super().__init__()
        self.size, self.smaller = teacher[1:], student[1] >= teacher[1] and student[2] >= teacher[2]
        self.block = nn.Sequential(nn.Conv2d(student[0], teacher[0], 1), nn.BatchNorm2d(teacher[0]), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != self.size:
            x = F.adaptive_avg_pool2d(x, self.size) if self.smaller else F.interpolate(x, self.size, mode="bilinear")
        y: Tensor = self.block(x)
        return y


def classify(teacher: FeatureNet, feature: Tensor) -> Tensor:
    """The logits (B, N) that a teacher's own classifier gives a map (B, C, h, w), averaged over its places."""
    classifier, pooled = teacher.net.get_classifier(), feature.mean((2, 3))  # type: ignore[operator]
    if isinstance(classifier, nn.Conv2d):
        pooled = pooled[..., None, None]
    logits: Tensor = classifier(pooled)
    return teacher.viewed(logits.float().flatten(1))


class CaMkd(StudentStep):
    """Logits weighted by the teachers' cross-entropy; last maps by that of the projected map under their classifiers.

    The weights are held fixed. The public code divides both terms by K once more, and lets gradient pass through the
    maps' weights, which rewards a projection for being useless where its distance is large: `as_published` does both.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.teachers = tuple(setup.teachers)  # a tuple: not registered
        for k, (teacher, maps) in enumerate(zip(setup.teachers, setup.teacher_maps, strict=True)):
            if maps[-1][0] != teacher.feature_dim:
                raise UserError(
                    f"method=ca_mkd gives {teacher.architecture}'s last map to its classifier, which reads "
                    f"{teacher.feature_dim} features, not the map's {maps[-1][0]}: choose another teacher"
                )
            self.own[f"projector_{k}"] = Projector(setup.student_maps[-1], maps[-1])

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        logits = torch.stack([features.logits.float() for features in seen], dim=1)  # (n, K, N)
        return {"logits": logits} | {f"map_{k}": features.maps[-1] for k, features in enumerate(seen)}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        m, taught = self.method, lesson["logits"].unbind(dim=1)
        maps = [lesson[f"map_{k}"] for k in range(len(taught))]
        projected = [self.own[f"projector_{k}"](student.maps[-1]) for k in range(len(taught))]
        with torch.set_grad_enabled(m.as_published and torch.is_grad_enabled()):
            guesses = [classify(teacher, p) for teacher, p in zip(self.teachers, projected, strict=True)]
            of_logits, of_maps = self._weights(taught, batch), self._weights(guesses, batch)
        self.weighed = of_logits.detach().T if m.kd_alpha else None
        targets = torch.stack([self.compared(t) for t in taught])
        share = 1 / len(taught) if m.as_published else 1.0
        return {
            "ca_mkd_kd": share * weighted_kd(self.compared(student.logits), targets, of_logits, m.tau),
            "ca_mkd_feat": share * weighted_distance(projected, maps, of_maps),
        }

    @staticmethod
    def _weights(logits: Sequence[Tensor], batch: Batch) -> Tensor:
        """(K, b); of a mixed sample by the mixed cross-entropy of its labels."""
        ce = [batch.lam * cross_entropy(t, batch.y) + (1 - batch.lam) * cross_entropy(t, batch.y_b) for t in logits]
        return confidence_weights(torch.stack(ce))
