"""FitNet hints from several teachers (Romero et al. 2015): the student's map, regressed on each teacher's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.features import Features
from pipeline.data.batches import Batch
from pipeline.errors import UserError
from pipeline.training.methods.maps import squared_distance
from pipeline.training.methods.projectors import Regressor
from pipeline.training.objective import Moment
from pipeline.training.step import Lesson, Setup, StudentStep


def mean_hint(regressed: Sequence[Tensor], maps: Sequence[Tensor]) -> Tensor:
    """mean_k mean_chw (r_k - F_k)^2 per sample: (B,) from K regressed student maps and teacher maps (B, C_k, h_k, w_k).

    The mean stays in the graph: the public code's `torch.tensor` of the K losses cuts it off, and only distils logits.
    """
    each = [squared_distance(r, f) for r, f in zip(regressed, maps, strict=True)]
    return torch.stack(each).mean(dim=0)


class FitnetMkd(StudentStep):
    """A regressor for each teacher, at one stage."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        stage, stages = self.method.hint_stage, len(setup.student_maps)
        if stage > stages:
            raise UserError(
                f"method.hint_stage={stage} and {stages} stages that student and teachers share: give one from 1 to "
                f"{stages}"
            )
        self.at = stage - 1
        for k, maps in enumerate(setup.teacher_maps):
            self.own[f"regressor_{k}"] = Regressor(setup.student_maps[self.at], maps[self.at])

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        return {f"map_{k}": features.maps[self.at] for k, features in enumerate(seen)}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        teachers = range(len(self._teachers))
        regressed = [self.own[f"regressor_{k}"](student.maps[self.at]) for k in teachers]
        return {"fitnet_mkd": mean_hint(regressed, [lesson[f"map_{k}"] for k in teachers])}
