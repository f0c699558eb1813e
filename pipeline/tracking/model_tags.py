"""Tags of a registered model and of its versions, treated as texts that anybody with EDIT may have written.

Needs the standard library only: steps and delivery read them alike. A tag that a promotion could not have written is
never an error: `garbled` makes one line about it, and the promotion that has its turn repairs it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
MOVE = "asib.move"
"""Tag of a registered model while its aliases are being moved: the plan, as JSON (see aliases.py)."""
PENDING = "asib.pending"
"""Tag of the version that a move is about: the tags that the move sets. A model's tag holds 5,000 characters."""
PAST = "asib.champions"
"""Tag of a registered model: versions that were champion before the present one, as JSON, the latest last."""
TURN = "asib.turn."
"""Prefix of a registered model's tags, each completed by the id of a waiting promotion's run (see turns.py)."""
LOOKS, LOOK = "asib.looks.", "asib.look."
"""Prefixes of a registered model's tags that count looks at a test set (see looks.py)."""
QUEUE = "asib.promote"
"""Tag of a promotion's run: the registered model that it is about."""
KEEP = "asib.keep"
"""Tag of a run that must not be cleaned up: it made a champion."""
TAG_LENGTH = 5000
"""Characters that a registered model's tag holds in a database; a version's holds more."""
MOST_PAST = 100
"""Number of past champions that rollbacks can reach."""

_VERSION = re.compile(r"[1-9][0-9]{0,9}")
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_LOOK = re.compile(r"[1-9][0-9]{0,9}-[1-9][0-9]{0,9}")


@dataclass(frozen=True)
class Turn:
    """A promotion that waits for its turn. Both times in ms since 1970, by its own machine's clock."""

    joined: int
    seen: int
    user: str


def garbled(tag: str, value: str, done: str) -> str:
    """The one line about a tag that no promotion writes; `done`: what became of it."""
    shown = value if len(value) <= 60 else f"{value[:60]}…"
    return f"tag {tag}={shown!r} is not what a promotion writes: {done}"


def is_version(value: object) -> bool:
    """Whether this is the number of a version, as text."""
    return isinstance(value, str) and _VERSION.fullmatch(value) is not None


def read_move(text: str) -> dict[str, Any] | None:
    """The plan in `MOVE`; None if it is not a plan."""
    plan = _json(text)
    if not isinstance(plan, dict):
        return None
    sides = [plan.get("before"), plan.get("after")]
    past, tags = plan.get("past"), plan.setdefault("tags", {})
    whole = (
        all(
            isinstance(s, dict) and all(s.get(a) is None or is_version(s[a]) for a in (CHAMPION, PREVIOUS))
            for s in sides
        )
        and isinstance(past, list)
        and all(map(is_version, past))
        and _are_version_tags(tags)
        and all(isinstance(plan.get(key), str) for key in ("run", "why"))
    )
    return plan if whole else None


def read_pending(text: str, run: str) -> dict[str, dict[str, str]] | None:
    """Version -> tags in `PENDING`, as left by the promotion `run`; None if it left none."""
    found = _json(text)
    good = isinstance(found, dict) and found.get("run") == run and _are_version_tags(found.get("tags"))
    return found["tags"] if good else None


def read_champions(text: str) -> tuple[list[str], bool]:
    """The versions in `PAST`, and whether it is whole: anything else is left out."""
    if not text:
        return [], True
    found = _json(text)
    if not isinstance(found, list):
        return [], False
    kept = [str(item) for item in found if is_version(str(item)) and not isinstance(item, bool)]
    return kept, len(kept) == len(found)


def read_turn(tag: str, text: str) -> Turn | None:
    """The promotion in a tag of the queue; None if it is not a promotion's."""
    found = _json(text)
    if _RUN_ID.fullmatch(tag.removeprefix(TURN)) is None or not isinstance(found, dict):
        return None
    joined, seen, user = (found.get(key) for key in ("joined", "seen", "user"))
    whole = all(type(at) is int and 0 <= at < 2**53 for at in (joined, seen)) and isinstance(user, str)
    return Turn(joined, seen, " ".join(user.split())[:100]) if whole else None  # type: ignore[arg-type, union-attr]


def read_looks(text: str) -> tuple[list[str], bool]:
    """The pairs in a tag `LOOKS`, each once, in their order, and whether it is whole."""
    words = text.split()
    return unique(word for word in words if is_look(word)), all(map(is_look, words))


def is_look(pair: str) -> bool:
    """Whether this is a pair of versions, such as 7-3: challenger 7 against champion 3."""
    return _LOOK.fullmatch(pair) is not None


def unique(items: Iterable[str]) -> list[str]:
    """Each item once, in the order given."""
    return list(dict.fromkeys(items))


def _are_version_tags(found: object) -> bool:
    return isinstance(found, dict) and all(
        is_version(number) and isinstance(tags, dict) and all(isinstance(t, str) for t in tags.values())
        for number, tags in found.items()
    )


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
