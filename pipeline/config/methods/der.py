"""Settings of `method=der`."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig
from pipeline.config.numbers import NonNegative


class DerConfig(MethodConfig):
    """Dark experience replay++ (Buzzega et al. 2020): kept images with their labels and the logits of their time."""

    step: ClassVar[str] = "pipeline.training.methods.der:Der"
    reads_data: ClassVar[bool] = True
    teachers: ClassVar[tuple[int, int | None]] = (0, None)
    from_teachers: ClassVar[bool] = False
    replays: ClassVar[bool] = True
    compares_logits: ClassVar[bool] = True
    blends: ClassVar[bool] = True

    name: Literal["der"] = key("der", "distillation method")
    kd_alpha: NonNegative = key(0.3, "weight of the logits' squared differences")
    logits: Literal["old", "all"] = key(
        "all", "which logits are compared; old: of classes known when the image was kept; all: of all seen since, too"
    )

    def rules(self, config: Any) -> Iterator[str]:
        if self.mixes:
            yield "method=der compares logits of whole images with kept ones: set method.mixup_alpha and cutmix to 0"
