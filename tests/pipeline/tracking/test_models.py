"""Models of a journal as LoggedModels: once each, with their files, metrics and place among inputs and outputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from pipeline.journal import Journal
from pipeline.served import code
from pipeline.tracking.deliver import deliver

WEIGHTS = np.array([[1, 0], [0, 1], [0, 0], [0, 0]], np.float32)
EXAMPLE = [[[[3], [1]], [[0], [0]]]]
EVIL = "import pathlib; pathlib.Path({marker!r}).write_text('ran')\n"


def network(path: Path) -> None:
    """(n, 2, 2, 1) uint8 -> the softmax of its first two pixels."""
    from onnx import TensorProto, helper, numpy_helper, save

    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
    ]
    given = helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 2, 2, 1])
    made = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 2])
    graph = helper.make_graph(nodes, "g", [given], [made], [numpy_helper.from_array(WEIGHTS, "w")])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))


def student(folder: Path, experiment: str, broken: bool = False) -> Journal:
    """A run with a model whose Python file, and whose requirements, are not this project's."""
    journal = Journal.create(folder, experiment=experiment)
    model = folder / "model"
    model.mkdir()
    (model / "evil.py").write_text(EVIL.format(marker=str(folder / "marker")))
    network(model / "student.onnx")
    (model / "meta.json").write_text(json.dumps({"classes": ["a", "b"], "image_size": 2, "in_chans": 1}))
    (model / "example.json").write_text("{" if broken else json.dumps(EXAMPLE))
    journal.params({"model.name": "resnet20", "long": "x" * 7000, **{f"p{i}": i for i in range(120)}})
    journal.metrics({"final/val_acc": 71.5}, step=9)
    journal.model(
        model,
        "student",
        python_model=model / "evil.py",
        artifacts={"net": model / "student.onnx", "meta": model / "meta.json"},
        input_example=model / "example.json",
        pip_requirements=["mlflow", "evil @ http://evil/evil.whl"],
        params={"classes": 10},
        metrics={"final/val_acc": 71.5},
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
    (answer,) = loaded.predict(EXAMPLE)
    assert answer["class"] == "a"
    assert answer["probability"] == pytest.approx(1 / (1 + np.exp(-2.0)), abs=1e-6)
    assert not (tmp_path / "run" / "marker").exists(), "the journal's code has run"
    files = Path(mlflow.artifacts.download_artifacts(f"models:/{model.model_id}", dst_path=str(tmp_path / "files")))
    assert not [path for path in files.rglob("*.py") if path.name != "student_pyfunc.py"]
    assert (files / "student_pyfunc.py").read_text() == code.CODE
    assert "evil" not in "".join(path.read_text() for path in files.iterdir() if path.is_file())
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
    student(tmp_path / "run", "broken", broken=True)
    (done,) = deliver([tmp_path / "run"], sqlite_uri)
    client = MlflowClient(sqlite_uri)
    assert done.refused == 1
    run = client.get_run(done.run_id)
    assert run.data.metrics["after"] == 1.0
    assert run.info.status == "FINISHED"
    assert [str(model.status) for model in models_of(client, done.run_id)] != ["READY"]
