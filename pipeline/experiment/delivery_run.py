"""One journal brought to one MLflow run: finds, adopts or makes the run, sends entries in order, sets the status.

Everything here may be repeated after a crash at any point: nothing is lost and nothing is doubled.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import (
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)

from pipeline import journal
from pipeline.errors import UserError
from pipeline.experiment.delivery_checkpoint import CheckpointUpload
from pipeline.experiment.delivery_models import log_dataset, log_model, log_model_input
from pipeline.experiment.delivery_server import artifact_location, is_transient, run_url, shown
from pipeline.experiment.delivery_state import JOURNAL_TAG, State, find_by_journal
from pipeline.journal import Entry

log = logging.getLogger("asib.delivery")

PARAM_LENGTH, TAG_LENGTH = 6000, 8000
BATCH = 5000  # entities between two commits of the offset; the client cuts them into requests


class RunDelivery:
    """Follows the journal in `folder`. `attach` first, then `deliver` as often as wished.

    Args:
        adopt: the run that `mlflow run` made for this journal.
        resume: the run that this journal goes on with; then an adopted one stays empty.
        live: whether a trainer is writing: its run is set RUNNING.
        parent: the delivery of the run that this one is nested in.
    """

    def __init__(
        self,
        folder: Path,
        uri: str,
        client: MlflowClient,
        *,
        adopt: str | None = None,
        resume: str | None = None,
        live: bool = False,
        parent: RunDelivery | None = None,
    ) -> None:
        self.folder = folder
        self.uri = uri
        self.client = client
        self.state = State()
        self.attached = False
        self.children: list[Path] = []
        self.before_model_input: Callable[[], None] = lambda: None
        self.refused = 0
        self._path = folder / journal.FILE
        self._adopt, self._resume, self._live, self._parent = adopt, resume, live, parent
        self._inode = -1
        self._params: set[str] = set()  # on the server
        self._new_params: set[str] = set()  # in the batch
        self._last_time = 0
        self._checkpoints: CheckpointUpload | None = None
        self._batch: list[Metric | Param | RunTag] = []
        self._artifacts: dict[tuple[str, str], None] = {}

    # The run

    def attach(self) -> bool:
        """Find, adopt or make the run. False while there is no journal yet.

        Raises:
            UserError: a run id that the server does not know, a deleted run or experiment.
        """
        header = journal.read_header(self.folder)
        if header is None:
            return False
        self.state = State.load(self.folder, self.uri, header.data["journal"])
        self._last_time = header.time
        run = self._existing(header)
        made = run is None
        tags = dict(header.data["tags"])
        parent_id = self._parent_run_id(header)
        if parent_id:
            tags[MLFLOW_PARENT_RUN_ID] = parent_id
        if run is None:
            run = self._create(header, tags)
        else:
            self._take_over(run, header, tags)
        run_id = run.info.run_id
        if self._adopt and self._adopt != run_id:
            self.state.shell = self._adopt
        if self.state.shell:
            self.client.set_tag(self.state.shell, "asib.resumes", run_id)
        self._params = set(run.data.params)
        self.state.run_id, self.state.experiment_id = run_id, run.info.experiment_id
        self.state.url = run_url(self.uri, run.info.experiment_id, run_id)
        self._checkpoints = CheckpointUpload(self.client, run_id, self.folder, header.data["journal"])
        if not made and not self.state.checkpoint:
            self.state.checkpoint = self._checkpoints.on_server()
        self.state.save(self.folder)
        self.attached = True
        return True

    def _existing(self, header: Entry) -> Run | None:
        if self.state.run_id:
            try:
                return self._get(self.state.run_id)
            except UserError:
                # The server was made anew: what was sent went with the old one.
                log.warning("run %s of %s is no longer there", self.state.run_id, self.folder)
                self.state = State(uri=self.state.uri, journal=self.state.journal)
        if self._resume:
            return self._get(self._resume)
        return self._by_tag(header) or (self._get(self._adopt) if self._adopt else None)

    def _get(self, run_id: str) -> Run:
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise UserError(f"tracking server {shown(self.uri)} knows no run {run_id}: check the id") from error
            raise
        if run.info.lifecycle_stage == "deleted":
            raise UserError(f"run {run_id} is deleted: `mlflow runs restore --run-id {run_id}` brings it back")
        return run

    def _by_tag(self, header: Entry) -> Run | None:
        return find_by_journal(self.client, header.data["journal"], header.data["experiment"])

    def _create(self, header: Entry, tags: dict[str, str]) -> Run:
        source = {MLFLOW_USER: header.data.get("user", ""), MLFLOW_SOURCE_NAME: header.data.get("source", "")}
        tags = {**source, MLFLOW_SOURCE_TYPE: "LOCAL", **tags, JOURNAL_TAG: header.data["journal"]}
        return self.client.create_run(
            self._experiment(header.data["experiment"]),
            start_time=header.time,
            tags={key: str(value)[:TAG_LENGTH] for key, value in tags.items() if value},
            run_name=header.data["name"],
        )

    def _take_over(self, run: Run, header: Entry, tags: dict[str, str]) -> None:
        run_id = run.info.run_id
        tags = {**tags, JOURNAL_TAG: header.data["journal"]}
        missing = [RunTag(k, str(v)[:TAG_LENGTH]) for k, v in tags.items() if k not in run.data.tags]
        if run.data.tags.get(JOURNAL_TAG) != header.data["journal"]:
            missing.append(RunTag(JOURNAL_TAG, header.data["journal"]))
            if header.data["name"]:
                self.client.update_run(run_id, name=header.data["name"])
        self.client.log_batch(run_id, tags=missing)
        if self._live and not self.state.ended and run.info.status != "RUNNING":
            self.client.update_run(run_id, status="RUNNING")

    def _parent_run_id(self, header: Entry) -> str:
        if self._parent is not None:
            return self._parent.state.run_id
        above = header.data["parent"]
        if above is None:
            return ""
        state = State.load(self.folder / above["folder"], self.uri, above["journal"])
        if state.run_id:
            return state.run_id
        run = find_by_journal(self.client, above["journal"], header.data["experiment"])
        return run.info.run_id if run else ""

    def _experiment(self, name: str) -> str:
        if self._parent is not None:
            return self._parent.state.experiment_id
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(self.client.create_experiment(name, artifact_location(self.uri, name)))
            except MlflowException as error:
                # Another run was faster.
                experiment = self.client.get_experiment_by_name(name)
                if experiment is None:
                    raise error
        if experiment.lifecycle_stage == "deleted":
            number = experiment.experiment_id
            raise UserError(
                f'experiment "{name}" is deleted: `mlflow experiments restore -x {number}` brings it back, '
                "or take another name"
            )
        return str(experiment.experiment_id)

    # The entries

    def deliver(self, final: bool = False) -> bool:
        """Send what the journal holds beyond the offset; True when there was something.

        Args:
            final: nobody writes any more: a checkpoint whose file is gone no longer holds back its entries.

        Raises:
            Exception: what the client raised and may succeed later; then `deliver` again.
            UserError: the run was deleted meanwhile.
        """
        entries = self._read()
        checkpoints = [entry for entry in entries if entry.kind == "checkpoint"]
        final = final or any(entry.kind == "end" for entry in entries)
        start = behind = self.state.offset
        self._clear()
        self._artifacts.clear()
        covered = 0
        assert self._checkpoints is not None
        for entry in entries:
            if entry.kind == "checkpoint" and entry.end > covered:
                self._commit(behind)
                later = [candidate for candidate in checkpoints if candidate.end >= entry.end]
                chosen = self._checkpoints.bring(later, self.state.checkpoint, self.state.generation)
                if chosen is not None:
                    covered, self.state.checkpoint = chosen
                elif not final:
                    # Its file was replaced and the newer one's entry is not there yet.
                    return behind > start
                else:
                    log.warning("%s: no checkpoint file is intact; its entries go without", self.folder)
                    covered = later[-1].end
                self._commit(entry.end)
            elif self._apply(entry) or len(self._batch) >= BATCH:
                self._commit(entry.end)
            behind = entry.end
        if behind > self.state.offset:
            self._commit(behind)
        return behind > start

    def _read(self) -> list[Entry]:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return []
        if found.st_ino != self._inode or found.st_size < self.state.offset:
            self._inode = found.st_ino
            everything, _ = journal.read_entries(self._path)
            marks = [entry.data["generation"] for entry in everything if entry.kind == "resume"]
            generation = marks[-1] if marks else self.state.journal
            if generation != self.state.generation:
                # Another text than the one the offset belongs to: all of it again, which doubles nothing.
                self.state.generation, self.state.offset, self.state.ended = generation, 0, False
            self.children = []
            for entry in everything:
                self._last_time = max(self._last_time, entry.time)
                if entry.kind == "child" and entry.end <= self.state.offset:
                    self._child(entry)
        if found.st_size <= self.state.offset:
            return []
        entries = journal.read_entries(self._path, self.state.offset)[0]
        self._last_time = max([self._last_time, *(entry.time for entry in entries)])
        return entries

    def _apply(self, entry: Entry) -> bool:
        """Take an entry in; True when everything before it had to be, and was, sent."""
        data, run_id = entry.data, self.state.run_id
        match entry.kind:
            case "params":
                for key, value in data["values"].items():
                    # What is there stays: `mlflow run` has logged «4» where we would say 4.0.
                    if key not in self._params and key not in self._new_params:
                        self._new_params.add(key)
                        self._batch.append(Param(key, value[:PARAM_LENGTH]))
            case "tags":
                self._batch += [RunTag(key, value[:TAG_LENGTH]) for key, value in data["values"].items()]
            case "metrics":
                self._batch += [
                    Metric(key, journal.decode_number(value), entry.time, data["step"])
                    for key, value in data["values"].items()
                ]
            case "artifact":
                self._artifacts[data["path"], data["to"]] = None
            case "child":
                self._child(entry)
            case "dataset":
                self._try(log_dataset, self.client, run_id, entry)
            case "model_input":
                self.before_model_input()  # a teacher of this run may be one of its children
                self._try(log_model_input, self.client, run_id, entry)
            case "model":
                self._flush()  # the model is linked to the run's metrics
                if data["entry"] not in self.state.models:
                    model_id = self._try(log_model, self.client, self.state, self.folder, entry)
                    if model_id:
                        self.state.models[data["entry"]] = model_id
                return True
            case "resume":
                self._flush()
                self.state.generation = data["generation"]
                self.state.ended = False
                self.client.update_run(run_id, status="RUNNING")
                return True
            case "end":
                self._flush()
                self._end(data["status"], data["outcome"], data["exit_code"], data["message"], entry.time)
                return True
        return False

    def _child(self, entry: Entry) -> None:
        folder = Path(os.path.normpath(self.folder / entry.data["folder"]))
        if folder not in self.children:
            self.children.append(folder)

    def kill(self) -> None:
        """End a run whose trainer died without an `end` entry."""
        self._end("KILLED", "killed", 137, None, self._last_time)
        self.state.ended = False  # the journal has no end: a trainer that comes back goes on with it
        self.state.save(self.folder)

    def _end(self, status: str, outcome: str, exit_code: int, message: str | None, at: int) -> None:
        tags = [RunTag("asib.outcome", outcome), RunTag("asib.exit_code", str(exit_code))]
        if message:
            tags.append(RunTag("asib.error", message[:TAG_LENGTH]))
        for run_id in filter(None, (self.state.run_id, self.state.shell)):
            self.client.log_batch(run_id, tags=tags)
            self.client.set_terminated(run_id, status=status, end_time=at)
        self.state.ended = True

    def _commit(self, offset: int) -> None:
        self._flush()
        self.state.offset = max(self.state.offset, offset)
        self.state.save(self.folder)

    def _flush(self) -> None:
        if self._batch:
            self._send(self._batch)
            self._params |= self._new_params
            self._clear()
        for path, to in list(self._artifacts):
            if (self.folder / path).exists():
                self._try(self.client.log_artifact, self.state.run_id, str(self.folder / path), to or None)
            else:
                log.warning("%s: artifact %s is not there", self.folder, path)
            del self._artifacts[path, to]

    def _clear(self) -> None:
        self._batch.clear()
        self._new_params.clear()

    def _send(self, items: Sequence[Metric | Param | RunTag]) -> None:
        try:
            self.client.log_batch(
                self.state.run_id,
                metrics=[item for item in items if isinstance(item, Metric)],
                params=[item for item in items if isinstance(item, Param)],
                tags=[item for item in items if isinstance(item, RunTag)],
            )
        except MlflowException as error:
            if is_transient(error):
                raise
            if len(items) == 1:
                self.refused += 1
                log.error("%s: %s refused: %s", self.folder, items[0], str(error).split("\n", 1)[0])
                return
            self._get(self.state.run_id)  # a deleted run refuses everything: say that instead
            # One bad name must not keep the others away.
            self._send(items[: len(items) // 2])
            self._send(items[len(items) // 2 :])

    def _try(self, call: Any, *arguments: Any) -> Any:
        """Call; what may succeed later is raised, what never will is written down and passed over."""
        try:
            return call(*arguments)
        except Exception as error:
            if is_transient(error):
                raise
            self.refused += 1
            log.error("%s: %s refused: %s", self.folder, call.__name__, str(error).split("\n", 1)[0])
            return None
