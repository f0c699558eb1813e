"""A tracking server as delivery sees it: address, environment, a ready SQLite file, errors in one line.

Importing this module is cheap; MLflow is imported by the functions that need it, after `prepare_environment`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline import urls
from pipeline.errors import UserError
from pipeline.files import explained, locked, replacing
from pipeline.tracking._compat import latest_schema, make_store, migrate
from pipeline.tracking.faults import lasting, outraced

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger("asib.delivery")

PATIENCE = "MLFLOW_HTTP_REQUEST_TIMEOUT"
FIRST_S, LATER_S = "8", "60"
"""How long a call may take: at the start a refusal should come within seconds; later, slow uploads need more time."""
SETTINGS = {
    # The loop's own back-off does the rest. MLflow's defaults hold a single call for four minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Downloads would otherwise go to the server's S3 endpoint, which clients often cannot reach.
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    # A model's requirements come from its entry, not from whatever project lies in the working directory.
    "MLFLOW_UV_AUTO_DETECT": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
UPSERTS = (
    "set_tag",
    "set_experiment_tag",
    "set_registered_model_tag",
    "set_model_version_tag",
    "log_inputs",
)
"""Calls of MLflow's client that look for a row and then insert it, and that may simply be made again."""
BUSY_S = 10.0
"""How long to wait for another process's lock on the SQLite file; a write takes milliseconds."""
CONNECT_S = 10
"""How long to wait for a database server; MLflow itself would try for two minutes."""
# Set by `mlflow run` for its step: the client API gets it explicitly, and MLflow's fluent API must not act on it.
ADOPTION = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME")


def prepare_environment() -> None:
    """Set MLflow's environment variables for this process, except those that the user has set."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in ADOPTION:
        os.environ.pop(name, None)


def sqlite_file(uri: str) -> Path | None:
    return urls.sqlite_path(uri) if uri.startswith(urls.SQLITE) else None


def run_url(uri: str, experiment_id: str, run_id: str) -> str:
    if uri.startswith("http"):
        return f"{urls.hidden(uri).rstrip('/')}/{urls.run_page(experiment_id, run_id)}"
    return f"{urls.hidden(uri)} run {run_id}"


def connect(uri: str, answers: bool = True) -> MlflowClient:
    """A client whose server answers; creates or migrates a SQLite file first.

    Args:
        answers: False if the server need not answer now.

    Raises:
        UserError: the server refuses or does not answer; one line with the reason and what to do.
    """
    import mlflow
    from mlflow.tracking import MlflowClient

    ours = PATIENCE not in os.environ
    os.environ.setdefault(PATIENCE, FIRST_S)  # MLflow reads it at every call
    try:
        prepare_sqlite(uri)
        _check_answers(uri)
        # Artifact and model URIs resolve through this global setting.
        mlflow.set_tracking_uri(uri)
        client = MlflowClient(tracking_uri=uri)
        for name in UPSERTS:
            setattr(client, name, outraced(getattr(client, name)))
        if answers:
            client.search_experiments(max_results=1)
    except UserError:
        raise
    except Exception as error:
        raise UserError(explain(error, uri)) from error
    finally:
        if ours:
            os.environ[PATIENCE] = LATER_S
    return client


def prepare_sqlite(uri: str) -> None:
    """Create or migrate the schema of a SQLite file under a lock: simultaneous first use crashes MLflow.

    A file that is ready costs one query. Before a migration a copy is made beside the file.

    Raises:
        UserError: it cannot be created, or another program keeps it locked; MLflow itself would try for minutes.
    """
    path = sqlite_file(uri)
    if path is None or _schema_is_current(path):
        return
    with explained(path, "tracking.uri"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(path.name + ".lock")):
            if not _schema_is_current(path):
                _make_current(uri, path)


def _make_current(uri: str, path: Path) -> None:
    _check_answers(uri)
    revision, _ = _revision(path)
    if revision is not None:
        log.info("migrating %s from schema %s", path, revision)
        with sqlite3.connect(path) as source, sqlite3.connect(f"{path}.before-{revision}") as copy:
            source.backup(copy)
        migrate(uri)
    # Also makes the default experiment, whose artifacts then lie beside the file wherever we were started.
    artifacts = str(path.parent / "mlartifacts")
    if path.exists() and path.stat().st_size:
        make_store(uri, artifacts)
        return
    # Built aside: MLflow cannot complete half a schema, which a killed process would leave behind.
    for part in path.parent.glob(f".{path.name}.*"):
        part.unlink()
    with replacing(path, "tracking.uri") as temporary:
        make_store(f"sqlite:///{temporary}", artifacts)


def all_pages(search: Callable[[str | None], Any]) -> Iterator[Any]:
    """All results of a search that takes a page's token and returns at most a thousand."""
    token = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return


