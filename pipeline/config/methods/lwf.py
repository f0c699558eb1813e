"""Settings of `method=lwf`."""

from typing import ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig, distilled
from pipeline.config.numbers import NonNegative, Positive


class LwfConfig(MethodConfig):
    """Learning without forgetting (Li and Hoiem 2016): distillation from the student as it was before the task."""

    step: ClassVar[str] = "pipeline.training.methods.lwf:Lwf"
    teachers: ClassVar[tuple[int, int | None]] = (0, None)
    from_teachers: ClassVar[bool] = False
    past: ClassVar[bool] = True
    compares_logits: ClassVar[bool] = True
    blends: ClassVar[bool] = True

    name: Literal["lwf"] = key("lwf", "distillation method")
    kd_alpha: NonNegative = key(0.75, "weight of distillation in the B-step")
    tau: Positive = key(2.0, "temperature of distillation", when=distilled)
    logits: Literal["old", "all"] = key(
        "old", "which logits are distilled; old: of classes known before the task; all: of new ones, too, which the"
        " past student gives no probability", when=distilled,
    )  # fmt: skip
    samples: Literal["all", "new", "old"] = key(
        "all", "which images are distilled; new: of the task's classes; old: kept ones", when=distilled
    )
