"""Settings of `method=at`."""

from typing import ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig
from pipeline.config.numbers import AtLeastOne, NonNegative


class AtConfig(MethodConfig):
    """Attention transfer (Zagoruyko and Komodakis 2017)."""

    step: ClassVar[str] = "pipeline.training.methods.at:At"
    maps: ClassVar[bool] = True

    name: Literal["at"] = key("at", "distillation method")
    kd_alpha: NonNegative = key(1000.0, "weight of the distance between attention maps")
    power: AtLeastOne = key(2, "power of the activations that attention is the mean of over channels")
