"""MMKD's keys."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig, distilled
from pipeline.config.numbers import AtLeastOne, AtLeastTwo, NonNegative, Positive


class MmkdConfig(MethodConfig):
    """Several teachers, weighted by meta-learned networks (Zhang et al. 2023)."""

    step: ClassVar[str] = "pipeline.training.methods.mmkd:Mmkd"
    reads_data: ClassVar[bool] = True
    task: ClassVar[str] = "pipeline.training.methods.mmkd:OneProcess"
    teachers: ClassVar[tuple[int, int | None]] = (1, None)
    maps: ClassVar[bool] = True
    compares_logits: ClassVar[bool] = True

    name: Literal["mmkd"] = key("mmkd", "distillation method")
    kd_alpha: NonNegative = key(1.0, "weight of the teachers' logits")
    feat_alpha: NonNegative = key(100.0, "weight of the teachers' last feature maps")
    tau: Positive = key(4.0, "temperature", when="kd_alpha")
    meta_interval: AtLeastOne = key(5, "batches from one update of the weight networks to the next", when=distilled)
    meta_lr: Positive = key(1e-3, "learning rate of the weight networks (Adam)", when=distilled)
    meta_weight_decay: NonNegative = key(1e-4, "weight decay of the weight networks", when=distilled)
    meta_steps: AtLeastOne = key(
        2, "virtual steps of the student by the weighted terms, before one by cross-entropy", when=distilled
    )
    buffer_size: AtLeastTwo = key(256, "hard images kept for updates of the weight networks", when=distilled)

    @property
    def distils(self) -> bool:
        return super().distils or self.feat_alpha > 0

    @property
    def term_weights(self) -> dict[str, float]:
        return {"mmkd_kd": self.kd_alpha, "mmkd_feat": self.feat_alpha}

    @property
    def backward_beside_updates(self) -> float:
        """Per image: of each virtual step the gradient (2), and the way back through step and gradient (6); then 2."""
        return (8 * (self.meta_steps + 1) + 2) / (self.meta_steps + 2)

    def inactive(self, config: Any) -> Iterator[str]:
        if len(config.model.teachers) == 1:
            for name in ("meta_interval", "meta_lr", "meta_weight_decay", "meta_steps", "buffer_size"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    yield f"method.{name}: the weight of a single teacher is 1"
