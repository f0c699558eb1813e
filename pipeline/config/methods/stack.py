"""Settings of `method=stack`."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig, distilled
from pipeline.config.numbers import Positive


class StackConfig(MethodConfig):
    """Several teachers in one convex combination of logits, fitted on held-out images (stacking, Breiman 1996)."""

    step: ClassVar[str] = "pipeline.training.methods.stack:Stack"
    reads_data: ClassVar[bool] = True
    teachers: ClassVar[tuple[int, int | None]] = (1, None)
    compares_logits: ClassVar[bool] = True
    blends: ClassVar[bool] = True

    name: Literal["stack"] = key("stack", "distillation method")
    tau: Positive = key(4.0, "temperature of distillation", when=distilled)

    def rules(self, config: Any) -> Iterator[str]:
        yield from super().rules(config)
        if config.dataset.val_fraction == 0:
            yield (
                "method=stack fits the teachers' weights on held-out images, and dataset.val_fraction=0 holds out "
                "none; raise it (0.1 is usual), or use method=aver"
            )
