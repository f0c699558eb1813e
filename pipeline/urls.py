"""Addresses of tracking servers and databases, checked before anything connects: a wrong one is one line at once."""

import contextlib
import os
import re
import sqlite3
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.errors import UserError
from pipeline.paths import is_utf8, printable, user_path

SQLITE = "sqlite:///"
DATABASES = ("postgresql", "mysql", "mssql")
FORMS = "sqlite:///<file>, http(s)://<server>, or tracking=offline"
MLFLOWS = {"experiments", "runs", "metrics", "params"}
PROBE_S = 2.0
"""How long a first look into a SQLite file waits for a writer; later use waits longer, and says so."""


def tracking(uri: str, key: str = "tracking.uri") -> str:
    """The address of a tracking store, usable as far as can be told without connecting.

    Args:
        uri: `sqlite:///<file>` (relative to the working directory; made absolute), `http(s)://…`, or a database's URL.
        key: the setting that gave it, for the error.

    Raises:
        UserError: another kind of address, a malformed one, or a SQLite file that cannot be MLflow's.

    Example:
        >>> tracking("https://mlflow.lab:5000")
        'https://mlflow.lab:5000'
    """
    uri = uri.strip()
    refuse = partial(_refusal, key, uri)
    if not is_utf8(uri) or not uri.isprintable() or " " in uri.partition("://")[2].partition("/")[0]:
        raise refuse(f"an address holds no spaces and no control characters; give {FORMS}")
    if uri.startswith(SQLITE):
        file = sqlite(uri, key)
        found = tables(sqlite_path(file)) or set()
        if found and not found & MLFLOWS:  # not all of them: a migration removes one briefly
            owner = "a study's (storage=)" if "studies" in found else "another program's"
            raise refuse(f"this is {owner} database, not MLflow's; name another file")
        return file
    scheme = uri.partition(":")[0].lower()
    if scheme == "databricks":
        return uri
    if scheme not in ("http", "https") and scheme.partition("+")[0] not in DATABASES:
        known = {"postgres": "postgresql://…", "sqlite": "sqlite:/// with three slashes", "file": "sqlite:///<file>"}
        hint = f"did you mean {known[scheme]}? " if scheme in known else ""
        raise refuse(f"no such kind of tracking store; {hint}give {FORMS}")
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise refuse(
            f"not a valid address ({str(error)[:80]}); give for example https://mlflow.example.org:5000"
        ) from None
    if "://" not in uri or not (host or (parts.path.strip("/") and scheme not in ("http", "https"))):
        raise refuse("the address names no server; give for example https://mlflow.example.org:5000")
    if scheme in ("http", "https") and parts.fragment:
        raise refuse(f"this is a page of the server; give its address alone, {uri.partition('#')[0]}")
    if scheme not in ("http", "https") and not parts.path.strip("/"):
        raise refuse(f"the address names no database; give {scheme}://<user>@<host>/<database>")
    return uri


def sqlite(url: str, key: str) -> str:
    """A `sqlite:///<file>` URL with an absolute path; neither the file nor its folder need exist.

    Raises UserError: no file, a folder, a file that is not a SQLite database or cannot be written.
    """
    refuse = partial(_refusal, key, url)
    path, mark, query = url.removeprefix(SQLITE).partition("?")
    if not path or path == ":memory:":
        raise refuse("name a file, for example sqlite:///mlflow.db")
    file = user_path(path, f"{key}={SQLITE}").absolute()
    if file.is_dir():
        raise refuse(f"{file} is a folder; name a file in it, such as sqlite:///{file / 'mlflow.db'}")
    above = next(folder for folder in file.parents if folder.exists())
    if not above.is_dir():
        raise refuse(f"{above} is a file, and so holds none; name a file in a folder")
    if not file.exists():
        if not _allowed(above, os.W_OK | os.X_OK):
            raise refuse(f"cannot make a file in {above} (permission denied, or read-only); name another folder")
    elif not file.is_file():
        raise refuse("this is not a regular file; name another")
    elif not _allowed(file, os.R_OK | os.W_OK):
        raise refuse("the database cannot be read and written (permission denied, or read-only); ask its owner")
    elif not _allowed(file.parent, os.W_OK | os.X_OK):
        raise refuse(f"SQLite has to write beside it, and {file.parent} does not allow that; ask its owner")
    elif tables(file) is None:
        raise refuse("the file is not a SQLite database; name another")
    return f"{SQLITE}{file}{mark}{query}"


def _refusal(key: str, url: str, reason: str) -> UserError:
    return UserError(f"{key}={hidden(printable(url))}: {reason}")


def sqlite_path(url: str) -> Path:
    """The file of a `sqlite:///` URL."""
    return Path(url.removeprefix(SQLITE).partition("?")[0])


def hidden(url: str) -> str:
    """The URL without passwords, even if one with / or @ makes it unparsable.

    SQLAlchemy's own `render_as_string` takes 0.6 s to import, and shows the part of a password after an @.
    """
    return re.sub(r"(password=)[^&]*", r"\1***", re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url))


WORKFLOW = "workflowType=machine_learning"
"""Without it MLflow's UI opens its view of language models."""
VIEW = "asib"
"""The key of the saved view (`pipeline.tracking.views`)."""


def run_page(experiment_id: str, run_id: str, part: str = "") -> str:
    """A run's page in MLflow's UI, or a part such as `/artifacts/curves.png`, relative to whatever address it has."""
    return f"#/experiments/{experiment_id}/runs/{run_id}{part}?{WORKFLOW}"


def view_page(experiment_id: str) -> str:
    """The experiment's saved view, likewise."""
    return f"#/experiments/{experiment_id}/runs?{WORKFLOW}&viewStateShareKey={VIEW}"


def _allowed(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def tables(file: Path) -> set[str] | None:
    """The tables of a SQLite file; empty if it has none yet or another process holds it, None if it is no database.

    Only SQLite may open it: closing the file in any other way frees the locks that this process holds on it.
    """
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=PROBE_S)) as opened:
            return {name for (name,) in opened.execute("select name from sqlite_master where type = 'table'")}
    except sqlite3.OperationalError:
        return set()
    except sqlite3.DatabaseError:
        return None
