"""Addresses that a user gives: usable, or refused in one line before anything connects."""

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from pipeline import urls
from pipeline.errors import UserError


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Files that are no tracking store."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("no database" * 20)
    os.mkfifo(tmp_path / "pipe")
    for name, table in (("other", "people"), ("study", "studies")):
        with closing(sqlite3.connect(tmp_path / f"{name}.db")) as db:
            db.execute(f"create table {table} (id)")
            db.commit()
    return tmp_path


WRONG = {
    "http://[::1": "not a valid address",
    "http://": "names no server",
    "http:///page": "names no server",
    "https://host:99999": "Port out of range",
    "https://host:port": "Port",
    "http://a b": "no spaces",
    "http://host/#/experiments/3": "give its address alone, http://host/",
    "file:///runs": "did you mean sqlite:///<file>",
    "mlruns": "no such kind",
    "ftp://host": "no such kind",
    "postgres://u@h/d": "did you mean postgresql://",
    "postgresql:/h/d": "names no server",
    "postgresql://u@h": "names no database",
    "sqlite://m.db": "three slashes",
    "sqlite:///": "name a file",
    "sqlite:///:memory:": "name a file",
    "sqlite:///{here}/folder": "is a folder; name a file in it",
    "sqlite:///{here}/text": "not a SQLite database",
    "sqlite:///{here}/text/m.db": "is a file, and so holds none",
    "sqlite:///{here}/pipe": "not a regular file",
    "sqlite:///{here}/other.db": "another program's database",
    "sqlite:///{here}/study.db": "a study's",
    "sqlite:///~nobody-of-this-name/m.db": "no home folder",
    "http://user:secret@[::1": "not a valid address",
}


@pytest.mark.parametrize("uri", WRONG)
def test_a_wrong_address_is_one_line_at_once(here: Path, uri: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError) as refused:
        urls.tracking(uri.format(here=here))
    assert time.monotonic() - began < 5
    line = str(refused.value)
    assert line.startswith("tracking.uri=")
    assert WRONG[uri] in line
    assert line.isprintable()
    assert "secret" not in line


@pytest.mark.parametrize(
    "uri",
    ["http://localhost:5000", "https://u:p@h.example/mlflow/", "http://[::1]:5000", "postgresql://u@h:5432/d",
     "postgresql+psycopg:///d", "mysql+pymysql://u:p@h/d", "databricks", "databricks://profile"],
)  # fmt: skip
def test_an_address_that_may_be_one_is_taken_as_it_is(uri: str) -> None:
    assert urls.tracking(uri) == uri


def test_a_sqlite_file_is_made_absolute(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    assert urls.tracking("sqlite:///new/m.db?timeout=3") == f"sqlite:///{here}/new/m.db?timeout=3"
    assert not (here / "new").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root may act as another user")
def test_a_database_that_may_not_be_written_is_refused(here: Path) -> None:
    for above in (here, *list(here.parents)[:3]):
        os.chmod(above, 0o755)
    os.seteuid(65534)
    try:
        for name in ("other.db", "new.db"):
            with pytest.raises(UserError, match="permission denied"):
                urls.tracking(f"sqlite:///{here / name}")
    finally:
        os.seteuid(0)


def test_to_look_at_a_database_does_not_free_this_process_s_locks_on_it(tmp_path: Path) -> None:
    """Closing a file in any other way than SQLite's frees all POSIX locks of the process on it."""
    file = tmp_path / "m.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        db.execute("create table experiments (id)")
        db.execute("begin immediate")
        urls.tracking(f"sqlite:///{file}")
        pid = os.fork()
        if pid == 0:  # another process
            try:
                other = sqlite3.connect(file, timeout=0.1, isolation_level=None)
                other.execute("begin immediate")
            except sqlite3.OperationalError:
                os._exit(7)  # locked
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
