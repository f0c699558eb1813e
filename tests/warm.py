"""Processes without the seconds of their imports: forks of one process that has imported MLflow and the steps.

For tests that run steps in this process, and for those that kill them. A fork runs `python -m <module>` with files, an
environment, a session and a umask of its own, as a new process would; a step's fork forks its delivery itself, and
submitit's processes for its workers. All workers of pytest-xdist share the process that forks.
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
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
LOCK = threading.Lock()
DELIVERY = "pipeline.tracking.process"
NEAREST: list[socket.socket] = []
"""In a fork: the line to a process that forked before it, and forks its workers: they inherit none of its databases."""


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
    """As much of `subprocess.Popen` as a `Delivery`, submitit and the tests use.

    Args:
        command: `[sys.executable, ..., "-m", <module>, *arguments]`, where the module is a step or `DELIVERY`.
        stdin: a pipe, or this process's.
        stdout: a pipe, a file, or this process's.
        stderr: a file, or this process's.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int | None = None,
        stdout: IO[Any] | int | None = None,
        stderr: IO[Any] | None = None,
        start_new_session: bool = False,
        **_: Any,
    ) -> None:
        ended, theirs, closed = os.pipe(), [0, 1, 2], []
        if stdin == subprocess.PIPE:
            theirs[0], ours = os.pipe()
            closed.append(theirs[0])
            self.stdin = os.fdopen(ours, "w")
        if stdout == subprocess.PIPE:
            ours, theirs[1] = os.pipe()
            closed.append(theirs[1])
            self.stdout = os.fdopen(ours)
        for number, file in ((1, stdout), (2, stderr)):
            if file is not None and not isinstance(file, int):
                theirs[number] = file.fileno()
        module, *arguments = command[command.index("-m") + 1 :]
        umask = os.umask(0)
        os.umask(umask)
        ignored = [number for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN]
        here = {"environment": dict(env), "folder": os.getcwd(), "umask": umask, "ignored": ignored}
        said = {"module": module, "arguments": arguments, "session": start_new_session, **here}
        self._launch(said, [*theirs, ended[1]])
        for descriptor in (*closed, ended[1]):
            os.close(descriptor)
        self.pid = int.from_bytes(os.read(ended[0], 4), "big")
        self._ended = ended[0]
        self._code: int | None = None
        self._lock = threading.Lock()

    def _launch(self, said: dict[str, Any], theirs: list[int]) -> None:
        content, line = json.dumps(said).encode(), NEAREST[-1] if NEAREST else forks()
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
            poll = select.poll()  # select takes no descriptor above 1023
            poll.register(self._ended, select.POLLIN | select.POLLHUP)
            if not poll.poll(None if timeout is None else 1000 * timeout):
                raise subprocess.TimeoutExpired("fork", timeout or 0)
            told = os.read(self._ended, 1)
            self._code = told[0] if told else -signal.SIGKILL
            os.close(self._ended)
            return self._code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill -9, and wait until its locks are gone with it."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
            while Path(f"/proc/{self.pid}").exists():
                time.sleep(0.01)


def group(module: str, *arguments: str, log: Path, count: int = 2) -> None:
    """Run a module in processes that train together, as torchrun starts them; all end with code 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    processes = []
    with log.open("w") as file:
        for rank in range(count):
            environment = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", module, *arguments]
            processes.append(Fork(command, env=environment, stdout=file, stderr=file, start_new_session=True))
    try:
        assert [process.wait(300) for process in processes] == count * [0], log.read_text()[-6000:]
    finally:
        for process in processes:
            process.kill()


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
def forks() -> socket.socket:
    """The line to the process that forks; whoever is the first to take its name starts it."""
    name = f"\0asib-forks-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    line = socket.socket(socket.AF_UNIX)
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(name)
        except OSError:  # taken
            line.connect(name)
        else:
            listener.listen()
            line.connect(name)
            start_forking(listener.fileno())
    atexit.register(line.close)
    return line


def start_forking(listener: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["MLFLOW_DISABLE_TELEMETRY"] = "true"  # its thread would not live on in a fork
    command = [sys.executable, "-P", str(Path(__file__)), str(listener)]
    with open(os.devnull, "r+b") as nothing:
        subprocess.Popen(
            command, pass_fds=[listener], env=environment, stdin=nothing, stdout=nothing, start_new_session=True
        )


def main() -> None:
    import mlflow  # noqa: F401  -- with all that it imports late
    from mlflow.store.tracking import sqlalchemy_store  # noqa: F401
    from submitit.local import local

    from pipeline import main_job  # noqa: F401
    from pipeline.ablate import worker as ablate_worker  # noqa: F401
    from pipeline.distill import distill  # noqa: F401
    from pipeline.reporting import figures
    from pipeline.runs import opening  # noqa: F401
    from pipeline.sweep import worker as sweep_worker  # noqa: F401
    from pipeline.tracking import _compat, follow, pipe, process, requests  # noqa: F401

    _compat.latest_schema()
    cut_no_power()
    figures.figure(1, 1, 1, 1)
    for module, kind in ((pipe, Child), (local, Fork)):
        module.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": kind})  # type: ignore[attr-defined]
    gc.freeze()
    serve([], socket.socket(fileno=int(sys.argv[1])))


def serve(lines: list[socket.socket], listener: socket.socket | None = None) -> None:
    """Fork what is asked for on these lines, and on those that the listener takes, until all have ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks here
    while lines or listener:
        ours = [*lines, *([listener] if listener else [])]
        for ready in select.select(ours, [], [])[0]:
            if ready is listener:
                line = listener.accept()[0]
                user = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
                if user == os.getuid():  # a name without a file has no permissions
                    lines.append(line)
            elif not answer(ready, ours):
                lines.remove(ready)
                if not lines:
                    return


def answer(line: socket.socket, ours: Sequence[socket.socket]) -> bool:
    """Fork what was asked for on this line; False at its end."""
    head, theirs, *_ = socket.recv_fds(line, 4, 4, socket.MSG_WAITALL)
    if not head:
        return False
    said = json.loads(line.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL))
    if os.fork() == 0:
        for each in ours:
            each.close()
        run(said, theirs)
    for descriptor in theirs:
        os.close(descriptor)
    return True


def run(said: dict[str, Any], theirs: list[int]) -> None:
    """In a fork: become the process that was asked for; a delivery's trainer is the process that forked it."""
    if said["session"]:
        os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if said["module"] != DELIVERY:
        keep_a_copy(theirs)
    for number in said["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    os.write(theirs[3], os.getpid().to_bytes(4, "big"))
    code = 1
    try:
        for number, descriptor in enumerate(theirs[:3]):
            os.dup2(descriptor, number)
        for descriptor in {*theirs[:3]} - {0, 1, 2}:
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
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        with contextlib.suppress(OSError):  # whoever would wait for it is gone
            os.write(theirs[3], bytes([code]))
        os._exit(code)


def keep_a_copy(theirs: list[int]) -> None:
    """Let this process, as it is now, fork what it will start."""
    near, far = socket.socketpair()
    if os.fork() == 0:
        for descriptor in (near.fileno(), *theirs):
            os.close(descriptor)
        serve([far])
        os._exit(0)
    far.close()
    NEAREST.append(near)


if __name__ == "__main__":
    main()
