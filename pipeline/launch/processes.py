"""Processes identified by more than their ids, which the system reuses, and the environment of new ones."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def identity(pid: int) -> dict[str, Any]:
    """What distinguishes a process from a later one with the same id, on this host and on others."""
    return {"pid": pid, "started": _started(pid), "host": socket.gethostname()}


def lives(process: Mapping[str, Any]) -> bool:
    """Whether the process that `identity` described runs on this machine; a zombie counts as ended."""
    started = _started(int(process["pid"])) if process["host"] == socket.gethostname() else ""
    return bool(started) and started == process["started"]


def send(process: Mapping[str, Any], number: signal.Signals) -> None:
    """Send a signal to the process, if it is alive."""
    if lives(process):
        try:
            os.kill(int(process["pid"]), number)
        except ProcessLookupError:
            return


@contextmanager
def environment(**changes: str | None) -> Iterator[None]:
    """Change variables for the processes started inside; None removes a variable."""
    before = {name: os.environ.pop(name, None) for name in changes}
    try:
        os.environ.update({name: value for name, value in changes.items() if value is not None})
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _started(pid: int) -> str:
    """When it was started, in the system's own units; empty for one that has ended."""
    try:
        # After the command's name, in brackets, which may hold spaces: first the state, and the start as number 20.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    found = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True).stdout.split()
    return "" if not found or found[0].startswith("Z") else " ".join(found[1:])
