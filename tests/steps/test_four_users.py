"""The steps on the team's server as its four kinds of users: administrator, trainer, promoter, reader.

The administrator's main job, sweep and promotion are in test_team_server.py. An unknown run is 404 for that user,
and 403 for everybody else.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.exceptions import MlflowException

from pipeline.data.sources import ImageData
from pipeline.distill import train
from tests.steps import desk as desks
from tests.steps import sweep_kills
from tests.steps.desk import LAX, Students, make_desk
from tests.steps.lab import BATCHES, Done, Lab, client, points, run_id, see, signal_at
from tests.team_server import ADMIN, PROMOTER, READER, SHARED, TRAINER, TeamServer, administration, log_in

pytestmark = [pytest.mark.postgres, pytest.mark.usefixtures("four_users")]
MODEL = "shared-student"


def online(team: TeamServer, experiment: str = SHARED) -> list[str]:
    return ["tracking.mode=online", f"tracking.uri={team.uri}", f"tracking.experiment={experiment}"]


def at_first_attempt(folder: Path) -> bool:
    """Whether delivery was refused nothing that it would have asked for again."""
    return "attempt" not in (folder / "delivery.log").read_text()


def runs(team: TeamServer) -> Mapping[str, tuple[Any, ...]]:
    """What the server has of each run in the shared experiment that a reader could have changed."""
    mlflow = client(team.uri)
    found = mlflow.search_runs([mlflow.get_experiment_by_name(SHARED).experiment_id])
    return {run.info.run_id: (run.info.status, run.data.tags, run.data.metrics) for run in found}


def test_a_trainers_main_job_arrives(
    ready_lab: Lab, undisturbed: Done, team: TeamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, *TRAINER)
    # the teachers were fine-tuned off line: their runs are known to this machine alone
    done = ready_lab.step("main", *online(team))
    assert (done.code, done.lines) == (0, []), done.err
    found = see(team.uri, run_id(done.folder))
    assert set(found.children) >= {"student_alone", "distill", "evaluate"}
    assert {run.status for run in (found, *found.children.values())} == {"FINISHED"}
    assert found.children["distill"].steady == points(undisturbed.folder)
    assert at_first_attempt(done.folder)


@pytest.mark.parametrize("user", [ADMIN, TRAINER], ids=lambda user: user[0])
def test_a_ladder_arrives(
    ready_lab: Lab, team: TeamServer, user: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, *user)
    done = ready_lab.step("ablate", "rungs=l0_baseline,l1_ib", "seeds=0", "force=true", *online(team))
    assert done.code == 0, done.err
    found = see(team.uri, run_id(done.folder))
    assert set(found.children) == {"l0_baseline seed 0", "l1_ib seed 0"}
    assert {run.status for run in (found, *found.children.values())} == {"FINISHED"}
    assert at_first_attempt(done.folder)


@pytest.mark.parametrize("user", [ADMIN, TRAINER], ids=lambda user: user[0])
def test_a_run_goes_on_from_the_server_alone(
    ready_lab: Lab, undisturbed: Done, team: TeamServer, user: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, *user)
    with monkeypatch.context() as patched:
        patched.setattr(train, "Loop", signal_at(BATCHES + 3).loop)
        stopped = ready_lab.step("distill", *online(team), "checkpoint.every_seconds=1e-6")
    assert stopped.code == 143, stopped.err
    name = run_id(stopped.folder)
    assert see(team.uri, name).status == "KILLED"
    shutil.rmtree(stopped.folder)
    unknown = ready_lab.step("distill", *online(team), "resume=" + 32 * "0")
    assert (unknown.code, len(unknown.lines), unknown.new) == (2, 1, []), unknown.err
    assert "knows no run" in unknown.lines[0]
    done = ready_lab.step("distill", *online(team), f"resume={name}")
    assert done.code == 0, done.err
    found = see(team.uri, name)
    assert (found.status, found.steady) == ("FINISHED", points(undisturbed.folder))
    assert {len(values) for values in found.metrics.values()} == {1}


def test_a_trainers_sweep_arrives_with_its_study_in_the_same_database_server(
    ready_lab: Lab, team: TeamServer, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, *TRAINER)
    said, folder = sweep_kills.four_trials(ready_lab, postgres_url, "workers=2", *online(team))
    found = see(team.uri, run_id(folder))
    assert {run.status for run in (found, *found.children.values())} == {"FINISHED"}
    assert set(found.children) >= {f"trial {n}" for n in range(4)}
    study = sweep_kills.only_study(postgres_url.replace("postgresql://", "postgresql+psycopg://"))
    for trial in study.trials:
        metrics = found.children[f"trial {trial.number}"].metrics
        assert [values for (name, _), values in metrics.items() if name == "final/val_acc"] == [[trial.value]]
    assert {"best.yaml", "config.yaml"} <= found.artifacts
    assert "4 trials" in said
    for text in (said, str(found)):
        assert TRAINER[1] not in text
        assert "s3cret" not in text


def test_who_may_promote_and_who_may_not(
    lab: Lab, task: ImageData, students: Students, team: TeamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desks, "NAME", MODEL)
    desk = make_desk(lab, team.uri, task, students, monkeypatch)
    desk.register("half", "good")
    users = administration(team)
    users.grant_user_permission(PROMOTER[0], "registered_model", MODEL, "EDIT")
    before = client(team.uri).get_registered_model(MODEL)
    for user, experiment in ((TRAINER, SHARED), (READER, "the reader's own")):
        with monkeypatch.context() as patched:
            log_in(patched, *user)
            refused = desk.promote(*LAX, f"tracking.experiment={experiment}")
        assert refused.code == 2, refused.err
        assert f"permission denied (403): ask for EDIT permission on the model {MODEL}" in refused.err
        after = client(team.uri).get_registered_model(MODEL)
        assert (after.tags, after.aliases) == (before.tags, before.aliases)
    # their own run is in an experiment of their own: of the trainers' they may only read
    log_in(monkeypatch, *PROMOTER)
    own = "tracking.experiment=promotions"
    for version in ("1", "2"):
        done = desk.promote(f"version={version}", *LAX, own)
        assert done.code == 0, done.err
        assert desk.aliases["champion"] == version
    assert desk.promote("rollback=true", own).code == 0
    assert desk.aliases["champion"] == "1"
    log_in(monkeypatch, *ADMIN)
    mlflow = client(team.uri)
    made = mlflow.search_runs([mlflow.get_experiment_by_name("promotions").experiment_id])
    assert [run.info.status for run in made] == 3 * ["FINISHED"]


@pytest.mark.parametrize("step", ["main", "ablate", "sweep", "resume", "promote"])
def test_a_reader_and_a_promoter_are_refused_and_leave_nothing(
    ready_lab: Lab, team: TeamServer, postgres_url: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {
        "main": [],
        "ablate": ["rungs=l0_baseline", "seeds=0"],
        "sweep": [f"sweep={ready_lab.folder / 'small.yaml'}"],
        "resume": [],
        "promote": [f"name={MODEL}", "version=2"],
    }[step]
    monkeypatch.setenv("ASIB_STORAGE", postgres_url)
    (ready_lab.folder / "small.yaml").write_text(yaml.safe_dump(sweep_kills.SPACE | {"trials": 1}))
    mlflow = client(team.uri)
    if step == "resume":
        shared = mlflow.get_experiment_by_name(SHARED).experiment_id
        stopped = mlflow.create_run(shared, tags={"asib.step": "distill"}).info.run_id
        mlflow.set_terminated(stopped, "KILLED")
        arguments = [f"resume={stopped}"]
    with contextlib.suppress(MlflowException):  # it is there
        mlflow.create_registered_model(MODEL)
    before = runs(team)
    for user in (READER, PROMOTER):
        with monkeypatch.context() as patched:
            log_in(patched, *user)
            done = ready_lab.step("distill" if step == "resume" else step, *online(team), *arguments)
        assert done.code == 2, done.err
        assert len(done.lines) == 1, done.err
        assert "permission denied (403): ask for EDIT permission on the " in done.lines[0]
        assert done.new == []
    assert runs(team) == before
