"""Settings of `method=wttm`."""

from typing import ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig, distilled
from pipeline.config.numbers import NonNegative, Positive


class WttmConfig(MethodConfig):
    """Transformed teacher matching with samples weighted by the teacher's power sum (WTTM, Zheng & Yang 2024)."""

    step: ClassVar[str] = "pipeline.training.methods.wttm:Wttm"
    compares_logits: ClassVar[bool] = True
    blends: ClassVar[bool] = True

    name: Literal["wttm"] = key("wttm", "distillation method")
    kd_alpha: NonNegative = key(4.0, "weight of distillation in the B-step")
    tau: Positive = key(5.0, "temperature of the teacher, 1 over the exponent of its power transform", when=distilled)
