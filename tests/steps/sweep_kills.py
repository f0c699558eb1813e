"""Kills a sweep's workers and its driver at random moments, or stops workers until they are given up for dead, and says
whether anything was lost.

The study runs twice on data of seconds: undisturbed, in this process, and killed. Whatever was killed, that study must
end with exactly its trials, no run left RUNNING, and each trial's metrics, point for point, those of the undisturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import yaml

from tests.steps.lab import Lab, client, journal, points
from tests.warm import Fork

SPACE: dict[str, Any] = {
    "space": {
        "method.kd_alpha": {"type": "float", "low": 0.1, "high": 0.9},
        "method.tau": {"type": "float", "low": 1, "high": 8},
    },
    "sampler": {"name": "random", "seed": 5},
    "pruner": {"name": "none"},
    "max_retry": 1000,
    "heartbeat_seconds": 1,
    "grace_seconds": 3,
}
EPOCHS = "method.student_epochs_per_stage=[6,6]"


def four_trials(lab: Lab, storage: str, *more: str) -> tuple[str, Path]:
    """What a whole sweep of four trials says as a process of its own, which ends well, and its run's folder."""
    file, log = lab.folder / "small.yaml", lab.folder / "driver.log"
    file.write_text(yaml.safe_dump(SPACE | {"trials": 4}))
    driver = lab.start("sweep", f"sweep={file}", f"storage={storage}", *more, log=log)
    try:
        assert driver.wait(400) == 0, log.read_text()[-3000:]
    finally:
        driver.kill()
    (folder,) = lab.runs.glob("*-sweep-*")
    return log.read_text(), folder


@dataclass
class Sweep:
    """One study in a folder of its own, started as often as it takes."""

    lab: Lab
    uri: str
    storage: str
    trials: int
    driver: Fork | None = None
    kills: Counter[str] = field(default_factory=Counter)

    def overrides(self) -> list[str]:
        file = self.lab.folder / "killed.yaml"
        file.write_text(yaml.safe_dump({**SPACE, "trials": self.trials}))
        given = [f"sweep={file}", "workers=2", f"storage={self.storage}", EPOCHS]
        return [*given, "tracking.mode=online", f"tracking.uri={self.uri}"]

    def start(self) -> None:
        self.driver = self.lab.start("sweep", *self.overrides(), log=self.lab.folder / "driver.log")

    def code(self) -> int | None:
        assert self.driver is not None
        return self.driver.poll()

    def log(self) -> str:
        return (self.lab.folder / "driver.log").read_text()[-3000:]

    def workers_alive(self) -> list[int]:
        """Process ids of the workers that say who they are, and live."""
        from pipeline.launch import processes

        found = []
        for path in self.lab.runs.glob("*-sweep-*/launched/processes/*.json"):
            who = json.loads(path.read_text())
            if processes.lives(who):
                found.append(int(who["pid"]))
        return found

    def kill(self, draw: random.Random) -> None:
        """Kill -9 one of the processes; a driver is started again, by the same command."""
        assert self.driver is not None
        workers = self.workers_alive()
        if not workers and draw.random() < 0.8:
            return  # it is only starting
        if not workers or draw.random() < 0.3:
            self.driver.kill()
            self.kills["driver"] += 1
            self.start()
        elif draw.random() < 0.3:
            victim = draw.choice(workers)
            os.kill(victim, signal.SIGSTOP)
            threading.Timer(SPACE["grace_seconds"] + 5, _wake, [victim]).start()
            self.kills["worker back from the dead"] += 1
        else:
            os.kill(draw.choice(workers), signal.SIGKILL)
            self.kills["worker"] += 1

    # what is left ----------------------------------------------------------------------------------------------------

    def study(self) -> optuna.Study:
        return only_study(self.storage)

    def configurations(self) -> dict[int, Path]:
        """Folder of the finished run of each configuration, by the number of its first attempt."""
        found = {}
        for trial in self.study().trials:
            if trial.state == optuna.trial.TrialState.COMPLETE:
                found[int(trial.system_attrs.get("failed_trial", trial.number))] = Path(trial.user_attrs["folder"])
        return found


def only_study(storage: str) -> optuna.Study:
    """The one study of a database."""
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage)


def _wake(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def check(killed: Sweep, quiet: Sweep) -> dict[str, Any]:
    """Raises AssertionError naming what was lost; numbers for people."""
    trials = killed.study().trials
    states = Counter(trial.state.name for trial in trials)
    assert states["COMPLETE"] == killed.trials, states
    assert set(states) <= {"COMPLETE", "FAIL"}, states
    retried = {number for trial in trials for number in trial.system_attrs.get("retry_history", [])}
    assert {t.number for t in trials if t.state.name == "FAIL"} == retried, "every crash was retried"

    mlflow = client(killed.uri)
    experiments = [e.experiment_id for e in mlflow.search_experiments()]
    assert mlflow.search_runs(experiments, "attributes.status = 'RUNNING'") == [], "orphans"
    runs = mlflow.search_runs(experiments, "tags.`asib.trial` != ''")
    assert len(runs) == killed.trials, f"{len(runs)} runs for {killed.trials} configurations"

    ours = list(killed.configurations().values())
    by_parameters = {parameters(folder): folder for folder in quiet.configurations().values()}
    continued = 0
    for folder in ours:
        assert points(folder) == points(by_parameters[parameters(folder)]), folder
        resumed = [e.data["values"].get("asib.resumed_from", "") for e in journal(folder) if e.kind == "tags"]
        continued += any(value.startswith("epoch ") and not value.startswith("epoch 0, batch 0") for value in resumed)
        run = next(r for r in runs if r.info.run_id == json.loads((folder / "delivery.json").read_text())["run_id"])
        for name in ("student/acc", "a_step/loss"):
            there = [(p.step, p.value) for p in mlflow.get_metric_history(run.info.run_id, name)]
            here = [(step, v) for (key, step), values in points(folder).items() if key == name for v in values]
            assert sorted(there) == sorted(here), (folder, name)
    return {
        "kills": dict(killed.kills),
        "states": dict(states),
        "retries": len(retried),
        "continued in the middle": continued,
    }


def parameters(folder: Path) -> tuple[Any, ...]:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return config["method"]["kd_alpha"], config["method"]["tau"]


def run(folder: Path, template: Path, kills: int, trials: int) -> dict[str, Any]:
    """The whole experiment in `folder`; `template`: a migrated MLflow database."""
    draw = random.Random(0)
    sweeps = []
    for name in ("quiet", "killed"):
        lab = Lab(folder / name)
        database = lab.folder / "mlflow.db"
        database.write_bytes(template.read_bytes())
        sweeps.append(Sweep(lab, f"sqlite:///{database}", f"sqlite:///{lab.folder / 'studies.db'}", trials))
    quiet, killed = sweeps
    done = quiet.lab.step("sweep", *quiet.overrides())
    assert done.code == 0, done.err
    killed.start()
    deadline = time.monotonic() + 3600
    while killed.code() != 0:
        assert killed.code() in (None, 0), killed.log()
        assert time.monotonic() < deadline, killed.log()
        time.sleep(draw.uniform(0.5, 3))
        if sum(killed.kills.values()) < kills and killed.code() != 0:
            killed.kill(draw)
    return check(killed, quiet)
