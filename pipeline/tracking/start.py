"""Starting a delivery process, beside a run or for one file; and the default server.

Imports no MLflow: the delivery process does.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline import urls
from pipeline.tracking.pipe import Delivery


def default_uri() -> str:
    """MLFLOW_TRACKING_URI, else a SQLite file in the working directory; never a relative path."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        return urls.tracking(given, "MLFLOW_TRACKING_URI")
    return urls.tracking(f"sqlite:///{Path.cwd() / 'mlflow.db'}")


def start_delivery(
    folder: Path,
    *,
    uri: str | None = None,
    adopt: str | None = None,
    resume: str | None = None,
    grace: float = 120.0,
) -> Delivery:
    """Start the delivery process of the run in `folder` and return at once: its imports take seconds.

    Args:
        folder: the run's folder. Its journal may come later: `Delivery.wait_ready` needs it, requests do not.
        adopt: the run that `mlflow run` has made; MLFLOW_RUN_ID by default, "" for none.
        resume: the run that the journal continues. An adopted run then gets the tag `asib.resumes` and stays empty.
        grace: seconds to keep trying when the server is away after the trainer has ended.

    Raises:
        UserError: this project cannot use the URI.
    """
    arguments = ["--grace", str(grace)]
    adopt = os.environ.get("MLFLOW_RUN_ID", "") if adopt is None else adopt
    for name, value in (("--adopt", adopt), ("--resume", resume)):
        if value:
            arguments += [name, value]
    folder.mkdir(parents=True, exist_ok=True)
    where = urls.tracking(uri) if uri else default_uri()
    return Delivery(where, arguments, folder.absolute())


def fetch_now(uri: str, run_uri: str, dest: Path) -> Path:
    """Download one artifact without a run, in a separate process, as `Delivery.fetch` does."""
    delivery = Delivery(urls.tracking(uri), [], None)
    try:
        return delivery.fetch(run_uri, dest)
    finally:
        delivery.finish(0.0)
