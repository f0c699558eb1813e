"""Settings of `method=ebkd`."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig, distilled
from pipeline.config.numbers import Positive


class EbkdConfig(MethodConfig):
    """Several teachers, each sample's surer ones with more weight: entropy-based (Kwon et al. 2020)."""

    step: ClassVar[str] = "pipeline.training.methods.ebkd:Ebkd"
    teachers: ClassVar[tuple[int, int | None]] = (1, None)
    compares_logits: ClassVar[bool] = True
    blends: ClassVar[bool] = True

    name: Literal["ebkd"] = key("ebkd", "distillation method")
    tau: Positive = key(4.0, "temperature of distillation", when=distilled)
    as_published: bool = key(
        False, "weights as in CA-MKD's public code: they sum to (K-1)/K for K teachers, not to 1", when=distilled
    )

    def rules(self, config: Any) -> Iterator[str]:
        yield from super().rules(config)
        if self.as_published and len(config.model.teachers) == 1:
            yield "method.as_published=true gives a single teacher the weight 0; set it to false, or add a teacher"
