"""Settings of `method=nst`."""

from typing import ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig
from pipeline.config.numbers import NonNegative


class NstConfig(MethodConfig):
    """Neuron selectivity transfer (Huang and Wang 2017)."""

    step: ClassVar[str] = "pipeline.training.methods.nst:Nst"
    maps: ClassVar[bool] = True

    name: Literal["nst"] = key("nst", "distillation method")
    kd_alpha: NonNegative = key(50.0, "weight of the discrepancy between the channels' distributions")
