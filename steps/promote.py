"""Promote a registered student if the gate passes; or roll back or retire a version.

    python -m steps.promote cfg=quickstart name=<model> dry_run=true
    python -m steps.promote cfg=quickstart name=<model> version=3 gate.alpha=0.01
    python -m steps.promote name=<model> rollback=true reason='wrong labels'

Exit codes: 0 promoted (or rolled back, or retired), 3 refused by the gate, 2 bad input.
"""

import sys

from pipeline.compose.help import ELSEWHERE
from pipeline.config import Config
from pipeline.promote import request
from pipeline.promote.registered_model import Registry
from pipeline.promote.request import Plan
from pipeline.runs.step import Step
from pipeline.tracking.pipe import Delivery


def ask(plan: Plan, config: Config, delivery: Delivery) -> None:
    """Refuse what the registry cannot do, before a run is created."""
    versions = request.check(plan, Registry(delivery, plan.name))
    if versions:
        from pipeline.promote.promote import same_data  # late: it imports torch

        same_data(config, plan.name, versions)


KEYS = ("dataset.name", "dataset.root", "dataset.path", "dataset.eval_batch_size", *ELSEWHERE)
STEP = Step(
    "promote",
    __doc__,
    request.OWN,
    request.read,
    "pipeline.promote.promote:promote",
    words=Plan.words,
    ask=ask,
    keys=KEYS,
)
main = STEP.main

if __name__ == "__main__":
    sys.exit(main())
