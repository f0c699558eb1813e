"""Settings of `method=my_kd`, a method from outside the repository; torch is imported by its step only."""

from typing import ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig
from pipeline.config.numbers import Positive


class MyKdConfig(MethodConfig):
    """Regression on logits (Ba and Caruana 2014), scaled."""

    step: ClassVar[str] = f"{__name__}_step:MyKd"
    compares_logits: ClassVar[bool] = True

    name: Literal["my_kd"] = key("my_kd", "distillation method")
    scale: Positive = key(1.0, "number that both networks' logits are divided by", when="kd_alpha")
