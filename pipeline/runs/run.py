"""A tracked run: its folder, its journal, its delivery to MLflow, its nested runs, and how it is continued."""

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pipeline import secrets
from pipeline.compose import compose
from pipeline.config import Config, config_hash
from pipeline.config.places import output_dir
from pipeline.errors import HelperFailed, Interrupted, Taken, UserError
from pipeline.files import locked, read_state, release, write_atomically
from pipeline.journal import FILE, Carrier, Journal, NullJournal, read_header, take
from pipeline.runs import git, records
from pipeline.runs.ending import COMPLETED, ending_of, understood
from pipeline.runs.folders import ended, find_folder, fresh_folder, writable
from pipeline.runs.opening import (
    CONFIG,
    deliver,
    described,
    fetch_checkpoint,
    give_up,
    position,
    refuse_finished,
    refuse_other_step,
    tracking_uri,
)
from pipeline.runs.run_log import log_to
from pipeline.tracking import start
from pipeline.tracking.client import DELIVER, Delivery
from pipeline.training import distributed
from pipeline.training.checkpoint import Slots

logger = logging.getLogger("asib")


class Run:
    """One run of a step; made by `open`, ended by `close`.

    Attributes:
        folder: everything the run leaves on this machine.
        journal: its record.
        state: the checkpoint that it continues from, None at a fresh start.
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
        parent_id: str | None = None,
    ) -> None:
        self.step, self.config, self.folder, self.journal = step, config, folder, journal
        self.delivery, self.state, self.parent = delivery, state, parent
        self.slots = Slots(folder / "checkpoints")
        self.started = time.monotonic()
        self.conclusion: tuple[str, int] = ("completed", 0)
        """Outcome and exit code of a step that comes to its end; a promotion's verdict is one."""
        self._run_id: str | None = None
        self._refused = False
        """Whether the server did not take it when it was new: a reader's, say."""
        self._from_server = False
        """Whether it was begun on another machine: its nested runs may be on the server, and not here."""
        self._nesting = parent_id or journal.id
        """From what the journal ids of its nested runs are derived."""

    @property
    def config_hash(self) -> str:
        return config_hash(self.config)

    @property
    def follower(self) -> bool:
        """Whether this is another process than the first of several: it trains, and leaves the record to the first."""
        return isinstance(self.journal, NullJournal)

    @classmethod
    def follow(cls, step: str, config: Config, folder: Path, parent: "Run | None" = None) -> "Run":
        """The first process's run, seen from another."""
        slots = Slots(folder / "checkpoints")
        state = slots.read()[0] if slots.manifest.exists() else None
        return cls(step, config, folder, NullJournal(), None, state, parent)

    @classmethod
    def carrier(cls, config: Config, folder: Path, stands_for: Carrier) -> "Run":
        """What a sweep's worker has in the place of a run: its nested runs become those of `stands_for`."""
        with writable(config):
            journal = Journal.create(folder, experiment=stands_for.experiment, name=None, carrier=stands_for)
        delivery = deliver(config, folder)
        return cls("sweep", config, folder, journal, delivery, parent_id=stands_for.journal)

    # starting --------------------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, step: str, config: Config, delivery: Delivery | None = None) -> "Run":
        """Start a run, or continue the one that `resume` names; delivery starts at once, beside this process's imports.

        Args:
            delivery: that of a new run's folder, where it was started before.

        Raises:
            UserError: what `resume` names cannot be continued.
        """
        if config.resume is not None:
            return cls._resume(step, config)
        folder = delivery.folder if delivery is not None else None
        return cls._begin(step, config, folder or fresh_folder(config, step), None, delivery)

    @classmethod
    def _begin(
        cls,
        step: str,
        config: Config,
        folder: Path,
        parent: "Run | None",
        delivery: Delivery | None = None,
        known_as: str | None = None,
        name: str | None = None,
        key: str | None = None,
    ) -> "Run":
        """`known_as`: the journal id of the run on the server that this one is; it has no checkpoint to go on from."""
        name = name or (folder.name if parent is not None else config.run_name)
        usual = " ".join([step, config.rung or config.model.student.name, f"seed {config.seed}"])
        if parent is not None:
            parent.journal.begin()
        try:
            with writable(config):
                folder.mkdir(parents=True, exist_ok=True)
            journal = Journal.create(
                folder,
                journal=known_as if parent is None else parent.nested_id(key or folder.name),
                experiment=config.tracking.experiment,
                name=name,
                usual_name=usual,
                tags={"asib.step": step},
                parent=parent.folder if parent is not None else None,
                pending=parent is None,
            )
        except UserError:
            if not (folder / FILE).exists():
                give_up(folder, delivery)
            raise
        if parent is not None:
            parent.journal.child(folder)
        run = cls(step, config, folder, journal, delivery if parent is None else parent.delivery, None, parent)
        try:
            if parent is None and delivery is None:
                run.delivery = deliver(config, folder)
            run.describe()
        except UserError:
            if parent is None:
                run.discard()
            raise
        return run

    @classmethod
    def _resume(cls, step: str, config: Config) -> "Run":
        name = config.resume
        assert name is not None
        root = output_dir(config)
        folder = find_folder(root, name)
        if folder is not None:
            return cls._continue(step, config, folder, None)
        # unknown to this machine: the tracking server alone has to do
        if config.tracking.mode == "offline":
            raise UserError(f"resume={name}: no such run in output_dir={config.output_dir}, and tracking is off line")
        if "/" in name:
            raise UserError(f"resume={name}: no run in that folder; give the folder of a run, or a run id")
        with writable(config):
            root.mkdir(parents=True, exist_ok=True)
        with locked(root / f".{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock"):
            folder = find_folder(root, name)  # another process may have brought it here meanwhile
            if folder is None:
                return cls._from_tracking_server(step, config, name)
        return cls._continue(step, config, folder, None)

    @classmethod
    def _from_tracking_server(cls, step: str, config: Config, name: str) -> "Run":
        folder = fresh_folder(config, step, name[:6])
        with writable(config):
            folder.mkdir(parents=True)
        delivery = start.start_delivery(folder, uri=tracking_uri(config), resume=name)
        try:
            info = delivery.run_info(name)
            refuse_other_step(name, info["tags"].get("asib.step"), step)
            refuse_finished(name, info["status"] == "FINISHED", config)
            begun = fetch_checkpoint(delivery, name, folder)
        except UserError as error:
            give_up(folder, delivery)
            raise UserError(str(error) if str(error).startswith("resume=") else f"resume={name}: {error}") from error
        if begun:
            run = cls._continue(step, config, folder, None, delivery)
        else:
            run = cls._begin(step, config, folder, None, delivery, info["tags"].get("asib.journal"))
        run._from_server = True
        return run

    @classmethod
    def _continue(
        cls,
        step: str,
        config: Config,
        folder: Path,
        parent: "Run | None",
        delivery: Delivery | None = None,
    ) -> "Run":
        name = config.resume or folder.name
        slots = Slots(folder / "checkpoints")
        state: Any = None
        lock = take(folder)  # before anything is read: another process may be writing it, or may just have finished it
        try:
            if parent is None and delivery is None:
                header = read_header(folder)
                refuse_other_step(name, header.data["tags"].get("asib.step") if header else None, step)
                refuse_finished(name, ended(folder), config)
            if slots.manifest.exists():
                state, saved = slots.read()
        except BaseException:
            release(lock)
            raise
        if state is not None:
            journal = Journal.restore(folder, state["journal"], (saved.path, saved.sha256, saved.slot), lock)
        else:
            journal = Journal.reopen(folder, lock)
        if parent is not None:
            delivery = parent.delivery
        elif delivery is None:
            delivery = deliver(config, folder)
        run = cls(step, config, folder, journal, delivery, state, parent)
        if state is None and not described(folder):
            run.describe()  # it was killed before it had stated what it is
        journal.tags({"asib.resumed_from": position(state)})
        return run

    def nested_id(self, key: str) -> str:
        """The journal id of a nested run: the same on whichever machine this one is continued."""
        return hashlib.sha256(f"{self._nesting}/{key}".encode()).hexdigest()[:32]

    def child(self, step: str, key: str, config: Config, name: str | None = None, folder: Path | None = None) -> "Run":
        """A nested run in `<folder>/<key>`, named so or `name`; what an interrupted parent left there is continued.

        Args:
            folder: where it is instead.
        """
        folder = folder or self.folder / key
        if self.follower:
            return Run.follow(step, config, folder, self)
        if (folder / "journal.jsonl").exists() or (folder / "checkpoints" / "manifest.json").exists():
            # begun by another worker, a copy of what that has left, or by this run, killed before it had named it
            self.journal.child(folder)
            return Run._continue(step, config, folder, self)
        run = Run._begin(step, config, folder, self, name=name, key=key)
        if self._from_server and self.delivery is not None:
            # by its journal's id delivery has found what there is of it on the server
            if fetch_checkpoint(self.delivery, self.delivery.child_ready(folder), folder):
                run.journal.close()
                run = Run._continue(step, config, folder, self)
            run._from_server = True
        return run

    def look_on_server(self) -> None:
        """From now on nested runs that are not on this machine are looked for on the server, and continued."""
        self._from_server = True

    def finished_child(self, key: str) -> dict[str, float] | None:
        """The results of a nested run that an earlier, interrupted start of this one has finished."""
        folder = self.folder / key
        if not ended(folder):
            return None
        metrics = (read_state(folder / "results.json") or {}).get("metrics")
        return dict(metrics if isinstance(metrics, dict) else records.from_folder(folder).metrics)

    def describe(self) -> None:
        """What every run states at its start: parameters, tags, the configuration as a file."""
        self.journal.params(compose.params(self.config))
        self.journal.tags({"asib.config_hash": self.config_hash, **git.tags()})
        if self.config.rung:
            self.journal.tags({"asib.rung": self.config.rung})
        diff = git.difference() if self.config.tracking.git_diff else ""
        if diff:
            self.write("git.diff", secrets.mask_lines(diff))
        self.write(CONFIG, compose.dump(self.config))  # the last: with it the description is whole

    def restate(self) -> None:
        """The configuration of a run that is continued for more epochs; its parameters in MLflow cannot change."""
        self.journal.tags({"asib.config_hash": self.config_hash})
        self.write(CONFIG, compose.dump(self.config))

    # while it goes on ------------------------------------------------------------------------------------------------

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
                self.delivery.wait_fetched()  # a server that refuses us leaves no run behind
            self.journal.begin()
        if self.delivery is not None and self._run_id is None:
            try:
                answer = self.delivery.wait_ready(timeout=300)
            except UserError as error:
                self._refused = fresh and not isinstance(error, HelperFailed)
                raise
            self._run_id = answer.run_id
            logger.info("tracked as %s", answer.url)
            given = os.environ.get("MLFLOW_RUN_ID")
            if given and given != answer.run_id and self.config.resume is None:
                logger.info("MLFLOW_RUN_ID=%s has ended or is written by another step: this is a run of its own", given)

    @property
    def run_id(self) -> str | None:
        """The MLflow run id, None off line; waits until it is known."""
        if self._run_id is None and self.delivery is not None:
            if self.parent is None:
                self.ready()
            else:
                self._run_id = self.delivery.child_ready(self.folder)
        return self._run_id

    def fetch(self, uri: str, to: Path) -> Path:
        """Download `runs:/…` to a local folder. Raises UserError."""
        if self.follower:
            distributed.barrier()
            return to / uri.rsplit("/", 1)[-1]
        path = self._fetch(uri, to)
        distributed.barrier()
        return path

    def _fetch(self, uri: str, to: Path) -> Path:
        if self.delivery is None:
            return start.fetch_now(tracking_uri(self.config), uri, to)
        return self.delivery.fetch(uri, to)

    def write(self, name: str, text: str, to: str = "") -> Path:
        """A text file of the run, logged as an artifact."""
        path = self.folder / name
        if self.follower:
            return path
        write_atomically(path, secrets.mask(text))
        self.journal.artifact(path, to)
        return path

    # ending ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def nested(self) -> Iterator[None]:
        """A nested run's life: its record ends as its job does."""
        with nullcontext() if self.follower else log_to(self.folder):
            try:
                yield
            except Taken:
                self.abandon()
                raise
            except (Interrupted, Exception) as error:
                said = understood(error, self.folder)
                self.close(*ending_of(said))
                if said is error:
                    raise
                raise said from error
            self.close(*COMPLETED)

    def abandon(self) -> None:
        """Another process has taken this nested run over: nothing more of it is written or sent here, nor its end."""
        self.journal.close()
        if self.delivery is not None:
            self.delivery.forget(self.folder)

    @property
    def pending(self) -> bool:
        """Whether nothing of it counts yet, here or on the server: it may still be refused without a trace."""
        return isinstance(self.journal, Journal) and (self._refused or not self.journal.begun)

    def discard(self) -> None:
        """Leave nothing of a pending run."""
        self.journal.close()
        give_up(self.folder, self.delivery)

    def close(
        self,
        status: str,
        outcome: str,
        exit_code: int,
        message: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """End the record; the outermost run waits for its delivery and says what was left undelivered.

        Raises:
            UserError: the end of a FINISHED run cannot be written. (Others say first what has ended them.)
        """
        try:
            self._end_record(status, outcome, exit_code, message, tags)
        except UserError:
            self.journal.close()
            if self.delivery is not None and self.parent is None:
                self.delivery.finish(0.0)
            if status == "FINISHED":
                raise
            return
        if self.parent is not None or self.follower:
            return
        if self.delivery is None:
            logger.info("tracking was off line; to deliver: %s %s", DELIVER, self.folder)
            return
        if not self.delivery.finish(self.config.tracking.finish_seconds) and exit_code != 2:
            logger.warning("the tracking server did not take everything: %s %s", DELIVER, self.folder)

    def rewind(self, text: str, at: tuple[Path, str, int] | None) -> None:
        """Take the record back to `text`, as the checkpoint `at` has it; None: as the run began."""
        if isinstance(self.journal, Journal):
            self.journal = Journal.restore(self.folder, text, at, self.journal.hand_over())

    def _end_record(
        self, status: str, outcome: str, exit_code: int, message: str | None, tags: Mapping[str, str] | None
    ) -> None:
        if status != "FINISHED" and isinstance(self.journal, Journal):
            # metrics that no checkpoint covers are given up: a resume measures them again, and they would come twice
            self.journal.begin()
            self.journal = Journal.reopen(self.folder, self.journal.hand_over())
        if tags:
            self.journal.tags(tags)
        log = self.folder / "run.log"
        if log.exists() and not self.follower:
            self.journal.artifact(log)
        self.journal.end(status, outcome, exit_code, message)


__all__ = ["Run", "log_to", "tracking_uri"]
