"""Attention transfer: where the networks are active, whatever the channel (Zagoruyko and Komodakis 2017)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.features import Features
from pipeline.data.batches import Batch
from pipeline.training.methods.maps import attention, of_lesson, same_size, to_lesson
from pipeline.training.objective import Moment
from pipeline.training.step import Lesson, StudentStep


def attention_transfer(student: Sequence[Tensor], teacher: Sequence[Tensor], p: int) -> Tensor:
    """Σ_stages mean_hw (â(F_s) − â(F_t))², â = mean_c |F|^p flattened, at unit length; (B,) from maps (B, C, h, w).

    The paper's equation 2 has the norm of the difference; its code, and the weight of 1000 that is published with it,
    the mean square.
    """
    pairs = [same_size(s, t) for s, t in zip(student, teacher, strict=True)]
    stages = [(attention(s, p) - attention(t, p)).square().mean(dim=1) for s, t in pairs]
    return torch.stack(stages).sum(dim=0)


class At(StudentStep):
    """Acts on all stages that the networks share."""

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        return to_lesson(seen[0].maps)

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        return {"at": attention_transfer(student.maps, of_lesson(lesson), self.method.power)}
