"""FitNet-MKD's keys."""

from typing import ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig
from pipeline.config.numbers import AtLeastOne, NonNegative


class FitnetMkdConfig(MethodConfig):
    """Hints from several teachers (Romero et al. 2015)."""

    step: ClassVar[str] = "pipeline.training.methods.fitnet_mkd:FitnetMkd"
    teachers: ClassVar[tuple[int, int | None]] = (1, None)
    maps: ClassVar[bool] = True

    name: Literal["fitnet_mkd"] = key("fitnet_mkd", "distillation method")
    kd_alpha: NonNegative = key(100.0, "weight of the hints")
    hint_stage: AtLeastOne = key(2, "stage whose maps are regressed, from 1", when="kd_alpha")
