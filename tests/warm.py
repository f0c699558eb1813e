"""Processes without the seconds of their imports: forks of one process that has imported MLflow, or a step's packages.

For tests that run steps in this process, and for those that kill them. A fork runs `python -m <module>` with pipes, an
environment, a session, a umask and a log of its own, as a new process would; a step's fork forks its delivery itself.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import logging
import os
import runpy
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
LOCK = threading.Lock()
DELIVERY = "pipeline.tracking.process"


def cut_no_power() -> None:
    """Let this process wait for no disk, where a commit takes SQLite 15 ms: a kill loses nothing that was written."""
    connect = sqlite3.dbapi2.connect

    def unsynced(*values: Any, **named: Any) -> sqlite3.Connection:
        made = connect(*values, **named)
        with contextlib.suppress(sqlite3.Error):  # locked, or no database: whoever asked will be told
            made.execute("pragma synchronous = off")
        return made

    def fsync(descriptor: int) -> None:
        pass

    mock.patch.object(sqlite3.dbapi2, "connect", unsynced).start()
    mock.patch.object(os, "fsync", fsync).start()


class Fork:
    """As much of `subprocess.Popen` as a `Delivery` and the tests use; stdin and stdout are pipes.

    Args:
        command: `[sys.executable, ..., "-m", <module>, *arguments]`, where the module is a step or `DELIVERY`.
    """

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], stderr: IO[Any], **_: Any) -> None:
        asked, tells, ended = os.pipe(), os.pipe(), os.pipe()
        module, *arguments = command[command.index("-m") + 1 :]
        umask = os.umask(0)
        os.umask(umask)
        here = {"environment": dict(env), "folder": os.getcwd(), "umask": umask}
        said = {"module": module, "arguments": arguments, **here}
        self._launch(said, [asked[0], tells[1], stderr.fileno(), ended[1]])
        for descriptor in (asked[0], tells[1], ended[1]):
            os.close(descriptor)
        self.stdin, self.stdout = os.fdopen(asked[1], "w"), os.fdopen(tells[0])
        self.pid = int.from_bytes(os.read(ended[0], 4), "big")
        self._ended = ended[0]
        self._code: int | None = None
        self._lock = threading.Lock()

    def _launch(self, said: dict[str, Any], theirs: list[int]) -> None:
        content, line = json.dumps(said).encode(), forks(said["module"] != DELIVERY)
        with LOCK:
            socket.send_fds(line, [len(content).to_bytes(4, "big")], theirs)
            line.sendall(content)

    def poll(self) -> int | None:
        """Its exit code, -9 if it was killed; None while it lives."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        with self._lock:
            if self._code is not None:
                return self._code
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("fork", timeout or 0)
            told = os.read(self._ended, 1)
            self._code = told[0] if told else -signal.SIGKILL
            os.close(self._ended)
            return self._code

    def kill(self) -> None:
        """Kill -9, and wait until its locks are gone with it."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
            while Path(f"/proc/{self.pid}").exists():
                time.sleep(0.01)


class Child(Fork):
    """A delivery of a step that is a fork itself, which it has to be a child of."""

    def _launch(self, said: dict[str, Any], theirs: list[int]) -> None:
        if os.fork() == 0:
            logging.getLogger("asib").handlers.clear()  # the step's
            for descriptor in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, *theirs}:
                with contextlib.suppress(OSError):  # of the listing itself
                    os.close(descriptor)
            run(said, theirs)


@cache
def forks(steps: bool) -> socket.socket:
    """The line to the process that forks deliveries, or steps."""
    ours, theirs = socket.socketpair()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["MLFLOW_DISABLE_TELEMETRY"] = "true"  # its thread would not live on in a fork
    command = [sys.executable, "-P", str(Path(__file__)), str(theirs.fileno()), *["steps"] * steps]
    with open(os.devnull, "r+b") as nothing:
        subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stdin=nothing, stdout=nothing, start_new_session=True
        )
    theirs.close()
    atexit.register(ours.close)
    return ours


def main() -> None:
    import mlflow  # noqa: F401  -- with all that it imports late
    from mlflow.store.tracking import sqlalchemy_store  # noqa: F401

    from pipeline.tracking import _compat, follow, pipe, process, requests  # noqa: F401

    _compat.latest_schema()
    cut_no_power()
    if "steps" in sys.argv:
        from pipeline import main_job  # noqa: F401
        from pipeline.distill import distill  # noqa: F401
        from pipeline.reporting import figures
        from pipeline.runs import opening  # noqa: F401

        figures.pyplot()
        pipe.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": Child})  # type: ignore[assignment]
    line = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks here
    gc.freeze()
    while True:
        head, theirs, *_ = socket.recv_fds(line, 4, 4, socket.MSG_WAITALL)
        if not head:
            return
        said = json.loads(line.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL))
        if os.fork() == 0:
            line.close()
            run(said, theirs)
        for descriptor in theirs:
            os.close(descriptor)


def run(said: dict[str, Any], theirs: list[int]) -> None:
    """In a fork: become the process that was asked for; a delivery's trainer is the process that forked it."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.write(theirs[3], os.getpid().to_bytes(4, "big"))
    code = 1
    try:
        for number, descriptor in enumerate(theirs[:3]):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.set_inheritable(theirs[3], False)
        os.environ.clear()
        os.environ.update(said["environment"])
        os.chdir(said["folder"])
        os.umask(said["umask"])
        sys.argv[:] = [said["module"], *said["arguments"]]
        if said["module"] == DELIVERY:
            from pipeline.tracking import process

            sys.argv[sys.argv.index("--trainer") + 1] = str(os.getppid())
            code = process.main()
        else:
            runpy.run_module(said["module"], run_name="__main__")
            code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    finally:
        with contextlib.suppress(OSError):  # whoever would wait for it is gone
            os.write(theirs[3], bytes([code]))
        os._exit(code)


if __name__ == "__main__":
    main()
