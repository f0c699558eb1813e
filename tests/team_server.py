"""The team's server, natively: PostgreSQL, an S3 endpoint (moto's), and `mlflow server` with basic authentication.

It is started by deploy/serve.sh, the script that the container runs. Each part can be stopped and started again.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.postgres import ESCAPED, PASSWORD, PostgresServer
from tests.servers import HttpServer, Wire

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
ADMIN = ("admin", "a first password")
BUCKET = "team"


def python_script(name: str) -> ModuleType:
    """A Python script of deploy/."""
    spec = importlib.util.spec_from_file_location(f"deploy_{name}", DEPLOY / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class S3Server(HttpServer):
    """moto's S3. It keeps everything in memory: an outage is the wire's before it."""

    LOG, PATH = "s3.log", "/moto-api/"

    def start(self) -> None:
        self.launch([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)], os.environ)


class TeamServer(HttpServer):
    """All three. `uri` is the tracking server's; `host`, a name of this machine that it does not accept."""

    def __init__(self, folder: Path, postgres: PostgresServer) -> None:
        super().__init__(folder)
        self.postgres, self.secrets = postgres, folder / "secrets"
        self.database, self.auth_database = postgres.create_database(), postgres.create_database()
        self.s3 = S3Server(folder)
        self.door = Wire(self.s3.port)
        self.other_host = f"http://localhost:{self.port}"

    @property
    def pid(self) -> int:
        """The tracking server's process."""
        assert self._process is not None
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """What the scripts of deploy/ read."""
        # as in the compose file, no URL shows the password
        uris = [f"postgresql+psycopg{u.removeprefix('postgresql').replace(f':{ESCAPED}@', '@')}"
                for u in (self.database, self.auth_database)]  # fmt: skip
        ours = {
            "ASIB_SECRETS": str(self.secrets),
            "ASIB_DATABASE_URI": uris[0],
            "ASIB_AUTH_DATABASE_URI": uris[1],
            "ASIB_ARTIFACTS": f"s3://{BUCKET}",
            "ASIB_MAKE_BUCKET": "1",
            "ASIB_PORT": str(self.port),
            "ASIB_WORKERS": "1",
            "ASIB_AUTH_CACHE_SECONDS": "2",  # so that an outage outlasts it
            "ASIB_ALLOWED_HOSTS": "127.0.0.1:*",
            "ASIB_ALLOWED_ORIGINS": "https://mlflow.example.org",
            "ASIB_MLFLOW": str(Path(sys.executable).with_name("mlflow")),
            "ASIB_PYTHON": sys.executable,
            "MLFLOW_S3_ENDPOINT_URL": self.door.uri,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        # nothing of the test's own settings reaches the server, as on a machine of its own
        return {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "AWS_", "PG"))} | ours

    def script(self, name: str, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run a script of deploy/ to its end."""
        return subprocess.run(
            [str(DEPLOY / name), *arguments], env=self.environment | changes, capture_output=True, text=True
        )

    def make_secrets(self) -> None:
        """deploy/first_start.sh, with the database's own password."""
        file = self.folder / "password"
        file.write_text(f"{ADMIN[1]}\n")
        done = self.script("first_start.sh", "mlflow.example.org", str(file), ASIB_NO_ENV="1")
        assert done.returncode == 0, done.stderr
        (self.secrets / "database_password").write_text(PASSWORD)

    def start(self) -> None:
        """Start the tracking server and wait until it answers."""
        self.launch([str(DEPLOY / "serve.sh")], self.environment)

    def close(self) -> None:
        self.stop()
        self.door.cut()
        self.s3.stop()

    def bucket(self) -> Any:
        """boto3's client of the store, past the door."""
        import boto3

        keys = [(self.secrets / name).read_text() for name in ("s3_access_key", "s3_secret_key")]
        return boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.s3.port}",
            region_name="us-east-1",
            aws_access_key_id=keys[0],
            aws_secret_access_key=keys[1],
        )


@pytest.fixture(scope="session")
def team_server(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeamServer]:
    """One server for the session; a test that stops a part of it starts that again."""
    server = TeamServer(tmp_path_factory.mktemp("team"), postgres_server)
    try:
        server.s3.start()
        server.make_secrets()
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def team(team_server: TeamServer, monkeypatch: pytest.MonkeyPatch) -> TeamServer:
    """The server, with the administrator's credentials in the environment."""
    log_in(monkeypatch, *ADMIN)
    return team_server


SHARED = "shared"
"""The experiment of the four users."""
TRAINER = ("trainer", "may train, not promote")
PROMOTER = ("promoter", "may promote, not train")
READER = ("four's reader", "may look, and no more")


@pytest.fixture(scope="session")
def four_users(team_server: TeamServer) -> None:
    """Beside the administrator: one with EDIT on the experiment `SHARED`, two with READ, as everybody on everything.

    EDIT on the registered model is the promoter's, once there is one (`grant`).
    """
    with pytest.MonkeyPatch.context() as patched:
        log_in(patched, *ADMIN)
        from mlflow.tracking import MlflowClient

        number = MlflowClient(team_server.uri).create_experiment(SHARED)
        users = administration(team_server)
        for user in (TRAINER, PROMOTER, READER):
            users.create_user(*user)
        users.grant_user_permission(TRAINER[0], "experiment", number, "EDIT")


def administration(server: TeamServer) -> Any:
    """MLflow's client for users and grants."""
    from mlflow.server import get_app_client

    return get_app_client("basic-auth", tracking_uri=server.uri)


def log_in(monkeypatch: pytest.MonkeyPatch, user: str, password: str) -> None:
    """The credentials that MLflow's clients, and the steps, send from now on."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
