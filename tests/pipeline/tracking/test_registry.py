"""Versions are made once, aliases are moved whole, and promotions form a queue: on a real store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from mlflow.tracking import MlflowClient

from pipeline.errors import UserError
from pipeline.journal import Journal
from pipeline.promote.registered_model import Registry
from pipeline.tracking import looks, server
from pipeline.tracking.aliases import move, repair
from pipeline.tracking.deliver import deliver
from pipeline.tracking.follow import DeliveryLoop
from tests.pipeline.promote.local import Broken, Fragile, LocalDelivery, record, registered

NAME = "birds and trees"
TAGS = {"asib.data_digest": "d" * 64, "asib.val_acc": "71.50"}


def versions(client: MlflowClient) -> list[Any]:
    return sorted(client.search_model_versions(f"name = '{NAME}'"), key=lambda v: int(v.version))


def aliases(client: MlflowClient) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model(NAME).aliases.items()}


# versions ------------------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_registering_survives_a_crash_at_every_step(sqlite_uri: str, tmp_path: Path, after: bool) -> None:
    steps = 0
    for step in range(1, 100):
        folder = tmp_path / f"run {step}"
        record(folder, NAME, {"student.safetensors": b"weights"}, TAGS)
        fragile = Fragile(MlflowClient(sqlite_uri), step, after)
        with DeliveryLoop(folder, sqlite_uri, client=fragile) as loop:
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
    journal = Journal.create(tmp_path / "run", experiment="e")
    journal.register(NAME, model="student", alias="challenger")
    journal.metrics({"after": 1.0}, 0)
    journal.end("FINISHED", "completed", 0)
    (done,) = deliver([tmp_path / "run"], sqlite_uri)
    assert done.refused == 1
    assert MlflowClient(sqlite_uri).get_run(done.run_id).data.metrics["after"] == 1.0
    assert versions(MlflowClient(sqlite_uri)) == []


# aliases -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_versions(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registered model with three versions; the first is champion."""
    file = Path(shutil.copy(sqlite_template, tmp_path_factory.mktemp("registry")))
    made = MlflowClient(f"sqlite:///{file}")
    made.create_registered_model(NAME)
    for number in range(3):
        made.create_model_version(NAME, f"file:///nowhere/{number}")
    made.set_registered_model_alias(NAME, "champion", "1")
    return file


@pytest.fixture
def client(sqlite_uri: str, three_versions: Path) -> MlflowClient:
    shutil.copyfile(three_versions, sqlite_uri.removeprefix("sqlite:///"))
    return server.connect(sqlite_uri)


PLAN: dict[str, Any] = {
    "before": {"champion": "1", "previous": None},
    "after": {"champion": "2", "previous": "1"},
    "past": ["1"],
    "tags": {"2": {"asib.verdict": "promoted"}, "1": {"asib.history": "replaced"}},
    "version": "2",
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


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("plan", "undo"), [(PLAN, BACK), (BACK, PLAN)], ids=["promotion", "rollback"])
def test_a_move_that_breaks_off_anywhere_is_finished_by_the_next_call(
    client: MlflowClient, plan: dict[str, Any], undo: dict[str, Any], after: bool
) -> None:
    move(client, NAME, PLAN)
    assert state(client) == (
        {"champion": "2", "previous": "1"},
        {"asib.champions": '["1"]'},
        [{"asib.history": "replaced"}, {"asib.verdict": "promoted"}, {}],
    )
    move(client, NAME, BACK)
    assert state(client)[:2] == ({"champion": "1"}, {"asib.champions": "[]"})
    start, goal = ({alias: version for alias, version in plan[when].items() if version} for when in ("before", "after"))
    broken = 0
    for step in range(1, 30):
        if aliases(client) != start:
            move(client, NAME, undo)
        try:
            move(Fragile(client, step, after), NAME, plan)
            break
        except Broken:
            broken += 1
        assert aliases(client)["champion"] in ("1", "2"), "never without a champion"
        repaired = repair(client, NAME)["plan"]
        if repaired is None:  # it had not begun, or lacked only the last answer
            assert aliases(client) in (start, goal)
            assert broken <= 2 or aliases(client) == goal
        else:
            assert repaired | {"tags": plan["tags"]} == plan
            found = dict(zip("123", state(client)[2], strict=True))
            assert all(found[number].items() >= values.items() for number, values in plan["tags"].items())
            assert aliases(client) == goal
        assert repair(client, NAME) == {"plan": None, "said": []}
        assert "asib.move" not in client.get_registered_model(NAME).tags
    assert broken >= 5
    assert aliases(client) == goal


