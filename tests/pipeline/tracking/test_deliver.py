"""The delivery process beside a trainer: ready, outages, kill -9, simultaneous starts, refusals."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pipeline.errors import NotThere, UserError
from pipeline.files import locked
from pipeline.journal import Journal
from pipeline.tracking import deliver, start
from tests.servers import MlflowServer, Wire, steps

ROOT = Path(__file__).resolve().parents[3]

TRAINER = """
import sys, time
from pathlib import Path
from pipeline.tracking import start
from pipeline.journal import Journal
folder = Path(sys.argv[1])
delivery = start.start_delivery(folder, uri=sys.argv[2], grace=60.0)
journal = Journal.create(folder, experiment="killed", name="n")
child = Journal.create(folder / "child", experiment="killed", name="child", parent=folder)
journal.child(child.folder)
ready = delivery.wait_ready()
assert "mlflow" not in sys.modules
print(ready.run_id, delivery.child_ready(folder / "child"), flush=True)
step = 0
while True:
    journal.metrics({"student/acc": float(step)}, step=step)
    child.metrics({"student/acc": float(step)}, step=step)
    step += 1
    time.sleep(0.05)
"""


WORKER = """
import sys
from pathlib import Path
from pipeline.tracking import start
from pipeline.journal import Carrier, Journal
home, uri, run_id, journal_id = Path(sys.argv[1]), *sys.argv[2:]
stands_for = Carrier(run_id, journal_id, "sweeps")
delivery = start.start_delivery(home / "worker", uri=uri)
carrier = Journal.create(home / "worker", experiment="sweeps", carrier=stands_for)
assert delivery.wait_ready().run_id == run_id
for name in ("own", "taken"):
    trial = Journal.create(home / name, experiment="sweeps", tags={"asib.study": "s", "n": name}, parent=carrier.folder)
    carrier.child(trial.folder)
    print(delivery.child_ready(trial.folder), flush=True)
trial.metrics({"student/acc": 1.0}, step=0)
trial.close()
delivery.forget(trial.folder)
try:
    delivery.forget(carrier.folder)
except ValueError:
    print("forgotten", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.delenv(name, raising=False)


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def free(folder: Path) -> bool:
    """Whether no delivery has the folder."""
    with locked(folder / "delivery.lock", patience=0) as held:
        return held


def start_trainer(folder: Path, uri: str) -> tuple[subprocess.Popen[str], str, str]:
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(folder), uri],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert trainer.stdout is not None
    run_id, child_id = trainer.stdout.readline().split()
    return trainer, run_id, child_id


