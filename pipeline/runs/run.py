"""A tracked run: its folder, its journal, its delivery to MLflow, and how it ends."""

import hashlib
import logging
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import secrets, urls
from pipeline.compose import compose
from pipeline.compose.cli import Command
from pipeline.config import Config, config_hash
from pipeline.config.identity import listed
from pipeline.errors import HelperFailed, Interrupted, Taken, UserError
from pipeline.files import read_state, write_atomically
from pipeline.journal import SLOTS, Journal, NullJournal
from pipeline.runs import description, git, naming, records
from pipeline.runs.ending import COMPLETED, Ending, as_user_error, ending_of
from pipeline.runs.folders import CONFIG, DIFFERENCE, ended, folders_with, size_of
from pipeline.runs.run_log import log_to
from pipeline.runs.signals import Stop
from pipeline.tracking import start
from pipeline.tracking.pipe import DELIVER, Delivery
from pipeline.training import distributed
from pipeline.training.checkpoint import Slots

logger = logging.getLogger("asib")
WORTH_A_LOOK = ("comparison/comparison.html", "study/study.html", "results.json", *description.PICTURES)
"""Files of a run that people open first."""


def tracking_uri(config: Config) -> str:
    """The tracking URI that runs go to; never a relative path."""
    return urls.tracking(config.tracking.uri) if config.tracking.uri else start.default_uri()


def remove_unbegun(folder: Path, delivery: Delivery | None) -> None:
    """Remove every trace of a run that has not begun."""
    if delivery is not None:
        delivery.finish(0.0)
    shutil.rmtree(folder, ignore_errors=True)


