"""Workers as jobs of a Slurm array. Without accounting submitit does not know their state, so squeue is asked."""

import logging
import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config.words import near_miss
from pipeline.errors import UserError
from pipeline.launch.cluster import SlurmCluster
from pipeline.launch.launcher import Handle, Launcher
from pipeline.launch.processes import environment
from pipeline.paths import REPOSITORY

logger = logging.getLogger("asib")
PROGRAMS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
INHERITED = ("SLURM_", "SBATCH_", "SQUEUE_", "SCANCEL_", "SINFO_", "SCONTROL_", "SRUN_")
TIMEOUT_S = 60.0
ALL_AT_ONCE = 100_000


class Slurm(Launcher):
    """Workers of `cluster=slurm`. A handle is the job's `id`."""

    cluster: SlurmCluster
    poll_s = 1.0

    def __init__(self, cluster: SlurmCluster, folder: Path, workers: int) -> None:
        super().__init__(cluster, folder, workers)
        self._present: set[str] = set()  # what squeue said when it last answered

    def check(self) -> None:
        """Raise UserError: no Slurm here, an unknown partition, more than a node has, anything that Slurm refuses."""
        where = f"cluster={self.cluster.name}"
        absent = [program for program in PROGRAMS if shutil.which(program) is None]
        if absent:
            raise UserError(f"{where}: no {absent[0]} on this machine; start it where Slurm is, or take cluster=local")
        nodes = _run("sinfo", "--noheader", "--format=%R|%G|%l")
        if nodes is None or nodes.returncode != 0:
            raise UserError(f"{where}: no Slurm controller answers: {_why(nodes)}; cluster=local needs none")
        partitions: dict[str, tuple[int, float]] = {}
        for line in nodes.stdout.splitlines():
            name, gres, limit = line.split("|")
            partitions[name] = (max(_gpus(gres), partitions.get(name, (0, 0.0))[0]), _minutes(limit))
        self._check_partition(partitions)
        test = _run("sbatch", "--test-only", text=self.plan())
        if test is None or test.returncode != 0:
            raise UserError(f"{where}: Slurm refuses such a job: {_why(test)}; see `DRY_RUN=1` for all of its options")

    def _check_partition(self, partitions: dict[str, tuple[int, float]]) -> None:
        """Refuse jobs that Slurm would leave waiting. `partitions`: most GPUs of a node, time limit in minutes."""
        partition, wanted = self.cluster.partition, self.cluster.gpus_per_node
        asked = partition.split(",") if partition else [*partitions]
        unknown = [p for p in asked if p not in partitions]
        if unknown:
            near = near_miss(unknown[0], partitions)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(sorted(partitions))}"
            raise UserError(f"cluster.partition={partition}: no such partition; {hint}")
        place = f"partition {partition}" if partition else "this cluster"
        gpus, minutes = (max((partitions[p][k] for p in asked), default=0) for k in (0, 1))
        if wanted > gpus:
            raise UserError(f"cluster.gpus_per_node={wanted}: no node of {place} has more than {gpus}")
        if self.cluster.time_minutes > minutes:
            raise UserError(f"cluster.time_minutes={self.cluster.time_minutes}: {place} allows {minutes:g}")
        if 0 < wanted < self.cluster.processes_per_trial:
            need = self.cluster.processes_per_trial
            raise UserError(f"cluster.processes_per_trial={need}: each process takes a GPU; give gpus_per_node={need}")

    def plan(self) -> str:
        """The array's script."""
        return _compat_script(self.folder / "jobs", self.workers, self._parameters())

    def begin(self, works: Sequence[Callable[..., int]]) -> list[Handle]:
        """Submit all workers as one array."""
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = SlurmExecutor(self.folder / "jobs")
        executor.update_parameters(**self._parameters())
        entries = [partial(work, devices=None, requeue=self.cluster.requeue) for work in works]
        try:
            with _own_settings_only():
                jobs = executor.submit_array(entries)
        except (FailedJobError, FailedSubmissionError) as error:
            last = str(error).strip().splitlines()[-1]
            raise UserError(f"cluster={self.cluster.name}: Slurm does not take the jobs: {last}") from error
        self._present |= {job.job_id for job in jobs}
        return [{"id": job.job_id} for job in jobs]

    def present(self, handles: list[Handle]) -> list[Handle]:
        """The workers that squeue lists: pending, running, completing, or queued again."""
        if handles:
            listed = _run("squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i")
            if listed is not None and listed.returncode == 0:
                self._present = set(listed.stdout.split())
            else:  # a restarting controller has not lost any job
                logger.debug("squeue does not answer: %s", _why(listed))
        return [handle for handle in handles if handle["id"] in self._present]

    def terminate(self, handles: list[Handle]) -> None:
        """Cancel the pending ones; send SIGTERM to the steps of the others, not to the script that waits for them."""
        ids = [handle["id"] for handle in handles]
        _run("scancel", "--quiet", "--state=PENDING", *ids)
        _run("scancel", "--quiet", "--signal=TERM", *ids)

    def kill(self, handles: list[Handle]) -> None:
        """Cancel them: Slurm sends SIGKILL after its KillWait."""
        _run("scancel", "--quiet", *(handle["id"] for handle in handles))

    def _parameters(self) -> dict[str, Any]:
        """The job's options, as submitit's SlurmExecutor names them."""
        cluster = self.cluster
        own = cluster.model_dump(include={"partition", "account", "qos", "constraint", "comment", "cpus_per_task"}) | {
            "job_name": "asib",
            "time": cluster.time_minutes,
            "gpus_per_node": cluster.gpus_per_node or None,
            "mem": f"{round(cluster.mem_gb * 1024)}M" if cluster.mem_gb else None,
            "ntasks_per_node": cluster.processes_per_trial,
        }
        return {k: v for k, v in own.items() if v is not None} | {
            "array_parallelism": cluster.array_parallelism or ALL_AT_ONCE,
            "signal_delay_s": cluster.signal_delay_s,
            "stderr_to_stdout": True,
            "additional_parameters": {"requeue" if cluster.requeue else "no_requeue": True, **cluster.additional},
            "setup": [
                *cluster.setup,
                f"export PYTHONPATH={shlex.quote(str(REPOSITORY))}${{PYTHONPATH:+:$PYTHONPATH}}",
                "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}",
                "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # since 22.05 srun does not take sbatch's",
            ],
        }


