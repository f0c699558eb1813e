"""Processes that set the same new tag or alias, or log the same new data set, at the same moment, on real stores."""

from __future__ import annotations

import threading
from collections.abc import Callable
from multiprocessing.pool import ThreadPool

import pytest
from mlflow.entities import Dataset, DatasetInput, LoggedModelOutput
from mlflow.tracking import MlflowClient

from pipeline.tracking import models, server
from pipeline.tracking.faults import outraced

ROUNDS = 12
"""Without the repetition, a fifth to a quarter of the calls of each kind failed (4 x 25 calls)."""
RACERS = 4


@pytest.mark.postgres
def test_on_postgresql(postgres_url: str) -> None:
    race_for_each_kind(postgres_url.replace("postgresql://", "postgresql+psycopg://"))


def test_on_sqlite_and_over_http(store: str) -> None:
    race_for_each_kind(store)


def race_for_each_kind(uri: str) -> None:
    """What four clients set at once is set, and none of them is refused."""
    clients = [server.connect(uri) for _ in range(RACERS)]
    first = clients[0]
    experiment = first.create_experiment("raced")
    runs = [first.create_run(experiment).info.run_id for _ in range(RACERS)]
    run = runs[0]
    first.create_registered_model("raced")
    version = str(first.create_model_version("raced", f"runs:/{run}/model", run).version)
    calls: list[Callable[[MlflowClient, str, str], None]] = [
        lambda client, key, own: client.set_tag(run, key, "v"),
        lambda client, key, own: client.set_experiment_tag(experiment, key, "v"),
        lambda client, key, own: client.set_registered_model_tag("raced", key, "v"),
        lambda client, key, own: client.set_model_version_tag("raced", version, key, "v"),
        lambda client, key, own: outraced(client.set_registered_model_alias)("raced", key, version),
        lambda client, key, own: client.log_inputs(own, [DatasetInput(Dataset(key, "digest", "local", "{}"), [])]),
    ]
    start = threading.Barrier(RACERS)

    def race(client: MlflowClient, own: str) -> list[Exception]:
        failed = []
        for call in calls:
            for key in range(ROUNDS):
                start.wait(60.0)
                try:
                    call(client, f"k{key}", own)
                except Exception as error:
                    failed.append(error)
        return failed

    with ThreadPool(RACERS) as pool:
        assert pool.starmap(race, zip(clients, runs, strict=True), chunksize=1) == [[]] * RACERS
    keys = {f"k{key}" for key in range(ROUNDS)}
    model = first.get_registered_model("raced")
    for own in runs:
        assert keys == {given.dataset.name for given in first.get_run(own).inputs.dataset_inputs}
    assert keys <= first.get_run(run).data.tags.keys()
    assert keys <= first.get_experiment(experiment).tags.keys()
    assert keys == model.tags.keys() == model.aliases.keys()
    assert keys == first.get_model_version("raced", version).tags.keys()


def test_an_output_whose_answer_was_lost_is_linked_once(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's client sends a request again if no answer comes, and the server refuses the second one."""
    client = server.connect(store)
    experiment = client.create_experiment("lost answers")
    run, model = client.create_run(experiment).info.run_id, client.create_logged_model(experiment)
    once = client.log_outputs

    def twice(run_id: str, outputs: list[LoggedModelOutput]) -> None:
        once(run_id, outputs)
        once(run_id, outputs)

    monkeypatch.setattr(client, "log_outputs", twice)
    models._link_output(client, run, LoggedModelOutput(model.model_id, step=3))
    linked = client.get_run(run).outputs.model_outputs
    assert [(output.model_id, output.step) for output in linked] == [(model.model_id, 3)]
