"""The batch about to be sent to a run; items that the server permanently refuses are logged and skipped."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline.errors import UserError
from pipeline.journal import decode_number
from pipeline.paths import tree_inside
from pipeline.tracking._compat import rewrite_params
from pipeline.tracking.faults import Refusal, ask, lasting
from pipeline.tracking.target import TAG_LENGTH, can_rewrite, get_run

log = logging.getLogger("asib.delivery")

PARAM_LENGTH = 6000


class Outbox:
    """The batch for the run whose journal lies in `folder`. `refused`: number of items permanently refused.

    Args:
        adopted: `mlflow run` created the run, and logged each -P as typed in the shell.
    """

    def __init__(self, client: MlflowClient, uri: str, run: Run, folder: Path, adopted: bool = False) -> None:
        self.refused = 0
        self._client, self._uri, self._run_id, self._folder = client, uri, run.info.run_id, folder
        self._there: dict[str, str] = dict(run.data.params)
        self._new: dict[str, str] = {}  # parameters in the batch
        self._rewrites = adopted and can_rewrite(uri)
        self._changed: dict[str, str] = {}
        self._batch: list[Metric | Param | RunTag] = []
        self._artifacts: dict[tuple[str, str], None] = {}

    def __len__(self) -> int:
        return len(self._batch)

    def params(self, values: Mapping[str, str]) -> None:
        """Add parameters. MLflow does not let them change; with access to its database, a wrong one is corrected.

        `mlflow run` logs «4» for 4.0, and «'[1]'», in quotation marks, for [1].
        """
        for key, value in values.items():
            short = value[:PARAM_LENGTH]
            if key in self._there:
                if self._rewrites and self._there[key] != short:
                    self._changed[key] = short
            elif key not in self._new:
                self._new[key] = short
                self._batch.append(Param(key, short))

    def tags(self, values: Mapping[str, str]) -> None:
        self._batch += [RunTag(key, value[:TAG_LENGTH]) for key, value in values.items()]

    def metrics(self, values: Mapping[str, float | str], step: int, at: int) -> None:
        """`at`: ms since 1970."""
        self._batch += [Metric(key, decode_number(value), at, step) for key, value in values.items()]

    def artifact(self, path: str, to: str) -> None:
        """`path` inside the run's folder; the same file named twice is sent once."""
        self._artifacts[path, to] = None

    def clear(self) -> None:
        """Drop what has not been sent."""
        self._batch.clear()
        self._new.clear()
        self._changed.clear()
        self._artifacts.clear()

    def flush(self) -> None:
        """Send the batch. Raises the client's error if a retry may succeed, UserError for a deleted run."""
        if self._batch:
            self._send(self._batch)
            self._there |= self._new
            self._batch.clear()
            self._new.clear()
        if self._changed:
            rewrite_params(self._uri, self._run_id, self._changed)
            self._there |= self._changed
            self._changed.clear()
        for path, to in list(self._artifacts):
            self._send_file(path, to)
            del self._artifacts[path, to]

    def _send_file(self, path: str, to: str) -> None:
        try:
            file = tree_inside(self._folder, path)  # the journal may be someone else's
        except UserError as error:
            self.refused += 1
            log.error("%s", error)
            return
        if file.exists():
            self.attempt(self._client.log_artifact, self._run_id, str(file), to or None)
        else:
            log.warning("%s: artifact %s is not there", self._folder, path)

    def attempt(self, call: Any, *arguments: Any) -> Any:
        """Make a call; raise an error that a retry may fix, log any other error and return None."""
        try:
            return ask(partial(call, *arguments), self._uri)
        except Exception as error:
            if not lasting(error):
                raise
            self.refused += 1
            log.error("%s: %s refused: %s", self._folder, call.__name__, str(error).split("\n", 1)[0])
            return None

    def _send(self, items: Sequence[Metric | Param | RunTag]) -> None:
        send = partial(
            self._client.log_batch,
            self._run_id,
            metrics=[item for item in items if isinstance(item, Metric)],
            params=[item for item in items if isinstance(item, Param)],
            tags=[item for item in items if isinstance(item, RunTag)],
        )
        try:
            ask(send, self._uri)
        except (MlflowException, Refusal) as error:
            if not lasting(error):
                raise
            if len(items) == 1:
                self.refused += 1
                log.error("%s: %s refused: %s", self._folder, items[0], str(error).split("\n", 1)[0])
                return
            get_run(self._client, self._uri, self._run_id)  # a deleted run refuses everything: say that instead
            # One bad name must not block the others.
            self._send(items[: len(items) // 2])
            self._send(items[len(items) // 2 :])
