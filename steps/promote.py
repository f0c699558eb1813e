"""Promote a registered student, or not: `python -m steps.promote cfg=quickstart name=<model>`.

Exit codes: 0 promoted (or rolled back, or retired), 3 refused by the gate, 2 bad input.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.compose import cli
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.promote import request as plans
from pipeline.promote.registered_model import Registry
from pipeline.promote.request import OWN
from pipeline.runs.step import execute

if TYPE_CHECKING:
    from pipeline.runs.run import Run
    from pipeline.tracking.client import Delivery


def main(argv: Sequence[str]) -> int:
    """The keys of `OWN` are the step's own."""
    try:
        own, rest = cli.take(argv, OWN)
    except UserError:
        return execute("promote", "", list(argv))  # which says what is wrong with them
    if "--help" in rest:
        print("\n".join(f"  {key}: {words}" for key, words in OWN.items()) + "\n")
    made: list[plans.Plan] = []
    configs: list[Config] = []

    def planned(config: Config) -> Config:
        made.append(plans.make(config, own))
        configs.append(config)
        return plans.prepared(config, made[0])

    def ask(delivery: "Delivery") -> None:
        versions = plans.check(made[0], Registry(delivery, made[0].name))
        if versions:
            from pipeline.promote.promote import same_data  # late: it imports torch

            same_data(configs[0], made[0].name, versions)

    def job(run: "Run") -> float | None:
        from pipeline.promote.promote import promote

        return promote(run, made[0])

    return execute("promote", job, rest, planned, dry_run=lambda config: made[0].words(), own=OWN, ask=ask)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
