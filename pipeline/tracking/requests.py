"""Everything that steps may ask of the tracking server through their delivery process: functions called by name.

`Delivery.ask(name, **values)` names a row of `REQUESTS`; the row's function gets the client and these values. What goes
over the pipe is JSON: paths are text, and so is what comes back.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import NotThere, UserError
from pipeline.journal import check_end, now_ms
from pipeline.tracking import looks, moves, registry, server, turns
from pipeline.tracking.faults import Fault, classify, look, unknown
from pipeline.tracking.fetch import fetch

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

log = logging.getLogger("asib.delivery")

FILES = ("config.yaml", "predictions.npz")
"""Artifacts that are read with a run."""
STUDY_TAG = "asib.study"


def answer(client: MlflowClient, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"value": …}`, or `{"error": <one line>}` with `not_there` where what was asked for does not exist."""
    if name not in REQUESTS:
        return {"error": f"delivery knows no request {name!r}"}
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


def run_info(client: MlflowClient, run_id: str) -> dict[str, Any]:
    """id, experiment_id, name, status, params, tags and metrics (as text) of a run."""
    from pipeline.tracking.target import no_run

    try:
        return _record(client.get_run(run_id))
    except Exception as error:
        if not unknown(error):
            raise
        raise UserError(no_run(client.tracking_uri, run_id)) from error


def read_runs(client: MlflowClient, runs: Sequence[str], dest: str, histories: Sequence[str]) -> list[str]:
    """A folder for each run, with `record.json`, and `FILES` where the run has them; histories of the named metrics."""
    return [_read(client, run_id, Path(dest), histories) for run_id in runs]


def _read(client: MlflowClient, run_id: str, dest: Path, histories: Sequence[str]) -> str:
    from pipeline.tracking.state import find_by_journal

    # an id that an offline parent has stated is its journal's
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
            found = Path(client.download_artifacts(run.info.run_id, name, str(folder)))
            if found != folder / name:
                shutil.copyfile(found, folder / name)
    (folder / "record.json").write_text(json.dumps(record))
    return str(folder)


def nested_runs(client: MlflowClient, run_id: str) -> list[str]:
    """Ids of the runs nested in a run, the oldest first."""
    experiment = run_info(client, run_id)["experiment_id"]
    found = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{run_id}'", order_by=["start_time ASC"])
    return [run.info.run_id for run in found]


def find_finished(client: MlflowClient, identities: Sequence[str]) -> dict[str, str]:
    """Identity -> newest FINISHED run that has it, where there is one."""
    experiments = server.all_experiments(client)
    found: dict[str, str] = {}
    for identity in identities:
        query = f"tags.`asib.identity` = '{identity}' and attributes.status = 'FINISHED'"
        for run in client.search_runs(experiments, query, max_results=1):
            found[identity] = run.info.run_id
    return found


def log_files(client: MlflowClient, run_id: str, files: Sequence[str], to: str) -> None:
    """Add artifacts to a run that is not this delivery's."""
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
    """End the runs of any process that are still RUNNING.

    Args:
        runs: run id -> status, outcome, exit code and message, as for `Journal.end`.

    Returns:
        Ids of those ended: a run that was deleted meanwhile, or that this user may not change, is skipped.
    """
    from pipeline.tracking.target import end_run, find_run

    ended = []
    for run_id, (status, outcome, exit_code, message) in runs.items():
        check_end(status, outcome)
        run = None
        with contextlib.suppress(UserError):  # deleted
            run = find_run(client, run_id)
        if run is None or run.info.status != "RUNNING":
            continue
        try:
            end_run(client, run_id, status, outcome, exit_code, message, now_ms())
        except Exception as error:
            if classify(error) is not Fault.NOT_ALLOWED:
                raise
            log.warning("run %s is left RUNNING: it is for others to end (403)", run_id)
            continue
        ended.append(run_id)
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
    """The number of classes that a data set's profile states; None where it states none, or is not one of ours."""
    try:
        stated = json.loads(profile or "null")
    except ValueError:
        return None
    found = stated.get("classes") if isinstance(stated, dict) else None
    return found if isinstance(found, int) and found > 0 else None


REQUESTS: dict[str, Callable[..., Any]] = {
    # runs
    "fetch": fetch,
    "run_info": run_info,
    "read_runs": read_runs,
    "nested_runs": nested_runs,
    "find_finished": find_finished,
    "log_files": log_files,
    "running": running,
    "reap": reap,
    # a registered model, whose `name` they all take
    "overview": registry.overview,
    "version": registry.version,
    "tag_manifest": registry.tag_manifest,
    "move": moves.move,
    "repair": moves.repair,
    "count_look": looks.count_look,
    "may_edit": turns.may_edit,
    "join": turns.join,
    "beat": turns.beat,
    "leave": turns.leave,
    "queue": turns.queue,
    "mark_dead": turns.mark_dead,
}
