"""ITRD's keys."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig
from pipeline.config.numbers import NonNegative

Order = Annotated[float, Field(ge=0.5, le=10), "a correlation's distance from 1 counts by twice this power"]


class ItrdConfig(MethodConfig):
    """Information-theoretic representation distillation (Miles et al. 2022)."""

    step: ClassVar[str] = "pipeline.training.methods.itrd:Itrd"
    teachers: ClassVar[tuple[int, int | None]] = (1, 1)
    per_sample: ClassVar[bool] = False

    name: Literal["itrd"] = key("itrd", "distillation method")
    kd_alpha: NonNegative = key(1.0, "weight of both of the method's terms")
    lambda_corr: NonNegative = key(2.0, "weight of the correlation term, within kd_alpha", when="kd_alpha")
    lambda_mutual: NonNegative = key(1.0, "weight of the mutual information term, within kd_alpha", when="kd_alpha")
    alpha_it: Order = key(1.01, "order of the correlation term's entropy", when="kd_alpha")

    @property
    def term_weights(self) -> dict[str, float]:
        return {"itrd_corr": self.kd_alpha * self.lambda_corr, "itrd_mutual": self.kd_alpha * self.lambda_mutual}
