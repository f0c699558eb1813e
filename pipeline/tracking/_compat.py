"""MLflow's private API, as far as this project uses it: only here, checked with MLflow 3.17.

Tests of each: tests/pipeline/tracking. Importing this module is cheap; MLflow is imported by the functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


@cache
def latest_schema() -> str:
    """The revision of the database schema that this MLflow works with; it imports all migrations to find it."""
    from mlflow.store.db.utils import _get_latest_schema_revision

    return str(_get_latest_schema_revision())


def migrate(uri: str) -> None:
    """Bring a database to the latest schema, as `mlflow db upgrade` does."""
    from mlflow.store.db.utils import _upgrade_db, create_sqlalchemy_engine_with_retry

    _upgrade_db(create_sqlalchemy_engine_with_retry(uri))


def make_store(uri: str, artifacts: str) -> None:
    """First use of a database: make its schema, if it has none, and the default experiment, with artifacts there."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(uri, artifacts).engine.dispose()


def rewrite_params(uri: str, run_id: str, values: Mapping[str, str]) -> None:
    """Correct parameters of a run in MLflow's own database, in its table `params`.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: the database is busy or unreachable.
    """
    from sqlalchemy import column, create_engine, table

    engine = create_engine(uri)
    params = table("params", column("run_uuid"), column("key"), column("value"))
    try:
        with engine.begin() as connection:
            for key, value in values.items():
                of_run = (params.c.run_uuid == run_id) & (params.c.key == key)
                connection.execute(params.update().where(of_run).values(value=value))
    finally:
        engine.dispose()


def model_name_and_version(client: MlflowClient, uri: str) -> tuple[str, ...]:
    """Name and version that a `models:/…` URI leads to; of a LoggedModel's the id alone."""
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    return tuple(part for part in get_model_name_and_version(client, uri) if part is not None)


def says_version(uri: str) -> str | None:
    """The text of `/version` with status 200 at a server's address, asked with the user's credentials."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        found = http_request(get_default_host_creds(uri), "/version", "GET", max_retries=0, raise_on_status=False)
    except Exception:
        return None
    return found.text if found.status_code == 200 else None


def is_error_code(text: str) -> bool:
    """Whether this is one of the codes that MLflow's errors have."""
    from mlflow.protos.databricks_pb2 import ErrorCode

    return text in ErrorCode.DESCRIPTOR.values_by_name


def is_random(name: str) -> bool:
    """Whether MLflow made up this name of a run, such as dashing-robin-851, since nobody had given it one.

    Example:
        >>> is_random("dashing-robin-851"), is_random("my-run-3"), is_random("")
        (True, False, True)
    """
    from mlflow.utils.name_utils import _GENERATOR_NOUNS, _GENERATOR_PREDICATES

    first, _, rest = name.partition("-")
    noun, _, number = rest.rpartition("-")
    return not name or (first in _GENERATOR_PREDICATES and noun in _GENERATOR_NOUNS and number.isdecimal())


def artifact_store(client: MlflowClient, run_id: str) -> Any:
    """The store of a run's artifacts, which can delete them: the public client cannot."""
    return client._tracking_client._get_artifact_repo(run_id)
