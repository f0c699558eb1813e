"""Which run a journal may take over, and what is said of a journal that is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from pipeline.errors import UserError
from pipeline.journal import FILE, Journal
from pipeline.tracking.deliver import deliver, main
from pipeline.tracking.follow import DeliveryLoop


def run(folder: Path, seed: int, experiment: str = "e") -> Path:
    journal = Journal.create(folder, experiment=experiment, usual_name="distill seed 1", tags={"asib.step": "distill"})
    journal.params({"seed": seed})
    journal.metrics({"acc": float(seed)}, 0)
    journal.end("FINISHED", "completed", 0)
    return folder


def adopt(folder: Path, uri: str, theirs: str, **more: Any) -> str:
    with DeliveryLoop(folder, uri, adopt=theirs, **more) as loop:
        assert loop.run_once()
        return loop.top.state.run_id


def everything(client: MlflowClient, run_id: str) -> tuple[Any, ...]:
    found = client.get_run(run_id)
    history = [(m.step, m.value) for m in client.get_metric_history(run_id, "acc")]
    return found.info.status, found.info.end_time, found.data.params, found.data.tags, history


def test_a_run_that_mlflow_run_named_at_random_gets_our_name_and_its_users_stays(
    sqlite_uri: str, tmp_path: Path
) -> None:
    client = MlflowClient(sqlite_uri)
    names = {}
    for folder, given in (("a", None), ("b", "mine"), ("c", "dashing-robin-851"), ("d", "our-lab-3")):
        theirs = client.create_run("0", run_name=given).info.run_id
        assert adopt(run(tmp_path / folder, 1), sqlite_uri, theirs) == theirs
        names[given] = client.get_run(theirs).info.run_name
    assert names == {
        None: "distill seed 1",
        "mine": "mine",
        "dashing-robin-851": "distill seed 1",
        "our-lab-3": "our-lab-3",
    }


def test_a_run_that_has_ended_or_is_another_journals_is_left_as_it_is(sqlite_uri: str, tmp_path: Path) -> None:
    client = MlflowClient(sqlite_uri)
    given = client.create_run("0").info.run_id
    assert adopt(run(tmp_path / "a", 1), sqlite_uri, given) == given
    before = everything(client, given)
    second = adopt(run(tmp_path / "b", 2), sqlite_uri, given)
    assert second != given
    found = client.get_run(second)
    assert (found.data.params, found.data.metrics) == ({"seed": "2"}, {"acc": 2.0})
    assert found.info.run_name == "distill seed 1"
    assert everything(client, given) == before

    # the same while the first step is still at work on it, as two commands of one `mlflow run` are
    shared = client.create_run("0").info.run_id
    first = Journal.create(tmp_path / "c", experiment="e")
    with DeliveryLoop(tmp_path / "c", sqlite_uri, adopt=shared, live=True) as loop:
        loop.run_once()
        assert adopt(run(tmp_path / "d", 4), sqlite_uri, shared) != shared
        first.end("FINISHED", "completed", 0)
        assert loop.run_once()
    assert client.get_run(shared).data.params == {}


def test_a_resume_notes_nothing_in_a_run_that_has_ended(sqlite_uri: str, tmp_path: Path) -> None:
    client = MlflowClient(sqlite_uri)
    given = client.create_run("0").info.run_id
    adopt(run(tmp_path / "a", 1), sqlite_uri, given)
    before = everything(client, given)
    target = deliver([run(tmp_path / "b", 2)], sqlite_uri)[0].run_id
    again = Journal.reopen(tmp_path / "b")
    again.end("FINISHED", "completed", 0)
    assert adopt(tmp_path / "b", sqlite_uri, given, resume=target) == target
    assert everything(client, given) == before
    # the run that `mlflow run` made for a resume is no second resume's
    shell = client.create_run("0").info.run_id
    for name in "bc":
        folder = tmp_path / name
        journal = Journal.reopen(folder) if name == "b" else Journal.create(folder, experiment="e")
        with DeliveryLoop(folder, sqlite_uri, adopt=shell, resume=target if name == "b" else None, live=True) as loop:
            loop.run_once()
            journal.end("FINISHED", "completed", 0)
            loop.run_once()
    assert client.get_run(shell).data.tags["asib.resumes"] == target
    assert "asib.journal" not in client.get_run(shell).data.tags


def test_a_refusal_is_noted_in_no_run_that_has_ended(sqlite_uri: str, tmp_path: Path) -> None:
    client = MlflowClient(sqlite_uri)
    given = client.create_run("0").info.run_id
    adopt(run(tmp_path / "a", 1), sqlite_uri, given)
    before = everything(client, given)
    journal = Journal.create(tmp_path / "refused", experiment="")
    journal.end("FAILED", "refused", 2, "method.kd_alhpa: no such key")
    with DeliveryLoop(tmp_path / "refused", sqlite_uri, adopt=given) as loop, pytest.raises(UserError, match="ended"):
        loop.run_once()
    assert everything(client, given) == before
    assert len(client.search_runs(["0"])) == 1


def test_a_damaged_journal_is_delivered_but_for_the_line_that_is_named(
    sqlite_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    journal = Journal.create(folder, experiment="e")
    for step in range(20):
        journal.metrics({"acc": step / 7}, step)
    journal.end("FINISHED", "completed", 0)
    path = folder / FILE
    path.write_bytes(path.read_bytes().replace(b'"step": 8,', b'"step": 3,'))
    for _ in range(2):
        assert main([str(folder), "--uri", sqlite_uri]) == 2
        said = capsys.readouterr()
        assert [f"{path}: line 10 is damaged" in line for line in said.err.splitlines()] == [True]
        run_id = said.out.split(": ")[1].split()[0]
        client = MlflowClient(sqlite_uri)
        points = sorted((m.step, m.value) for m in client.get_metric_history(run_id, "acc"))
        assert points == [(step, step / 7) for step in range(20) if step != 8]
        assert client.get_run(run_id).info.status == "FINISHED"


def test_a_run_does_not_end_before_it_began(sqlite_uri: str, tmp_path: Path) -> None:
    """A journal of two machines, the second with a clock that is an hour behind."""
    folder = run(tmp_path / "run", 1)
    path = folder / FILE
    lines = path.read_text().splitlines()
    values = [json.loads(line) for line in lines]
    for value in values[1:]:
        value["time"] -= 3_600_000
    path.write_text("".join(json.dumps({k: v for k, v in value.items() if k != "crc"}) + "\n" for value in values))
    (done,) = deliver([folder], sqlite_uri)
    info = MlflowClient(sqlite_uri).get_run(done.run_id).info
    assert info.end_time >= info.start_time == values[0]["time"]


def test_what_mlflow_run_has_logged_is_stored_as_a_step_alone_would(sqlite_uri: str, tmp_path: Path) -> None:
    """`mlflow run` quotes for the shell, and logs what it has quoted (mlflow/projects/_project_spec.py)."""
    client = MlflowClient(sqlite_uri)
    given = client.create_run("0").info.run_id
    for key, value in {"epochs": "'[1]'", "alpha": "0", "seed": "1", "cfg": "quickstart"}.items():
        client.log_param(given, key, value)
    journal = Journal.create(tmp_path / "a", experiment="e")
    journal.params({"epochs": "[1]", "alpha": "0.0", "seed": "1", "tau": "4.0"})
    journal.end("FINISHED", "completed", 0)
    assert adopt(tmp_path / "a", sqlite_uri, given) == given
    stored = {"epochs": "[1]", "alpha": "0.0", "seed": "1", "tau": "4.0", "cfg": "quickstart"}
    assert client.get_run(given).data.params == stored
    # only in a run that was adopted: in one's own the first value stands
    again = Journal.reopen(tmp_path / "a")
    again.params({"alpha": "0.5"})
    again.end("FINISHED", "completed", 0)
    deliver([tmp_path / "a"], sqlite_uri)
    assert client.get_run(given).data.params == stored
