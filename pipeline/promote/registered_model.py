"""A registered model as promotions see it, through their delivery process; imports no MLflow."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import NotThere
from pipeline.tracking.model_tags import MOVE, PAST, read_champions, read_move
from pipeline.tracking.pipe import Delivery

logger = logging.getLogger("asib")

RETIRED, ROLLED_BACK, DIGEST = "asib.retired", "asib.rolled_back", "asib.data_digest"
"""Tags of a version."""


@dataclass(frozen=True)
class Overview:
    """Aliases (name -> version) and tags of a registered model. `said`: a line for each alias that names no version."""

    aliases: Mapping[str, str]
    tags: Mapping[str, str]
    said: tuple[str, ...] = ()

    @property
    def past(self) -> list[str]:
        """Versions named by the tag `PAST`, as far as it is readable."""
        return read_champions(self.tags.get(PAST, ""))[0]

    @property
    def move(self) -> dict[str, Any] | None:
        """The move that is in progress or was interrupted, without the tags that it sets."""
        return read_move(self.tags.get(MOVE, ""))


@dataclass(frozen=True)
class Version:
    """One version; `run_id` and `model_id` are empty if MLflow does not know what it was made from."""

    number: str
    run_id: str = ""
    model_id: str = ""
    status: str = "READY"
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Waiting:
    """A promotion in the queue.

    `joined` and `seen` (its last sign of life) are by its own machine's clock; `now`, when they were read, is by this
    machine's. All in ms since 1970.
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


class Registry:
    """The registered model `name`. Every method raises UserError for what the registry refuses."""

    def __init__(self, delivery: Delivery, name: str) -> None:
        self.name = name
        self._delivery = delivery

    def ask(self, what: str, **values: Any) -> Any:
        """A request about this model: a row of `pipeline.tracking.requests.REQUESTS`."""
        return self._delivery.ask(what, name=self.name, **values)

    def overview(self) -> Overview:
        found = self.ask("overview")
        return Overview(found["aliases"], found["tags"], tuple(found["said"]))

    def version(self, number: str) -> Version:
        return Version(**self.ask("version", number=number))

    def repair(self) -> dict[str, Any] | None:
        """Finish what a promotion left half done and return its plan; warn of anything that was wrong."""
        found = self.ask("repair")
        self.warn(found["said"])
        plan: dict[str, Any] | None = found["plan"]
        return plan

    def queue(self) -> list[Waiting]:
        """Promotions of this model in order of arrival; warns of invalid entries."""
        found = self.ask("queue")
        self.warn(found["said"])
        return [Waiting(**values) for values in found["waiting"]]

    def look(self, digest: str, data: str, pair: str, turn: bool) -> int:
        """Count a look at the test set, as tracking/looks.py describes; return its number, from 1."""
        found = self.ask("count_look", digest=digest, data=data, pair=pair, turn=turn)
        self.warn(found["said"])
        if not found["counted"]:
            logger.warning("this look at the test set is not counted: you have no EDIT permission on %s", self.name)
        return int(found["number"])

    def fetch(self, number: str, to: Path) -> Path:
        """Download a version's files; return their folder, for `bundle.read`. Raises NotThere: they are gone."""
        folder = self._delivery.fetch(f"models:/{self.name}/{number}", to)
        if not any(path.is_file() for path in folder.rglob("*")):  # all that a store shows when files are gone
            raise NotThere(f"models:/{self.name}/{number} has no files")
        return folder

    def warn(self, lines: Iterable[str]) -> None:
        """Log everything that is wrong in the registry, one line each."""
        for line in lines:
            logger.warning("%s: %s", self.name, line)