@pytest.mark.slow
@pytest.mark.usefixtures("warm_deliveries")
def test_a_run_goes_through_an_outage_without_loss(mlflow_server: MlflowServer, wire: Wire, tmp_path: Path) -> None:
    run = tmp_path / "run"
    delivery = start.start_delivery(run, uri=wire.uri)
    delivery.wait_connected()
    journal = Journal.create(run, experiment="outage", name="n")
    ready = delivery.wait_ready()
    assert ready.url.startswith(f"{wire.uri}/#/experiments/{ready.experiment_id}/runs/")
    journal.params({"a": 1})
    (run / "best.yaml").write_text("a: 1\n")
    journal.artifact(run / "best.yaml")
    journal.metrics({"student/acc": 0.0}, step=0)
    client = MlflowClient(mlflow_server.uri)
    until(lambda: steps(client, ready.run_id) == [0])
    assert delivery.run_info(ready.run_id)["params"] == {"a": "1"}
    with pytest.raises(UserError, match="no run"):
        delivery.run_info("0" * 32)
    until(lambda: [file.path for file in client.list_artifacts(ready.run_id)] == ["best.yaml"])
    fetched = delivery.fetch(f"runs:/{ready.run_id}/best.yaml", tmp_path / "fetched")
    assert fetched == tmp_path / "fetched" / "best.yaml"
    assert fetched.read_text() == "a: 1\n"
    with pytest.raises(NotThere, match=r"missing\.yaml cannot be fetched"):
        delivery.fetch(f"runs:/{ready.run_id}/missing.yaml", tmp_path / "fetched")
    wire.cut()
    for step in range(1, 50):
        journal.metrics({"student/acc": float(step)}, step=step)
        time.sleep(0.02)
    wire.mend()
    journal.end("FINISHED", "completed", 0)
    assert delivery.finish(60.0)
    assert steps(client, ready.run_id) == list(range(50))
    assert client.get_run(ready.run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_a_killed_trainer_leaves_a_killed_run_with_everything(sqlite_uri: str, tmp_path: Path) -> None:
    trainer, run_id, child_id = start_trainer(tmp_path / "run", sqlite_uri)
    client = MlflowClient(sqlite_uri)
    assert client.get_run(run_id).info.status == "RUNNING"
    assert client.get_run(child_id).data.tags["mlflow.parentRunId"] == run_id
    time.sleep(0.5)
    trainer.kill()
    trainer.communicate()
    for folder, run in ((tmp_path / "run", run_id), (tmp_path / "run" / "child", child_id)):
        until(lambda run=run: client.get_run(run).info.status == "KILLED")  # type: ignore[misc]
        written = (folder / "journal.jsonl").read_text().count('"kind": "metrics"')
        assert written > 3
        assert steps(client, run) == list(range(written))
        assert client.get_run(run).data.tags["asib.outcome"] == "killed"
    # The process leaves, and the folder is free for a resume.
    Journal.reopen(tmp_path / "run").close()


@pytest.mark.slow
@pytest.mark.usefixtures("warm_deliveries")
def test_a_killed_worker_leaves_its_sweep_running_and_what_it_had_forgotten(sqlite_uri: str, tmp_path: Path) -> None:
    parent = start.start_delivery(tmp_path / "sweep", uri=sqlite_uri)
    journal = Journal.create(tmp_path / "sweep", experiment="sweeps")
    sweep = parent.wait_ready().run_id
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(tmp_path), sqlite_uri, sweep, journal.id],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert worker.stdout is not None
    own, taken, said = (worker.stdout.readline().strip() for _ in range(3))
    assert said == "forgotten"
    worker.kill()
    worker.communicate()
    client = MlflowClient(sqlite_uri)
    until(lambda: client.get_run(own).info.status == "KILLED")
    until(lambda: free(tmp_path / "worker"))  # its delivery has left
    assert client.get_run(taken).info.status == client.get_run(sweep).info.status == "RUNNING"
    assert parent.ask("nested_runs", run_id=sweep) == [own, taken]
    (orphan,) = parent.ask("running", study="s")
    assert (orphan["run_id"], orphan["tags"]["n"]) == (taken, "taken")
    assert parent.ask("running", study="another") == []
    with pytest.raises(UserError, match="status"):
        parent.ask("reap", runs={taken: ("RUNNING", "killed", 137, None)})
    ends = {taken: ("KILLED", "killed", 137, "gone"), own: ("FAILED", "failed", 1, None)}
    assert parent.ask("reap", runs=ends) == [taken]
    assert client.get_run(taken).data.tags["asib.error"] == "gone"
    journal.end("FINISHED", "completed", 0)
    assert parent.finish(60.0)
    assert client.get_run(sweep).info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.usefixtures("warm_deliveries")
