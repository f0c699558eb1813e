"""Promotions take turns: tags of the model, which only who may promote can write, on a real store."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from pipeline.errors import UserError
from pipeline.journal import Journal
from pipeline.promote import queue
from pipeline.promote.registered_model import Registry
from pipeline.tracking import server, turns
from pipeline.tracking.follow import DeliveryLoop
from tests.pipeline.promote.local import LocalDelivery

NAME = "birds and trees"


@pytest.fixture
def client(sqlite_uri: str) -> MlflowClient:
    made = server.connect(sqlite_uri)
    made.create_registered_model(NAME)
    return made


@pytest.fixture
def registry(client: MlflowClient, sqlite_uri: str) -> Registry:
    return Registry(LocalDelivery(None, sqlite_uri, client), NAME)


def promotion(client: MlflowClient, tags: dict[str, str] | None = None) -> str:
    return str(client.create_run("0", tags=tags or {}).info.run_id)


def join(client: MlflowClient, run: str, joined: int, seen: int | None = None, user: str = "ada") -> None:
    """As another machine joined, by its own clock."""
    value = {"joined": joined, "seen": turns.now_ms() if seen is None else seen, "user": user}
    client.set_registered_model_tag(NAME, f"asib.turn.{run}", json.dumps(value))


def entries(client: MlflowClient) -> set[str]:
    return {t.removeprefix("asib.turn.") for t in client.get_registered_model(NAME).tags if t.startswith("asib.turn.")}


def test_the_oldest_promotion_has_its_turn_and_the_others_are_told(client: MlflowClient, registry: Registry) -> None:
    first, second, third = (promotion(client) for _ in range(3))
    with queue.turn(registry, first, "ada"):
        time.sleep(0.1)  # the order is that of the clock, which may be set back a little between two promotions
        registry.ask("join", run_id=third)  # it has looked, and is about to give way
        queue.still_ours(registry, first)
        told = f"another promotion of {NAME} is under way, run {first} by ada"
        with pytest.raises(UserError, match=told):
            queue.refuse_if_busy(registry)
        with pytest.raises(UserError, match=told), queue.turn(registry, second):
            pass
    assert entries(client) == {third}
    registry.ask("leave", run_id=third)
    with queue.turn(registry, second):
        assert entries(client) == {second}
    assert entries(client) == set()


def test_a_younger_one_that_looked_too_early_is_waited_for(
    client: MlflowClient, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had looked before the older one joined, and goes on: both at once is what must not be."""
    old, young = promotion(client), promotion(client)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        queue.still_ours(registry, young)
        if len(waits) == 3:
            registry.ask("leave", run_id=young)

    with queue.turn(registry, young):
        monkeypatch.setattr(queue.time, "sleep", sleep)
        monkeypatch.setattr(turns, "now_ms", lambda: 1)  # of a machine whose clock is far behind
        join(client, young, 2, seen=1)
        with queue.turn(registry, old):
            assert len(waits) == 3


@pytest.mark.parametrize("seen", [1000, 99_999_999_999_999], ids=["behind", "ahead"])
def test_a_promotion_whose_machine_is_gone_blocks_nobody(client: MlflowClient, registry: Registry, seen: int) -> None:
    """Whatever its clock said. Whoever goes on saying that it lives is waited for; only promotions are ended."""
    dead, slow, mine = (promotion(client, {"asib.promote": NAME}) for _ in range(3))
    victim = promotion(client)  # a training that somebody has put into the queue
    for place, run in enumerate((dead, slow, victim)):
        join(client, run, place, seen)
    registry.ask("join", run_id=mine)

    def watch(seconds: float) -> None:
        assert 20 < seconds < 60
        registry.ask("beat", run_id=slow)

    assert [other.run_id for other in queue.living(registry, mine, watch)] == [slow, mine]
    assert [client.get_run(run).info.status for run in (dead, slow, victim)] == ["KILLED", "RUNNING", "RUNNING"]
    assert client.get_run(dead).data.tags["asib.outcome"] == "killed"
    with pytest.raises(UserError, match="taken for dead"):
        queue.still_ours(registry, dead)
    with pytest.raises(UserError, match="taken for dead"):
        registry.ask("beat", run_id=dead)
    assert entries(client) == {slow, mine}, "a beat does not bring back who was taken for dead"


def test_what_anybody_may_log_is_no_place_in_the_queue(client: MlflowClient, registry: Registry) -> None:
    """A run may be logged, anywhere, by who may not write the model's tags."""
    for seen in ("99999999999999", "abc"):
        promotion(client, {"asib.promote": NAME, "asib.promote_seen": seen})
    mine = promotion(client)
    with queue.turn(registry, mine):
        assert [other.run_id for other in registry.queue()] == [mine]


QUOTED, INFINITE = '{"joined": "1", "seen": 2, "user": ""}', '{"joined": 1e400, "seen": 2}'
GARBAGE = ["abc", "", "[1]", "null", QUOTED, INFINITE, "[" * 4000]


def test_garbage_in_the_queue_is_one_line_and_goes(
    client: MlflowClient, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, value in enumerate(GARBAGE):
        client.set_registered_model_tag(NAME, f"asib.turn.{number:032x}", value)
    client.set_registered_model_tag(NAME, "asib.turn.me", '{"joined": 1, "seen": 2, "user": "x"}')
    mine = promotion(client)
    said: list[str] = []
    monkeypatch.setattr(registry, "warn", said.extend)
    with queue.turn(registry, mine):
        assert entries(client) == {mine}
    assert len(said) == len(GARBAGE) + 1
    assert all(line.startswith("tag asib.turn.") and "\n" not in line and len(line) < 250 for line in said)


def test_a_killed_promotion_is_out_of_the_queue_when_delivery_ends_its_run(
    client: MlflowClient, sqlite_uri: str, tmp_path: Any
) -> None:
    journal = Journal.create(tmp_path / "run", experiment="e", tags={"asib.promote": NAME})
    with DeliveryLoop(tmp_path / "run", sqlite_uri, client=client) as loop:
        loop.run_once()
        run = loop.top.state.run_id
        turns.join(client, NAME, run)
        journal.close()  # the trainer is dead
        assert entries(client) == {run}
        loop.close_unfinished()
    assert (client.get_run(run).info.status, entries(client)) == ("KILLED", set())
