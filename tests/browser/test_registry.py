"""The registry page of a model: versions, aliases, and the tags that keep a promotion's decision; a run's pictures."""

import os
from pathlib import Path

import pytest
from mlflow import MlflowClient
from playwright.sync_api import Page, expect

from tests.browser.ui import SECONDS, chromium, close_assistant, open_picture
from tests.servers import MlflowServer

pytestmark = pytest.mark.browser
NAME = "cifar-student"


@pytest.fixture
def run(mlflow_server: MlflowServer, tmp_path: Path) -> tuple[str, str]:
    """Three versions of a model, two of them decided about; experiment and run that they are from."""
    import matplotlib.pyplot as plt

    mlflow = MlflowClient(mlflow_server.uri)
    experiment = mlflow.create_experiment("registry")
    run = mlflow.create_run(experiment, run_name="promotion").info.run_id
    figure, axes = plt.subplots()
    axes.plot([0, 1], [0, 1])
    mlflow.log_figure(run, figure, "reliability.png")
    plt.close(figure)
    mlflow.set_terminated(run)
    mlflow.create_registered_model(NAME, tags={"asib.task": "image classification"})
    for version in "123":
        mlflow.create_model_version(NAME, f"runs:/{run}/student", run, tags={"asib.config_hash": f"hash {version}"})
    for alias, version in (("previous", "1"), ("champion", "2"), ("challenger", "3")):
        mlflow.set_registered_model_alias(NAME, alias, version)
    decisions = {
        "2": {"asib.verdict": "promoted", "asib.verdict_reason": "better by 1.30 points, McNemar p 0.012"},
        "3": {"asib.verdict": "refused", "asib.verdict_reason": "as good as the champion: McNemar p 0.83"},
    }
    for version, tags in decisions.items():
        for key, value in (tags | {"asib.decided_by": "anna"}).items():
            mlflow.set_model_version_tag(NAME, version, key, value)
    return experiment, run


def photograph(page: Page, name: str) -> None:
    """For the README, where ASIB_SCREENSHOTS names a folder."""
    folder = os.environ.get("ASIB_SCREENSHOTS")
    if folder:
        page.wait_for_timeout(1500)
        page.screenshot(path=Path(folder) / name)


def test_versions_aliases_decisions_and_pictures_are_shown(mlflow_server: MlflowServer, run: tuple[str, str]) -> None:
    experiment, run_id = run
    with chromium() as page:
        page.goto(f"{mlflow_server.uri}/#/models/{NAME}")
        page.get_by_role("link", name="Version 3", exact=True).wait_for()
        close_assistant(page)
        rows = page.get_by_role("row")
        for version, alias, decision in (("1", "previous", None), ("2", "champion", "promoted"),
                                         ("3", "challenger", "refused")):  # fmt: skip
            row = rows.filter(has_text=f"Version {version}")
            expect(row).to_contain_text(f"@ {alias}")
            if decision is not None:
                expect(row).to_contain_text(f"asib.verdict: {decision}")
        photograph(page, "ui_registry.png")

        page.get_by_role("link", name="Version 3", exact=True).click()
        page.wait_for_url("**/versions/3")
        for words in ("asib.verdict_reason", "as good as the champion: McNemar p 0.83", "challenger"):
            expect(page.get_by_text(words).first).to_be_visible(timeout=SECONDS)

        open_picture(page, mlflow_server.uri, experiment, run_id, "reliability.png")
        picture = page.locator("img[src^='blob:'], img[src*='get-artifact']").first
        assert picture.evaluate("image => image.complete && image.naturalWidth") > 400
