"""A part of the team's server goes away in the middle of a run: training goes on, and nothing is lost or doubled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.servers import Wire
from tests.steps.lab import (
    BATCHES,
    FUSION,
    STUDENT,
    At,
    Done,
    Lab,
    Seen,
    client,
    deliver,
    journal,
    points,
    refused,
    run_id,
    same_tensors,
    see,
    until,
)
from tests.team_server import TeamServer
from tests.warm import Fork

pytestmark = pytest.mark.postgres
CHECKPOINTS = {f"checkpoints/{name}" for name in ("manifest.json", "slot0.safetensors", "slot1.safetensors")}
"""Of these the server has the newest and perhaps the one before."""
PARTS: dict[str, tuple[Callable[[TeamServer], None], Callable[[TeamServer], None]]] = {
    "server": (TeamServer.stop, TeamServer.start),
    "database": (lambda team: team.postgres.stop(), lambda team: team.postgres.start()),
    "artifact store": (lambda team: team.door.cut(), lambda team: team.door.mend()),
}

ATTEMPT = "asib.delivery attempt "
NOTICED = {
    "server": ATTEMPT,
    # and not that the password, which it cannot look up, is wrong
    "database": "is out of order (error 503)",
    "artifact store": ATTEMPT,
}
"""What delivery has met before the part comes back."""


def online(team: TeamServer, experiment: str, **more: object) -> list[str]:
    settings = {"mode": "online", "uri": team.uri, "experiment": experiment} | more
    return [*(f"tracking.{key}={value}" for key, value in settings.items()), "checkpoint.every_seconds=1e-6"]


def trained(folder: Path) -> list[int]:
    """When the student's accuracies were measured, in ms since 1970."""
    return [e.time for e in journal(folder) if e.kind == "metrics" and "student/acc" in e.data["values"]]


def delivery_log(folder: Path) -> str:
    """What delivery says of its attempts."""
    return (folder / "delivery.log").read_text()


def whole(team: TeamServer, folder: Path, undisturbed: Done, tmp_path: Path, sqlite_uri: str) -> Seen:
    """Assert that the server holds what an undisturbed run leaves, value by value and file by file."""
    found = see(team.uri, run_id(folder))  # asserts that no nested run came twice
    assert (found.status, found.tags["asib.outcome"]) == ("FINISHED", "completed")
    assert found.steady == points(undisturbed.folder) == points(folder)
    assert {len(values) for values in found.metrics.values()} == {1}

    deliver(sqlite_uri, undisturbed.folder)
    expected = see(sqlite_uri, run_id(undisturbed.folder))
    assert found.artifacts - CHECKPOINTS == expected.artifacts - CHECKPOINTS
    assert found.datasets == expected.datasets
    assert found.params.keys() == expected.params.keys()
    mlflow = client(team.uri)
    for name in (STUDENT, FUSION):
        path = mlflow.download_artifacts(found.id, name, str(tmp_path))
        assert same_tensors(Path(path), undisturbed.folder / name)
    experiment = mlflow.get_run(found.id).info.experiment_id
    assert len(mlflow.search_runs([experiment])) == 1 + len(found.children)
    return found


@pytest.mark.parametrize("part", PARTS)
def test_what_comes_back_while_the_run_lives_is_brought_up_to_date(
    ready_lab: Lab, undisturbed: Done, team: TeamServer, sqlite_uri: str, tmp_path: Path, part: str
) -> None:
    stop, start = PARTS[part]
    back: list[float] = []

    def repair() -> None:
        try:
            until(lambda: list(ready_lab.runs.glob("*/results.json")))  # training has ended
            until(lambda: NOTICED[part] in delivery_log(ready_lab.run_folders()[0]))
            back.append(1000 * time.time())
        finally:
            start(team)

    repairing = threading.Thread(target=repair)

    def break_it() -> None:
        stop(team)
        repairing.start()

    in_the_first_b_epoch = At(BATCHES + 3, break_it)
    done = ready_lab.disturbed(in_the_first_b_epoch, "distill", *online(team, f"outage of the {part}"))
    repairing.join()
    assert (done.code, done.lines) == (0, []), done.err
    assert max(trained(done.folder)) < back[0], "training went on while it was away"
    whole(team, done.folder, undisturbed, tmp_path, sqlite_uri)


def test_what_stays_away_to_the_end_is_delivered_later(
    lab: Lab, undisturbed: Done, team: TeamServer, sqlite_uri: str, tmp_path: Path, deliveries: list[Fork]
) -> None:
    """Everything is out of reach, from the first teacher's fine-tuning on."""
    front = Wire(team.port)

    def break_it() -> None:
        front.cut()
        team.door.cut()
        team.postgres.stop()

    try:
        done = lab.disturbed(
            At(2, break_it), "distill", *online(team, "outage of all", uri=front.uri, finish_seconds=1)
        )
    finally:
        team.postgres.start()
        team.door.mend()
        front.mend()
    assert done.code == 0, done.err
    assert "python -m steps.deliver" in done.lines[-1]
    for delivery in deliveries:  # it goes on trying as long as its trainer, this process, lives
        delivery.kill()
    deliver(front.uri, done.folder)
    found = whole(team, done.folder, undisturbed, tmp_path, sqlite_uri)
    for name in ("teacher_0", "teacher_1"):
        assert found.children[name].steady == points(undisturbed.folder / name)
    deliver(front.uri, done.folder)
    assert see(team.uri, found.id) == found, "delivered once more it stays as it is"
    front.cut()


def test_a_database_that_restarts_again_and_again(
    ready_lab: Lab, undisturbed: Done, team: TeamServer, sqlite_uri: str, tmp_path: Path
) -> None:
    """Delivery has moments in between, and its connections break wherever they are."""
    ended = threading.Event()

    def met(times: int) -> bool:
        return ended.is_set() or delivery_log(ready_lab.run_folders()[0]).count(ATTEMPT) >= times

    def restart() -> None:
        for times in range(1, 5):
            team.postgres.stop()
            try:
                until(partial(met, times))
            finally:
                team.postgres.start()
            if ended.wait(0.5):
                return

    restarting = threading.Thread(target=restart)
    try:
        done = ready_lab.disturbed(At(1, restarting.start), "distill", *online(team, "restarts"))
    finally:
        ended.set()
        restarting.join()
    assert (done.code, done.lines) == (0, []), done.err
    assert ATTEMPT in delivery_log(done.folder)
    whole(team, done.folder, undisturbed, tmp_path, sqlite_uri)


def test_a_database_that_is_away_at_the_start_is_said_before_training(ready_lab: Lab, team: TeamServer) -> None:
    team.postgres.stop()
    try:
        done = ready_lab.step("distill", *online(team, "never"))
    finally:
        team.postgres.start()
    assert (
        refused(done) == f"tracking server {team.uri} is out of order (error 503): see its log, or use tracking=offline"
    )
    assert done.new == []
