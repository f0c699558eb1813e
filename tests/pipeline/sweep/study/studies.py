"""Small sweeps for tests, workers in processes of their own, and deaths that need no waiting."""

import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import sqlalchemy

from pipeline.sweep.space.space import SweepConfig
from pipeline.sweep.study.claim import Claim
from pipeline.sweep.study.storage import Database
from pipeline.sweep.study.study import Study

FACTS = {"digest": "d" * 64}
FORK = multiprocessing.get_context("fork")
"""Workers that need not import Optuna again; no study may be open in the test while they start."""


def sweep(**changes: Any) -> SweepConfig:
    """tau from 1 to 8 and log beta from 1e-6 to 1e-2, drawn at random, never pruned."""
    plain: dict[str, Any] = {
        "name": "small",
        "space": {
            "method.tau": {"type": "float", "low": 1, "high": 8},
            "method.ib_beta": {"type": "float", "low": 1e-6, "high": 1e-2, "log": True},
        },
        "sampler": {"name": "random", "seed": 3},
        "pruner": {"name": "none"},
        "trials": 40,
        "heartbeat_seconds": 1,
        "grace_seconds": 2,
    }
    return SweepConfig.model_validate(plain | changes)


def score(values: dict[str, Any]) -> float:
    """At most 0, at tau 4 and beta 1e-4."""
    return -((values["method.tau"] - 4) ** 2) - (math.log10(values["method.ib_beta"]) + 4) ** 2


def work(url: str, name: str, seconds: float = 0.0) -> None:
    """Take trials of three epochs until all have ended."""
    study = Study.open(url, name)
    while study.counts().ended < study.sweep.trials:
        claim = study.claim("somebody")
        if claim is None:
            time.sleep(0.1)
            continue
        claim.note(config_hash=str(claim.origin))
        for epoch in range(3):
            time.sleep(seconds / 3)
            claim.report(score(claim.values) + epoch, epoch)
        claim.complete([score(claim.values)])


def claimed(study: Study) -> Claim:
    """The next trial, of which there is one."""
    claim = study.claim("me")
    assert claim is not None
    return claim


@contextmanager
def running(count: int, target: Callable[..., None], *arguments: Any) -> Iterator[list[BaseProcess]]:
    """Run `count` processes; all are gone afterwards."""
    processes: list[BaseProcess] = [FORK.Process(target=target, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def age_heartbeats(url: str, trial_id: int | None = None) -> None:
    """Make the heartbeats of a trial, or of all, old, as after a long silence."""
    database = Database(url, create=False)
    old = "UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00'"
    with database.engine.begin() as connection:
        connection.execute(sqlalchemy.text(old + (f" WHERE trial_id = {trial_id}" if trial_id else "")))
    database.close()


def heartbeat(url: str) -> str:
    """The one trial's."""
    database = Database(url, create=False)
    with database.engine.connect() as connection:
        found = connection.execute(sqlalchemy.text("SELECT heartbeat FROM trial_heartbeats")).scalar_one()
    database.close()
    return str(found)


def die(claim: Claim, url: str) -> None:
    """What kill -9 leaves of a claim, the grace time later."""
    claim._ended.set()
    claim._heart.join()
    age_heartbeats(url, claim._id)
