"""Settings of `method=aekd`."""

from typing import ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig, distilled
from pipeline.config.numbers import Deviation, Positive


class AekdConfig(MethodConfig):
    """Several teachers, weighted for a common descent direction: adaptive ensemble (AE-KD, Du et al. 2020)."""

    step: ClassVar[str] = "pipeline.training.methods.aekd:Aekd"
    teachers: ClassVar[tuple[int, int | None]] = (1, None)
    compares_logits: ClassVar[bool] = True
    blends: ClassVar[bool] = True

    name: Literal["aekd"] = key("aekd", "distillation method")
    tau: Positive = key(4.0, "temperature of distillation", when=distilled)
    tolerance: Deviation = key(0.6, "largest weight of a teacher; 1/K if that is more", when=distilled)