def test_a_champion_set_by_hand_is_left_alone(client: MlflowClient) -> None:
    with pytest.raises(UserError, match="somebody else has moved it"):
        move(client, NAME, BACK)
    with pytest.raises(Broken):
        move(Fragile(client, 3), NAME, PLAN)
    client.set_registered_model_alias(NAME, "champion", "3")
    found = repair(client, NAME)
    assert (found["plan"], len(found["said"])) == (None, 1)
    assert "set by hand" in found["said"][0]
    assert state(client)[:2] == ({"champion": "3"}, {})


def test_what_is_not_there_is_said_in_one_line(client: MlflowClient, sqlite_uri: str) -> None:
    registry = Registry(LocalDelivery(None, sqlite_uri), "birds and treees")
    with pytest.raises(UserError, match="did you mean birds and trees") as refused:
        registry.overview()
    assert "\n" not in str(refused.value)
    registry.name = NAME
    with pytest.raises(UserError, match="version=7: birds and trees has no such version; it has 1, 2, 3"):
        registry.version("7")


# what others have left, or taken away --------------------------------------------------------------------------------


def test_a_move_that_is_none_is_said_and_removed(client: MlflowClient) -> None:
    for value in ("abc", "[]", "null", '{"after": 3}', '{"before": {}, "after": {"champion": "x"}}'):
        client.set_registered_model_tag(NAME, "asib.move", value)
        found = repair(client, NAME)
        assert (found["plan"], len(found["said"])) == (None, 1)
        assert found["said"][0].startswith(f"tag asib.move={value!r} is not what a promotion writes")
        assert state(client)[:2] == ({"champion": "1"}, {})


def test_past_champions_are_kept_as_far_as_they_can_be_read(client: MlflowClient) -> None:
    for value, kept in (("abc", []), ('{"1": 2}', []), ('["3", null, "x", 2, [1]]', ["3", "2"]), ("[" * 4000, [])):
        client.set_registered_model_tag(NAME, "asib.champions", value)
        (line,) = repair(client, NAME)["said"]
        assert line.startswith("tag asib.champions=")
        assert "\n" not in line
        assert json.loads(client.get_registered_model(NAME).tags["asib.champions"]) == kept
    assert repair(client, NAME)["said"] == []


UNDONE = "an interrupted move (version 2 promoted) is undone: version 2 is no longer there; "
GONE: dict[str, tuple[dict[str, Any], str, str, str | None]] = {
    "new champion": (PLAN, "2", UNDONE + "version 1 is the champion", "1"),
    "old champion": (PLAN, "1", "version 1 is no longer there: previous is none", "2"),
    "rollback's": (BACK, "1", UNDONE.replace("version 2 is", "version 1 is") + "version 2 is the champion", "2"),
    "both": (PLAN, "12", UNDONE + "there is no champion", None),
}


@pytest.mark.parametrize(("plan", "deleted", "said", "champion"), GONE.values(), ids=GONE)
def test_a_half_done_move_whose_version_was_deleted_is_completed_or_undone(
    client: MlflowClient, plan: dict[str, Any], deleted: str, said: str, champion: str | None
) -> None:
    if plan is BACK:
        move(client, NAME, PLAN)
    with pytest.raises(Broken):  # when everything was said, and nothing was moved
        move(Fragile(client, 3), NAME, plan)
    assert "asib.move" in client.get_registered_model(NAME).tags
    for number in deleted:
        client.delete_model_version(NAME, number)  # with its aliases
    assert repair(client, NAME)["said"] == [said]
    assert client.get_registered_model(NAME).tags == {"asib.champions": "[]"}
    if champion is not None:
        assert aliases(client) == {"champion": champion}
        tags = {"1": {}, "2": {"asib.verdict": "promoted"}}[champion]
        assert client.get_model_version(NAME, champion).tags == tags, "nothing was replaced"
    else:  # and nothing is in the way
        assert aliases(client) == {}
        move(client, NAME, PLAN | {"before": {"champion": None}, "after": {"champion": "3", "previous": None},
                                         "tags": {}, "version": "3"})  # fmt: skip
        assert aliases(client) == {"champion": "3"}