def _compat_script(folder: Path, workers: int, parameters: dict[str, Any]) -> str:
    """The script that submitit submits for an array: private API, checked with submitit 1.5.4."""
    from submitit.slurm import slurm

    command = f"python -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return slurm._make_sbatch_string(command=command, folder=folder, map_count=workers, **parameters)


def _own_settings_only() -> AbstractContextManager[None]:
    """Hide variables that Slurm's programs read as options, and that override the script's #SBATCH lines.

    A driver that is itself started within a job inherits that job's size and number, and SBATCH_* from a user's profile
    would overrule the cluster's file. SLURM_CONF stays: it locates Slurm.
    """
    taken = [name for name in os.environ if name.startswith(INHERITED) and name != "SLURM_CONF"]
    return environment(**dict.fromkeys(taken))


def _run(*command: str, text: str | None = None) -> subprocess.CompletedProcess[str] | None:
    """Run a command of Slurm; None when it cannot run or does not return."""
    try:
        with _own_settings_only():
            return subprocess.run(command, input=text, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None


def _why(done: subprocess.CompletedProcess[str] | None) -> str:
    """The last line of a command's complaint."""
    lines = (done.stderr or done.stdout).strip().splitlines() if done is not None else []
    lines = [line.strip() for line in lines if not line.startswith("Try ")]
    return lines[-1] if lines else f"no answer within {TIMEOUT_S:g} s"


def _gpus(gres: str) -> int:
    """GPUs in sinfo's `gpu:a100:4(S:0-1),gpu:2`; `(null)`: none."""
    counts = re.findall(r"(?:^|,)gpu(?::[^:,()]*[^\d:,()][^:,()]*)?:(\d+)", gres)
    return sum(map(int, counts))


def _minutes(limit: str) -> float:
    """sinfo's `1-12:00:00`, `30:00`, `infinite` in minutes."""
    days, _, rest = limit.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in parts):  # infinite, n/a
        return math.inf
    hours, minutes, seconds = ([0.0] * 3 + [float(p) for p in parts])[-3:]
    return 1440 * float(days or 0) + 60 * hours + minutes + seconds / 60
