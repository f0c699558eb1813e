"""Variational information distillation: the likelihood of the teacher's maps given the student's (Ahn et al. 2019)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.features import Features
from pipeline.config.methods.vid import MIN_VARIANCE
from pipeline.data.batches import Batch
from pipeline.training.methods.maps import of_lesson, same_size, to_lesson
from pipeline.training.methods.projectors import Shape
from pipeline.training.objective import Moment
from pipeline.training.step import Lesson, Setup, StudentStep


def negative_log_likelihood(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """mean_chw ½((μ − F_t)²/σ_c² + log σ_c²), (B,) from maps (B, C, h, w), variances (C,).

    The constant ½ log 2π is left out.
    """
    variance = variance.float()[:, None, None]
    return 0.5 * ((mean.float() - target.float()).square() / variance + variance.log()).mean(dim=(1, 2, 3))


class Variational(nn.Module):
    """q(F_t | F_s) = N(reg(F_s), σ_c²) of one stage: three 1×1 convolutions, and a trained variance for each channel.

    σ_c² = softplus(ρ_c) + 1e-5.
    """

    def __init__(self, student: Shape, teacher: Shape, init_variance: float) -> None:
        super().__init__()
        c_s, c_t = student[0], teacher[0]
        self.regressor = nn.Sequential(
            nn.Conv2d(c_s, c_t, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(c_t, c_t, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(c_t, c_t, 1, bias=False),
        )
        above = init_variance - MIN_VARIANCE
        self.rho = nn.Parameter(torch.full((c_t,), above + math.log(-math.expm1(-above))))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The stage's loss (B,); the larger map is average-pooled."""
        student, teacher = same_size(student, teacher)
        return negative_log_likelihood(self.regressor(student), F.softplus(self.rho) + MIN_VARIANCE, teacher)


class Stages(nn.Module):
    """The mean over stages, (B,): one module, so that it is wrapped as one."""

    def __init__(self, student: Sequence[Shape], teacher: Sequence[Shape], init_variance: float) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Variational(s, t, init_variance) for s, t in zip(student, teacher, strict=True))

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        losses = [stage(s, t) for stage, s, t in zip(self.stages, student, teacher, strict=True)]
        return torch.stack(losses).mean(dim=0)


class Vid(StudentStep):
    """Acts on all stages that the networks share; regressors and variances are trained with the student."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.own["stages"] = Stages(setup.student_maps, setup.teacher_maps[0], self.method.init_variance)

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        return to_lesson(seen[0].maps)

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        return {"vid": self.own["stages"](student.maps, of_lesson(lesson))}