def all_experiments(client: MlflowClient) -> list[str]:
    """Ids of all experiments that are not deleted."""
    return [found.experiment_id for found in all_pages(lambda token: client.search_experiments(page_token=token))]


def artifact_location(uri: str, experiment: str) -> str | None:
    """Where a new experiment keeps its artifacts: beside a SQLite file; a server decides for itself."""
    path = sqlite_file(uri)
    if path is None:
        return None
    slug = re.sub(r"[^A-Za-z0-9._-]", "_", experiment).strip(".") or "experiment"
    if slug != experiment:
        slug += "-" + hashlib.sha256(experiment.encode()).hexdigest()[:8]
    return (path.parent / "mlartifacts" / slug).as_uri()


def explain(error: BaseException, uri: str) -> str:
    """One line: the server, what it said, what to do."""
    password = urlsplit(uri).password
    text = str(error).replace(password, "***") if password else str(error)
    code = getattr(error, "error_code", "")
    at = f"tracking server {urls.hidden(uri)}"
    # not as part of a port or an id
    if code in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED") or re.search(r"\b401\b", text[:200]):
        return f"{at}: wrong user name or password (401): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if re.search(r"too many 429 |\b429 Client Error|error code 429", text):
        return f"{at}: too many requests, or wrong passwords (429): wait a minute, then check MLFLOW_TRACKING_PASSWORD"
    if "Invalid Host header" in text:
        return f"{at}: it does not accept this host name (403): start it with --allowed-hosts, or use its own name"
    if code == "PERMISSION_DENIED" or " 403 " in text[:200]:
        return f"{at}: permission denied (403): ask for EDIT permission on the experiment"
    if code == "ENDPOINT_NOT_FOUND":
        return f"{at}: there is no MLflow at this address (404): check the URI"
    if not uri.startswith("http"):
        return f"{at}: {_first_line(text)}: check the URI, or use tracking=offline"
    if (failed := re.search(r"too many (5\d\d) error responses", text)) is not None:
        return f"{at} is out of order (error {failed[1]}): see its log, or use tracking=offline"
    if not lasting(error):
        return f"{at} does not answer ({_reason(text)}): start the server, or use tracking=offline"
    return f"{at}: {_first_line(text)}"


def _revision(path: Path) -> tuple[str | None, bool]:
    """The schema's revision, and whether the first use was completed."""
    if not path.exists() or path.stat().st_size == 0:
        return None, False
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=BUSY_S / 4)) as db:
            tables = {name for (name,) in db.execute("select name from sqlite_master where type = 'table'")}
            if not {"alembic_version", "experiments"} <= tables:
                return None, False
            row = db.execute("select version_num from alembic_version").fetchone()
            # The default experiment is the last thing that a first use writes.
            ready = db.execute("select 1 from experiments where experiment_id = 0").fetchone()
            return (str(row[0]) if row else None), ready is not None
    except sqlite3.OperationalError:
        return None, False  # another process is working on it: the lock will show
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} is not a SQLite database ({error}): name another file") from error


def _check_answers(uri: str) -> None:
    """Try once to reach a database before MLflow begins its many attempts; raises the driver's error."""
    path = sqlite_file(uri)
    if path is not None:
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=BUSY_S)) as db:
                db.execute("begin immediate")
                db.rollback()
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"tracking.uri={uri}: {error}; end whatever else uses the file, or name another one"
            ) from error
    elif uri.startswith("postgresql"):
        import sqlalchemy

        engine = sqlalchemy.create_engine(uri, connect_args={"connect_timeout": CONNECT_S})
        engine.connect().close()
        engine.dispose()


def _schema_is_current(path: Path) -> bool:
    revision, ready = _revision(path)
    return ready and revision == latest_schema()


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0][:300]


def _reason(text: str) -> str:
    known = (
        "Connection refused|Name or service not known|Temporary failure in name resolution"
        "|timed out|timeout|No route to host|Connection reset"
    )
    found = re.search(known, text)
    return found[0].lower() if found else _first_line(text)[:160]
