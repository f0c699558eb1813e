"""Nested runs brought by carriers, and runs that move from one writer to another."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from pipeline.errors import UserError
from pipeline.journal import FILE, Carrier, Journal, generations, read_entries
from pipeline.tracking.deliver import deliver
from pipeline.tracking.follow import TAKEOVER, WRITER, DeliveryLoop
from tests.servers import steps

TRIAL = "a" * 32


def sweep(tmp_path: Path, uri: str | None, run: str | None = None) -> tuple[Carrier, str]:
    """A sweep's parent run, delivered to `uri` and still being written; what its workers know, its run id."""
    journal = Journal.create(tmp_path / "sweep", experiment="sweeps", name="sweep")
    run_id = deliver([journal.folder], uri)[0].run_id if uri else ""
    # The parent may lie in another experiment than its configuration says: `mlflow run` makes it where it likes.
    return Carrier(run_id if run is None else run, journal.id, "elsewhere", journal.folder), run_id


def worker(folder: Path, stands_for: Carrier) -> Journal:
    return Journal.create(folder, experiment=stands_for.experiment, carrier=stands_for)


def trial(carrier: Journal, folder: Path, key: str = TRIAL) -> Journal:
    journal = Journal.create(
        folder, experiment="elsewhere", name="trial", tags={"asib.study": "s"}, parent=carrier.folder, journal=key
    )
    carrier.child(folder)
    return journal


def epoch(journal: Journal, number: int) -> tuple[str, tuple[Path, str, int]]:
    """One epoch with its checkpoint: what `Journal.restore` needs to go on behind it."""
    journal.hold()
    journal.metrics({"student/acc": 50.0 + number}, step=number)
    text, content = journal.snapshot(), f"{journal.folder} {number}".encode()
    path = journal.folder / "checkpoints" / f"slot{number % 2}.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".tmp").write_bytes(content)
    path.with_suffix(".tmp").rename(path)
    checkpoint = (path, hashlib.sha256(content).hexdigest(), number % 2)
    journal.checkpoint(*checkpoint)
    return text, checkpoint


def writer_of(journal: Journal) -> str:
    return generations(read_entries(journal.folder / FILE)[0])[-1]


def status(client: MlflowClient, run_id: str) -> str:
    return str(client.get_run(run_id).info.status)


@pytest.mark.parametrize("known", [None, "", "0" * 32], ids=["by id", "by journal", "on another server"])
def test_a_carriers_children_are_nested_in_its_run_which_stays_as_it_is(
    sqlite_uri: str, tmp_path: Path, known: str | None
) -> None:
    stands_for, parent = sweep(tmp_path, sqlite_uri, known)
    shutil.rmtree(tmp_path / "sweep")  # another machine
    client = MlflowClient(sqlite_uri)
    before = client.get_run(parent).to_dictionary()
    carrier = worker(tmp_path / "worker", stands_for)
    carrier.tags({"asib.exit_code": "9"})
    journal = trial(carrier, tmp_path / "worker" / "trial")
    epoch(journal, 0)
    with DeliveryLoop(carrier.folder, sqlite_uri, live=True) as loop:
        assert not loop.run_once()
        assert loop.top.state.run_id == parent
        journal.end("FINISHED", "completed", 0)
        carrier.end("FAILED", "failed", 1, "of the worker, not of the sweep")
        assert loop.run_once()
        nested = client.get_run(loop.runs[journal.folder].state.run_id)
        loop.close_unfinished()
    assert client.get_run(parent).to_dictionary() == before
    assert nested.data.tags["mlflow.parentRunId"] == parent
    assert nested.info.experiment_id == before["info"]["experiment_id"]
    assert steps(client, nested.info.run_id) == [0]
    # The trial's folder alone leads to the same parent, and makes the same run when that was lost.
    client.delete_run(nested.info.run_id)
    shutil.move(journal.folder, tmp_path / "alone")
    shutil.rmtree(tmp_path / "worker")
    (tmp_path / "alone" / "delivery.json").unlink()
    (again,) = deliver([tmp_path / "alone"], sqlite_uri)
    made = client.get_run(again.run_id)
    assert made.data.tags["mlflow.parentRunId"] == parent
    assert made.info.experiment_id == before["info"]["experiment_id"]
    assert client.get_run(parent).to_dictionary() == before


def test_off_line_the_parent_comes_first(sqlite_uri: str, tmp_path: Path) -> None:
    stands_for, _ = sweep(tmp_path, None)
    carrier = worker(tmp_path / "worker", stands_for)
    trial(carrier, tmp_path / "trials" / "0").end("FINISHED", "completed", 0)
    carrier.end("FINISHED", "completed", 0)
    for folder in (carrier.folder, tmp_path / "trials" / "0"):
        with pytest.raises(UserError, match=f"deliver {tmp_path / 'sweep'} first") as caught:
            deliver([folder], sqlite_uri)
        assert "\n" not in str(caught.value)
    parent, carried = deliver([tmp_path / "sweep", carrier.folder], sqlite_uri)
    assert carried.run_id == parent.run_id
    client = MlflowClient(sqlite_uri)
    assert status(client, parent.run_id) == "RUNNING"  # its journal is still being written
    (nested,) = client.search_runs(
        [client.get_run(parent.run_id).info.experiment_id], f"tags.mlflow.parentRunId = '{parent.run_id}'"
    )
    assert nested.info.status == "FINISHED"


