"""Neuron selectivity transfer: the channels as samples of a distribution over places (Huang and Wang 2017)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.features import Features
from pipeline.data.batches import Batch
from pipeline.training.methods.maps import of_lesson, same_size, to_lesson, unit
from pipeline.training.objective import Moment
from pipeline.training.step import Lesson, StudentStep


def kernel_mean(a: Tensor, b: Tensor) -> Tensor:
    """mean_ij (a_i · b_j)², (B,) from rows (B, ., n): the polynomial kernel with d = 2 and c = 0."""
    return (a @ b.transpose(1, 2)).square().mean(dim=(1, 2))


def selectivity(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Σ_stages squared maximum mean discrepancy of the channels at unit length; (B,) from maps (B, C, h, w)."""
    stages = []
    for pair in zip(student, teacher, strict=True):
        s, t = (unit(x.flatten(2)) for x in same_size(*pair))
        stages.append(kernel_mean(t, t) + kernel_mean(s, s) - 2 * kernel_mean(s, t))
    return torch.stack(stages).sum(dim=0)


class Nst(StudentStep):
    """Acts on all stages that the networks share."""

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        return to_lesson(seen[0].maps)

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        return {"nst": selectivity(student.maps, of_lesson(lesson))}
