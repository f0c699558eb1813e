"""Settings of `method=nkd`."""

from typing import ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig, distilled
from pipeline.config.numbers import NonNegative, Positive


class NkdConfig(MethodConfig):
    """Normalised knowledge distillation: soft target class, other classes normalised (Yang et al. 2023)."""

    step: ClassVar[str] = "pipeline.training.methods.nkd:Nkd"
    compares_logits: ClassVar[bool] = True

    name: Literal["nkd"] = key("nkd", "distillation method")
    tau: Positive = key(1.0, "temperature of the non-target classes", when=distilled)
    gamma: NonNegative = key(1.5, "weight of the non-target classes", when=distilled)
