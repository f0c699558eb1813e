"""Move a registered model's aliases: a move is completed, if not at once then by the next promotion after a crash.

A move is announced before any alias changes. `PENDING`, a tag of the version concerned, holds the tags that the move
sets; then `MOVE`, a tag of the registered model, holds the rest. Every step can be repeated, and `MOVE` is removed
last. If a version that a move names is gone by then, the move is undone as far as there is a version to go back to.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.tracking import MlflowClient

from pipeline.errors import UserError
from pipeline.tracking.faults import Fault, classify, outraced, permitted
from pipeline.tracking.model_tags import (
    CHAMPION,
    KEEP,
    MOST_PAST,
    MOVE,
    PAST,
    PENDING,
    PREVIOUS,
    TAG_LENGTH,
    garbled,
    read_champions,
    read_move,
    read_pending,
)

log = logging.getLogger("asib.delivery")


def move(client: MlflowClient, name: str, plan: Mapping[str, Any]) -> None:
    """Move aliases as planned, at once or, after a crash, by the next `repair`; there is always a champion.

    Args:
        plan: `before` and `after`: version (or None) of champion and previous, equal for a decision that moves none;
            `past`: the new value of `PAST`, a list; `tags`: version -> tags to set; `version`: the one it is about;
            `run`: the run that decided it; `why`: in words.

    Raises:
        UserError: the champion is not the plan's `before`: somebody has moved it meanwhile.
    """
    _refuse_moved(client, name, plan)
    number = plan["version"]
    client.set_model_version_tag(name, number, PENDING, json.dumps({"run": plan["run"], "tags": plan["tags"]}))
    short = {key: value for key, value in plan.items() if key != "tags"} | {"why": plan["why"][:500]}
    client.set_registered_model_tag(name, MOVE, json.dumps(short))
    try:
        _refuse_moved(client, name, plan)  # MLflow has no compare-and-swap
    except UserError:
        client.delete_registered_model_tag(name, MOVE)
        raise
    _finish(client, name, plan)


def _refuse_moved(client: MlflowClient, name: str, plan: Mapping[str, Any]) -> None:
    present = _champion(client.get_registered_model(name))
    if present != plan["before"][CHAMPION]:
        raise UserError(
            f"champion of {name} was version {plan['before'][CHAMPION]} when this began and is {present} now: "
            "somebody else has moved it; start again"
        )


def _champion(model: RegisteredModel) -> str | None:
    version = model.aliases.get(CHAMPION)
    return None if version is None else str(version)


def repair(client: MlflowClient, name: str) -> dict[str, Any]:
    """Finish an interrupted move, and repair other broken tags of promotions.

    A champion that is neither the plan's old nor its new one was set by hand: then nothing is moved.

    Returns:
        `plan`: the move, None if there was none to finish. `said`: one sentence for each thing that was wrong.
    """
    said: list[str] = []
    plan = _interrupted(client, name, said)
    if plan is not None:
        said += _finish(client, name, plan)
    text = client.get_registered_model(name).tags.get(PAST, "")
    kept, whole = read_champions(text)
    if not whole:
        client.set_registered_model_tag(name, PAST, json.dumps(kept))
        said.append(garbled(PAST, text, f"kept {', '.join(kept)}" if kept else "emptied"))
    said += _loose_aliases(client, name)
    return {"plan": plan, "said": said}


def already_made(client: MlflowClient, name: str, plan: Mapping[str, Any]) -> bool:
    """Whether a process that has since been killed made this move, or began it and it is finished now."""
    try:
        repair(client, name)
        champion = _champion(client.get_registered_model(name))
    except Exception:
        return False  # whatever the error is, the move itself will raise it
    return plan["after"] != plan["before"] and champion == plan["after"][CHAMPION]


def _pending(client: MlflowClient, name: str, plan: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Version -> tags that an interrupted move was about to set; older promotions keep them in the plan itself."""
    found = _version(client, name, plan.get("version"))
    text = found.tags.get(PENDING, "") if found is not None else ""
    return read_pending(text, plan["run"]) or plan["tags"]


def there(client: MlflowClient, name: str, number: object) -> bool:
    """Whether the model has this version."""
    return _version(client, name, number) is not None


