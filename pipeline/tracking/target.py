"""The MLflow runs behind journals: look them up, place them below a parent or in an experiment, end them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mlflow.entities import Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline import urls
from pipeline.errors import UserError
from pipeline.journal import Entry
from pipeline.tracking.faults import look
from pipeline.tracking.server import artifact_location
from pipeline.tracking.state import State, find_by_journal

GENERATION_TAG = "asib.generation"
TAG_LENGTH = 8000
ID = 32
"""Characters of a run's id."""


def find_run(client: MlflowClient, run_id: str) -> Run | None:
    """The run; None if the server does not know it or does not show it to this user. Raises UserError: deleted."""
    run = look(lambda: client.get_run(run_id))
    if run is not None and run.info.lifecycle_stage == "deleted":
        raise UserError(f"run {run_id} is deleted: `mlflow runs restore --run-id {run_id}` brings it back")
    return run


def get_run(client: MlflowClient, uri: str, run_id: str) -> Run:
    """The run. Raises UserError: the server does not know it, or it is deleted."""
    run = find_run(client, run_id)
    if run is None:
        raise UserError(no_run(uri, run_id))
    return run


def no_run(uri: str, run_id: str) -> str:
    """The error for an unknown run; under basic authentication, a run without READ permission looks the same."""
    check = "check the id" if len(run_id) == ID else f"give the whole id, of {ID} characters"
    ask = ", or ask for READ permission on it" if uri.startswith("http") else ""
    return f"tracking server {urls.hidden(uri)} knows no run {run_id}: {check}{ask}"


def carried_run(client: MlflowClient, uri: str, folder: Path, link: dict[str, Any], experiment: str) -> Run:
    """The run that a carrier represents, or that a carrier's nested run belongs to.

    Args:
        link: its journal, folder and run, from the header of the journal in `folder`.
        experiment: where to look first if its id does not lead to it.

    Raises:
        UserError: it is deleted, or not on this server (yet): names the folder to deliver first.
    """
    run = find_run(client, link["run"]) if link["run"] else None
    run = run or find_by_journal(client, link["journal"], experiment)
    if run is None:
        above = os.path.normpath(folder / link["folder"]) if link["folder"] else f"the run of journal {link['journal']}"
        raise UserError(f"{folder} belongs to a run that is not on {urls.hidden(uri)}: deliver {above} first")
    return run


def parent_place(client: MlflowClient, uri: str, folder: Path, header: Entry) -> State | None:
    """The parent of a run whose journal is delivered alone; None without a parent, or if it is still unknown.

    Raises:
        UserError: the parent of a carrier's nested run is missing.
    """
    above, experiment = header.data["parent"], header.data["experiment"]
    if above is None:
        return None
    if "run" in above:
        run: Run | None = carried_run(client, uri, folder, above, experiment)
    else:
        state = State.load(folder / above["folder"], uri, above["journal"])
        if state.run_id:
            return state
        run = find_by_journal(client, above["journal"], experiment)
    return State(run_id=run.info.run_id, experiment_id=run.info.experiment_id) if run else None


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The id of the experiment of that name, created if missing. Raises UserError: it is deleted."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location(uri, name)))
        except MlflowException:  # another process was faster
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        restore = f"`mlflow experiments restore -x {experiment.experiment_id}`"
        raise UserError(f'experiment "{name}" is deleted: {restore} brings it back, or take another name')
    return str(experiment.experiment_id)


def end_run(
    client: MlflowClient, run_id: str, status: str, outcome: str, exit_code: int, message: str | None, at: int
) -> None:
    """Set a run's end; `at`: ms since 1970."""
    tags = [RunTag("asib.outcome", outcome), RunTag("asib.exit_code", str(exit_code))]
    if message:
        tags.append(RunTag("asib.error", message[:TAG_LENGTH]))
    client.log_batch(run_id, tags=tags)
    begun = client.get_run(run_id).info.start_time or 0  # by another machine's clock, or before ours was set back
    client.set_terminated(run_id, status=status, end_time=max(at, begun))


def can_rewrite(uri: str) -> bool:
    """Whether parameters can be corrected there: in MLflow's database, since its API cannot change them."""
    return uri.partition(":")[0].partition("+")[0] in ("sqlite", "postgresql", "mysql")
