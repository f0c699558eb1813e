"""The other processes of torchrun, which help train what a worker's first process has taken."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import configure
from pipeline.errors import Interrupted, NonFinite, Pruned, Taken
from pipeline.runs.signals import Stop

if TYPE_CHECKING:
    from pipeline.runs.run import Run

logger = logging.getLogger("asib")


def tell(run: "Run | None") -> None:
    """Tell torchrun's other processes which nested run comes next; None: no more."""
    from pipeline.training import distributed

    distributed.first_process_says(
        json.dumps(None if run is None else {"config": run.config.model_dump(mode="json"), "folder": str(run.folder)})
    )


def follow(stop: Stop, train: "Callable[[Run], object]") -> int:
    """Help `train` whatever the first process has taken, until nothing is left. Returns the process's exit code."""
    from pipeline.runs import opening
    from pipeline.training import distributed

    logger.setLevel(logging.ERROR)
    distributed.join()
    while (told := json.loads(distributed.first_process_says(""))) is not None:
        config = configure(told["config"])
        try:
            train(opening.follow("distill", config, Path(told["folder"]), stop=stop))
        except Interrupted as stopped:
            return 128 + stopped.signum
        except (NonFinite, Pruned, Taken):
            continue
    return 0