def _interrupted(client: MlflowClient, name: str, said: list[str]) -> dict[str, Any] | None:
    model = client.get_registered_model(name)
    text = model.tags.get(MOVE, "")
    if not text:
        return None
    plan = read_move(text)
    if plan is None:
        said.append(garbled(MOVE, text, "removed"))
    else:
        present = _champion(model)
        ends = [plan[when][CHAMPION] for when in ("before", "after")]
        gone = present is None and not all(there(client, name, end) for end in ends if end is not None)
        if gone or present in ends:
            return plan | {"tags": _pending(client, name, plan)}
        said.append(f"an interrupted move ({plan['why']}) is given up: the champion was set by hand since")
    client.delete_registered_model_tag(name, MOVE)
    return None


def _finish(client: MlflowClient, name: str, plan: Mapping[str, Any]) -> list[str]:
    """Make a move's steps, each of which can be repeated, and remove `MOVE` last; return what did not go to plan."""
    champion, previous = plan["after"][CHAMPION], plan["after"][PREVIOUS]
    past, marks, said = list(plan["past"]), dict(plan["tags"]), []
    moves = plan["after"] != plan["before"]
    if moves and champion is not None and not there(client, name, champion):
        gone, marks = champion, {}  # these tags say that the move has happened
        stack = [number for number in [*past, plan["before"][CHAMPION]] if number is not None]
        living = [number for number in dict.fromkeys(stack) if number != gone and there(client, name, number)]
        champion, past = (living[-1], living[:-1]) if living else (None, [])
        previous = past[-1] if past else None
        now = f"version {champion} is the champion" if champion else "there is no champion"
        said.append(f"an interrupted move ({plan['why']}) is undone: version {gone} is no longer there; {now}")
    elif moves and previous is not None and not there(client, name, previous):
        past = [number for number in past if there(client, name, number)]
        previous = past[-1] if past else None
        said.append(f"version {plan['after'][PREVIOUS]} is no longer there: previous is {previous or 'none'}")
    if moves:
        _point(client, name, PREVIOUS, previous, champion)
        _point(client, name, CHAMPION, champion, champion)
        client.set_registered_model_tag(name, PAST, json.dumps(past[-MOST_PAST:]))
    for number, tags in marks.items():
        if there(client, name, number):
            tag(client, name, number, tags)
    if moves and champion is not None:
        _protect(client, name, champion)
    _forget_pending(client, name, plan.get("version"))
    client.delete_registered_model_tag(name, MOVE)
    return said


def tag(client: MlflowClient, name: str, number: str, tags: Mapping[str, str]) -> None:
    """Set tags of a version."""
    for key, value in tags.items():
        client.set_model_version_tag(name, number, key, value[-TAG_LENGTH:])


def _point(client: MlflowClient, name: str, alias: str, version: str | None, champion: str | None) -> None:
    """Set an alias or remove it; without the right to delete, which EDIT does not include, point it at the champion."""
    if version is not None:
        outraced(client.set_registered_model_alias)(name, alias, version)
    elif alias in client.get_registered_model(name).aliases:
        if champion is None:
            client.delete_registered_model_alias(name, alias)
        elif not permitted(client.delete_registered_model_alias, name, alias):
            client.set_registered_model_alias(name, alias, champion)


def _loose_aliases(client: MlflowClient, name: str) -> list[str]:
    """Remove our aliases that name no version, if permitted; MLflow does so itself when a version is deleted."""
    said = []
    for alias, number in client.get_registered_model(name).aliases.items():
        if alias in (CHAMPION, PREVIOUS) and not there(client, name, str(number)):
            said.append(f"alias {alias}={number} names no version: ignored")
            permitted(client.delete_registered_model_alias, name, alias)
    return said


def _protect(client: MlflowClient, name: str, champion: str) -> None:
    """Mark the run that a champion comes from, if it exists and permission allows."""
    found = _version(client, name, champion)
    if found is None or not found.run_id:
        return
    try:
        client.set_tag(found.run_id, KEEP, f"champion of {name}: version {champion}")
    except Exception as error:  # someone else's experiment, or a deleted run: the promotion does not depend on it
        log.warning("run %s is not protected: %s", found.run_id, error)


def _forget_pending(client: MlflowClient, name: str, number: object) -> None:
    found = _version(client, name, number)
    if found is None or not found.tags.get(PENDING):
        return
    if not permitted(client.delete_model_version_tag, name, str(number), PENDING):
        client.set_model_version_tag(name, str(number), PENDING, "")  # EDIT does not include deleting


def _version(client: MlflowClient, name: str, number: object) -> ModelVersion | None:
    if number is None:
        return None
    try:
        return client.get_model_version(name, str(number))
    except Exception as error:
        if classify(error) is not Fault.NOT_THERE:
            raise
        return None
