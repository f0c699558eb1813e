"""Sweeps with workers in processes of their own: killed, through Slurm, joined, several processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import yaml

from pipeline.distill import train
from pipeline.launch import worker as launched
from pipeline.sweep import driver as sweep
from pipeline.sweep.request import Plan
from tests.pipeline.sweep.step.sweeping import InProcess, WorkerStop
from tests.steps import sweep_kills
from tests.steps.lab import Lab, client, points, run_id, see, signal_at, until
from tests.warm import Fork


@pytest.fixture(autouse=True)
def _nothing_is_left_running(deliveries: list[Fork]) -> Iterator[None]:
    yield
    for driver in deliveries:  # and deliveries
        left = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
        driver.kill()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps of this process have their worker here; those that are started have theirs in processes."""
    monkeypatch.setattr(Plan, "launcher", InProcess)
    monkeypatch.setattr(launched, "Stop", WorkerStop)
    monkeypatch.setattr(sweep, "TICK_S", 0.0)


def arguments(lab: Lab, uri: str, *overrides: str, **changes: Any) -> list[str]:
    file = lab.folder / "small.yaml"
    file.write_text(yaml.safe_dump(sweep_kills.SPACE | {"trials": 4} | changes))
    return lab.arguments(f"sweep={file}", "tracking.mode=online", f"tracking.uri={uri}", *overrides)


def start(lab: Lab, uri: str, *overrides: str, **changes: Any) -> Fork:
    """The driver; its workers, too, are forks where it does not leave them to Slurm."""
    log = lab.folder / "driver.log"
    return lab.start("sweep", *arguments(lab, uri, *overrides, **changes), log=log)


def finish(lab: Lab, driver: Fork, seconds: float = 300) -> None:
    assert driver.wait(seconds) == 0, (lab.folder / "driver.log").read_text()[-3000:]


def states(study: optuna.Study) -> Counter[str]:
    return Counter(trial.state.name for trial in study.trials)


def parent(lab: Lab) -> Path:
    (folder,) = lab.runs.glob("*-sweep-*")
    return folder


def local(lab: Lab) -> str:
    return f"sqlite:///{lab.runs / 'studies.db'}"


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_nothing_is_lost_however_it_is_killed(tmp_path: Path, sqlite_template: Path) -> None:
    found = sweep_kills.run(tmp_path, sqlite_template, kills=3, trials=4)
    assert sum(found["kills"].values()) >= 2, found  # a fast machine may end before the last
    assert found["states"]["COMPLETE"] == 4


@pytest.mark.slurm
def test_two_workers_through_slurm(lab: Lab, sqlite_uri: str, slurm: Any) -> None:
    given = ["cluster=slurm", "cluster.gpus_per_node=0", "cluster.cpus_per_task=1", "cluster.time_minutes=10"]
    finish(lab, start(lab, sqlite_uri, "workers=2", *given))
    assert states(sweep_kills.only_study(local(lab))) == {"COMPLETE": 4}
    found = see(sqlite_uri, run_id(parent(lab)))
    assert found.status == "FINISHED"
    assert {child.status for child in found.children.values()} == {"FINISHED"}


@pytest.mark.slow
def test_several_processes_train_a_trial_together(ready_lab: Lab, sqlite_uri: str) -> None:
    finish(ready_lab, start(ready_lab, sqlite_uri, "cluster.processes_per_trial=2", trials=2))
    study = sweep_kills.only_study(local(ready_lab))
    assert states(study) == {"COMPLETE": 2}
    assert "left with 1 worker" in (ready_lab.folder / "driver.log").read_text(), "said after the first trial"
    found = see(sqlite_uri, run_id(parent(ready_lab)))
    for trial in study.trials:
        assert trial.value == found.children[f"trial {trial.number}"].metrics["final/val_acc", 3][0]


