"""What a sweep refuses, and what it says, before anything trains."""

from __future__ import annotations

from typing import Any

import optuna
import pytest

from pipeline.runs.run import Run
from pipeline.sweep import driver as sweep
from pipeline.sweep.request import Plan
from tests.pipeline.sweep.step.sweeping import space
from tests.steps.lab import Lab

LAUNCHER = Plan.launcher


@pytest.fixture
def stopped_before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may train."""

    def never(*_: Any) -> Any:
        raise AssertionError("it was to be refused")

    monkeypatch.setattr(sweep, "sweep", never)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["workers=0"], "workers=0"),
        (["trials=0"], "trials=0"),
        (["seeds=0"], "seeds=0"),
        (["seeds=3", "sweep.pruner=median"], "sweep.pruner.name=median with seeds=3"),
        (["method.tau=2"], "method.tau"),
        (["storage=postgresql://nobody:secret@127.0.0.1:1/none"], "127.0.0.1"),
        (["cluster=slrum"], "slurm"),
        (["join=none-such"], "studies.db"),
    ],
)
@pytest.mark.usefixtures("stopped_before_torch")
def test_bad_input_is_one_line(lab: Lab, arguments: list[str], said: str) -> None:
    done = lab.step("sweep", space(lab), *arguments)
    assert done.code == 2, done.err
    (line,) = done.lines
    assert said in line
    assert "secret" not in done.err
    assert not list(lab.runs.glob("*-sweep-*"))


def test_what_this_machine_lacks_is_said_before_any_trial(lab: Lab) -> None:
    done = lab.step("sweep", space(lab), "device=cpu", "optim.compile=graphs")
    assert done.code != 0
    assert "optim.compile=graphs" in done.lines[-1]
    assert done.new == []
    assert not optuna.get_all_study_names(f"sqlite:///{lab.runs / 'studies.db'}"), "no study either"


def test_a_dry_run_shows_the_jobs_and_leaves_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRY_RUN", "1")
    monkeypatch.setattr(Plan, "launcher", LAUNCHER)
    done = lab.step("sweep", space(lab), "workers=2", "cluster=slurm", "storage=postgresql://me:se/cret@nowhere:1/x")
    assert (done.code, done.new) == (0, []), done.err
    assert "val_fraction" in done.out
    assert "3 trials, 2 at a time" in done.out
    assert "#SBATCH" in done.out
    assert "cret" not in done.out
    assert not list(lab.runs.glob("*.db")), "not even the study's database"


@pytest.mark.usefixtures("stopped_before_torch")
def test_a_second_sweep_of_a_study_is_told_to_join(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def began(run: Run, plan: Any) -> None:
        run.journal.tags({"asib.study": plan.name})
        run.ready()
        again = lab.step("sweep", space(lab))
        assert again.code == 2
        (line,) = again.lines
        assert "join=small-" in line
        assert str(run.folder) in line

    monkeypatch.setattr(sweep, "sweep", began)
    done = lab.step("sweep", space(lab))
    assert done.code == 0, done.err
    assert len(list(lab.runs.glob("*-sweep-*"))) == 1
