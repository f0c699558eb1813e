"""Delivery processes without the seconds of MLflow's import: forks of one process that has imported it, and no more.

For tests that run steps in this process. A fork runs `pipeline.tracking.process.main` with pipes, an environment, a
session, a umask and a log of its own, as the process does that a step starts.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
LOCK = threading.Lock()


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
    """As much of `subprocess.Popen` as a `Delivery` uses."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], stderr: IO[bytes], **_: Any) -> None:
        asked, tells, ended = os.pipe(), os.pipe(), os.pipe()
        theirs = [asked[0], tells[1], stderr.fileno(), ended[1]]
        arguments = list(command[command.index("pipeline.tracking.process") + 1 :])
        umask = os.umask(0)
        os.umask(umask)
        here = {"environment": dict(env), "folder": os.getcwd(), "umask": umask}
        said = json.dumps({"arguments": arguments, **here}).encode()
        line = forks()
        with LOCK:
            socket.send_fds(line, [len(said).to_bytes(4, "big")], theirs)
            line.sendall(said)
        for descriptor in (asked[0], tells[1], ended[1]):
            os.close(descriptor)
        self.stdin, self.stdout = os.fdopen(asked[1], "w"), os.fdopen(tells[0])
        self._ended = ended[0]
        self._code: int | None = None
        self._lock = threading.Lock()

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code; -9 if it was killed."""
        with self._lock:
            if self._code is not None:
                return self._code
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("delivery", timeout or 0)
            told = os.read(self._ended, 1)
            self._code = told[0] if told else -signal.SIGKILL
            os.close(self._ended)
            return self._code


@cache
def forks() -> socket.socket:
    """The line to the process that forks."""
    ours, theirs = socket.socketpair()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["MLFLOW_DISABLE_TELEMETRY"] = "true"  # its thread would not live on in a fork
    command = [sys.executable, "-P", str(Path(__file__)), str(theirs.fileno())]
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

    from pipeline.tracking import follow, process, requests  # noqa: F401

    cut_no_power()
    line = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks here
    while True:
        head, theirs, *_ = socket.recv_fds(line, 4, 4, socket.MSG_WAITALL)
        if not head:
            return
        said = json.loads(line.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL))
        if os.fork() == 0:
            line.close()
            run(process.main, said, theirs)
        for descriptor in theirs:
            os.close(descriptor)


def run(start: Any, said: dict[str, Any], theirs: list[int]) -> None:
    """In a fork: become the process that was asked for; its trainer is the process that forked it."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
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
        arguments = said["arguments"]
        arguments[arguments.index("--trainer") + 1] = str(os.getppid())
        sys.argv[1:] = arguments
        code = start(arguments)
    except SystemExit as left:
        code = int(left.code or 0)
    finally:
        os.write(theirs[3], bytes([code]))
        os._exit(code)


if __name__ == "__main__":
    main()
