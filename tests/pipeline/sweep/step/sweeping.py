"""A sweep on data of seconds, its workers in this process: what tests of the whole step are made with."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import yaml

from pipeline.runs.signals import Stop
from tests.steps.lab import Done, Lab
from tests.steps.sweep_kills import only_study

SHORT = ("method.num_stages=1", "method.student_epochs_per_stage=[1]")  # half a trial, where its length does not matter
SPACE = {
    "method.kd_alpha": {"type": "float", "low": 0.1, "high": 0.9},
    "method.tau": {"type": "float", "low": 1, "high": 8},
}


class WorkerStop(Stop):
    """The signal that the worker has got: `last`. One that only raises Interrupted has got none."""

    last: Stop

    def __init__(self) -> None:
        super().__init__()
        WorkerStop.last = self


class InProcess:
    """Stands where workers are launched: the worker's life goes on in this process, to its end."""

    def __init__(self, *_: Any) -> None:
        self.codes: list[int] = []

    def check(self) -> None: ...

    def alive(self) -> int:
        return 0

    def stop(self) -> None: ...

    def start(self, work: Callable[..., int], count: int, **arguments: Any) -> None:
        """The worker handles signals meanwhile; one that it left for is also the driver's, as from a terminal."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self.codes += [work(index=0, **arguments)]
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if WorkerStop.last.signum:
            os.kill(os.getpid(), signal.SIGTERM)


def space(lab: Lab, **changes: Any) -> str:
    """`sweep=…` of a small study."""
    content: dict[str, Any] = {
        "space": SPACE,
        "sampler": {"name": "random", "seed": 3},
        "pruner": {"name": "none"},
        "trials": 3,
        "heartbeat_seconds": 1,
        "grace_seconds": 3,
    }
    path = lab.folder / "small.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return f"sweep={path}"


def study(lab: Lab) -> optuna.Study:
    return only_study(f"sqlite:///{lab.runs / 'studies.db'}")


def states(lab: Lab) -> list[str]:
    return [trial.state.name for trial in study(lab).trials]


def parent(lab: Lab) -> Path:
    (folder,) = lab.runs.glob("*-sweep-*")
    return folder


def trials(lab: Lab) -> list[Path]:
    return sorted(parent(lab).glob("trials/*"))


def swept(lab: Lab, *overrides: str, **changes: Any) -> Done:
    done = lab.step("sweep", space(lab, **changes), *overrides)
    assert done.code == 0, done.err
    return done
