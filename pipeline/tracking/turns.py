"""The queue of promotions, as tags of the registered model: only who may promote can write them.

`asib.turn.<run id>` belongs to one promotion: MLflow has no compare-and-swap, and two promotions that wrote the same
tag would overwrite each other. A tag of a run would not suffice: anyone who may log a run anywhere could join.
`pipeline.promote.queue` says how a promotion waits for its turn.
"""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import asdict
from typing import Any

from mlflow.tracking import MlflowClient

from pipeline.errors import UserError
from pipeline.journal import now_ms
from pipeline.tracking.model_tags import QUEUE, TURN, Turn, garbled, read_turn
from pipeline.tracking.target import end_run

log = logging.getLogger("asib.delivery")


def may_edit(client: MlflowClient, name: str) -> None:
    """Raise the server's refusal if this user may not promote; it tries to remove a tag that does not exist."""
    client.delete_registered_model_tag(name, f"{TURN}nobody")


def join(client: MlflowClient, name: str, run_id: str, user: str = "") -> None:
    """Put a promotion's run into the queue of a model."""
    at = now_ms()
    _write(client, name, run_id, Turn(at, at, user))


def beat(client: MlflowClient, name: str, run_id: str) -> None:
    """Renew a promotion's sign of life. Raises UserError: it was taken for dead."""
    mine = read_turn(TURN + run_id, client.get_registered_model(name).tags.get(TURN + run_id, ""))
    if mine is None:
        raise UserError(f"this promotion of {name} was taken for dead: start it again")
    _write(client, name, run_id, Turn(mine.joined, now_ms(), mine.user))


def leave(client: MlflowClient, name: str, run_id: str) -> None:
    """Take a promotion's run out of the queue."""
    client.delete_registered_model_tag(name, TURN + run_id)


def queue(client: MlflowClient, name: str) -> dict[str, Any]:
    """The promotions of a model.

    Returns:
        `waiting`: run_id, joined, seen, user and now (ms by this machine's clock) of each, in order of arrival.
        `said`: one sentence for each invalid entry that was removed.
    """
    waiting, said = [], []
    for tag, value in client.get_registered_model(name).tags.items():
        if not tag.startswith(TURN):
            continue
        found = read_turn(tag, value)
        if found is None:
            said.append(garbled(tag, value, "removed"))
            with contextlib.suppress(Exception):  # a user who may only read ignores it
                client.delete_registered_model_tag(name, tag)
            continue
        run_id = tag.removeprefix(TURN)
        waiting.append({"run_id": run_id, "now": now_ms(), **asdict(found)})
    return {"waiting": sorted(waiting, key=lambda entry: (entry["joined"], entry["run_id"])), "said": said}


def mark_dead(client: MlflowClient, name: str, run_id: str) -> None:
    """Remove a promotion whose machine is gone from the queue, and end its run.

    Only a run tagged as a promotion of this model is ended: the queue's tags may name any run.
    """
    leave(client, name, run_id)
    try:
        run = client.get_run(run_id)
        if run.data.tags.get(QUEUE) == name and run.info.status == "RUNNING":
            end_run(client, run_id, "KILLED", "killed", 137, "no sign of life: its machine is gone", now_ms())
    except Exception as error:  # someone else's experiment
        log.warning("run %s of a dead promotion stays as it is: %s", run_id, error)


def left_behind(client: MlflowClient, run_id: str) -> None:
    """Take the run of a dead trainer out of the queue at once, if it was a promotion."""
    try:
        name = client.get_run(run_id).data.tags.get(QUEUE)
        if name:
            leave(client, name, run_id)
    except Exception as error:  # the next promotion will find no sign of life
        log.warning("run %s may still be in the queue of its model: %s", run_id, error)


def _write(client: MlflowClient, name: str, run_id: str, turn: Turn) -> None:
    value = asdict(turn) | {"user": turn.user[:100]}
    client.set_registered_model_tag(name, TURN + run_id, json.dumps(value))
