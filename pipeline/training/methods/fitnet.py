"""Hints: a regressor on one of the student's maps predicts the teacher's (Romero et al. 2015)."""

from collections.abc import Sequence

from torch import Tensor

from models.features import Features
from pipeline.data.batches import Batch
from pipeline.errors import UserError
from pipeline.training.methods.maps import squared_distance
from pipeline.training.methods.projectors import Regressor
from pipeline.training.objective import Moment
from pipeline.training.step import Lesson, Setup, StudentStep


class Fitnet(StudentStep):
    """The regressor is trained with the student, in one phase."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        stage, stages = self.method.hint_stage, len(setup.student_maps)
        if stage > stages:
            raise UserError(
                f"method.hint_stage={stage}: student and teacher share {stages} stages; choose 1 to {stages}"
            )
        self._at = stage - 1
        self.own["regressor"] = Regressor(setup.student_maps[self._at], setup.teacher_maps[0][self._at])

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        return {"hint": seen[0].maps[self._at]}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        return {"fitnet": squared_distance(self.own["regressor"](student.maps[self._at]), lesson["hint"])}
