"""The trainer's end of the pipes to its delivery process: requests and events as JSON lines.

Delivery survives the killing of that process, usually by a kernel that is out of memory: it is restarted and gets every
unanswered request again. Imports no MLflow; the delivery process does.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import journal
from pipeline.errors import HelperFailed, NotThere, UserError
from pipeline.files import read_state
from pipeline.paths import REPOSITORY

logger = logging.getLogger("asib")
DELIVER = "python -m steps.deliver"
"""The command that brings a run's folder to a server later."""
LOG = "delivery.log"
ANSWER_S, TRANSFER_S = 120.0, 600.0
"""How long to wait for an answer, or for an answer with files."""
STARTS = 50
"""Maximum number of starts."""
FRUITLESS, FRUITLESS_S = 3, 25.0
"""Give up after this many starts in a row, over at least this many seconds, that never reached the server."""
PAUSE_S = 0.5


@dataclass(frozen=True)
class Ready:
    """The run exists on the server."""

    run_id: str
    experiment_id: str
    url: str


class Delivery:
    """A running delivery process; `start.start_delivery` makes that of a run."""

    def __init__(self, uri: str, arguments: Sequence[str], folder: Path | None) -> None:
        self.folder = folder
        self._numbers = itertools.count()
        self._connected: Future[None] = Future()
        self._ready: Future[Ready] = Future()
        self._finished: Future[dict[str, Any]] = Future()
        self._answers: dict[int, Future[Any]] = {}
        self._requests: dict[int, Mapping[str, Any]] = {}  # unanswered; the last may be `finish`
        self._forgotten: dict[str, int] = {}  # folder -> the journal's length at that time
        self._lock = threading.RLock()
        self._closed: UserError | None = None
        self._arguments, self._uri, self._owner = list(arguments), uri, os.getpid()
        self._starts = self._fruitless = 0
        self._alive = time.monotonic()
        try:
            self._process = self._start()
        except OSError as error:
            raise HelperFailed(f"the delivery process could not be started ({error}): see {self._log()}") from error
        threading.Thread(target=self._listen, name="delivery-events", daemon=True).start()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-m", "pipeline.tracking.process", "--trainer", str(self._owner)]
        command += [str(self.folder)] if self.folder else []
        command += [*self._arguments, *(["--again"] if self._ready.done() else [])]
        for folder, upto in self._forgotten.items():
            command += ["--forgotten", folder, str(upto)]
        self._starts += 1
        self._fruitless += 1
        with (self.folder / LOG).open("ab") if self.folder else open(os.devnull, "wb") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(self._uri),
                start_new_session=True,  # Ctrl-C reaches only the trainer
            )

    def wait_connected(self, timeout: float = 300.0) -> None:
        """Wait until the server has answered. Raises UserError: it refuses, or does not answer."""
        self._wait(self._connected, timeout)

    def wait_ready(self, timeout: float = 120.0) -> Ready:
        """Wait until the run exists on the server; needs the journal in the folder.

        Raises:
            UserError: one line with the server's address, its reason, and what to do.
        """
        return self._wait(self._ready, timeout)

    def child_ready(self, folder: Path, timeout: float = 120.0) -> str:
        """Wait for the run id of a nested run that the journal has named. Raises UserError: it took too long."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            header = journal.read_header(folder)
            state = read_state(folder / "delivery.json") or {}
            if header and state.get("journal") == header.data["journal"] and state.get("run_id"):
                return str(state["run_id"])
            if self._closed is not None:
                raise self._closed
            time.sleep(0.05)
        raise UserError(f"no MLflow run for {folder} after {timeout:.0f} s: see {self._log()}")

    def ask(self, name: str, /, *, timeout: float = ANSWER_S, **values: Any) -> Any:
        """What the function `name` of `pipeline.tracking.requests.REQUESTS` returns for these values, as JSON.

        Raises:
            NotThere: what is asked for does not exist.
            UserError: the server refuses, or does not answer in time.
        """
        number = next(self._numbers)
        answer: Future[Any] = Future()
        with self._lock:
            self._answers[number] = answer
            self._send(number, name, values)
        try:
            return self._wait(answer, timeout)
        finally:
            self._requests.pop(number, None)  # nobody is waiting any more

    def fetch(self, uri: str, dest: Path) -> Path:
        """Download `runs:/<id>/<path>` or `models:/…` into the folder `dest`; the local path. Raises as `ask` does."""
        return Path(self.ask("fetch", timeout=TRANSFER_S, uri=uri, dest=str(dest.absolute())))

    def run_info(self, run_id: str) -> dict[str, Any]:
        """id, experiment_id, name, status, params, tags and metrics (as text) of a run. Raises UserError: unknown."""
        return dict(self.ask("run_info", run_id=run_id))

    def read_runs(self, runs: Sequence[str], dest: Path, histories: Sequence[str]) -> list[Path]:
        """A folder for each run: see `requests.read_runs`. Raises UserError: the server does not know one of them."""
        where = str(dest.absolute())
        found = self.ask("read_runs", timeout=TRANSFER_S, runs=list(runs), dest=where, histories=list(histories))
        return [Path(path) for path in found]

    def forget(self, folder: Path) -> None:
        """Leave a nested run to another worker: send nothing more from it, and do not end it.

        Call it after closing the run's journal. A later `Journal.child` for the same folder resumes its delivery.

        Raises:
            UserError: the delivery process is gone, or still waits for its server.
            ValueError: the folder is not a nested run's.
        """
        if folder.absolute() == self.folder:
            raise ValueError(f"{folder} is the delivery's own: only nested runs can be forgotten")
        with contextlib.suppress(OSError):  # without a folder or a journal there is nothing to forget
            if self.folder is not None:
                self._forgotten[str(folder.absolute())] = (self.folder / journal.FILE).stat().st_size
        self.ask("forget", folder=str(folder.absolute()))

    def finish(self, timeout: float = 600.0) -> bool:
        """After `Journal.end`: wait until everything is on the server.

        Returns:
            False if something is missing: the server stayed away for the grace time, or `timeout` expired (the process
            then keeps trying for a while after this one has ended). `DELIVER` and the folder deliver the rest later.
        """
        with contextlib.suppress(UserError):
            self._send(next(self._numbers), "finish", {})
        try:
            told = self._wait(self._finished, timeout)
        except UserError:
            self._starts = STARTS  # nobody waits any more: a kill from now on is final
            return False
        if told.get("refused"):
            logger.warning("the tracking server refused some of it for good: %s names it", self._log())
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        return bool(told["delivered"])

    def _send(self, number: int, name: str, values: Mapping[str, Any]) -> None:
        """Write a request; if the process is gone, the next one gets it."""
        request = {"id": number, "ask": name, "values": values}
        with self._lock:
            if self._closed is not None:
                raise self._closed
            self._requests[number] = request
            self._write([request])

    def _write(self, requests: Iterable[Mapping[str, Any]]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.writelines(json.dumps(request) + "\n" for request in requests)
            self._process.stdin.flush()

    def _wait(self, future: Future[Any], timeout: float) -> Any:
        try:
            return future.result(timeout)
        except FutureTimeout:
            raise UserError(
                f"the tracking server gave no answer within {timeout:.0f} s: see {self._log()}, or use tracking=offline"
            ) from None

    def _listen(self) -> None:
        while True:
            for line in self._process.stdout or ():
                with contextlib.suppress(ValueError):  # killed mid-line
                    self._take(json.loads(line))
            code = self._process.wait()
            with self._lock:
                for pipe in (self._process.stdin, self._process.stdout):
                    with contextlib.suppress(OSError):  # unread data is lost with the process
                        assert pipe is not None
                        pipe.close()
            # A process that exits by itself has reported why, here or in its log; the next would report the same.
            if code >= 0 or self._finished.done() or not self._start_again():
                break
        # The process is gone: release all waiting threads.
        with self._lock:
            reason = (
                f"the delivery process was killed by signal {-code}" if code < 0 else "the delivery process has ended"
            )
            self._closed = self._closed or HelperFailed(f"{reason}: see {self._log()}")
            waiting: list[Future[Any]] = [self._connected, self._ready, self._finished, *self._answers.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(self._closed)

    def _start_again(self) -> bool:
        """Restart a process that was killed; False if that has happened too often."""
        fruitless = self._fruitless >= FRUITLESS and time.monotonic() - self._alive > FRUITLESS_S
        if self._starts >= STARTS or fruitless:
            return False
        time.sleep(PAUSE_S * max(1, self._fruitless))
        if self.folder is not None and not self.folder.is_dir():  # nothing left to deliver
            return False
        with self._lock, contextlib.suppress(OSError):
            self._process = self._start()
            self._write({**request, "again": True} for request in self._requests.values())
            return True
        return False

    def _take(self, event: dict[str, Any]) -> None:
        match event.pop("event"):
            case "connected":
                self._fruitless, self._alive = 0, time.monotonic()
                if not self._connected.done():
                    self._connected.set_result(None)
            case "ready":
                if not self._ready.done():
                    self._ready.set_result(Ready(**event))
            case "answer":
                self._requests.pop(event["id"], None)
                answer = self._answers.pop(event["id"], None)
                if answer is None:
                    pass  # answered before the restart
                elif "error" in event:
                    answer.set_exception((NotThere if event.get("not_there") else UserError)(event["error"]))
                else:
                    answer.set_result(event["value"])
            case "refused":
                self._closed = UserError(event["message"])
            case "finished":
                self._finished.set_result(event)

    def _log(self) -> str:
        return str(self.folder / LOG) if self.folder else "the messages above"


def _environment(uri: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    # The trainer's cores and GPU are for the trainer alone.
    ours = {"PYTHONPATH": path, "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **ours}
