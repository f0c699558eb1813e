"""Deliver one journal to one MLflow run: find, adopt or create the run, send entries in order, set the status.

Everything here can be repeated after a crash at any point: nothing is lost or duplicated.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from mlflow.entities import Run, RunTag
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE, MLFLOW_USER

from pipeline import journal
from pipeline.errors import UserError
from pipeline.files import locked
from pipeline.journal import Entry
from pipeline.tracking import checkpoints, turns, views
from pipeline.tracking._compat import is_random
from pipeline.tracking.mlflow_batches import Outbox
from pipeline.tracking.models import log_dataset, log_model, log_model_input
from pipeline.tracking.registry import register
from pipeline.tracking.server import run_url
from pipeline.tracking.state import JOURNAL_TAG, STATE_FILE, State, find_by_journal
from pipeline.tracking.target import (
    GENERATION_TAG,
    TAG_LENGTH,
    carried_run,
    end_run,
    experiment_id,
    get_run,
    parent_place,
)

log = logging.getLogger("asib.delivery")

RESUMES_TAG = "asib.resumes"
MILESTONES = ("model", "register", "resume", "end")
"""Entries that need everything before them on the server: a model is linked to the run's metrics."""
BATCH = 5000  # entities between two commits of the offset; the client cuts them into requests