def test_what_a_move_writes_on_the_model_fits_a_database(client: MlflowClient) -> None:
    """PostgreSQL keeps 5,000 characters of a registered model's tag: SQLite does not mind, and tells nobody."""
    history = {"asib.history": "x" * 4500, "asib.verdict_reason": "y" * 4000}
    plan = PLAN | {"tags": {"1": history, "2": history}, "past": ["1234567"] * 100, "why": "z" * 3000}
    with mock.patch.object(client, "set_registered_model_tag", wraps=client.set_registered_model_tag) as written:
        move(client, NAME, plan)
    assert 0 < max(len(call.args[-1]) for call in written.call_args_list) <= 5000
    assert {n: dict(client.get_model_version(NAME, n).tags) for n in "12"} == plan["tags"]


class Forbidding:
    """A client whose user may make no call that begins so."""

    def __init__(self, client: MlflowClient, *names: str) -> None:
        self._client, self._names = client, names

    def __getattr__(self, name: str) -> Any:
        return self._refuse if name.startswith(self._names) else getattr(self._client, name)

    def _refuse(self, *_: object) -> None:
        raise MlflowException("Permission denied", error_code=PERMISSION_DENIED)


def test_who_may_not_delete_an_alias_leaves_it_at_the_champion(client: MlflowClient) -> None:
    """EDIT permission: it sets everything, and deletes no more than the model's own tags."""
    editor: Any = Forbidding(client, "delete_registered_model_alias", "delete_model_version_tag")
    move(editor, NAME, PLAN)
    move(editor, NAME, BACK)
    assert aliases(client) == {"champion": "1", "previous": "1"}
    assert client.get_model_version(NAME, "2").tags["asib.pending"] == ""
    assert repair(client, NAME) == {"plan": None, "said": []}


# looks ---------------------------------------------------------------------------------------------------------------

TEST, DATA = "0123456789abcdef" * 4, "d" * 64


def look(client: Any, pair: str, turn: bool = True, digest: str = TEST) -> tuple[int, bool, int]:
    found = looks.count_look(client, NAME, digest, DATA, pair, turn)
    return found["number"], found["counted"], len(found["said"])


def test_every_pair_is_a_look_of_its_own_and_counts_once(client: MlflowClient) -> None:
    assert [look(client, pair) for pair in ("2-1", "3-1", "2-1", "3-2")] == [(n, True, 0) for n in (1, 2, 1, 3)]
    assert look(client, "4-2", turn=False) == (4, True, 0), "a dry run sees the same numbers"
    assert look(client, "5-2", turn=False) == (5, True, 0)
    assert look(client, "4-2") == (4, True, 0), "and the promotion that follows it looks at them again"
    assert look(client, "6-2") == (6, True, 0)
    assert client.get_registered_model(NAME).tags == {"asib.looks.0123456789abcdef": "2-1 3-1 3-2 4-2 5-2 6-2"}
    assert look(client, "6-2", digest="f" * 64) == (1, True, 0), "a fresh test set"


def test_garbage_among_the_looks_is_one_line_and_the_versions_tell(client: MlflowClient) -> None:
    for number, at in (("3", "2026-01-02"), ("2", "2026-01-01")):
        tags = {"asib.verdict": "refused", "asib.against": "version 1", "asib.data_digest": DATA, "asib.decided_at": at}
        for key, value in tags.items():
            client.set_model_version_tag(NAME, number, key, value)
    assert look(client, "4-1") == (3, True, 0), "judged before looks were counted"
    client.set_registered_model_tag(NAME, "asib.looks.0123456789abcdef", "abc 4-1 99999999999999")
    client.set_registered_model_tag(NAME, "asib.look.0123456789abcdef.abc", "dry run")
    assert look(client, "5-1") == (4, True, 1)
    assert client.get_registered_model(NAME).tags["asib.looks.0123456789abcdef"] == "4-1 2-1 3-1 5-1"


def test_who_may_only_read_looks_uncounted(client: MlflowClient) -> None:
    look(client, "2-1")
    assert look(Forbidding(client, "set_", "delete_"), "3-1", turn=False) == (2, False, 0)
    assert look(client, "4-1") == (2, True, 0)
