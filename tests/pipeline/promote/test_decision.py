"""Decisions: which aliases move, what is kept of them, and rollbacks that go one champion further back each."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.compose.cli import Command
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.promote import decision, request
from pipeline.promote.decision import Occasion
from pipeline.promote.gate import Criterion, Verdict
from pipeline.promote.registered_model import Overview, Version
from pipeline.tracking.model_tags import PAST
from tests.pipeline.promote.history import history

JUDGED = {"asib.verdict": "promoted", "asib.gate": "default with alpha=0.999 (0.05)"}
WHY = Occasion("r" * 32, "ada", "2025-11-20T08:41:00Z", "looks good")


class Model:
    """Aliases and tags as moves leave them."""

    def __init__(self, versions: int) -> None:
        self.tags: dict[str, dict[str, str]] = {str(n): {} for n in range(1, versions + 1)}
        self.aliases: dict[str, str] = {}
        self.past = "[]"

    @property
    def now(self) -> Overview:
        return Overview(self.aliases, {PAST: self.past})

    def version(self, number: str) -> Version:
        return Version(number, run_id=f"run {number}", tags=self.tags[number])

    def apply(self, move: dict[str, Any]) -> None:
        assert move["before"] == {a: self.aliases.get(a) for a in ("champion", "previous")}
        self.aliases = {a: n for a, n in {**self.aliases, **move["after"]}.items() if n is not None}
        self.past = json.dumps(move["past"])
        for number, tags in move["tags"].items():
            self.tags[number] = {**self.tags[number], **tags}

    def promote(self, number: str) -> None:
        champion = self.aliases.get("champion")
        one = None if champion is None else self.version(champion)
        self.apply(decision.promotion(self.now, self.version(number), one, JUDGED, WHY))

    def roll_back(self) -> None:
        self.apply(decision.rollback(self.now, {n: self.version(n) for n in self.tags}, WHY))


def test_two_rollbacks_go_two_champions_back() -> None:
    model = Model(3)
    for number in "123":
        model.promote(number)
    assert model.aliases == {"champion": "3", "previous": "2"}
    model.roll_back()
    assert model.aliases == {"champion": "2", "previous": "1"}
    model.roll_back()
    assert model.aliases == {"champion": "1"}
    with pytest.raises(UserError, match="no version was champion before version 1"):
        model.roll_back()
    model.promote("3")
    assert model.aliases == {"champion": "3", "previous": "1"}
    assert not model.tags["3"][decision.ROLLED_BACK]
    assert [line.split(" ", 1)[1].split(" by ")[0] for line in model.tags["3"][decision.HISTORY].splitlines()] == [
        "promoted over version 2, gate default with alpha=0.999 (0.05)",
        "rolled back to version 2",
        "promoted over version 1, gate default with alpha=0.999 (0.05)",
    ]


def test_a_rollback_passes_over_what_is_retired_and_heeds_an_alias_set_by_hand() -> None:
    model = Model(4)
    for number in "123":
        model.promote(number)
    before = dict(model.aliases)
    model.apply(decision.retirement(model.version("2"), model.now, WHY))
    assert model.aliases == before
    model.roll_back()
    assert model.aliases == {"champion": "1"}
    model.promote("3")
    model.aliases["previous"] = "4"
    model.roll_back()
    assert model.aliases == {"champion": "4", "previous": "1"}
    with pytest.raises(UserError, match="retire=4: it is the champion"):
        decision.retirement(model.version("4"), model.now, WHY)


def test_a_decision_is_kept_with_its_numbers() -> None:
    verdict = Verdict(
        (Criterion("improvement", -1.0, 0.0, False, True, "points", "worse"),), {"promotion/p_value": 0.0123456789}
    )
    champion = Version("2", run_id="c" * 32)
    tags = decision.verdict_tags(verdict, champion, "default", WHY, "it is worse")
    assert tags == {
        "asib.verdict": "refused",
        "asib.verdict_reason": "it is worse",
        "asib.decided_at": WHY.at,
        "asib.decided_by": "ada",
        "asib.decided_in": WHY.run_id,
        "asib.reason": "looks good",
        "asib.gate": "default",
        "asib.against": "version 2",
        "asib.against_run": "c" * 32,
        "asib.promotion_p_value": "0.0123457",
    }


def test_a_history_of_120_lines_is_kept_whole_wherever_a_decision_breaks_off() -> None:
    """25 of 120 lines were. Every seventh decision turns its page, and breaks off before it has written its line."""
    model, lines = Model(1), [f"refused against version 2 for the {k}th time {'x' * 100}" for k in range(120)]
    for k, line in enumerate(lines):
        tags = decision.history(model.version("1"), WHY, line)
        assert all(len(text) <= 4500 for text in tags.values())
        if k % 7 == 0:
            model.tags["1"] |= {name: text for name, text in tags.items() if name != "asib.history"}
            tags = decision.history(model.version("1"), WHY, line)
        model.tags["1"] |= tags
    kept = history(model.tags["1"])
    assert [line.split(" ", 1)[1].removesuffix(f" {WHY.words()}") for line in kept] == lines
    assert model.tags["1"]["asib.history"].endswith(f"{lines[-1]} {WHY.words()}")


def test_a_deleted_champion_is_no_dead_end() -> None:
    """MLflow takes the alias with the version: the one before it becomes champion again."""
    model = Model(3)
    for number in "12":
        model.promote(number)
    del model.aliases["champion"]
    model.roll_back()
    assert model.aliases == {"champion": "1"}
    assert "the one after it was gone" in model.tags["1"][decision.HISTORY]
    del model.aliases["champion"]
    with pytest.raises(UserError, match="there is no champion to roll back"):
        model.roll_back()


def test_previous_that_stands_at_the_champion_is_none() -> None:
    """Whoever may not delete an alias leaves it there: the champion is not pushed on its own stack."""
    now = Overview({"champion": "1", "previous": "1"}, {PAST: "[]"})
    assert decision.champions(now) == []
    after = decision.promotion(now, Version("2"), Version("1"), JUDGED, WHY)
    assert (after["past"], after["after"]) == (["1"], {"champion": "2", "previous": "1"})


@pytest.mark.parametrize(
    ("own", "needle"),
    [
        ({}, "name is not set"),
        ({"name": "a/b"}, "name=a/b"),
        ({"name": "m", "version": "v2"}, "version=v2"),
        ({"name": "m", "retire": "0"}, "retire=0"),
        ({"name": "m", "rollback": "maybe"}, "rollback=maybe: give true or false"),
        ({"name": "m", "rollback": "true", "version": "2"}, "version=2 and rollback=true exclude each other"),
        ({"name": "m", "gate": "strict"}, "gate=strict"),
        ({"name": "m", "rollback": "true", "gate.alpha": "0.1"}, "rollback needs no gate"),
        ({"name": "m", "retire": "3", "gate": "default"}, "retire needs no gate"),
        ({"name": "m", "reason": "x" * 501}, "reason has 501 characters"),
        ({"name": "m", "gate.alpha": "-1"}, "gate.alpha"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_starts(own: dict[str, str], needle: str) -> None:
    with pytest.raises(UserError) as refused:
        request.read(Config(), Command(own=own))
    assert needle in str(refused.value)
    with pytest.raises(UserError, match="tracking=offline"):
        request.read(Config.model_validate({"tracking": {"mode": "offline"}}), Command(own={"name": "m"}))
