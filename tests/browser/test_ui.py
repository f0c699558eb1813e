"""The MLflow UI shows the main job's runs nested, with charts and pictures."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.ui import chromium, open_charts, open_picture, open_runs, tracked
from tests.servers import MlflowServer

pytest_plugins = ["tests.servers"]
pytestmark = pytest.mark.browser


def test_main_job_is_shown_nested_with_charts_and_pictures(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    client, number = tracked(mlflow_server.uri, tmp_path, "ui", "main", "run_name=demo")
    (distilled,) = client.search_runs([number], "tags.`asib.step` = 'distill'")
    with chromium() as page:
        open_runs(page, mlflow_server.uri, number)
        for name in ("demo", "student_alone", "teacher_0", "teacher_1", "distill", "evaluate"):
            expect(page.get_by_role("link", name=re.compile(f"^{name}\\b"))).to_be_visible(timeout=60_000)
        for column in ("final/acc_val_selected", "method.name", "seed"):
            expect(page.get_by_role("columnheader", name=column).first).to_be_visible()
        assert distilled.info.run_name == "distill resnet8 ← resnet8+wrn_16_1 asib s0"
        open_charts(page, mlflow_server.uri, number, distilled.info.run_id)
        page.get_by_placeholder("Search metric charts").fill("student/acc")
        accuracy = page.get_by_text(f"{distilled.info.run_name} (student/acc)")
        expect(accuracy).to_be_visible(timeout=60_000)
        for name in ("curves.png", "confusion.png"):
            open_picture(page, mlflow_server.uri, number, distilled.info.run_id, name)
            assert shown_width(page) > 400


def shown_width(page: Page) -> int:
    """Of the picture that is open, in pixels, once it is loaded."""
    picture = page.locator("img[src^='blob:'], img[src*='get-artifact']").first
    width: int = picture.evaluate("image => image.complete && image.naturalWidth")
    return width


def test_tasks_are_shown_nested_with_their_matrix(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    short = ["method.num_stages=1", "method.student_epochs_per_stage=[1]", "method=replay", "continual.buffer_size=9"]
    named = ["tasks=2", "run_name=classes"]
    client, number = tracked(mlflow_server.uri, tmp_path, "tasks", "continual", *named, *short)
    (outer,) = client.search_runs([number], "tags.`asib.step` = 'continual'")
    with chromium() as page:
        open_runs(page, mlflow_server.uri, number)
        for name in ("classes", "task 1 of 2", "task 2 of 2"):
            expect(page.get_by_role("link", name=re.compile(f"^{name}\\b"))).to_be_visible(timeout=60_000)
        open_charts(page, mlflow_server.uri, number, outer.info.run_id)
        page.get_by_placeholder("Search metric charts").fill("test_forgetting")
        expect(page.get_by_text("continual/test_forgetting").first).to_be_visible(timeout=60_000)
        for name in ("accuracy_matrix.png", "tasks.png"):
            open_picture(page, mlflow_server.uri, number, outer.info.run_id, name)
            assert shown_width(page) > 400