class RunDelivery:
    """The delivery of the journal in `folder`: `attach` once, then `deliver` any number of times.

    A carrier's journal represents another run, which has a delivery of its own: that run is not changed here, it only
    becomes the parent of the children.

    Args:
        live: whether a trainer is writing; the run is then set to RUNNING.
        deliver_children: brings what the nested runs hold now, before an entry that may name one of them.
        adopt: the run that `mlflow run` created for this journal; ignored if it has ended or is another journal's.
        resume: the run that this journal continues; an adopted one then stays empty.
        parent: the delivery of the run that this one is nested in.
    """

    def __init__(
        self,
        folder: Path,
        uri: str,
        client: MlflowClient,
        live: bool,
        deliver_children: Callable[[RunDelivery], None],
        *,
        adopt: str | None = None,
        resume: str | None = None,
        parent: RunDelivery | None = None,
    ) -> None:
        self.folder = folder
        self.uri = uri
        self.client = client
        self.state = State()
        self.attached = False
        self.carrier = False
        self.children: list[Path] = []  # the most recently named one comes last
        self.resumable = True
        self._path = folder / journal.FILE
        self._adopt, self._resume, self._live, self._parent = adopt, resume, live, parent
        self._deliver_children = deliver_children
        self._inode = -1
        self._generations: list[str] = []
        self._forgotten: dict[Path, int] = {}  # the offset up to which naming it had no effect
        self._last_time = 0
        self._outbox: Outbox | None = None

    @property
    def refused(self) -> int:
        """Number of items that the server permanently refused."""
        return self._outbox.refused if self._outbox is not None else 0

    # The run

    def attach(self) -> bool:
        """Find, adopt or create the run. False while there is no journal yet.

        Raises:
            UserError: the run id is unknown, the run or experiment is deleted, or a carrier's run is not on the server.
        """
        header = journal.read_header(self.folder)
        if header is None:
            return False
        # the steps of one `mlflow run` may start together: the first one gets its run
        with locked(self.folder.parent / ".adopt.lock") if self._adopt else contextlib.nullcontext():
            self._attach(header)
        return True

    def _attach(self, header: Entry) -> None:
        self.state = State.load(self.folder, self.uri, header.data["journal"])
        self._last_time = header.time
        link = header.data.get("carrier")
        self.carrier = link is not None
        if link is None:
            run = self._own(header)
        else:
            run = carried_run(self.client, self.uri, self.folder, link, header.data["experiment"])
            self._survey()
        self.state.run_id, self.state.experiment_id = run.info.run_id, run.info.experiment_id
        self.state.url = run_url(self.uri, run.info.experiment_id, run.info.run_id)
        adopted = self._adopt == run.info.run_id
        self._outbox = Outbox(self.client, self.uri, run, self.folder, adopted)
        self.state.save(self.folder)
        if self._parent is None:
            views.arrange(self.client, run.info.experiment_id)
        self.attached = True

    def _own(self, header: Entry) -> Run:
        """The journal's own run, ready for its entries."""
        run = self._existing(header)
        self._survey()
        tags = dict(header.data["tags"])
        place = self._place(header)
        if place is not None:
            tags[MLFLOW_PARENT_RUN_ID] = place.run_id
        if run is None:
            run = self._create(header, tags, place)
        else:
            self._take_over(run, header, tags)
            if not self.state.checkpoint:
                self.state.checkpoint = checkpoints.on_server(self.client, run.info.run_id, self.folder)
        run_id = run.info.run_id
        if self._adopt and self._adopt not in (run_id, self.state.shell) and self._free(header):
            self.state.shell = self._adopt
        if self.state.shell:
            self.client.set_tag(self.state.shell, RESUMES_TAG, run_id)
        return run

    def _existing(self, header: Entry) -> Run | None:
        run = self._remembered(header) if self.state.run_id else None
        if run is not None:
            return run
        if self._resume:
            return get_run(self.client, self.uri, self._resume)
        data, given = header.data, self._adopt
        run = find_by_journal(self.client, data["journal"], data["experiment"]) or self._free(header)
        if run is None and not data["experiment"]:
            raise UserError(f"run {given} has ended or is another's: nothing is noted there")
        return run

    def _free(self, header: Entry) -> Run | None:
        """The run that `mlflow run` created, if it still waits for a journal."""
        if not self._adopt:
            return None
        run = get_run(self.client, self.uri, self._adopt)
        writers = {run.data.tags.get(JOURNAL_TAG), run.data.tags.get(RESUMES_TAG) and "a resume"} - {None}
        if run.info.status == "RUNNING" and writers <= {header.data["journal"]}:
            return run
        log.warning("run %s has ended or is another's: %s is a run of its own", self._adopt, self.folder)
        self._adopt = None
        return None

    def _remembered(self, header: Entry) -> Run | None:
        try:
            run = get_run(self.client, self.uri, self.state.run_id)
        except UserError:
            # The server is new: everything sent to the old one is lost.
            log.warning("run %s of %s is no longer there", self.state.run_id, self.folder)
            self.state = State(uri=self.state.uri, journal=self.state.journal)
            return None
        if run.data.tags.get(JOURNAL_TAG) != header.data["journal"]:
            where = self.folder / STATE_FILE
            raise UserError(f"{where} names run {run.info.run_id}, which is not this journal's: delete that file")
        return run

    def _create(self, header: Entry, tags: dict[str, str], place: State | None) -> Run:
        source = {MLFLOW_USER: header.data.get("user", ""), MLFLOW_SOURCE_NAME: header.data.get("source", "")}
        tags = {**source, MLFLOW_SOURCE_TYPE: "LOCAL", **tags, JOURNAL_TAG: header.data["journal"]}
        if self._live:
            tags[GENERATION_TAG] = self._generations[-1]
        return self.client.create_run(
            place.experiment_id if place else experiment_id(self.client, self.uri, header.data["experiment"]),
            start_time=header.time,
            tags={key: str(value)[:TAG_LENGTH] for key, value in tags.items() if value},
            run_name=_name(header),
        )

    def _take_over(self, run: Run, header: Entry, tags: dict[str, str]) -> None:
        run_id = run.info.run_id
        missing = [RunTag(k, str(v)[:TAG_LENGTH]) for k, v in tags.items() if k not in run.data.tags]
        if run.data.tags.get(JOURNAL_TAG) != header.data["journal"]:
            missing.append(RunTag(JOURNAL_TAG, header.data["journal"]))
            if _name(header) and is_random(run.info.run_name or ""):  # `mlflow run` names what its user does not
                self.client.update_run(run_id, name=_name(header))
        if self._live:
            missing.append(RunTag(GENERATION_TAG, self._generations[-1]))
        self.client.log_batch(run_id, tags=missing)
        if self._live and not self.state.ended and run.info.status != "RUNNING":
            self.client.update_run(run_id, status="RUNNING")

    def _place(self, header: Entry) -> State | None:
        """The run that this one is nested in."""
        if self._parent is not None:
            return self._parent.state
        return parent_place(self.client, self.uri, self.folder, header)

    # The entries

    def deliver(self, final: bool = False) -> None:
        """Send what the journal holds beyond the offset.

        Args:
            final: nobody is writing any more: a checkpoint whose file is gone no longer holds back its entries.

        Raises:
            Exception: the client's, if a retry may succeed.
            UserError: the run was deleted meanwhile.
        """
        if final and self._live and not self.state.ended and self._taken_over():
            return  # the run continues elsewhere from its checkpoint: entries beyond it are void
        entries = self._read()
        saved = [entry for entry in entries if entry.kind == "checkpoint"]
        final = final or any(entry.kind == "end" for entry in entries)
        outermost = self._parent is None or self._parent.carrier
        over = outermost and any(entry.kind == "end" and not _resumable(entry) for entry in entries)
        behind = self.state.offset
        assert self._outbox is not None
        self._outbox.clear()
        covered = 0
        for entry in entries:
            if entry.kind == "checkpoint" and entry.end > covered:
                self._commit(behind)
                later = [candidate for candidate in saved if candidate.end >= entry.end]
                brought = None if over else checkpoints.bring(self.client, self.state, self.folder, later)
                if brought is not None:
                    covered, self.state.checkpoint = brought
                elif not final:
                    # Its file was replaced, and the newer one's entry has not arrived yet.
                    return
                else:
                    if not over:
                        log.warning("%s: no checkpoint file is intact; its entries go without", self.folder)
                    covered = later[-1].end
                self._commit(entry.end)
            elif self._apply(entry) or len(self._outbox) >= BATCH:
                self._commit(entry.end)
            behind = entry.end
        if behind > self.state.offset:
            self._commit(behind)

    def _read(self) -> list[Entry]:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return []
        if found.st_ino != self._inode or found.st_size < self.state.offset:
            self._survey()
        if found.st_size <= self.state.offset:
            return []
        entries = journal.read_entries(self._path, self.state.offset)[0]
        self._last_time = max([self._last_time, *(entry.time for entry in entries)])
        return entries

    def _survey(self) -> None:
        """Read a new text from its start: who wrote it, and what has already been delivered."""
        self._inode = self._path.stat().st_ino
        everything, _ = journal.read_entries(self._path)
        self._generations = journal.generations(everything)
        if self._generations[-1] != self.state.generation:
            # The offset belongs to another text: send all of this one, which duplicates nothing.
            self.state.generation, self.state.offset, self.state.ended = self._generations[-1], 0, False
        self.children = []
        for entry in everything:
            self._last_time = max(self._last_time, entry.time)
            if entry.kind == "child" and entry.end <= self.state.offset:
                self._child(entry)
            elif entry.kind == "end":
                self.resumable = _resumable(entry)

    def _apply(self, entry: Entry) -> bool:
        """Process an entry; True if everything before it had to be sent, and was."""
        data, run_id, outbox = entry.data, self.state.run_id, self._outbox
        assert outbox is not None
        if self.carrier and entry.kind not in ("child", "resume", "end"):
            return False
        if entry.kind in MILESTONES:
            outbox.flush()
        match entry.kind:
            case "params":
                outbox.params(data["values"])
            case "tags":
                outbox.tags(data["values"])
            case "metrics":
                outbox.metrics(data["values"], data["step"], entry.time)
            case "artifact":
                outbox.artifact(data["path"], data["to"])
            case "child":
                self._child(entry)
            case "dataset":
                outbox.attempt(log_dataset, self.client, run_id, entry)
            case "model_input":
                self._deliver_children(self)  # a teacher of this run may be one of its children
                outbox.attempt(log_model_input, self.client, run_id, entry)
            case "model":
                if data["entry"] not in self.state.models:
                    model_id = outbox.attempt(log_model, self.client, self.state, self.folder, entry)
                    if model_id:
                        self.state.models[data["entry"]] = model_id
            case "register":
                version = outbox.attempt(register, self.client, self.state, entry)
                if version:
                    self.state.versions[data["registered"]] = version
            case "resume":
                self.state.generation = data["generation"]
                if data["generation"] not in self._generations:
                    self._generations.append(data["generation"])
                self.state.ended = False
                self._mark_running()
            case "end":
                self.resumable = _resumable(entry)
                self._end(data["status"], data["outcome"], data["exit_code"], data["message"], entry.time)
        return entry.kind in MILESTONES

    def _child(self, entry: Entry) -> None:
        folder = Path(os.path.normpath(self.folder / str(entry.data["folder"]).replace("\0", "")))
        if folder in self.children:
            self.children.remove(folder)
        if entry.end > self._forgotten.get(folder, 0):
            self.children.append(folder)

    def forget(self, folder: Path, upto: int | None = None) -> None:
        """Drop a child until the journal names it again beyond the offset `upto` (default: the present end)."""
        with contextlib.suppress(FileNotFoundError):
            self._forgotten[folder] = self._path.stat().st_size if upto is None else upto
        if folder in self.children:
            self.children.remove(folder)

    # The status

    def _mark_running(self) -> None:
        """Tell the server that this text's last writer now has the run."""
        if self.carrier:
            return
        if self._live:
            # The mark comes first: see `kill`.
            self.client.set_tag(self.state.run_id, GENERATION_TAG, self.state.generation)
        elif self._taken_over():
            return
        self.client.update_run(self.state.run_id, status="RUNNING")

    def _taken_over(self) -> bool:
        """Whether a writer unknown to this text has continued the run, from a copy of its checkpoint."""
        if self.carrier:
            return False
        mark = self.client.get_run(self.state.run_id).data.tags.get(GENERATION_TAG)
        return mark is not None and mark not in self._generations

    def kill(self) -> None:
        """End a run whose trainer died without an `end` entry, unless another process has taken it over."""
        if self.carrier:
            return
        if self._taken_over():
            log.info("%s has no end, and its run is another's now", self.folder)
            return
        log.warning("%s has no end: its trainer died; the run is KILLED", self.folder)
        self._end("KILLED", "killed", 137, None, self._last_time)
        turns.left_behind(self.client, self.state.run_id)
        self.state.ended = False  # the journal has no end: a trainer that comes back continues it
        self.state.save(self.folder)
        if self._taken_over():  # it was taken over between the question and the end
            self.client.update_run(self.state.run_id, status="RUNNING")

    def _end(self, status: str, outcome: str, exit_code: int, message: str | None, at: int) -> None:
        for run_id in () if self.carrier else filter(None, (self.state.run_id, self.state.shell)):
            end_run(self.client, run_id, status, outcome, exit_code, message, at)
        self.state.ended = True

    def _commit(self, offset: int) -> None:
        assert self._outbox is not None
        self._outbox.flush()
        self.state.offset = max(self.state.offset, offset)
        self.state.save(self.folder)


def _name(header: Entry) -> str | None:
    return header.data["name"] or header.data.get("usual_name")


def _resumable(end: Entry) -> bool:
    """Whether checkpoints stay after this end; earlier journals do not say."""
    return bool(end.data.get("resumable", True))
