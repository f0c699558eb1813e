"""Settings of `method=aver`."""

from typing import ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig, distilled
from pipeline.config.numbers import Positive


class AverConfig(MethodConfig):
    """Several teachers with equal weights: the mean of their distillation losses."""

    step: ClassVar[str] = "pipeline.training.methods.aver:Aver"
    teachers: ClassVar[tuple[int, int | None]] = (1, None)
    compares_logits: ClassVar[bool] = True
    blends: ClassVar[bool] = True

    name: Literal["aver"] = key("aver", "distillation method")
    tau: Positive = key(4.0, "temperature of distillation", when=distilled)