@pytest.mark.parametrize("copied", [False, True], ids=["same folder", "copy"])
def test_a_trial_moves_from_one_carrier_to_another(sqlite_uri: str, tmp_path: Path, copied: bool) -> None:
    stands_for, parent = sweep(tmp_path, sqlite_uri)
    client = MlflowClient(sqlite_uri)
    first, second = worker(tmp_path / "first", stands_for), worker(tmp_path / "second", stands_for)
    lost = trial(first, tmp_path / "trials" / "0")
    text, checkpoint = epoch(lost, 0)
    with (
        DeliveryLoop(first.folder, sqlite_uri, live=True) as old,
        DeliveryLoop(second.folder, sqlite_uri, live=True) as new,
    ):
        old.run_once()
        run_id = old.runs[lost.folder].state.run_id
        assert client.get_run(run_id).data.tags["asib.generation"] == writer_of(lost)
        lost.release()
        lost.metrics({"student/acc": 1.0}, step=1)  # covered by no checkpoint: the next worker measures it again
        first.close()
        lost.close()
        folder = lost.folder
        if copied:
            folder = tmp_path / "trials" / "0-1"
            shutil.copytree(lost.folder / "checkpoints", folder / "checkpoints")
            checkpoint = (folder / "checkpoints" / checkpoint[0].name, *checkpoint[1:])
        second.child(folder)
        found = Journal.restore(folder, text, checkpoint)
        assert not new.run_once()
        old.give_way(trainer_dead=True)
        assert not new.run_once()
        # The dead worker's delivery ends.
        old.run_once(final=True)
        old.close_unfinished()
        assert new.runs[folder].state.run_id == run_id
        assert status(client, run_id) == "RUNNING"
        assert client.get_run(run_id).data.tags["asib.generation"] == writer_of(found)
        epoch(found, 1)
        found.end("FINISHED", "completed", 0)
        second.end("FINISHED", "completed", 0)
        assert new.run_once()
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["mlflow.parentRunId"]) == ("FINISHED", parent)
    points = [(p.step, p.value) for p in client.get_metric_history(run_id, "student/acc")]
    assert points == [(0, 50.0), (1, 51.0)]
    assert len(client.search_runs([run.info.experiment_id], f"tags.`asib.journal` = '{TRIAL}'")) == 1
    assert not list(tmp_path.glob("**/delivery.takeover"))


