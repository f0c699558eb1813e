"""kill -9 of the delivery process: it is started again, and nothing is lost or doubled."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pipeline.errors import HelperFailed
from pipeline.journal import FILE, Journal
from pipeline.runs.ending import ending_of
from pipeline.runs.folders import size_of
from pipeline.tracking import deliver, start
from pipeline.tracking.faults import lasting
from pipeline.tracking.follow import DeliveryLoop
from pipeline.tracking.pipe import STARTS, Delivery
from pipeline.tracking.process import answer_to
from pipeline.tracking.server import prepare_sqlite
from tests.servers import steps

ROUNDS = int(os.environ.get("ASIB_ROUNDS", "2"))


def kill(delivery: Delivery) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(delivery._process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_delivery_that_is_killed_at_any_moment_goes_on(sqlite_uri: str, tmp_path: Path) -> None:
    rng, folder = random.Random(10), tmp_path / "run"
    began = time.monotonic()
    delivery = start.start_delivery(folder, uri=sqlite_uri)
    kill(delivery)  # before it has said a word
    journal = Journal.create(folder, experiment="killed", name="n")
    child = Journal.create(folder / "child", experiment="killed", name="child", parent=folder)
    journal.child(child.folder)
    ready = delivery.wait_ready()
    start_s, epochs = (time.monotonic() - began) / 2, 0
    for number in range(ROUNDS):
        if number % 2:  # while it starts, or begins to work
            time.sleep(rng.uniform(0, start_s))
        else:
            while delivery._fruitless:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1.0))
        for _ in range(5):
            journal.metrics({"student/acc": float(epochs)}, step=epochs)
            child.metrics({"student/acc": float(epochs)}, step=epochs)
            epochs += 1
        (folder / f"{number}.txt").write_text(str(number))
        journal.artifact(folder / f"{number}.txt")
        asked: list[object] = []
        asking = threading.Thread(target=lambda: asked.append(delivery.run_info(ready.run_id)["id"]))  # noqa: B023
        asking.start()
        time.sleep(rng.uniform(0, 0.2))
        kill(delivery)
        asking.join(120)
        assert asked == [ready.run_id], "what was asked for is answered by the next process"
    child.end("FINISHED", "completed", 0)
    journal.end("FINISHED", "completed", 0)
    threading.Timer(0.2, kill, [delivery]).start()
    assert delivery.finish(120.0)
    client = MlflowClient(sqlite_uri)
    runs = client.search_runs([ready.experiment_id])
    assert len(runs) == 2
    for run in runs:
        assert steps(client, run.info.run_id) == list(range(epochs))
        assert run.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(ready.run_id)} == {f"{n}.txt" for n in range(ROUNDS)}


def test_one_that_always_dies_is_given_up_and_is_not_bad_input(
    sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tracking.pipe.PAUSE_S", 0.05)
    monkeypatch.setattr("pipeline.tracking.pipe.FRUITLESS_S", 0.5)
    delivery = start.start_delivery(tmp_path / "run", uri=sqlite_uri)
    Journal.create(tmp_path / "run", experiment="e").close()
    killed, given_up = set(), threading.Event()

    def reaper() -> None:
        while not given_up.is_set():
            if delivery._process.poll() is None:
                killed.add(delivery._process.pid)
                kill(delivery)
            time.sleep(0.01)

    threading.Thread(target=reaper, daemon=True).start()
    try:
        with pytest.raises(HelperFailed, match=r"killed by signal 9: see .*delivery\.log") as caught:
            delivery.wait_ready(20.0)
    finally:
        given_up.set()
    assert "\n" not in str(caught.value)
    assert ending_of(caught.value)[1:3] == ("failed", 1)
    assert 3 <= len(killed) <= STARTS
    assert not delivery.finish(1.0)


@pytest.mark.usefixtures("warm_deliveries")
def test_one_that_nobody_waits_for_any_more_is_not_started_again(sqlite_uri: str, tmp_path: Path) -> None:
    delivery = start.start_delivery(tmp_path / "run", uri=sqlite_uri)
    journal = Journal.create(tmp_path / "run", experiment="e")
    delivery.wait_ready()
    started = delivery._process
    os.kill(started.pid, signal.SIGSTOP)
    journal.end("FINISHED", "completed", 0)
    assert not delivery.finish(0.1)
    kill(delivery)
    with pytest.raises(HelperFailed, match="killed by signal 9"):
        delivery.ask("run_info", run_id="0" * 32)
    assert delivery._process is started
    assert deliver.main([str(journal.folder), "--uri", sqlite_uri]) == 0


def test_what_was_forgotten_stays_so_in_the_next_process(sqlite_uri: str, tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "run", experiment="e", name="n")
    child = Journal.create(tmp_path / "run" / "child", experiment="e", name="child", parent=journal.folder)
    journal.child(child.folder)
    size = (journal.folder / FILE).stat().st_size
    for _ in range(2):  # the first has not sent it yet, the second has it behind its offset
        with DeliveryLoop(journal.folder, sqlite_uri, live=True) as loop:
            loop.top.forget(child.folder, size)
            loop.run_once()
            assert set(loop.runs) == {journal.folder}
    journal.child(child.folder)
    with DeliveryLoop(journal.folder, sqlite_uri, live=True) as loop:
        loop.top.forget(child.folder, size)
        loop.run_once()
        assert set(loop.runs) == {journal.folder, child.folder}


def test_a_move_of_aliases_that_is_asked_for_again_is_made_once(sqlite_uri: str, tmp_path: Path) -> None:
    client = MlflowClient(sqlite_uri)
    client.create_registered_model("m")
    for _ in range(2):
        client.create_model_version("m", tmp_path.as_uri())
    client.set_registered_model_alias("m", "champion", "1")
    before, after = {"champion": "1", "previous": None}, {"champion": "2", "previous": "1"}
    plan = {"before": before, "after": after, "past": ["1"], "tags": {"2": {"a": "b"}}, "version": "2", "run": "r",
            "why": "w"}  # fmt: skip
    for again in (True, True, False):  # nothing was done before; all was; and somebody else asks for the same
        answer = answer_to(client, None, "move", {"name": "m", "plan": plan}, again)
        assert ("error" in answer) is not again, answer
        assert {k: str(v) for k, v in client.get_registered_model("m").aliases.items()} == after
        assert client.get_model_version("m", "2").tags["a"] == "b"
    stays = plan | {"before": after, "after": after, "tags": {"1": {"verdict": "refused"}}, "version": "1"}
    assert "error" not in answer_to(client, None, "move", {"name": "m", "plan": stays}, again=True)
    assert client.get_model_version("m", "1").tags["verdict"] == "refused"


def test_a_disk_that_is_full_for_a_while_ends_no_delivery(
    sqlite_uri: str, tmp_path: Path, small_disk: Callable[[float], Path]
) -> None:
    disk = small_disk(0.25)
    journal = Journal.create(disk / "run", experiment="full", name="n")
    with DeliveryLoop(journal.folder, sqlite_uri, live=True) as loop:
        loop.run_once()
        journal.metrics({"student/acc": 0.5}, step=0)
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1024))
        with pytest.raises(Exception, match="could not be written") as caught:
            loop.run_once()
        assert not lasting(caught.value)
        (disk / "filler").unlink()
        journal.end("FINISHED", "completed", 0)
        assert loop.run_once()
        run = loop.top.state.run_id
    client = MlflowClient(sqlite_uri)
    assert steps(client, run) == [0]
    assert client.get_run(run).info.status == "FINISHED"


def make_and_die(folder: Path, delay: float) -> None:
    """Make a database, and be killed that long after its first byte."""

    def kill() -> None:
        while not any(size_of(file) for file in folder.glob("*mlflow.db*")):  # some are renamed meanwhile
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    prepare_sqlite(f"sqlite:///{folder}/mlflow.db")
    signal.pause()


@pytest.mark.slow
def test_a_database_whose_maker_is_killed_is_made_anew(tmp_path: Path) -> None:
    rng = random.Random(3)
    for number in range(ROUNDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        arguments = (folder, rng.uniform(0, 0.6))
        maker = multiprocessing.get_context("fork").Process(target=make_and_die, args=arguments)
        maker.start()
        maker.join(120)
        assert maker.exitcode == -signal.SIGKILL
        prepare_sqlite(f"sqlite:///{folder}/mlflow.db")
        with sqlite3.connect(folder / "mlflow.db") as database:
            assert database.execute("select name from experiments").fetchall() == [("Default",)]
        assert {path.name for path in folder.iterdir()} <= {"mlflow.db", "mlflow.db.lock", "mlartifacts"}
