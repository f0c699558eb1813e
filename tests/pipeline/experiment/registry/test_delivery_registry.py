"""Versions are made once, aliases are moved whole, and promotions form a queue: on a real store."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlflow")

from mlflow.tracking import MlflowClient

from pipeline.errors import UserError
from pipeline.experiment.delivery import registry as dr
from pipeline.experiment.delivery.loop import DeliveryLoop
from pipeline.experiment.registry import queue
from pipeline.experiment.registry.remote import Registry
from pipeline.experiment.tracking import deliver
from tests.pipeline.experiment.registry.local import Broken, Fragile, LocalDelivery, record, registered

pytest_plugins = ["tests.servers"]
NAME = "birds and trees"
TAGS = {"asib.data_digest": "d" * 64, "asib.val_acc": "71.50"}


def versions(client: MlflowClient) -> list[Any]:
    return sorted(client.search_model_versions(f"name = '{NAME}'"), key=lambda v: int(v.version))


def aliases(client: MlflowClient) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model(NAME).aliases.items()}


# versions ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "server"])
def store(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return str(request.getfixturevalue("sqlite_uri"))
    return str(request.getfixturevalue("mlflow_server").uri)


def test_a_student_becomes_a_version_once(store: str, tmp_path: Path) -> None:
    run = registered(tmp_path / "one", store, NAME, {"student.safetensors": b"weights"}, TAGS)
    client = MlflowClient(store)
    (version,) = versions(client)
    assert version.run_id == run
    (output,) = client.get_run(run).outputs.model_outputs
    assert version.source == f"models:/{output.model_id}"
    assert {key: version.tags[key] for key in TAGS} == TAGS
    assert aliases(client) == {"challenger": str(version.version)}
    assert '"birds and trees"' in client.get_logged_model(output.model_id).tags["mlflow.modelVersions"]
    fetched = LocalDelivery(None, store).fetch(f"models:/{NAME}/{version.version}", tmp_path / "fetched")
    assert (fetched / "student.safetensors").read_bytes() == b"weights"

    second = registered(tmp_path / "two", store, NAME, {"student.safetensors": b"other"}, {})
    newest = versions(client)[-1]
    assert newest.run_id == second
    # the first once more, as a delivery that has lost its memory sends it: no third version, and the alias stays
    shutil.copytree(tmp_path / "one", tmp_path / "again")
    (tmp_path / "again" / "delivery.json").unlink()
    deliver([tmp_path / "again"], store)
    assert len(versions(client)) == 2
    assert aliases(client) == {"challenger": str(newest.version)}


@pytest.mark.parametrize("after", [False, True])
def test_registering_survives_a_crash_at_every_step(sqlite_uri: str, tmp_path: Path, after: bool) -> None:
    steps = 0
    for step in range(1, 100):
        folder = tmp_path / f"run {step}"
        record(folder, NAME, {"student.safetensors": b"weights"}, TAGS)
        fragile = Fragile(MlflowClient(sqlite_uri), step, after)
        with DeliveryLoop(folder, sqlite_uri) as loop:
            loop.client = loop.top.client = fragile
            try:
                loop.run_once(final=True)
                break
            except Broken:
                steps += 1
        assert deliver([folder], sqlite_uri)[0].refused == 0
        client = MlflowClient(sqlite_uri)
        found = versions(client)
        assert len(found) == step
        assert aliases(client) == {"challenger": str(step)}
        assert {key: found[-1].tags[key] for key in TAGS} == TAGS
        model = client.get_logged_model(found[-1].source.removeprefix("models:/"))
        assert model.tags["mlflow.modelVersions"].count("version") == 1
    assert steps >= 8


def test_a_model_that_was_refused_is_not_registered(sqlite_uri: str, tmp_path: Path) -> None:
    from pipeline.journal import Journal

    journal = Journal.create(tmp_path / "run", experiment="e")
    journal.register(NAME, model="student", alias="challenger")
    journal.metrics({"after": 1.0}, 0)
    journal.end("FINISHED", "completed", 0)
    (done,) = deliver([tmp_path / "run"], sqlite_uri)
    assert done.refused == 1
    assert MlflowClient(sqlite_uri).get_run(done.run_id).data.metrics["after"] == 1.0
    assert versions(MlflowClient(sqlite_uri)) == []


# aliases -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(sqlite_uri: str) -> MlflowClient:
    """A registered model with three versions; the first is champion."""
    from pipeline.experiment.delivery import server

    made = server.connect(sqlite_uri)
    made.create_registered_model(NAME)
    for number in range(3):
        made.create_model_version(NAME, f"file:///nowhere/{number}")
    made.set_registered_model_alias(NAME, "champion", "1")
    return made


PLAN: dict[str, Any] = {
    "before": {"champion": "1", "previous": None},
    "after": {"champion": "2", "previous": "1"},
    "past": ["1"],
    "tags": {"2": {"asib.verdict": "promoted"}, "1": {"asib.history": "replaced"}},
    "run": "r" * 32,
    "why": "version 2 promoted",
}
BACK = PLAN | {
    "before": PLAN["after"],
    "after": {"champion": "1", "previous": None},
    "past": [],
    "tags": {"2": {"x": "y"}},
}


def state(client: MlflowClient) -> Any:
    model = client.get_registered_model(NAME)
    tags = [{**client.get_model_version(NAME, n).tags} for n in "123"]
    return aliases(client), dict(model.tags), tags


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("plan", "undo"), [(PLAN, BACK), (BACK, PLAN)], ids=["promotion", "rollback"])
def test_a_move_that_breaks_off_anywhere_is_finished_by_the_next_call(
    client: MlflowClient, plan: dict[str, Any], undo: dict[str, Any], after: bool
) -> None:
    dr.move(client, NAME, PLAN)
    assert state(client) == (
        {"champion": "2", "previous": "1"},
        {"asib.champions": '["1"]'},
        [{"asib.history": "replaced"}, {"asib.verdict": "promoted"}, {}],
    )
    dr.move(client, NAME, BACK)
    assert state(client)[:2] == ({"champion": "1"}, {"asib.champions": "[]"})
    start, goal = ({alias: version for alias, version in plan[when].items() if version} for when in ("before", "after"))
    broken = 0
    for step in range(1, 30):
        if aliases(client) != start:
            dr.move(client, NAME, undo)
        try:
            dr.move(Fragile(client, step, after), NAME, plan)
            break
        except Broken:
            broken += 1
        assert aliases(client)["champion"] in ("1", "2"), "never without a champion"
        repaired = dr.repair(client, NAME)
        if repaired is None:  # it had not begun, or lacked nothing but the last answer
            assert aliases(client) in (start, goal)
            assert broken == 1 or aliases(client) == goal
        else:
            assert repaired == plan
            assert aliases(client) == goal
        assert dr.repair(client, NAME) is None
        assert "asib.move" not in client.get_registered_model(NAME).tags
    assert broken >= 5
    assert aliases(client) == goal


def test_a_champion_set_by_hand_is_left_alone(client: MlflowClient) -> None:
    with pytest.raises(UserError, match="somebody else has moved it"):
        dr.move(client, NAME, BACK)
    with pytest.raises(Broken):
        dr.move(Fragile(client, 2), NAME, PLAN)
    client.set_registered_model_alias(NAME, "champion", "3")
    assert dr.repair(client, NAME) is None
    assert state(client)[:2] == ({"champion": "3"}, {})


def test_what_is_not_there_is_said_in_one_line(client: MlflowClient, sqlite_uri: str) -> None:
    registry = Registry(LocalDelivery(None, sqlite_uri), "birds and treees")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="did you mean birds and trees") as refused:
        registry.overview()
    assert "\n" not in str(refused.value)
    registry.name = NAME
    with pytest.raises(UserError, match="version=7: birds and trees has no such version; it has 1, 2, 3"):
        registry.version("7")


# the queue -----------------------------------------------------------------------------------------------------------


def promotion(client: MlflowClient, started: int) -> str:
    return str(client.create_run("0", start_time=started, tags={"mlflow.user": f"user {started}"}).info.run_id)


def test_the_oldest_promotion_has_its_turn_and_the_others_are_told(
    client: MlflowClient, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(LocalDelivery(None, sqlite_uri), NAME)  # type: ignore[arg-type]
    first, second, third = (promotion(client, k) for k in (1, 2, 3))
    with queue.turn(registry, first):
        registry.enter(third)  # it has looked, and is about to give way
        queue.still_ours(registry, first)
        with (
            pytest.raises(UserError, match=f"another promotion of {NAME} is under way, run {first} by user 1"),
            queue.turn(registry, second),
        ):
            pass
    for run in (first, third):
        client.set_terminated(run, "FINISHED")
    with queue.turn(registry, second):
        pass
    other = Registry(LocalDelivery(None, sqlite_uri), "another model")  # type: ignore[arg-type]
    with queue.turn(other, promotion(client, 4)):
        pass


def test_a_younger_one_that_looked_too_early_is_waited_for(
    client: MlflowClient, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had looked before the older one joined, and goes on: both at once is what must not be."""
    registry = Registry(LocalDelivery(None, sqlite_uri), NAME)  # type: ignore[arg-type]
    old, young = promotion(client, 1), promotion(client, 2)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        queue.still_ours(registry, young)
        if len(waits) == 3:
            client.set_terminated(young, "FINISHED")

    with queue.turn(registry, young):
        monkeypatch.setattr(queue.time, "sleep", sleep)
        with queue.turn(registry, old):
            assert len(waits) == 3


def test_a_promotion_whose_machine_is_gone_blocks_nobody(
    client: MlflowClient, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(LocalDelivery(None, sqlite_uri), NAME)  # type: ignore[arg-type]
    dead, slow, mine = (promotion(client, k) for k in (1, 2, 3))
    for run in (dead, slow):
        client.set_tag(run, dr.QUEUE, NAME)
        client.set_tag(run, dr.SEEN, "1000")
    registry.enter(mine)

    def watch(seconds: float) -> None:
        registry.enter(slow)

    assert [other.run_id for other in queue.living(registry, mine, watch)] == [slow, mine]
    ended = client.get_run(dead)
    assert (ended.info.status, ended.data.tags["asib.outcome"]) == ("KILLED", "killed")
    with pytest.raises(UserError, match="taken for dead"):
        queue.still_ours(registry, dead)