def test_a_living_workers_delivery_gives_a_trial_to_the_one_that_goes_on_with_it(
    sqlite_uri: str, tmp_path: Path
) -> None:
    stands_for, _ = sweep(tmp_path, sqlite_uri)
    client = MlflowClient(sqlite_uri)
    first, second = worker(tmp_path / "first", stands_for), worker(tmp_path / "second", stands_for)
    journal = trial(first, tmp_path / "trials" / "0")
    with (
        DeliveryLoop(first.folder, sqlite_uri, live=True) as old,
        DeliveryLoop(second.folder, sqlite_uri, live=True) as new,
    ):
        (journal.folder / TAKEOVER).write_text(WRITER)  # of a worker that was killed while it waited
        old.run_once()
        # By hand: a request of somebody who does not write there.
        with pytest.raises(UserError, match="another process"):
            DeliveryLoop(journal.folder, sqlite_uri, client=new.client)
        (journal.folder / TAKEOVER).touch()
        old.give_way(trainer_dead=False)
        (journal.folder / TAKEOVER).unlink()
        assert journal.folder in old.runs
        journal.end("KILLED", "killed", 143)  # preempted; its worker is about to leave
        second.child(journal.folder)
        again = Journal.reopen(journal.folder)
        second.end("FINISHED", "completed", 0)
        assert not new.run_once()  # it waits for the trial
        old.give_way(trainer_dead=False)
        first.end("KILLED", "killed", 143)
        assert old.run_once()
        again.end("FINISHED", "completed", 0)
        assert new.run_once()
        run = client.get_run(new.runs[journal.folder].state.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["asib.generation"] == writer_of(again)


def two_writers(tmp_path: Path, uri: str, begun_again: bool) -> tuple[DeliveryLoop, Journal, Journal]:
    """The first writer's delivery, its journal, and the one in another folder that continues the same run."""
    first = Journal.create(tmp_path / "first", experiment="e", journal=TRIAL)
    text, (path, *of) = epoch(first, 0)
    old = DeliveryLoop(first.folder, uri, live=True)
    old.run_once()
    first.release()
    first.metrics({"student/acc": 1.0}, step=1)
    first.close()
    if begun_again:
        return old, first, Journal.create(tmp_path / "second", experiment="e", journal=TRIAL)
    second = tmp_path / "second" / "checkpoints" / path.name
    shutil.copytree(path.parent, second.parent)
    return old, first, Journal.restore(tmp_path / "second", text, (second, *of))  # type: ignore[arg-type]


class Between:
    """A client before whose call `name` something happens on the server."""

    def __init__(self, client: MlflowClient, name: str, happens: Any) -> None:
        self._client, self._name, self._happens = client, name, happens

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            self._happens()
        return getattr(self._client, name)


@pytest.mark.parametrize("begun_again", [False, True], ids=["from a checkpoint", "from nothing"])
@pytest.mark.parametrize("at", ["before", "between"])
def test_a_dead_trainers_delivery_leaves_a_run_that_another_has_taken_over(
    sqlite_uri: str, tmp_path: Path, begun_again: bool, at: str
) -> None:
    old, first, second = two_writers(tmp_path, sqlite_uri, begun_again)
    client, run_id = MlflowClient(sqlite_uri), old.top.state.run_id
    with old, DeliveryLoop(second.folder, sqlite_uri, live=True) as new:
        if at == "before":
            new.run_once()
            old.run_once(final=True)
        else:
            old.top.client = Between(client, "set_terminated", new.run_once)
        old.close_unfinished()
        assert new.top.state.run_id == run_id
        assert status(client, run_id) == "RUNNING"
        # What the first had written behind its checkpoint is not sent either.
        assert steps(client, run_id) == [0]
        second.close()
        new.run_once(final=True)
        new.close_unfinished()
    assert status(client, run_id) == "KILLED"
    # Nor does a later delivery of the first folder undo how the run has ended, even if somebody went on there off line.
    client.set_terminated(run_id, "FINISHED")
    Journal.restore(first.folder, (first.folder / FILE).read_text()).close()
    deliver([first.folder], sqlite_uri)
    assert status(client, run_id) == "FINISHED"


def test_a_forgotten_run_is_not_followed_and_never_ended_until_it_is_named_again(
    sqlite_uri: str, tmp_path: Path
) -> None:
    stands_for, parent = sweep(tmp_path, sqlite_uri)
    client = MlflowClient(sqlite_uri)
    carrier = worker(tmp_path / "worker", stands_for)
    taken, own = trial(carrier, tmp_path / "0", "b" * 32), trial(carrier, tmp_path / "1", "c" * 32)
    with DeliveryLoop(carrier.folder, sqlite_uri, live=True) as loop:
        loop.run_once()
        ids = [loop.runs[journal.folder].state.run_id for journal in (taken, own)]
        taken.metrics({"student/acc": 1.0}, step=0)
        own.metrics({"student/acc": 1.0}, step=0)
        taken.close()
        unseen = trial(carrier, tmp_path / "2", "d" * 32)
        unseen.close()
        for folder in ("0", "2"):
            loop.forget(tmp_path / "worker" / ".." / folder)
        own.close()
        carrier.close()
        loop.run_once(final=True)
        loop.close_unfinished()
        assert [status(client, run_id) for run_id in ids] == ["RUNNING", "KILLED"]
        assert [steps(client, run_id) for run_id in ids] == [[], [0]]
        assert not (unseen.folder / "delivery.json").exists()
        DeliveryLoop(taken.folder, sqlite_uri).close()  # the folder is free
        again, back = Journal.reopen(carrier.folder), Journal.reopen(taken.folder)
        again.child(taken.folder)
        back.end("FINISHED", "completed", 0)
        loop.run_once()
        assert status(client, ids[0]) == "FINISHED"
        assert status(client, parent) == "RUNNING"


def test_a_carrier_lets_go_of_all_ended_trials_but_the_newest(sqlite_uri: str, tmp_path: Path) -> None:
    stands_for, _ = sweep(tmp_path, sqlite_uri)
    client = MlflowClient(sqlite_uri)
    carrier = worker(tmp_path / "worker", stands_for)
    with DeliveryLoop(carrier.folder, sqlite_uri, live=True) as loop:
        for number in range(3):
            trial(carrier, tmp_path / str(number), str(number) * 32).end("KILLED", "killed", 143)
            loop.run_once()
        assert set(loop.runs) == {carrier.folder, tmp_path / "2"}
        assert loop.progress == sum(file.stat().st_size for file in tmp_path.glob(f"[0-2w]*/{FILE}"))
        # One of them goes on: named first, resumed after that.
        carrier.child(tmp_path / "0")
        loop.run_once()
        again = Journal.reopen(tmp_path / "0")
        again.end("FINISHED", "completed", 0)
        carrier.end("FINISHED", "completed", 0)
        assert loop.run_once()
        run = client.get_run(loop.runs[tmp_path / "0"].state.run_id)
        assert run.info.status == "FINISHED"
        assert run.data.tags["asib.generation"] == writer_of(again)
        assert tmp_path / "2" not in loop.runs
