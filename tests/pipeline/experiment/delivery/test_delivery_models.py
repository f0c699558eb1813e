"""Models of a journal as LoggedModels: once each, with their files, metrics and place among inputs and outputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlflow")

from mlflow.tracking import MlflowClient

from pipeline.experiment.tracking import deliver
from pipeline.journal import Journal

pytest_plugins = ["tests.servers"]

STUDENT = """
import json
from typing import Any
import mlflow

class Student(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.add = json.load(open(context.artifacts["meta"]))["add"]

    def predict(self, context, model_input: list[Any], params=None) -> list[dict[str, Any]]:
        return [{"sum": row + self.add} for row in model_input]

mlflow.models.set_model(Student())
"""


@pytest.fixture(params=["sqlite", "server"])
def store(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return str(request.getfixturevalue("sqlite_uri"))
    return str(request.getfixturevalue("mlflow_server").uri)


def student(folder: Path, experiment: str, code: str = STUDENT) -> Journal:
    journal = Journal.create(folder, experiment=experiment)
    model = folder / "model"
    model.mkdir()
    (model / "student.py").write_text(code)
    (model / "meta.json").write_text(json.dumps({"add": 2}))
    (model / "example.json").write_text("[1, 2]")
    journal.params({"model.name": "resnet20", "long": "x" * 7000, **{f"p{i}": i for i in range(120)}})
    journal.metrics({"final/val_acc": 71.5}, step=9)
    journal.model(
        model,
        "student",
        python_model=model / "student.py",
        artifacts={"meta": model / "meta.json"},
        input_example=model / "example.json",
        pip_requirements=["mlflow"],
        params={"classes": 10},
        metrics={"final/val_acc": 71.5},
        tags={"asib.weights": "ab"},
        step=9,
    )
    journal.metrics({"after": 1.0}, step=10)
    journal.end("FINISHED", "completed", 0)
    return journal


def models_of(client: MlflowClient, run_id: str) -> list[Any]:
    experiment = client.get_run(run_id).info.experiment_id
    return list(client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'"))


def test_a_student_becomes_one_servable_model(store: str, tmp_path: Path) -> None:
    import mlflow

    student(tmp_path / "run", "models")
    (done,) = deliver([tmp_path / "run"], store)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "copy" / "delivery.json").unlink()
    assert deliver([tmp_path / "copy"], store)[0].run_id == done.run_id
    client = MlflowClient(store)
    (model,) = models_of(client, done.run_id)
    assert str(model.status) == "READY"
    assert (model.name, model.params["classes"], model.params["model.name"]) == ("student", "10", "resnet20")
    assert model.tags["asib.weights"] == "ab"
    run = client.get_run(done.run_id)
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    assert run.info.status == "FINISHED"
    # The run's own point, not a second one with another timestamp.
    (point,) = client.get_metric_history(done.run_id, "final/val_acc")
    (linked,) = [metric for metric in client.get_logged_model(model.model_id).metrics if metric.key == "final/val_acc"]
    assert (linked.value, linked.timestamp, linked.step) == (71.5, point.timestamp, 9)
    assert [m.key for m in client.get_logged_model(model.model_id).metrics] == ["final/val_acc"]
    mlflow.set_tracking_uri(store)
    loaded = mlflow.pyfunc.load_model(f"models:/{model.model_id}")
    assert loaded.predict([1, 5]) == [{"sum": 3}, {"sum": 7}]
    assert loaded.metadata.signature is not None
    assert loaded.metadata.run_id == done.run_id


def test_a_teacher_is_a_light_model_and_its_students_input(sqlite_uri: str, tmp_path: Path) -> None:
    teacher = Journal.create(tmp_path / "teacher", experiment="e")
    weights = tmp_path / "teacher" / "weights"
    weights.mkdir()
    (weights / "teacher.safetensors").write_bytes(b"weights")
    teacher.model(weights, "teacher", kind="weights")
    teacher.end("FINISHED", "completed", 0)
    (first,) = deliver([tmp_path / "teacher"], sqlite_uri)
    client = MlflowClient(sqlite_uri)
    (model,) = models_of(client, first.run_id)
    assert [item.path for item in client.list_logged_model_artifacts(model.model_id)] == ["teacher.safetensors"]
    journal = Journal.create(tmp_path / "run", experiment="other")
    journal.model_input(first.run_id)
    journal.model_input(teacher.id)  # known by its journal: work off line has no run ids
    journal.model_input("f" * 32)  # nothing there: left out
    journal.end("FINISHED", "completed", 0)
    for _ in range(2):
        (done,) = deliver([tmp_path / "run"], sqlite_uri)
        (tmp_path / "run" / "delivery.json").unlink()
        inputs = client.get_run(done.run_id).inputs.model_inputs
        assert [known.model_id for known in inputs] == [model.model_id]
        assert done.refused == 0


def test_a_model_that_cannot_be_saved_keeps_nothing_else_away(sqlite_uri: str, tmp_path: Path) -> None:
    student(tmp_path / "run", "broken", code="raise RuntimeError('no such layer')")
    (done,) = deliver([tmp_path / "run"], sqlite_uri)
    client = MlflowClient(sqlite_uri)
    assert done.refused == 1
    run = client.get_run(done.run_id)
    assert run.data.metrics["after"] == 1.0
    assert run.info.status == "FINISHED"
    assert [str(model.status) for model in models_of(client, done.run_id)] != ["READY"]
