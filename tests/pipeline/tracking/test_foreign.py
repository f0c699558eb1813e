"""Delivering a colleague's folder: nothing outside of it is read, written or run."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from pipeline.errors import UserError
from pipeline.journal import Journal
from pipeline.tracking.deliver import deliver
from tests.servers import artifacts_of

SECRET = "the victim's own"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "victim").mkdir()
    file = tmp_path / "victim" / "secret.txt"
    file.write_text(SECRET)
    return file


def append(folder: Path, *entries: dict[str, Any]) -> None:
    with (folder / "journal.jsonl").open("a") as file:
        for entry in entries:
            file.write(json.dumps({"time": 1, **entry}) + "\n")


def closing() -> dict[str, Any]:
    return {"kind": "end", "status": "FINISHED", "outcome": "completed", "exit_code": 0, "message": None}


def model(**changes: Any) -> dict[str, Any]:
    names = {"kind": "model", "entry": "e" * 32, "folder": "model", "name": "student", "model_kind": "pyfunc"}
    empty: dict[str, Any] = {key: {} for key in ("artifacts", "params", "metrics", "tags")}
    return {**names, **empty, "input_example": None, "model_type": None, "step": 0, **changes}


def test_no_entry_brings_a_file_from_elsewhere(secret: Path, sqlite_uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    journal = Journal.create(folder, experiment="e")
    (folder / "link").symlink_to(secret)
    (folder / "linked").symlink_to(secret.parent, target_is_directory=True)
    (folder / "tree").mkdir()
    (folder / "tree" / "inner").symlink_to(secret)
    os.mkfifo(folder / "pipe")
    (folder / "model").mkdir()
    (folder / "good.txt").write_text("theirs")
    journal.close()
    sha256 = hashlib.sha256(SECRET.encode()).hexdigest()
    paths = ["../victim/secret.txt", str(secret), "link", "linked", "linked/secret.txt", "tree", "pipe", ".", "", 7]
    append(
        folder,
        *({"kind": "artifact", "path": path, "to": ""} for path in paths),
        {"kind": "checkpoint", "path": "../victim/secret.txt", "sha256": sha256, "slot": 0},
        {"kind": "checkpoint", "path": "link", "sha256": sha256, "slot": "../.."},
        model(model_kind="weights", folder="../victim"),
        model(model_kind="weights", folder="linked", entry="d" * 32),
        model(artifacts={"net": "../victim/secret.txt", "meta": "link"}, entry="c" * 32),
        model(input_example="../victim/secret.txt", entry="b" * 32),
        {"kind": "artifact", "path": "good.txt", "to": ""},
        closing(),
    )
    (done,) = deliver([folder], sqlite_uri)
    client = MlflowClient(sqlite_uri)
    assert artifacts_of(client, done.run_id) == ["good.txt"]
    assert client.get_run(done.run_id).info.status == "FINISHED"
    assert done.refused == len(paths) + 4
    stored = [path for path in tmp_path.rglob("*") if path.is_file() and path != secret and not path.is_symlink()]
    assert not [path for path in stored if SECRET.encode() in path.read_bytes()]
    assert secret.read_text() == SECRET


def child_of(folder: Path, parent: Path) -> Journal:
    journal = Journal.create(folder, experiment="e", name=folder.name, parent=parent)
    journal.end("FINISHED", "completed", 0)
    return journal


def test_a_journal_names_no_strangers_run(sqlite_uri: str, tmp_path: Path) -> None:
    """Inside its folder any; elsewhere only those that name it themselves, as a sweep's trials do."""
    folder = tmp_path / "theirs" / "run"
    journal = Journal.create(folder, experiment="e", name="top")
    other = Journal.create(tmp_path / "victim" / "other", experiment="e")
    stranger = child_of(tmp_path / "victim" / "other" / "trial", other.folder)
    alone = Journal.create(tmp_path / "victim" / "alone", experiment="e", name="alone")
    alone.end("FINISHED", "completed", 0)
    inner = child_of(folder / "inner", folder)
    own = child_of(tmp_path / "theirs" / "trials" / "own", folder)
    (folder / "linked").symlink_to(stranger.folder, target_is_directory=True)
    for named in (stranger.folder, alone.folder, folder / "linked", inner.folder, own.folder, tmp_path / "nowhere"):
        journal.child(named)
    journal.end("FINISHED", "completed", 0)
    (done,) = deliver([folder], sqlite_uri)
    client = MlflowClient(sqlite_uri)
    experiment = client.get_run(done.run_id).info.experiment_id
    assert sorted(run.info.run_name for run in client.search_runs([experiment])) == ["inner", "own", "top"]
    assert done.refused == 3
    assert not list((tmp_path / "victim").rglob("delivery.*"))


def test_a_remembered_run_must_be_the_journals(sqlite_uri: str, tmp_path: Path) -> None:
    mine = Journal.create(tmp_path / "mine", experiment="e")
    mine.end("FINISHED", "completed", 0)
    (first,) = deliver([tmp_path / "mine"], sqlite_uri)
    theirs = Journal.create(tmp_path / "theirs", experiment="e", tags={"asib.stolen": "yes"})
    theirs.metrics({"final/val_acc": 100.0}, step=0)
    theirs.end("FINISHED", "completed", 0)
    state = json.loads((tmp_path / "mine" / "delivery.json").read_text())
    state |= {"journal": theirs.id, "offset": 0, "ended": False, "generation": theirs.id}
    (tmp_path / "theirs" / "delivery.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="which is not this journal's"):
        deliver([tmp_path / "theirs"], sqlite_uri)
    seen = MlflowClient(sqlite_uri).get_run(first.run_id)
    assert seen.data.metrics == {}
    assert "asib.stolen" not in seen.data.tags


@pytest.mark.parametrize("name", ["delivery.lock", "delivery.takeover", "delivery.json", "journal.jsonl", "delivery"])
def test_nothing_is_written_through_a_link(secret: Path, sqlite_uri: str, tmp_path: Path, name: str) -> None:
    journal = Journal.create(tmp_path / "theirs", experiment="e")
    journal.end("FINISHED", "completed", 0)
    target = secret
    if name == "journal.jsonl":
        target = tmp_path / "victim" / "journal.jsonl"
        (tmp_path / "theirs" / name).rename(target)
    (tmp_path / "theirs" / name).symlink_to(target)
    before = target.read_bytes()
    with pytest.raises(UserError, match="is a symbolic link"):
        deliver([tmp_path / "theirs"], sqlite_uri)
    assert target.read_bytes() == before


def test_a_journal_moves_no_alias_but_the_challengers(sqlite_uri: str, tmp_path: Path) -> None:
    client = MlflowClient(sqlite_uri)
    for alias, refused in (("challenger", 0), ("champion", 1)):
        journal = Journal.create(tmp_path / alias, experiment="e")
        (tmp_path / alias / "model").mkdir()
        (tmp_path / alias / "model" / "student.safetensors").write_bytes(b"weights")
        journal.model(tmp_path / alias / "model", "student", kind="weights")
        journal.register("m", model="student", alias=alias)
        journal.end("FINISHED", "completed", 0)
        (done,) = deliver([tmp_path / alias], sqlite_uri)
        assert done.refused == refused
    aliases = client.get_registered_model("m").aliases
    assert {alias: int(version) for alias, version in aliases.items()} == {"challenger": 1}
