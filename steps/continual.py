"""Learn classes task by task and measure what is forgotten, with any method and any teachers.

python -m steps.continual cfg=split_cifar tasks=10 method=lwf
python -m steps.continual cfg=quickstart tasks=5 method=asib continual.past=true
python -m steps.continual cfg=quickstart tasks=5 method=ewc continual.lambda_ewc=1000
"""

import sys
from collections.abc import Mapping

from pipeline.compose import cli
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.runs.step import Step

OWN = {"tasks": "tasks that come one after another: continual.num_tasks"}


def check(config: Config, command: cli.Command) -> None:
    """Refuse what would be one training on all data. Raises UserError."""
    if config.continual.num_tasks is None:
        raise UserError("tasks is not given: tasks=5, or continual.num_tasks in the file that cfg names")


def cfg(own: Mapping[str, str]) -> str:
    """What `cfg` names unless it is given."""
    return "split_cifar"


STEP = Step(
    "continual",
    __doc__,
    OWN,
    job="pipeline.distill.distill:distill",
    act=check,
    cfg=cfg,
    short={"tasks": "continual.num_tasks"},
)
main = STEP.main

if __name__ == "__main__":
    sys.exit(main())
