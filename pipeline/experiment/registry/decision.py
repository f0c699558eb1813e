"""What follows from a verdict: the tags that keep a decision with its versions, and the moves of the aliases. Pure.

Past champions form a stack. A promotion puts the champion that goes on it, a rollback takes the top one off: so two
rollbacks in a row go two champions back, and the second never brings back what the first has just taken away.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError
from pipeline.experiment.registry.gate import Verdict
from pipeline.experiment.registry.remote import CHAMPION, PAST, PREVIOUS, RETIRED, ROLLED_BACK, Overview, Version

HISTORY = "asib.history"
"""Tag of a version: what has happened to it, a line each, the latest last."""
HISTORY_LENGTH = 4500


@dataclass(frozen=True)
class Occasion:
    """Who decides what, when and why. `at`: UTC, such as 2025-11-20T08:41:00Z."""

    run_id: str
    user: str
    at: str
    reason: str = ""

    def words(self) -> str:
        return f"by {self.user or 'somebody'}, run {self.run_id}" + (f": {self.reason}" if self.reason else "")


def champions(overview: Overview) -> list[str]:
    """Versions that were champion before the present one, the latest last."""
    kept = json.loads(overview.tags.get(PAST) or "[]")
    previous = overview.aliases.get(PREVIOUS)
    if previous is not None and kept[-1:] != [previous]:  # somebody has moved the alias by hand: it counts
        kept.append(previous)
    return [str(number) for number in kept]


# decisions -----------------------------------------------------------------------------------------------------------


def verdict_tags(verdict: Verdict, champion: Version | None, gate: str, why: Occasion, reason: str) -> dict[str, str]:
    """What a version is tagged with when it was judged; `reason`: of the verdict, in words."""
    tags = {
        "asib.verdict": "promoted" if verdict.passed else "refused",
        "asib.verdict_reason": reason,
        "asib.decided_at": why.at,
        "asib.decided_by": why.user,
        "asib.decided_in": why.run_id,
        "asib.reason": why.reason or "none given",
        "asib.gate": gate,
        "asib.against": "no champion" if champion is None else f"version {champion.number}",
        "asib.against_run": "" if champion is None else champion.run_id,
    }
    tags |= {name.replace("promotion/", "asib.promotion_"): f"{v:.6g}" for name, v in verdict.numbers.items()}
    return {key: value for key, value in tags.items() if value}


def history(version: Version, why: Occasion, line: str) -> dict[str, str]:
    """The version's history with one more line; the oldest lines go when it becomes too long."""
    lines = [*version.tags.get(HISTORY, "").splitlines(), f"{why.at} {line} {why.words()}"]
    while len("\n".join(lines)) > HISTORY_LENGTH and len(lines) > 1:
        del lines[0]
    return {HISTORY: "\n".join(lines)[:HISTORY_LENGTH]}


def promotion(
    now: Overview, challenger: Version, champion: Version | None, tags: Mapping[str, str], why: Occasion
) -> dict[str, Any]:
    """The move that makes the challenger champion and the champion previous."""
    past = champions(now)
    older = [] if champion is None else [champion.number]
    after = {CHAMPION: challenger.number, PREVIOUS: champion.number if champion else now.aliases.get(PREVIOUS)}
    over = f"over version {champion.number}" if champion else "as the first champion"
    marks = {challenger.number: {**tags, **history(challenger, why, f"promoted {over}")}}
    if challenger.tags.get(ROLLED_BACK):
        marks[challenger.number][ROLLED_BACK] = ""  # it is no longer
    if champion is not None:
        marks[champion.number] = history(champion, why, f"replaced as champion by version {challenger.number}")
    return _move(now, after, [*past, *older], marks, f"version {challenger.number} promoted", why)


def rollback(now: Overview, versions: Mapping[str, Version], why: Occasion) -> dict[str, Any]:
    """The move that makes the previous champion champion again.

    Args:
        versions: of the champion and of all past ones.

    Raises:
        UserError: there is no champion, or none before it that is not retired.
    """
    bad = now.aliases.get(CHAMPION)
    if bad is None:
        raise UserError("rollback=true: there is no champion to roll back")
    left = [number for number in champions(now) if number != bad and RETIRED not in versions[number].tags]
    if not left:
        raise UserError(
            f"rollback=true: no version was champion before version {bad}, or all are retired; promote another with "
            "version=<n>"
        )
    good, past = left[-1], left[:-1]
    after = {CHAMPION: good, PREVIOUS: past[-1] if past else None}
    marks = {
        good: history(versions[good], why, f"champion again in place of version {bad}"),
        bad: {
            **history(versions[bad], why, f"rolled back to version {good}"),
            ROLLED_BACK: f"{why.at} {why.words()}",
        },
    }
    return _move(now, after, past, marks, f"version {bad} rolled back to version {good}", why)


def _move(
    now: Overview,
    after: Mapping[str, str | None],
    past: Iterable[str],
    tags: Mapping[str, Mapping[str, str]],
    what: str,
    why: Occasion,
) -> dict[str, Any]:
    before = {alias: now.aliases.get(alias) for alias in (CHAMPION, PREVIOUS)}
    marks = {number: dict(values) for number, values in tags.items()}
    past = list(past)[-100:]
    return {"before": before, "after": dict(after), "past": past, "tags": marks, "run": why.run_id, "why": what}


def retirement(version: Version, now: Overview, why: Occasion) -> dict[str, str]:
    """The tags that retire a version. Raises UserError: it is the champion."""
    if now.aliases.get(CHAMPION) == version.number:
        raise UserError(
            f"retire={version.number}: it is the champion; promote another or roll back first, then retire it"
        )
    return {RETIRED: f"{why.at} {why.words()}", **history(version, why, "retired")}
