"""Settings of `method=ttm`."""

from typing import ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig, distilled
from pipeline.config.numbers import NonNegative, Positive


class TtmConfig(MethodConfig):
    """Transformed teacher matching: a softened teacher, no temperature on the student (TTM, Zheng & Yang 2024)."""

    step: ClassVar[str] = "pipeline.training.methods.ttm:Ttm"
    compares_logits: ClassVar[bool] = True
    blends: ClassVar[bool] = True

    name: Literal["ttm"] = key("ttm", "distillation method")
    kd_alpha: NonNegative = key(45.0, "weight of distillation in the B-step")
    tau: Positive = key(10.0, "temperature of the teacher, 1 over the exponent of its power transform", when=distilled)
