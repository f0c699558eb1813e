"""A tracked run: its folder, its journal, its delivery to MLflow, its nested runs, and how it is continued."""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pipeline import secrets
from pipeline.config import Config, config_hash
from pipeline.config.places import output_dir
from pipeline.errors import Interrupted, NotThere, Taken, UserError
from pipeline.experiment import compose, revision, tracking
from pipeline.experiment.ending import COMPLETED, ending_of
from pipeline.experiment.folders import ended, find_folder, fresh_folder, writable
from pipeline.journal import Carrier, Journal, NullJournal, read_entries, read_header
from pipeline.paths import inside
from pipeline.training import distributed
from pipeline.training.checkpoint import Slots

logger = logging.getLogger("asib")
CONFIG = "config.yaml"


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
        delivery: tracking.Delivery | None,
        state: Any = None,
        parent: "Run | None" = None,
        parent_id: str | None = None,
    ) -> None:
        self.step, self.config, self.folder, self.journal = step, config, folder, journal
        self.delivery, self.state, self.parent = delivery, state, parent
        self.slots = Slots(folder / "checkpoints")
        self.started = time.time()
        self.conclusion: tuple[str, int] = ("completed", 0)
        """Outcome and exit code of a step that comes to its end; a promotion's verdict is one."""
        self._run_id: str | None = None
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
        delivery = _deliver(config, folder)
        return cls("sweep", config, folder, journal, delivery, parent_id=stands_for.journal)

    # starting --------------------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, step: str, config: Config, delivery: tracking.Delivery | None = None) -> "Run":
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
        delivery: tracking.Delivery | None = None,
        known_as: str | None = None,
        name: str | None = None,
        key: str | None = None,
    ) -> "Run":
        """`known_as`: the journal id of the run on the server that this one is; it has no checkpoint to go on from."""
        name = name or (folder.name if parent is not None else config.run_name)
        if name is None and "MLFLOW_RUN_ID" not in os.environ:  # the run that `mlflow run` has made has a name
            name = " ".join([step, config.rung or config.model.student.name, f"seed {config.seed}"])
        with writable(config):
            journal = Journal.create(
                folder,
                journal=known_as if parent is None else parent.nested_id(key or folder.name),
                experiment=config.tracking.experiment,
                name=name,
                tags={"asib.step": step},
                parent=parent.folder if parent is not None else None,
            )
        if parent is not None:
            parent.journal.child(folder)
        delivery = delivery or (_deliver(config, folder) if parent is None else parent.delivery)
        run = cls(step, config, folder, journal, delivery, None, parent)
        run.describe()
        return run

    @classmethod
    def _resume(cls, step: str, config: Config) -> "Run":
        name = config.resume
        assert name is not None
        folder = find_folder(output_dir(config), name)
        if folder is not None:
            return cls._continue(step, config, folder, None)
        # unknown to this machine: the tracking server alone has to do
        if config.tracking.mode == "offline":
            raise UserError(f"resume={name}: no such run in output_dir={config.output_dir}, and tracking is off line")
        if "/" in name:
            raise UserError(f"resume={name}: no run in that folder; give the folder of a run, or a run id")
        folder = fresh_folder(config, step, name[:6])
        with writable(config):
            folder.mkdir(parents=True)
        delivery = tracking.start_delivery(folder, uri=tracking_uri(config), resume=name)
        try:
            info = delivery.run_info(name)
            _refuse_other_step(name, info["tags"].get("asib.step"), step)
            _refuse_finished(name, info["status"] == "FINISHED", config)
            begun = _fetch_checkpoint(delivery, name, folder)
        except UserError as error:
            delivery.finish(0.0)
            shutil.rmtree(folder, ignore_errors=True)
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
        delivery: tracking.Delivery | None = None,
    ) -> "Run":
        name = config.resume or folder.name
        if parent is None and delivery is None:
            header = read_header(folder)
            _refuse_other_step(name, header.data["tags"].get("asib.step") if header else None, step)
            _refuse_finished(name, ended(folder), config)
        slots = Slots(folder / "checkpoints")
        state: Any = None
        if slots.manifest.exists():
            state, saved = slots.read()
            journal = Journal.restore(folder, state["journal"], (saved.path, saved.sha256, saved.slot))
        else:
            journal = Journal.reopen(folder)
        if parent is not None:
            delivery = parent.delivery
        elif delivery is None:
            delivery = _deliver(config, folder)
        run = cls(step, config, folder, journal, delivery, state, parent)
        if state is None and not _described(folder):
            run.describe()  # it was killed before it had stated what it is
        journal.tags({"asib.resumed_from": _position(state)})
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
            if _fetch_checkpoint(self.delivery, self.delivery.child_ready(folder), folder):
                run.journal.close()
                run = Run._continue(step, config, folder, self)
            run._from_server = True
        return run

    def look_on_server(self) -> None:
        """From now on nested runs that are not on this machine are looked for on the server, and continued."""
        self._from_server = True

    def finished_child(self, key: str) -> dict[str, float] | None:
        """The results of a nested run that an earlier, interrupted start of this one has finished."""
        results = self.folder / key / "results.json"
        return json.loads(results.read_text())["metrics"] if ended(self.folder / key) and results.exists() else None

    def describe(self) -> None:
        """What every run states at its start: parameters, tags, the configuration as a file."""
        self.journal.params(compose.params(self.config))
        self.journal.tags({"asib.config_hash": self.config_hash, **revision.tags()})
        if self.config.rung:
            self.journal.tags({"asib.rung": self.config.rung})
        diff = revision.difference() if self.config.tracking.git_diff else ""
        if diff:
            self.write("git.diff", secrets.mask_lines(diff))
        self.write(CONFIG, compose.dump(self.config))  # the last: with it the description is whole

    def restate(self) -> None:
        """The configuration of a run that is continued for more epochs; its parameters in MLflow cannot change."""
        self.journal.tags({"asib.config_hash": self.config_hash})
        self.write(CONFIG, compose.dump(self.config))

    # while it goes on ------------------------------------------------------------------------------------------------

    def ready(self) -> None:
        """Wait until the tracking server has taken the run. Raises UserError when it refuses it."""
        if self.parent is not None:
            self.parent.ready()
        elif self.delivery is not None and self._run_id is None:
            answer = self.delivery.wait_ready(timeout=300)
            self._run_id = answer.run_id
            logger.info("tracked as %s", answer.url)

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
            return tracking.fetch_now(tracking_uri(self.config), uri, to)
        return self.delivery.fetch(uri, to)

    def write(self, name: str, text: str, to: str = "") -> Path:
        """A text file of the run, logged as an artifact."""
        path = self.folder / name
        if self.follower:
            return path
        path.write_text(secrets.mask(text))
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
                self.close(*ending_of(error))
                raise
            self.close(*COMPLETED)

    def abandon(self) -> None:
        """Another process has taken this nested run over: nothing more of it is written or sent here, nor its end."""
        self.journal.close()
        if self.delivery is not None:
            self.delivery.forget(self.folder)

    def close(
        self,
        status: str,
        outcome: str,
        exit_code: int,
        message: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """End the record; the outermost run waits for its delivery and says what was left undelivered."""
        if status != "FINISHED" and isinstance(self.journal, Journal):
            # metrics that no checkpoint covers are given up: a resume measures them again, and they would come twice
            self.journal.close()
            self.journal = Journal.reopen(self.folder)
        if tags:
            self.journal.tags(tags)
        log = self.folder / "run.log"
        if log.exists() and not self.follower:
            self.journal.artifact(log)
        self.journal.end(status, outcome, exit_code, message)
        if self.parent is not None or self.follower:
            return
        if self.delivery is None:
            logger.info("tracking was off line; to deliver: %s %s", tracking.DELIVER, self.folder)
            return
        if not self.delivery.finish(self.config.tracking.finish_seconds) and exit_code != 2:
            logger.warning("the tracking server did not take everything: %s %s", tracking.DELIVER, self.folder)


def tracking_uri(config: Config) -> str:
    """Where runs go."""
    return config.tracking.uri or tracking.default_uri()


def _fetch_checkpoint(delivery: tracking.Delivery, run_id: str, folder: Path) -> bool:
    """Bring a run's newest checkpoint from the server into `folder`; False where it has none. Raises UserError."""
    try:
        fetched = delivery.fetch(f"runs:/{run_id}/checkpoints", folder / "fetched")
    except NotThere:
        return False
    try:
        newest = json.loads((fetched / "manifest.json").read_text())
        file, sha256 = inside(fetched, newest["file"]), str(newest["sha256"])
        if not (file.is_file() and not file.is_symlink()):
            raise UserError(f"its checkpoints/manifest.json names {file.name}, which is not there")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("its checkpoints/manifest.json is damaged") from error
    Slots(folder / "checkpoints").adopt(file, sha256)
    shutil.rmtree(folder / "fetched")
    return True


def _deliver(config: Config, folder: Path) -> tracking.Delivery | None:
    if config.tracking.mode == "offline":
        return None
    return tracking.start_delivery(folder, uri=tracking_uri(config))


def _described(folder: Path) -> bool:
    entries, _ = read_entries(folder / "journal.jsonl")
    return any(entry.kind == "artifact" and entry.data["path"] == CONFIG for entry in entries)


def _refuse_other_step(name: str, made_by: str | None, step: str) -> None:
    if made_by not in (None, step):
        raise UserError(f"resume={name}: that run is of step {made_by}; continue it with steps.{made_by}")


def _refuse_finished(name: str, finished: bool, config: Config) -> None:
    if finished and not config.extend:
        raise UserError(f"resume={name}: that run is finished; extend=true continues it for more epochs")


def _position(state: Any) -> str:
    if state is None:
        return "start"
    position = state["position"]
    return f"epoch {position['epoch']}, batch {position['batch']}"


@contextmanager
def log_to(folder: Path) -> Iterator[None]:
    """Log lines also go to `<folder>/run.log`."""
    handler = logging.FileHandler(folder / "run.log")
    handler.setFormatter(secrets.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


__all__ = ["Run", "log_to", "tracking_uri"]
