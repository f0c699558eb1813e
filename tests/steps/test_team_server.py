"""The steps against the server that a team shares: PostgreSQL, an object store, passwords, over HTTP."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data.sources import ImageData
from tests.steps.desk import LAX, NAME, Students, make_desk
from tests.steps.lab import Done, Lab, client, deliver, points, run_id, same_tensors, see
from tests.team_server import BUCKET, TeamServer, log_in

pytestmark = pytest.mark.postgres
SLOTS = {f"checkpoints/slot{k}.safetensors" for k in (0, 1)}
READER = ("reader", "may read, no more")
TRAINER, PROMOTER = "trainer of students", "promoter of students"


def online(uri: str, experiment: str) -> list[str]:
    return ["tracking.mode=online", f"tracking.uri={uri}", f"tracking.experiment={experiment}"]


@pytest.fixture
def reader(team: TeamServer) -> tuple[str, str]:
    """A user who may read the experiment `theirs`, as everybody may everything, and nothing else."""
    from mlflow.server import get_app_client

    mlflow = client(team.uri)
    theirs = mlflow.get_experiment_by_name("theirs")
    if theirs is None:  # else an earlier test has made both
        number = mlflow.create_experiment("theirs")
        users = get_app_client("basic-auth", tracking_uri=team.uri)
        users.create_user(*READER)
        users.grant_user_permission(READER[0], "experiment", number, "READ")
    return READER


def test_the_main_job_arrives_whole_over_http_with_a_password(
    lab: Lab, undisturbed: Done, team: TeamServer, sqlite_uri: str
) -> None:
    done = lab.step("main", *online(team.uri, "main job"))
    assert done.code == 0, done.err
    found = see(team.uri, run_id(done.folder))
    assert set(found.children) == {"student_alone", "teacher_0", "teacher_1", "distill", "evaluate"}
    assert {run.status for run in (found, *found.children.values())} == {"FINISHED"}
    distilled = found.children["distill"]
    assert distilled.steady == points(undisturbed.folder) == points(done.folder / "distill")
    assert {len(values) for run in found.children.values() for values in run.metrics.values()} == {1}

    # a journal delivered to SQLite leaves the same in MLflow
    deliver(sqlite_uri, done.folder)
    local = see(sqlite_uri, run_id(done.folder))
    for name, run in found.children.items():
        other = local.children[name]
        assert (run.params, run.datasets) == (other.params, other.datasets), name
        # the checkpoint before the last comes along where delivery was quick enough
        assert run.artifacts - SLOTS == other.artifacts - SLOTS, name

    # artifacts lie in the bucket, and come back through the server
    listed = team.bucket().get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    keys = {item["Key"] for page in listed for item in page.get("Contents", ())}
    assert any(key.endswith(f"{distilled.id}/artifacts/checkpoints/student.safetensors") for key in keys)
    path = client(team.uri).download_artifacts(distilled.id, "checkpoints/student.safetensors", str(lab.folder))
    assert same_tensors(Path(path), undisturbed.folder / "checkpoints/student.safetensors")


def test_who_may_not_is_told_so_before_training(
    ready_lab: Lab, team: TeamServer, reader: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [
        (team.uri, ("admin", "another password"), "wrong user name or password (401)", "MLFLOW_TRACKING_PASSWORD"),
        (team.uri, ("nobody", "a long password"), "wrong user name or password (401)", "MLFLOW_TRACKING_USERNAME"),
        (team.uri, ("", ""), "wrong user name or password (401)", "set MLFLOW_TRACKING_USERNAME"),
        (team.uri, reader, "permission denied (403)", "EDIT permission"),
        (team.other_host, None, "does not accept this host name (403)", "--allowed-hosts"),
    ]
    for uri, credentials, reason, advice in cases:
        with monkeypatch.context() as patched:
            if credentials is not None:
                log_in(patched, *credentials)
            done = ready_lab.step("distill", *online(uri, "theirs"), "checkpoint.every_seconds=1e-6")
        assert done.code == 2, (reason, done.err)
        (line,) = done.lines
        assert line.startswith(f"tracking server {uri}: "), line
        assert reason in line
        assert advice in line
        assert done.new == [], "nor does a refusal that only the making of the run brings leave anything here"
    mlflow = client(team.uri)
    theirs = mlflow.get_experiment_by_name("theirs")
    assert mlflow.search_runs([theirs.experiment_id]) == []


def test_a_reader_sees_what_others_have_made(
    ready_lab: Lab, team: TeamServer, reader: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ready_lab.step("distill", *online(team.uri, "readable"))
    assert made.code == 0, made.err
    log_in(monkeypatch, *reader)
    found = see(team.uri, run_id(made.folder))
    assert found.steady == points(made.folder)
    assert "config.yaml" in found.artifacts


def test_a_promotion_is_for_those_who_may(
    lab: Lab, task: ImageData, students: Students, team: TeamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As deploy/README.md grants it: who trains makes candidates, who promotes takes them over."""
    from mlflow.server import get_app_client

    desk = make_desk(lab, team.uri, task, students, monkeypatch)
    desk.register("half", "good")
    first = desk.promote("version=1")
    assert first.code == 0, first.err
    mlflow, users = client(team.uri), get_app_client("basic-auth", tracking_uri=team.uri)
    asib, students_of = (mlflow.get_run(run).info.experiment_id for run in (run_id(first.folder), desk.runs[0]))
    mlflow.create_registered_model("candidates")
    people = {TRAINER: "may train, not promote", PROMOTER: "promotes, and owns nothing"}
    for name, password in people.items():
        users.create_user(name, password)
        users.grant_user_permission(name, "experiment", asib, "EDIT")
        users.grant_user_permission(name, "experiment", students_of, "READ")
    for name, model, permission in (
        (TRAINER, NAME, "READ"),
        (TRAINER, "candidates", "EDIT"),
        (PROMOTER, NAME, "EDIT"),
        (PROMOTER, "candidates", "READ"),
    ):
        users.grant_user_permission(name, "registered_model", model, permission)

    with monkeypatch.context() as patched:
        log_in(patched, TRAINER, people[TRAINER])
        client(team.uri).create_run(asib, tags={"asib.promote": NAME, "asib.promote_seen": "99999999999999"})
        refused = desk.promote(*LAX)
        trial = desk.promote("dry_run=true", *LAX)
        client(team.uri).copy_model_version(f"models:/{NAME}/2", "candidates")
    assert (refused.code, refused.new, "evaluating" in refused.err) == (2, [], False), refused.err
    # among what delivery, here in this process, writes into its own log
    (line,) = (line for line in refused.lines if line.startswith("tracking server"))
    assert line.endswith(f"permission denied (403): ask for EDIT permission on the model {NAME}")
    assert desk.aliases == {"challenger": "2", "champion": "1"}
    assert (trial.code, "would be promoted" in trial.out, "is not counted" in trial.err) == (0, True, True), trial.err

    with monkeypatch.context() as patched:
        log_in(patched, PROMOTER, people[PROMOTER])
        taken = client(team.uri).copy_model_version("models:/candidates/1", NAME)
        done = desk.promote(f"version={taken.version}", *LAX)
        assert done.code == 0, done.err
        assert "look 1 at these" in done.out
        assert desk.aliases == {"challenger": "2", "champion": "3", "previous": "1"}
        for answer in (0, 2):  # the first champion is the last to go back to; its alias previous cannot be deleted
            assert desk.promote("rollback=true").code == answer
            assert desk.aliases == {"challenger": "2", "champion": "1", "previous": "1"}
        assert desk.promote("retire=3").code == 0
    history = desk.tags(3)["asib.history"]
    assert ("promoted over version 1" in history, "rolled back" in history) == (True, True), history
    tags = mlflow.get_registered_model(NAME).tags
    assert not {tag for tag in tags if tag.startswith(("asib.turn", "asib.move"))}, tags