class Run:
    """One run of a step; made by `pipeline.runs.opening`, ended by `close`.

    Attributes:
        folder: everything the run leaves on this machine.
        journal: its record.
        state: the checkpoint that it continues from; None: a fresh start.
        command: what asked for it, or for the run that it is nested in.
        stop: knows whether a signal has arrived; a nested run has its parent's.
        distant: whether it was begun on another machine: its nested runs may be on the server only.
    """

    def __init__(
        self,
        step: str,
        config: Config,
        folder: Path,
        journal: Journal | NullJournal,
        delivery: Delivery | None,
        state: Any = None,
        parent: "Run | None" = None,
        stands_for: str | None = None,
        stop: Stop | None = None,
        distant: bool = False,
    ) -> None:
        """`stands_for`: the journal id of the run that nested runs belong to, if it is another one."""
        self.step, self.config, self.folder, self.journal = step, config, folder, journal
        self.delivery, self.state, self.parent, self.distant = delivery, state, parent, distant
        self.stop: Stop = stop if stop is not None else parent.stop if parent is not None else Stop()
        self.slots = Slots(folder / "checkpoints")
        self.started = time.monotonic()
        self._run_id: str | None = None
        self._refused = False
        """Whether the server refused it when it was new, for example a reader's."""
        self.command: Command | None = parent.command if parent is not None else None
        self._nesting = stands_for or journal.id
        """The id that its nested runs' journal ids are derived from."""

    @property
    def config_hash(self) -> str:
        return config_hash(self.config)

    @property
    def follower(self) -> bool:
        """Whether this is one of several processes but not the first, which alone keeps the record."""
        return isinstance(self.journal, NullJournal)

    @property
    def repeat(self) -> str:
        """For reports that are its description: the line with the command that repeats it; empty if unknown."""
        command = self.command
        return "" if command is None else description.repeated(secrets.mask(naming.command_of(self.step, command)))

    def was_asked_for(self, key: str) -> bool:
        """Whether the user has set a key, rather than a preset of conf/experiment; True where that is unknown."""
        if self.command is None or "/" in (self.command.cfg or ""):
            return True
        return any(listed(key, [asked, f"{asked}."]) for asked in compose.keys_of(self.command.overrides))

    def nested_id(self, key: str) -> str:
        """The journal id of a nested run: the same on whichever machine this one is continued."""
        return hashlib.sha256(f"{self._nesting}/{key}".encode()).hexdigest()[:32]

    def finished_child(self, key: str) -> dict[str, float] | None:
        """The results of a nested run that finished before this one was interrupted; None if it did not."""
        folder = self.folder / key
        if not ended(folder):
            return None
        return records.results(folder) or dict(records.from_folder(folder).metrics)

    def describe(self) -> None:
        """Record what every run states at its start: parameters, tags, the configuration as a file."""
        self.journal.params(compose.params(self.config))
        self.journal.tags({"asib.config_hash": self.config_hash, **git.tags()})
        if self.config.rung:
            self.journal.tags({"asib.rung": self.config.rung})
        diff = git.difference() if self.config.tracking.git_diff else ""
        if diff:
            self.write(DIFFERENCE, secrets.mask_lines(diff))
        self.write(CONFIG, compose.dump(self.config))  # last: it completes the description

    def restate(self) -> None:
        """Record the configuration of a run that is extended; its parameters in MLflow cannot change."""
        self.journal.tags({"asib.config_hash": self.config_hash})
        self.write(CONFIG, compose.dump(self.config))

    # while it runs ---------------------------------------------------------------------------------------------------

    def ready(self) -> None:
        """Begin the record, and wait until the tracking server has taken the run. Raises UserError when it refuses it.

        Until then a run that is refused leaves nothing.
        """
        if self.parent is not None:
            self.parent.ready()
            return
        fresh = self.pending
        if fresh:
            if self.delivery is not None:
                self.delivery.wait_connected()  # if the server refuses us, no run is left behind
            self.journal.begin()
        if self.delivery is not None and self._run_id is None:
            try:
                answer = self.delivery.wait_ready(timeout=300)
            except UserError as error:
                self._refused = fresh and not isinstance(error, HelperFailed)
                raise
            self._run_id = answer.run_id
            logger.info("tracked as %s", answer.url)
            server, page, _ = answer.url.partition("#/")
            view, uri = urls.view_page(answer.experiment_id), tracking_uri(self.config)
            if page:
                logger.info("all runs: %s%s", server, view)
            elif uri.startswith(urls.SQLITE):
                serve = shlex.join(["mlflow", "ui", "--backend-store-uri", uri])
                logger.info("all runs: %s, then http://127.0.0.1:5000/%s", serve, view)
            given = os.environ.get("MLFLOW_RUN_ID")
            if given and given != answer.run_id and self.config.resume is None:
                logger.info("MLFLOW_RUN_ID=%s has ended or is written by another step: this is a run of its own", given)

    @property
    def run_id(self) -> str | None:
        """The MLflow run id, None offline; waits until it is known."""
        if self._run_id is None and self.delivery is not None:
            if self.parent is None:
                self.ready()
            else:
                self._run_id = self.delivery.child_ready(self.folder)
        return self._run_id

    def fetch(self, uri: str, to: Path) -> Path:
        """Download `runs:/…` to a local folder. Raises UserError."""
        if self.follower:
            path = to / uri.rsplit("/", 1)[-1]
        elif self.delivery is None:
            path = start.fetch_now(tracking_uri(self.config), uri, to)
        else:
            path = self.delivery.fetch(uri, to)
        distributed.barrier()
        return path

    def rewind(self, text: str, checkpoint: tuple[Path, str, int] | None) -> None:
        """Make the snapshot in a checkpoint (path, sha256, slot) the record again; later entries are dropped."""
        if isinstance(self.journal, Journal):
            self.journal = Journal.restore(self.folder, text, checkpoint, self.journal.hand_over())

    def write(self, name: str, text: str, to: str = "") -> Path:
        """Write a text file into the run's folder, without secrets, and log it as an artifact."""
        path = self.folder / name
        if self.follower:
            return path
        write_atomically(path, secrets.mask(text))
        self.journal.artifact(path, to)
        return path

    # ending ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def nested(self) -> Iterator[None]:
        """Log a nested run within the block, and end its record the way the block ends."""
        with nullcontext() if self.follower else log_to(self.folder):
            try:
                yield
            except Taken:
                self.abandon()
                raise
            except (Interrupted, Exception) as error:
                said = as_user_error(error, self.folder)
                self.close(ending_of(said))
                if said is error:
                    raise
                raise said from error
            self.close()

    def abandon(self) -> None:
        """Stop writing and sending this nested run, its end included: another process has taken it over."""
        self.journal.close()
        if self.delivery is not None:
            self.delivery.forget(self.folder)

    @property
    def pending(self) -> bool:
        """Whether nothing is recorded yet, here or on the server, so that the run can be refused without a trace."""
        return isinstance(self.journal, Journal) and (self._refused or not self.journal.begun)

    def discard(self) -> None:
        """Remove a pending run."""
        self.journal.close()
        remove_unbegun(self.folder, self.delivery)

    def close(self, ending: Ending = COMPLETED) -> None:
        """End the record; the outermost run waits for its delivery and says what was left undelivered.

        Raises UserError: the end of a FINISHED run cannot be written. (Other runs report what ended them first.)
        """
        try:
            self._end_record(ending)
        except UserError:
            self.journal.close()
            if self.delivery is not None and self.parent is None:
                self.delivery.finish(0.0)
            if ending.status == "FINISHED":
                raise
            return
        if self.parent is not None or self.follower:
            return
        self._say_goodbye(ending)
        if self.delivery is None:
            logger.info("tracking was offline; to deliver: %s %s", DELIVER, self.folder)
            return
        if not self.delivery.finish(self.config.tracking.finish_seconds) and ending.exit_code != 2:
            logger.warning("the tracking server did not receive everything; the rest: %s %s", DELIVER, self.folder)
        self._say_version()

    def _say_goodbye(self, ending: Ending) -> None:
        """Say where everything is, or what continues the run."""
        if ending.outcome == "killed" and self.command is not None:
            command = secrets.mask(naming.command_of(self.step, self.command))
            logger.info("to continue: %s", naming.continued(self.step, command, str(self._run_id or self.folder)))
        elif ending.status == "FINISHED":
            there = [name for name in WORTH_A_LOOK if (self.folder / name).exists()]
            names = ": " * bool(there) + ", ".join(there)
            size = size_of(self.folder) / 1e6
            logger.info("in %s%s%s", self.folder, f" ({size:.1f} MB)" if size >= 0.05 else "", names)

    def _say_version(self) -> None:
        """Say which version of a registered model this run's student has become, and what judges it."""
        if self.config.register is None or self.command is None:
            return
        where = [text for text in self.command.overrides if text.startswith(("dataset", "tracking."))]
        judge = Command(self.command.cfg, tuple(where), own={"name": self.config.register})
        for folder in folders_with(self.folder, "delivery.json"):  # the main job's student is a nested run's
            versions = (read_state(folder / "delivery.json") or {}).get("versions", {})
            if number := versions.get(self.config.register):
                command = secrets.mask(naming.command_of("promote", judge, {}))
                logger.info("version %s of %s; to promote it: %s", number, self.config.register, command)

    def _end_record(self, ending: Ending) -> None:
        if ending.status != "FINISHED" and isinstance(self.journal, Journal):
            # metrics that no checkpoint covers are dropped: a resume measures them again, and they would appear twice
            self.journal.begin()
            self.journal = Journal.reopen(self.folder, self.journal.hand_over())
        said = dict(ending.tags or {})
        if isinstance(self.journal, Journal) and self.step != "worker":
            self.journal.begin()
            record = records.from_folder(self.folder, description.WATCHED, predictions=ending.status == "FINISHED")
            # the main job's are still held back
            record = replace(record, metrics={**record.metrics, **records.results(self.folder)})
            before = record.tags.get(description.NOTE, description.RUNNING)
            if self.step not in description.REPORTS or before.startswith(description.RUNNING):
                note = description.describe(record, self.config, self.step, self.folder, ending)
                said[description.NOTE] = secrets.mask(note)
        if said:
            self.journal.tags(said)
        log = self.folder / "run.log"
        if log.exists() and not self.follower:
            self.journal.artifact(log)
        resumable = ending.status != "FINISHED" or self.config.checkpoint.keep
        self.journal.end(*ending[:4], resumable=resumable)
        # nested runs keep theirs until the outermost has finished: on another machine it continues from them
        if not (resumable or self.follower) and (self.parent is None or self.parent.step == "worker"):
            for folder in folders_with(self.folder, f"checkpoints/{SLOTS[0]}"):
                Slots(folder).clear()
