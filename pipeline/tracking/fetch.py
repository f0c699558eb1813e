"""Artifacts of a tracking server as files on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.served.bundle import REGISTERED, TAG

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


def fetch(client: MlflowClient, uri: str, dest: Path, tracking_uri: str) -> Path:
    """Download `runs:/<id>/<path>` or `models:/…` into the folder `dest`; the local path.

    Beside a registered version's files lies `REGISTERED`, with the manifest in the version's tag: whatever the
    artifacts hold under that name is not taken.

    Raises:
        Exception: MLflow's.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    dest.mkdir(parents=True, exist_ok=True)
    told = {}
    if uri.startswith("models:/"):
        name, *number = get_model_name_and_version(client, uri)
        if number:  # else it is a LoggedModel's id
            version = client.get_model_version(name, number[0])
            told = {"model_name": name, "model_version": str(version.version), TAG: version.tags.get(TAG, "")}
            uri = f"models:/{name}/{version.version}"  # an alias may move meanwhile
    path = Path(download_artifacts(artifact_uri=uri, dst_path=str(dest), tracking_uri=tracking_uri))
    if path.is_dir():
        (path / REGISTERED).unlink(missing_ok=True)
        if told and any(file.is_file() for file in path.rglob("*")):  # else they are gone, and whoever asked says so
            (path / REGISTERED).write_text(json.dumps(told))
    return path
