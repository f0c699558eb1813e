"""Decisions: which aliases move, what is kept of them, and rollbacks that go one champion further back each."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.experiment.registry import decision, plan
from pipeline.experiment.registry.decision import Occasion
from pipeline.experiment.registry.gate import Criterion, Verdict
from pipeline.experiment.registry.remote import Overview, Version

WHY = Occasion("r" * 32, "ada", "2025-11-20T08:41:00Z", "looks good")


class Model:
    """Aliases and tags as moves leave them."""

    def __init__(self, versions: int) -> None:
        self.tags: dict[str, dict[str, str]] = {str(n): {} for n in range(1, versions + 1)}
        self.aliases: dict[str, str] = {}
        self.past = "[]"

    @property
    def now(self) -> Overview:
        return Overview(self.aliases, {decision.PAST: self.past})

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
        self.apply(decision.promotion(self.now, self.version(number), one, {"asib.verdict": "promoted"}, WHY))

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
        "promoted over version 2",
        "rolled back to version 2",
        "promoted over version 1",
    ]


def test_a_rollback_passes_over_what_is_retired_and_heeds_an_alias_set_by_hand() -> None:
    model = Model(4)
    for number in "123":
        model.promote(number)
    model.tags["2"] |= decision.retirement(model.version("2"), model.now, WHY)
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
    version = Version("3", tags={decision.HISTORY: "\n".join(["x" * 99] * 60)})
    long = decision.history(version, WHY, "refused")[decision.HISTORY]
    assert len(long) <= decision.HISTORY_LENGTH
    assert long.splitlines()[-1] == f"{WHY.at} refused by ada, run {WHY.run_id}: looks good"


@pytest.mark.parametrize(
    ("own", "needle"),
    [
        ({}, "name is not set"),
        ({"name": "a/b"}, "name=a/b"),
        ({"name": "m", "version": "v2"}, "version=v2"),
        ({"name": "m", "retire": "0"}, "retire=0"),
        ({"name": "m", "rollback": "yes"}, "rollback=yes: give true or false"),
        ({"name": "m", "rollback": "true", "version": "2"}, "version=2 and rollback=true exclude each other"),
        ({"name": "m", "gate": "strict"}, "gate=strict"),
        ({"name": "m", "gate.alpha": "-1"}, "gate.alpha"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_starts(own: dict[str, str], needle: str) -> None:
    with pytest.raises(UserError) as refused:
        plan.make(Config(), own)
    assert needle in str(refused.value)
    with pytest.raises(UserError, match="tracking=offline"):
        plan.make(Config.model_validate({"tracking": {"mode": "offline"}}), {"name": "m"})