@pytest.mark.slow
def test_what_a_dead_machine_left_running_is_reaped_and_goes_on(ready_lab: Lab, sqlite_uri: str) -> None:
    lab, epochs = ready_lab, "method.student_epochs_per_stage=[8,8]"
    driver = start(lab, sqlite_uri, epochs, trials=2)
    mlflow = client(sqlite_uri)

    def running() -> int:
        experiments = [e.experiment_id for e in mlflow.search_experiments()]
        return len(mlflow.search_runs(experiments, "attributes.status = 'RUNNING'"))

    trained = "*-sweep-*/trials/*/checkpoints/manifest.json"
    until(lambda: list(lab.runs.glob(trained)) and running() == 2, 120)  # the sweep and its trial
    everything = psutil.Process(driver.pid).children(recursive=True)
    for process in [psutil.Process(driver.pid), *everything]:
        with contextlib.suppress(psutil.NoSuchProcess):
            os.kill(process.pid, signal.SIGSTOP)  # nobody is to see another die
    for process in [psutil.Process(driver.pid), *everything]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    driver.wait()
    assert running() == 2
    online = ["tracking.mode=online", f"tracking.uri={sqlite_uri}", f"output_dir={lab.runs}"]

    def reaped() -> bool:
        assert lab.raw("sweep", ["reap=true", *online]).code == 0
        return running() == 0

    until(reaped, 60)
    finish(lab, start(lab, sqlite_uri, epochs, trials=2))
    assert states(sweep_kills.only_study(local(lab))) == {"COMPLETE": 2, "FAIL": 1}
    found = see(sqlite_uri, run_id(parent(lab)))
    assert {run.status for run in (found, *found.children.values())} == {"FINISHED"}
    assert {len(values) for run in found.children.values() for values in run.metrics.values()} == {1}


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_another_machine_joins_and_continues_from_the_server_alone(
    ready_lab: Lab, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = ready_lab
    storage = f"storage=sqlite:///{lab.folder / 'shared.db'}"
    with monkeypatch.context() as patched:
        patched.setattr(train, "Loop", signal_at(13).loop)  # in the second stage of the first trial
        stopped = lab.raw("sweep", arguments(lab, sqlite_uri, storage))
    assert stopped.code == 143, stopped.err
    folder = parent(lab)
    before = points(folder / "trials/0000")
    sweep_run, study = run_id(folder), sweep_kills.only_study(storage.removeprefix("storage="))
    shutil.move(folder, lab.folder / "gone")

    elsewhere = lab.folder / "elsewhere"
    joined = lab.raw("sweep", [f"join={study.study_name}", storage, f"output_dir={elsewhere}"])
    assert joined.code == 0, joined.err
    assert states(study) == {"COMPLETE": 4, "FAIL": 1}
    found = see(sqlite_uri, sweep_run)
    trial = found.children["trial 0"]
    assert trial.status == "FINISHED"
    assert {len(values) for values in trial.metrics.values()} == {1}
    assert before.items() <= dict(trial.steady.items()).items()
    assert "epoch 0, batch 0" not in trial.tags["asib.resumed_from"]
    assert len(list(elsewhere.glob("*/trials/*/config.yaml"))) == 4, "also of the one that was fetched"


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_worker_killed_within_a_seed_is_replaced_there(ready_lab: Lab, sqlite_uri: str, tmp_path: Path) -> None:
    """Its second seed is point for point that of an undisturbed sweep of this seed alone."""
    lab, epochs = ready_lab, "method.student_epochs_per_stage=[4,4]"
    other = Lab(tmp_path / "undisturbed")
    shutil.copytree(lab.runs / "teachers", other.runs / "teachers")
    undisturbed = other.raw("sweep", arguments(other, sqlite_uri, epochs, "seed=1", trials=1))
    assert undisturbed.code == 0, undisturbed.err
    driver = start(lab, sqlite_uri, epochs, "seeds=2", trials=1)
    until(lambda: list(lab.runs.glob("*-sweep-*/trials/0000/seed_1/checkpoints/manifest.json")), 300)
    (worker,) = sweep_kills.Sweep(lab, sqlite_uri, local(lab), 1).workers_alive()
    os.kill(worker, signal.SIGKILL)
    finish(lab, driver)
    study = sweep_kills.only_study(local(lab))
    assert states(study) == {"COMPLETE": 1, "FAIL": 1}
    first, second = (parent(lab) / "trials" / "0000" / f"seed_{index}" for index in range(2))
    assert points(second) == points(parent(other) / "trials" / "0000")
    found = see(sqlite_uri, run_id(parent(lab))).children["trial 0"]
    assert {found.status, *(run.status for run in found.children.values())} == {"FINISHED"}
    assert {len(values) for run in (found, *found.children.values()) for values in run.metrics.values()} == {1}
    assert "asib.resumed_from" not in found.children["seed 0"].tags, "it had ended"
    assert found.children["seed 1"].tags["asib.resumed_from"].startswith("epoch ")
    last = {name: values[0] for name, values in points(first).items() if name[0] == "final/val_acc"}
    last_too = {name: values[0] for name, values in points(second).items() if name[0] == "final/val_acc"}
    assert study.best_value == pytest.approx((sum(last.values()) + sum(last_too.values())) / 2)
