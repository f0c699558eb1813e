"""`mlflow run . -e <step> --env-manager local`, as users type it: exit codes, statuses and tags."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from mlflow.projects import _project_spec

from tests.steps.desk import LAX, NAME, Desk
from tests.steps.lab import Done, Lab, Seen, client, ending, journal, points, run_id, see, until

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = "from mlflow run"


def command(lab: Lab, step: str, *parameters: str) -> list[str]:
    given = [f"cfg={lab.cfg}", f"output_dir={lab.runs}", "tracking.mode=online", *parameters]
    return [
        *(sys.executable, "-m", "mlflow", "run", ".", "-e", step, "--env-manager", "local"),
        *("--experiment-name", EXPERIMENT),
        *(part for parameter in given for part in ("-P", parameter)),
    ]


def run(lab: Lab, uri: str, step: str, *parameters: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(lab, step, *parameters), cwd=ROOT, env=environment(uri), capture_output=True, text=True
    )


def as_passed(lab: Lab, uri: str, step: str, *parameters: str) -> Done:
    """Run a step in this process with the arguments that `mlflow run` makes of parameters."""
    project = _project_spec.load_project(str(ROOT))  # MLflow 3.17's
    given = [f"cfg={lab.cfg}", f"output_dir={lab.runs}", "tracking.mode=online", f"tracking.uri={uri}", *parameters]
    words = dict(word.split("=", 1) for word in given)
    _, _, module, *arguments = shlex.split(project.get_entry_point(step).compute_command(words, None))
    return lab.raw(module.removeprefix("steps."), arguments)


def environment(uri: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": uri}


def the_run(uri: str) -> Seen:
    """The one run of the command's experiment."""
    experiment = client(uri).get_experiment_by_name(EXPERIMENT)
    (found,) = client(uri).search_runs([experiment.experiment_id], "tags.mlflow.project.entryPoint != ''")
    return see(uri, found.info.run_id)


def test_parameters_reach_the_step_and_the_run_is_the_commands(ready_lab: Lab, sqlite_uri: str) -> None:
    given = ["method.kd_alpha=0.25", "overrides=method.tau=2 'run_name=a b' schedule.milestones=[]"]
    done = run(ready_lab, sqlite_uri, "distill", *given)
    assert done.returncode == 0, done.stderr
    found = the_run(sqlite_uri)
    assert client(sqlite_uri).get_experiment_by_name("asib") is None
    (folder,) = ready_lab.run_folders()
    assert run_id(folder) == found.id
    assert (found.status, found.name, found.tags["asib.outcome"]) == ("FINISHED", "a b", "completed")
    assert found.params["method.kd_alpha"].strip("'") == "0.25"
    assert found.params["method.tau"] == "2.0"
    assert found.params["dataset.batch_size"] == "32"
    assert found.steady == points(folder)
    assert "distilled student" in done.stdout


def test_tasks_and_a_strategy_reach_the_step(ready_lab: Lab, sqlite_uri: str) -> None:
    short = ["method.num_stages=1", "method.student_epochs_per_stage=[1]", "continual.buffer_size=9"]
    done = as_passed(ready_lab, sqlite_uri, "continual", "tasks=2", "method=replay", *short)
    assert done.code == 0, done.err
    found = see(sqlite_uri, run_id(done.folder))
    assert found.status == "FINISHED"
    assert (found.params["continual.num_tasks"], found.params["continual.buffer_size"]) == ("2", "9")
    assert set(found.children) == {"task 1 of 2", "task 2 of 2"}
    assert ("continual/test_forgetting", 1) in found.metrics


def test_a_refused_step_fails_the_command_and_the_run_says_why(ready_lab: Lab, sqlite_uri: str) -> None:
    done = run(ready_lab, sqlite_uri, "distill", "method.kd_alhpa=0.25")
    assert done.returncode == 1
    found = the_run(sqlite_uri)
    assert (found.status, found.tags["asib.outcome"], found.tags["asib.exit_code"]) == ("FAILED", "refused", "2")
    assert "method.kd_alhpa" in found.tags["asib.error"]
    assert "did you mean method.kd_alpha" in found.tags["asib.error"]
    assert found.tags["asib.error"] in done.stderr


def test_a_refused_promotion_fails_the_command_and_its_run_is_finished(desk: Desk) -> None:
    desk.register("good", "good")
    assert desk.promote("version=1", "reason=the first one").code == 0
    # `mlflow run` would make it with its artifacts in the working directory
    client(desk.uri).create_experiment(EXPERIMENT, (desk.lab.folder / "promotions").as_uri())
    done = run(desk.lab, desk.uri, "promote", f"name={NAME}", *LAX)
    assert done.returncode == -signal.SIGTERM, "143, as a shell says it"
    seen = the_run(desk.uri)
    assert (seen.status, seen.tags["asib.outcome"], seen.tags["asib.exit_code"]) == ("FINISHED", "refused", "3")
    assert "equally good" in seen.tags["asib.verdict_reason"]
    assert desk.aliases == {"challenger": "2", "champion": "1"}


def to_the_step(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the step, as a batch system sends it."""
    for child in psutil.Process(process.pid).children(recursive=True):
        words = child.cmdline()
        if "steps.distill" in words and "-c" not in words:
            child.terminate()
            return
    raise AssertionError("the step is not there")


def ctrl_c(process: subprocess.Popen[bytes]) -> None:
    """What a terminal does: SIGINT to the whole foreground group."""
    os.killpg(process.pid, signal.SIGINT)


@pytest.mark.parametrize(("send", "code"), [(to_the_step, 143), (ctrl_c, 130)])
def test_an_interrupted_run_stays_killed(
    ready_lab: Lab, sqlite_uri: str, send: Callable[[subprocess.Popen[bytes]], None], code: int
) -> None:
    long = ["method.student_epochs_per_stage=[500,500]"]
    process = subprocess.Popen(
        command(ready_lab, "distill", *long),
        cwd=ROOT,
        env=environment(sqlite_uri),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: ready_lab.run_folders() or process.poll() is not None)
        (folder,) = ready_lab.run_folders()
        until(lambda: sum(e.kind == "checkpoint" for e in journal(folder)) >= 2)
        send(process)
        process.wait(60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGTERM, "143, as a shell says it"
    assert ending(folder) == ("KILLED", "killed", code)
    found = the_run(sqlite_uri)
    assert found.status == "KILLED"
    assert (found.tags["asib.outcome"], found.tags["asib.exit_code"]) == ("killed", str(code))
    assert (folder / "checkpoints/manifest.json").exists()
