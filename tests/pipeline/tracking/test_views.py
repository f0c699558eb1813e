"""The description and the saved view of an experiment."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path

from mlflow.tracking import MlflowClient

from pipeline.journal import Journal
from pipeline.tracking import views
from pipeline.tracking.follow import DeliveryLoop

LONGEST = 5000
"""Characters that MLflow takes in a tag of an experiment."""


def test_an_experiment_gets_a_view_that_the_ui_can_read_and_its_users_own_stays(
    sqlite_uri: str, tmp_path: Path
) -> None:
    client = MlflowClient(sqlite_uri)
    ours = client.create_experiment("ours", tags={"mlflow.note.content": "written by a person"})
    for number in range(2):
        folder = tmp_path / str(number)
        Journal.create(folder, experiment="ours").end("FINISHED", "completed", 0)
        with DeliveryLoop(folder, sqlite_uri) as loop:
            assert loop.run_once()
        tags = client.get_experiment(ours).tags
        assert tags["mlflow.note.content"] == "written by a person"
        packed = tags["mlflow.sharedViewState.asib"]
        if number == 0:
            assert len(packed) < LONGEST
            method, _, content = packed.partition(";")
            assert method == "deflate"
            view = json.loads(zlib.decompress(base64.b64decode(content)))
            assert view == views.state()
            charts = [chart["metricSectionId"] for chart in view["compareRunCharts"]]
            assert set(charts) == {section["uuid"] for section in view["compareRunSections"]}
            client.set_experiment_tag(ours, "mlflow.sharedViewState.asib", "arranged by a person")
        else:
            assert packed == "arranged by a person"
