"""The consequences of a verdict: the tags that record it on its versions, and the moves of the aliases. Pure functions.

Past champions form a stack: a promotion pushes the outgoing champion, a rollback pops the top one. So two rollbacks in
a row go back two champions, and the second never restores the champion that the first removed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError
from pipeline.promote.gate import Verdict
from pipeline.promote.registered_model import RETIRED, ROLLED_BACK, Overview, Version
from pipeline.tracking.model_tags import CHAMPION, MOST_PAST, PREVIOUS

HISTORY = "asib.history"
"""Tag of a version: its history, one line per event, the latest last. Overflow goes to `asib.history.1` (the oldest
lines), `asib.history.2`, …"""
HISTORY_LENGTH = 4500


@dataclass(frozen=True)
class Occasion:
    """Who decides, in which run, when and why. `at`: UTC, such as 2025-11-20T08:41:00Z."""

    run_id: str
    user: str
    at: str
    reason: str = ""

    def words(self) -> str:
        return f"by {self.user or 'somebody'}, run {self.run_id}" + (f": {self.reason}" if self.reason else "")


def champions(overview: Overview) -> list[str]:
    """Past champions, the latest last."""
    kept, previous = overview.past, overview.aliases.get(PREVIOUS)
    stands_for_none = previous == overview.aliases.get(CHAMPION)  # left there by a user who may not delete aliases
    if previous is not None and not stands_for_none and kept[-1:] != [previous]:  # moved by hand: it counts
        kept.append(previous)
    return kept


# decisions -----------------------------------------------------------------------------------------------------------


def verdict_tags(
    verdict: Verdict, champion: Version | None, gate: str, why: Occasion, reason: str, looks: str = ""
) -> dict[str, str]:
    """The tags of a judged version; `gate`, the verdict's `reason` and `looks` at the test images are texts."""
    tags = {
        "asib.verdict": "promoted" if verdict.passed else "refused",
        "asib.verdict_reason": reason,
        "asib.decided_at": why.at,
        "asib.decided_by": why.user,
        "asib.decided_in": why.run_id,
        "asib.reason": why.reason or "none given",
        "asib.gate": gate,
        "asib.look": looks,
        "asib.against": "no champion" if champion is None else f"version {champion.number}",
        "asib.against_run": "" if champion is None else champion.run_id,
    }
    tags |= {name.replace("promotion/", "asib.promotion_"): f"{v:.6g}" for name, v in verdict.numbers.items()}
    return {key: value for key, value in tags.items() if value}


def history(version: Version, why: Occasion, line: str) -> dict[str, str]:
    """The tags that append a line to a version's history and keep all earlier ones."""
    last, new = version.tags.get(HISTORY, ""), f"{why.at} {line} {why.words()}"[:HISTORY_LENGTH]
    text = f"{last}\n{new}" if last else new
    if len(text) <= HISTORY_LENGTH:
        return {HISTORY: text}
    full = _pages(version)
    if full and version.tags[full[-1]] == last:  # an interrupted decision has already moved the overflow
        return {HISTORY: new}
    return {f"{HISTORY}.{len(full) + 1}": last, HISTORY: new}


def _pages(version: Version) -> list[str]:
    """Names of the tags with the history's overflow, the oldest first."""
    tags, count = [], 1
    while f"{HISTORY}.{count}" in version.tags:
        tags.append(f"{HISTORY}.{count}")
        count += 1
    return tags


def promotion(
    now: Overview, challenger: Version, champion: Version | None, tags: Mapping[str, str], why: Occasion
) -> dict[str, Any]:
    """The move that makes the challenger the champion, and the champion the previous one."""
    past = champions(now)
    after = {CHAMPION: challenger.number, PREVIOUS: champion.number if champion else now.aliases.get(PREVIOUS)}
    over = f"over version {champion.number}" if champion else "as the first champion"
    line = f"promoted {over}, gate {tags['asib.gate']}"
    marks = {challenger.number: {**tags, **history(challenger, why, line)}}
    if challenger.tags.get(ROLLED_BACK):
        marks[challenger.number][ROLLED_BACK] = ""  # it no longer is
    if champion is not None:
        past.append(champion.number)
        marks[champion.number] = history(champion, why, f"replaced as champion by version {challenger.number}")
    return _move(now, marks, challenger.number, f"version {challenger.number} promoted", why, after, past)


def refusal(now: Overview, challenger: Version, tags: Mapping[str, str], why: Occasion) -> dict[str, Any]:
    """The move that records a refusal; no alias changes."""
    line = f"refused against {tags['asib.against']}, gate {tags['asib.gate']} ({tags['asib.verdict_reason']})"
    marks = {challenger.number: {**tags, **history(challenger, why, line)}}
    return _move(now, marks, challenger.number, f"version {challenger.number} refused", why)


def rollback(now: Overview, versions: Mapping[str, Version], why: Occasion) -> dict[str, Any]:
    """The move that restores the previous champion; `versions`: the champion and all past ones, by number.

    Raises UserError: there is no champion, or no earlier one that is not retired.
    """
    bad = now.aliases.get(CHAMPION)
    if bad is None and not champions(now):
        raise UserError("rollback=true: there is no champion to roll back")
    left = [number for number in champions(now) if number != bad and RETIRED not in versions[number].tags]
    if not left:
        before = f"no version was champion before version {bad}" if bad else "no champion is left"
        raise UserError(f"rollback=true: {before}, or all are retired; promote another with version=<n>")
    good, past = left[-1], left[:-1]
    after = {CHAMPION: good, PREVIOUS: past[-1] if past else None}
    if bad is None:  # its version was deleted, and the alias with it
        what = f"version {good} is champion again: the champion was gone"
        marks = {good: history(versions[good], why, "champion again: the one after it was gone")}
        return _move(now, marks, good, what, why, after, past)
    marks = {
        good: history(versions[good], why, f"champion again in place of version {bad}"),
        bad: {
            **history(versions[bad], why, f"rolled back to version {good}"),
            ROLLED_BACK: f"{why.at} {why.words()}",
        },
    }
    return _move(now, marks, bad, f"version {bad} rolled back to version {good}", why, after, past)


def retirement(version: Version, now: Overview, why: Occasion) -> dict[str, Any]:
    """The move that retires a version; no alias changes. Raises UserError: it is the champion."""
    if now.aliases.get(CHAMPION) == version.number:
        raise UserError(
            f"retire={version.number}: it is the champion; promote another or roll back first, then retire it"
        )
    marks = {version.number: {RETIRED: f"{why.at} {why.words()}", **history(version, why, "retired")}}
    return _move(now, marks, version.number, f"version {version.number} retired", why)


def _move(
    now: Overview,
    tags: dict[str, dict[str, str]],
    about: str,
    what: str,
    why: Occasion,
    after: dict[str, str | None] | None = None,
    past: list[str] | None = None,
) -> dict[str, Any]:
    """A move as tracking/aliases.py takes it; without `after` no alias moves; all tags are set or none."""
    before = {alias: now.aliases.get(alias) for alias in (CHAMPION, PREVIOUS)}
    return {
        "before": before,
        "after": before if after is None else after,
        "past": (now.past if past is None else past)[-MOST_PAST:],
        "tags": tags,
        "version": about,
        "run": why.run_id,
        "why": what,
    }
