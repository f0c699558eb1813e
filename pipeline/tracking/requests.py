"""Everything that steps may ask of the tracking server through their delivery process: functions called by name.

`Delivery.ask(name, **values)` names a row of `REQUESTS`; the row's function gets the client and these values. The
pipe carries JSON: paths are text, in both directions.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlflow.artifacts import download_artifacts
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from pipeline import urls
from pipeline.errors import NotThere, UserError
from pipeline.journal import check_end, now_ms
from pipeline.served.bundle import REGISTERED, TAG
from pipeline.tracking import aliases, looks, registry, server, turns
from pipeline.tracking._compat import model_name_and_version
from pipeline.tracking.faults import lasting, look, permitted, unknown
from pipeline.tracking.state import find_by_journal
from pipeline.tracking.target import end_run, no_run

log = logging.getLogger("asib.delivery")

FILES = ("config.yaml", "predictions.npz")
"""Artifacts that are read with a run."""
STUDY_TAG = "asib.study"


def answer(client: MlflowClient, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"value": …}`, or `{"error": <one line>}` with `not_there` where what was asked for does not exist."""
    try:
        return {"value": REQUESTS[name](client, **values)}
    except UserError as error:
        return {"error": str(error), "not_there": isinstance(error, NotThere)}
    except Exception as error:
        log.warning("%s", name, exc_info=error)
        said = server.explain(error, client.tracking_uri)
        if "name" in values:
            said = said.replace("permission on the experiment", f"permission on the model {values['name']}")
        return {"error": said}


def fetch(client: MlflowClient, uri: str, dest: str) -> str:
    """Download `runs:/<id>/<path>` or `models:/…` into the folder `dest`; the local path.

    A registered version's folder also gets `REGISTERED`, with the manifest from the version's tag; any artifact of
    that name is ignored.

    Raises:
        NotThere: the server does not have it, or refuses it for good.
        UserError: the server does not answer.
    """
    try:
        return _download(client, uri, Path(dest))
    except Exception as error:
        log.warning("fetch %s", uri, exc_info=error)
        if not (unknown(error) or lasting(error) or _missing(client, uri)):
            raise UserError(f"{uri}: {server.explain(error, client.tracking_uri)}") from error
        reason = str(error).strip().split("\n", 1)[0][:300]
        where = urls.hidden(client.tracking_uri)
        raise NotThere(f"{uri} cannot be fetched from {where}: {reason}: check the id and the path") from error


def _download(client: MlflowClient, uri: str, dest: Path) -> str:
    dest.mkdir(parents=True, exist_ok=True)
    told = {}
    if uri.startswith("models:/"):
        name, *number = model_name_and_version(client, uri)
        if number:  # otherwise it is a LoggedModel's id
            version = client.get_model_version(name, number[0])
            told = {"model_name": name, "model_version": str(version.version), TAG: version.tags.get(TAG, "")}
            uri = f"models:/{name}/{version.version}"  # an alias may move meanwhile
    path = Path(download_artifacts(artifact_uri=uri, dst_path=str(dest), tracking_uri=client.tracking_uri))
    if path.is_dir():
        (path / REGISTERED).unlink(missing_ok=True)
        if told and any(file.is_file() for file in path.rglob("*")):  # otherwise they are gone, and the caller says so
            (path / REGISTERED).write_text(json.dumps(told))
    return str(path)


def _missing(client: MlflowClient, uri: str) -> bool:
    """Whether a run has no such artifact. MLflow's download reports every failure as an internal error."""
    run_id, _, path = uri.removeprefix("runs:/").strip("/").partition("/")
    if not uri.startswith("runs:/"):
        return False
    try:
        there = client.list_artifacts(run_id, path.rpartition("/")[0] or None)
    except Exception:
        return False
    return path not in [file.path for file in there]


def run_info(client: MlflowClient, run_id: str) -> dict[str, Any]:
    """id, experiment_id, name, status, params, tags and metrics (as text) of a run."""
    run = look(lambda: client.get_run(run_id))
    if run is None:
        raise UserError(no_run(client.tracking_uri, run_id))
    return _record(run)


def read_runs(client: MlflowClient, runs: Sequence[str], dest: str, histories: Sequence[str]) -> list[str]:
    """A folder for each run, with `record.json`, and `FILES` where the run has them; histories of the named metrics."""
    return [_read(client, run_id, Path(dest), histories) for run_id in runs]


