"""MLflow as the steps see it: start a delivery beside the training, ask it for artifacts, wait for its end.

Imports no MLflow: the delivery process does. `python -m pipeline.experiment.tracking deliver <folder>…` brings
finished or interrupted folders to a server later, from any machine, any number of times.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import journal
from pipeline.errors import UserError
from pipeline.experiment.delivery_server import absolute_uri, prepare_environment

REPOSITORY = Path(__file__).resolve().parents[2]
LOG = "delivery.log"
DELIVER = "python -m pipeline.experiment.tracking deliver"


@dataclass(frozen=True)
class Ready:
    """The run exists on the server."""

    run_id: str
    experiment_id: str
    url: str


@dataclass(frozen=True)
class Delivered:
    """What `deliver` did for one folder. `refused`: things that the server will never take (see delivery.log)."""

    folder: Path
    run_id: str
    url: str
    complete: bool
    refused: int


def default_uri() -> str:
    """MLFLOW_TRACKING_URI, else a SQLite file in the working directory; never a relative path."""
    return absolute_uri(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}")


def start_delivery(
    folder: Path,
    *,
    uri: str | None = None,
    fetch: Mapping[str, Path] | None = None,
    adopt: str | None = None,
    resume: str | None = None,
    grace: float = 120.0,
) -> Delivery:
    """Start the delivery process of the run in `folder` and return at once; its imports take seconds of its own.

    Args:
        folder: the run's folder. Its journal may be made later: `Delivery.wait_ready` needs it, fetching does not.
        uri: the tracking URI; `default_uri()` by default.
        fetch: artifact URI (`runs:/…`, `models:/…`) → local folder, downloaded first (`Delivery.wait_fetched`).
        adopt: the run that `mlflow run` has made; MLFLOW_RUN_ID by default, "" for none.
        resume: the run that the journal goes on with. An adopted run then gets `asib.resumes` and ends empty.
        grace: seconds of further attempts when the server is away and the trainer has ended.

    Raises:
        UserError: the URI is not one this project can use.
    """
    arguments = ["--grace", str(grace)]
    adopt = os.environ.get("MLFLOW_RUN_ID", "") if adopt is None else adopt
    for name, value in (("--adopt", adopt), ("--resume", resume)):
        if value:
            arguments += [name, value]
    for source, dest in (fetch or {}).items():
        arguments += ["--fetch", source, str(dest.absolute())]
    folder.mkdir(parents=True, exist_ok=True)
    where = absolute_uri(uri) if uri else default_uri()
    return Delivery(where, [*arguments, str(folder.absolute())], folder.absolute())


class Delivery:
    """A running delivery process; made by `start_delivery`."""

    def __init__(self, uri: str, arguments: Sequence[str], folder: Path | None) -> None:
        self.folder = folder
        self._numbers = itertools.count()
        self._connected: Future[dict[str, str]] = Future()
        self._ready: Future[Ready] = Future()
        self._finished: Future[dict[str, Any]] = Future()
        self._answers: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self._closed: UserError | None = None
        with (folder / LOG).open("ab") if folder else open(os.devnull, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pipeline.experiment.delivery", "--trainer", str(os.getpid()), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(uri),
                start_new_session=True,  # Ctrl-C reaches the trainer alone
            )
        threading.Thread(target=self._listen, name="delivery-events", daemon=True).start()

    def wait_fetched(self, timeout: float = 300.0) -> dict[str, Path]:
        """The server answered and the artifacts asked for at the start are here: URI → local path.

        Raises:
            UserError: refused, unreachable, or one of the artifacts is not there.
        """
        return {uri: Path(path) for uri, path in self._wait(self._connected, timeout).items()}

    def wait_ready(self, timeout: float = 120.0) -> Ready:
        """The run exists; needs the journal in the folder.

        Raises:
            UserError: one line: the server's address, its reason, and what would do.
        """
        return self._wait(self._ready, timeout)

    def child_ready(self, folder: Path, timeout: float = 120.0) -> str:
        """The run id of a nested run whose folder the journal has named with `child`.

        Raises:
            UserError: it does not come.
        """
        deadline = time.monotonic() + timeout
        header = None
        while time.monotonic() < deadline:
            header = header or journal.read_header(folder)
            with contextlib.suppress(OSError, ValueError, KeyError):
                state = json.loads((folder / "delivery.json").read_text())
                if header and state["journal"] == header.data["journal"] and state["run_id"]:
                    return str(state["run_id"])
            if self._closed is not None:
                raise self._closed
            time.sleep(0.05)
        raise UserError(f"no MLflow run for {folder} after {timeout:.0f} s: see {self._log()}")

    def fetch(self, uri: str, dest: Path, timeout: float = 600.0) -> Path:
        """Download `runs:/<id>/<path>` or `models:/…` into the folder `dest`; the local path.

        Raises:
            UserError: it is not there, or the server does not answer.
        """
        return Path(self._ask("fetch", timeout, uri=uri, dest=str(dest.absolute())))

    def run_info(self, run_id: str, timeout: float = 60.0) -> dict[str, Any]:
        """run_id, experiment_id, status, name, params, tags, metrics (as text) of any run.

        Raises:
            UserError: the server does not know it.
        """
        return dict(self._ask("info", timeout, run_id=run_id))

    def read(self, runs: Sequence[str], dest: Path, histories: Sequence[str], timeout: float = 600.0) -> list[Path]:
        """A folder for each run, with `record.json`, its config.yaml and predictions.npz where it has them.

        Raises:
            UserError: the server does not know one of them.
        """
        where = str(dest.absolute())
        found = self._ask("read", timeout, runs=list(runs), dest=where, histories=list(histories))
        return [Path(path) for path in found]

    def nested(self, run_id: str, timeout: float = 60.0) -> list[str]:
        """Ids of the runs nested in a run. Raises UserError."""
        return list(self._ask("nested", timeout, run_id=run_id))

    def find_finished(self, identities: Sequence[str], timeout: float = 120.0) -> dict[str, str]:
        """Identity -> newest FINISHED run on the server that has it. Raises UserError."""
        return dict(self._ask("find", timeout, identities=list(identities)))

    def log_files(self, run_id: str, files: Sequence[Path], to: str, timeout: float = 300.0) -> None:
        """Add artifacts to a run that is not this delivery's. Raises UserError."""
        self._ask("log", timeout, run_id=run_id, files=[str(file.absolute()) for file in files], to=to)

    def finish(self, timeout: float = 600.0) -> bool:
        """After `Journal.end`: wait until everything is on the server.

        Returns:
            False when it is not: the server was away for the grace time, or `timeout` is over (then the process still
            tries for a while after this one's end). `f"{tracking.DELIVER} {folder}"` brings the rest later.
        """
        with contextlib.suppress(UserError):
            self._send({"do": "finish"})
        try:
            delivered = bool(self._wait(self._finished, timeout)["delivered"])
        except UserError:
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        return delivered

    def _ask(self, what: str, timeout: float, **values: Any) -> Any:
        number = next(self._numbers)
        answer: Future[Any] = Future()
        with self._lock:
            if self._closed is not None:
                raise self._closed
            self._answers[number] = answer
        self._send({"do": what, "id": number, **values})
        return self._wait(answer, timeout)

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            with self._lock:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
        except (OSError, ValueError):
            raise self._closed or UserError(f"the delivery process has ended: see {self._log()}") from None

    def _wait(self, future: Future[Any], timeout: float) -> Any:
        try:
            return future.result(timeout)
        except FutureTimeout:
            raise UserError(
                f"the tracking server gave no answer within {timeout:.0f} s: see {self._log()}, or use tracking=offline"
            ) from None

    def _listen(self) -> None:
        assert self._process.stdout is not None
        refusal = ""
        for line in self._process.stdout:
            event = json.loads(line)
            match event.pop("event"):
                case "connected":
                    self._connected.set_result(event["fetched"])
                case "ready":
                    self._ready.set_result(Ready(**event))
                case "answer" if "error" in event:
                    self._answers.pop(event["id"]).set_exception(UserError(event["error"]))
                case "answer":
                    self._answers.pop(event["id"]).set_result(event["value"])
                case "refused":
                    refusal = event["message"]
                case "finished":
                    self._finished.set_result(event)
        # The process is gone: nobody may wait for it in vain.
        with self._lock:
            self._closed = UserError(refusal or f"the delivery process has ended: see {self._log()}")
            waiting: list[Future[Any]] = [self._connected, self._ready, self._finished, *self._answers.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(self._closed)
        self._process.wait()

    def _log(self) -> str:
        return str(self.folder / LOG) if self.folder else "the messages above"


def fetch_now(uri: str, run_uri: str, dest: Path) -> Path:
    """Download one artifact with no run of one's own; takes the seconds of MLflow's import, in a process of its own.

    Raises:
        UserError: it is not there, or the server does not answer.
    """
    delivery = Delivery(absolute_uri(uri), ["--fetch", run_uri, str(dest.absolute())], None)
    path = delivery.wait_fetched(600.0)[run_uri]
    delivery.finish(0.0)
    return path


def deliver(folders: Sequence[Path], uri: str | None = None) -> list[Delivered]:
    """Bring the journals in these folders, and those of their nested runs, to the server; imports MLflow here.

    A folder whose trainer still writes keeps its run RUNNING; one that has no end and no writer ends KILLED.

    Raises:
        UserError: no journal, the server refuses or does not answer: then the same call later goes on.
    """
    ours = prepare_environment()
    uri = absolute_uri(uri) if uri else default_uri()
    for folder in folders:
        if journal.read_header(folder) is None:
            raise UserError(f"no journal in {folder}: give the folder of a run")
    from pipeline.experiment import delivery_server as server
    from pipeline.experiment.delivery_loop import DeliveryLoop

    client = server.connect(uri)
    server.patience(server.LATER_PATIENCE, ours)
    done = []
    for folder in folders:
        try:
            with DeliveryLoop(folder, uri, client=client) as loop:
                alive = loop.writer_alive()
                complete = loop.run_once(final=not alive)
                if not loop.writer_alive():
                    loop.close_unfinished()
                    complete = True
                state = loop.top.state
                done.append(Delivered(folder, state.run_id, state.url, complete, loop.refused))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{folder}: {server.explain(error, uri)}") from error
    return done


def kill_mlflow_run_parent() -> int | None:
    """SIGTERM the `mlflow run` that started this step, if one did, also through shells; its process id.

    It would overwrite the status KILLED with FAILED when its child ends. To be called when the run's status is on
    the server, just before leaving.
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
        # The command's name, in brackets, may hold spaces; the parent is the second field behind it.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _environment(uri: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    # The trainer's cores and its GPU are the trainer's.
    ours = {"PYTHONPATH": path, "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **ours}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 everything is on the server; 2 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.experiment.tracking", description=__doc__)
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "deliver", help="bring the journals of runs to a tracking server"
    )
    command.add_argument("folders", nargs="+", type=Path, metavar="folder")
    command.add_argument("--uri", help="the tracking URI (default: MLFLOW_TRACKING_URI, else ./mlflow.db)")
    options = parser.parse_args(arguments)
    try:
        uri = absolute_uri(options.uri) if options.uri else default_uri()
        for result in deliver(options.folders, uri):
            note = "" if result.complete else " (still being written)"
            note += f" ({result.refused} refused: see the messages above)" if result.refused else ""
            print(f"{result.folder}: {result.run_id} {result.url}{note}")
    except UserError as error:
        print(f"{error}", file=sys.stderr)
        return 2
    return 0


__all__ = [
    "DELIVER",
    "Delivered",
    "Delivery",
    "Ready",
    "default_uri",
    "deliver",
    "fetch_now",
    "kill_mlflow_run_parent",
    "start_delivery",
]

if __name__ == "__main__":
    sys.exit(main())
