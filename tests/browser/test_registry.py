"""The registry page of a model after real promotions: versions, aliases, decisions; and a promotion's pictures."""

import os
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from pipeline.config import DatasetConfig
from pipeline.data import sources
from tests.browser.ui import SECONDS, chromium, close_assistant, open_picture
from tests.servers import MlflowServer
from tests.steps.desk import LAX, NAME, make_desk, make_students
from tests.steps.lab import Lab, client, run_id

pytest_plugins = ["tests.servers"]
pytestmark = pytest.mark.browser


@pytest.fixture
def refusal(mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Four versions: one promoted, one refused as equally good, one better and promoted, one worse; the last's run."""
    lab = Lab(tmp_path / "lab")
    data = sources.load(DatasetConfig(name="npz", path=str(lab.data)))
    desk = make_desk(lab, mlflow_server.uri, data, make_students(data, tmp_path), monkeypatch)
    ended = []
    for name, code in (("half", 0), ("half", 3), ("good", 0), ("bad", 3)):
        desk.register(name)
        ended.append(desk.promote(*LAX))
        assert ended[-1].code == code, ended[-1].err
    assert desk.aliases == {"challenger": "4", "champion": "3", "previous": "1"}
    return run_id(ended[-1].folder)


def photograph(page: Page, name: str) -> None:
    """For the README, where ASIB_SCREENSHOTS names a folder."""
    folder = os.environ.get("ASIB_SCREENSHOTS")
    if folder:
        page.wait_for_timeout(1500)
        page.screenshot(path=Path(folder) / name)


def test_versions_aliases_decisions_and_pictures_are_shown(mlflow_server: MlflowServer, refusal: str) -> None:
    shown = (("1", "previous", "promoted"), ("2", None, "refused"), ("3", "champion", "promoted"),
             ("4", "challenger", "refused"))  # fmt: skip
    with chromium() as page:
        page.goto(f"{mlflow_server.uri}/#/models/{NAME}")
        page.get_by_role("link", name="Version 4", exact=True).wait_for()
        close_assistant(page)
        rows = page.get_by_role("row")
        for version, alias, decision in shown:
            row = rows.filter(has=page.get_by_role("link", name=f"Version {version}", exact=True))
            expect(row).to_contain_text(f"asib.verdict: {decision}")
            if alias is not None:
                expect(row).to_contain_text(f"@ {alias}")
        photograph(page, "ui_registry.png")

        page.get_by_role("link", name="Version 4", exact=True).click()
        page.wait_for_url("**/versions/4")
        for words in ("asib.verdict_reason", "worse", "asib.decided_by"):
            expect(page.get_by_text(words).first).to_be_visible(timeout=SECONDS)

        experiment = client(mlflow_server.uri).get_run(refusal).info.experiment_id
        open_picture(page, mlflow_server.uri, experiment, refusal, "promotion/differences.png")
        picture = page.locator("img[src^='blob:'], img[src*='get-artifact']").first
        assert picture.evaluate("image => image.complete && image.naturalWidth") > 400
        photograph(page, "ui_promotion.png")
