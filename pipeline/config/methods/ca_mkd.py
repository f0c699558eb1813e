"""CA-MKD's keys."""

from typing import ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig, distilled
from pipeline.config.numbers import NonNegative, Positive


class CaMkdConfig(MethodConfig):
    """Confidence-aware multi-teacher distillation (Zhang et al. 2022)."""

    step: ClassVar[str] = "pipeline.training.methods.ca_mkd:CaMkd"
    teachers: ClassVar[tuple[int, int | None]] = (1, None)
    maps: ClassVar[bool] = True
    compares_logits: ClassVar[bool] = True

    name: Literal["ca_mkd"] = key("ca_mkd", "distillation method")
    kd_alpha: NonNegative = key(1.0, "weight of the teachers' logits")
    feat_alpha: NonNegative = key(50.0, "weight of the teachers' last feature maps")
    tau: Positive = key(4.0, "temperature", when="kd_alpha")
    as_published: bool = key(
        False,
        "divide both terms by the number of teachers once more, and let gradient through the maps' weights, as the "
        "public code does",
        when=distilled,
    )

    @property
    def distils(self) -> bool:
        return super().distils or self.feat_alpha > 0

    @property
    def term_weights(self) -> dict[str, float]:
        return {"ca_mkd_kd": self.kd_alpha, "ca_mkd_feat": self.feat_alpha}
