"""The other processes of torchrun, which help train what a worker's first process has claimed."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import configure
from pipeline.errors import Interrupted, NonFinite, Pruned, Taken
from pipeline.runs.signals import Stop

if TYPE_CHECKING:
    from pipeline.training.loop import Verdict

logger = logging.getLogger("asib")


def tell(trial: dict[str, Any] | None) -> None:
    """Send the next trial to torchrun's other processes; None: no more trials."""
    from pipeline.training import distributed

    distributed.first_process_says(json.dumps(trial))


def follow(stop: Stop) -> int:
    """Help train whatever the first process claims, until nothing is left."""
    from pipeline.distill import distill
    from pipeline.runs import opening
    from pipeline.training import distributed

    logger.setLevel(logging.ERROR)
    distributed.join()
    while (trial := json.loads(distributed.first_process_says(""))) is not None:
        config = configure(trial["config"])
        try:
            distill.trial(opening.follow("distill", config, Path(trial["folder"]), stop=stop), _Silent())
        except Interrupted as stopped:
            return 128 + stopped.signum
        except (NonFinite, Pruned, Taken):
            continue
    return 0


class _Silent:
    """The watch of torchrun's other processes, which follow the first one's decisions."""

    reason = ""

    def __call__(self, epoch: int, metrics: Mapping[str, float]) -> "Verdict":
        raise RuntimeError("only the first process asks")

    def still_ours(self) -> bool:
        raise RuntimeError("only the first process asks")
