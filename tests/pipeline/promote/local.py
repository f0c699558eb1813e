"""The delivery process's side of a promotion, in this process: the same requests to the same store, without seconds of
starting, and versions of runs that a journal describes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import NotThere, UserError
from pipeline.journal import Journal
from pipeline.tracking import requests, server
from pipeline.tracking.deliver import deliver
from pipeline.tracking.follow import DeliveryLoop
from pipeline.tracking.pipe import Delivery, Ready


class LocalDelivery(Delivery):
    """A `Delivery` without a process. `client` may be wrapped, to fail where a test wants."""

    def __init__(self, folder: Path | None, uri: str, client: Any = None) -> None:
        self.folder, self.uri = folder, uri
        self.client = client or server.connect(uri)

    def wait_connected(self, timeout: float = 0) -> None:
        pass

    def wait_ready(self, timeout: float = 0) -> Ready:
        assert self.folder is not None
        with DeliveryLoop(self.folder, self.uri, client=self.client, live=True) as loop:
            loop.run_once()
            state = loop.top.state
        return Ready(state.run_id, state.experiment_id, state.url)

    def finish(self, timeout: float = 0) -> bool:
        assert self.folder is not None
        if not (self.folder / "journal.jsonl").exists():
            return True  # there is to be no run
        with DeliveryLoop(self.folder, self.uri, client=self.client, live=True) as loop:
            return loop.run_once()

    def ask(self, name: str, /, *, timeout: float = 0, **values: Any) -> Any:
        values = json.loads(json.dumps(values))  # as they go over the pipe
        answer = requests.answer(self.client, name, values)
        if "error" in answer:
            raise (NotThere if answer.get("not_there") else UserError)(answer["error"])
        return json.loads(json.dumps(answer["value"]))


class Broken(Exception):
    """The process is gone."""


class Fragile:
    """A client whose process dies at the n-th call that changes something, before it or after it."""

    def __init__(self, client: Any, at: int, after: bool = False) -> None:
        self._client, self._left, self._after, self.changes = client, at, after, 0

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)
        if not name.startswith(("set_", "create_", "delete_", "log_", "finalize_")):
            return call

        def changing(*values: Any, **named: Any) -> Any:
            self.changes += 1
            self._left -= 1
            if self._left == 0 and not self._after:
                raise Broken
            try:
                return call(*values, **named)
            finally:
                if self._left == 0:
                    raise Broken

        return changing


def record(folder: Path, registered: str, files: Mapping[str, bytes], tags: Mapping[str, str]) -> Journal:
    """The record of a run that has logged these files as its student, and registers it."""
    journal = Journal.create(folder, experiment="students", name=folder.name)
    model = folder / "model"
    model.mkdir()
    for name, content in files.items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(content)
    journal.model(model, "student", kind="weights")
    journal.register(registered, model="student", alias="challenger", tags=tags)
    journal.end("FINISHED", "completed", 0)
    return journal


def registered(folder: Path, uri: str, name: str, files: Mapping[str, bytes], tags: Mapping[str, str]) -> str:
    """A version of `name` made as training makes them; its run's id."""
    record(folder, name, files, tags)
    (done,) = deliver([folder], uri)
    assert (done.complete, done.refused) == (True, 0)
    return done.run_id