def _read(client: MlflowClient, run_id: str, dest: Path, histories: Sequence[str]) -> str:
    # an id that an offline parent recorded is its journal's
    run = look(lambda: client.get_run(run_id)) or find_by_journal(client, run_id, None)
    if run is None:
        raise UserError(f"no run {run_id} on the tracking server, or none that you may read: check the id")
    folder = dest / run_id
    folder.mkdir(parents=True, exist_ok=True)
    classes = [_classes(d.dataset.profile) for d in run.inputs.dataset_inputs]
    record = _record(run) | {
        "histories": {
            name: [(point.step, repr(point.value)) for point in client.get_metric_history(run.info.run_id, name)]
            for name in histories
            if name in run.data.metrics
        },
        "classes": next((n for n in classes if n is not None), None),
    }
    there = {file.path for file in client.list_artifacts(run.info.run_id)}
    for name in FILES:
        if name in there:
            client.download_artifacts(run.info.run_id, name, str(folder))
    (folder / "record.json").write_text(json.dumps(record))
    return str(folder)


def nested_runs(client: MlflowClient, run_id: str) -> list[str]:
    """Ids of the runs nested in a run, the oldest first."""
    experiment = run_info(client, run_id)["experiment_id"]
    found = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{run_id}'", order_by=["start_time ASC"])
    return [run.info.run_id for run in found]


def runs_of_experiment(client: MlflowClient, name: str) -> list[str]:
    """Ids of an experiment's runs that are not nested in others, the oldest first; empty without such an experiment."""
    experiment = look(lambda: client.get_experiment_by_name(name))
    if experiment is None:
        return []
    where, order = [experiment.experiment_id], ["start_time ASC"]
    found = server.all_pages(lambda token: client.search_runs(where, order_by=order, page_token=token))
    return [run.info.run_id for run in found if "mlflow.parentRunId" not in run.data.tags]


def find_finished(client: MlflowClient, identities: Sequence[str]) -> dict[str, str]:
    """Identity -> newest FINISHED run that has it, if there is one."""
    experiments = server.all_experiments(client)
    found: dict[str, str] = {}
    for identity in identities:
        query = f"tags.`asib.identity` = '{identity}' and attributes.status = 'FINISHED'"
        for run in client.search_runs(experiments, query, max_results=1):
            found[identity] = run.info.run_id
    return found


def log_files(client: MlflowClient, run_id: str, files: Sequence[str], to: str) -> None:
    """Add artifacts to a run other than this delivery's."""
    for path in files:
        client.log_artifact(run_id, path, to or None)


def running(client: MlflowClient, study: str | None) -> list[dict[str, Any]]:
    """`{"run_id": …, "tags": …}` of each RUNNING run of the study, of any study for None."""
    which = "!= ''" if study is None else f'= "{study}"'
    query = f"attributes.status = 'RUNNING' and tags.`{STUDY_TAG}` {which}"
    experiments = server.all_experiments(client)
    found = server.all_pages(lambda token: client.search_runs(experiments, query, page_token=token))
    return [{"run_id": run.info.run_id, "tags": dict(run.data.tags)} for run in found]


def reap(client: MlflowClient, runs: Mapping[str, Sequence[Any]]) -> list[str]:
    """End runs that are still RUNNING, whichever process made them.

    Args:
        runs: run id -> status, outcome, exit code and message, as for `Journal.end`.

    Returns:
        Ids of those ended: a run that was deleted meanwhile, or that this user may not change, is skipped.
    """
    ended = []
    for run_id, (status, outcome, exit_code, message) in runs.items():
        check_end(status, outcome)
        run = look(partial(client.get_run, run_id))
        if run is None or run.info.lifecycle_stage == "deleted" or run.info.status != "RUNNING":
            continue
        if permitted(end_run, client, run_id, status, outcome, exit_code, message, now_ms()):
            ended.append(run_id)
        else:
            log.warning("run %s is left RUNNING: it is for others to end (403)", run_id)
    return ended


def _record(run: Run) -> dict[str, Any]:
    return {
        "id": run.info.run_id,
        "experiment_id": run.info.experiment_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "params": dict(run.data.params),
        "tags": dict(run.data.tags),
        "metrics": {key: repr(value) for key, value in run.data.metrics.items()},
    }


def _classes(profile: str | None) -> int | None:
    """The number of classes that a data set's profile states; None if it states none, or is not one of ours."""
    try:
        stated = json.loads(profile or "null")
    except ValueError:
        return None
    found = stated.get("classes") if isinstance(stated, dict) else None
    return found if isinstance(found, int) and found > 0 else None


RUNS = (fetch, run_info, read_runs, nested_runs, runs_of_experiment, find_finished, log_files, running, reap)
MODELS = (registry.overview, registry.version, registry.tag_manifest, aliases.move, aliases.repair, looks.count_look)
QUEUES = (turns.may_edit, turns.join, turns.beat, turns.leave, turns.queue, turns.mark_dead)
"""These and `MODELS` are about a registered model, whose `name` they all take."""
REQUESTS: dict[str, Callable[..., Any]] = {each.__name__: each for each in (*RUNS, *MODELS, *QUEUES)}
