"""Settings of `method=kd`."""

from typing import ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig, distilled
from pipeline.config.numbers import NonNegative, Positive


class KdConfig(MethodConfig):
    """Knowledge distillation from the logits of one teacher (Hinton et al. 2015)."""

    step: ClassVar[str] = "pipeline.training.methods.kd:Kd"
    compares_logits: ClassVar[bool] = True
    blends: ClassVar[bool] = True

    name: Literal["kd"] = key("kd", "distillation method")
    ce_alpha: NonNegative = key(0.1, "weight of cross-entropy in the B-step")
    kd_alpha: NonNegative = key(0.9, "weight of distillation in the B-step")
    tau: Positive = key(4.0, "temperature of distillation", when=distilled)
