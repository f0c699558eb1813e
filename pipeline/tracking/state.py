"""The MLflow run of a journal: remembered in its folder, or found on the server by the journal's tag."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from pipeline import urls
from pipeline.files import read_state, write_atomically
from pipeline.tracking.faults import look
from pipeline.tracking.server import all_experiments

STATE_FILE = "delivery.json"
JOURNAL_TAG = "asib.journal"


@dataclass
class State:
    """`delivery.json`: what a later delivery need not look up again. Losing it costs time, never data."""

    uri: str = ""
    journal: str = ""
    run_id: str = ""
    experiment_id: str = ""
    url: str = ""
    shell: str = ""  # the run that `mlflow run` created for a resume of another run; stays empty
    generation: str = ""
    offset: int = 0
    ended: bool = False
    models: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)  # registered model -> the version made of this run's
    checkpoint: dict[str, Any] = field(default_factory=dict)  # the server's manifest

    @classmethod
    def load(cls, folder: Path, uri: str, journal_id: str) -> State:
        """The folder's state; empty if missing, or if it belongs to another server or journal."""
        values = read_state(folder / STATE_FILE) or {}
        state = cls(**{key: value for key, value in values.items() if key in cls.__dataclass_fields__})
        if (state.uri, state.journal) != (urls.hidden(uri), journal_id):
            state = cls(uri=urls.hidden(uri), journal=journal_id)
        return state

    def save(self, folder: Path) -> None:
        write_atomically(folder / STATE_FILE, json.dumps(asdict(self), indent=1))


def find_by_journal(client: MlflowClient, journal_id: str, experiment: str | None) -> Run | None:
    """The run with this journal's tag, searched in the named experiment first, then everywhere."""
    query = f"tags.`{JOURNAL_TAG}` = '{journal_id}'"
    named = look(lambda: client.get_experiment_by_name(experiment)) if experiment else None
    runs = client.search_runs([named.experiment_id], query, max_results=1) if named else []
    if not runs:
        # A run that `mlflow run` created lies in that command's experiment.
        runs = client.search_runs(all_experiments(client), query, max_results=1)
    return runs[0] if runs else None
