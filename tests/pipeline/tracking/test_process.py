"""Delivery in process: what arrives is what a direct client would have logged, however often it is sent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from pipeline.errors import UserError
from pipeline.journal import FILE, Journal, decode_number, read_entries
from pipeline.tracking import server
from pipeline.tracking.deliver import deliver
from pipeline.tracking.follow import DeliveryLoop
from tests.pipeline.promote.local import Broken, Fragile
from tests.servers import artifacts_of, steps

MANY = [f"m{i}" for i in range(1200)]  # more than a request may hold


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (server.PATIENCE, *server.SETTINGS, *server.ADOPTION):
        monkeypatch.delenv(name, raising=False)
    server.prepare_environment()


def record(folder: Path, experiment: str = "distil", end: bool = True, many: Sequence[str] = ()) -> Journal:
    """A run as a trainer writes it, without checkpoints."""
    journal = Journal.create(folder, experiment=experiment, name="student", tags={"asib.step": "distill"})
    journal.params({"optim.lr": 0.1, "long": "x" * 7000, **{f"p{i}": i for i in range(150)}})
    (folder / "config.yaml").write_text("a: 1\n")
    (folder / "plots").mkdir()
    (folder / "plots" / "a.txt").write_text("curve")
    journal.artifact(folder / "config.yaml")
    journal.artifact(folder / "plots", to="pictures")
    journal.dataset("cifar", "d" * 64, "training", "/data/cifar", profile={"images": 3})
    for epoch in range(3):
        journal.metrics({"student/acc": 10.0 * epoch, "a_step/loss": math.nan, "schedule/tau": math.inf}, step=epoch)
    journal.metrics({key: i / 3 for i, key in enumerate(many)}, step=3)
    journal.tags({"asib.rung": "3"})
    if end:
        journal.end("FINISHED", "completed", 0)
    return journal


def logged_directly(client: MlflowClient, folder: Path, experiment: str) -> str:
    """The same journal's content sent by hand with MLflow's client."""
    known = client.get_experiment_by_name(experiment)
    location = (folder.parent / "direct").as_uri() if not str(client.tracking_uri).startswith("http") else None
    experiment_id = known.experiment_id if known else client.create_experiment(experiment, location)
    entries = read_entries(folder / FILE)[0]
    run_id = str(client.create_run(experiment_id, run_name="student", tags={"asib.step": "distill"}).info.run_id)
    for entry in entries:
        values = entry.data.get("values", {})
        if entry.kind == "params":
            client.log_batch(run_id, params=[Param(key, value[:6000]) for key, value in values.items()])
        elif entry.kind == "metrics":
            points = [Metric(k, decode_number(v), entry.time, entry.data["step"]) for k, v in values.items()]
            client.log_batch(run_id, metrics=points)
        elif entry.kind == "tags":
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in values.items()])
    client.log_artifact(run_id, str(folder / "config.yaml"))
    client.log_artifact(run_id, str(folder / "plots"), "pictures")
    data = Dataset("cifar", "d" * 32, "local", json.dumps({"uri": "/data/cifar"}), None, json.dumps({"images": 3}))
    client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])])
    client.set_terminated(run_id, "FINISHED", entries[-1].time)
    return run_id


def seen(client: MlflowClient, run_id: str, tmp_path: Path) -> dict[str, Any]:
    """Everything of a run that must be equal between two ways of logging it."""
    run = client.get_run(run_id)
    points = {
        key: sorted((p.step, p.timestamp, str(p.value)) for p in client.get_metric_history(run_id, key))
        for key in run.data.metrics
        if key not in MANY or key == MANY[0]
    }
    down = tmp_path / f"seen-{run_id}"
    down.mkdir(exist_ok=True)
    artifacts = {
        path: Path(client.download_artifacts(run_id, path, str(down))).read_bytes()
        for path in artifacts_of(client, run_id)
    }
    skip = ("asib.journal", "asib.outcome", "asib.exit_code", "mlflow.user", "mlflow.source.name", "mlflow.source.type")
    return {
        "params": run.data.params,
        "tags": {key: value for key, value in run.data.tags.items() if key not in skip},
        "points": points,
        "latest": {key: str(value) for key, value in run.data.metrics.items()},
        "artifacts": artifacts,
        "status": (run.info.status, run.info.end_time, run.info.run_name),
        "inputs": [
            (d.dataset.name, d.dataset.digest, d.dataset.source, d.dataset.profile, [(t.key, t.value) for t in d.tags])
            for d in run.inputs.dataset_inputs
        ],
    }


def checkpointed(journal: Journal, epoch: int, content: bytes) -> str:
    """One epoch as the training loop records it: entries held, text into the checkpoint, then its entry."""
    journal.metrics({"student/acc": 50.0 + epoch}, step=epoch)
    text = journal.snapshot()
    path = journal.folder / "checkpoints" / f"slot{epoch % 2}.safetensors"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    temporary.rename(path)
    journal.checkpoint(path, hashlib.sha256(content).hexdigest(), epoch % 2)
    return text


def server_checkpoint(client: MlflowClient, run_id: str, tmp_path: Path) -> tuple[dict[str, Any], bytes]:
    folder = Path(client.download_artifacts(run_id, "checkpoints", str(tmp_path)))
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / manifest["file"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == manifest["sha256"]
    return manifest, content


def test_a_delivered_run_equals_one_that_was_logged_directly_however_often_it_is_sent(
    store: str, tmp_path: Path
) -> None:
    record(tmp_path / "run", "equal", many=MANY)
    (done,) = deliver([tmp_path / "run"], store)
    assert done.complete
    assert done.refused == 0
    client = MlflowClient(store)
    direct = logged_directly(client, tmp_path / "run", "equal")
    expected = seen(client, direct, tmp_path)
    assert seen(client, done.run_id, tmp_path) == expected
    tags = client.get_run(done.run_id).data.tags
    assert (tags["asib.outcome"], tags["asib.exit_code"]) == ("completed", "0")
    assert client.get_run(done.run_id).info.start_time == read_entries(tmp_path / "run" / FILE)[0][0].time
    client.delete_run(direct)
    shutil.copytree(tmp_path / "run", tmp_path / "other machine")
    (tmp_path / "other machine" / "delivery.json").unlink()
    for folder in ("run", "other machine"):
        assert deliver([tmp_path / folder], store)[0].run_id == done.run_id
    assert seen(client, done.run_id, tmp_path) == expected
    experiment = client.get_experiment_by_name("equal")
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_a_broken_off_delivery_goes_on_without_loss_or_doubling(sqlite_uri: str, tmp_path: Path) -> None:
    record(tmp_path / "run")
    (whole,) = deliver([tmp_path / "run"], sqlite_uri)
    client = MlflowClient(sqlite_uri)
    expected = seen(client, whole.run_id, tmp_path)
    client.delete_run(whole.run_id)
    (tmp_path / "run" / "delivery.json").unlink()
    cut = 0
    for lost in range(1, 100):
        fragile: Any = Fragile(client, lost, after=True)
        with DeliveryLoop(tmp_path / "run", sqlite_uri, client=fragile) as loop:
            try:
                assert loop.run_once()
                run_id = loop.top.state.run_id
                break
            except Broken:
                cut += 1
    assert cut >= 6
    assert seen(client, run_id, tmp_path) == expected


def test_an_adopted_run_keeps_its_name_and_has_the_params_of_the_step(sqlite_uri: str, tmp_path: Path) -> None:
    client = MlflowClient(sqlite_uri)
    theirs = client.create_run("0", run_name="funny-name").info.run_id
    client.log_param(theirs, "optim.epochs", "4")
    journal = Journal.create(tmp_path / "run", experiment="never made")
    journal.params({"optim.epochs": 4.0, "optim.lr": 0.1})
    journal.end("FINISHED", "completed", 0)
    with DeliveryLoop(tmp_path / "run", sqlite_uri, adopt=theirs) as loop:
        assert loop.run_once()
    run = client.get_run(theirs)
    assert run.data.params == {"optim.epochs": "4.0", "optim.lr": "0.1"}
    assert run.info.run_name == "funny-name"
    assert run.data.tags["asib.journal"] == journal.id
    assert client.get_experiment_by_name("never made") is None
    # Without the folder's memory it is found in the experiment of `mlflow run`.
    (tmp_path / "run" / "delivery.json").unlink()
    assert deliver([tmp_path / "run"], sqlite_uri)[0].run_id == theirs


def test_a_resume_under_mlflow_run_leaves_the_new_run_empty(sqlite_uri: str, tmp_path: Path) -> None:
    journal = record(tmp_path / "run", end=False)
    text = journal.snapshot()
    journal.end("KILLED", "killed", 143)
    (first,) = deliver([tmp_path / "run"], sqlite_uri)
    client = MlflowClient(sqlite_uri)
    assert client.get_run(first.run_id).info.status == "KILLED"
    shell = client.create_run("0").info.run_id
    again = Journal.restore(tmp_path / "new machine", text)
    (tmp_path / "new machine" / "config.yaml").write_text("a: 1\n")
    with DeliveryLoop(tmp_path / "new machine", sqlite_uri, adopt=shell, resume=first.run_id, live=True) as loop:
        assert not loop.run_once()
        assert client.get_run(first.run_id).info.status == "RUNNING"
        again.metrics({"student/acc": 99.0}, step=3)
        again.end("FINISHED", "completed", 0)
        assert loop.run_once()
    empty, run = client.get_run(shell), client.get_run(first.run_id)
    assert empty.data.tags["asib.resumes"] == first.run_id
    assert empty.data.metrics == empty.data.params == {}
    assert (empty.info.status, run.info.status) == ("FINISHED", "FINISHED")
    assert run.data.tags["asib.outcome"] == "completed"
    assert steps(client, first.run_id) == [0, 1, 2, 3]


def test_the_server_never_has_entries_beyond_its_checkpoint(sqlite_uri: str, tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "run", experiment="e")
    journal.params({"a": 1})
    journal.hold()
    client = MlflowClient(sqlite_uri)
    with DeliveryLoop(tmp_path / "run", sqlite_uri, live=True) as loop:
        checkpointed(journal, 0, b"zero")
        loop.run_once()
        run_id = loop.top.state.run_id
        assert server_checkpoint(client, run_id, tmp_path)[1] == b"zero"
        assert steps(client, run_id) == [0]
        # Delivery lags: slot 1 is overwritten, and then slot 0; only the newest is worth sending.
        for epoch in range(1, 5):
            checkpointed(journal, epoch, f"{epoch}".encode())
        loop.run_once()
        manifest, content = server_checkpoint(client, run_id, tmp_path)
        assert content == b"4"
        assert steps(client, run_id) == [0, 1, 2, 3, 4]
        # The same slot twice running: the file that the manifest named was not touched meanwhile.
        assert (manifest["slot"], manifest["file"]) == (0, "slot1.safetensors")
        # A checkpoint file newer than its entry: nothing of the epoch goes out before the newer entry is there.
        checkpointed(journal, 5, b"5")
        newer = tmp_path / "run" / "checkpoints" / "newer"
        newer.write_bytes(b"7")
        newer.rename(tmp_path / "run" / "checkpoints" / "slot1.safetensors")
        loop.run_once()
        assert steps(client, run_id) == [0, 1, 2, 3, 4]
        checkpointed(journal, 6, b"6")
        loop.run_once()
        assert server_checkpoint(client, run_id, tmp_path)[1] == b"6"
        assert steps(client, run_id) == [0, 1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "run" / "delivery").exists()


def test_a_checkpoint_that_is_gone_does_not_keep_an_ended_run_from_the_server(sqlite_uri: str, tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "run", experiment="e")
    journal.hold()
    checkpointed(journal, 0, b"zero")
    journal.end("FINISHED", "completed", 0)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (done,) = deliver([tmp_path / "run"], sqlite_uri)
    assert steps(MlflowClient(sqlite_uri), done.run_id) == [0]


def test_a_resume_sends_the_checkpointed_epochs_once_and_drops_what_lay_beyond(sqlite_uri: str, tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "run", experiment="e")
    journal.hold()
    client = MlflowClient(sqlite_uri)
    checkpointed(journal, 0, b"zero")
    with DeliveryLoop(tmp_path / "run", sqlite_uri, live=True) as loop:
        loop.run_once()
        run_id = loop.top.state.run_id
    text = checkpointed(journal, 1, b"one")
    journal.release()
    journal.metrics({"student/acc": 1.0}, step=2)  # written, never delivered, not in any checkpoint
    journal.close()
    slot = (tmp_path / "run" / "checkpoints" / "slot1.safetensors", hashlib.sha256(b"one").hexdigest(), 1)
    again = Journal.restore(tmp_path / "run", text, slot)
    again.hold()
    with DeliveryLoop(tmp_path / "run", sqlite_uri, live=True) as loop:
        loop.run_once()
        assert loop.top.state.run_id == run_id
        assert server_checkpoint(client, run_id, tmp_path)[1] == b"one"
        checkpointed(again, 2, b"two")
        loop.run_once()
        # The text is replaced while a delivery looks on.
        again.close()
        Journal.restore(tmp_path / "run", text, slot).metrics({"student/acc": 5.0}, step=7)
        loop.run_once()
    assert steps(client, run_id) == [0, 1, 2, 7]


def test_children_are_nested_and_delivered_with_their_parent(sqlite_uri: str, tmp_path: Path) -> None:
    main = Journal.create(tmp_path / "main", experiment="e", name="main")
    for name in ("finetune", "distill"):
        child = Journal.create(tmp_path / "main" / name, experiment="e", name=name, parent=tmp_path / "main")
        main.child(child.folder)
        child.metrics({"student/acc": 1.0}, step=0)
        child.end("FINISHED", "completed", 0)
    main.end("FINISHED", "completed", 0)
    client = MlflowClient(sqlite_uri)
    shutil.copytree(tmp_path / "main", tmp_path / "copy")
    for folder in ("main", "copy"):
        (done,) = deliver([tmp_path / folder], sqlite_uri)
        experiment = client.get_run(done.run_id).info.experiment_id
        runs = {run.info.run_name: run for run in client.search_runs([experiment])}
        assert set(runs) == {"main", "finetune", "distill"}
        assert {runs[name].data.tags.get("mlflow.parentRunId") for name in ("finetune", "distill")} == {done.run_id}
        assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_an_open_end_is_killed_and_a_living_writer_is_left_running(sqlite_uri: str, tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "run", experiment="e")
    client = MlflowClient(sqlite_uri)
    (first,) = deliver([tmp_path / "run"], sqlite_uri)
    assert not first.complete
    assert client.get_run(first.run_id).info.status == "RUNNING"
    journal.close()
    (second,) = deliver([tmp_path / "run"], sqlite_uri)
    run = client.get_run(second.run_id)
    assert (second.run_id, second.complete) == (first.run_id, True)
    assert run.info.status == "KILLED"
    assert (run.data.tags["asib.outcome"], run.data.tags["asib.exit_code"]) == ("killed", "137")
    assert run.info.end_time == read_entries(tmp_path / "run" / FILE)[0][-1].time


def test_a_failure_carries_its_line(sqlite_uri: str, tmp_path: Path) -> None:
    Journal.create(tmp_path / "run", experiment="e").end("FAILED", "refused", 2, "optim.lr: must be positive")
    (done,) = deliver([tmp_path / "run"], sqlite_uri)
    run = MlflowClient(sqlite_uri).get_run(done.run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["asib.error"] == "optim.lr: must be positive"
    assert (run.data.tags["asib.outcome"], run.data.tags["asib.exit_code"]) == ("refused", "2")


def test_one_bad_name_keeps_nothing_else_away(store: str, tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "run", experiment="bad")
    journal.metrics({"good": 1.0, "bad|name?": 2.0, "student/acc": 3.0}, step=0)
    journal.artifact(tmp_path / "run" / "missing.txt")
    journal.end("FINISHED", "completed", 0)
    (done,) = deliver([tmp_path / "run"], store)
    run = MlflowClient(store).get_run(done.run_id)
    assert run.data.metrics == {"good": 1.0, "student/acc": 3.0}
    assert done.refused == 1
    assert run.info.status == "FINISHED"


def test_deliver_waits_for_a_delivery_that_is_just_ending_and_for_no_other(
    sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Journal.create(tmp_path / "run", experiment="e").end("FINISHED", "completed", 0)
    loop = DeliveryLoop(tmp_path / "run", sqlite_uri)
    ending = threading.Timer(0.3, loop.close)
    ending.start()
    assert deliver([tmp_path / "run"], sqlite_uri)[0].complete
    ending.join()
    monkeypatch.setattr("pipeline.tracking.deliver.PATIENCE_S", 0.1)
    with DeliveryLoop(tmp_path / "run", sqlite_uri) as loop:
        with pytest.raises(UserError, match="being delivered by another process"):
            deliver([tmp_path / "run"], sqlite_uri)
        assert not loop.asked_to_leave()


def test_artifacts_lie_beside_a_sqlite_file_wherever_we_are(
    sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path / "run", "a b/ü")
    monkeypatch.chdir(tmp_path / "store")
    (done,) = deliver([tmp_path / "run"], "sqlite:///mlflow.db")
    run = MlflowClient(sqlite_uri).get_run(done.run_id)
    assert run.info.artifact_uri.startswith((tmp_path / "store" / "mlartifacts").as_uri())
    assert (tmp_path / "store" / "mlartifacts").is_dir()


def test_an_older_sqlite_file_is_copied_and_migrated(sqlite_template: Path, tmp_path: Path) -> None:
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow.store.db import utils

    path = tmp_path / "old" / "mlflow.db"
    path.parent.mkdir()
    shutil.copyfile(sqlite_template, path)
    uri = f"sqlite:///{path}"
    engine = utils.create_sqlalchemy_engine_with_retry(uri)
    config = utils._get_alembic_config(uri)
    scripts = ScriptDirectory.from_config(config)
    head = scripts.get_current_head()
    older = str(scripts.get_revision(str(head)).down_revision)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, older)
        connection.exec_driver_sql("delete from experiments")
    engine.dispose()
    server.prepare_sqlite(uri)
    assert MlflowClient(uri).get_experiment("0").artifact_location.endswith("old/mlartifacts/0")
    for file, revision in ((path, head), (tmp_path / "old" / f"mlflow.db.before-{older}", older)):
        with contextlib.closing(sqlite3.connect(file)) as db:
            assert db.execute("select version_num from alembic_version").fetchone() == (revision,)


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "text.db"
    text.write_text("this is no database, though it is long enough to be taken for one" * 20)
    with pytest.raises(UserError, match="not a SQLite database"):
        server.prepare_sqlite(f"sqlite:///{text}")


def test_a_server_that_cannot_be_used_is_one_line_with_advice(tmp_path: Path) -> None:
    Journal.create(tmp_path / "run", experiment="e").close()
    for uri, words in (("http://127.0.0.1:9", "connection refused"), ("nonsense", "tracking=offline")):
        with pytest.raises(UserError, match=words) as caught:
            deliver([tmp_path / "run"], uri)
        assert "\n" not in str(caught.value)
        assert uri in str(caught.value)


def test_refusals_of_a_server_name_what_would_do() -> None:
    from mlflow.exceptions import MlflowException, get_error_code

    uri = "http://user:secret@server"
    for status, words in ((401, "password"), (403, "permission"), (404, "no MLflow at this address")):
        text = server.explain(MlflowException("no", error_code=get_error_code(status)), uri)
        assert words in text
        assert "secret" not in text


def test_unknown_and_deleted_runs_are_refused(sqlite_uri: str, tmp_path: Path) -> None:
    Journal.create(tmp_path / "run", experiment="e").close()
    with DeliveryLoop(tmp_path / "run", sqlite_uri, adopt="0" * 32) as loop, pytest.raises(UserError, match="no run 0"):
        loop.run_once()
    client = MlflowClient(sqlite_uri)
    gone = client.create_run("0").info.run_id
    client.delete_run(gone)
    with DeliveryLoop(tmp_path / "run", sqlite_uri, resume=gone) as loop, pytest.raises(UserError, match="restore"):
        loop.run_once()
