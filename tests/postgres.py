"""A real PostgreSQL for tests: a private cluster in a temporary folder, on a free port of loopback, with a password."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import free_port

START_S = 60.0
PASSWORD = "s3cret/w@rd"
"""With characters that a URL must escape."""
ESCAPED = "s3cret%2Fw%40rd"


def programs() -> Path | None:
    """The folder of initdb and postgres; Debian keeps them out of PATH."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    return max((p.parent for p in Path("/usr/lib/postgresql").glob("*/bin/initdb")), default=None)


class PostgresServer:
    """`postgres` on a cluster of its own; can be stopped, as an outage would, and started again.

    Args:
        fsync: as a server in earnest; tests need none.
    """

    def __init__(self, *, fsync: bool = False) -> None:
        bin_folder = programs()
        assert bin_folder is not None
        self._bin = bin_folder
        # Not below pytest's folder, which only root may enter; short, as the socket's path has a limit.
        self.folder = Path(tempfile.mkdtemp(prefix="asib-pg-"))
        # initdb refuses root
        self._as: dict[str, Any] = {"cwd": self.folder}
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
            self._as |= {"user": "postgres", "group": "postgres", "extra_groups": []}
        self.port = free_port()
        (self.folder / "password").write_text(PASSWORD)
        (self.folder / "password").chmod(0o644)
        subprocess.run(
            [self._bin / "initdb", "-D", self.folder / "data", "-U", "postgres", "-E", "UTF8", "--locale=C",
             "--no-sync", "--auth=scram-sha-256", f"--pwfile={self.folder / 'password'}"],
            check=True, capture_output=True, **self._as,
        )  # fmt: skip
        self._fsync = "on" if fsync else "off"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._bin / "postgres", "-D", self.folder / "data", "-k", self.folder, "-p", str(self.port),
                 "-c", "listen_addresses=127.0.0.1", "-c", f"fsync={self._fsync}"],
                stdout=log, stderr=log, start_new_session=True, **self._as,
            )  # fmt: skip
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            asked = [str(self._bin / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
            if subprocess.run(asked).returncode == 0:
                return
            assert self._process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            time.sleep(0.05)
        raise TimeoutError(f"no PostgreSQL on port {self.port} after {START_S} s")

    def stop(self) -> None:
        """Stop it and cut all its connections."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # its fast shutdown
            self._process.wait()
            self._process = None

    def url(self, database: str) -> str:
        return f"postgresql://postgres:{ESCAPED}@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> str:
        """The URL of a new empty database."""
        import psycopg

        name = f"studies_{uuid.uuid4().hex[:8]}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def close(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)  # at once: nothing is to be kept
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One server for the session; a test that stops it starts it again."""
    if programs() is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> str:
    """An empty database of the test's own."""
    return postgres_server.create_database()


@pytest.fixture(scope="session")
def studies_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with Optuna's empty tables, to be copied: making them takes as long as most tests."""
    from pipeline.sweep.study.storage import Database

    file = tmp_path_factory.mktemp("studies") / "template.db"
    Database(f"sqlite:///{file}", create=True).close()
    return file


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def study_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The one list of storages: every behaviour of studies is tested on each."""
    if request.param == "sqlite":
        copy = shutil.copy(request.getfixturevalue("studies_template"), tmp_path / "studies.db")
        return f"sqlite:///{copy}"
    url: str = request.getfixturevalue("postgres_url")
    return url
