"""What training sees of a run's record, and a stand-in for processes that keep none."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Recorder(Protocol):
    """What training sees of a run's record."""

    def params(self, values: Mapping[str, object]) -> None: ...
    def tags(self, values: Mapping[str, str]) -> None: ...
    def metrics(self, values: Mapping[str, float], step: int) -> None: ...
    def artifact(self, path: Path, to: str = "") -> None: ...
    def sync(self) -> None: ...


class CheckpointRecorder(Recorder, Protocol):
    """What the code that writes checkpoints sees; the order is hold, entries, snapshot, (the file), checkpoint.

    Entries may arrive while the file is being written: the next checkpoint covers them.
    """

    def hold(self) -> None: ...
    def release(self) -> None: ...
    def snapshot(self) -> str: ...
    def checkpoint(self, path: Path, sha256: str, slot: int) -> None: ...


class NullJournal:
    """The record of all but the first of several processes that train together: accepts any call, writes nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *values, **named: ""
