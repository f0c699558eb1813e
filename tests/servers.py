"""Real tracking stores for tests: SQLite files copied from one migrated template, and one `mlflow server`."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.warm import cut_no_power

START_S = 120.0


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class HttpServer:
    """A process that serves a free port of loopback; can be stopped, as an outage would, and started again."""

    LOG, PATH = "server.log", "/health"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it and wait until it answers."""
        with (self.folder / self.LOG).open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(self.uri + self.PATH, timeout=2):
                    return
            except OSError:
                assert self._process.poll() is None, self.log()
                time.sleep(0.1)
        raise TimeoutError(f"no server at {self.uri} after {START_S} s: {self.log()}")

    def log(self) -> str:
        return (self.folder / self.LOG).read_text()[-4000:]

    def stop(self) -> None:
        """Kill it with its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class MlflowServer(HttpServer):
    """`mlflow server` with a SQLite store."""

    def __init__(self, folder: Path, template: Path) -> None:
        super().__init__(folder)
        self.database = folder / "server.db"
        shutil.copyfile(template, self.database)

    def start(self) -> None:
        options = {
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--workers": "1",
            "--backend-store-uri": f"sqlite:///{self.database}",
            "--artifacts-destination": str(self.folder / "artifacts"),
        }
        self.launch(
            [sys.executable, "-m", "mlflow", "server", *(part for pair in options.items() for part in pair)],
            {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
        )


class Wire:
    """A TCP port that leads to the server while it is not cut: an outage without a restart's seconds."""

    def __init__(self, port: int) -> None:
        self._target, self._place = ("127.0.0.1", port), ("127.0.0.1", free_port())
        self.uri = f"http://127.0.0.1:{self._place[1]}"
        self._ends: list[socket.socket] = []
        self.mend()

    def mend(self) -> None:
        """Lead to the server again, at the same address."""
        self._ends.clear()
        self._listener = socket.create_server(self._place)
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """From now on connections are refused, and those that exist break."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(self._target)
                self._ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def wire(mlflow_server: MlflowServer) -> Iterator[Wire]:
    """A way to the session's server that the test may cut."""
    made = Wire(mlflow_server.port)
    yield made
    made.cut()


@pytest.fixture(scope="session", autouse=True)
def no_power_cuts() -> None:
    """Also before databases of fixtures are made."""
    cut_no_power()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with the present schema."""
    from pipeline.tracking.server import prepare_sqlite

    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    prepare_sqlite(f"sqlite:///{path}")
    return path


@pytest.fixture
def sqlite_uri(sqlite_template: Path, tmp_path: Path) -> str:
    """A SQLite tracking store of the test's own."""
    path = tmp_path / "store" / "mlflow.db"
    path.parent.mkdir()
    shutil.copyfile(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture(scope="session")
def mlflow_server(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One server for the session; a test that stops it starts it again."""
    server = MlflowServer(tmp_path_factory.mktemp("server"), sqlite_template)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(params=["sqlite", pytest.param("server", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest) -> str:
    """The URI of each kind of tracking store."""
    if request.param == "sqlite":
        return str(request.getfixturevalue("sqlite_uri"))
    return str(request.getfixturevalue("mlflow_server").uri)


def steps(client: Any, run_id: str) -> list[int]:
    """The steps of a run's `student/acc`, in the order that they came in."""
    return [point.step for point in client.get_metric_history(run_id, "student/acc")]


def artifacts_of(client: Any, run_id: str, path: str = "") -> list[str]:
    """The files of a run."""
    found: list[str] = []
    for item in client.list_artifacts(run_id, path or None):
        found += artifacts_of(client, run_id, item.path) if item.is_dir else [item.path]
    return found
