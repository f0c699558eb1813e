"""Start, count and stop workers; the subclasses `Here` and `Slurm` say where they run.

The launcher's folder records what was started, so that the next launcher of the same folder, after a driver was
killed, counts and stops those workers too.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.files import warn_once
from pipeline.launch.cluster import ClusterConfig
from pipeline.launch.entry import enter

Handle = dict[str, Any]
"""What a kind of cluster uses to find a worker again; JSON."""
AGAIN_S = 2.0
"""Interval of sending a signal again: a process that is just starting may lose one."""
KILL_S = 30.0


class Launcher(ABC):
    """The workers of one driver.

    Args:
        folder: for logs and for what was started; reachable from the cluster's nodes.
        workers: how many run at a time; they share the cores.

    Example:
        >>> launcher = Here(load("local", {}), Path("runs/sweep/launch"), workers=2)
        >>> launcher.start(work, 2, study="kd_ib_tau-0123456789")
    """

    poll_s: float

    def __init__(self, cluster: ClusterConfig, folder: Path, workers: int) -> None:
        self.cluster, self.folder, self.workers = cluster, folder.absolute(), workers
        self._ledger = self.folder / f"workers-{cluster.kind}.jsonl"  # other kinds have other handles

    @abstractmethod
    def check(self) -> None:
        """Raise UserError, in one line and before anything is started, if these workers could not be started."""

    @abstractmethod
    def plan(self) -> str:
        """What `start` would submit, as text."""

    @abstractmethod
    def begin(self, works: Sequence[Callable[..., int]]) -> list[Handle]:
        """Start a worker for each of `works`: calls of `enter` that still lack `devices` and `requeue`."""

    @abstractmethod
    def present(self, handles: list[Handle]) -> list[Handle]:
        """The workers among these that are pending, running or requeued."""

    @abstractmethod
    def terminate(self, handles: list[Handle]) -> None:
        """Send SIGTERM to the working processes."""

    @abstractmethod
    def kill(self, handles: list[Handle]) -> None:
        """Send SIGKILL to everything that belongs to the workers."""

    def start(self, work: Callable[..., int], count: int, **arguments: Any) -> list[Handle]:
        """Start `count` workers; call it from the main thread.

        Args:
            work: a function of a module, called in each worker's process as `work(index=k, **arguments)`, where k
                counts all workers ever started from this folder. It installs its own handlers of SIGTERM and of
                `PREEMPTION`, and returns `PREEMPTED` after the latter.

        Raises:
            UserError: Slurm does not take the jobs.
        """
        path, before = f"{work.__module__}:{work.__name__}", len(self._started())
        indices = range(before, before + count)
        works = [partial(enter, work=path, index=k, folder=str(self.folder), arguments=arguments) for k in indices]
        self.folder.mkdir(parents=True, exist_ok=True)
        handles = self.begin(works)
        with self._ledger.open("a") as ledger:
            for handle in handles:
                ledger.write(json.dumps({"handle": handle}) + "\n")
        return handles

    def living(self) -> list[Handle]:
        """All workers ever started from this folder that have not ended."""
        return self.present(self._started())

    def alive(self) -> int:
        """The number of living workers."""
        return len(self.living())

    def stop(self, grace_seconds: float = 60.0) -> None:
        """End all workers: SIGTERM to the working processes, then SIGKILL to those that remain after a while.

        Returns when none is left, or half a minute after SIGKILL.
        """
        for send, seconds in ((self.terminate, grace_seconds), (self.kill, KILL_S)):
            end, again = time.monotonic() + seconds, 0.0
            while (living := self.living()) and time.monotonic() < end:
                if time.monotonic() >= again:
                    send(living)
                    again = time.monotonic() + AGAIN_S
                time.sleep(self.poll_s)

    def _started(self) -> list[Handle]:
        if not self._ledger.exists():
            return []
        found = []
        for line in self._ledger.read_text(errors="replace").splitlines():
            try:
                found.append(json.loads(line)["handle"])
            except (ValueError, TypeError, KeyError):  # a driver was killed while writing it
                warn_once(f"{self._ledger}: a line is damaged: skipped")
        return found
