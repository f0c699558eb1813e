"""Settings of `method=finetune`."""

from typing import ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig


class FinetuneMethodConfig(MethodConfig):
    """Cross-entropy alone; with keys of `continual`, replay, elastic weight consolidation and joint training."""

    step: ClassVar[str] = "pipeline.training.step:StudentStep"
    teachers: ClassVar[tuple[int, int | None]] = (0, None)
    from_teachers: ClassVar[bool] = False

    name: Literal["finetune"] = key("finetune", "distillation method")

    @property
    def distils(self) -> bool:
        return False

    @property
    def term_weights(self) -> dict[str, float]:
        return {}
