"""Log a journal's data sets, teachers and students as MLflow's datasets, model inputs and LoggedModels."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModel,
    LoggedModelInput,
    LoggedModelOutput,
    Metric,
)
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from pipeline.journal import Entry, decode_number
from pipeline.paths import tree_inside
from pipeline.served import bundle
from pipeline.served import code as served
from pipeline.tracking.checkpoints import staging
from pipeline.tracking.faults import look, outraced, permitted
from pipeline.tracking.state import State, find_by_journal

log = logging.getLogger("asib.delivery")

ENTRY_TAG = "asib.journal_entry"
DIGEST_LENGTH = 32  # MLflow takes 36; the caller puts the whole digest into a tag


def log_dataset(client: MlflowClient, run_id: str, entry: Entry) -> None:
    """Log a data set by name, digest and source, without its data."""
    data = entry.data
    web = data["source"].startswith(("http://", "https://"))
    dataset = Dataset(
        name=data["name"],
        digest=data["digest"][:DIGEST_LENGTH],
        source_type="http" if web else "local",
        source=json.dumps({"url" if web else "uri": data["source"]}),
        schema=json.dumps(data["schema"]) if data["schema"] else None,
        profile=json.dumps(data["profile"]) if data["profile"] else None,
    )
    tag = InputTag(MLFLOW_DATASET_CONTEXT, data["context"])
    client.log_inputs(run_id, datasets=[DatasetInput(dataset, [tag])])


def log_model_input(client: MlflowClient, run_id: str, entry: Entry) -> None:
    """Log the newest model of the run that the entry names (by run or journal id) as an input of this one."""
    wanted = entry.data["run_id"]
    # Most ids are those of journals on this machine; only administrators may ask for a run with such an id.
    teacher = find_by_journal(client, wanted, None) or look(lambda: client.get_run(wanted))
    known = _models(client, teacher.info.experiment_id, teacher.info.run_id) if teacher else []
    models = [found for found in known if str(found.status) == "READY"]
    if not models:
        log.warning("model input: run %s has no model; left out", wanted)
        return
    model = max(models, key=lambda found: int(found.creation_timestamp))
    inputs = client.get_run(run_id).inputs.model_inputs
    if model.model_id in [known.model_id for known in inputs]:
        return
    # MLflow requires EDIT on the model's own experiment, which users of others' models need not have
    if not permitted(client.log_inputs, run_id, None, [LoggedModelInput(model.model_id)]):
        log.warning("run %s: model %s is not linked, its experiment is read-only here", run_id, model.model_id)


def log_model(client: MlflowClient, state: State, folder: Path, entry: Entry) -> str:
    """Make the entry's LoggedModel, once, or complete what an earlier attempt left behind.

    Returns:
        Its model id.

    Raises:
        ValueError: the prepared files do not make a model.
    """
    data, run_id = entry.data, state.run_id
    known = _models(client, state.experiment_id, run_id)
    model = next((found for found in known if found.tags.get(ENTRY_TAG) == data["entry"]), None)
    if model is None:
        model = client.create_logged_model(
            state.experiment_id,
            name=data["name"],
            source_run_id=run_id,
            tags={**data["tags"], ENTRY_TAG: data["entry"]},
            params={**client.get_run(run_id).data.params, **data["params"]},
            model_type=data["model_type"],
        )
    model_id = str(model.model_id)
    if str(model.status) != "READY":
        with staging(folder) as stage:
            whole = data["model_kind"] == "weights"
            files = tree_inside(folder, data["folder"]) if whole else _saved(model, run_id, folder, data, stage)
            client.set_logged_model_tags(model_id, {bundle.TAG: bundle.manifest(files)})
            client.log_model_artifacts(model_id, str(files))
    _link_output(client, run_id, LoggedModelOutput(model_id, step=data["step"]))
    metrics = _metrics(client, run_id, model_id, entry)
    if metrics:
        client.log_batch(run_id, metrics=metrics)
    if str(model.status) != "READY":
        client.finalize_logged_model(model_id, "READY")
    return model_id


@outraced
def _link_output(client: MlflowClient, run_id: str, model: LoggedModelOutput) -> None:
    """Make a model an output of the run, once: MLflow refuses it twice, also when its client repeats a lost call."""
    outputs = client.get_run(run_id).outputs
    if model.model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
        client.log_outputs(run_id, [model])


def _saved(model: LoggedModel, run_id: str, folder: Path, data: Any, stage: Path) -> Path:
    """The folder of a servable model. Code and requirements are this project's own, never the journal's."""
    import mlflow.pyfunc
    from mlflow.models import Model

    to, code = stage / "model", stage / served.PYFUNC.name
    code.write_text(served.CODE, encoding="utf-8")
    try:
        mlflow.pyfunc.save_model(
            path=str(to),
            mlflow_model=Model(
                artifact_path=model.artifact_location,
                run_id=run_id,
                model_uuid=model.model_id,
                model_id=model.model_id,
            ),
            python_model=str(code),
            artifacts={name: str(tree_inside(folder, path)) for name, path in data["artifacts"].items()},
            input_example=_example(tree_inside(folder, data["input_example"])) if data["input_example"] else None,
            pip_requirements=served.requirements(),
        )
    except Exception as error:
        # The same files would raise the same error again.
        raise ValueError(f"model {data['name']} cannot be saved: {type(error).__name__}: {error}") from error
    return to


def _example(path: Path) -> Any:
    if path.suffix == ".npy":
        import numpy

        return numpy.load(path, allow_pickle=False)
    return json.loads(path.read_text())


def _metrics(client: MlflowClient, run_id: str, model_id: str, entry: Entry) -> list[Metric]:
    """The model's metrics: the run's own points where it has them (another timestamp would add a point)."""
    found = []
    for key, text in entry.data["metrics"].items():
        value = decode_number(text)
        points = [point for point in client.get_metric_history(run_id, key) if point.value == value]
        at, step = (points[-1].timestamp, points[-1].step) if points else (entry.time, entry.data["step"])
        found.append(Metric(key, value, at, step, model_id=model_id, run_id=run_id))
    return found


def _models(client: MlflowClient, experiment_id: str, run_id: str) -> list[LoggedModel]:
    query = f"source_run_id = '{run_id}'"
    return list(client.search_logged_models([experiment_id], filter_string=query, max_results=50))
