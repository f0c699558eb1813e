"""Similarity-preserving distillation: which images of a batch the networks find alike (Tung and Mori 2019)."""

from collections.abc import Sequence

from torch import Tensor

from models.features import Features
from pipeline.data.batches import Batch
from pipeline.training.methods.maps import scaled, unit
from pipeline.training.objective import Moment, whole
from pipeline.training.step import Lesson, StudentStep


def similarities(x: Tensor) -> Tensor:
    """Ĝ (B, B) of maps (B, C, h, w): the rows of flatten(F) flatten(F)ᵀ at unit length.

    One factor for all images changes nothing; one for each would.
    """
    rows = scaled(x.float().flatten(1), (0, 1))
    return unit(rows @ rows.T)


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """‖Ĝ_s − Ĝ_t‖²_F / B², a scalar, from maps (B, ., ., .) of any two shapes."""
    return (similarities(student) - similarities(teacher)).square().mean()


class Sp(StudentStep):
    """Acts on the last stage, and on the global batch under several processes."""

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        return {"map": seen[0].maps[-1]}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        return {"sp": similarity_preserving(whole(student.maps[-1], batch), whole(lesson["map"], batch))}
