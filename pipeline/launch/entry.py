"""What a worker's process does around its work: devices, signals, and queueing its job again after a preemption.

Imports little: the work's own module, with torch, is imported once the environment is set up.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.files import write_atomically
from pipeline.launch.processes import identity

PREEMPTION = signal.SIGUSR2
"""The signal sent before a preemption and before the time limit."""
PREEMPTED = 128 + PREEMPTION
"""The work's return value after that signal (128 + its number, as for any other); only this one requeues the job."""


def enter(
    work: str, index: int, folder: str, devices: Sequence[str] | None, requeue: bool, arguments: Mapping[str, Any]
) -> int:
    """One process of a worker, called by submitit.

    Args:
        work: "module:function", called with index=`index` and the `arguments`.
        folder: the launcher's; the process records its identity there.
        devices: GPUs of the worker's processes, one each; empty: none. None: as the scheduler set them.
        requeue: whether to requeue a preempted job.
    """
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    # submitit would ignore SIGTERM from here on: until the work installs its own handler, SIGTERM ends the process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    job = JobEnvironment()
    if job.cluster == "local":
        os.setsid()  # no signals from a terminal, whichever handlers the work installs
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    see_one_device(devices, job.num_tasks, job.local_rank)
    if job.num_tasks > 1:
        # as torchrun describes the group
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    record(Path(folder), index, job.global_rank)
    code = call(work, index, arguments)
    if code == PREEMPTED and requeue and job.cluster == "slurm" and job.global_rank == 0:
        _requeue()
    return code


def record(folder: Path, index: int, rank: int) -> Path:
    """Note who this process of a worker is, in the launcher's folder; the file."""
    me = folder / "processes" / f"{index}.{rank}.json"
    me.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(me, json.dumps(identity(os.getpid())))
    return me


def call(work: str, index: int, arguments: Mapping[str, Any]) -> int:
    """Do the work that "module:function" names; its return value."""
    module, _, function = work.partition(":")
    code: int = getattr(importlib.import_module(module), function)(index=index, **arguments)
    return code


def see_one_device(devices: Sequence[str] | None, tasks: int, local_rank: int) -> None:
    """Leave this process its own one of the worker's GPUs; `devices`, `tasks`: as `enter` has them."""
    visible = devices if devices is not None else os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if devices is not None or (tasks > 1 and len(visible) >= tasks):
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[local_rank] if visible else ""


def _requeue() -> None:
    """Queue this job again, and exit without a result: Slurm ends it now, perhaps in the middle of writing one."""
    command = ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]
    try:
        subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"{' '.join(command)}: {getattr(error, 'stderr', '') or error}", file=sys.stderr, flush=True)
    sys.exit(PREEMPTED)