def test_a_resume_takes_the_folder_from_a_delivery_that_waits_for_its_server(
    mlflow_server: MlflowServer, wire: Wire, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trainer, run_id, _ = start_trainer(run, wire.uri)
    wire.cut()
    time.sleep(0.3)
    trainer.kill()
    trainer.communicate()
    # The orphan would try for a minute yet, over the wire that is cut.
    delivery = start.start_delivery(run, uri=mlflow_server.uri)
    journal = Journal.reopen(run)
    assert delivery.wait_ready(40.0).run_id == run_id
    journal.end("FINISHED", "completed", 0)
    assert delivery.finish(60.0)
    client = MlflowClient(mlflow_server.uri)
    written = (run / "journal.jsonl").read_text().count('"kind": "metrics"')
    assert steps(client, run_id) == list(range(written))
    assert client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.usefixtures("warm_deliveries")
def test_simultaneous_first_starts_on_a_fresh_sqlite_file(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'fresh' / 'mlflow.db'}"
    folders = [tmp_path / f"run{i}" for i in range(4)]
    deliveries = [start.start_delivery(folder, uri=uri) for folder in folders]
    journals = [Journal.create(folder, experiment="same") for folder in folders]
    ready = [delivery.wait_ready() for delivery in deliveries]
    assert len({one.run_id for one in ready}) == 4
    assert len({one.experiment_id for one in ready}) == 1
    for journal in journals:
        journal.end("FINISHED", "completed", 0)
    assert [delivery.finish(60.0) for delivery in deliveries] == [True] * 4
    client = MlflowClient(uri)
    assert {client.get_run(one.run_id).info.status for one in ready} == {"FINISHED"}


@pytest.mark.slow
@pytest.mark.usefixtures("warm_deliveries")
def test_a_server_that_stays_away_ends_in_false_and_deliver_brings_the_rest(
    mlflow_server: MlflowServer, wire: Wire, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    delivery = start.start_delivery(tmp_path / "run", uri=wire.uri, grace=0.5)
    journal = Journal.create(tmp_path / "run", experiment="away")
    ready = delivery.wait_ready()
    wire.cut()
    journal.metrics({"student/acc": 1.0}, step=0)
    journal.end("FINISHED", "completed", 0)
    assert not delivery.finish(60.0)
    assert deliver.main([str(tmp_path / "run"), "--uri", wire.uri]) == 2
    assert "does not answer" in capsys.readouterr().err
    assert deliver.main([str(tmp_path / "run"), "--uri", mlflow_server.uri]) == 0
    assert ready.run_id in capsys.readouterr().out
    client = MlflowClient(mlflow_server.uri)
    assert steps(client, ready.run_id) == [0]
    assert client.get_run(ready.run_id).info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.usefixtures("warm_deliveries")
def test_refusals_come_before_training_in_one_line(sqlite_uri: str, tmp_path: Path) -> None:
    away = start.start_delivery(tmp_path / "a", uri="http://127.0.0.1:9")
    unknown = start.start_delivery(tmp_path / "b", uri=sqlite_uri, adopt="0" * 32)
    for name in "ab":
        Journal.create(tmp_path / name, experiment="e").close()
    for delivery, words in ((away, "start the server"), (unknown, "knows no run")):
        with pytest.raises(UserError, match=words) as caught:
            delivery.wait_ready()
        assert "\n" not in str(caught.value)
        assert not delivery.finish(1.0)
    # A step may also turn back before it has a journal.
    assert not start.start_delivery(tmp_path / "no journal", uri=sqlite_uri).finish(30.0)
    with pytest.raises(UserError, match=r"tracking\.uri="):
        start.start_delivery(tmp_path / "d", uri="ftp://x")


@pytest.mark.slow
@pytest.mark.usefixtures("warm_deliveries")
def test_one_artifact_can_be_fetched_without_a_run(sqlite_uri: str, tmp_path: Path) -> None:
    client = MlflowClient(sqlite_uri)
    run_id = client.create_run(client.create_experiment("e", (tmp_path / "art").as_uri())).info.run_id
    client.log_text(run_id, "a: 1", "best.yaml")
    path = start.fetch_now(sqlite_uri, f"runs:/{run_id}/best.yaml", tmp_path / "here")
    assert path.read_text() == "a: 1"
    with pytest.raises(UserError, match="cannot be fetched"):
        start.fetch_now(sqlite_uri, f"runs:/{'1' * 32}/x", tmp_path / "here")


def test_the_default_uri_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert start.default_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///sub/x.db")
    assert start.default_uri() == f"sqlite:///{tmp_path}/sub/x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert start.default_uri() == "http://server:5000"


@pytest.mark.parametrize("command", [["steps.deliver"], ["pipeline.experiment.tracking", "deliver"]])
def test_deliver_says_what_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """By its name, and by that of earlier releases."""
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path), "--uri", f"sqlite:///{tmp_path}/x.db"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(command[0], run_name="__main__")
    assert ended.value.code == 2
    assert "no journal" in capsys.readouterr().err
