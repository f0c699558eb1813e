"""What steps ask of the tracking server through their delivery process: runs as files, runs by what they are, uploads,
the end of runs that nobody works on any more."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.journal import now_ms
from pipeline.tracking import server
from pipeline.tracking.faults import Fault, classify, look, unknown

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger("asib.delivery")

FILES = ("config.yaml", "predictions.npz")
"""Artifacts that are read with a run."""
STUDY_TAG = "asib.study"


def answer(client: MlflowClient, request: dict[str, Any], uri: str) -> dict[str, Any]:
    """`{"value": …}` or `{"error": one line}` for a request of `tracking.Delivery`."""
    from pipeline.tracking.target import no_run

    try:
        match request["do"]:
            case "read":
                value: Any = [read(client, run, Path(request["dest"]), request["histories"]) for run in request["runs"]]
            case "nested":
                value = nested(client, request["run_id"])
            case "find":
                value = find_finished(client, request["identities"])
            case "log":
                for path in request["files"]:
                    client.log_artifact(request["run_id"], path, request["to"] or None)
                value = None
            case "running":
                value = running(client, request["study"])
            case "reap":
                value = reap(client, request["runs"])
            case other:
                return {"error": f"delivery does not know {other}"}
    except UserError as error:
        return {"error": str(error)}
    except Exception as error:
        if request["do"] == "nested" and unknown(error):
            return {"error": no_run(uri, request["run_id"])}
        return {"error": server.explain(error, uri)}
    return {"value": value}


def read(client: MlflowClient, run_id: str, dest: Path, histories: Sequence[str]) -> str:
    """Write `<dest>/<run id>/record.json` and the run's `FILES` beside it; that folder."""
    from pipeline.tracking.state import find_by_journal

    # an id that an off-line parent has stated is its journal's
    run = look(lambda: client.get_run(run_id)) or find_by_journal(client, run_id, None)
    if run is None:
        raise UserError(f"no run {run_id} on the tracking server, or none that you may read: check the id")
    folder = dest / run_id
    folder.mkdir(parents=True, exist_ok=True)
    classes = [_classes(d.dataset.profile) for d in run.inputs.dataset_inputs]
    record = {
        "id": run.info.run_id,
        "experiment_id": run.info.experiment_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "params": dict(run.data.params),
        "tags": dict(run.data.tags),
        "metrics": {k: repr(v) for k, v in run.data.metrics.items()},
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


def nested(client: MlflowClient, run_id: str) -> list[str]:
    """Ids of the runs nested in a run, the oldest first."""
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{run_id}'", order_by=["start_time ASC"])
    return [run.info.run_id for run in found]


def find_finished(client: MlflowClient, identities: Sequence[str]) -> dict[str, str]:
    """The newest FINISHED run of each identity, where there is one."""
    experiments = server.all_experiments(client)
    found: dict[str, str] = {}
    for identity in identities:
        query = f"tags.`asib.identity` = '{identity}' and attributes.status = 'FINISHED'"
        for run in client.search_runs(experiments, query, max_results=1):
            found[identity] = run.info.run_id
    return found


def running(client: MlflowClient, study: str | None) -> list[dict[str, Any]]:
    """`{"run_id": …, "tags": …}` of each RUNNING run of the study, of any study for None."""
    which = "!= ''" if study is None else f'= "{study}"'
    query = f"attributes.status = 'RUNNING' and tags.`{STUDY_TAG}` {which}"
    experiments = server.all_experiments(client)
    found = server.all_pages(lambda token: client.search_runs(experiments, query, page_token=token))
    return [{"run_id": run.info.run_id, "tags": dict(run.data.tags)} for run in found]


def reap(client: MlflowClient, runs: Mapping[str, Sequence[Any]]) -> list[str]:
    """End those runs that are still RUNNING: run id -> status, outcome, exit code, message; ids of those ended.

    A run that was deleted meanwhile, or that this user may not change, is passed over.
    """
    from pipeline.tracking.target import end_run, find_run

    ended = []
    for run_id, (status, outcome, exit_code, message) in runs.items():
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


def _classes(profile: str | None) -> int | None:
    """The number of classes that a data set's profile states; None where it states none, or is not one of ours."""
    try:
        stated = json.loads(profile or "null")
    except ValueError:
        return None
    found = stated.get("classes") if isinstance(stated, dict) else None
    return found if isinstance(found, int) and found > 0 else None
