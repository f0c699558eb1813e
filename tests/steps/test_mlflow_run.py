"""`mlflow run . -e <step> --env-manager local`, as users type it: exit codes, statuses and tags."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.steps.lab import Lab, Seen, client, ending, journal, points, run_id, see, until

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def command(lab: Lab, step: str, *parameters: str) -> list[str]:
    given = [f"cfg={lab.cfg}", f"output_dir={lab.runs}", "tracking.mode=online", *parameters]
    return [
        *(sys.executable, "-m", "mlflow", "run", ".", "-e", step, "--env-manager", "local"),
        *("--experiment-name", "from mlflow run"),
        *(part for parameter in given for part in ("-P", parameter)),
    ]


def environment(uri: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": uri}


def the_run(uri: str) -> Seen:
    """The one run of the command's experiment."""
    experiment = client(uri).get_experiment_by_name("from mlflow run")
    runs = client(uri).search_runs([experiment.experiment_id], "tags.mlflow.project.entryPoint != ''")
    assert len(runs) == 1
    assert client(uri).get_experiment_by_name("asib") is None
    return see(uri, runs[0].info.run_id)


def test_parameters_reach_the_step_and_the_run_is_the_commands(ready_lab: Lab, sqlite_uri: str) -> None:
    given = ["method.kd_alpha=0.25", "overrides=method.tau=2 'run_name=a b' schedule.milestones=[]"]
    done = subprocess.run(
        command(ready_lab, "distill", *given), cwd=ROOT, env=environment(sqlite_uri), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = the_run(sqlite_uri)
    (folder,) = ready_lab.run_folders()
    assert run_id(folder) == found.id
    assert (found.status, found.name, found.tags["asib.outcome"]) == ("FINISHED", "a b", "completed")
    assert found.params["method.kd_alpha"].strip("'") == "0.25"
    assert found.params["method.tau"] == "2.0"
    assert found.params["dataset.batch_size"] == "32"
    assert found.steady == points(folder)
    assert "distilled student" in done.stdout


def test_a_refused_step_fails_the_command_and_the_run_says_why(ready_lab: Lab, sqlite_uri: str) -> None:
    done = subprocess.run(
        command(ready_lab, "distill", "method.kd_alhpa=0.25"),
        cwd=ROOT,
        env=environment(sqlite_uri),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    found = the_run(sqlite_uri)
    assert (found.status, found.tags["asib.outcome"], found.tags["asib.exit_code"]) == ("FAILED", "refused", "2")
    assert "method.kd_alhpa" in found.tags["asib.error"]
    assert "did you mean method.kd_alpha" in found.tags["asib.error"]
    assert found.tags["asib.error"] in done.stderr


def to_the_step(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the step, as a batch system sends it."""
    for stat in Path("/proc").glob("[0-9]*/cmdline"):
        words = stat.read_bytes().decode(errors="replace").split("\0")
        if "steps.distill" in words and _descends(int(stat.parent.name), process.pid) and "-c" not in words:
            os.kill(int(stat.parent.name), signal.SIGTERM)
            return
    raise AssertionError("the step is not there")


def _descends(pid: int, ancestor: int) -> bool:
    while pid > 1 and pid != ancestor:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid == ancestor


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
