"""CRD's keys."""

from typing import ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig
from pipeline.config.numbers import AtLeastOne, BelowOne, NonNegative, Positive, Width


class CrdConfig(MethodConfig):
    """Contrastive representation distillation (Tian et al. 2020)."""

    step: ClassVar[str] = "pipeline.training.methods.crd:Crd"
    reads_data: ClassVar[bool] = True
    teachers: ClassVar[tuple[int, int | None]] = (1, 1)

    name: Literal["crd"] = key("crd", "distillation method")
    kd_alpha: NonNegative = key(0.8, "weight of the method's term")
    negatives: AtLeastOne = key(16_384, "images of other classes that each sample is contrasted with", when="kd_alpha")
    tau: Positive = key(0.07, "temperature of the contrast", when="kd_alpha")
    momentum: BelowOne = key(0.5, "share of the old memory in an update", when="kd_alpha")
    embed_dim: Width = key(128, "width of the embeddings", when="kd_alpha")
