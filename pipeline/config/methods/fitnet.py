"""Settings of `method=fitnet`."""

from typing import ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig
from pipeline.config.numbers import AtLeastOne, NonNegative


class FitnetConfig(MethodConfig):
    """Hints: the student regresses one feature map of the teacher (Romero et al. 2015)."""

    step: ClassVar[str] = "pipeline.training.methods.fitnet:Fitnet"
    maps: ClassVar[bool] = True

    name: Literal["fitnet"] = key("fitnet", "distillation method")
    kd_alpha: NonNegative = key(100.0, "weight of the hint's mean squared error")
    hint_stage: AtLeastOne = key(2, "stage whose map is the hint, counted from 1 in the stages that the networks share")
