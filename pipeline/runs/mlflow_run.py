"""The `mlflow run` command that started this step, if any."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path


def kill_mlflow_run_parent() -> int | None:
    """Send SIGTERM to the `mlflow run` that started this step, directly or through shells; return its process id.

    Otherwise it would overwrite the run's status with FAILED if its child exits with a code other than 0. Call this
    just before leaving, when the status is on the server.
    """
    pid = os.getppid()
    for _ in range(4):
        command = _command(pid)
        if _is_mlflow_run(command):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGTERM)
                return pid
            return None
        if not command or Path(command[0]).name.lstrip("-") not in ("sh", "bash", "dash", "zsh"):
            return None
        pid = _parent_of(pid)
    return None


def _is_mlflow_run(command: Sequence[str]) -> bool:
    # `/env/bin/python /env/bin/mlflow run …`, `python -m mlflow run …`, `mlflow --env-file x run …`
    names = [Path(part).name for part in command]
    return "mlflow" in names[:4] and "run" in command[names.index("mlflow") + 1 :]


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def _parent_of(pid: int) -> int:
    try:
        # The command's name, in brackets, may hold spaces; the parent is the second field after it.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0
