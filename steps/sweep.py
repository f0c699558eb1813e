"""Search hyperparameters with Optuna, with parallel workers on this machine or a cluster.

python -m steps.sweep cfg=quickstart sweep=kd_ib_tau trials=30 workers=2
python -m steps.sweep join=<study> storage=postgresql://…
"""

import sys

from pipeline.compose import cli
from pipeline.config import Config
from pipeline.launch import workers
from pipeline.runs.step import Step

OWN = {
    "sweep": "the search space: a name in conf/sweep (kd_ib_tau by default), or a YAML file",
    "trials": "number of configurations; the sweep's file has the default",
    "seeds": "seeds that each trial trains, whose mean is its value; 1 by default",
    **workers.OWN,
    "storage": "the study's database: postgresql://… or sqlite:///…; ASIB_STORAGE, or studies.db in output_dir",
    "study": "the study's name; by default derived from everything that decides its results",
    "join": "name of a running study: help with its trials, from any machine that reaches storage",
    "reap": "true: end runs in MLflow whose process is gone, and do nothing else",
    "sweep.": "any key of the sweep's file: sweep.space.method.tau.high=6, sweep.stop.patience=10",
}


def act(config: Config, command: cli.Command) -> int | None:
    """Join a study, or end runs without a process; neither creates a run."""
    own = command.own
    wants_reap = cli.flag(own, "reap")
    if not own.get("join") and not wants_reap:
        return None
    from pipeline.sweep import reap, request, worker  # late: they import Optuna

    storage = request.storage_url(own.get("storage"), config)
    if own.get("join"):
        return worker.work(0, own["join"], storage, command.overrides, joined=True)
    print(f"{len(reap.reap_all(storage, config))} runs had lost their process and are now ended")
    return 0


STEP = Step(
    "sweep",
    __doc__,
    OWN,
    "pipeline.sweep.request:read",
    "pipeline.sweep.driver:sweep",
    words=lambda plan: plan.words(),
    act=act,
)
main = STEP.main

if __name__ == "__main__":
    sys.exit(main())
