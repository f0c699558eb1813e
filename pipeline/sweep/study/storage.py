"""The database of studies: its address, one lock over all machines, patience with outages, errors in one line."""

import contextlib
import hashlib
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from pipeline import urls
from pipeline.errors import UserError
from pipeline.files import locked
from pipeline.tracking.server import sqlite_file

logger = logging.getLogger("asib.study")
PATIENCE_S = 120.0
"""How long a call waits for an unreachable database; a trial's result is worth more than these seconds."""
CONNECT_S = 10
BUSY_S = 60
"""How long SQLite waits for other writers."""
SESSION = "-c timezone=UTC -c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3"
"""For PostgreSQL: heartbeats are compared across clients, and the lock of a machine that lost its power is freed."""
STATE = sqlalchemy.text("SELECT state FROM trials WHERE trial_id = :trial")
T = TypeVar("T")

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used with Study.optimize")


def database_url(url: str) -> str:
    """The URL for SQLAlchemy: an absolute path for SQLite, the driver psycopg 3 for PostgreSQL.

    Raises:
        UserError: another kind of database, or no file named.
    """
    url = url.strip()
    if url.startswith("sqlite:///"):
        return urls.sqlite(url, "storage")
    if match := re.fullmatch(r"postgres(?:ql)?(?:\+psycopg)?://(.+)", url):
        return f"postgresql+psycopg://{match[1]}"
    raise UserError(f"storage={shown_url(url)}: give sqlite:///<file>, or postgresql://<user>@<host>/<database>")


def shown_url(url: str) -> str:
    """The URL in the form that the user would write, without passwords."""
    return urls.hidden(url).replace("postgresql+psycopg://", "postgresql://")


class Database:
    """One database with Optuna's tables.

    Args:
        url: `sqlite:///…` or `postgresql://…`.
        create: make the tables, and a SQLite file, where they are missing; any number of processes may do so at once.

    Raises:
        UserError: it cannot be reached, does not exist, or holds another program's tables.
    """

    def __init__(self, url: str, *, create: bool) -> None:
        self.url = database_url(url)
        self.shown = shown_url(self.url)
        self.file = sqlite_file(self.url)
        if self.file is not None:
            if not create and not self.file.exists():
                raise UserError(f"storage={self.shown}: there is no such file; check the path")
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                if not self.file.exists():
                    self.file.touch()  # with the permissions of the umask; SQLite's own never let a group write
            except OSError as error:
                raise UserError(f"storage={self.shown}: {error.strerror}: {self.file.parent}") from error
        try:
            self.engine = sqlalchemy.create_engine(self.url, **self._options())
            with self.lock("tables"):
                self._refuse_others()
                # Optuna fills in {SCHEMA_VERSION}; braces in a password or path are not for it.
                address = self.url.replace("{", "{{").replace("}", "}}")
                # Heartbeats are switched on; ours beat in claim.py.
                self.rdb = RDBStorage(address, engine_kwargs=self._options(), heartbeat_interval=1)
                if self.file is not None:
                    self._make_quick()
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError, OSError, ValueError) as error:
            raise UserError(self.explain(error)) from error
        self.engine.dispose()
        self.engine = self.rdb.engine

    def expect_heartbeats(self, every: int, grace: int) -> None:
        """Take a trial for dead once `grace` seconds have passed without a heartbeat; one comes in `every` seconds."""
        self.rdb.heartbeat_interval, self.rdb.grace_period = every, grace

    def close(self) -> None:
        """Release the connections; new ones are made when needed."""
        self.engine.dispose()

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """One holder at a time among all processes that use the database; freed when the holder dies. Not re-entrant.

        A lock file beside a SQLite file; an advisory lock on PostgreSQL, held by a transaction of its own.

        Args:
            name: of the study. With SQLite all studies of a file share one lock, as they share one writer.
        """
        if self.file is not None:
            with locked(self.file.with_name(self.file.name + ".lock")):
                yield
            return
        key = int.from_bytes(hashlib.sha256(f"asib study {name}".encode()).digest()[:8], "big", signed=True)
        connection = self.engine.connect()
        try:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
            yield
        finally:
            with contextlib.suppress(SQLAlchemyError):  # the connection is gone, and the lock with it
                connection.close()

    def rest(self) -> None:
        """Release idle connections to a server: it allows a hundred by default, for all workers together."""
        if self.file is None:
            self.engine.dispose()

    def patiently(self, call: Callable[[], T]) -> T:
        """The call's result; while the database is unreachable the call is retried, for `PATIENCE_S`.

        Raises:
            UserError: the database has not come back.
        """
        deadline, pause = time.monotonic() + PATIENCE_S, 0.2
        while True:
            try:
                return call()
            except Exception as error:
                if not is_away(error):
                    raise
                if time.monotonic() > deadline:
                    raise UserError(self.explain(error)) from error
                if pause < 0.3:
                    logger.warning("%s; trying again", self.explain(error))
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def explain(self, error: BaseException) -> str:
        """Explain an error in one line without a password: the database, what it said, what to do."""
        while isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ is not None:
            error = error.__cause__
        original = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
        text = " ".join(str(original).split())
        with contextlib.suppress(Exception):
            password = sqlalchemy.make_url(self.url).password
            text = text.replace(password, "***") if password else text
        text = re.sub(r"^connection failed: ", "", text)[:300] or type(original).__name__
        if "optuna" in text and "storage upgrade" in text:
            return f"storage={self.shown}: made by another version of Optuna: optuna storage upgrade --storage <URL>"
        if "does not exist" in text and "database" in text:
            return f"storage={self.shown}: {text}: make it with createdb"
        if "not a database" in text:
            return f"storage={self.shown}: the file is not a SQLite database: name another"
        hint = "check the path" if self.file else "check the address, and that the server runs"
        return f"storage={self.shown}: {text}: {hint}"

    def state(self, trial_id: int) -> TrialState:
        """A trial's state as it is now."""
        with self.engine.connect() as connection:
            return TrialState[connection.execute(STATE, {"trial": trial_id}).scalar_one()]

    def _make_quick(self) -> None:
        """No wait for the disk at every small write: only a loss of power, which ends all workers, can undo the last.

        A write-ahead log also lets a dashboard read meanwhile.
        """
        with self.rdb.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
        sqlalchemy.event.listen(self.rdb.engine, "connect", _do_not_sync)
        self.rdb.engine.dispose()

    def _options(self) -> dict[str, Any]:
        if self.file is not None:
            return {"connect_args": {"timeout": BUSY_S}}
        arguments: dict[str, Any] = {"connect_timeout": CONNECT_S, "application_name": "asib"}
        if "options=" not in self.url:
            arguments["options"] = SESSION
        # One for the lock and one for the work under it: new connections for every claim would double its time.
        return {"pool_pre_ping": True, "pool_size": 2, "max_overflow": 3, "connect_args": arguments}

    def _refuse_others(self) -> None:
        """Refuse MLflow's database: it and Optuna keep their versions in one table, so each would break the other."""
        tables = set(sqlalchemy.inspect(self.engine).get_table_names())
        if "alembic_version" in tables and "studies" not in tables:
            owner = "MLflow's" if "experiments" in tables else "another program's"
            raise UserError(f"storage={self.shown} is {owner} database: give the studies one of their own")


def _do_not_sync(connection: Any, record: object) -> None:
    connection.execute("PRAGMA synchronous = NORMAL")


def is_away(error: BaseException) -> bool:
    """Whether the database did not answer, as opposed to: answered with an error."""
    if isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, OperationalError | InterfaceError | PoolTimeout)
