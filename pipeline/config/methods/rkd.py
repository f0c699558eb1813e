"""RKD's keys."""

from typing import ClassVar, Literal

from pydantic import model_validator

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig
from pipeline.config.numbers import NonNegative


class RkdConfig(MethodConfig):
    """Relational knowledge distillation (Park et al. 2019)."""

    step: ClassVar[str] = "pipeline.training.methods.rkd:Rkd"
    teachers: ClassVar[tuple[int, int | None]] = (1, 1)
    per_sample: ClassVar[bool] = False

    name: Literal["rkd"] = key("rkd", "distillation method")
    kd_alpha: NonNegative = key(1.0, "weight of both of the method's terms")
    distance_alpha: NonNegative = key(25.0, "weight of the distances of pairs, within kd_alpha", when="kd_alpha")
    angle_alpha: NonNegative = key(50.0, "weight of the angles of triplets, within kd_alpha", when="kd_alpha")

    @model_validator(mode="after")
    def _something(self) -> "RkdConfig":
        if not self.distance_alpha and not self.angle_alpha:
            raise ValueError(
                "method.distance_alpha=0 and method.angle_alpha=0 leave nothing to distil: set one of them above 0"
            )
        return self

    @property
    def term_weights(self) -> dict[str, float]:
        parts = {"rkd_distance": self.distance_alpha, "rkd_angle": self.angle_alpha}
        return {name: self.kd_alpha * alpha for name, alpha in parts.items() if alpha > 0}
