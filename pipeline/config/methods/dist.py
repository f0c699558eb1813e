"""Settings of `method=dist`."""

from typing import ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig, distilled
from pipeline.config.numbers import NonNegative, Positive


class DistConfig(MethodConfig):
    """Distillation of relations between and within classes by Pearson correlation (DIST, Huang et al. 2022)."""

    step: ClassVar[str] = "pipeline.training.methods.dist:Dist"
    compares_logits: ClassVar[bool] = True
    per_sample: ClassVar[bool] = False
    blends: ClassVar[bool] = True

    name: Literal["dist"] = key("dist", "distillation method")
    kd_alpha: NonNegative = key(2.0, "weight of distillation in the B-step")
    tau: Positive = key(4.0, "temperature of distillation", when=distilled)
    beta: NonNegative = key(1.0, "weight of the relation between classes, one sample at a time", when=distilled)
    gamma: NonNegative = key(1.0, "weight of the relation within classes, over the batch", when=distilled)

    @property
    def term_weights(self) -> dict[str, float]:
        return {"dist_between": self.kd_alpha * self.beta, "dist_within": self.kd_alpha * self.gamma}
