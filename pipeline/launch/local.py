"""Workers as processes of this machine, each under a process of submitit that watches it."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import read_state
from pipeline.launch import processes
from pipeline.launch.cluster import LocalCluster
from pipeline.launch.launcher import Handle, Launcher
from pipeline.paths import REPOSITORY

TEN_YEARS = 60 * 24 * 3650
WARNING_S = 30
"""SIGUSR2 comes this long before `timeout_minutes` is over."""


class Here(Launcher):
    """Workers of `cluster=local`. A handle is the watching process, with the `slot` that decides its devices."""

    cluster: LocalCluster
    poll_s = 0.1

    def __init__(self, cluster: LocalCluster, folder: Path, workers: int) -> None:
        super().__init__(cluster, folder, workers)
        self._jobs: list[Any] = []  # this process's own children, which it has to wait for

    def check(self) -> None:
        have, wanted = visible_gpus(), self.cluster.gpus
        if wanted != "auto":
            absent = [str(g) for g in wanted if str(g) not in have]
            if absent:
                there = f"GPUs {', '.join(have)}" if have else "no GPU"
                raise UserError(f"cluster.gpus: no GPU {', '.join(absent)}; this machine shows {there}")
        need, used = self.cluster.processes_per_trial, len(self._gpus)
        if 0 < used < need:
            raise UserError(f"cluster.processes_per_trial={need}: each process takes a GPU; there are {used}")

    def plan(self) -> str:
        lines = [f"{self.workers} workers on this machine, {self.cluster.processes_per_trial} processes each"]
        for slot in range(self.workers):
            devices = ",".join(self._devices(slot)) or "none"
            lines.append(f"  worker {slot}: GPUs {devices}, OMP_NUM_THREADS={self._threads()}")
        return "\n".join(lines)

    def begin(self, works: Sequence[Callable[..., int]]) -> list[Handle]:
        from submitit import LocalExecutor

        executor = LocalExecutor(self.folder / "jobs")
        executor.update_parameters(
            timeout_min=self.cluster.timeout_minutes or TEN_YEARS,
            signal_delay_s=WARNING_S,
            tasks_per_node=self.cluster.processes_per_trial,
            stderr_to_stdout=True,
        )
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
        busy = [handle["slot"] for handle in self.living()]
        free = [slot for slot in range(len(busy) + len(works)) if slot not in busy]
        handles = []
        for work, slot in zip(works, free, strict=False):
            with processes.environment(PYTHONPATH=path, OMP_NUM_THREADS=str(self._threads())), _deaf_to_the_terminal():
                job = executor.submit(partial(work, devices=self._devices(slot), requeue=False))
            self._jobs.append(job)
            handles.append({"slot": slot, **processes.identity(int(job.job_id))})
        return handles

    def present(self, handles: list[Handle]) -> list[Handle]:
        """The workers whose watching processes are alive; a watching process ends with what it watches."""
        self._jobs = [job for job in self._jobs if not job.done()]  # reaps those that have ended
        return [handle for handle in handles if processes.lives(handle)]

    def terminate(self, handles: list[Handle]) -> None:
        """SIGTERM to the watching processes: submitit hands it on."""
        for handle in handles:
            processes.send(handle, signal.SIGTERM)

    def kill(self, handles: list[Handle]) -> None:
        working = map(read_state, (self.folder / "processes").glob("*.json"))
        for process in (*filter(None, working), *handles):
            processes.send(process, signal.SIGKILL)

    @cached_property
    def _gpus(self) -> tuple[str, ...]:
        return visible_gpus() if self.cluster.gpus == "auto" else tuple(map(str, self.cluster.gpus))

    def _devices(self, slot: int) -> tuple[str, ...]:
        """The GPUs of a worker's processes, in turn."""
        gpus, count = self._gpus, self.cluster.processes_per_trial
        return tuple(gpus[(slot * count + k) % len(gpus)] for k in range(count)) if gpus else ()

    def _threads(self) -> int:
        """This process's cores, divided among the workers; a smaller OMP_NUM_THREADS set for the command is kept."""
        share = max(1, cores() // (self.workers * self.cluster.processes_per_trial))
        given = os.environ.get("OMP_NUM_THREADS", "")
        return min(share, int(given)) if given.isdecimal() and int(given) > 0 else share


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> tuple[str, ...]:
    """Names of this machine's GPUs; if CUDA_VISIBLE_DEVICES is set, those that it leaves. Needs no torch."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        try:
            given = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        except (OSError, subprocess.SubprocessError):  # no driver: no GPUs
            return ()
    return tuple(name for name in given.replace(",", " ").split() if name != "-1")


@contextmanager
def _deaf_to_the_terminal() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C, Ctrl-\\ and the terminal's end: exec keeps signals ignored."""
    numbers: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
