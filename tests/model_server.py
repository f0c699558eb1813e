"""`mlflow models serve` on a free port of this machine, as users start it: far from the repository."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.servers import free_port

START_S = 180.0
FOREIGN = ("PYTHONPATH", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID")
"""What the environment of a test or a step has, and a server's has not."""


class ModelServer:
    """Serves `model`, with pickle deserialisation disabled and neither this repository nor its folder in reach.

    Args:
        model: models:/<name>@<alias>, or another URI.
        tracking_uri: where it is registered.
        folder: the working directory; gets serve.log.
        own: by `steps.serve` instead.
    """

    def __init__(self, model: str, tracking_uri: str, folder: Path, own: bool = False) -> None:
        self.own = own
        self.model, self.tracking_uri, self.folder = model, tracking_uri, folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start it, wait until it answers; the seconds that took."""
        environment = {k: v for k, v in os.environ.items() if k not in FOREIGN}
        environment |= {
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # it starts `uvicorn`
        }
        command = ["-P", "-m", "mlflow", "models", "serve", "-m", self.model, "--env-manager", "local"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        if self.own:
            environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
            command = ["-m", "steps.serve", f"model={self.model}", f"port={self.port}"]
        began = time.monotonic()
        with (self.folder / "serve.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=environment,
                start_new_session=True,
            )
        while time.monotonic() < began + START_S:
            try:
                self.ask("GET", "/ping")
                return time.monotonic() - began
            except OSError:
                if self._process.poll() is not None:
                    break
                time.sleep(0.1)
        text = self.log()[-3000:]
        self.stop()
        raise RuntimeError(f"mlflow models serve -m {self.model} does not answer:\n{text}")

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and body of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body is not None else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def invoke(self, payload: Any) -> tuple[int, Any]:
        """POST /invocations; the status and the decoded answer."""
        status, body = self.ask("POST", "/invocations", json.dumps(payload).encode())
        return status, json.loads(body)

    def processes(self) -> list[int]:
        """Ids of the server's processes: the command, and those below it."""
        assert self._process is not None
        command = psutil.Process(self._process.pid)
        return [command.pid, *(child.pid for child in command.children(recursive=True))]

    def log(self) -> str:
        """What it has written so far."""
        return (self.folder / "serve.log").read_text(errors="replace")

    def stop(self) -> None:
        """End it with everything that it has started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # what has not gone with it
        self._process.wait()
        self._process = None
