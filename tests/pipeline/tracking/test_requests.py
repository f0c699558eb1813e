"""What steps ask of the server: the runs of a study that are still RUNNING, and their end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Dataset, DatasetInput
from mlflow.tracking import MlflowClient

from pipeline.tracking import requests


@pytest.fixture
def client(store: str) -> MlflowClient:
    return MlflowClient(store)


class SmallPages:
    """A client whose pages hold two."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)
        if not name.startswith("search"):
            return call
        return lambda *values, **named: call(*values, **named, max_results=2)


def test_running_runs_of_a_study_are_found_on_all_pages_of_all_experiments(client: MlflowClient) -> None:
    made: dict[str, set[str]] = {"kd-1": set(), "it's-2": set()}
    for number in range(6):
        experiment = client.create_experiment(f"running {number}")
        for study, runs in made.items():
            runs.add(client.create_run(experiment, tags={"asib.study": study, "asib.trial": "7"}).info.run_id)
        client.create_run(experiment)
        ended = client.create_run(experiment, tags={"asib.study": "kd-1"}).info.run_id
        client.set_terminated(ended, "FAILED")
    found = requests.running(SmallPages(client), "kd-1")
    assert {run["run_id"] for run in found} == made["kd-1"]
    assert {(run["tags"]["asib.study"], run["tags"]["asib.trial"]) for run in found} == {("kd-1", "7")}
    assert {run["run_id"] for run in requests.running(client, "it's-2")} == made["it's-2"]
    assert len(found) == len({run["run_id"] for run in found})
    both = requests.running(SmallPages(client), None)
    assert {run["run_id"] for run in both} >= made["kd-1"] | made["it's-2"]


def test_reaping_ends_only_what_still_runs(client: MlflowClient) -> None:
    orphan, finished, deleted = (client.create_run("0").info.run_id for _ in range(3))
    client.set_terminated(finished, "FINISHED")
    client.delete_run(deleted)
    end = ["KILLED", "killed", 137, "the worker's heartbeat is gone"]
    assert requests.reap(client, dict.fromkeys([finished, deleted, "0" * 32, orphan], end)) == [orphan]
    run = client.get_run(orphan)
    assert run.info.status == "KILLED"
    assert run.info.end_time >= run.info.start_time
    assert run.data.tags["asib.outcome"] == "killed"
    assert run.data.tags["asib.exit_code"] == "137"
    assert run.data.tags["asib.error"] == "the worker's heartbeat is gone"
    assert client.get_run(finished).info.status == "FINISHED"
    assert "asib.outcome" not in client.get_run(finished).data.tags
    assert requests.reap(client, {orphan: end}) == []


def test_a_strangers_data_set_holds_no_comparison_up(sqlite_uri: str, tmp_path: Path) -> None:
    client = MlflowClient(sqlite_uri)
    run_id = client.create_run("0").info.run_id
    for number, text in enumerate(["no JSON", "[1]", '{"classes": "many"}', '{"classes": -1}', '{"classes": 20}']):
        data = Dataset(name=f"d{number}", digest=str(number), source_type="local", source="{}", profile=text)
        client.log_inputs(run_id, [DatasetInput(data)])
    folder = Path(requests.read_runs(client, [run_id], str(tmp_path), [])[0])
    assert json.loads((folder / "record.json").read_text())["classes"] == 20
