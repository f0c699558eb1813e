"""A registered model as promotions see it, through their delivery process; imports no MLflow."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.experiment.delivery.registry import CHALLENGER, CHAMPION, MOVE, PAST, PREVIOUS
from pipeline.experiment.tracking import Delivery

RETIRED, ROLLED_BACK, DIGEST = "asib.retired", "asib.rolled_back", "asib.data_digest"
"""Tags of a version."""

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "DIGEST",
    "MOVE",
    "PAST",
    "PREVIOUS",
    "RETIRED",
    "ROLLED_BACK",
    "Overview",
    "Registry",
    "Version",
    "Waiting",
]


@dataclass(frozen=True)
class Overview:
    """Aliases (name -> version) and tags of a registered model."""

    aliases: Mapping[str, str]
    tags: Mapping[str, str]


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
    """A RUNNING promotion. `seen`: when it last said so, `now`: when that was read, both in ms since 1970."""

    run_id: str
    user: str
    seen: int
    now: int

    @property
    def silent_s(self) -> float:
        return (self.now - self.seen) / 1000.0


class Registry:
    """The registered model `name`. Every method raises UserError for what the registry refuses."""

    def __init__(self, delivery: Delivery, name: str) -> None:
        self.name = name
        self._delivery = delivery

    def overview(self) -> Overview:
        return Overview(**self._ask("overview"))

    def version(self, number: str) -> Version:
        return Version(**self._ask("version", number=number))

    def tag(self, number: str, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        self._ask("tag", number=number, tags=dict(tags))

    def move(self, plan: Mapping[str, Any]) -> None:
        """Move aliases as delivery/registry.py says."""
        self._ask("move", plan=dict(plan))

    def repair(self) -> dict[str, Any] | None:
        """Finish what a promotion has left half done; its plan, None where there was nothing."""
        plan: dict[str, Any] | None = self._ask("repair")
        return plan

    def enter(self, run_id: str) -> None:
        """Join the queue, or say that the run is still alive."""
        self._ask("enter", run_id=run_id)

    def queue(self) -> list[Waiting]:
        """RUNNING promotions of this model, the oldest first."""
        return [Waiting(**values) for values in self._ask("queue")]

    def bury(self, run_id: str) -> None:
        """End a promotion's run whose machine is gone."""
        self._delivery.reap({run_id: ("KILLED", "killed", 137, "no sign of life: its machine is gone")})

    def fetch(self, number: str, to: Path) -> Path:
        """Download a version's files; the folder that they are in."""
        return self._delivery.fetch(f"models:/{self.name}/{number}", to)

    def _ask(self, what: str, **values: Any) -> Any:
        return self._delivery.registry(what, name=self.name, **values)
