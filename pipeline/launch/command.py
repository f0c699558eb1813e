"""Workers that a line of shell starts: any scheduler. Signs of life, signals and ends are files (`remote`), since
schedulers have nothing else in common.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from typing import Any

from pipeline import secrets
from pipeline.errors import UserError
from pipeline.files import write_atomically
from pipeline.launch.cluster import CommandCluster
from pipeline.launch.launcher import Handle, Launcher
from pipeline.paths import REPOSITORY

TIMEOUT_S = 120.0
HANDED_ON = ("ASIB_STORAGE", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")
"""Variables that a worker's script sets, unless they hold a password: schedulers do not all hand on the environment."""


class Command(Launcher):
    """Workers of `cluster=command`. A handle is the worker's `index`, and the scheduler's `job` if it has named one."""

    cluster: CommandCluster
    poll_s = 0.5

    def __init__(self, cluster: CommandCluster, folder: Path, workers: int) -> None:
        super().__init__(cluster, folder, workers)
        self._beats: dict[int, tuple[int, float]] = {}  # a worker's last sign of life, and when it was first seen here

    def check(self) -> None:
        """Raise UserError: no command, one that starts nothing, or a program that is not here."""
        where, line = f"cluster={self.cluster.name}", self.cluster.command
        if not line.strip():
            raise UserError(
                f"{where}: cluster.command is not set: give the line that starts a worker, such as "
                "cluster.command='qsub -V {resources} {script}'"
            )
        if "{command}" not in line and "{script}" not in line:
            raise UserError(f"{where}: cluster.command={line} starts no worker: put {{command}} or {{script}} into it")
        for key, text in (("command", line), ("cancel", self.cluster.cancel or "true")):
            program = text.split()[0]
            if re.fullmatch(r"[\w./+-]+", program) and not _there(program):
                raise UserError(f"{where}: cluster.{key}: there is no program {program} on this machine")

    def plan(self) -> str:
        """The first worker's line and script."""
        return f"{self.workers} workers, each started by:\n  {self._line(0)}\nand {self._script(0)}:\n{self._text(0)}"

    def begin(self, works: Sequence[Callable[..., int]]) -> list[Handle]:
        """Run the command once for each worker. Raises UserError: it fails, or does not return."""
        return [self._submit(work.keywords) for work in works]  # type: ignore[attr-defined]

    def present(self, handles: list[Handle]) -> list[Handle]:
        """The workers that have not ended, and are either still waiting or showing signs of life."""
        return [handle for handle in handles if self._is_present(int(handle["index"]))]

    def terminate(self, handles: list[Handle]) -> None:
        """Ask the working processes to end; those that have not begun will not, and are cancelled."""
        for handle in handles:
            self._stop(handle, SIGTERM)
            if not self._process(handle["index"]).exists():
                self._cancel(handle)

    def kill(self, handles: list[Handle]) -> None:
        for handle in handles:
            self._stop(handle, SIGKILL)
            self._cancel(handle)

    # one worker ------------------------------------------------------------------------------------------------------

    def _process(self, index: int) -> Path:
        return self.folder / "processes" / f"{index}.0.json"

    def _is_present(self, index: int) -> bool:
        if (self.folder / "ended" / str(index)).exists():
            return False
        try:
            beat = self._process(index).stat().st_mtime_ns
        except FileNotFoundError:
            return not (self.folder / "stop" / str(index)).exists()
        now = time.monotonic()
        last, seen = self._beats.get(index, (0, now))
        if beat != last:  # two machines' clocks are not compared
            self._beats[index] = (beat, now)
            return True
        return now - seen < self.cluster.silent_s

    def _stop(self, handle: Handle, number: Signals) -> None:
        marker = self.folder / "stop" / str(handle["index"])
        marker.parent.mkdir(exist_ok=True)
        write_atomically(marker, str(int(number)))

    def _cancel(self, handle: Handle) -> None:
        if self.cluster.cancel and handle.get("job"):
            _shell(self.cluster.cancel.replace("{job}", shlex.quote(handle["job"])), self.folder / "cancelled.log")

    def _submit(self, asked: dict[str, Any]) -> Handle:
        index = int(asked["index"])
        jobs = self.folder / "jobs"
        jobs.mkdir(exist_ok=True)
        request = {**asked, "cwd": str(Path.cwd()), "silent_s": self.cluster.silent_s}
        write_atomically(jobs / f"{index}.json", json.dumps(request))
        script = self._script(index)
        write_atomically(script, self._text(index))
        script.chmod(script.stat().st_mode | 0o100)
        told = jobs / f"{index}_submit.out"
        code = _shell(self._line(index), told)
        said = told.read_text(errors="replace")
        if code != 0:
            last = (said.strip().splitlines() or ["it printed nothing"])[-1]
            why = f"no answer within {TIMEOUT_S:g} s" if code is None else f"exit code {code}: {last:.200}"
            raise UserError(f"cluster={self.cluster.name}: cluster.command has started no worker ({why}); see {told}")
        job = re.search(r"\d[\w.\[\]-]*", said)
        return {"index": index, **({"job": job[0].rstrip(".]")} if job else {})}

    def _script(self, index: int) -> Path:
        return self.folder / "jobs" / f"{index}.sh"

    def _line(self, index: int) -> str:
        script, cluster = shlex.quote(str(self._script(index))), self.cluster
        values = {
            "command": f"sh {script}",
            "script": script,
            "resources": cluster.resources,
            "name": f"asib-{index}",
            "gpus": str(cluster.gpus_per_node),
            "cpus": str(cluster.cpus_per_task or 1),
        }
        return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), cluster.command)

    def _text(self, index: int) -> str:
        """The script: it needs only the folders, the repository and this Python at the same paths."""
        jobs, count = self.folder / "jobs", self.cluster.processes_per_trial
        group = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
        python = [sys.executable, "-u", *group, "-m", "pipeline.launch.remote", str(jobs / f"{index}.json")]
        given = {name: os.environ.get(name, "") for name in HANDED_ON}
        lines = [
            "#!/bin/sh",
            f"exec >>{shlex.quote(str(jobs / f'{index}_log.out'))} 2>&1",
            *(f"export {k}={shlex.quote(v)}" for k, v in given.items() if v and secrets.mask(v) == v),
            f"export PYTHONPATH={shlex.quote(str(REPOSITORY))}${{PYTHONPATH:+:$PYTHONPATH}}",
            f"export OMP_NUM_THREADS={self.cluster.cpus_per_task or 1}",
            *self.cluster.setup,
            f"exec {shlex.join(python)}",
        ]
        return "\n".join(lines) + "\n"


def _there(program: str) -> bool:
    found = subprocess.run(["sh", "-c", 'command -v "$1"', "sh", program], capture_output=True)
    return found.returncode == 0


def _shell(line: str, log: Path) -> int | None:
    """Run a line with its output in a file: a process left in the background must not hold a pipe. None: too slow."""
    with log.open("w") as file:
        try:
            return subprocess.run(
                line, shell=True, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                timeout=TIMEOUT_S, start_new_session=True,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return None
