"""Settings of `method=reviewkd`."""

from typing import ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig
from pipeline.config.numbers import NonNegative, Width


class ReviewkdConfig(MethodConfig):
    """Knowledge review (Chen et al. 2021)."""

    step: ClassVar[str] = "pipeline.training.methods.reviewkd:Reviewkd"
    maps: ClassVar[bool] = True

    name: Literal["reviewkd"] = key("reviewkd", "distillation method")
    kd_alpha: NonNegative = key(1.0, "weight of the hierarchical context loss")
    fusion_width: Width = key(512, "largest number of channels in which stages are fused")
    preact: Literal["teacher", "both", "none"] = key("teacher", "whose maps are taken before their ReLU")

    @property
    def preacts(self) -> tuple[bool, bool]:
        return self.preact == "both", self.preact != "none"
