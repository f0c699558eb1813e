"""PKT's keys."""

from typing import ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig
from pipeline.config.numbers import NonNegative


class PktConfig(MethodConfig):
    """Probabilistic knowledge transfer (Passalis and Tefas 2018)."""

    step: ClassVar[str] = "pipeline.training.methods.pkt:Pkt"
    teachers: ClassVar[tuple[int, int | None]] = (1, 1)
    per_sample: ClassVar[bool] = False

    name: Literal["pkt"] = key("pkt", "distillation method")
    kd_alpha: NonNegative = key(30_000.0, "weight of the method's term")
