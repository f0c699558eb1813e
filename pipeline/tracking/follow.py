"""Follow a run's journal and those of its nested runs, and deliver all of them to one tracking server."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from pipeline import journal, urls
from pipeline.errors import UserError
from pipeline.files import acquire, release
from pipeline.tracking import checkpoints
from pipeline.tracking.nested import belongs, check_own_files
from pipeline.tracking.run_delivery import RunDelivery
from pipeline.tracking.server import connect

log = logging.getLogger("asib.delivery")

LOCK, TAKEOVER = "delivery.lock", "delivery.takeover"
WRITER = "by the writer's"
"""Content of a takeover request made by the delivery of the process that now writes the folder."""


class DeliveryLoop:
    """Delivery of the run in `folder` and of its nested runs; `run_once` until it says done.

    Args:
        folder: the run's folder; its journal may appear later.
        client: a connected client; made by default.
        adopt, resume, live: as for `RunDelivery`.
        patience: seconds to wait while another delivery has the folder.
        on_attached: called with each run when it exists on the server.

    Raises:
        UserError: the server refuses, or another delivery has the folder.
    """

    def __init__(
        self,
        folder: Path,
        uri: str,
        *,
        client: MlflowClient | None = None,
        adopt: str | None = None,
        resume: str | None = None,
        live: bool = False,
        patience: float = 0.0,
        on_attached: Callable[[RunDelivery], None] | None = None,
    ) -> None:
        self.folder = folder.absolute()
        self.uri = urls.tracking(uri)
        self._live = live
        self._on_attached = on_attached
        self._locks: dict[Path, int] = {}
        self._elsewhere: set[Path] = set()
        self._asked: set[Path] = set()  # folders that another delivery still holds
        self._past = [0, 0]  # `refused` and `progress` of runs that are no longer followed
        self._parents: dict[Path, RunDelivery] = {}
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} does not exist: the run was refused, or its folder removed")
        self._lock_top(patience)
        self.client = client or connect(self.uri)
        self.top = self._run_delivery(self.folder, adopt=adopt, resume=resume)
        self.runs: dict[Path, RunDelivery] = {self.folder: self.top}

    def __enter__(self) -> DeliveryLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the folders."""
        for folder in [*self._locks, *self._asked]:
            self._release(folder)

    @property
    def refused(self) -> int:
        """Number of items that the server permanently refused; delivery.log names them."""
        return self._past[0] + sum(run.refused for run in self.runs.values())

    def damage(self) -> list[str]:
        """One sentence for each damaged line of the followed journals."""
        return [line for folder in self.runs for line in journal.damage(folder / journal.FILE)]

    @property
    def progress(self) -> int:
        """A number that grows whenever something was sent."""
        return self._past[1] + sum(run.state.offset for run in self.runs.values())

    def asked_to_leave(self) -> bool:
        """Whether a newer delivery waits for this folder (a resume while the server was away)."""
        return (self.folder / TAKEOVER).exists()

    def give_way(self, trainer_dead: bool) -> None:
        """Release the nested runs that a newer delivery asks for: its trainer is writing them, or ours is dead."""
        for folder in [folder for folder in self.runs if folder != self.folder]:
            with contextlib.suppress(OSError):
                request = (folder / TAKEOVER).read_text()
                if trainer_dead or request == WRITER:
                    log.info("a newer delivery has %s", folder)
                    self.forget(folder)

    def forget(self, folder: Path) -> None:
        """Stop following a nested run and those below it, until its parent's journal names it again."""
        folder = Path(os.path.normpath(folder.absolute()))
        for run in self.runs.values():
            run.forget(folder)
        self._drop(folder)

    def run_once(self, final: bool = False) -> bool:
        """Send everything that the journals hold now; `final` and errors as for `RunDelivery.deliver`.

        Returns:
            True when the run and its nested runs have ended and everything is on the server.
        """
        # Entries of a run, and of its children, may name further children.
        queue = [self.folder]
        for folder in queue:
            if folder != self.folder and folder not in self._parents:
                continue  # it was retired with its parent
            run = self._follow(folder)
            if run is None:
                continue
            run.deliver(final)
            for child in run.children:
                if child not in queue:
                    self._parents.setdefault(child, run)
                    queue.append(child)
            self._retire(folder)
        done = self.top.state.ended and all(self._finished(folder) for folder in queue)
        if done:
            for run in map(self.runs.get, self.top.children if self.top.carrier else [self.folder]):
                self._clear(run)
        return done

    def _clear(self, run: RunDelivery | None) -> None:
        """Delete on the server what only a resume would need of a run that is over, and of those nested in it."""
        if run is None or run.resumable:
            return
        for child in run.children:
            self._clear(self.runs.get(child))
        if run.state.checkpoint:
            checkpoints.remove(self.client, run.state)
            run.state.save(run.folder)

    def _deliver_children(self, parent: RunDelivery) -> None:
        """Deliver what the parent's nested runs hold now, since the parent's next entry may refer to it."""
        for folder in parent.children:
            self._parents.setdefault(folder, parent)
            run = self._follow(folder)
            if run is not None:
                run.deliver()

    def close_unfinished(self) -> None:
        """Mark every followed run without an end as KILLED: its trainer died without writing one."""
        for run in self.runs.values():
            if run.attached and not run.state.ended:
                run.kill()

    def writer_alive(self) -> bool:
        """Whether a process is still writing one of the journals."""
        return any(journal.writer_alive(folder) for folder in self.runs)

    def _run_delivery(self, folder: Path, **more: Any) -> RunDelivery:
        return RunDelivery(folder, self.uri, self.client, self._live, self._deliver_children, **more)

    def _follow(self, folder: Path) -> RunDelivery | None:
        run = self.runs.get(folder)
        if run is None:
            if folder in self._elsewhere or not (folder / journal.FILE).exists():
                return None
            parent = self._parents.get(folder)
            if parent is not None and not belongs(folder, parent.folder, self._live):
                log.error("%s names %s, which is not a run of its own; refused", parent.folder, folder)
                self._past[0] += 1
                self._elsewhere.add(folder)
                return None
            if not self._lock(folder, 0.0):
                if self._live and parent is not None and parent.carrier:
                    # Our trainer continues a run that another worker began.
                    self._asked.add(folder)
                    with contextlib.suppress(OSError):
                        (folder / TAKEOVER).write_text(WRITER)
                else:
                    log.info("%s is delivered by another process", folder)
                    self._elsewhere.add(folder)
                return None
            self._withdraw(folder)  # including a request by a process that was killed meanwhile
            run = self._run_delivery(folder, parent=parent)
            self.runs[folder] = run
        if not run.attached:
            if not run.attach():
                return None
            if self._on_attached is not None:
                self._on_attached(run)
        return run

    def _finished(self, folder: Path) -> bool:
        if folder in self._asked:
            return False
        run = self.runs.get(folder)
        return run is None or run.state.ended or not journal.writer_alive(folder)

    def _retire(self, folder: Path) -> None:
        """Release a carrier's child that has ended: a worker has hundreds, each with an open file.

        The newest stays: to resume an ended run, a trainer names it first, and only then writes to its journal.
        """
        parent = self._parents.get(folder)
        if parent is not None and parent.carrier and folder not in parent.children[-1:] and self._over(folder):
            self._clear(self.runs[folder])
            parent.forget(folder, parent.state.offset)
            self._drop(folder)

    def _over(self, folder: Path) -> bool:
        run = self.runs.get(folder)
        return run is not None and run.state.ended and all(self._over(child) for child in run.children)

    def _drop(self, folder: Path) -> None:
        run = self.runs.pop(folder, None)
        if run is not None:
            self._past[0] += run.refused
            self._past[1] += run.state.offset
            for child in run.children:
                self._drop(child)
        self._parents.pop(folder, None)
        self._elsewhere.discard(folder)
        self._release(folder)

    def _lock(self, folder: Path, patience: float) -> bool:
        fd = acquire(folder / LOCK, patience=patience)
        if fd is not None:
            self._locks[folder] = fd
        return fd is not None

    def _release(self, folder: Path) -> None:
        if folder in self._asked:
            self._withdraw(folder)
        if folder in self._locks:
            release(self._locks.pop(folder))

    def _withdraw(self, folder: Path) -> None:
        self._asked.discard(folder)
        (folder / TAKEOVER).unlink(missing_ok=True)

    def _lock_top(self, patience: float) -> None:
        check_own_files(self.folder)
        request = self.folder / TAKEOVER
        if not self._lock(self.folder, 0.0):
            # A delivery whose trainer is dead leaves when it sees this; with a living trainer it stays.
            request.touch()
            if not self._lock(self.folder, patience):
                request.unlink(missing_ok=True)
                raise UserError(f"{self.folder} is being delivered by another process: wait for it or end it")
        request.unlink(missing_ok=True)
