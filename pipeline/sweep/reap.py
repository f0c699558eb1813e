"""End runs in MLflow that no process works on any more: trials and sweeps whose heartbeat has stopped."""

import logging
import time
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.journal import writer_alive
from pipeline.runs.run import tracking_uri
from pipeline.sweep.study.retry import history
from pipeline.sweep.study.study import Study, studies
from pipeline.tracking.pipe import Delivery

logger = logging.getLogger("asib")
ENDINGS = {
    "COMPLETE": ("FINISHED", "completed", 0, None),
    "PRUNED": ("KILLED", "pruned", 0, None),
    "FAIL": ("FAILED", "failed", 1, "the worker's heartbeat is gone"),
    "WAITING": ("KILLED", "killed", 137, "the worker's heartbeat is gone"),
}
"""State of a trial in Optuna -> how its run ends: status, outcome, exit code, error."""


def reap(storage: str, delivery: Delivery | None, except_run: str | None = None) -> list[str]:
    """Fail stale trials of every study in `storage`, end the runs that are left RUNNING, and return their ids.

    Args:
        delivery: None offline.
        except_run: id of the sweep's own run.
    """
    orphans: dict[str, tuple[str, str, int, str | None]] = {}
    for name in studies(storage):
        try:
            study = Study.open(storage, name)
        except UserError as error:  # made by another version, which is no reason to refuse this sweep
            logger.warning("%s: its runs are left as they are", error)
            continue
        study.requeue_stale()
        states: dict[int, str] = {}
        for trial in study.trials():  # earlier attempts at a trial get the state of the last one
            states |= dict.fromkeys([*history(trial), trial.number], trial.state.name)
        for run in delivery.ask("running", study=name) if delivery is not None else ():
            ending = _ending(study, run["tags"], states)
            if ending is not None and run["run_id"] != except_run:
                orphans[run["run_id"]] = ending
        study.close()
    if delivery is None or not orphans:
        return []
    ended: list[str] = delivery.ask("reap", runs=orphans)
    for run_id in ended:
        logger.info("run %s no longer had a process: ended %s", run_id, orphans[run_id][0])
    return ended


def reap_all(storage: str, config: Config) -> list[str]:
    """`reap` as a separate command. Raises UserError: database or tracking server cannot be reached."""
    if config.tracking.mode == "offline":
        return reap(storage, None)
    delivery = Delivery(tracking_uri(config), [], None)
    try:
        delivery.wait_connected()
        return reap(storage, delivery)
    finally:
        delivery.finish(0.0)


def _ending(study: Study, tags: dict[str, str], states: dict[int, str]) -> tuple[str, str, int, str | None] | None:
    """Decide how a RUNNING run ends; None while a process still works on it."""
    number: Any = tags.get("asib.trial")
    if number is None:
        facts = study.facts
        grace = study.sweep.grace_seconds + study.sweep.heartbeat_seconds
        gone = time.time() - float(facts.get("driver_seen", 0.0)) > grace and not writer_alive(Path(facts["folder"]))
        return ("KILLED", "killed", 137, "the sweep's process is gone; the same command continues it") if gone else None
    state = states.get(int(number), "FAIL")
    if state == "RUNNING":
        return None
    return ENDINGS[state]
