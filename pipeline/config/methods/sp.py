"""Settings of `method=sp`."""

from typing import ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig
from pipeline.config.numbers import NonNegative


class SpConfig(MethodConfig):
    """Similarity-preserving distillation (Tung and Mori 2019)."""

    step: ClassVar[str] = "pipeline.training.methods.sp:Sp"
    maps: ClassVar[bool] = True
    per_sample: ClassVar[bool] = False

    name: Literal["sp"] = key("sp", "distillation method")
    kd_alpha: NonNegative = key(3000.0, "weight of the distance between the batch's similarity matrices")
