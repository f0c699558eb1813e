"""`register=<name>`: students of distill, main and sweep become versions; promoted or not under `mlflow run`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.steps.lab import Lab, client, run_id, see

pytest_plugins = ["tests.servers"]
ROOT = Path(__file__).resolve().parents[2]
NAME = "tiny-student"


def versions(uri: str) -> list[Any]:
    return sorted(client(uri).search_model_versions(f"name = '{NAME}'"), key=lambda v: int(v.version))


def aliases(uri: str) -> dict[str, str]:
    return {a: str(v) for a, v in client(uri).get_registered_model(NAME).aliases.items()}


def online(uri: str) -> list[str]:
    return ["tracking.mode=online", f"tracking.uri={uri}", "log_model=true", f"register={NAME}"]


@pytest.mark.parametrize(
    ("overrides", "needles"),
    [
        (["register=a/b", "log_model=true"], ["register=a/b", "a-b"]),
        ([f"register={NAME}", "log_model=false"], [f"register={NAME} needs log_model=true"]),
    ],
)
def test_what_cannot_be_registered_is_refused_before_training(
    lab: Lab, overrides: list[str], needles: list[str]
) -> None:
    done = lab.step("distill", *overrides)
    assert (done.code, len(done.lines), done.new) == (2, 1, [])
    for needle in needles:
        assert needle in done.lines[0]


@pytest.mark.slow
def test_a_distilled_student_is_registered_and_promoted_under_mlflow_run(ready_lab: Lab, sqlite_uri: str) -> None:
    done = ready_lab.step("distill", *online(sqlite_uri))
    assert done.code == 0, done.err
    run = see(sqlite_uri, run_id(done.folder))
    (version,) = versions(sqlite_uri)
    assert (version.run_id, version.source) == (run.id, f"models:/{run.models_out[0]}")
    assert aliases(sqlite_uri) == {"challenger": "1"}
    same = ("asib.config_hash", "asib.teachers", "asib.git_sha", "asib.git_dirty", "asib.data_digest", "asib.weights")
    assert {key: version.tags[key] for key in same} == {key: run.tags[key] for key in same}
    (val_acc,) = (values for (name, _), values in run.metrics.items() if name == "final/val_acc")
    assert float(version.tags["asib.val_acc"]) == pytest.approx(val_acc[0], abs=0.005)

    def promote(*own: str) -> tuple[int, Any]:
        given = [f"cfg={ready_lab.cfg}", f"name={NAME}", "gate.first.min_acc=0", "gate.max_latency_ratio=50", *own]
        given += [f"output_dir={ready_lab.runs}", "tracking.mode=online"]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = [sys.executable, "-m", "mlflow", "run", ".", "-e", "promote", "--env-manager", "local"]
        ended = subprocess.run(
            [*command, "--experiment-name", "promotions", *(part for p in given for part in ("-P", p))],
            cwd=ROOT,
            env={**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": sqlite_uri},
            capture_output=True,
            text=True,
        )
        experiment = client(sqlite_uri).get_experiment_by_name("promotions")
        newest = client(sqlite_uri).search_runs([experiment.experiment_id], order_by=["start_time DESC"])[0]
        return ended.returncode, see(sqlite_uri, newest.info.run_id)

    # `mlflow run` would make it with its artifacts in the working directory
    client(sqlite_uri).create_experiment("promotions", (ready_lab.folder / "promotions").as_uri())
    code, seen = promote("reason=the first one")
    assert (code, seen.status, seen.tags["asib.outcome"]) == (0, "FINISHED", "promoted")
    assert aliases(sqlite_uri) == {"challenger": "1", "champion": "1"}
    assert versions(sqlite_uri)[0].tags["asib.reason"] == "the first one"

    again = ready_lab.step("distill", *online(sqlite_uri))  # the same student: equally good
    assert again.code == 0, again.err
    assert aliases(sqlite_uri) == {"challenger": "2", "champion": "1"}
    code, seen = promote()
    assert (code, seen.status) == (-signal.SIGTERM, "FINISHED"), "143, as a shell says it"
    assert (seen.tags["asib.outcome"], seen.tags["asib.exit_code"]) == ("refused", "3")
    assert "equally good" in seen.tags["asib.verdict_reason"]
    assert aliases(sqlite_uri) == {"challenger": "2", "champion": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("step", ["main", "sweep"])
def test_main_and_sweep_register_one_student(ready_lab: Lab, sqlite_uri: str, step: str) -> None:
    space = ready_lab.folder / "space.yaml"
    dimension = {"type": "categorical", "choices": [2.0, 4.0]}
    space.write_text(yaml.safe_dump({"space": {"method.tau": dimension}, "trials": 2, "pruner": "none"}))
    own = [f"sweep={space}"] if step == "sweep" else []
    done = ready_lab.step(step, *own, *online(sqlite_uri))
    assert done.code == 0, done.err
    found = see(sqlite_uri, run_id(done.folder))
    (version,) = versions(sqlite_uri)
    made_by = found.children["distill"] if step == "main" else found
    assert (version.run_id, version.source) == (made_by.id, f"models:/{made_by.models_out[0]}")
    assert aliases(sqlite_uri) == {"challenger": "1"}
    hashes = {child.tags["asib.config_hash"] for child in found.children.values()}
    assert version.tags["asib.config_hash"] in hashes
    assert len(version.tags["asib.teachers"].split(",")) == 2
