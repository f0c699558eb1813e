"""Start, count and stop a sweep's workers, on this machine or through Slurm.

The launcher's folder records what was started, so that the next launcher of the same folder, after a driver was
killed, counts and stops those workers too.
"""

import inspect
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import UserError
from pipeline.files import warn_once
from pipeline.sweep.launch.cluster import ClusterConfig, LocalCluster, SlurmCluster, load
from pipeline.sweep.launch.entry import PREEMPTED, PREEMPTION, enter, requeue_on_signal
from pipeline.sweep.launch.local import Here
from pipeline.sweep.launch.slurm import Slurm

__all__ = ["PREEMPTED", "PREEMPTION", "ClusterConfig", "Launcher", "load", "requeue_on_signal"]
AGAIN_S = 2.0
"""A process that is only just starting may lose a signal: it is sent again."""
KILL_S = 30.0


class Backend(Protocol):
    """A kind of cluster. `Worker.handle` is what it finds a worker by later."""

    poll_s: float

    def check(self) -> None: ...
    def plan(self) -> str: ...
    def start(self, works: Sequence[Callable[..., int]], busy: list[int]) -> list[tuple[str, dict[str, Any]]]: ...
    def alive(self, handles: list[dict[str, Any]]) -> list[bool]: ...
    def terminate(self, handles: list[dict[str, Any]]) -> None: ...
    def kill(self, handles: list[dict[str, Any]]) -> None: ...


@dataclass(frozen=True)
class Worker:
    """One that was started; `handle` is its backend's."""

    index: int
    job: str
    handle: dict[str, Any]


class Launcher:
    """The workers of one sweep.

    Args:
        folder: for logs and for what was started; reachable from the cluster's nodes.
        workers: how many run at a time; they share the cores.

    Example:
        >>> launcher = Launcher(load("local", {}), Path("runs/sweep/launch"), workers=2)
        >>> launcher.start(work, 2, study="kd_ib_tau-0123456789")
    """

    def __init__(self, cluster: ClusterConfig, folder: Path, workers: int) -> None:
        self.cluster, self.folder, self.workers = cluster, folder.absolute(), workers
        self._ledger = self.folder / "workers.jsonl"
        if isinstance(cluster, SlurmCluster):
            self._backend: Backend = Slurm(cluster, self.folder, workers)
        else:
            assert isinstance(cluster, LocalCluster)
            self._backend = Here(cluster, self.folder, workers)

    def check(self) -> None:
        """Raises UserError where these workers could not be started: one line, before anything is."""
        if self.workers < 1:
            raise UserError(f"workers={self.workers}: give a whole number from 1")
        self._backend.check()

    def plan(self) -> str:
        """What `start` would submit, as text."""
        return self._backend.plan()

    def start(self, work: Callable[..., int], count: int, **arguments: Any) -> list[str]:
        """Start `count` workers; call it from the main thread.

        Args:
            work: a function of a module, called in each worker's process as `work(index=k, **arguments)`, where k
                counts all workers ever started from this folder. It installs its own handlers of SIGTERM and, with
                `requeue_on_signal`, of `PREEMPTION`.

        Returns:
            The job ids: of submitit's process that watches the worker, or Slurm's.

        Raises:
            UserError: Slurm does not take the jobs.
        """
        module = inspect.getmodule(work)
        assert module is not None, "the work is a function of a module"
        assert getattr(module, work.__name__, None) is work, f"{work.__name__} is not found in {module.__name__}"
        assert module.__name__ != "__main__", "workers import the work by its module's name"
        before = self.started()
        path = f"{module.__name__}:{work.__name__}"
        indices = range(len(before), len(before) + count)
        works = [partial(enter, work=path, index=k, folder=str(self.folder), arguments=arguments) for k in indices]
        busy = [w.handle.get("slot", 0) for w in self._living(before)]
        self.folder.mkdir(parents=True, exist_ok=True)
        begun = self._backend.start(works, busy)
        with self._ledger.open("a") as ledger:
            for index, (job, handle) in zip(indices, begun, strict=True):
                ledger.write(json.dumps(asdict(Worker(index, job, handle))) + "\n")
        return [job for job, _ in begun]

    def started(self) -> list[Worker]:
        """All workers ever started from this folder."""
        if not self._ledger.exists():
            return []
        found = []
        for line in self._ledger.read_text(errors="replace").splitlines():
            try:
                found.append(Worker(**json.loads(line)))
            except (ValueError, TypeError):  # a driver was killed in the middle of it
                warn_once(f"{self._ledger}: a line is damaged: skipped")
        return found

    def alive(self) -> int:
        """Number of workers that are pending, running or requeued."""
        return len(self._living(self.started()))

    def stop(self, grace_seconds: float = 60.0) -> None:
        """End all workers: SIGTERM to the processes that work, and, for those still there after a while, SIGKILL.

        Return when none is left, or half a minute after SIGKILL.
        """
        for send, seconds in ((self._backend.terminate, grace_seconds), (self._backend.kill, KILL_S)):
            end, again = time.monotonic() + seconds, 0.0
            while (living := self._living(self.started())) and time.monotonic() < end:
                if time.monotonic() >= again:
                    send([w.handle for w in living])
                    again = time.monotonic() + AGAIN_S
                time.sleep(self._backend.poll_s)

    def _living(self, workers: list[Worker]) -> list[Worker]:
        states = self._backend.alive([w.handle for w in workers])
        return [worker for worker, state in zip(workers, states, strict=True) if state]
