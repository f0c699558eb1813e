"""What a run looks like in MLflow: a public interface that saved UI views depend on (docs/tracking.md)."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import yaml
from mlflow.exceptions import MlflowException
from PIL import Image

from models import weights, zoo
from pipeline.compose import cli
from pipeline.compose.compose import compose
from pipeline.config import Config, config_hash, flatten
from pipeline.config.words import written
from pipeline.data import sources
from pipeline.distill import export
from tests.steps.desk import to_onnx
from tests.steps.lab import (
    CLASSES,
    STUDENT,
    Done,
    Lab,
    Seen,
    all_runs,
    client,
    deliver,
    images,
    journal,
    points,
    run_id,
    see,
)

NAME = "tiny-student"
OWN = ("log_model=true", f"register={NAME}", "run_name=the main job")


@dataclass
class Tracked:
    """A step that has ended, and what its tracking store holds of it."""

    lab: Lab
    done: Done
    uri: str
    seen: Seen


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Tracked:
    """The main job, tracked while it ran."""
    lab = Lab(tmp_path_factory.mktemp("tracked"))
    store = lab.folder / "mlflow.db"
    shutil.copyfile(sqlite_template, store)
    uri = f"sqlite:///{store}"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(export, "to_onnx", to_onnx)
        done = lab.step("main", "tracking.mode=online", f"tracking.uri={uri}", *OWN)
    assert done.code == 0, done.err
    return Tracked(lab, done, uri, see(uri, run_id(done.folder)))


@pytest.fixture(scope="module")
def seen(tracked: Tracked) -> Seen:
    return tracked.seen


def everyone(seen: Seen) -> dict[str, Seen]:
    return {"main": seen, **seen.children}


def test_the_main_job_is_a_run_with_nested_runs_that_all_finished(seen: Seen) -> None:
    assert seen.name == "the main job"
    assert set(seen.children) == {"student_alone", "teacher_0", "teacher_1", "distill", "evaluate"}
    for name, run in everyone(seen).items():
        assert run.status == "FINISHED", name
        assert (run.tags["asib.outcome"], run.tags["asib.exit_code"]) == ("completed", "0"), name
    steps = {name: run.tags["asib.step"] for name, run in everyone(seen).items()}
    assert steps == {
        "main": "main",
        "student_alone": "baseline",
        "teacher_0": "finetune",
        "teacher_1": "finetune",
        "distill": "distill",
        "evaluate": "evaluate",
    }


def test_the_terminal_says_how_a_store_without_a_server_is_looked_at(tracked: Tracked) -> None:
    (line,) = (line for line in tracked.done.err.splitlines() if line.startswith("all runs: "))
    serve, _, page = line.partition(", then http://127.0.0.1:5000/")
    assert serve == f"all runs: mlflow ui --backend-store-uri {tracked.uri}"
    experiment = client(tracked.uri).get_run(tracked.seen.id).info.experiment_id
    assert page.startswith(f"#/experiments/{experiment}/runs?")
    assert "viewStateShareKey=asib" in page


def test_the_parameters_are_the_whole_flattened_configuration(tracked: Tracked, seen: Seen) -> None:
    for name, run in everyone(seen).items():
        folder = tracked.done.folder if name == "main" else tracked.done.folder / name
        config = Config.model_validate(yaml.safe_load((folder / "config.yaml").read_text()))
        assert run.params == {key: written(value) for key, value in flatten(config).items()}, name
        assert run.tags["asib.config_hash"] == config_hash(config)
    assert seen.params["method.kd_alpha"] == "0.5"
    assert seen.params["model.teachers.1.name"] == "cifar_wrn_16_1"
    alone = seen.children["student_alone"].params
    assert (alone["method.kd_alpha"], alone["method.ce_alpha"]) == ("0.0", "1.0")


def test_the_tags_say_what_was_computed_from_what(tracked: Tracked, seen: Seen) -> None:
    data = sources.load(compose(str(tracked.lab.cfg)).dataset)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    for name, run in everyone(seen).items():
        if head.returncode == 0:
            assert run.tags["asib.git_sha"] == head.stdout.strip()
            assert run.tags["asib.git_dirty"] in ("true", "false")
            assert ("git.diff" in run.artifacts) <= (run.tags["asib.git_dirty"] == "true")
        if name != "main":
            assert run.tags["asib.data_digest"] == data.digest, name
            assert run.tags["mlflow.parentRunId"] == seen.id
            assert run.tags["asib.eval_split"] == ("test" if name == "evaluate" else "val")
    children = seen.children
    teachers = children["distill"].tags["asib.teachers"].split(",")
    assert teachers == [children["teacher_0"].tags["asib.weights"], children["teacher_1"].tags["asib.weights"]]
    assert children["student_alone"].tags["asib.teachers"] == "none"
    assert children["evaluate"].tags["asib.weights"] == children["distill"].tags["asib.weights"]
    assert "asib.val_contaminated" not in children["distill"].tags


def test_metrics_are_there_once_for_each_global_epoch(seen: Seen) -> None:
    steps: dict[str, set[int]] = {}
    distilled = seen.children["distill"]
    for (name, step), values in distilled.metrics.items():
        assert len(values) == 1, (name, step)
        steps.setdefault(name, set()).add(step)
    every, a_epochs, b_epochs = {0, 1, 2, 3}, {0, 2}, {1, 3}
    for name in ("synergy/acc", "schedule/tau", "schedule/lr", "train/images_per_second", "train/nonfinite_steps"):
        assert steps.pop(name) == every, name
    for name in ("loss", "ce", "kd", "ib", "cw_mean", "cw_std"):
        assert steps.pop(f"a_step/{name}") == a_epochs, name
    for name in ("schedule/ib_beta", "synergy/acc_ema"):
        assert steps.pop(name) == a_epochs, name
    for name in ("student/acc", "student/loss", "gate/open", "schedule/kd_weight"):
        assert steps.pop(name) == b_epochs, name
    for name in ("loss", "ce", "kd"):
        assert steps.pop(f"b_step/{name}") == b_epochs, name
    first = ("teacher/0/acc", "teacher/1/acc", "teacher/avg_acc", "teacher/disagreement", "teacher/both_wrong")
    assert all(steps.pop(name) == {0} for name in first)
    assert all(name.startswith("final/") or "/" in name for name in steps)
    finals = {name for name in steps if name.startswith("final/")}
    assert finals == {
        "final/acc_last",
        "final/acc_val_selected",
        "final/val_acc",
        "final/teacher_0_acc",
        "final/teacher_1_acc",
        "final/teacher_avg_acc",
        "final/synergy_acc",
    }
    assert all(0 <= v[0] <= 100 for (name, _), v in distilled.metrics.items() if name.endswith("acc"))
    groups = ("a_step/", "b_step/", "cost/", "parameters/")
    assert all(name.startswith(groups) for name in steps.keys() - finals), "no group of metrics that is not documented"


def test_every_tag_metric_and_artifact_is_documented(seen: Seen) -> None:
    page = Path(__file__).resolve().parents[2] / "docs/tracking.md"
    patterns = []
    for name in re.findall(r"`([^`\s]+)`", page.read_text(encoding="utf-8")):
        pattern = re.sub(r"\\{(.*?)\\}", lambda m: f"({m[1].replace(',', '|')})", re.escape(name))
        patterns.append(re.sub(r"<\w+>", "[^/]+", pattern).replace(r"\*", ".+"))
    documented = re.compile("|".join(patterns))
    names: set[str] = set()
    for run in everyone(seen).values():
        names |= {name for name in run.tags if name.startswith("asib.")} | {name for name, _ in run.metrics}
        names |= {name for name in run.artifacts if not name.startswith("checkpoints/")}
    assert sorted(name for name in names if not documented.fullmatch(name)) == []


def test_the_summary_repeats_what_the_nested_runs_found(seen: Seen) -> None:
    def last(run: Seen, name: str) -> float:
        return max((step, values) for (key, step), values in run.metrics.items() if key == name)[1][-1]

    children = seen.children
    assert last(seen, "final/acc_val_selected") == last(children["distill"], "final/acc_val_selected")
    assert last(seen, "final/student_alone_acc") == last(children["student_alone"], "final/acc_val_selected")
    assert last(seen, "test/acc") == last(children["evaluate"], "test/acc")
    assert last(children["evaluate"], "test/acc") == last(children["distill"], "final/acc_val_selected")
    assert last(seen, "final/teacher_1_acc") == last(children["teacher_1"], "final/acc_val_selected")


def test_the_table_in_the_terminal_shows_the_same_numbers(tracked: Tracked, seen: Seen) -> None:
    lines = tracked.done.out.splitlines()
    shown = dict(line.rsplit(None, 1) for line in lines if "(cifar" in line or "synergy" in line)
    distilled = max((s, v) for (k, s), v in seen.metrics.items() if k == "final/acc_val_selected")[1][-1]
    assert float(shown["distilled student (cifar_resnet8)"]) == pytest.approx(distilled, abs=0.005)
    assert {"student alone (cifar_resnet8)", "teacher 0 (cifar_resnet8)", "synergy"} <= shown.keys()


def test_the_data_set_is_an_input_with_its_digest(seen: Seen) -> None:
    for name, run in seen.children.items():
        digest = run.tags["asib.data_digest"]
        assert run.datasets == [("npz", digest[:32], "test" if name == "evaluate" else "training")], name


def test_teachers_are_model_inputs_and_the_student_a_model_output(seen: Seen) -> None:
    children = seen.children
    distilled = children["distill"]
    made = [children["teacher_0"].models_out, children["teacher_1"].models_out]
    assert sorted(distilled.models_in) == sorted(id for ids in made for id in ids)
    assert len(distilled.models_in) == 2
    assert len(distilled.models_out) == 1
    assert children["evaluate"].models_in == distilled.models_out
    assert children["student_alone"].models_out == []


def test_the_student_is_registered_once_by_the_nested_run_that_made_it(tracked: Tracked, seen: Seen) -> None:
    made_by = seen.children["distill"]
    (version,) = client(tracked.uri).search_model_versions(f"name = '{NAME}'")
    assert (version.run_id, version.source) == (made_by.id, f"models:/{made_by.models_out[0]}")
    assert client(tracked.uri).get_model_version_by_alias(NAME, "challenger").version == version.version
    same = ("asib.config_hash", "asib.teachers", "asib.git_sha", "asib.git_dirty", "asib.data_digest", "asib.weights")
    assert {key: version.tags[key] for key in same} == {key: made_by.tags[key] for key in same}
    (val_acc,) = (values for (name, _), values in made_by.metrics.items() if name == "final/val_acc")
    assert float(version.tags["asib.val_acc"]) == pytest.approx(val_acc[0], abs=0.005)
    (line,) = (line for line in tracked.done.err.splitlines() if "to promote it" in line)
    assert line.startswith(f"version {version.version} of {NAME}; to promote it: python -m steps.promote cfg=")
    command = cli.parse(shlex.split(line)[shlex.split(line).index("steps.promote") + 1 :], ["name"])
    assert (command.cfg, command.own) == (str(tracked.lab.cfg), {"name": NAME})
    assert f"tracking.uri={tracked.uri}" in command.overrides


def test_the_artifacts_are_there(tracked: Tracked, seen: Seen) -> None:
    common = {"config.yaml", "results.json", "summary.csv", "run.log"}
    children = seen.children
    assert common <= seen.artifacts
    student = common | {"curves.png", "confusion.png", "checkpoints/student.safetensors"}
    assert student | {"checkpoints/fusion.safetensors"} <= children["distill"].artifacts
    assert student <= children["student_alone"].artifacts
    assert common | {"checkpoints/teacher.safetensors"} <= children["teacher_0"].artifacts
    assert common | {"confusion.png"} <= children["evaluate"].artifacts
    for name, run in everyone(seen).items():
        folder = tracked.done.folder if name == "main" else tracked.done.folder / name
        assert not [a for a in run.artifacts if a.endswith((".part", ".lock", "delivery.json", "journal.jsonl"))]
        for artifact in ("config.yaml", "results.json", "summary.csv"):
            path = Path(client(tracked.uri).download_artifacts(run.id, artifact))
            assert path.read_bytes() == (folder / artifact).read_bytes()


def test_a_finished_run_has_weights_and_no_checkpoints_on_the_server(seen: Seen) -> None:
    for run in everyone(seen).values():
        assert not [name for name in run.artifacts if "/slot" in name or name.endswith("manifest.json")]


def test_results_and_summary_hold_the_columns_of_the_research_code(tracked: Tracked, seen: Seen) -> None:
    distilled = seen.children["distill"]
    results = json.loads((tracked.done.folder / "distill/results.json").read_text())
    assert results["step"] == "distill"
    for name, value in results["metrics"].items():
        assert distilled.metrics[name, 3] == [value]
    with (tracked.done.folder / "distill/summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["final_student_acc"]) == pytest.approx(results["metrics"]["final/acc_val_selected"], abs=0.005)
    assert (row["num_classes"], row["batch_size"], row["kd_alpha"]) == ("4", "32", "0.5")
    assert [float(row[f"student_ep{k}_acc"]) for k in (1, 2)] == pytest.approx(
        [distilled.metrics["student/acc", step][0] for step in (1, 3)], abs=0.005
    )
    assert float(row["teacher_ep1_syn_acc"]) == pytest.approx(distilled.metrics["synergy/acc", 0][0], abs=0.005)


# the student as a model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tracked: Tracked) -> Any:
    client(tracked.uri)
    return mlflow.pyfunc.load_model(f"models:/{tracked.seen.children['distill'].models_out[0]}")


@pytest.fixture(scope="module")
def expected(tracked: Tracked) -> tuple[np.ndarray, np.ndarray]:
    """Test images, and the probabilities of the exported checkpoint."""
    data = sources.load(compose(str(tracked.lab.cfg)).dataset)
    net = zoo.create_model("cifar_resnet8", 4, pretrained=False, small_input=None, image_size=16, in_chans=3).eval()
    weights.load_weights(net, tracked.done.folder / "distill" / STUDENT)
    x, _ = images(8, seed=1000)
    mean, std = np.array(data.mean), np.array(data.std)
    prepared = torch.tensor((x / 255 - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        return x, torch.softmax(net(prepared).logits, dim=1).numpy()


def _probabilities(answers: list[dict[str, Any]]) -> np.ndarray:
    return np.array([[answer["probabilities"][name] for name in CLASSES] for answer in answers])


def test_the_student_has_signature_and_input_example(tracked: Tracked, seen: Seen, loaded: Any) -> None:
    (model_id,) = seen.children["distill"].models_out
    info = mlflow.models.get_model_info(f"models:/{model_id}")
    assert info.signature is not None
    assert info.signature.inputs is not None
    assert info.signature.outputs is not None
    assert info.saved_input_example_info is not None
    model = client(tracked.uri).get_logged_model(model_id)
    assert model.name == "student"
    assert str(model.status) == "READY"
    assert {metric.key for metric in model.metrics} >= {"final/val_acc", "final/acc_val_selected"}
    assert model.source_run_id == seen.children["distill"].id
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{model_id}"))
    assert list(folder.rglob("student.safetensors"))
    (meta,) = folder.rglob("meta.json")
    assert json.loads(meta.read_text())["classes"] == list(CLASSES)
    assert not [p for p in folder.rglob("*") if p.suffix in (".pkl", ".pickle")]


def test_the_student_gives_the_checkpoints_probabilities_for_lists_of_pixels(
    loaded: Any, expected: tuple[np.ndarray, np.ndarray]
) -> None:
    x, probabilities = expected
    answers = loaded.predict(x.tolist())
    np.testing.assert_allclose(_probabilities(answers), probabilities, atol=1e-4)
    assert [answer["class"] for answer in answers] == [CLASSES[k] for k in probabilities.argmax(axis=1)]
    assert [a["probability"] for a in answers] == pytest.approx(probabilities.max(axis=1).tolist(), abs=1e-4)


def test_the_student_gives_the_checkpoints_probabilities_for_png(
    loaded: Any, expected: tuple[np.ndarray, np.ndarray]
) -> None:
    x, probabilities = expected
    texts = []
    for image in x:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        texts.append(base64.b64encode(buffer.getvalue()).decode())
    np.testing.assert_allclose(_probabilities(loaded.predict(texts)), probabilities, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "empty"),
        ([[[0.5] * 3] * 16] * 16, "image 0"),
        ([np.zeros((16, 16, 3)).tolist()], "integers from 0 to 255"),
        ([np.full((16, 16, 3), 256).tolist()], "integers from 0 to 255"),
        ([np.full((8, 8, 3), 5).tolist()], "expected \\(16, 16, 3\\)"),
        (["no picture"], "no base64 PNG or JPEG"),
    ],
)
def test_the_student_refuses_what_is_no_image(loaded: Any, given: Any, says: str) -> None:
    with pytest.raises(MlflowException, match=says):
        loaded.predict(given)


@pytest.mark.slow
def test_a_sweep_registers_one_student(ready_lab: Lab, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "to_onnx", to_onnx)
    space = ready_lab.folder / "space.yaml"
    dimension = {"type": "categorical", "choices": [2.0, 4.0]}
    space.write_text(yaml.safe_dump({"space": {"method.tau": dimension}, "trials": 2, "pruner": "none"}))
    online = ["tracking.mode=online", f"tracking.uri={sqlite_uri}", "log_model=true", f"register={NAME}"]
    done = ready_lab.step("sweep", f"sweep={space}", *online)
    assert done.code == 0, done.err
    found = see(sqlite_uri, run_id(done.folder))
    (version,) = client(sqlite_uri).search_model_versions(f"name = '{NAME}'")
    assert (version.run_id, version.source) == (found.id, f"models:/{found.models_out[0]}")
    assert client(sqlite_uri).get_model_version_by_alias(NAME, "challenger").version == version.version
    hashes = {child.tags["asib.config_hash"] for child in found.children.values()}
    assert version.tags["asib.config_hash"] in hashes
    assert len(version.tags["asib.teachers"].split(",")) == 2


# off line, then delivered -----------------------------------------------------------------------------------------

CLOCK_AND_IDS = {"asib.journal", "asib.generation", "mlflow.parentRunId", "asib.student", "asib.command"}
CLOCK_AND_IDS |= {"mlflow.note.content"}


def compare(direct: Seen, later: Seen) -> None:
    """All but ids and clocks are the same."""
    settings = {"tracking.mode", "tracking.uri", "output_dir"}
    assert {k: v for k, v in later.params.items() if k not in settings} == {
        k: v for k, v in direct.params.items() if k not in settings
    }
    assert _steady_tags(later) == _steady_tags(direct)
    assert later.steady == direct.steady
    assert later.metrics.keys() == direct.metrics.keys()
    assert later.artifacts == direct.artifacts
    assert (later.status, later.datasets) == (direct.status, direct.datasets)
    assert len(later.models_in) == len(direct.models_in)
    assert len(later.models_out) == len(direct.models_out)
    assert later.children.keys() == direct.children.keys()


def _steady_tags(seen: Seen) -> dict[str, str]:
    return {k: v for k, v in seen.tags.items() if k not in CLOCK_AND_IDS}


@pytest.mark.slow
def test_an_offline_run_delivered_twice_equals_the_same_run_tracked_directly(
    tracked: Tracked, lab: Lab, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "to_onnx", to_onnx)
    done = lab.step("main", *OWN, f"dataset.path={tracked.lab.data}")
    assert done.code == 0, done.err
    assert not (done.folder / "delivery.json").exists()
    deliver(sqlite_uri, done.folder)
    first = see(sqlite_uri, run_id(done.folder))
    (done.folder / "delivery.json").unlink()  # as from another machine
    deliver(sqlite_uri, done.folder)
    later = see(sqlite_uri, run_id(done.folder))
    assert later == first
    direct = tracked.seen
    compare(direct, later)
    for name in direct.children:
        compare(direct.children[name], later.children[name])
    distilled, evaluated = later.children["distill"], later.children["evaluate"]
    assert evaluated.models_in == distilled.models_out
    assert len(all_runs(sqlite_uri)) == 6


# the run that `mlflow run` made ------------------------------------------------------------------------------------


@pytest.fixture
def adopted(sqlite_uri: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, str]:
    """A run as `mlflow run` makes it: in its own experiment, with its parameters."""
    mlflow = client(sqlite_uri)
    experiment = mlflow.create_experiment("chosen by mlflow run")
    run = mlflow.create_run(experiment, tags={"mlflow.project.entryPoint": "distill"})
    mlflow.log_param(run.info.run_id, "method.tau", "4")
    mlflow.log_param(run.info.run_id, "cfg", "tiny")
    for name, value in (("RUN_ID", run.info.run_id), ("EXPERIMENT_ID", experiment), ("TRACKING_URI", sqlite_uri)):
        monkeypatch.setenv(f"MLFLOW_{name}", value)
    return sqlite_uri, run.info.run_id, experiment


def test_the_run_that_mlflow_run_made_is_adopted(ready_lab: Lab, adopted: tuple[str, str, str]) -> None:
    uri, run, experiment = adopted
    done = ready_lab.step("distill", "tracking.mode=online", "method.tau=4")
    assert done.code == 0, done.err
    found = see(uri, run)
    assert found.params["method.tau"] == "4.0", "as a step alone stores it"
    assert found.params["cfg"] == "tiny"
    assert found.params["method.kd_alpha"] == "0.5"
    assert (found.status, found.tags["asib.outcome"], found.tags["asib.step"]) == ("FINISHED", "completed", "distill")
    assert found.tags["mlflow.project.entryPoint"] == "distill"
    assert found.steady == points(done.folder)
    assert len(client(uri).search_runs([experiment])) == 1
    assert "asib" not in {e.name for e in client(uri).search_experiments()}, "no experiment is set"


def test_a_refusal_before_the_run_fails_the_run_that_mlflow_run_made(lab: Lab, adopted: tuple[str, str, str]) -> None:
    uri, run, _ = adopted
    done = lab.step("distill", "tracking.mode=online", "method.kd_alhpa=0.4")
    assert (done.code, done.new) == (2, [])
    assert len(done.lines) == 1, done.err
    found = see(uri, run)
    assert (found.status, found.tags["asib.outcome"], found.tags["asib.exit_code"]) == ("FAILED", "refused", "2")
    assert found.tags["asib.error"] == done.lines[0]
    assert found.name.startswith("distill refused: method.kd_alhpa"), "MLflow had made up a name"
    assert found.params == {"method.tau": "4", "cfg": "tiny"}, "no parameters of a configuration that was never run"


@pytest.mark.slow
def test_a_resume_under_mlflow_run_leaves_the_new_run_empty(
    ready_lab: Lab, killed: Path, adopted: tuple[str, str, str]
) -> None:
    uri, shell, _ = adopted
    deliver(uri, killed)
    target = run_id(killed)
    done = ready_lab.step("distill", "tracking.mode=online", f"resume={target}")
    assert done.code == 0, done.err
    empty, whole = see(uri, shell), see(uri, target)
    assert empty.tags["asib.resumes"] == target
    assert (empty.status, empty.metrics, empty.artifacts) == ("FINISHED", {}, set())
    assert whole.status == "FINISHED"
    assert whole.steady == points(killed)
    assert [e.kind for e in journal(killed)].count("resume") == 1
