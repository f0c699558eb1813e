"""CC's keys."""

from typing import ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig
from pipeline.config.numbers import NonNegative, Width


class CcConfig(MethodConfig):
    """Correlation congruence (Peng et al. 2019)."""

    step: ClassVar[str] = "pipeline.training.methods.cc:Cc"
    teachers: ClassVar[tuple[int, int | None]] = (1, 1)
    per_sample: ClassVar[bool] = False

    name: Literal["cc"] = key("cc", "distillation method")
    kd_alpha: NonNegative = key(0.02, "weight of the method's term")
    form: Literal["neighbours", "published", "kernel"] = key(
        "neighbours",
        "what is congruent; neighbours: each sample's correlation with the next, published: the product of both "
        "differences that RepDistiller ran, kernel: the paper's Gaussian kernel of all pairs",
        when="kd_alpha",
    )
    embed_dim: Width = key(128, "width of the embeddings", when="kd_alpha")
