"""Artifacts of a tracking server as files on this machine."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import urls
from pipeline.errors import NotThere, UserError
from pipeline.served.bundle import REGISTERED, TAG
from pipeline.tracking.faults import lasting, unknown
from pipeline.tracking.server import explain

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger("asib.delivery")


def fetch(client: MlflowClient, uri: str, dest: str) -> str:
    """Download `runs:/<id>/<path>` or `models:/…` into the folder `dest`; the local path.

    Beside a registered version's files lies `REGISTERED`, with the manifest in the version's tag: whatever the
    artifacts hold under that name is not taken.

    Raises:
        NotThere: the server does not have it, or refuses it for good.
        UserError: the server does not answer.
    """
    try:
        return _download(client, uri, Path(dest))
    except Exception as error:
        log.warning("fetch %s", uri, exc_info=error)
        if not (unknown(error) or lasting(error) or _missing(client, uri)):
            raise UserError(f"{uri}: {explain(error, client.tracking_uri)}") from error
        reason = str(error).strip().split("\n", 1)[0][:300]
        where = urls.hidden(client.tracking_uri)
        raise NotThere(f"{uri} cannot be fetched from {where}: {reason}: check the id and the path") from error


def _download(client: MlflowClient, uri: str, dest: Path) -> str:
    from mlflow.artifacts import download_artifacts

    from pipeline.tracking._compat import model_name_and_version

    dest.mkdir(parents=True, exist_ok=True)
    told = {}
    if uri.startswith("models:/"):
        name, *number = model_name_and_version(client, uri)
        if number:  # else it is a LoggedModel's id
            version = client.get_model_version(name, number[0])
            told = {"model_name": name, "model_version": str(version.version), TAG: version.tags.get(TAG, "")}
            uri = f"models:/{name}/{version.version}"  # an alias may move meanwhile
    path = Path(download_artifacts(artifact_uri=uri, dst_path=str(dest), tracking_uri=client.tracking_uri))
    if path.is_dir():
        (path / REGISTERED).unlink(missing_ok=True)
        if told and any(file.is_file() for file in path.rglob("*")):  # else they are gone, and whoever asked says so
            (path / REGISTERED).write_text(json.dumps(told))
    return str(path)


def _missing(client: MlflowClient, uri: str) -> bool:
    """Whether a run has no such artifact. MLflow's download says of all failures that they are internal errors."""
    run_id, _, path = uri.removeprefix("runs:/").strip("/").partition("/")
    if not uri.startswith("runs:/"):
        return False
    try:
        there = client.list_artifacts(run_id, path.rpartition("/")[0] or None)
    except Exception:
        return False
    return path not in [file.path for file in there]
