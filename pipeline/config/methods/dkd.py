"""Settings of `method=dkd`."""

from typing import ClassVar, Literal

from pydantic import model_validator

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig, distilled
from pipeline.config.numbers import Epochs, NonNegative, Positive


class DkdConfig(MethodConfig):
    """Decoupled knowledge distillation: target class and other classes apart (Zhao et al. 2022)."""

    step: ClassVar[str] = "pipeline.training.methods.dkd:Dkd"
    compares_logits: ClassVar[bool] = True

    name: Literal["dkd"] = key("dkd", "distillation method")
    tau: Positive = key(4.0, "temperature of distillation", when=distilled)
    alpha: NonNegative = key(1.0, "weight of the target-class term", when=distilled)
    beta: NonNegative = key(8.0, "weight of the non-target-class term", when=distilled)
    kd_warmup_epochs: Epochs = key(
        20, "B-epochs over which the distillation weight rises to 1, as in its paper", when=distilled
    )

    @model_validator(mode="after")
    def _something_is_distilled(self) -> "DkdConfig":
        if self.kd_alpha > 0 and self.alpha == 0 and self.beta == 0:
            raise ValueError("method.alpha and method.beta are both 0: dkd would distil nothing; raise one of them")
        return self
