"""Settings of `method=vid`."""

from typing import ClassVar, Literal

from pydantic import model_validator

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig
from pipeline.config.numbers import NonNegative, Positive

MIN_VARIANCE = 1e-5
"""Floor of a channel's variance."""


class VidConfig(MethodConfig):
    """Variational information distillation (Ahn et al. 2019)."""

    step: ClassVar[str] = "pipeline.training.methods.vid:Vid"
    maps: ClassVar[bool] = True

    name: Literal["vid"] = key("vid", "distillation method")
    kd_alpha: NonNegative = key(1.0, "weight of the teacher's negative log-likelihood")
    init_variance: Positive = key(5.0, "variance of each channel before training")

    @model_validator(mode="after")
    def _above_floor(self) -> "VidConfig":
        if self.init_variance <= MIN_VARIANCE:
            raise ValueError(f"method.init_variance={self.init_variance}: give more than the floor of {MIN_VARIANCE}.")
        return self
