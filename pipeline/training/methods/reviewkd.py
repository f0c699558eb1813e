"""Knowledge review: each stage of the student, fused with all later ones, learns the teacher's (Chen et al. 2021)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.features import Features
from pipeline.data.batches import Batch
from pipeline.training.methods.maps import of_lesson, to_lesson
from pipeline.training.methods.projectors import BatchNorm, Shape
from pipeline.training.objective import Moment
from pipeline.training.step import Lesson, Setup, StudentStep

LEVELS = (4, 2, 1)
"""Sides of the pyramid's pooled maps."""


def hierarchical_context(fused: Tensor, target: Tensor) -> Tensor:
    """HCL (B,) of two maps (B, C, h, w): a mean over a pyramid's levels, each a mean square.

    The whole map has weight 1, pooled to 4×4 ½, to 2×2 ¼, to 1×1 ⅛; levels not smaller than the map are left out,
    and the weights go to those that are left, in this order.
    """
    fused, target = fused.float(), target.float()
    total, weights, weight = (fused - target).square().mean(dim=(1, 2, 3)), 1.0, 1.0
    for side in LEVELS:
        if side < fused.shape[2]:
            weight /= 2
            difference = F.adaptive_avg_pool2d(fused, side) - F.adaptive_avg_pool2d(target, side)
            total, weights = total + weight * difference.square().mean(dim=(1, 2, 3)), weights + weight
    return total / weights


def _conv(inputs: int, outputs: int, side: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, BatchNorm(outputs))


class Fusion(nn.Module):
    """ABF: a stage and what the later ones left, weighted by attention maps for each place.

    Args:
        student, teacher: the stage's shapes.
        width: channels of what is passed on.
        last: the last stage has nothing to fuse with.
    """

    def __init__(self, student: Shape, teacher: Shape, width: int, last: bool) -> None:
        super().__init__()
        self.size = teacher[1:]
        self.inward, self.outward = _conv(student[0], width, 1), _conv(width, teacher[0], 3)
        self.attention = None if last else nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid())

    def forward(self, x: Tensor, later: Tensor | None) -> tuple[Tensor, Tensor]:
        """What learns the teacher's map (B, *teacher), and what is passed on (B, width, h_t, w_t)."""
        x = self.inward(x)
        if self.attention is not None and later is not None:
            later = F.interpolate(later, x.shape[2:])
            own, other = self.attention(torch.cat([x, later], dim=1)).split(1, dim=1)
            x = own * x + other * later
        if x.shape[2:] != self.size:
            x = F.interpolate(x, self.size)
        return self.outward(x), x


class Review(nn.Module):
    """All stages, fused from the last to the first."""

    def __init__(self, student: Sequence[Shape], teacher: Sequence[Shape], width: int) -> None:
        super().__init__()
        width, last = min(width, student[-1][0]), len(student) - 1
        self.stages = nn.ModuleList(
            Fusion(s, t, width, i == last) for i, (s, t) in enumerate(zip(student, teacher, strict=True))
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """One map (B, C_t, h_t, w_t) for each stage, first to last."""
        fused: list[Tensor] = []
        later = None
        for stage, x in zip(reversed(self.stages), reversed(maps), strict=True):
            out, later = stage(x, later)
            fused.insert(0, out)
        return fused


def review(fused: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Σ_stages HCL, (B,)."""
    return torch.stack([hierarchical_context(s, t) for s, t in zip(fused, teacher, strict=True)]).sum(dim=0)


def _with_pooled(seen: Features) -> list[Tensor]:
    """The stages' maps, then the pooled feature as a map of one place: the published last stage."""
    return [*seen.maps, seen.feat_2d[:, :, None, None]]


class Reviewkd(StudentStep):
    """Acts on all stages that the networks share, and on the pooled feature; the fusion is trained with the student."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        (teacher,) = setup.teachers
        student_shapes = [*setup.student_maps, (setup.student.feature_dim, 1, 1)]
        teacher_shapes = [*setup.teacher_maps[0], (teacher.feature_dim, 1, 1)]
        self.own["review"] = Review(student_shapes, teacher_shapes, self.method.fusion_width)

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        return to_lesson(_with_pooled(seen[0]))

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        return {"reviewkd": review(self.own["review"](_with_pooled(student)), of_lesson(lesson))}
