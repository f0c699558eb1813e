"""Run the ablation ladder and compare: `python -m steps.ablate cfg=quickstart rungs=ladder seeds=0,1,2`."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.ablate import request as ablate_plan
from pipeline.compose import cli
from pipeline.compose.compose import compose
from pipeline.compose.rungs import ROOT
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.runs.step import execute

if TYPE_CHECKING:
    from pipeline.runs.run import Run


def main(argv: Sequence[str]) -> int:
    """`rungs`, `seeds` and `force` are the step's own; `rungs=table` prints what the rungs change."""
    try:
        own, rest = cli.take(argv, ablate_plan.OWN)
    except UserError:
        return execute("ablate", "", list(argv))  # which says what is wrong with them
    if "--help" in rest:
        print("\n".join(f"  {key}: {words}" for key, words in ablate_plan.OWN.items()) + "\n")
    if own.get("rungs") == "table":
        return _print_table(rest)
    plans: list[ablate_plan.Plan] = []

    def planned(config: Config) -> Config:
        plans.append(ablate_plan.make(config, own, [text for text in rest if not text.startswith("cfg=")]))
        return ablate_plan.prepared(config, plans[0])

    def job(run: "Run") -> float | None:
        from pipeline.ablate.ablate import ablate

        return ablate(run, plans[0])

    return execute("ablate", job, rest, planned, own=ablate_plan.OWN)


def _print_table(rest: list[str]) -> int:
    try:
        command = cli.parse(rest)
        print(ablate_plan.table(compose(command.cfg or ROOT, command.overrides)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
