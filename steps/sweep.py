"""Search hyperparameters: `python -m steps.sweep cfg=quickstart sweep=kd_ib_tau trials=30 workers=2`."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.compose import cli
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.runs.step import configuration, execute, outside

if TYPE_CHECKING:
    from pipeline.runs.run import Run
    from pipeline.sweep.request import Plan

OWN = {
    "sweep": "the search space: a name in conf/sweep (kd_ib_tau by default), or a YAML file",
    "trials": "how many configurations; by default what the sweep's file says",
    "workers": "how many at a time; 1 by default",
    "cluster": "where they run: local (the default), slurm, or a YAML file",
    "storage": "the study's database; by default ASIB_STORAGE, or studies.db in output_dir; postgresql://…",
    "study": "its name; by default derived from everything that decides what is found",
    "join": "name of a study that is under way: help with its trials, from any machine that reaches storage",
    "reap": "true: end runs in MLflow whose process is gone, and do nothing else",
    "sweep.": "any key of the sweep's file: sweep.sampler.name=gp, sweep.space.method.tau.high=6",
    "cluster.": "any key of the cluster's file: cluster.partition=gpu",
}


def main(argv: Sequence[str]) -> int:
    """The keys of `OWN` are the step's own."""
    try:
        own, rest = cli.take(argv, OWN)
    except UserError:
        return execute("sweep", "", list(argv))  # which says what is wrong with them
    if "--help" in rest:
        print("\n".join(f"  {key}: {words}" for key, words in OWN.items()) + "\n")
    elif own.get("join"):
        return outside("sweep", rest, lambda command: _join(own, command))
    elif own.get("reap", "").strip().lower() not in ("", *cli.FALSE):
        return outside("sweep", rest, lambda command: _reap(own, command))
    plans: list[Plan] = []

    def planned(config: Config) -> Config:
        from pipeline.sweep import request as sweep_plan

        plans.append(sweep_plan.make(config, own, [text for text in rest if not text.startswith("cfg=")]))
        return sweep_plan.prepared(config, plans[0])

    def job(run: "Run") -> float | None:
        from pipeline.sweep.driver import sweep

        return sweep(run, plans[0])

    return execute("sweep", job, rest, planned, dry_run=lambda config: plans[0].words(), own=OWN)


def _join(own: dict[str, str], command: cli.Command) -> int:
    from pipeline.sweep import request as sweep_plan
    from pipeline.sweep import worker as sweep_worker

    storage = sweep_plan.storage_url(own.get("storage"), configuration(command, OWN))
    return sweep_worker.work(0, own["join"], storage, command.overrides, joined=True)


def _reap(own: dict[str, str], command: cli.Command) -> int:
    from pipeline.sweep import reap as sweep_reap
    from pipeline.sweep import request as sweep_plan

    cli.flag(own, "reap")  # neither true nor false
    config = configuration(command, OWN)
    ended = sweep_reap.reap_all(sweep_plan.storage_url(own.get("storage"), config), config)
    print(f"{len(ended)} runs were left without a process, and are ended now")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
