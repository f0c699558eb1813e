"""Settings of `method=ft`."""

from typing import ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig
from pipeline.config.numbers import Epoch, NonNegative, Positive


class FtConfig(MethodConfig):
    """Factor transfer (Kim et al. 2018)."""

    step: ClassVar[str] = "pipeline.training.methods.ft:Ft"
    task: ClassVar[str] = "pipeline.training.methods.ft:FactorTransfer"
    maps: ClassVar[bool] = True

    name: Literal["ft"] = key("ft", "distillation method")
    kd_alpha: NonNegative = key(200.0, "weight of the distance between factors")
    paraphraser_ratio: Positive = key(0.5, "channels of a factor per channel of the teacher's map")
    paraphraser_epochs: Epoch = key(30, "epochs in which the paraphraser learns to reconstruct the teacher's map")
    paraphraser_lr: Positive = key(0.01, "learning rate of the paraphraser")

    @property
    def a_epochs(self) -> int:
        """Epochs of the paraphraser; none where nothing is distilled."""
        return self.paraphraser_epochs if self.distils else 0
