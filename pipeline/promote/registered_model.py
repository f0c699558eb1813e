"""A registered model as promotions see it, through their delivery process; imports no MLflow."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import NotThere
from pipeline.tracking.deliver import Delivery
from pipeline.tracking.model_tags import (
    CHALLENGER,
    CHAMPION,
    MOST_PAST,
    MOVE,
    PAST,
    PREVIOUS,
    is_version,
    read_champions,
    read_move,
)

logger = logging.getLogger("asib")

RETIRED, ROLLED_BACK, DIGEST = "asib.retired", "asib.rolled_back", "asib.data_digest"
"""Tags of a version."""

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "DIGEST",
    "MOST_PAST",
    "MOVE",
    "PAST",
    "PREVIOUS",
    "RETIRED",
    "ROLLED_BACK",
    "Look",
    "Overview",
    "Registry",
    "Version",
    "Waiting",
    "is_version",
]


@dataclass(frozen=True)
class Overview:
    """Aliases (name -> version) and tags of a registered model. `said`: a line for each alias that names no version."""

    aliases: Mapping[str, str]
    tags: Mapping[str, str]
    said: tuple[str, ...] = ()

    @property
    def past(self) -> list[str]:
        """Versions that the tag `PAST` names, as far as it can be read."""
        return read_champions(self.tags.get(PAST, ""))[0]

    @property
    def move(self) -> dict[str, Any] | None:
        """The move that is under way or was interrupted, without the tags that it sets."""
        return read_move(self.tags.get(MOVE, ""))


@dataclass(frozen=True)
class Version:
    """One version; `run_id` and `model_id` are empty where MLflow does not know what it was made of."""

    number: str
    run_id: str = ""
    model_id: str = ""
    status: str = "READY"
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Waiting:
    """A promotion in the queue.

    `joined` and `seen`, when it last said that it lives: by its own machine's clock; `now`: when that was read, by this
    one's. All in ms since 1970.
    """

    run_id: str
    user: str
    joined: int
    seen: int
    now: int

    @property
    def silent_s(self) -> float:
        """Seconds between its clock's last sign of life and now; a clock that is ahead counts as one that is behind."""
        return abs(self.now - self.seen) / 1000.0


@dataclass(frozen=True)
class Look:
    """Which look at a test set one is, from 1; `counted`: whether later ones know of it."""

    number: int
    counted: bool


class Registry:
    """The registered model `name`. Every method raises UserError for what the registry refuses."""

    def __init__(self, delivery: Delivery, name: str) -> None:
        self.name = name
        self._delivery = delivery

    def overview(self) -> Overview:
        found = self._ask("overview")
        return Overview(found["aliases"], found["tags"], tuple(found["said"]))

    def version(self, number: str) -> Version:
        return Version(**self._ask("version", number=number))

    def move(self, plan: Mapping[str, Any]) -> None:
        """Move aliases, and set the tags of versions that go with it, as tracking/moves.py says."""
        self._ask("move", plan=dict(plan))

    def repair(self) -> dict[str, Any] | None:
        """Finish what a promotion has left half done; its plan, None where there was nothing. Says what was amiss."""
        found = self._ask("repair")
        self.say(found["said"])
        plan: dict[str, Any] | None = found["plan"]
        return plan

    def may_edit(self) -> None:
        """Raise UserError if this user may not promote."""
        self._ask("may_edit")

    def enter(self, run_id: str, user: str = "") -> None:
        """Join the queue."""
        self._ask("enter", run_id=run_id, user=user)

    def beat(self, run_id: str) -> None:
        """Say that the run is still alive. Raises UserError: it was taken for dead."""
        self._ask("beat", run_id=run_id)

    def leave(self, run_id: str) -> None:
        """Out of the queue."""
        self._ask("leave", run_id=run_id)

    def queue(self) -> list[Waiting]:
        """Promotions of this model, the first to come first; says what in the queue is none."""
        found = self._ask("queue")
        self.say(found["said"])
        return [Waiting(**values) for values in found["waiting"]]

    def bury(self, run_id: str) -> None:
        """Take a promotion whose machine is gone out of the queue, and end its run."""
        self._ask("bury", run_id=run_id)

    def look(self, digest: str, data: str, pair: str, turn: bool) -> Look:
        """Count a look at the test set, as tracking/looks.py says."""
        found = self._ask("look", digest=digest, data=data, pair=pair, turn=turn)
        self.say(found["said"])
        return Look(found["number"], found["counted"])

    def fetch(self, number: str, to: Path) -> Path:
        """Download a version's files; their folder, for `bundle.read`. Raises NotThere: they are gone."""
        folder = self._delivery.fetch(f"models:/{self.name}/{number}", to)
        if not any(path.is_file() for path in folder.rglob("*")):  # a store says no more of what is gone
            raise NotThere(f"models:/{self.name}/{number} has no files")
        return folder

    def bind(self, number: str, manifest: str) -> None:
        """Tag a version with the manifest of its files."""
        self._ask("bind", number=number, manifest=manifest)

    def say(self, lines: Iterable[str]) -> None:
        """What is not as it should be in the registry, each in one line."""
        for line in lines:
            logger.warning("%s: %s", self.name, line)

    def _ask(self, what: str, **values: Any) -> Any:
        return self._delivery.registry(what, name=self.name, **values)
